"""The libraries people load models with run on Tonnage without a change.

transformers, diffusers, peft, accelerate, the Hub's own helpers and `torch.load` save tiny models,
in one file and in file shards, with the reference package and with Tonnage in its place; each then
loads what either saved. All four ways, every tensor comes back with its dtype, shape and bytes.
Every side is a process of its own, so that no library holds on to the other package.
"""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

WORKER = Path(__file__).with_name("ecosystem_worker.py")
SIDES = ("reference", "tonnage")
CASES = (
    "transformers-bert-single",
    "transformers-bert-sharded",
    "transformers-llama-tied-single",
    "transformers-llama-bf16-sharded",
    "diffusers-unet-single",
    "diffusers-unet-sharded",
    "peft-lora",
    "accelerate-model-sharded",
    "accelerate-dispatch-sharded",
    "hub-state-dict-sharded",
    "torch-load",
)


def worker(*arguments: str) -> dict[str, Any]:
    command = [sys.executable, str(WORKER), *arguments]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, f"{arguments}:\n{result.stdout[-500:]}\n{result.stderr[-3000:]}"
    return json.loads(result.stdout.splitlines()[-1])


@dataclass(frozen=True)
class Runs:
    """What each side saved, and what each side loaded of what each side saved."""

    homes: dict[str, Path]
    saved: dict[str, dict[str, Any]]
    loaded: dict[str, dict[str, dict[str, Any]]]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    homes = {side: tmp_path_factory.mktemp(side) for side in SIDES}
    saved = {side: worker(side, "save", str(home))[str(home)] for side, home in homes.items()}
    loaded = {side: worker(side, "load", *map(str, homes.values())) for side in SIDES}
    by_side = {
        side: {saver: found[str(home)] for saver, home in homes.items()}
        for side, found in loaded.items()
    }
    return Runs(homes, saved, by_side)


def files(home: Path) -> dict[str, bytes]:
    found = sorted(home.glob("*.safetensors")) + sorted(home.glob("*.index.json"))
    return {path.name: path.read_bytes() for path in found}


def test_every_case_ran(runs: Runs) -> None:
    assert set(CASES) == set(runs.saved["tonnage"]) == set(runs.saved["reference"])
    assert all(found for found in runs.saved["tonnage"].values())


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("loader", SIDES)
@pytest.mark.parametrize("saver", SIDES)
def test_tensors_come_back_equal(runs: Runs, saver: str, loader: str, case: str) -> None:
    assert runs.loaded[loader][saver][case] == runs.saved[saver][case]


@pytest.mark.parametrize("case", CASES)
def test_both_sides_save_the_same_files(runs: Runs, case: str) -> None:
    # One metadata entry at most, so the reference's random order of entries does not show.
    reference, mine = (files(runs.homes[side] / case) for side in SIDES)
    assert list(mine) == list(reference)
    assert mine == reference
    if case.endswith("-sharded"):
        assert len(mine) > 2
