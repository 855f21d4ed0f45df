"""The native dtype table, as the adapters look things up in it."""

from __future__ import annotations

from typing import NamedTuple

from .._dropin import refusal
from .._native import DTYPES, SafetensorError


class Row(NamedTuple):
    """One dtype: its name in a header, its bits, and what packages call it."""

    name: str
    bits: int
    torch: str | None
    numpy: str | None
    ml_dtypes: str | None


ROWS = {row[0]: Row(*row) for row in DTYPES}


def not_understood(name: str, why: str) -> SafetensorError:
    """The error for a dtype that a framework lacks."""
    return refusal("UNSUPPORTED_DTYPE", f"Dtype not understood: {name}: {why}")
