"""`tonnage.torch.save(state, f)` and `load`: what a state of nested containers keeps, and what a
hostile structure meets.
"""

from __future__ import annotations

import base64
import io
import json
import math
import random
import struct
from collections import OrderedDict, defaultdict, namedtuple
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors
import safetensors.torch
import tonnage
import tonnage.torch
import torch
from tonnage import SafetensorError
from tonnage.torch._encode import KEY, MAX_DEPTH
from torch.testing._internal.two_tensor import TwoTensor


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "state.safetensors"


def there_and_back(state: object, path: Path, **options: Any) -> Any:
    # Durability is for the tests of `save_file`: it costs most of the time here.
    tonnage.torch.save(state, path, fsync=False)
    return tonnage.torch.load(path, **options)


def same(one: Any, other: Any) -> bool:
    """Equal in value and in type, to the bit, all the way down."""
    if type(one) is not type(other):
        return False
    if isinstance(one, torch.Tensor):
        plain = one.detach().resolve_conj().resolve_neg().contiguous()
        found = other.detach().resolve_conj().resolve_neg().contiguous()
        return (
            (one.dtype, one.shape, one.requires_grad)
            == (other.dtype, other.shape, other.requires_grad)
            and plain.view(-1).view(torch.uint8).equal(found.view(-1).view(torch.uint8))
        )  # fmt: skip
    if isinstance(one, dict):
        if getattr(one, "_metadata", None) != getattr(other, "_metadata", None):
            return False
        pairs = list(zip(one.items(), other.items(), strict=True)) if len(one) == len(other) else []
        return len(one) == len(other) and all(same(a, c) and same(b, d) for (a, b), (c, d) in pairs)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    if isinstance(one, float):
        return struct.pack("d", one) == struct.pack("d", other)
    return bool(one == other)


def memory(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


# ---- what comes back --------------------------------------------------------------------------


def trained() -> dict[str, Any]:
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4))
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95))
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 3)
    for _ in range(2):
        model(torch.randn(5, 3)).sum().backward()
        optimizer.step()
        schedule.step()
    return {
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "epoch": 3,
        "rng": torch.get_rng_state(),
    }


@pytest.mark.parametrize("mmap", [False, True])
def test_a_training_state_comes_back_and_trains_on(path: Path, mmap: bool) -> None:
    state = trained()
    loaded = there_and_back(state, path, mmap=mmap)
    assert same(state, loaded)
    assert loaded["model"]._metadata["1"] == {"version": 2}
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4))
    optimizer = torch.optim.AdamW(model.parameters())
    model.load_state_dict(loaded["model"])
    optimizer.load_state_dict(loaded["optimizer"])
    assert optimizer.state_dict()["param_groups"][0]["betas"] == (0.9, 0.95)
    assert optimizer.state[model[0].weight]["step"] == 2


NAN = struct.unpack(">d", bytes.fromhex("fff8000000000123"))[0]
LEAVES: list[Any] = [
    None, True, False, 0, 1, -7, 2**64, -(2**128), 10**900, 0.0, -0.0, 1.0, 0.1, 5e-324, 1.7e308,
    math.inf, -math.inf, NAN, "", "text \u00e9\u2028\U0001f600\0\"\\", b"", bytes(range(256)),
    torch.float8_e4m3fn, torch.complex128, torch.bool, torch.device("cpu"), torch.device("cuda:3"),
    torch.device("meta"), torch.Size([]), torch.Size([2, 0, 3]), [], (), {}, OrderedDict(),
    [1, [2, (3, [4.0])]], {"a": {"b": {"c": ()}}}, OrderedDict([("z", 1), ("a", 2)]),
    {1: "one", -2: 0, None: 1, True is None: 2, 1.5: 3, b"k": 4, (1, ("a", None)): 5, "": 6},
    {math.inf: 1},
]  # fmt: skip


@pytest.mark.parametrize("leaf", LEAVES, ids=lambda leaf: repr(leaf)[:40])
def test_leaves_come_back_exactly(leaf: Any, path: Path) -> None:
    state = {"leaf": leaf, "tensor": torch.ones(2)}
    assert same(there_and_back(state, path), state)
    alone = there_and_back(leaf, path)
    assert same(alone, leaf) or (leaf == {} == alone)


def test_a_tensor_alone_is_a_state(path: Path) -> None:
    assert same(there_and_back(torch.arange(3), path), torch.arange(3))
    assert same(there_and_back([torch.arange(3)], path), [torch.arange(3)])


def test_random_states_come_back(tmp_path: Path) -> None:
    shuffled = random.Random(1)

    def value(depth: int) -> Any:
        kind = shuffled.randrange(9 if depth else 5)
        if kind < 2:
            dtype = shuffled.choice([torch.float32, torch.int8, torch.bfloat16, torch.complex64])
            shape = [shuffled.randrange(4) for _ in range(shuffled.randrange(4))]
            return torch.randint(-9, 9, shape).to(dtype)
        if kind < 5:
            return shuffled.choice(LEAVES)
        items = [value(depth - 1) for _ in range(shuffled.randrange(4))]
        if kind == 5:
            return items
        if kind == 6:
            return tuple(items)
        keys = [shuffled.choice(["a", "a.b", "b", 1, "1", ("a",), "__metadata__"]) for _ in items]
        pairs = dict(zip(keys, items, strict=True))
        return pairs if kind == 7 else OrderedDict(pairs)

    for at in range(300):
        state = {"x": value(4), "y": [value(3)]}
        loaded = there_and_back(state, tmp_path / str(at))
        assert same(loaded, state), state


def test_every_output_is_tensors_for_the_reference(path: Path) -> None:
    state = trained()
    tonnage.torch.save(state, path, metadata={"format": "pt"})
    plain = safetensors.torch.load_file(path)
    assert same(plain["model.0.weight"], state["model"]["0.weight"])
    assert same(plain["optimizer.state.0.step"], state["optimizer"]["state"][0]["step"])
    assert same(plain["rng"], state["rng"])
    with safetensors.safe_open(path, "pt") as file:
        metadata = file.metadata()
    assert metadata.keys() == {"format", KEY}
    assert json.loads(metadata[KEY])["version"] == 1


def test_a_dict_of_tensors_is_the_ordinary_file(path: Path) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4))
    parts = torch.arange(12).chunk(3)  # one storage, and no byte of it twice
    for state in (model.state_dict(), dict(zip("abc", parts, strict=True)), {}):
        for metadata in (None, {"format": "pt"}):
            tonnage.torch.save(state, path, metadata)
            assert path.read_bytes() == tonnage.torch.save(dict(state), metadata)
            file = io.BytesIO()
            tonnage.torch.save(state, file, metadata=metadata)
            assert file.getvalue() == path.read_bytes()
    tonnage.torch.save({"t": torch.arange(6).view(2, 3).t()}, path)
    assert path.read_bytes() == tonnage.torch.save({"t": torch.arange(6).view(2, 3).t().clone(
        memory_format=torch.contiguous_format)})  # fmt: skip


def test_names_that_meet_are_told_apart(path: Path) -> None:
    one, two, three, four = (torch.full((1,), at) for at in range(4))
    state = {"a": {"b": one}, "a.b": two, "a.b#2": three, "__metadata__": four}
    assert same(there_and_back(state, path), state)
    names = set(safetensors.torch.load_file(path))
    assert {"a.b", "a.b#2", "a.b#3", "__metadata__#2"} == names


# ---- shared memory ----------------------------------------------------------------------------


@pytest.mark.parametrize("mmap", [False, True])
def test_the_same_tensor_twice_is_one_object_again(path: Path, mmap: bool) -> None:
    weight = torch.nn.Parameter(torch.randn(3, 2))
    loaded = there_and_back({"in": weight, "out": [weight], "copy": weight.data}, path, mmap=mmap)
    assert loaded["in"] is loaded["out"][0]
    assert type(loaded["in"]) is torch.nn.Parameter
    assert type(loaded["copy"]) is torch.Tensor
    assert loaded["in"].data_ptr() == loaded["copy"].data_ptr()
    assert len(safetensors.torch.load_file(path)) == 1


@pytest.mark.parametrize("mmap", [False, True])
def test_a_flat_state_with_tied_tensors_keeps_the_tie(path: Path, mmap: bool) -> None:
    model = torch.nn.ModuleDict({"a": torch.nn.Linear(3, 3), "b": torch.nn.Linear(3, 3)})
    model["b"].weight = model["a"].weight
    state = model.state_dict()
    assert state["a.weight"] is not state["b.weight"]
    loaded = there_and_back(state, path, mmap=mmap)
    assert same(loaded, state)
    loaded["a.weight"][0, 0] = 7
    assert loaded["b.weight"][0, 0] == 7
    assert loaded["a.weight"] is not loaded["b.weight"]


def views() -> dict[str, Any]:
    base, other = torch.arange(24.0).view(4, 6), torch.arange(10)
    odd, lazy = torch.arange(64, dtype=torch.uint8), torch.randn(4, dtype=torch.complex64)
    return {
        "turned": base.t(), "base": base, "rows": base[1:3], "columns": base[:, 1::2],
        "bits": base.view(torch.int32), "wide": base[0, :1].expand(5),
        "bytes": base.view(torch.uint8)[1, 3:9],
        "left": other[:6], "right": other[3:9], "half": other[2:5].view(torch.int16)[1:],
        "window": odd[3:60], "shifted": odd[8:48].view(torch.float64), "none": odd[5:5],
        "lazy": lazy, "conj": lazy.conj(), "imag": lazy.imag, "neg": lazy.conj().imag,
    }  # fmt: skip


@pytest.mark.parametrize("location", [None, "cpu", lambda storage, _: storage.clone()])
@pytest.mark.parametrize("mmap", [False, True])
def test_views_look_at_the_same_memory_again(path: Path, mmap: bool, location: Any) -> None:
    state = views()
    loaded = there_and_back(state, path, mmap=mmap, map_location=location)
    assert same(loaded, state)
    for name, tensor in state.items():
        assert loaded[name].stride() == tensor.stride() or name == "none", name
        for other, against in state.items():
            if tensor.numel() and against.numel():
                shared = memory(tensor) == memory(against)
                assert (memory(loaded[name]) == memory(loaded[other])) == shared or mmap
    before = state["rows"].clone()
    loaded["base"].mul_(2)
    assert torch.equal(loaded["rows"], before * 2)
    assert torch.equal(loaded["turned"], loaded["base"].t())
    loaded["left"][4] = 99
    assert (loaded["right"][1], loaded["half"][7]) == (99, 99)
    loaded["lazy"][1] = 1 + 2j
    assert (loaded["conj"][1], loaded["imag"][1], loaded["neg"][1]) == (1 - 2j, 2, -2)


def test_memory_that_nobody_views_is_not_written(path: Path) -> None:
    huge = torch.zeros(1 << 20)
    state = {"a": huge[10:20], "b": huge[15:30], "c": [huge[1000:1001]]}
    assert same(there_and_back(state, path), state)
    assert path.stat().st_size < 2000


def test_views_on_the_meta_device(path: Path) -> None:
    state = views()
    tonnage.torch.save({"nested": state}, path)
    for name, tensor in tonnage.torch.load(path, "meta")["nested"].items():
        assert tensor.device.type == "meta"
        assert (tensor.shape, tensor.dtype) == (state[name].shape, state[name].dtype)


def test_gradients_and_parameters(path: Path) -> None:
    shared = torch.arange(6.0)
    state = {
        "p": torch.nn.Parameter(torch.ones(2)),
        "frozen": torch.nn.Parameter(torch.ones(2, dtype=torch.int32), requires_grad=False),
        "leaf": torch.ones(2, requires_grad=True),
        "made": torch.ones(2, requires_grad=True) * 2,
        "view": torch.nn.Parameter(shared[2:5]), "over": shared[:4],
        "one": torch.nn.Parameter(shared),
    }  # fmt: skip
    loaded = there_and_back(state, path)
    assert same(loaded, state)
    assert all(tensor.is_leaf for tensor in loaded.values())
    (loaded["p"] * loaded["leaf"]).sum().backward()
    assert loaded["p"].grad is not None


# ---- what has no form -------------------------------------------------------------------------

Pair = namedtuple("Pair", "a b")


class Custom(torch.Tensor):
    pass


class Text(str):
    __slots__ = ()


def jagged() -> torch.Tensor:
    return torch.nested.nested_tensor([torch.ones(2), torch.ones(3)], layout=torch.jagged)


@pytest.mark.parametrize(
    ("leaf", "words"),
    [
        (object(), "no form for object"),
        (torch.nn.Linear(1, 1), r"no form for torch\.nn\.modules\.linear\.Linear"),
        (np.float64(1), r"no form for numpy\.float64"),
        (np.zeros(2), r"no form for numpy\.ndarray"),
        (Pair(1, 2), "no form for .*Pair"),
        (defaultdict(int), r"no form for collections\.defaultdict"),
        ({1, 2}, "no form for set"),
        (Text("a"), "no form for .*Text"),
        (1j, "no form for complex"),
        (lambda: 0, "no form for function"),
        (torch.Generator(), "no form for torch._C.Generator"),
        ({frozenset(): 1}, r"a key of type frozenset"),
        (torch.ones(2).to_sparse(), "to_dense"),
        (torch.ones(2, device="meta"), "no values"),
        (torch.ones(2, dtype=torch.complex128), "no form for torch.complex128"),
        (torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8), "quantized"),
        (torch.ones(2).as_subclass(Custom), "Custom is a class of its own"),
        (jagged(), "__tensor_flatten__"),
        (TwoTensor(torch.ones(2), torch.ones(2)), "__tensor_flatten__"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_anything_else_is_refused_with_its_path(leaf: Any, words: str, path: Path) -> None:
    path.write_bytes(b"before")
    with pytest.raises(TypeError, match=words) as refusal:
        tonnage.torch.save({"model": [0, {"x": leaf}]}, path)
    assert str(refusal.value).startswith("state['model'][1]['x']")
    assert path.read_bytes() == b"before"
    assert len(list(path.parent.iterdir())) == 1


def test_values_that_are_too_much_are_refused_with_their_path(path: Path) -> None:
    loop: list[Any] = []
    loop.append({"a": loop})
    deep: Any = []
    for _ in range(MAX_DEPTH):
        deep = [deep]
    key: Any = ()
    for _ in range(MAX_DEPTH):
        key = (key,)
    for state, words in [
        (loop, r"state\[0\]\['a'\]: a container that holds itself"),
        (deep, r"state(\[0\])+: containers are nested"),
        ({key: 1}, "a key is nested"),
        ([10**1000], r"state\[0\]: an integer"),
        (["\ud800"], r"state\[0\]: .* surrogate"),
        ({"\ud800": 1}, "surrogate"),
    ]:
        with pytest.raises(ValueError, match=words):
            tonnage.torch.save(state, path)
    assert same(there_and_back(deep[0], path), deep[0])
    once = [1]
    assert same(there_and_back([once, once], path), [[1], [1]])
    wide: Any = []
    for _ in range(60):
        wide = [wide, wide]
    with pytest.raises(ValueError, match="more than"):
        tonnage.torch.save(wide, path)


def test_tensors_that_keep_their_values_elsewhere_are_refused_by_the_reference_s_functions(
    path: Path,
) -> None:
    for function in (tonnage.torch.save, lambda state: tonnage.torch.save_file(state, path)):
        with pytest.raises(TypeError, match=r"x: .*__tensor_flatten__"):
            function({"x": TwoTensor(torch.ones(2), torch.ones(2))})


def test_the_key_of_the_structure_is_not_for_callers(path: Path) -> None:
    with pytest.raises(ValueError, match=KEY):
        tonnage.torch.save([1], path, {KEY: "{}"})


# ---- hostile structures -----------------------------------------------------------------------

TENSORS = {"a": torch.arange(6.0), "b": torch.arange(4, dtype=torch.uint8)}


def view(**changes: Any) -> dict[str, Any]:
    fields = {"dtype": "float32", "offset": 0, "shape": [2], "stride": [1], "length": 24}
    return {"tensor": {"of": "a", "view": fields | changes}}


def deep(levels: int) -> str:
    return '{"version":1,"root":' + "[" * levels + "]" * levels + "}"


def nested(node: Any) -> Any:
    return {"version": 1, "root": [{"tensor": "a"}, {"tensor": "b"}, node]}


HOSTILE: list[tuple[Any, str]] = [
    ("", "not JSON"), ("{", "not JSON"), ("[]", "no object with a version"),
    ("{}", "no object with a version"), ('{"version":1}', "fields"),
    ('{"version":1,"root":0,"more":1}', "fields"), ('{"version":1,"version":1,"root":0}', "twice"),
    ('{"version":1,"root":{"dict":[],"dict":[]}}', "twice"), ('{"version":1,"root":NaN}', "NaN"),
    ('{"version":1,"root":-Infinity}', "Infinity"), ('{"version":1,"root":1e999}', "larger"),
    ('{"version":1,"root":' + "9" * 5000 + "}", "digits"), (deep(MAX_DEPTH + 3), "nested"),
    (deep(100_000), "nested"), (deep(3_000_000), "nested"),
    ('{"version":1,"root":[' + "[]," * 3_000_000 + "0]}", "holds too much"),
    ('{"version":1,"root":"\\ud800"}', "surrogate"),
    (nested({"tensor": "c"}), "no tensor 'c'"), (nested({"tensor": 1}), "does not say which"),
    (nested({"tensor": {}}), "does not say which"), (nested({"tensor": {"of": ["a"]}}), "which"),
    (nested({"tensor": {"of": "a", "exec": "x"}}), "unknown field 'exec'"),
    (nested({"tensor": {"of": "a", "alias": True}}), "no int"),
    (nested({"tensor": {"of": "a", "parameter": 1}}), "no bool"),
    (nested({"tensor": {"of": "b", "requires_grad": True}}), "requires gradients"),
    (nested({"tensor": {"of": "a", "conj": True}}), "belong to a view"),
    (nested({"pickle": "x"}), "tag 'pickle'"), (nested({"__reduce__": []}), "not known"),
    (nested({}), "one member"), (nested({"tuple": [], "dict": []}), "one member"),
    (nested({"tuple": 1}), "array"), (nested({"dict": {}}), "array"),
    (nested({"dict": [1]}), "pairs"),
    (nested({"dict": [["a", 1], ["a", 2]]}), "twice"), (nested({"dict": [[[], 1]]}), "no key"),
    (nested({"dict": [[{"dict": []}, 1]]}), "no key"),
    (nested({"dict": [[{"size": [1]}, 1]]}), "no key"),
    (nested({"state_dict": []}), "versions"), (nested({"state_dict": [[], 3]}), "are a dict"),
    (nested({"bytes": "!"}), "base64"), (nested({"bytes": "YQ"}), "base64"),
    (nested({"bytes": 1}), "string"),
    (nested({"float": "7ff"}), "hexadecimal"),
    (nested({"float": "7FF0000000000000"}), "hexadecimal"),
    (nested({"dtype": "load"}), "no dtype"), (nested({"dtype": "os.system"}), "no dtype"),
    (nested({"dtype": "__class__"}), "no dtype"), (nested({"device": "quantum"}), "no device"),
    (nested({"device": "cuda:99999"}), "no device"), (nested({"size": [-1]}), "extents"),
    (nested({"size": [1.5]}), "extents"), (nested({"size": [2**70]}), "extents"),
    (nested(view(offset=-4)), "below zero"), (nested(view(shape=[-1])), "below zero"),
    (nested(view(stride=[-1])), "below zero"), (nested(view(offset=2)), "no multiple"),
    (nested(view(shape=[7])), "reaches to byte 28"), (nested(view(offset=20)), "reaches"),
    (nested(view(offset=28, shape=[0])), "reaches"),
    (nested(view(shape=[2], stride=[6])), "reaches"),
    (nested(view(shape=[2**62], stride=[0])), "counted"),
    (nested(view(shape=[2, 2**62, 8], stride=[0] * 3)), "counted"),
    (nested(view(shape=[2**61, 1], stride=[2**61, 1])), "counted"),
    (nested(view(length=20)), "looks onto 20"),
    (nested(view(shape=[1] * 65, stride=[1] * 65)), "65 dimensions"),
    (nested(view(stride=[])), "0 strides"),
    (nested(view(dtype="qint8")), "no form"), (nested(view(dtype="nope")), "no dtype"),
    (nested(view(dtype=3)), "integers"), (nested(view(shape=["2"])), "integers"),
    (nested(view(shape=2)), "array"),
    (nested(view(offset=True)), "integers"),
    (nested({"tensor": {"of": "a", "view": {}}}), "a view has the fields"),
    ({"version": 1, "root": {"tensor": "a"}}, "'b' besides"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("structure", "words"), HOSTILE, ids=[f"{at}-{words}" for at, (_, words) in enumerate(HOSTILE)]
)
def test_hostile_structures_are_refused(structure: Any, words: str, path: Path) -> None:
    text = structure if isinstance(structure, str) else json.dumps(structure)
    tonnage.torch.save_file(TENSORS, path, {KEY: text}, fsync=False)
    for mmap in (False, True):
        with pytest.raises(SafetensorError, match=words) as refusal:
            tonnage.torch.load(path, mmap=mmap)
        assert refusal.value.code == "STRUCTURE"
        assert refusal.value.clause is not None
        assert isinstance(refusal.value, ValueError)
    # The file itself is sound.
    assert tonnage.torch.load_file(path).keys() == TENSORS.keys()


def test_another_version_is_unsupported(path: Path) -> None:
    for version in (2, 0, "1", 1.0, True, None):
        tonnage.torch.save_file(TENSORS, path, {KEY: json.dumps({"version": version, "x": 0})})
        with pytest.raises(tonnage.UnsupportedError, match="load_file"):
            tonnage.torch.load(path)


def test_changed_structures_never_do_more_than_fail(path: Path) -> None:
    state = {"v": views(), "leaves": [leaf for leaf in LEAVES if leaf != 10**900]}
    tonnage.torch.save(state, path)
    tensors = tonnage.torch.load_file(path)
    with safetensors.safe_open(path, "pt") as file:
        text = file.metadata()[KEY]
    shuffled, refused = random.Random(2), 0
    pieces = ["{", "}", "[", "]", ",", ":", '"', "0", "9", "-", "1e400", "true", "null", '"tensor"',
              '"of"', '"view"', "\\u0000", base64.b64encode(b"x").decode()]  # fmt: skip
    for _ in range(2000):
        at = shuffled.randrange(len(text))
        until = at + shuffled.choice([0, 1, 1, 2, 8])
        changed = text[:at] + shuffled.choice(pieces) + text[until:]
        try:
            tonnage.torch.load(tonnage.torch.save(tensors, {KEY: changed}))
        except SafetensorError as error:
            refused += error.code in ("STRUCTURE", "STRUCTURE_VERSION")
    assert refused > 1000
