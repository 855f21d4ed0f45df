"""`tonnage.torch.install()`: `torch.load` and `torch.save`, with it, without it, and after it.

The matrix is every way of calling `torch.load` on a safetensors file: what PyTorch alone does of it
is asserted too, so that a release that changes it is noticed.
"""

from __future__ import annotations

import io
import pickle
import threading
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from tonnage import SafetensorError
from tonnage.torch import install, uninstall

STATE = {"w": torch.arange(12.0).view(3, 4), "n": torch.tensor(7)}


@pytest.fixture(autouse=True)
def as_it_was() -> Iterator[None]:
    before = (torch.load, torch.save, torch.serialization.load, torch.serialization.save)
    yield
    after = (torch.load, torch.save, torch.serialization.load, torch.serialization.save)
    assert before == after


@pytest.fixture
def path(tmp_path: Path) -> Path:
    found = tmp_path / "a.safetensors"
    safetensors.torch.save_file(STATE, found)
    return found


def is_state(found: Any, device: str = "cpu") -> bool:
    return found.keys() == STATE.keys() and all(
        found[name].device.type == device
        and (found[name].shape, found[name].dtype) == (tensor.shape, tensor.dtype)
        and (device == "meta" or torch.equal(found[name], tensor))
        for name, tensor in STATE.items()
    )


def to_meta(storage: Any, place: str) -> Any:
    return torch.UntypedStorage(storage.nbytes(), device="meta")


#: Arguments, the device that tensors should be on, and what PyTorch alone raises, if anything.
MATRIX: list[tuple[dict[str, Any], str, type[BaseException] | None]] = [
    ({}, "cpu", None),
    ({"weights_only": True}, "cpu", None),
    ({"weights_only": False}, "cpu", None),
    ({"mmap": True}, "cpu", None),
    ({"mmap": False}, "cpu", None),
    ({"map_location": "cpu"}, "cpu", None),
    ({"map_location": torch.device("cpu")}, "cpu", None),
    ({"map_location": "meta"}, "meta", SafetensorError),
    ({"map_location": torch.device("meta")}, "meta", SafetensorError),
    ({"map_location": {"cpu": "meta"}}, "meta", RuntimeError),
    ({"map_location": {}}, "cpu", RuntimeError),
    ({"map_location": lambda storage, place: storage}, "cpu", RuntimeError),
    ({"map_location": lambda storage, place: None}, "cpu", RuntimeError),
    ({"map_location": to_meta}, "meta", RuntimeError),
]  # fmt: skip


IDS = [str(at) for at in range(len(MATRIX))]


@pytest.mark.parametrize(("options", "device", "alone"), MATRIX, ids=IDS)
def test_the_matrix_by_path(options: Any, device: str, alone: Any, path: Path) -> None:
    if alone is None:
        assert is_state(torch.load(path, **options), device)
    else:
        # The installed `safetensors` is the reference here, so its error is not ours.
        with pytest.raises((alone, safetensors.SafetensorError)):
            torch.load(path, **options)
    with install():
        assert is_state(torch.load(path, **options), device)
        assert is_state(torch.load(str(path), **options), device)
        assert is_state(torch.serialization.load(f=path, **options), device)
    if alone is None:
        assert is_state(torch.load(path, **options), device)


@pytest.mark.parametrize(("options", "device", "_"), MATRIX, ids=IDS)
def test_the_matrix_by_content(options: Any, device: str, _: Any, path: Path) -> None:
    other = path.with_name("a.pt")
    other.write_bytes(path.read_bytes())

    def sources() -> Iterator[Any]:
        if not options.get("mmap"):
            yield io.BytesIO(path.read_bytes())
            with path.open("rb") as file:
                yield file
        yield other

    for source in sources():
        with pytest.raises((pickle.UnpicklingError, RuntimeError, EOFError)):
            torch.load(source, **options)
    with install():
        for source in sources():
            assert is_state(torch.load(source, **options), device)
        if options.get("mmap"):
            with pytest.raises(ValueError, match="must be a file path"):
                torch.load(io.BytesIO(path.read_bytes()), **options)


def test_saving(path: Path) -> None:
    state = {"model": STATE, "step": 3, "betas": (0.9, 0.95)}
    torch.save(state, path)
    assert path.read_bytes().startswith(b"PK")
    with pytest.raises(Exception, match=r"(?i)header"):
        torch.load(path)
    with install():
        loaded = torch.load(path)  # what PyTorch alone wrote there, and can't read
        assert is_state(loaded["model"])
        assert loaded["step"] == 3
        for given in (path, str(path)):
            torch.save(state, given)
            assert safetensors.torch.load_file(path).keys() == {"model.w", "model.n"}
            loaded = torch.load(given)
            assert is_state(loaded["model"])
            assert (loaded["step"], loaded["betas"]) == (3, (0.9, 0.95))
        torch.save(STATE, path)
        assert path.read_bytes() == safetensors.torch.save(STATE)
        torch.save(obj=STATE, f=path, pickle_protocol=4)
        assert path.read_bytes() == safetensors.torch.save(STATE)
        with pytest.raises(TypeError, match=r"state\['x'\]"):
            torch.save({"x": object()}, path)
        assert path.read_bytes() == safetensors.torch.save(STATE)


class Mine:
    def __eq__(self, other: object) -> bool:
        return isinstance(other, Mine)

    __hash__ = None  # type: ignore[assignment]


def test_everything_else_is_untouched(path: Path, tmp_path: Path) -> None:
    theirs = tmp_path / "theirs.pt"
    with install():
        for zipped in (True, False):
            torch.save({"x": Mine(), **STATE}, theirs, _use_new_zipfile_serialization=zipped)
            with pytest.raises(pickle.UnpicklingError):
                torch.load(theirs)
            assert torch.load(theirs, weights_only=False)["x"] == Mine()
            with theirs.open("rb") as file:
                assert torch.load(file, None, pickle, weights_only=False)["x"] == Mine()
            memory = io.BytesIO(theirs.read_bytes())
            assert torch.load(memory, weights_only=False)["x"] == Mine()
            # Also where the name says something else.
            path.write_bytes(theirs.read_bytes())
            with pytest.raises(pickle.UnpicklingError):
                torch.load(path)
            assert torch.load(path, weights_only=False)["x"] == Mine()
        memory = io.BytesIO()
        torch.save(STATE, memory)
        assert memory.getvalue().startswith(b"PK")
        memory.seek(0)
        assert is_state(torch.load(memory))
        with pytest.raises(FileNotFoundError):
            torch.load(tmp_path / "none.pt")
        with pytest.raises(FileNotFoundError):
            torch.load(tmp_path / "none.safetensors")
        with pytest.raises(AttributeError):
            torch.load(3)
        path.write_bytes(b"neither")
        with pytest.raises(SafetensorError):
            torch.load(path)


def test_pickles_are_read_from_where_a_file_stands() -> None:
    memory = io.BytesIO()
    for state in (STATE, {"x": 1}):
        torch.save(state, memory, _use_new_zipfile_serialization=False)
    memory.seek(0)
    with install():
        assert is_state(torch.load(memory))
        assert torch.load(memory) == {"x": 1}


# ---- installing and uninstalling --------------------------------------------------------------


def test_it_counts() -> None:
    load, save = torch.load, torch.save
    first = install()
    wrapper = torch.load
    assert wrapper is not load
    second = install()
    assert torch.load is wrapper
    first.undo()
    first.undo()
    assert torch.load is wrapper
    second.undo()
    assert (torch.load, torch.save) == (load, save)
    install()
    install()
    uninstall()
    assert torch.load is not load
    uninstall()
    assert (torch.load, torch.save, torch.serialization.load) == (load, save, load)
    uninstall()
    assert torch.load is load


def test_it_looks_as_what_it_stands_for() -> None:
    load, save = torch.load, torch.save
    with install():
        assert (torch.load.__name__, torch.load.__doc__) == (load.__name__, load.__doc__)
        assert (torch.save.__name__, torch.save.__doc__) == (save.__name__, save.__doc__)


def test_a_patch_of_another_package_on_top_is_told_of_and_works(path: Path) -> None:
    load, calls = torch.load, []
    ours = install()
    below = torch.load

    def theirs(*args: Any, **options: Any) -> Any:
        calls.append(args)
        return below(*args, **options)

    torch.load = theirs
    assert is_state(torch.load(io.BytesIO(path.read_bytes())))
    with pytest.warns(RuntimeWarning, match=r"torch\.load were replaced"):
        ours.undo()
    assert torch.load is theirs
    assert torch.serialization.load is load
    with pytest.raises(pickle.UnpicklingError):
        torch.load(io.BytesIO(path.read_bytes()))  # ours passes on
    with install():
        assert is_state(torch.load(io.BytesIO(path.read_bytes())))
        assert len(calls) == 2
        again = torch.load
        with install():
            assert torch.load is again
    assert torch.load is theirs
    torch.load = load


def test_a_patch_of_another_package_below_is_put_back(path: Path) -> None:
    load, calls = torch.load, []

    def theirs(*args: Any, **options: Any) -> Any:
        calls.append(args)
        return load(*args, **options)

    torch.load = theirs
    with install(), warnings.catch_warnings():
        warnings.simplefilter("error")
        assert is_state(torch.load(io.BytesIO(path.read_bytes())))
        memory = io.BytesIO()
        torch.save(STATE, memory)
        memory.seek(0)
        assert is_state(torch.load(memory))
    assert len(calls) == 1
    assert torch.load is theirs
    torch.load = load


def test_patches_that_leave_in_any_order() -> None:
    load = torch.load
    first = install()
    one = torch.load

    def theirs(*args: Any, **options: Any) -> Any:
        return one(*args, **options)

    torch.load = theirs
    second = install()
    with pytest.warns(RuntimeWarning):
        first.undo()
    memory = io.BytesIO(safetensors.torch.save(STATE))
    assert is_state(torch.load(memory))
    second.undo()
    assert torch.load is theirs
    torch.load = load


def test_threads(path: Path) -> None:
    failures: list[BaseException] = []
    barrier = threading.Barrier(8)

    def work() -> None:
        try:
            barrier.wait()
            for _ in range(50):
                with install():
                    assert is_state(torch.load(io.BytesIO(path.read_bytes())))
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


def test_with_tonnage_as_safetensors(path: Path) -> None:
    import tonnage

    with tonnage.as_safetensors(), install():
        assert is_state(torch.load(path))
        assert is_state(torch.load(path, map_location="meta"), "meta")
