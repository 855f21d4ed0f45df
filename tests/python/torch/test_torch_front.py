"""`tonnage.torch.load`: what it takes, how it knows what it was given, and where tensors go."""

from __future__ import annotations

import gzip
import io
import os
import pickle
import struct
import tempfile
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import tonnage
import tonnage.torch
import torch
from tonnage import SafetensorError
from tonnage.torch import _front

STATE = {"w": torch.arange(12.0).view(3, 4), "n": torch.tensor(7), "e": torch.empty(0, 3)}
NESTED = {"model": STATE, "step": 3}


def content(state: Any = STATE) -> bytes:
    file = io.BytesIO()
    tonnage.torch.save(state, file)
    return file.getvalue()


def is_state(found: Any) -> bool:
    return found.keys() == STATE.keys() and all(
        torch.equal(found[name], tensor) and found[name].dtype == tensor.dtype
        for name, tensor in STATE.items()
    )


class Pipe(io.RawIOBase):
    """Bytes that come once."""

    def __init__(self, data: bytes) -> None:
        self._inner = io.BytesIO(data)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        return self._inner.readinto(buffer)


# ---- what it takes ----------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["a.safetensors", "a.pt", "a.bin", "a"])
@pytest.mark.parametrize("mmap", [None, False, True])
def test_paths_with_any_suffix(name: str, mmap: bool | None, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_bytes(content())
    for given in (path, os.fspath(path)):
        for weights_only in (None, True, False):
            loaded = tonnage.torch.load(given, mmap=mmap, weights_only=weights_only)
            assert is_state(loaded)
    path.write_bytes(content(NESTED))
    loaded = tonnage.torch.load(path, mmap=mmap)
    assert is_state(loaded["model"])
    assert loaded["step"] == 3


def test_file_objects_and_bytes(tmp_path: Path) -> None:
    path = tmp_path / "a"
    for state in (STATE, NESTED):
        data = content(state)
        path.write_bytes(data)
        (tmp_path / "a.gz").write_bytes(gzip.compress(data))
        with (
            path.open("rb") as file,
            path.open("rb", buffering=0) as raw,
            gzip.open(tmp_path / "a.gz") as packed,
            tempfile.TemporaryFile() as temporary,
        ):
            temporary.write(data)
            temporary.seek(0)
            sources = [data, io.BytesIO(data), file, raw, packed, temporary, Pipe(data)]
            for source in sources:
                loaded = tonnage.torch.load(source)
                assert is_state(loaded if state is STATE else loaded["model"]), source


def test_a_file_object_is_read_from_where_it_stands(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_bytes(b"front" + content())
    with path.open("rb") as file:
        file.seek(5)
        assert is_state(tonnage.torch.load(file))
        file.seek(0)
        with pytest.raises(SafetensorError):
            tonnage.torch.load(file)
    memory = io.BytesIO(b"front")
    memory.seek(5)
    tonnage.torch.save(NESTED, memory)
    memory.seek(5)
    assert is_state(tonnage.torch.load(memory)["model"])


def test_folders_and_index_files(tmp_path: Path) -> None:
    tonnage.save(STATE, tmp_path / "out", max_shard_size="20B")
    assert is_state(tonnage.torch.load(tmp_path / "out"))
    assert is_state(tonnage.torch.load(tmp_path / "out", mmap=True))
    assert is_state(tonnage.torch.load(tmp_path / "out" / "model.safetensors.index.json"))


def test_what_it_does_not_take(tmp_path: Path) -> None:
    for wrong in (3, None, [], bytearray(content()), memoryview(content())):
        with pytest.raises(TypeError, match="is not an instance of 'bytes'"):
            tonnage.torch.load(wrong)  # type: ignore[arg-type]
    with pytest.raises(FileNotFoundError):
        tonnage.torch.load(tmp_path / "none.safetensors")
    with pytest.raises(TypeError, match="not text"):
        tonnage.torch.load(io.StringIO("text"))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="path to a file in order to use the mmap"):
        tonnage.torch.load(io.BytesIO(content()), mmap=True)
    for broken in (b"", b"x", content()[:-1], content() + b"x", b"\0" * 100, b"{" * 20):
        path = tmp_path / "broken.safetensors"
        path.write_bytes(broken)
        for source in (path, broken, io.BytesIO(broken)):
            with pytest.raises(SafetensorError):
                tonnage.torch.load(source)


def test_mmap_views_the_file_and_reading_does_not(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    path.write_bytes(content({"w": torch.zeros(1 << 20)}))

    def mapped(tensor: torch.Tensor) -> bool:
        for line in Path("/proc/self/maps").read_text().splitlines():
            start, stop = (int(end, 16) for end in line.split()[0].split("-"))
            if start <= tensor.data_ptr() < stop:
                return line.endswith("a.safetensors")
        raise AssertionError("an address in no mapping")

    assert mapped(tonnage.torch.load(path, mmap=True)["w"])
    assert not mapped(tonnage.torch.load(path)["w"])
    with torch.utils.serialization.config.patch({"load.mmap": True}):
        assert mapped(tonnage.torch.load(path)["w"])
        assert not mapped(tonnage.torch.load(path, mmap=False)["w"])


# ---- pickles ----------------------------------------------------------------------------------


class Evil:
    def __reduce__(self) -> Any:
        return (os.mkdir, ("evil",))


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("name", ["a.pt", "a.safetensors"])
def test_pickles_are_pytorchs_and_weights_only(
    zipped: bool, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / name
    torch.save(STATE, path, _use_new_zipfile_serialization=zipped)
    for source in (path, path.read_bytes(), io.BytesIO(path.read_bytes())):
        assert is_state(tonnage.torch.load(source))
    loaded = tonnage.torch.load(path, map_location="meta")
    assert loaded["w"].device.type == "meta"
    with pytest.raises(ValueError, match=r"call torch\.load yourself"):
        tonnage.torch.load(path, weights_only=False)
    torch.save({"x": Evil()}, path, _use_new_zipfile_serialization=zipped)
    for source in (path, io.BytesIO(path.read_bytes())):
        with pytest.raises(pickle.UnpicklingError, match="Weights only load failed"):
            tonnage.torch.load(source)
    assert not (tmp_path / "evil").exists()


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_a_bare_pickle_is_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for protocol in range(2, pickle.HIGHEST_PROTOCOL + 1):
        with pytest.raises(pickle.UnpicklingError):
            tonnage.torch.load(pickle.dumps(Evil(), protocol))
    assert not (tmp_path / "evil").exists()


def test_headers_that_begin_as_a_pickle_does_are_headers() -> None:
    # 0x0280 and 0x0580 as lengths of headers: bytes that begin a pickle of protocol 2 and 5.
    for protocol in (2, 3, 4, 5):
        length = 0x80 + (protocol << 8)
        data = safetensors.torch.save({"w": torch.zeros(2)})
        (header,) = struct.unpack("<Q", data[:8])
        text = data[8 : 8 + header].ljust(length)
        padded = struct.pack("<Q", length) + text + data[8 + header :]
        assert _front.is_pickle(padded[:9])
        assert tonnage.torch.load(padded)["w"].shape == (2,)


# ---- where tensors go -------------------------------------------------------------------------

META = [
    "meta",
    torch.device("meta"),
    {"cpu": "meta"},
    {"cpu": torch.device("meta")},
    lambda storage, location: torch.UntypedStorage(storage.nbytes(), device="meta"),
]


@pytest.mark.parametrize(
    "location", META, ids=["text", "device", "dict", "dict-device", "function"]
)
@pytest.mark.parametrize("mmap", [None, True])
def test_tensors_go_where_map_location_says(location: Any, mmap: bool, tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    for state in (STATE, NESTED):
        path.write_bytes(content(state))
        loaded = tonnage.torch.load(path, location, mmap=mmap)
        loaded = loaded if state is STATE else loaded["model"]
        for name, tensor in STATE.items():
            assert loaded[name].device.type == "meta"
            assert (loaded[name].shape, loaded[name].dtype) == (tensor.shape, tensor.dtype)


def test_what_leaves_tensors_on_the_host(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    path.write_bytes(content())
    for location in (
        None, "cpu", torch.device("cpu"), {}, {"cuda:0": "meta"}, {"cpu": "cpu"},
        lambda storage, location: storage, lambda storage, location: None,
        lambda storage, location: storage.clone(),
        lambda storage, location: torch.tensor(storage.tolist(), dtype=torch.uint8),
    ):  # fmt: skip
        assert is_state(tonnage.torch.load(path, location))


def test_a_function_sees_what_torch_load_shows_it(tmp_path: Path) -> None:
    seen: dict[str, list[Any]] = {"theirs": [], "ours": []}

    def watch(which: str) -> Any:
        def location(storage: Any, place: str) -> Any:
            seen[which].append((type(storage), storage.nbytes(), storage.device, place))
            return storage

        return location

    base = torch.arange(8)
    state = {"a": base, "b": base[2:5], "c": torch.zeros(3, 3)}
    torch.save(state, tmp_path / "a.pt")
    tonnage.torch.save(state, tmp_path / "a.safetensors")
    theirs = torch.load(tmp_path / "a.pt", watch("theirs"))
    for mmap in (False, True):
        seen["ours"].clear()
        ours = tonnage.torch.load(tmp_path / "a.safetensors", watch("ours"), mmap=mmap)
        assert sorted(seen["ours"], key=str) == sorted(seen["theirs"], key=str)
        assert all(torch.equal(ours[name], theirs[name]) for name in state)


def test_locations_that_make_no_sense() -> None:
    for location in (3, [], b"cpu"):
        with pytest.raises(TypeError, match="map_location takes"):
            tonnage.torch.load(content(), location)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="map_location gave a int"):
        tonnage.torch.load(content(), lambda storage, _: 3)
    with pytest.raises(ValueError, match="storage of 1 bytes"):
        tonnage.torch.load(content(), lambda storage, _: torch.UntypedStorage(1))
    with pytest.raises((SafetensorError, RuntimeError)):
        tonnage.torch.load(content(), "quantum")


def test_meta_reads_no_tensor(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    tonnage.torch.save({"w": torch.zeros(1 << 20)}, path, fsync=False)

    def read() -> int:
        fields = Path("/proc/self/io").read_text().split()
        return int(fields[fields.index("rchar:") + 1])

    tonnage.torch.load(path, "meta")
    before = read()
    assert tonnage.torch.load(path, "meta")["w"].shape == (1 << 20,)
    assert read() - before < 100_000
    before = read()
    tonnage.torch.load(path)
    assert read() - before > 1 << 22  # else the count above says nothing


# ---- saving -----------------------------------------------------------------------------------


class Reluctant(io.RawIOBase):
    """Takes at most a few bytes at a time, as a pipe may."""

    def __init__(self) -> None:
        self.taken = bytearray()

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        self.taken += bytes(data[:1000])
        return min(len(data), 1000)


def test_file_objects_get_all_of_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    state = {"w": torch.arange(5000), "x": [1]}
    for limit in (_front._IN_MEMORY, 0):
        monkeypatch.setattr(_front, "_IN_MEMORY", limit)
        slow = Reluctant()
        tonnage.torch.save(state, slow)  # type: ignore[arg-type]
        assert bytes(slow.taken) == content(state)
        with (tmp_path / "a").open("wb") as file:
            tonnage.torch.save(state, file)
        assert (tmp_path / "a").read_bytes() == content(state)
    with pytest.raises(TypeError, match="not text"):
        tonnage.torch.save(state, io.StringIO())  # type: ignore[call-overload]
    with pytest.raises(TypeError, match="takes a path or a file object"):
        tonnage.torch.save(state, 3)  # type: ignore[call-overload]


def test_the_reference_s_calls_mean_what_they_meant() -> None:
    for metadata in (None, {}, {"a": "b"}):
        expected = safetensors.torch.save(STATE, metadata)
        assert tonnage.torch.save(STATE, metadata) == expected
        assert tonnage.torch.save(tensors=STATE, metadata=metadata) == expected
        assert is_state(tonnage.torch.load(data=expected))
    with pytest.raises(ValueError, match=r"expected torch\.Tensor"):
        tonnage.torch.save({"a": 3})  # type: ignore[dict-item]
    with pytest.raises(ValueError, match="Expected a dict"):
        tonnage.torch.save([STATE["w"]])  # type: ignore[arg-type]


def test_saving_replaces_a_file_whole(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    tonnage.torch.save(NESTED, path)
    before = path.stat().st_ino
    loaded = tonnage.torch.load(path, mmap=True)
    tonnage.torch.save(loaded, path)  # its own source
    assert path.stat().st_ino != before
    assert is_state(tonnage.torch.load(path)["model"])
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.safetensors"]
