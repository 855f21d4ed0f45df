"""PyTorch on a GPU: tensors come whole, into its own memory, in the order of its stream."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tonnage
import tonnage.torch
import torch
from gpu_data import DEVICE, ENGINE, MIB, same

Saved = tuple[Path, dict[str, Any]]


def check(found: dict[str, Any], wanted: dict[str, Any], device: str = DEVICE) -> None:
    assert set(found) == set(wanted)
    for name, tensor in found.items():
        assert tensor.device == torch.device(device), name
        assert same(tensor, wanted[name]), name


@pytest.mark.parametrize("strategy", ["auto", "buffered", "direct"])
@pytest.mark.parametrize("staging", ["4MiB", "256MiB"])
def test_load_brings_every_tensor(saved: Saved, staging: str, strategy: str) -> None:
    folder, tensors = saved
    checkpoint = tonnage.open(folder)
    check(checkpoint.load(device=DEVICE, staging=staging, strategy=strategy), tensors)
    report = checkpoint.report
    assert report is not None
    assert report.loaded == len(tensors)
    assert report.bytes == checkpoint.nbytes
    assert 0 < report.peak_staging <= (4 if staging == "4MiB" else 256) * MIB
    assert report.strategy in ("direct", "buffered", "direct and buffered")
    assert report.reason


def test_names_of_devices(saved: Saved) -> None:
    folder, tensors = saved
    checkpoint = tonnage.open(folder)
    for device in ("cuda", 0, torch.device(DEVICE)):
        found = checkpoint.load("large.*", device=device)
        assert same(found["large.f32"], tensors["large.f32"])
        assert found["large.f32"].device == torch.device(DEVICE)


def test_memory_is_of_torchs_allocator(big: Saved, clean: None) -> None:
    path, tensors = big
    before = torch.cuda.memory_allocated()
    found = tonnage.open(path).load(device=DEVICE)
    held = torch.cuda.memory_allocated() - before
    wanted = sum(tensor.nbytes for tensor in tensors.values())
    assert wanted <= held <= wanted + 16 * MIB
    segments = torch.cuda.memory_snapshot()

    def owned(address: int) -> bool:
        return any(
            part["address"] <= address < part["address"] + part["total_size"] for part in segments
        )

    assert all(owned(tensor.data_ptr()) for tensor in found.values())
    del found
    assert torch.cuda.memory_allocated() == before


def test_small_tensors_share_and_are_still_torchs_own(saved: Saved) -> None:
    folder, tensors = saved
    found = tonnage.open(folder).load("small.*", device=DEVICE)
    assert len({tensor.untyped_storage().data_ptr() for tensor in found.values()}) < 20
    assert all(tensor.data_ptr() % 256 == 0 for tensor in found.values())
    one = found["small.7"]
    assert not one._is_view()
    assert one.is_contiguous()
    one.requires_grad_(True)
    (one * 2).sum().backward()
    assert torch.equal(one.grad, torch.full_like(one, 2))
    # Writing to one changes no neighbour.
    with torch.no_grad():
        one.fill_(-1)
    rest = {name: tensor for name, tensor in found.items() if name != "small.7"}
    check(rest, {name: tensors[name] for name in rest})


def test_casts_on_the_way(saved: Saved) -> None:
    folder, tensors = saved
    found = tonnage.open(folder).load(device=DEVICE, dtype="bfloat16")
    assert same(found["large.f32"], tensors["large.f32"].to(torch.bfloat16))
    assert same(found["f8"], tensors["f8"].to(torch.bfloat16))
    assert same(found["i64"], tensors["i64"])


@pytest.mark.parametrize("ordered", [False, True])
def test_stream_yields_every_tensor(saved: Saved, ordered: bool) -> None:
    folder, tensors = saved
    order = sorted(tensors) if ordered else None
    checkpoint = tonnage.open(folder)
    names = []
    for name, tensor in checkpoint.stream(order, device=DEVICE, budget="8MiB"):
        assert same(tensor, tensors[name]), name
        names.append(name)
    assert names == order if ordered else set(names) == set(tensors)
    assert checkpoint.report is not None
    assert checkpoint.report.loaded == len(tensors)


def test_stream_stays_within_its_budget(big: Saved, clean: None) -> None:
    path, tensors = big
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    for name, tensor in tonnage.open(path).stream(device=DEVICE, budget="192MiB"):
        assert same(tensor, tensors[name])
        del tensor
    # The budget, and the one that was just yielded.
    assert torch.cuda.max_memory_allocated() - before <= (192 + 2 * 64 + 8) * MIB


def test_a_stream_that_is_left_frees_everything(big: Saved, clean: None) -> None:
    path, _ = big
    before = torch.cuda.memory_allocated()
    stream = tonnage.open(path).stream(device=DEVICE)
    next(stream)
    stream.close()
    assert torch.cuda.memory_allocated() == before


def test_a_map_of_devices_in_one_pass(saved: Saved) -> None:
    folder, tensors = saved
    where = {"small": DEVICE, "large.f32": DEVICE, "i64": "meta", "*": "cpu"}
    found = tonnage.open(folder).load(device=where, framework="torch")
    assert list(found) == list(tonnage.open(folder))
    for name, tensor in found.items():
        if name == "i64":
            assert tensor.device.type == "meta"
            continue
        on_gpu = name.startswith("small.") or name == "large.f32"
        assert tensor.device.type == ("cuda" if on_gpu else "cpu"), name
        assert same(tensor, tensors[name]), name


def test_into_tensors_that_are_there(saved: Saved) -> None:
    folder, tensors = saved
    fused = torch.zeros(2048, 4096, device=DEVICE)
    places = {
        "large.f32": fused[:, 1000:2536],
        "large.bf16": torch.zeros(4096, 1000, device=DEVICE),
        "odd.f16": torch.zeros(777, 333, dtype=torch.float16, device=DEVICE).t(),
        "i64": torch.zeros(1001, dtype=torch.int64, device=DEVICE),
        "f64": torch.zeros(7, 5, dtype=torch.float64),
        "empty": torch.zeros(0, 4, device=DEVICE),
    }
    pointers = {name: tensor.data_ptr() for name, tensor in places.items()}
    found = tonnage.open(folder).load(list(places), into=places, strict=True)
    for name, tensor in found.items():
        assert tensor.data_ptr() == pointers[name], name
        assert same(tensor, tensors[name].to(tensor.dtype)), name
    # What lies beside the columns is as it was.
    assert not fused[:, :1000].any()
    assert not fused[:, 2536:].any()


def test_into_a_module(saved: Saved, tmp_path: Path) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(512, 512), torch.nn.Linear(512, 8)).to(DEVICE)
    wanted = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    tonnage.save(wanted, tmp_path / "m.safetensors")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    tonnage.open(tmp_path / "m.safetensors").load(into=model, strict=True)
    check(model.state_dict(), wanted)


def busy(milliseconds: int) -> None:
    """Keeps the current stream at work, without the host waiting."""
    torch.cuda._sleep(milliseconds * 1_000_000)


def test_memory_in_use_by_the_stream_is_waited_for(tmp_path: Path, clean: None) -> None:
    """The allocator gives memory that kernels of the current stream still write to; a copy that did
    not wait for them would be overwritten by them.
    """
    count = 8 * MIB
    wanted = torch.arange(count, dtype=torch.int32)
    tonnage.save({"w": wanted}, tmp_path / "w.safetensors")
    checkpoint = tonnage.open(tmp_path / "w.safetensors")
    checkpoint.load(device=DEVICE)
    for _ in range(3):
        torch.cuda.empty_cache()
        used = torch.zeros(count, dtype=torch.int32, device=DEVICE)
        address = used.data_ptr()
        busy(300)
        used.fill_(-1)
        del used  # In stream order: free for the same stream at once.
        found = checkpoint.load(device=DEVICE)["w"]
        assert found.data_ptr() == address, "the test would prove nothing"
        assert same(found, wanted)


def test_a_place_in_use_by_the_stream_is_waited_for(tmp_path: Path) -> None:
    count = 4 * MIB
    wanted = torch.arange(count, dtype=torch.int32)
    tonnage.save({"w": wanted}, tmp_path / "w.safetensors")
    checkpoint = tonnage.open(tmp_path / "w.safetensors")
    side = torch.cuda.Stream()
    place = torch.zeros(count, dtype=torch.int32, device=DEVICE)
    torch.cuda.synchronize()
    with torch.cuda.stream(side):
        busy(300)
        place.fill_(-1)
        checkpoint.load(into={"w": place})
    assert same(place, wanted)


def test_what_was_loaded_is_there_for_every_stream(big: Saved) -> None:
    path, tensors = big
    found = tonnage.open(path).load(device=DEVICE)
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        sums = {name: tensor.sum(dtype=torch.int64) for name, tensor in found.items()}
    side.synchronize()
    for name, tensor in tensors.items():
        assert int(sums[name]) == int(tensor.sum(dtype=torch.int64))


def test_load_does_not_wait_for_other_streams(tmp_path: Path) -> None:
    """No device-wide wait: a kernel of another stream still runs when the load has returned."""
    tonnage.save({"w": torch.arange(MIB)}, tmp_path / "w.safetensors")
    checkpoint = tonnage.open(tmp_path / "w.safetensors")
    checkpoint.load(device=DEVICE)
    side = torch.cuda.Stream()
    over = torch.cuda.Event()
    torch.cuda.synchronize()
    with torch.cuda.stream(side):
        busy(2000)
        over.record(side)
    checkpoint.load(device=DEVICE)
    assert not over.query()
    side.synchronize()


@pytest.mark.parametrize("backend", ["mmap", "pread"])
def test_the_drop_in_on_a_device(big: Saved, saved: Saved, backend: str) -> None:
    path, tensors = big
    check(tonnage.torch.load_file(path, device=DEVICE, backend=backend), tensors)
    file = sorted(saved[0].glob("*.safetensors"))[0]
    wanted = tonnage.torch.load_file(file)
    with tonnage.safe_open(file, "pt", device=DEVICE, backend=backend) as opened:
        check(opened.get_tensors(), wanted)
        check({name: opened.get_tensor(name) for name in opened.keys()}, wanted)  # noqa: SIM118
        name = next(name for name in wanted if wanted[name].ndim == 2)
        part = opened.get_slice(name)[:1]
        assert part.device == torch.device(DEVICE)
        assert same(part, wanted[name][:1])


def test_saving_from_the_device(saved: Saved, tmp_path: Path) -> None:
    folder, tensors = saved
    found = tonnage.open(folder).load(device=DEVICE)
    tonnage.save(found, tmp_path / "a.safetensors")
    tonnage.save(tensors, tmp_path / "b.safetensors")
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()
    with tonnage.Writer(tmp_path / "c.safetensors") as writer:
        for name, tensor in found.items():
            writer.add(name, tensor)
    check(tonnage.open(tmp_path / "c.safetensors").load(device=DEVICE), tensors)
    tonnage.torch.save_file(found, tmp_path / "d.safetensors")
    check(tonnage.torch.load_file(tmp_path / "d.safetensors", device=DEVICE), tensors)


def test_free_memory_is_told() -> None:
    kind = next(kind for kind in tonnage.devices() if kind.kind == ENGINE.split(":")[0])
    free, total = torch.cuda.mem_get_info(0)
    assert abs(kind.devices[0].free_memory - free) <= 64 * MIB
    assert kind.devices[0].total_memory >= total
