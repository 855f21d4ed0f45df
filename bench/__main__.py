"""The command: run suites, show tables, keep the samples."""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

from . import durable, host, peers, plan, quant, sharded
from .measure import ROOT, SIDES, Row
from .suites import SUITES

RESULTS = Path(__file__).parent / "results"


def machine() -> dict[str, Any]:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return {
        "processor": names[0] if names else platform.processor(),
        "cores": os.cpu_count(),
        "memory_gib": round(total / 2**30, 1),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "load_at_start": os.getloadavg()[0],
    }


def versions() -> dict[str, str]:
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True
    ).stdout.strip()
    names = ("tonnage", "safetensors", "torch", "numpy")
    return {**{name: version(name) for name in names}, "commit": commit}


def mib(values: list[int]) -> str:
    return f"{max(values) / 2**20:,.0f}" if values else "–"


def number(seconds: float) -> str:
    return f"{seconds * 1000:,.1f} ms" if seconds < 1 else f"{seconds:,.2f} s"


def table(rows: list[Row]) -> str:
    """Markdown: medians, ratio, and peak memory above the start (anonymous / all resident, MiB)."""
    lines = [
        "| what | reference | Tonnage | ratio | memory, reference | memory, Tonnage |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for row in rows:
        times = " | ".join(number(row.median(side)) for side in SIDES)
        peaks = " | ".join(f"{mib(row.anonymous[s])} / {mib(row.resident[s])}" for s in SIDES)
        lines.append(f"| {row.title} | {times} | {row.ratio():.2f} × | {peaks} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    apart: dict[str, Any] = {
        "host": host.run,
        "plan": plan.run,
        "quant": quant.run,
        "sharded": sharded.run,
        **durable.SUITES,
    }
    parser.add_argument(
        "suites",
        nargs="*",
        choices=[*SUITES, *apart, []],
        help=f"all but {', '.join(apart)}, if none is named",
    )
    parser.add_argument("--rounds", type=int, default=5, help="measurements of each side")
    parser.add_argument("--folder", help="where the files go (default: the temporary folder)")
    parser.add_argument(
        "--install", action="store_true", help="host: install the other loaders, then end"
    )
    parser.add_argument("--size", type=float, default=4, help="of these: GiB of the file")
    parser.add_argument(
        "--seconds", type=float, default=300, help="of these: no round begins after"
    )
    arguments = parser.parse_args()
    if arguments.install:
        peers.install()
        return
    RESULTS.mkdir(exist_ok=True)
    for name in arguments.suites or SUITES:
        record: dict[str, Any] = {
            "command": f"python -m bench {name}",
            "machine": machine(),
            "with": versions(),
        }
        with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
            if name in apart:
                size, limit = int(arguments.size * 2**30), arguments.seconds
                record.update(apart[name](Path(folder), arguments.rounds, size, limit))
                (RESULTS / f"{name}.json").write_text(json.dumps(record, indent=1) + "\n")
                continue
            rows = SUITES[name](Path(folder), arguments.rounds)
        record["rows"] = [vars(row) for row in rows]
        (RESULTS / f"{name}.json").write_text(json.dumps(record, indent=1) + "\n")
        print(f"\n{table(rows)}\n", flush=True)


if __name__ == "__main__":
    main()
