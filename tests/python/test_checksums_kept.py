"""`convert` and `reshard` keep the checksums that their source has, and refuse what is damaged."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tonnage

TENSORS = {"a": np.arange(64, dtype=np.float32).reshape(8, 8), "b": np.ones(3, np.float16)}


def kinds(path: Path) -> tuple[bool, bool]:
    found = tonnage.verify(path)
    assert found.ok, found
    return found.files[0].chunks > 0, found.files[0].hashed


COPIES: list[Callable[..., Any]] = [
    tonnage.convert,
    tonnage.reshard,
]


@pytest.mark.parametrize("copy", COPIES, ids=["convert", "reshard"])
def test_a_copy_has_the_kinds_of_its_source(copy: Callable[..., Any], tmp_path: Path) -> None:
    source, target = tmp_path / "in.safetensors", tmp_path / "out.safetensors"
    for made, expected in (
        (False, (False, False)),
        (True, (True, False)),
        ("blake3", (True, True)),
    ):
        tonnage.save(TENSORS, source, checksums=made)
        copy(source, target)
        assert kinds(target) == expected
        copy(source, target, checksums=True)
        assert kinds(target) == (True, expected[1])
        copy(source, target, checksums=False)
        assert kinds(target) == (False, False)


@pytest.mark.parametrize("copy", COPIES, ids=["convert", "reshard"])
def test_damage_is_told_and_not_made_good(copy: Callable[..., Any], tmp_path: Path) -> None:
    source, target = tmp_path / "in.safetensors", tmp_path / "out.safetensors"
    tonnage.save(TENSORS, source, checksums=True)
    damaged = bytearray(source.read_bytes())
    damaged[-1] ^= 1
    source.write_bytes(damaged)
    for checksums in (None, True):
        with pytest.raises(tonnage.FormatError) as caught:
            copy(source, target, checksums=checksums)
        assert caught.value.code == "CHECKSUM_MISMATCH"
        assert caught.value.tensor in TENSORS
        assert not target.exists()
    copy(source, target, checksums=False)
    assert kinds(target) == (False, False)
