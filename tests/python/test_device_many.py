"""Many small tensors at once: what is made for them, and who keeps their memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tonnage
from device_data import on_stub
from tonnage import _device

COUNT = 20_000
torch = pytest.importorskip("torch")


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("many") / "many.safetensors"
    numbers = np.arange(COUNT * 6, dtype="float32").reshape(COUNT, 2, 3)
    tonnage.save({f"layers.{at:05}.weight": numbers[at] for at in range(COUNT)}, path)
    return path


def of_table(path: Path, wanted: str | None = None) -> dict[str, Any]:
    """PyTorch's tensors in host memory, as tensors on a GPU are made: there is none here."""
    handle = tonnage.open(path)._handle
    target = _device.Target("host", "cpu", "cpu", "torch")
    run = _device.Run(handle, [target], _device.Settings(), handle.total_bytes)
    try:
        row = None if wanted is None else _device.ROWS[wanted]
        return run.everything(run.submit_all(range(len(handle)), None, row))
    finally:
        run.close()


def test_nothing_of_python_is_made_for_each(many: Path) -> None:
    script = """
        from tonnage import _device
        calls = []
        def counted(kind, name):
            real = getattr(kind, name)
            def call(*arguments):
                calls.append(name)
                return real(*arguments)
            setattr(kind, name, call)
        for name in ("region", "own", "within", "empty"):
            counted(_device._PlainMakes, name)
        counted(_device.Bulk, "_part")
        found = tonnage.open(sys.argv[1]).load(device="cuda:0")
        assert len(calls) < 20, calls
        assert calls.count("region") >= 1
        for at, (name, tensor) in enumerate(found.items()):
            assert name == f"layers.{at:05}.weight"
            if at % 401 == 0:
                equal(tensor, np.arange(at * 6, at * 6 + 6, dtype="float32").reshape(2, 3))
        print(len(found))
    """
    assert on_stub(script, many) == f"{COUNT}\n"


def test_tensors_of_pytorch_are_made_by_its_table(
    many: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*_: object) -> None:
        raise AssertionError("made one by one")

    monkeypatch.setattr(_device._HostMakes, "within", refused)
    found = of_table(many)
    assert len(found) == COUNT
    for at in range(0, COUNT, 401):
        tensor = found[f"layers.{at:05}.weight"]
        assert type(tensor) is torch.Tensor
        assert tensor.dtype == torch.float32
        assert tensor.tolist() == np.arange(at * 6, at * 6 + 6).reshape(2, 3).tolist()
        # Nobody takes two of them for one: each has a storage of its own.
        assert tensor.untyped_storage().nbytes() == 24
        tensor += 1


def test_without_a_table_pytorch_makes_the_same(
    many: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    by_table = of_table(many)
    monkeypatch.setattr(_device, "_exchange", lambda torch: None)
    one_by_one = of_table(many)
    assert all(torch.equal(by_table[name], one_by_one[name]) for name in one_by_one)


def test_every_dtype_is_what_pytorch_calls_it(tmp_path: Path) -> None:
    path, kinds = tmp_path / "kinds.safetensors", {}
    for row in _device.ROWS.values():
        dtype = getattr(torch, row.torch, None) if row.torch else None
        if dtype is not None:
            raw = torch.arange(32, dtype=torch.uint8) % 2
            kinds[row.name] = raw.view(dtype).reshape(2, -1)
    kinds["empty"], kinds["scalar"] = torch.zeros(0, 3), torch.tensor(7)
    tonnage.save(kinds, path)
    found = of_table(path)
    assert len(found) >= 20
    for name, wanted in kinds.items():
        tensor = found[name]
        assert (tensor.dtype, tensor.shape) == (wanted.dtype, wanted.shape), name
        if tensor.numel():
            flat = tensor.reshape(-1).view(torch.uint8)
            assert torch.equal(flat, wanted.reshape(-1).view(torch.uint8)), name
    cast = of_table(path, "F32")
    assert cast["F16"].dtype == cast["BF16"].dtype == torch.float32
    assert cast["I32"].dtype == torch.int32


def test_memory_is_free_when_its_last_user_goes() -> None:
    script = """
        import gc
        import weakref
        from tonnage._native import DeviceTensor, _Region

        class Keeper:
            "What a framework's allocator gave."

        memory, keeper = _Region.allocate("cuda:0", 64), Keeper()
        gone = weakref.ref(keeper)
        region = _Region.adopt("cuda:0", memory.address, 64, keeper)
        capsules = [DeviceTensor(region, at, "U8", [8]).__dlpack__() for at in (0, 8)]
        del keeper, region
        gc.collect()
        assert gone() is not None
        capsules.pop()
        assert gone() is not None
        # A deleter that runs outside of any call of this package, as a framework's do.
        capsules.pop()
        assert gone() is None
    """
    on_stub(script)


def test_an_error_names_the_tensor(many: Path, tmp_path: Path) -> None:
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes(many.read_bytes())
    checkpoint = tonnage.open(cut)
    last = list(checkpoint)[-1]
    with cut.open("r+b") as file:
        file.truncate(cut.stat().st_size - 5)
    handle = checkpoint._handle
    target = _device.Target("host", "cpu", "cpu", "torch")
    run = _device.Run(handle, [target], _device.Settings(), 1)
    with pytest.raises(tonnage.TonnageError) as caught:
        run.everything(run.submit_all([len(handle) - 1], None, None))
    run.close()
    assert caught.value.tensor == last
    assert str(cut) in str(caught.value)
