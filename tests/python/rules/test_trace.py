"""Weight converters, traced: every operation means what PyTorch means by it, or is refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import tonnage
import torch
from catalogs import Ref
from tonnage._expr import Source
from tonnage._rules import trace
from transformers import core_model_loading as loading


def traced(name: str, tensor: torch.Tensor) -> trace.Traced:
    return trace.source(name, Ref(tuple(tensor.shape), "I64"))


def values(made: Any, arrays: dict[str, Any]) -> Any:
    assert isinstance(made, trace.Traced)
    found = made.expr.evaluate(arrays)
    assert found.shape == tuple(made.shape)
    return found


A = torch.arange(48).reshape(4, 6, 2)
B = torch.arange(100, 148).reshape(4, 6, 2)


@pytest.mark.parametrize(
    "convert",
    [
        lambda a, b: torch.cat([a, b], dim=1),
        lambda a, b: torch.cat((a, b), -1),
        lambda a, b: torch.stack([a, b]),
        lambda a, b: torch.stack([a, b], dim=-1),
        lambda a, b: torch.chunk(a, 3, dim=1)[1],
        lambda a, b: torch.chunk(a, 4, dim=1)[-1],
        lambda a, b: a.chunk(5, 0)[3],
        lambda a, b: torch.split(a, [1, 5], dim=1)[1],
        lambda a, b: torch.split(a, 4, dim=1)[1],
        lambda a, b: a.split(split_size=4, dim=1)[0],
        lambda a, b: a.transpose(0, -1),
        lambda a, b: torch.transpose(a, dim0=0, dim1=1),
        lambda a, b: a.permute(2, 0, 1),
        lambda a, b: torch.permute(a, (1, 2, 0)),
        lambda a, b: a.reshape(8, -1),
        lambda a, b: torch.reshape(a, (3, 16)),
        lambda a, b: a.view(4, 2, 3, 2),
        lambda a, b: a.transpose(0, 1).reshape(-1),
        lambda a, b: a.flatten(1),
        lambda a, b: torch.flatten(a, 0, 1),
        lambda a, b: a.unflatten(1, (-1, 2)),
        lambda a, b: a.unflatten(1, [3, 2]).transpose(1, 2).contiguous(),
        lambda a, b: a.unbind(1)[4],
        lambda a, b: torch.unbind(a, dim=-1)[0],
        lambda a, b: a.narrow(1, 2, 3),
        lambda a, b: torch.narrow(a, 0, 1, 2),
        lambda a, b: a.select(2, 1),
        lambda a, b: a[1],
        lambda a, b: a[-1, 2:],
        lambda a, b: a[..., 1],
        lambda a, b: a[:, ::2, None],
        lambda a, b: a[:, [0, 3]],
        lambda a, b: a[1:2].squeeze(0),
        lambda a, b: a.unsqueeze(1),
        lambda a, b: a[0].T,
        lambda a, b: a[0].t(),
        lambda a, b: a.mT,
        lambda a, b: a.clone().detach().contiguous(),
        lambda a, b: a.to(torch.int64).to("cpu"),
        lambda a, b: a.repeat(1, 2, 1),
        lambda a, b: a.repeat(2, 1, 1, 1),
        lambda a, b: torch.swapaxes(a, 0, 2),
        lambda a, b: torch.stack(list(a), dim=1),
        lambda a, b: torch.cat([a[:, :1], b.unflatten(1, (-1, 2)).flatten(1, 2), a[:, 1:]], dim=1),
    ],
)
def test_an_operation_moves_what_it_moves_in_pytorch(
    convert: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
) -> None:
    made = convert(traced("a", A), traced("b", B))
    wanted = convert(A, B)
    assert np.array_equal(values(made, {"a": A.numpy(), "b": B.numpy()}), wanted.numpy())


@pytest.mark.parametrize(
    ("compute", "name"),
    [
        (lambda a, b: a + b, "add"),
        (lambda a, b: a * 2, "mul"),
        (lambda a, b: a @ b.mT, "matmul"),
        (lambda a, b: a.sum(0), "sum"),
        (lambda a, b: a.to(torch.float32), "cast from torch.int64 to torch.float32"),
        (lambda a, b: a.float(), "float"),
        (lambda a, b: a.half(), "half"),
        (lambda a, b: a.view(torch.int32), "view as another dtype"),
        (lambda a, b: a.flip(0), "flip"),
        (lambda a, b: torch.cat([a, torch.zeros(4, 6, 2)], 0), "cat with a tensor of its own"),
        (lambda a, b: torch.zeros_like(a), "zeros_like"),
        (lambda a, b: a.numpy(), "numpy"),
        (lambda a, b: a.tolist(), "tolist"),
        (lambda a, b: a.mul_(2), "mul_"),
        (lambda a, b: a[a > 3], "gt"),
        (lambda a, b: torch.index_select(a, 0, torch.tensor([0])), "index_select"),
    ],
)
def test_a_computation_is_refused_by_name(compute: Callable[..., Any], name: str) -> None:
    with pytest.raises(tonnage.UnsupportedError) as refused:
        compute(traced("a", A), traced("b", B))
    assert name in str(refused.value)
    assert refused.value.code == "CONVERSION"


class Config:
    """As much of a configuration as the converters ask for."""

    num_attention_heads = 4

    def get_text_config(self) -> Config:
        return self


W = torch.arange(16 * 6).reshape(16, 6)


@pytest.mark.parametrize(
    ("operations", "count", "wanted"),
    [
        ([loading.Chunk(dim=0)], 4, lambda w: dict(zip("0123", w.chunk(4), strict=True))),
        (
            [loading.Chunk(dim=0), loading.PermuteForRope(permute_layer_names=["0", "1"])],
            2,
            lambda w: {
                str(at): part.view(4, 1, 2, 6).transpose(1, 2).reshape(8, 6)
                for at, part in enumerate(w.chunk(2))
            },
        ),
        ([loading.Interleave(dim=0)], 1, lambda w: {"0": torch.cat([w[0::2], w[1::2]])}),
        ([loading.Transpose(0, 1)], 1, lambda w: {"0": w.T}),
    ],
)
def test_the_converters_of_transformers(
    operations: list[Any], count: int, wanted: Callable[[torch.Tensor], dict[str, torch.Tensor]]
) -> None:
    targets = [f"layer.{at}.w" for at in range(count)]
    converter = loading.WeightConverter("fused.w", targets, operations)
    name, pattern = converter.rename_source_key("model.fused.w")
    converter.add_tensor(name, "model.fused.w", str(pattern), traced("w", W))  # type: ignore[arg-type]
    made = converter.convert(name, config=Config())
    expected = wanted(W)
    assert len(made) == len(expected)
    for at, tensor in expected.items():
        found = made[f"model.layer.{at}.w"]
        assert np.array_equal(values(found, {"w": W.numpy()}), tensor.numpy())


def test_tensors_that_nothing_changes_stay_their_source() -> None:
    made = traced("a", A).contiguous().reshape(4, 6, 2).permute(0, 1, 2)
    assert made.expr == Source("a")


def test_a_transposed_tensor_is_transposed_when_it_is_stored_so() -> None:
    # GPT-2's matrices lie as [in, out].
    made = traced("w", W).t().contiguous()
    assert np.array_equal(values(made, {"w": W.numpy()}), W.numpy().T)
