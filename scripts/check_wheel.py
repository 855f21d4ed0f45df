"""Hold the wheel to its size: one small wheel that runs everywhere is a promise."""

from __future__ import annotations

import sys
from pathlib import Path
from zipfile import ZipFile

LIMIT = 2_000_000


def main(folder: str) -> int:
    wheel = max(Path(folder).glob("tonnage-*.whl"), key=lambda path: path.stat().st_mtime)
    size = wheel.stat().st_size
    print(f"{wheel.name}: {size:,} bytes (limit {LIMIT:,})")
    names = ZipFile(wheel).namelist()
    missing = [need for need in ("tonnage/py.typed", "tonnage/_native.pyi") if need not in names]
    for name in missing:
        print(f"the wheel lacks {name}", file=sys.stderr)
    return int(size > LIMIT or bool(missing))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
