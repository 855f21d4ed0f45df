"""Several ranks for each test of this folder, as real processes."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch.distributed.tensor")


class Ranks:
    """Runs functions of `worker.py` on several ranks."""

    def __init__(self) -> None:
        zygote = Path(__file__).with_name("zygote.py")
        self.process = subprocess.Popen(
            [sys.executable, "-W", "ignore", str(zygote)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self.process.stdout is not None
        assert self.process.stdout.readline() == "ready\n"
        self.numbers = itertools.count()

    def codes(
        self,
        function: str,
        ranks: int,
        folder: Path,
        *,
        timeout: float = 240,
        group_timeout: float = 120,
        kill_within: float | None = None,
        **arguments: Any,
    ) -> list[int]:
        """How each rank's process ended."""
        request = {
            "function": function,
            "ranks": ranks,
            "folder": str(folder),
            "timeout": timeout,
            "group_timeout": group_timeout,
            "kill_within": kill_within,
            "number": next(self.numbers),
            "arguments": arguments,
        }
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())

    def results(self, function: str, ranks: int, folder: Path, **arguments: Any) -> list[Any]:
        """What each rank's function returned or raised."""
        codes = self.codes(function, ranks, folder, **arguments)
        assert codes == [0] * ranks, self.logs(folder)
        return [json.loads((folder / f"result-{rank}.json").read_text()) for rank in range(ranks)]

    def run(self, function: str, ranks: int, folder: Path, **arguments: Any) -> list[Any]:
        """What each rank's function returned; none may raise."""
        results = self.results(function, ranks, folder, **arguments)
        assert all("value" in result for result in results), self.logs(folder)
        return [result["value"] for result in results]

    def errors(self, function: str, ranks: int, folder: Path, **arguments: Any) -> list[Any]:
        """What each rank's function raised; all must."""
        results = self.results(function, ranks, folder, **arguments)
        assert all("error" in result for result in results), results
        return results

    def logs(self, folder: Path) -> str:
        return "\n".join(path.read_text()[-3000:] for path in sorted(folder.glob("log-*.txt")))


@pytest.fixture(scope="session")
def ranks():
    found = Ranks()
    yield found
    found.process.stdin.close()
    found.process.wait(30)
