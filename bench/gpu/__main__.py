"""The command: makes the files, runs every comparison, writes `gpu.json` and `gpu.md`.

Starts the processes of a round together, since importing takes longer than loading, and gives them
their turns one by one. What no time is left for is named as skipped.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from . import files
from .run import Sample, Worker

#: Which wheel's folder a side runs from, and what it is called in the tables.
SIDES = {
    "tonnage": ("tonnage", "Tonnage"),
    "reference": ("safetensors", "reference 0.8"),
    "get_tensor": ("safetensors", "reference 0.8, get_tensor of each"),
    "get_slice": ("safetensors", "reference 0.8, get_slice of each"),
    "prefetch": ("safetensors-rc", "reference 0.9rc1, prefetch, all files at once"),
    "prefetch_in_turn": ("safetensors-rc", "reference 0.9rc1, prefetch, file by file"),
    "fastsafetensors": ("fastsafetensors", "fastsafetensors"),
    "fastsafetensors_buffered": ("fastsafetensors", "fastsafetensors, buffered"),
    "instanttensor": ("instanttensor", "InstantTensor"),
    "instanttensor_buffered": ("instanttensor", "InstantTensor, buffered"),
}
#: Who loads everything, from where: a peer's way for cached files is no way for others.
COLD = ("tonnage", "reference", "prefetch", "prefetch_in_turn", "fastsafetensors", "instanttensor")
WARM = (*COLD, "fastsafetensors_buffered", "instanttensor_buffered")
SMALL = ("tonnage", "reference", "get_tensor", "prefetch", "fastsafetensors", "instanttensor")
PARTS = ("limits", "load", "small", "first", "sliced", "budgets", "save")


@dataclass
class Row:
    part: str
    what: str
    side: str
    samples: list[Sample] = field(default_factory=list)

    def good(self) -> list[Sample]:
        return [sample for sample in self.samples if sample.failed is None]

    def seconds(self) -> float | None:
        good = self.good()
        return statistics.median(sample.seconds for sample in good) if good else None


class Bench:
    def __init__(self, arguments: argparse.Namespace) -> None:
        self.arguments, self.device = arguments, arguments.device
        self.end = time.monotonic() + arguments.seconds
        self.rows: list[Row] = []
        self.skipped: list[str] = []
        self.limits: dict[str, float] = {}
        self.sites = install(arguments.bundle)
        self.folder = Path(arguments.folder)
        self.tiny = files.write(self.folder / "tiny", files.small(8), 2)

    def left(self, what: str, need: float) -> bool:
        if time.monotonic() + need < self.end:
            return True
        self.skipped.append(what)
        return False

    def worker(self, task: str, side: str, **more: Any) -> Worker:
        site = None if self.sites is None else self.sites[SIDES[side][0]]
        request = {"task": task, "side": side, "device": self.device, "warm_up": str(self.tiny)}
        return Worker({**request, **more}, site)

    def rounds(
        self,
        part: str,
        cases: list[tuple[str, str, dict[str, Any], Callable[[], object]]],
        task: str,
        count: int,
    ) -> None:
        """Each case `count` times, interleaved, each round in another order."""
        absent = {c[1] for c in cases if self.sites and SIDES[c[1]][0] not in self.sites}
        self.skipped += [f"{part}: {SIDES[side][1]} is not installed" for side in sorted(absent)]
        cases = [case for case in cases if case[1] not in absent]
        rows = [Row(part, what, side) for what, side, _, _ in cases]
        self.rows += rows
        slowest = 3.0 * len(cases)
        for number in range(count):
            if not self.left(f"{part}, round {number + 1}", slowest):
                return
            start = time.monotonic()
            turn = number * len(cases) // count
            order = [*range(turn, len(cases)), *range(turn)]
            workers = {at: self.worker(task, cases[at][1], **cases[at][2]) for at in order}
            for at in order:
                sample = workers[at].measure(cases[at][3])
                rows[at].samples.append(sample)
                tell(rows[at], sample)
            slowest = time.monotonic() - start

    # ---- the comparisons ----

    def measure_limits(self, folder: Path) -> None:
        worker = self.worker("limits", "tonnage", folder=str(folder))
        sample = worker.measure(lambda: None)
        if sample.failed is not None:
            self.skipped.append(f"limits: {sample.failed}")
        self.limits = sample.more.get("gb_per_s", {})
        for name, speed in self.limits.items():
            print(f"{name:45} {speed:8.2f} GB/s", flush=True)

    def load(self, folder: Path) -> None:
        before = {"cold": lambda: files.evict(folder), "warm": lambda: files.warm(folder)}
        cases = [
            (state, side, {"folder": str(folder)}, before[state])
            for state, sides in (("cold", COLD), ("warm", WARM))
            for side in sides
        ]
        self.rounds("load", cases, "load", self.arguments.rounds)

    def warm(self, part: str, task: str, folder: Path, sides: tuple[str, ...], count: int) -> None:
        cases = [("warm", s, {"folder": str(folder)}, lambda: files.warm(folder)) for s in sides]
        self.rounds(part, cases, task, count)

    def budgets(self, folder: Path) -> None:
        cases = [
            (
                f"{state}, staging {mib} MiB",
                "tonnage",
                {"folder": str(folder), "options": {"staging": mib << 20}},
                (lambda: files.evict(folder)) if state == "cold" else (lambda: files.warm(folder)),
            )
            for state in ("cold", "warm")
            for mib in (16, 64, 256)
        ]
        self.rounds("budgets", cases, "load", max(1, self.arguments.rounds - 1))

    def save(self) -> None:
        target = self.folder / "saved" / "model.safetensors"

        def before() -> None:
            target.unlink(missing_ok=True)
            os.sync()

        gib = self.arguments.gib / 2
        cases = [
            (what, side, {"target": str(target), "gib": gib, "durable": durable}, before)
            for what, durable in (("durable (fsync of file and folder)", True), ("plain", False))
            for side in ("tonnage", "reference")
        ]
        self.rounds("save", cases, "save", max(1, self.arguments.rounds - 1))
        shutil.rmtree(target.parent, ignore_errors=True)

    def run(self) -> None:
        parts = self.arguments.parts or PARTS
        start = time.monotonic()
        entries = files.transformer(int(self.arguments.gib * 2**30))
        large = files.write(self.folder / "large", entries, 3)
        many = files.write(self.folder / "many", files.small(self.arguments.small), 1)
        print(f"files written in {time.monotonic() - start:.1f} s", flush=True)
        if "limits" in parts:
            self.measure_limits(large)
        if "load" in parts:
            self.load(large)
        fewer = max(1, self.arguments.rounds - 1)
        if "small" in parts:
            self.warm("small", "load", many, SMALL, fewer)
        if "first" in parts:
            sides = ("tonnage", "prefetch", "instanttensor_buffered", "get_tensor")
            self.warm("first", "first", large, sides, fewer)
        if "sliced" in parts:
            self.warm("sliced", "sliced", large, ("tonnage", "prefetch", "get_slice"), fewer)
        if "budgets" in parts:
            self.budgets(large)
        if "save" in parts:
            self.save()


def tell(row: Row, sample: Sample) -> None:
    if sample.failed is not None:
        print(f"{row.part:8} {row.what:24} {row.side:17} FAILED: {sample.failed}", flush=True)
        return
    print(
        f"{row.part:8} {row.what:24} {row.side:17} {sample.seconds:8.3f} s "
        f"{sample.bytes / sample.seconds / 1e9:7.2f} GB/s  host {sample.process / 2**20:6.0f} MiB, "
        f"machine {sample.machine / 2**20:6.0f} MiB  {sample.said or ''}",
        flush=True,
    )


def install(bundle: str | None) -> dict[str, Path] | None:
    """Each wheel of the bundle into a folder of its own; without a bundle, what is installed."""
    if bundle is None:
        return None
    root = Path(tempfile.gettempdir()) / "tonnage-gpu-sites"
    wheels = {"tonnage": list(Path(bundle).glob("tonnage-*.whl"))}
    for folder in sorted((Path(bundle) / "peers").iterdir()):
        wheels[folder.name] = list(folder.glob("*.whl"))
    sites = {}
    pip = [sys.executable, "-m", "pip", "install", "-q", "--no-index", "--no-deps", "--no-compile"]
    for name, found in wheels.items():
        sites[name] = root / name
        shutil.rmtree(sites[name], ignore_errors=True)
        into = ["--no-cache-dir", "--target", str(sites[name]), *map(str, found)]
        done = subprocess.run([*pip, *into], stderr=subprocess.PIPE, text=True)
        if done.returncode != 0:
            # A peer's wheel may be for another Python; what is left can be measured all the same.
            print(f"{name} cannot be installed here: {done.stderr.strip()}", flush=True)
            del sites[name]
    return sites


def machine(device: str) -> dict[str, Any]:
    import torch

    lines = Path("/proc/cpuinfo").read_text().splitlines()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    cuda = device.startswith("cuda")
    return {
        "device": torch.cuda.get_device_name(device) if cuda else "none",
        "processor": names[0] if names else platform.processor(),
        "cores": os.cpu_count(),
        "memory_gib": round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30, 1),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def versions(sites: dict[str, Path] | None) -> dict[str, str]:
    found = {}
    for name, site in (sites or {}).items():
        found[name] = ", ".join(sorted(path.stem for path in site.glob("*.dist-info")))
    return found


def markdown(bench: Bench, record: dict[str, Any]) -> str:
    lines = [f"`{record['command']}` on {json.dumps(record['machine'])}", ""]
    if bench.limits:
        lines += ["| limit of the machine | GB/s |", "|---|---:|"]
        lines += [f"| {name} | {speed:.2f} |" for name, speed in bench.limits.items()]
        lines.append("")
    lines += [
        "| part | what | side | median s | GB/s | Tonnage ÷ it | host MiB | machine MiB | n |",
        "|---|---|---|---:|---:|---:|---:|---:|---:|",
    ]
    own = {(r.part, r.what): r.seconds() for r in bench.rows if r.side == "tonnage"}
    for row in bench.rows:
        seconds, good = row.seconds(), row.good()
        name = SIDES[row.side][1]
        if seconds is None:
            why = row.samples[-1].failed if row.samples else "skipped"
            lines.append(f"| {row.part} | {row.what} | {name} | {why} | | | | | 0 |")
            continue
        mine = own[row.part, row.what]
        ratio = f"{mine / seconds:.2f}" if mine is not None else ""
        peaks = [max(getattr(s, what) for s in good) / 2**20 for what in ("process", "machine")]
        lines.append(
            f"| {row.part} | {row.what} | {name} | {seconds:.3f} "
            f"| {good[0].bytes / seconds / 1e9:.2f} | {ratio} | {peaks[0]:.0f} | {peaks[1]:.0f} "
            f"| {len(good)} |"
        )
    if bench.skipped:
        lines += ["", f"Skipped: {'; '.join(bench.skipped)}."]
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu", description=__doc__)
    parser.add_argument("parts", nargs="*", choices=[*PARTS, []], help="all, if none is named")
    parser.add_argument("--bundle", help="folder that `make gpu-bundle` made")
    parser.add_argument("--out", default=".", help="where gpu.json and gpu.md go")
    parser.add_argument("--folder", default="/tmp/tonnage-gpu-files", help="where the files go")
    parser.add_argument("--device", default="cuda:0")
    parser.add_argument("--gib", type=float, default=8, help="size of the large checkpoint")
    parser.add_argument("--small", type=int, default=100_000, help="how many small tensors")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=450, help="begin nothing after this time")
    arguments = parser.parse_args()
    bench = Bench(arguments)
    start = time.monotonic()
    try:
        bench.run()
    finally:
        shutil.rmtree(bench.folder, ignore_errors=True)
        record = {
            "command": "python -m bench.gpu " + " ".join(sys.argv[1:]),
            "machine": machine(arguments.device),
            "with": versions(bench.sites),
            "seconds": round(time.monotonic() - start, 1),
            "limits_gb_per_s": bench.limits,
            "skipped": bench.skipped,
            "rows": [asdict(row) for row in bench.rows],
        }
        out = Path(arguments.out)
        out.mkdir(parents=True, exist_ok=True)
        (out / "gpu.json").write_text(json.dumps(record, indent=1) + "\n")
        text = markdown(bench, record)
        (out / "gpu.md").write_text(text)
        print("\n" + text, flush=True)
    own = [row for row in bench.rows if row.side == "tonnage"]
    return int(any(sample.failed for row in own for sample in row.samples))


if __name__ == "__main__":
    sys.exit(main())
