"""`safe_open.prefetch` on a GPU, as the reference's 0.9 release candidate has it, and beyond."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tonnage
import torch
from gpu_data import DEVICE, MIB, same

Saved = tuple[Path, dict[str, Any]]


def test_all_of_a_file_comes_as_it_lands(big: Saved) -> None:
    path, tensors = big
    with tonnage.safe_open(path, "pt") as file, file.prefetch(device=DEVICE) as loader:
        assert loader.names() == file.offset_keys()
        assert len(loader) == len(tensors)
        found = dict(loader)
        assert dict(loader) == {}
    assert all(same(found[name], tensors[name]) for name in tensors)


def test_a_plan_of_rows(big: Saved) -> None:
    path, tensors = big
    plan = {"layer.3.weight": slice(10, 5_000_000), "layer.1.weight": None}
    with tonnage.safe_open(path, "pt", device=DEVICE) as file:
        loader = file.prefetch(plan)
    # The loader outlives the handle.
    first = loader.take("layer.3.weight")
    assert same(first, tensors["layer.3.weight"][10:5_000_000])
    with pytest.raises(tonnage.SafetensorError, match="already delivered"):
        loader.take("layer.3.weight")
    with pytest.raises(tonnage.SafetensorError, match="not in the prefetch plan"):
        loader.take("layer.2.weight")
    assert [name for name, _ in loader] == ["layer.1.weight"]
    loader.close()
    with pytest.raises(tonnage.SafetensorError, match="closed"):
        loader.take("layer.1.weight")


def test_plans_of_any_dimension_over_several_files(saved: Saved) -> None:
    folder, tensors = saved
    plan = {
        "large.f32": (slice(None), slice(100, 700)),
        "large.bf16": (slice(0, 4096, 2), [slice(0, 10), slice(500, 700)]),
        "odd.f16": [slice(0, 3), 17, slice(300, 333)],
        "small.5": (2, slice(1, 3)),
    }
    with tonnage.open(folder).prefetch(plan, device=DEVICE, staging="8MiB") as loader:
        found = dict(loader)
    wanted = {
        "large.f32": tensors["large.f32"][:, 100:700],
        "large.bf16": torch.cat(
            [tensors["large.bf16"][::2, 0:10], tensors["large.bf16"][::2, 500:700]], 1
        ),
        "odd.f16": torch.cat(
            [tensors["odd.f16"][at] for at in (slice(0, 3), slice(17, 18))]
            + [tensors["odd.f16"][300:333]]
        ),
        "small.5": tensors["small.5"][2, 1:3],
    }
    assert set(found) == set(wanted)
    for name, tensor in wanted.items():
        assert same(found[name], tensor), name


def test_what_nobody_took_is_free_after_close(big: Saved, clean: None) -> None:
    path, _ = big
    before = torch.cuda.memory_allocated()
    with tonnage.safe_open(path, "pt") as file:
        loader = file.prefetch(device=DEVICE)
        kept = loader.take("layer.4.weight")
        loader.close()
    assert torch.cuda.memory_allocated() - before <= kept.nbytes + 2 * MIB
    assert kept.sum(dtype=torch.int64) > 0


def test_tensors_that_were_dropped_free_their_memory(big: Saved, clean: None) -> None:
    path, _ = big
    before = torch.cuda.memory_allocated()
    with tonnage.safe_open(path, "pt") as file, file.prefetch(device=DEVICE) as loader:
        for _, tensor in loader:
            del tensor
        assert torch.cuda.memory_allocated() == before
