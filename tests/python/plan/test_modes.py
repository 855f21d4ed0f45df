"""Ranks that load together: what each gets is what it would load alone, each byte is read once, and
nobody waits for the dead.
"""

from __future__ import annotations

import glob
import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import modes_data
import numpy as np
import pytest
import tonnage

WORKER = Path(__file__).with_name("modes_worker.py")


def run(path: Path, folder: Path, world: int, *cases: str) -> list[dict[str, Any]]:
    """What each rank of a gloo group found, by case."""
    folder.mkdir()
    environment = {**os.environ, "WORLD_SIZE": str(world), "OMP_NUM_THREADS": "1"}
    ranks = [
        subprocess.Popen(
            [sys.executable, WORKER, str(path), str(folder), *cases],
            env={**environment, "RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        for rank in range(world)
    ]
    try:
        told = [one.communicate(timeout=500)[0].decode() for one in ranks]
    finally:
        for one in ranks:
            one.kill()
    for rank, one in enumerate(ranks):
        assert one.returncode in (0, -signal.SIGKILL), told[rank]
    files = [{case: folder / f"{case}.{rank}.json" for case in cases} for rank in range(world)]
    return [
        {case: json.loads(file.read_text()) for case, file in of.items() if file.exists()}
        for of in files
    ]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, int]:
    path = tmp_path_factory.mktemp("modes") / "model.safetensors"
    return path, modes_data.write(path, modes_data.tensors())


@pytest.fixture(autouse=True)
def no_window_stays() -> Any:
    before = set(glob.glob("/dev/shm/tonnage-*"))
    yield
    assert set(glob.glob("/dev/shm/tonnage-*")) <= before


@pytest.mark.parametrize("world", [2, 4])
def test_every_mode_brings_what_a_rank_alone_loads_and_reads_each_byte_once(
    whole: tuple[Path, int], tmp_path: Path, world: int
) -> None:
    path, size = whole
    ranks = run(path, tmp_path / "group", world, "all_modes", "apart")
    assert len(ranks) == world
    for key, first in ranks[0]["all_modes"].items():
        if key == "seconds":
            continue
        told = [one["all_modes"][key] for one in ranks]
        assert [one["wrong"] for one in told] == [[]] * world, key
        assert len({one["mode"] for one in told}) == 1, key
        assert all(one["staging"] <= 1 << 20 for one in told if "float64" not in key), key
        if first["mode"] != "direct":
            assert sum(one["bytes"] for one in told) == size, key
        # On a local disk the page cache is what all share.
        assert first["mode"] == ("direct" if key.startswith("auto") else key.split()[0])
    apart = [one["apart"] for one in ranks]
    assert [one["wrong"] for one in apart] == [[]] * world
    assert sum(one["bytes"] for one in apart) == size


def test_what_differs_is_told_to_all(whole: tuple[Path, int], tmp_path: Path) -> None:
    ranks = run(whole[0], tmp_path / "group", 2, "other_plan", "other_mode", "late")
    for rank in ranks:
        assert rank["other_plan"]["code"] == "PLAN_DIGEST", rank
        assert rank["other_mode"]["code"] == "PLAN_DIGEST", rank
    assert "waited 4.0 s for member 1" in ranks[0]["late"]["error"], ranks
    assert ranks[0]["late"]["seconds"] < 30


@pytest.mark.parametrize("case", ["killed_shm", "killed_collective"])
def test_a_rank_that_is_killed_is_an_error_on_the_others(
    whole: tuple[Path, int], tmp_path: Path, case: str
) -> None:
    alive, dead = run(whole[0], tmp_path / "group", 2, case)
    assert dead == {}
    told = alive[case]
    assert "error" in told, told
    assert told["seconds"] < 60
    if case == "killed_shm":
        assert "member 1 of 2" in told["error"], told
    else:
        assert told["code"] == "RANK_LOST", told


def test_memory_is_the_tensors_and_the_staging_budget(tmp_path: Path) -> None:
    made = {f"{at}.columns": ("BF16", (2048, 4096)) for at in range(4)}
    made |= {f"{at}.whole": ("BF16", (2048, 2048)) for at in range(2)}
    made |= {"rows": ("F32", (4096, 1024)), "norm": ("F32", (64,))}
    path = tmp_path / "model.safetensors"
    size = modes_data.write(path, made)
    ranks = run(path, tmp_path / "group", 2, "memory")
    for mode in ("shm", "collective"):
        told = [one["memory"][mode] for one in ranks]
        assert sum(one["bytes"] for one in told) == size
        for one in told:
            assert one["tensors"] > 40 << 20
            # The window belongs to all members; what one holds besides is counted.
            assert one["staging"] <= 16 << 20, (mode, told)
            assert mode == "shm" or one["staging"] > 0
            assert one["tensors"] * 0.9 < one["more"] <= one["tensors"] + (16 << 20) + (6 << 20), (
                told
            )


def test_threads_that_name_a_window_need_no_group(whole: tuple[Path, int], tmp_path: Path) -> None:
    plan = tonnage.open(whole[0]).plan(tonnage.Mesh(tp=2), rules=modes_data.rules(2))
    plans = [plan.of(tonnage.open(whole[0])) for _ in range(2)]
    window = tmp_path / "window"
    found: dict[int, Any] = {}

    def load(rank: int) -> None:
        found[rank] = plans[rank].load(
            rank=rank, mode="shm", window=window, framework="numpy", timeout=120
        )

    threads = [threading.Thread(target=load, args=(rank,)) for rank in range(2)]
    for one in threads:
        one.start()
    for one in threads:
        one.join()
    assert not window.exists()
    for rank in range(2):
        alone = plan.load(rank=rank, framework="numpy")
        assert list(found[rank]) == list(alone)
        for name, array in alone.items():
            assert found[rank][name].tobytes() == array.tobytes(), name
            assert isinstance(found[rank][name], np.ndarray)
    reports = [one._checkpoint.report for one in plans if one._checkpoint is not None]
    assert sum(report.bytes for report in reports) == whole[1]


def test_what_cannot_be_is_refused(whole: tuple[Path, int], tmp_path: Path) -> None:
    plan = tonnage.open(whole[0]).plan(tonnage.Mesh(tp=2), rules=modes_data.rules(2))
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"mode": "fast"}, "mode must be one of"),
        ({"mode": "collective"}, "needs a process group"),
        ({"mode": "shm"}, "needs window="),
        ({"mode": "shm", "window": tmp_path / "w", "select": "F32"}, "all of a rank's tensors"),
        ({"mode": "shm", "window": tmp_path / "w", "verify": True}, "without verify"),
    ]
    for arguments, text in wrong:
        with pytest.raises(tonnage.UsageError, match=text):
            plan.load(rank=0, **arguments)
    with pytest.raises(OSError, match=r"waited 0\.2 s for member 1"):
        plan.load(rank=0, mode="shm", window=tmp_path / "w", timeout=0.2)
    assert not (tmp_path / "w").exists()


def test_auto_goes_by_where_the_files_lie(whole: tuple[Path, int]) -> None:
    plan = tonnage.open(whole[0]).plan(tonnage.Mesh(tp=4), rules=modes_data.rules(2))
    modes = {name: plan.bytes(0, profile=name).mode for name in ("nvme", "page_cache", "nfs", "s3")}
    assert modes == {"nvme": "direct", "page_cache": "direct", "nfs": "shm", "s3": "shm"}
    assert "memory that all see" in plan.bytes(1, profile="nfs").mode_reason
    assert plan.load(rank=1, mode="auto")
    assert plan.bytes(0).mode == "direct"
