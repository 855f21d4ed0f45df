"""Starts workers, gives them their turns, and watches the host's memory meanwhile."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent.parent
#: How often memory is looked at.
LOOK = 0.005


def process_memory(pid: int) -> int:
    """Anonymous and shared memory of a process: what it took besides mapped files."""
    total = 0
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith(("RssAnon:", "RssShmem:")):
            total += int(line.split()[1]) * 1024
    return total


def machine_memory() -> int:
    """All of the machine's memory that cannot be had back: page-locked memory of drivers too, which
    no process is charged with."""
    found = {}
    for line in Path("/proc/meminfo").read_text().splitlines():
        name, _, value = line.partition(":")
        found[name] = int(value.split()[0]) * 1024
    cache = found["Cached"] - found["Shmem"] + found["Buffers"] + found["SReclaimable"]
    return found["MemTotal"] - found["MemFree"] - cache


class Watch:
    """The peaks of both while it is entered."""

    def __init__(self, pid: int) -> None:
        self.pid, self.over = pid, threading.Event()
        self.process = self.machine = 0
        self.thread = threading.Thread(target=self.look)

    def look(self) -> None:
        while True:
            last = self.over.wait(LOOK)
            self.process = max(self.process, process_memory(self.pid))
            self.machine = max(self.machine, machine_memory())
            if last:
                return

    def __enter__(self) -> Watch:
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.over.set()
        self.thread.join()


@dataclass
class Sample:
    seconds: float = 0.0
    bytes: int = 0
    process: int = 0
    machine: int = 0
    said: str | None = None
    more: dict[str, Any] = field(default_factory=dict)
    failed: str | None = None


class Worker:
    """A process that has begun to import, and waits for its turn."""

    def __init__(self, request: dict[str, Any], site: Path | None) -> None:
        path = [str(ROOT)] if site is None else [str(site), str(ROOT)]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path)}
        command = [sys.executable, "-m", "bench.gpu.worker", json.dumps(request)]
        self.process = subprocess.Popen(
            command,
            env=environment,
            cwd=site or ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def hear(self) -> str:
        """The next line of the conversation; peers print lines of their own."""
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith("#"):
                return line[1:].strip()
        assert self.process.stderr is not None
        error = self.process.stderr.read().strip().splitlines()
        raise RuntimeError(error[-1] if error else f"ended with {self.process.wait()}")

    def go_on(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write("\n")
        self.process.stdin.flush()

    def measure(self, before: Callable[[], object]) -> Sample:
        try:
            self.hear()
            process, machine = process_memory(self.process.pid), machine_memory()
            self.go_on()
            self.hear()
            before()
            with Watch(self.process.pid) as watch:
                self.go_on()
                told = json.loads(self.hear())
            self.go_on()
            checked = json.loads(self.hear())
        except (RuntimeError, OSError, ValueError) as error:
            return Sample(failed=f"{error}")
        finally:
            self.end()
        sample = Sample(
            told.pop("seconds"),
            told.pop("bytes", 0),
            max(watch.process - process, 0),
            max(watch.machine - machine, 0),
            told.pop("said", None),
            told,
        )
        if checked.get("wrong"):
            names = checked["wrong"]
            sample.failed = f"wrong content of {len(names)} tensors, e.g. {names[0]}"
        return sample

    def end(self) -> None:
        self.process.kill()
        self.process.communicate()
