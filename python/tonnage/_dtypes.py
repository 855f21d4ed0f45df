"""Dtypes by any of their names. The table itself is the native module's (`DTYPES`)."""

from __future__ import annotations

from typing import Any, NamedTuple

from tonnage import _errors
from tonnage._native import DTYPES


class Row(NamedTuple):
    """One dtype: its name in a header, bits an element takes, and its names elsewhere."""

    name: str
    bits: int
    torch: str | None
    numpy: str | None
    ml_dtypes: str | None


ROWS: dict[str, Row] = {row[0]: Row(*row) for row in DTYPES}
_BY_TORCH = {row.torch: row for row in ROWS.values() if row.torch}
_BY_NUMPY = {row.numpy or row.ml_dtypes: row for row in ROWS.values()}
#: Names that people use and no table has.
_ALIASES = {"half": "F16", "float": "F32", "double": "F64", "fp16": "F16", "fp32": "F32"} | {
    "bf16": "BF16",
    "fp64": "F64",
}


def of_torch(dtype: Any) -> Row | None:
    """The row of a `torch.dtype`."""
    return _BY_TORCH.get(str(dtype).removeprefix("torch."))


def of_numpy(dtype: Any) -> Row | None:
    """The row of a `numpy.dtype`, whatever its byte order."""
    return _BY_NUMPY.get(dtype.name)


def parse(dtype: object) -> Row:
    """The row that a `dtype=` argument means.

    Takes a header's name (`"BF16"`), a framework's (`"bfloat16"`), a `torch.dtype`, or anything
    that has the `name` of a NumPy dtype or is a scalar type of NumPy, `ml_dtypes` or JAX.

    Raises `UsageError` (a `ValueError`) for anything else.
    """
    if isinstance(dtype, str):
        name = dtype
    elif type(dtype).__module__.partition(".")[0] == "torch":
        name = str(dtype)
    else:
        # `numpy.dtype` has a name, `numpy.float32` is a class, `jax.numpy.float32` holds a dtype.
        inner = getattr(dtype, "dtype", None)
        own = getattr(dtype, "name", None) or getattr(inner, "name", None)
        name = own if isinstance(own, str) else getattr(dtype, "__name__", repr(dtype))
    name = name.removeprefix("torch.")
    name = _ALIASES.get(name.lower(), name)
    row = ROWS.get(name) or ROWS.get(name.upper()) or _BY_TORCH.get(name) or _BY_NUMPY.get(name)
    if row is None:
        known = ", ".join(ROWS)
        raise _errors.usage(f"dtype {dtype!r} is not known; known are {known}", "DTYPE")
    return row
