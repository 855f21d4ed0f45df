"""`Checkpoint.plan` and `Plan`: each rank gets what NumPy slices of the whole tensors are."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import tonnage
import torch
from tonnage import Mesh, OnlyRank, Owner, Replicate, Segments, Shard

SHAPES: dict[str, tuple[str, tuple[int, ...]]] = {
    "wide": ("bfloat16", (300, 2000)),
    "tall": ("float32", (131, 70)),
    "qkv": ("float16", (96, 64)),
    "bias": ("float32", (40,)),
    "scalar": ("float32", ()),
    "counts": ("int64", (7, 5)),
}
MESH = Mesh(pp=2, tp=4)
RULES: dict[str, Any] = {
    "wide": Shard(1),
    "tall": {"pp": Owner(1), "tp": Shard(0, uneven="balanced")},
    "qkv": Segments([64, 16, 16]),
    "bias": {"tp": OnlyRank(0, others="zeros")},
    "*": Replicate(),
}


def arrays() -> dict[str, np.ndarray[Any, Any]]:
    made = {}
    for seed, (name, (dtype, shape)) in enumerate(SHAPES.items()):
        random = np.random.default_rng(seed)
        kind = np.dtype(getattr(ml_dtypes, dtype, dtype))
        made[name] = random.integers(-99, 99, shape).astype(kind)
    return made


def expected(rank: int) -> dict[str, np.ndarray[Any, Any]]:
    whole, tp, pp = arrays(), rank % 4, rank // 4
    made = {
        "wide": whole["wide"][:, tp * 500 : (tp + 1) * 500],
        "qkv": np.concatenate(
            [
                whole["qkv"][begin + tp * size // 4 : begin + (tp + 1) * size // 4]
                for begin, size in ((0, 64), (64, 16), (80, 16))
            ]
        ),
        "bias": whole["bias"] if tp == 0 else np.zeros_like(whole["bias"]),
        "scalar": whole["scalar"],
        "counts": whole["counts"],
    }
    if pp == 1:
        begin, end = (tp * 33, (tp + 1) * 33) if tp < 3 else (99, 131)
        made["tall"] = whole["tall"][begin:end]
    return made


@pytest.fixture
def checkpoint(tmp_path: Path) -> Iterator[tonnage.Checkpoint]:
    tonnage.save(arrays(), tmp_path / "m", max_shard_size="600KB")
    with tonnage.open(tmp_path / "m") as opened:
        yield opened


def raw(tensor: Any) -> bytes:
    """A tensor's bytes, whatever its framework."""
    if isinstance(tensor, torch.Tensor):
        tensor = tensor.contiguous().reshape(-1).view(torch.uint8).numpy()
    return np.asarray(tensor).tobytes()


def check(found: dict[str, Any], rank: int) -> None:
    wanted = expected(rank)
    assert set(found) == set(wanted)
    for name, one in wanted.items():
        assert tuple(found[name].shape) == one.shape
        assert raw(found[name]) == one.tobytes(), f"{name} of rank {rank}"


@pytest.mark.parametrize("framework", ["numpy", "torch", "jax"])
@pytest.mark.parametrize("profile", [None, "nvme", "page_cache"])
def test_every_rank_gets_its_parts(
    checkpoint: tonnage.Checkpoint, framework: str, profile: str | None
) -> None:
    pytest.importorskip(framework)
    plan = checkpoint.plan(MESH, rules=RULES)
    for rank in range(8):
        if framework == "jax":
            # Without 64-bit integers, which JAX makes 32-bit.
            found = plan.load(rank, framework="jax", select=lambda name: name != "counts")
            found["counts"] = plan.load(rank, framework="numpy", select="counts")["counts"]
        else:
            found = plan.load(rank, framework=framework, profile=profile)
        check(found, rank)
        report = checkpoint.report
        assert report is not None
        assert report.bytes >= report.needed > 0 or framework == "jax"


def test_sub_byte_elements_are_spread_and_packed(tmp_path: Path) -> None:
    array = np.arange(64, dtype=np.uint8).reshape(4, 16) % 16
    four = array.view(np.uint8).astype(np.uint8).view(ml_dtypes.float4_e2m1fn)
    tonnage.save({"w": four}, tmp_path / "f4.safetensors")
    plan = tonnage.open(tmp_path / "f4.safetensors").plan(Mesh(tp=2), rules={"*": Shard(1)})
    found = plan.load(1, framework="numpy")["w"]
    assert found.view(np.uint8).tobytes() == four[:, 8:].copy().view(np.uint8).tobytes()
    packed = plan.load(1, framework="torch")["w"]
    assert packed.shape == (4, 4)


def test_casts_and_existing_tensors(checkpoint: tonnage.Checkpoint) -> None:
    plan = checkpoint.plan(MESH, rules=RULES)
    found = plan.load(5, framework="numpy", dtype="float32")
    wanted = expected(5)
    assert found["wide"].dtype == np.float32
    assert (found["wide"] == wanted["wide"].astype(np.float32)).all()
    assert found["counts"].dtype == np.int64
    into = {
        "wide": torch.full((300, 500), 7.0, dtype=torch.float32),
        "bias": torch.full((40,), 7.0),
        "counts": torch.zeros((5, 7), dtype=torch.int64).t(),
    }
    filled = plan.load(5, into=into)
    assert filled["wide"] is into["wide"]
    assert (into["wide"].numpy() == wanted["wide"].astype(np.float32)).all()
    assert not into["bias"].any(), "what the plan fills with zeros is zeros"
    assert (into["counts"].numpy() == wanted["counts"]).all()
    with pytest.raises(tonnage.UsageError) as told:
        plan.load(5, into={"wide": torch.zeros(3, 3)})
    assert told.value.code == "INCOMPLETE_LOAD"


def test_streams_come_in_the_order_of_the_plan(checkpoint: tonnage.Checkpoint) -> None:
    plan = checkpoint.plan(MESH, rules=RULES)
    names = [one.name for one in plan.tensors(6)]
    for budget in ("1KB", "1GiB"):
        streamed = dict(plan.stream(6, framework="numpy", budget=budget))
        assert list(streamed) == names
        check(streamed, 6)
    check(dict(plan.stream(6, framework="numpy", mode="auto")), 6)
    # Before anything is read: these have ranks go in step.
    for mode in ("shm", "collective", "guess"):
        with pytest.raises(tonnage.UsageError, match=mode) as told:
            plan.stream(6, framework="numpy", mode=mode)
        assert told.value.code == "MODE"


def test_a_plan_says_what_it_is(checkpoint: tonnage.Checkpoint) -> None:
    plan = checkpoint.plan(MESH, rules=RULES)
    assert plan.mesh == MESH
    assert plan.ranks == 8
    assert plan.proof.targets == len(SHAPES)
    assert plan.verify().layouts == plan.proof.layouts
    assert len(plan.digest) == 64
    assert plan.targets() == list(checkpoint)
    wide = next(one for one in plan.tensors(1) if one.name == "wide")
    assert (wide.shape, wide.global_shape) == ((300, 500), (300, 2000))
    assert wide.boxes == (((0, 500), (0, 0), (300, 500)),)
    told = plan.bytes(1, profile="nvme")
    assert told.needed == sum(one.needed for one in told.tensors)
    row = next(one for one in told.tensors if one.name == "wide")
    assert row.way == "blocks"
    assert row.amplification > 1.5
    cached = plan.bytes(1, profile="page_cache")
    assert cached.amplification < told.amplification
    text = plan.explain(1, profile="nvme")
    assert text.startswith("rank 1 of 8 (pp=0, tp=1)")
    assert "by blocks" in text
    with pytest.raises(tonnage.UsageError):
        plan.bytes(1, profile="tape")


def test_json_is_checked_again(checkpoint: tonnage.Checkpoint, tmp_path: Path) -> None:
    plan = checkpoint.plan(MESH, rules=RULES)
    text = plan.to_json(tmp_path / "plan.json")
    for again in (
        tonnage.Plan.from_json(text, checkpoint),
        tonnage.Plan.from_json(tmp_path / "plan.json").of(checkpoint),
    ):
        assert again.digest == plan.digest
        check(again.load(7, framework="numpy"), 7)
    with pytest.raises(tonnage.UsageError):
        tonnage.Plan.from_json(text).load(0)
    made = json.loads(text)
    target = next(one for one in made["targets"] if one["name"] == "wide")
    target["layouts"][0]["nests"][0][1] += 16
    with pytest.raises(tonnage.UsageError) as told:
        tonnage.Plan.from_json(json.dumps(made))
    assert told.value.tensor == "wide"
    other = {**arrays(), "wide": np.zeros((2000, 300), ml_dtypes.bfloat16)}
    tonnage.save(other, tmp_path / "other", max_shard_size="600KB")
    with pytest.raises(tonnage.UsageError) as told:
        plan.of(tonnage.open(tmp_path / "other"))
    assert told.value.code == "PLAN_FILES"


def test_what_cannot_be_is_told_before_anything_is_read(checkpoint: tonnage.Checkpoint) -> None:
    with pytest.raises(tonnage.UsageError) as told:
        checkpoint.plan(MESH, rules={"wide": Shard(1)})
    assert told.value.code == "PLAN_NO_RULE"
    with pytest.raises(tonnage.UsageError) as told:
        checkpoint.plan(MESH, rules={"tall": Shard(0, uneven="error"), "*": Replicate()})
    assert (told.value.code, told.value.tensor) == ("PLAN_UNEVEN", "tall")
    request = {"mesh": [["tp", 2]], "targets": [{"name": "wide"}]}
    with pytest.raises(tonnage.UsageError) as told:
        checkpoint.plan(request)
    assert told.value.code == "PLAN_UNREAD"
    plan = checkpoint.plan({**request, "unread": "allow"})
    assert set(plan.load(1, framework="numpy")) == {"wide"}
    for arguments in ({"rank": 2}, {"rank": -1}, {}):
        with pytest.raises(tonnage.UsageError):
            plan.load(**arguments)
    for wrong in ({"mode": "fast"}, {"out": "list"}, {"strategy": "slow"}, {"select": "x"}):
        with pytest.raises(tonnage.TonnageError):
            plan.load(0, **wrong)


class Page(HTMLParser):
    """Tags that are open, rows, squares, and what a reader sees."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: dict[str, int] = {}
        self.classes: set[str] = set()
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen[tag] = self.seen.get(tag, 0) + 1
        self.classes.update(value or "" for name, value in attrs if name == "class")
        assert not any(name in ("src", "href", "onload") for name, _ in attrs)
        if tag not in ("meta", "br"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def test_the_picture_is_one_page(checkpoint: tonnage.Checkpoint, tmp_path: Path) -> None:
    plan = checkpoint.plan(MESH, rules=RULES)
    page = Page()
    page.feed(plan.to_html(tmp_path / "plan.html"))
    assert page.open == []
    # A row a tensor, the head, and four of totals; a square for each tensor that a rank has.
    assert page.seen["tr"] == len(SHAPES) + 1 + 4
    assert page.seen["svg"] == sum(len(plan.tensors(rank)) for rank in range(8))
    assert {"ranges", "blocks", "frame"} <= page.classes
    for word in ("pp=2, tp=4", "wide", "needed", plan.digest):
        assert word in page.text
    assert (tmp_path / "plan.html").read_text(encoding="utf-8").startswith("<!DOCTYPE html>")
    hostile = {"<script>alert(1)</script>": np.zeros(4, np.float32)}
    tonnage.save(hostile, tmp_path / "h.safetensors")
    ours = tonnage.open(tmp_path / "h.safetensors").plan(Mesh(tp=1), rules={"*": Replicate()})
    assert "<script" not in ours.to_html()


def read_by(path: Path, rank: int, rule: str, ranks: int) -> tuple[int, int, int]:
    """Bytes that a fresh process reads by system calls while it loads, needs, and says it read."""
    program = f"""
import os, tonnage
def count():
    lines = open("/proc/self/io").read().split("\\n")
    return int(lines[0].split()[1])
checkpoint = tonnage.open({str(path)!r})
plan = checkpoint.plan(tonnage.Mesh(tp={ranks}), rules={{"*": {rule}}})
plan.load({rank}, framework="numpy", select="w0")
before = count()
plan.load({rank}, framework="numpy", profile="nvme")
print(count() - before, checkpoint.report.needed, checkpoint.report.bytes)
"""
    told = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    ).stdout.split()
    return int(told[0]), int(told[1]), int(told[2])


@pytest.mark.skipif(not Path("/proc/self/io").exists(), reason="the system does not count reads")
def test_the_system_counts_what_is_read(tmp_path: Path) -> None:
    path = tmp_path / "large.safetensors"
    made = {f"w{at}": np.full((1024, 4096), at, np.float32) for at in range(4)}
    tonnage.save(made, path)
    total = sum(one.nbytes for one in made.values())
    for rank in range(4):
        counted, needed, said = read_by(path, rank, "tonnage.Shard(0)", 4)
        assert needed == total // 4
        assert said <= 1.05 * needed
        # /proc is read meanwhile, and direct reads take whole pages.
        assert counted <= 1.05 * needed + (1 << 20), (counted, needed)
    counted, needed, said = read_by(path, 0, "tonnage.Shard(1)", 4)
    assert needed == total // 4
    assert said > 2 * needed, "blocks are read whole"
    assert abs(counted - said) <= (1 << 20)


def torchrun(case: str, checkpoint: Path, folder: Path) -> list[dict[str, Any]]:
    worker = Path(__file__).parent / "group_worker.py"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node=2", str(worker), str(checkpoint), str(folder), case]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
    files = [folder / f"{case}.{rank}.json" for rank in range(2)]
    assert all(one.exists() for one in files), done.stderr[-2000:]
    return [json.loads(one.read_text()) for one in files]


def small(folder: Path) -> Path:
    made = {name: one for name, one in arrays().items() if name in ("wide", "tall", "bias")}
    made["tall"] = made["tall"][:130]
    tonnage.save(made, folder / "small.safetensors")
    return folder / "small.safetensors"


def test_ranks_of_a_group_load_their_own(tmp_path: Path) -> None:
    found = torchrun("same", small(tmp_path), tmp_path)
    for rank, one in enumerate(found):
        assert one["whole"], one
        assert "Shard(dim=1)" in one["placements"]["wide"]
        assert one["offsets"]["tall"] == [[rank * 65, 0]]
        assert one["sizes"]["bias"] == [[40]]


def test_plans_that_differ_are_an_error_on_every_rank(tmp_path: Path) -> None:
    for one in torchrun("mismatch", small(tmp_path), tmp_path):
        assert one["code"] == "PLAN_DIGEST", one
        assert one["seconds"] < 60


def test_a_rank_that_does_not_come_is_an_error_in_time(tmp_path: Path) -> None:
    waited, slept = torchrun("missing", small(tmp_path), tmp_path)
    assert waited["code"] == "PLAN_DIGEST", waited
    assert waited["seconds"] < 30
    assert slept["slept"]


ON_DEVICE = """
import sys
import numpy as np
import tonnage
from tonnage import Mesh, Replicate, Shard

checkpoint, device = tonnage.open(sys.argv[1]), sys.argv[2]
rules = {"wide": Shard(1), "tall": Shard(0), "*": Replicate()}
plan = checkpoint.plan(Mesh(tp=2), rules=rules)
options = {"device": device, "framework": "tonnage"}
for rank in range(2):
    here = plan.load(rank, framework="numpy")
    there = plan.load(rank, **options, staging="1MiB")
    streamed = dict(plan.stream(rank, **options, budget="100KB"))
    assert list(there) == list(streamed) == list(here)
    for name, array in here.items():
        for tensor in (there[name], streamed[name]):
            assert (tensor.device, tensor.shape) == (device, array.shape), name
            assert tensor.numpy().tobytes() == array.tobytes(), name
    report = checkpoint.report
    assert report.needed == sum(one.needed for one in plan.bytes(rank).tensors)
    assert report.bytes >= report.needed
    wide = plan.load(rank, **options, select="wide", dtype="float32")["wide"].numpy()
    assert (wide == here["wide"].astype(np.float32)).all()
"""


def test_cards_get_their_parts(tmp_path: Path) -> None:
    sys.path.insert(0, str(Path(__file__).parents[1]))
    from device_data import on_stub

    on_stub(ON_DEVICE, small(tmp_path), "cuda:0")


def test_vulkan_gets_its_parts(tmp_path: Path) -> None:
    kinds = {kind.kind: kind for kind in tonnage.devices()}
    if not kinds["vulkan"].devices:
        pytest.skip(str(kinds["vulkan"].missing))
    device = kinds["vulkan"].devices[0].device
    command = [sys.executable, "-c", ON_DEVICE, str(small(tmp_path)), device]
    subprocess.run(command, check=True, timeout=120)
