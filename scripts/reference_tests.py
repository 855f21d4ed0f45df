"""Run the reference's own Python tests, unmodified, on the reference and on Tonnage.

The tests come from the reference's source distribution, fetched from PyPI at run time into
target/reference; nothing of them is kept in this repository. Every test file runs in a process of
its own, once with the reference package of that same release and once with Tonnage put in its
place by a pytest plugin before collection. The rule: what passes with the reference passes with
Tonnage; exit status 1 where it does not hold. Those of its prefetch engine that need a GPU are
skipped elsewhere: `--carry` puts them into a folder for `scripts/test-gpu.sh`.

    python scripts/reference_tests.py [--only RELEASE] [-v]
    python scripts/reference_tests.py --carry FOLDER
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tarfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
WORK = Path(os.environ.get("CARGO_TARGET_DIR", ROOT / "target")) / "reference"
PLUGINS = ROOT / "tests" / "reference_plugin"
#: release → must the rule hold?
RELEASES = {"0.8.0": True, "0.9.0rc1": True}
#: Longest that one file's tests may take before they count as hung.
TIMEOUT_S = 600


@dataclass(frozen=True)
class Outcome:
    outcome: str
    why: str


Outcomes = dict[str, Outcome]


def pip(*arguments: str) -> None:
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", *arguments]
    subprocess.run(command, check=True)


def fetch(release: str) -> tuple[Path, Path]:
    """The release's tests, and a folder to import the release itself from."""
    home = WORK / release
    site, source = home / "site", home / f"safetensors-{release}"
    if not source.is_dir():
        pip("download", "-q", "--no-deps", "--no-binary", "safetensors", f"safetensors=={release}",
            "-d", str(home))  # fmt: skip
        with tarfile.open(home / f"safetensors-{release}.tar.gz") as archive:
            archive.extractall(home, filter="data")
    if not site.is_dir():
        pip("install", "-q", "--no-deps", "--target", str(site), f"safetensors=={release}")
    return source / "bindings" / "python", site


def read_outcomes(log: Path) -> Outcomes:
    found: Outcomes = {}
    for line in log.read_text(encoding="utf-8").splitlines():
        entry = json.loads(line)
        found[entry["test"]] = Outcome(entry["outcome"], entry["why"])
    return found


def run_file(home: Path, file: str, environment: dict[str, str], plugins: list[str]) -> Outcomes:
    """One file's outcomes. A test that kills the process is recorded, and the rest tried again."""
    log = WORK / "outcomes.jsonl"
    log.write_text("")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist"]
    command += [f"-p{name}" for name in ["record_outcomes", *plugins]]
    done: set[str] = set()
    while True:
        skip = [f"--deselect={test}" for test in done]
        try:
            status = subprocess.run(
                [*command, *skip, "--rootdir", str(home), "-c", os.devnull, file],
                cwd=home, env={**environment, "OUTCOMES": str(log)}, timeout=TIMEOUT_S,
                stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
            ).returncode  # fmt: skip
        except subprocess.TimeoutExpired:
            status = -1
        found = read_outcomes(log)
        # 0 all passed, 1 some failed, 5 none left; anything else that got further died half way.
        if status in (0, 1, 5) or set(found) == done:
            return found or {f"{file}::": Outcome("failed", f"pytest ended with status {status}")}
        done = set(found)


def run(home: Path, environment: dict[str, str], plugins: list[str]) -> Outcomes:
    outcomes: Outcomes = {}
    for path in sorted((home / "tests").glob("test_*.py")):
        outcomes |= run_file(home, f"tests/{path.name}", environment, plugins)
    return outcomes


def environment(first: list[Path]) -> dict[str, str]:
    path = os.pathsep.join(map(str, [*first, PLUGINS]))
    quiet = {"TF_CPP_MIN_LOG_LEVEL": "3", "PYTHONDONTWRITEBYTECODE": "1"}
    return {**os.environ, **quiet, "PYTHONPATH": path}


def table(reference: Outcomes, tonnage: Outcomes) -> Iterator[str]:
    words = ("passed", "skipped", "failed", "crashed")

    def counts(outcomes: Outcomes, file: str) -> str:
        tally = Counter(o.outcome for name, o in outcomes.items() if name.startswith(f"{file}::"))
        return "".join(f"{tally[word]:>9}" for word in words)

    heads = "".join(f"{word:>9}" for word in words)
    yield f"{'':32}{'reference':^36}  {'tonnage':^36}"
    yield f"{'file':32}{heads}  {heads}"
    for file in sorted({name.split("::")[0] for name in reference | tonnage}):
        yield f"{Path(file).name:32}{counts(reference, file)}  {counts(tonnage, file)}"


def keep(release: str, reference: Outcomes, tonnage: Outcomes) -> None:
    sides = {"reference": reference, "tonnage": tonnage}
    plain = {side: {name: vars(o) for name, o in found.items()} for side, found in sides.items()}
    (WORK / f"{release}.json").write_text(json.dumps(plain, indent=1) + "\n")


def compare(release: str, verbose: bool) -> bool:
    home, site = fetch(release)
    reference = run(home, environment([site]), [])
    tonnage = run(home, environment([]), ["tonnage_in_place"])
    keep(release, reference, tonnage)

    missing = Outcome("missing", "the test was not collected")
    mine = {name: tonnage.get(name, missing) for name in reference}
    passing = [name for name, found in reference.items() if found.outcome == "passed"]
    broken = [name for name in passing if mine[name].outcome != "passed"]
    print(f"\n== the reference's tests of {release}\n")
    print("\n".join(table(reference, tonnage)))
    kept = len(passing) - len(broken)
    print(f"\n{len(passing)} tests pass with the reference; {kept} of them pass with Tonnage.")
    for name, found in reference.items():
        if found.outcome in ("failed", "crashed") and mine[name].outcome == "passed":
            print(f"  {found.outcome} with the reference, passes with Tonnage: {name}")
    for name in broken:
        print(f"  {mine[name].outcome} with Tonnage: {name}")
        if verbose:
            print(mine[name].why)
    return bool(passing) and not broken


#: The tests of the prefetch engine.
PREFETCH = "test_pread_backend.py"


def carry(folder: Path) -> None:
    """Puts the tests that need a GPU into a folder."""
    home, _ = fetch("0.9.0rc1")
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copy(home / "tests" / PREFETCH, folder / PREFETCH)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", choices=RELEASES, help="run one release's tests")
    parser.add_argument("-v", "--verbose", action="store_true", help="show each failure's text")
    parser.add_argument("--carry", type=Path, help="only bring the tests for a GPU here")
    arguments = parser.parse_args()
    WORK.mkdir(parents=True, exist_ok=True)
    if arguments.carry:
        carry(arguments.carry)
        return 0
    releases = [arguments.only] if arguments.only else list(RELEASES)
    held = {release: compare(release, arguments.verbose) for release in releases}
    print()
    for release, ok in held.items():
        word = (
            "holds"
            if ok
            else ("DOES NOT HOLD" if RELEASES[release] else "does not hold (for information)")
        )
        print(f"{release}: the rule {word}")
    return int(not all(ok for release, ok in held.items() if RELEASES[release]))


if __name__ == "__main__":
    sys.exit(main())
