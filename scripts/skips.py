"""Say what a test run left out, and why: a skipped test is a claim nobody checked.

Reads the JUnit reports that the Python tests wrote and the `#[ignore = "…"]` marks of the Rust
sources. Fails where a skip gives no reason.
"""

from __future__ import annotations

import re
import sys
import xml.etree.ElementTree as ET
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
IGNORE = re.compile(r"#\[ignore(?:\s*=\s*\"([^\"]*)\")?\s*\]")


def python_skips(report: Path) -> tuple[int, Counter[str]]:
    cases = list(ET.parse(report).iter("testcase"))
    reasons: Counter[str] = Counter()
    for case in cases:
        for skipped in case.iter("skipped"):
            reasons[skipped.get("message") or ""] += 1
    return len(cases), reasons


def rust_ignores() -> Counter[str]:
    reasons: Counter[str] = Counter()
    for source in sorted((ROOT / "crates").rglob("*.rs")):
        for match in IGNORE.finditer(source.read_text(encoding="utf-8")):
            reasons[match[1] or ""] += 1
    return reasons


def show(title: str, reasons: Counter[str]) -> None:
    print(f"{title}: {sum(reasons.values())} skipped")
    for reason, count in sorted(reasons.items()):
        print(f"  {count:4}  {reason or 'NO REASON GIVEN'}")


def main(reports: Path) -> int:
    unexplained = 0
    for report in sorted(reports.glob("*.xml")):
        total, reasons = python_skips(report)
        show(f"Python, {report.stem} ({total} tests)", reasons)
        unexplained += reasons[""]
    ignored = rust_ignores()
    show("Rust, marked #[ignore] (`make test-slow` runs them)", ignored)
    unexplained += ignored[""]
    return int(unexplained > 0)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
