"""`load_model`: modules without memory, files and folders, ties, and what does not fit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import tonnage
import tonnage.torch
import torch
from tonnage.torch import load_model
from torch import nn


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 4)
        self.up = nn.Linear(4, 6)
        self.down = nn.Linear(6, 4)
        self.norm = nn.BatchNorm1d(4)
        self.head = nn.Linear(4, 11, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("scale", torch.tensor(2.0))

    def forward(self, tokens: torch.Tensor) -> Any:
        hidden = self.norm(self.down(torch.relu(self.up(self.embed(tokens)))))
        return self.head(hidden * self.scale)


TOKENS = torch.arange(11)


@pytest.fixture(scope="module")
def trained() -> Model:
    torch.manual_seed(3)
    model = Model()
    model(TOKENS).sum().backward()
    model.scale += 1
    for parameter in model.parameters():
        parameter.grad = None
    return model.eval()


@pytest.fixture(params=["file", "folder", "index", "checkpoint", "one of a folder"])
def source(request: pytest.FixtureRequest, trained: Model, tmp_path: Path) -> Any:
    path, folder = tmp_path / "model.safetensors", tmp_path / "model"
    tonnage.torch.save_model(trained, str(path), fsync=False)
    if request.param == "file":
        return path
    size = None if request.param == "one of a folder" else "200B"
    tonnage.save(tonnage.torch.load_file(path), folder, max_shard_size=size)
    if request.param == "index":
        return folder / "model.safetensors.index.json"
    return tonnage.open(folder) if request.param == "checkpoint" else folder


def empty() -> Model:
    with torch.device("meta"):
        return Model()


def mapped(tensor: torch.Tensor) -> bool:
    lines = Path("/proc/self/maps").read_text().splitlines()
    areas = [([int(end, 16) for end in line.split()[0].split("-")], line) for line in lines]
    (found,) = [line for (start, stop), line in areas if start <= tensor.data_ptr() < stop]
    return found.endswith(".safetensors")


pytestmark = pytest.mark.filterwarnings("error::UserWarning")


# ---- where it goes ----------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["mmap", "pread"])
def test_modules_without_memory_get_the_file_s(source: Any, backend: str, trained: Model) -> None:
    model = empty()
    assert load_model(model, source, backend=backend) == ([], [])
    assert torch.equal(model.eval()(TOKENS), trained(TOKENS))
    assert model.head.weight is model.embed.weight
    assert isinstance(model.embed.weight, nn.Parameter)
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert model.norm.num_batches_tracked == 1
    assert mapped(model.up.weight) == (backend == "mmap")
    model.train()(TOKENS).sum().backward()
    assert model.embed.weight.grad is not None


@pytest.mark.parametrize("backend", ["mmap", "pread"])
def test_modules_with_memory_are_copied_into(source: Any, backend: str, trained: Model) -> None:
    model = Model().eval()
    before = dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers())
    assert load_model(model, source, backend=backend) == ([], [])
    after = dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers())
    assert all(before[name] is tensor and not mapped(tensor) for name, tensor in after.items())
    assert torch.equal(model(TOKENS), trained(TOKENS))


def test_assign_replaces_and_keeps_ties(source: Any, trained: Model) -> None:
    model = Model().eval()
    model.up.weight.requires_grad_(False)
    before = model.embed.weight
    assert load_model(model, source, assign=True) == ([], [])
    assert model.embed.weight is not before
    assert model.head.weight is model.embed.weight
    assert not model.up.weight.requires_grad
    assert torch.equal(model(TOKENS), trained(TOKENS))
    with pytest.raises(ValueError, match="nothing to copy into"):
        load_model(empty(), source, assign=False)


def test_a_module_of_which_some_is_without_memory(source: Any, trained: Model) -> None:
    model = Model().eval()
    model.up = nn.Linear(4, 6, device="meta")
    before = model.embed.weight
    assert load_model(model, source) == ([], [])
    assert model.embed.weight is before
    assert torch.equal(model(TOKENS), trained(TOKENS))


@pytest.mark.parametrize("dtype", [torch.bfloat16, "float16", "F64"])
def test_dtype_casts_what_is_assigned(source: Any, dtype: Any, trained: Model) -> None:
    model, wanted = empty(), tonnage._dtypes.parse(dtype).torch
    model.up = nn.Linear(4, 6)  # stays what it is
    assert load_model(model, source, dtype=dtype) == ([], [])
    assert model.embed.weight.dtype == getattr(torch, wanted or "")
    assert torch.equal(model.embed.weight, trained.embed.weight.to(model.embed.weight.dtype))
    assert torch.equal(model.up.weight, trained.up.weight)
    assert model.norm.num_batches_tracked.dtype == torch.int64
    with pytest.raises(ValueError, match="give assign=True"):
        load_model(Model(), source, dtype=dtype)


def test_where_it_is_read_to(source: Any) -> None:
    for device in ("cpu", torch.device("cpu")):
        model = empty()
        load_model(model, source, device=device)  # type: ignore[arg-type]
        assert model.up.weight.device.type == "cpu"
    model = empty()
    load_model(model, source, device="meta")
    assert model.up.weight.device.type == "meta"
    with pytest.raises(ValueError, match="mmap"):
        load_model(empty(), source, backend="other")


def test_buffers_that_no_state_has_are_named(source: Any) -> None:
    model = empty()
    model.register_buffer("cache", torch.empty(3, device="meta"), persistent=False)
    with pytest.warns(tonnage.IncompleteLoadWarning, match="meta device: cache$"):
        load_model(model, source)


# ---- ties -------------------------------------------------------------------------------------


def test_a_tie_by_either_name(trained: Model, tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    state = {name: tensor.clone() for name, tensor in trained.state_dict().items()}
    for dropped in ("embed.weight", "head.weight"):
        kept = {name: tensor for name, tensor in state.items() if name != dropped}
        tonnage.torch.save_file(kept, path, fsync=False)
        for model in (empty(), Model()):
            assert load_model(model, path) == ([], [])
            assert model.head.weight is model.embed.weight
            assert torch.equal(model.eval()(TOKENS), trained(TOKENS))
    # A file that has both is one too many for this module: the reference says so as well.
    tonnage.torch.save_file(state, path, fsync=False)
    for model in (empty(), Model()):
        assert load_model(model, path, strict=False) == ([], ["head.weight"])
        assert model.head.weight is model.embed.weight
    assert safetensors.torch.load_model(Model(), path, strict=False)[1] == ["head.weight"]


def test_memory_shared_by_different_parameters(tmp_path: Path) -> None:
    def made() -> nn.ModuleDict:
        model = nn.ModuleDict({"a": nn.Linear(3, 3), "b": nn.Linear(3, 3)})
        model["b"].weight = nn.Parameter(model["a"].weight.data)
        return model

    path, model = tmp_path / "a.safetensors", made()
    tonnage.torch.save_model(model, str(path), fsync=False)
    for assign in (None, True):
        found = made()
        assert load_model(found, path, assign=assign) == ([], [])
        assert torch.equal(found["b"].weight, model["a"].weight)
        assert found["a"].weight.data_ptr() == found["b"].weight.data_ptr()
    turned = made()
    turned["b"].weight = nn.Parameter(turned["a"].weight.data.t())
    with pytest.raises(ValueError, match="assign=False"):
        load_model(turned, path, assign=True)


# ---- what does not fit ------------------------------------------------------------------------


@pytest.mark.parametrize("made", [Model, empty])
def test_everything_that_does_not_fit_is_told_at_once(made: Any, source: Any) -> None:
    model = made()
    with model.up.weight.device:
        model.more = nn.Linear(1, 2)
        model.down = nn.Linear(6, 5, bias=False)
    missing = ["more.bias", "more.weight"]
    with pytest.raises(RuntimeError) as refusal:
        load_model(model, source)
    assert str(refusal.value).splitlines() == [
        "Error(s) in loading state_dict for Model:",
        '    Missing key(s) in state_dict: "more.bias", "more.weight"',
        '    Unexpected key(s) in state_dict: "down.bias"',
        "    size mismatch for down.weight: copying a param with shape torch.Size([4, 6]) from"
        " checkpoint, the shape in current model is torch.Size([5, 6]).",
    ]
    with pytest.raises(RuntimeError, match="size mismatch") as refusal:
        load_model(model, source, strict=False)
    assert "Missing" not in str(refusal.value)
    with model.up.weight.device:
        model.down = nn.Linear(6, 4, bias=False)
    assert load_model(model, source, strict=False) == (missing, ["down.bias"])
    with pytest.raises(RuntimeError, match="Missing"):
        load_model(model, source)


def test_a_hook_s_own_refusal_is_passed_on(source: Any) -> None:
    model = Model()

    def refuse(*_: Any) -> None:
        raise RuntimeError("not today")

    model.register_load_state_dict_pre_hook(refuse)
    with pytest.raises(RuntimeError, match=r"^not today$"):
        load_model(model, source)


def test_hooks_that_rename_are_heard(trained: Model, tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    state = {f"old.{name}": value for name, value in trained.state_dict().items()}
    del state["old.head.weight"]
    tonnage.torch.save_file(state, path, fsync=False)

    def rename(module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
        for name in list(state):
            state[name.removeprefix("old.")] = state.pop(name)

    partly = Model()
    partly.up = nn.Linear(4, 6, device="meta")
    for model in (Model(), empty(), partly):
        model.register_load_state_dict_pre_hook(rename)
        assert load_model(model, path) == ([], [])
        assert torch.equal(model.eval()(TOKENS), trained(TOKENS))


def test_the_reference_s_calls_mean_what_they_meant(trained: Model, tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    safetensors.torch.save_model(trained, str(path))
    for arguments in ((), (True,), (True, "cpu"), (False, torch.device("cpu").index or 0)):
        if arguments[1:] == (0,) and not torch.cuda.is_available():
            continue
        assert load_model(Model(), path, *arguments) == ([], [])
    assert load_model(Model(), filename=str(path), strict=True, device="cpu") == ([], [])
    with pytest.raises(FileNotFoundError):
        load_model(Model(), tmp_path / "none.safetensors")
