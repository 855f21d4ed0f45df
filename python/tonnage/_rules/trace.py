"""Weight converters, run on tensors that only remember how they were made.

transformers describes how the tensors of a checkpoint become those of a model by code: stack the
experts, cut the fused projection, permute for rotary embeddings. That code is run here, unchanged,
on `Traced` tensors, which hold no data and note every operation as an `Expr`. Placements then apply
to what comes out: a shard of the target, never a conversion of a shard, which is another tensor
wherever one source makes several targets.
"""

from __future__ import annotations

import copy
import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import torch

from tonnage import _dtypes, _errors
from tonnage._expr import Concat, Expr, Permute, Repeat, Reshape, Slice, Source, Stack, axis, narrow


class Ref(Protocol):
    """What is known of a tensor of a checkpoint."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Its extents."""

    @property
    def dtype(self) -> str:
        """Its dtype, as a header spells it."""


class Traced(torch.Tensor):  # type: ignore[misc]
    """A tensor without data that knows the expression which makes it.

    Operations that move elements give another `Traced`; any other is refused by name, since a plan
    of reads cannot carry it out.
    """

    expr: Expr

    @staticmethod
    def of(expr: Expr, shape: Sequence[int], dtype: torch.dtype) -> Traced:
        """A tensor of this shape, made by `expr`."""
        empty = _empty(tuple(shape), dtype)
        made: Traced = torch.Tensor._make_subclass(Traced, empty)
        made.expr = expr
        return made

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        name = _name(func)
        options = dict(kwargs or {})
        with torch._C.DisableTorchFunctionSubclass():
            if name in _QUERIES:
                return func(*args, **options)
            rule = _RULES.get(name)
            if rule is None:
                raise refused(name)
            return rule(*args, **options)


def refused(name: str) -> Exception:
    """The error for an operation that is no rearrangement of elements."""
    text = (
        f"the conversion of weights uses {name}, which computes new values: a plan only moves "
        "elements. Load the tensors as they are stored and convert them afterwards"
    )
    return _errors.make("Unsupported", text, code="CONVERSION")


def _name(func: Any) -> str:
    """`reshape` for `torch.reshape` and `Tensor.reshape`, `T` for the getter of `Tensor.T`."""
    name = getattr(func, "__name__", repr(func))
    if name in ("__get__", "__set__"):
        owner = getattr(getattr(func, "__self__", None), "__name__", "")
        return str(owner) if name == "__get__" else f"setting .{owner}"
    return str(name)


_OF_SHAPE = ("shape", "ndim", "size", "dim", "ndimension", "numel", "nelement", "__len__")
_OF_MEMORY = ("device", "layout", "stride", "storage_offset", "nbytes", "is_contiguous")
_OF_DTYPE = ("dtype", "itemsize", "element_size", "is_floating_point", "is_complex")
_OF_KIND = ("is_meta", "is_cuda", "is_cpu", "is_sparse", "is_quantized", "is_nested", "is_leaf")
_OF_GRAPH = ("requires_grad", "grad_fn", "names")
#: Questions about a tensor that need no data.
_QUERIES = frozenset((*_OF_SHAPE, *_OF_MEMORY, *_OF_DTYPE, *_OF_KIND, *_OF_GRAPH))


#: Tensors without data, by shape and dtype: a model has few of them.
_EMPTY: dict[tuple[tuple[int, ...], torch.dtype], Any] = {}


def _empty(shape: tuple[int, ...], dtype: torch.dtype) -> Any:
    """A tensor without data, which many others can be views of."""
    found = _EMPTY.get((shape, dtype))
    if found is None:
        if len(_EMPTY) >= 256:
            _EMPTY.clear()
        found = _EMPTY[shape, dtype] = torch.empty(shape, dtype=dtype, device="meta")
    return found


def _made(of: Traced, expr: Expr, shape: Sequence[int]) -> Traced:
    return Traced.of(expr, shape, of.dtype)


def _same(of: Traced, *_: Any, **options: Any) -> Traced:
    """`contiguous`, `clone`, `detach`: the same elements, in whatever memory."""
    return of


def _traced(values: Sequence[Any], name: str) -> list[Traced]:
    """Tensors that are joined; one that is not traced has values that no source holds."""
    for value in values:
        if not isinstance(value, Traced):
            raise refused(f"{name} with a tensor of its own")
    if len({value.dtype for value in values}) > 1:
        raise refused(f"{name} of several dtypes")
    return list(values)


def _cat(tensors: Sequence[Traced], dim: int = 0) -> Traced:
    parts = _traced(tensors, "cat")
    # PyTorch lets an empty one-dimensional tensor join any others.
    parts = [part for part in parts if part.ndim != 1 or part.shape[0] or len(parts) == 1] or parts
    at = axis(dim, parts[0].ndim, "cat")
    expr: Expr = Concat(tuple(part.expr for part in parts), at)
    shape = expr._shape(tuple(tuple(part.shape) for part in parts), {})
    return _made(parts[0], parts[0].expr if len(parts) == 1 else expr, shape)


def _stack(tensors: Sequence[Traced], dim: int = 0) -> Traced:
    parts = _traced(tensors, "stack")
    expr = Stack(tuple(part.expr for part in parts), axis(dim, parts[0].ndim + 1, "stack"))
    return _made(parts[0], expr, expr._shape(tuple(tuple(part.shape) for part in parts), {}))


def _narrow(of: Traced, dim: int, start: int, length: int) -> Traced:
    at = axis(dim, of.ndim, "narrow")
    extent = of.shape[at]
    start = start + extent if start < 0 else start
    if not 0 <= start <= start + length <= extent:
        raise _errors.usage(f"narrow({dim}, {start}, {length}) leaves {list(of.shape)}", "EXPR")
    shape = (*of.shape[:at], length, *of.shape[at + 1 :])
    return _made(of, narrow(of.expr, at, start, start + length, extent), shape)


def _split(of: Traced, split_size_or_sections: Any = None, dim: int = 0, **options: Any) -> Any:
    sizes = options.get("split_size", options.get("split_sizes", split_size_or_sections))
    extent = of.shape[axis(dim, of.ndim, "split")]
    if isinstance(sizes, int):
        sizes = [min(sizes, extent - at) for at in range(0, extent, sizes)] or [0]
    if sum(sizes) != extent:
        raise _errors.usage(f"{list(sizes)} does not divide {extent} elements", "EXPR")
    return tuple(_narrow(of, dim, sum(sizes[:index]), size) for index, size in enumerate(sizes))


def _chunk(of: Traced, chunks: int, dim: int = 0) -> Any:
    extent = of.shape[axis(dim, of.ndim, "chunk")]
    return _split(of, max(1, -(-extent // chunks)), dim)


def _permute(of: Traced, *dims: Any, **options: Any) -> Traced:
    given = options.get("dims", dims[0] if len(dims) == 1 and not _is_int(dims[0]) else dims)
    order = tuple(axis(dim, of.ndim, "permute") for dim in given)
    if order == tuple(range(of.ndim)):
        return of
    return _made(of, Permute(of.expr, order), [of.shape[dim] for dim in order])


def _transpose(of: Traced, dim0: int, dim1: int) -> Traced:
    order = list(range(of.ndim))
    one, two = axis(dim0, of.ndim, "transpose"), axis(dim1, of.ndim, "transpose")
    order[one], order[two] = order[two], order[one]
    return _permute(of, order)


def _reversed(of: Traced) -> Traced:
    return _permute(of, list(range(of.ndim))[::-1])


def _reshape(of: Traced, *shape: Any, **options: Any) -> Traced:
    given = options.get("shape", options.get("size", shape))
    if len(given) == 1 and not _is_int(given[0]):
        given = given[0]
    if isinstance(given, torch.dtype):
        raise refused("view as another dtype")
    # PyTorch itself says what -1 means, and refuses a shape that does not fit.
    made = tuple(torch.empty(of.shape, device="meta").reshape(tuple(given)).shape)
    return of if made == tuple(of.shape) else _made(of, Reshape(of.expr, made), made)


def _is_int(value: Any) -> bool:
    return hasattr(value, "__index__") and not isinstance(value, torch.Tensor)


def _flatten(of: Traced, start_dim: int = 0, end_dim: int = -1) -> Traced:
    return _reshape(of, torch.empty(of.shape, device="meta").flatten(start_dim, end_dim).shape)


def _unflatten(of: Traced, dim: int, sizes: Sequence[int]) -> Traced:
    return _reshape(of, torch.empty(of.shape, device="meta").unflatten(dim, tuple(sizes)).shape)


def _squeeze(of: Traced, *dim: Any, **options: Any) -> Traced:
    return _reshape(of, torch.empty(of.shape, device="meta").squeeze(*dim, **options).shape)


def _unsqueeze(of: Traced, dim: int) -> Traced:
    return _reshape(of, torch.empty(of.shape, device="meta").unsqueeze(dim).shape)


def _unbind(of: Traced, dim: int = 0) -> Any:
    return tuple(_select(of, dim, at) for at in range(of.shape[axis(dim, of.ndim, "unbind")]))


def _select(of: Traced, dim: int, index: int) -> Traced:
    at = axis(dim, of.ndim, "select")
    row = _narrow(of, at, axis(index, of.shape[at], "select"), 1)
    return _reshape(row, (*of.shape[:at], *of.shape[at + 1 :]))


def _repeat(of: Traced, *times: Any, **options: Any) -> Traced:
    given = options.get("repeats", times[0] if len(times) == 1 and not _is_int(times[0]) else times)
    made = _reshape(of, (*[1] * (len(given) - of.ndim), *of.shape))
    for dim, count in enumerate(given):
        if count != 1:
            expr = Repeat(made.expr, dim, count)
            made = _made(of, expr, expr._shape((tuple(made.shape),), {}))
    return made


def _to(of: Traced, *args: Any, **options: Any) -> Traced:
    """To another device, or to the dtype that it has."""
    for value in (*args, *options.values()):
        dtype = value.dtype if isinstance(value, torch.Tensor) else value
        if isinstance(dtype, torch.dtype) and dtype != of.dtype:
            raise refused(f"a cast from {of.dtype} to {dtype}")
    return of


def _index(of: Traced, key: Any) -> Traced:
    """`tensor[key]`, for integers, slices, `...`, `None`, and one list of integers."""
    keys = list(key) if isinstance(key, tuple) else [key]
    taken = sum(1 for one in keys if one is not None and one is not Ellipsis)
    if Ellipsis in [one for one in keys if not isinstance(one, list)]:
        dots = next(at for at, one in enumerate(keys) if one is Ellipsis)
        keys[dots : dots + 1] = [slice(None)] * (of.ndim - taken)
    if sum(isinstance(one, list) for one in keys) > 1:
        raise refused("indexing by several lists")
    dim = 0
    for one in keys:
        if one is None:
            of, dim = _unsqueeze(of, dim), dim + 1
        elif isinstance(one, slice):
            of, dim = _slice(of, dim, one), dim + 1
        elif isinstance(one, list):
            rows = [_narrow(of, dim, axis(row, of.shape[dim], "index"), 1) for row in one]
            of, dim = _cat(rows, dim), dim + 1
        elif _is_int(one) and not isinstance(one, bool):
            of = _select(of, dim, operator.index(one))
        else:
            raise refused(f"indexing by {type(one).__name__}")
    return of


def _slice(of: Traced, dim: int, key: slice) -> Traced:
    start, stop, step = key.indices(of.shape[dim])
    if step < 1:
        raise refused("a slice with a negative step")
    stop = max(start, stop)
    if step == 1:
        return _narrow(of, dim, start, stop - start)
    expr = Slice(of.expr, dim, start, stop, step)
    return _made(of, expr, expr._shape((tuple(of.shape),), {}))


_RULES: dict[str, Callable[..., Any]] = {
    "cat": _cat,
    "concat": _cat,
    "concatenate": _cat,
    "stack": _stack,
    "chunk": _chunk,
    "split": _split,
    "split_with_sizes": _split,
    "transpose": _transpose,
    "swapaxes": _transpose,
    "swapdims": _transpose,
    "permute": _permute,
    "t": _reversed,
    "T": _reversed,
    "mT": lambda of: _transpose(of, -2, -1),
    "reshape": _reshape,
    "view": _reshape,
    "flatten": _flatten,
    "ravel": _flatten,
    "unflatten": _unflatten,
    "squeeze": _squeeze,
    "unsqueeze": _unsqueeze,
    "unbind": _unbind,
    "select": _select,
    "narrow": _narrow,
    "repeat": _repeat,
    "tile": _repeat,
    "to": _to,
    "type": _to,
    "cpu": _same,
    "__getitem__": _index,
    "__iter__": lambda of: iter(_unbind(of)),
    "contiguous": _same,
    "clone": _same,
    "detach": _same,
    "data": _same,
    "requires_grad_": _same,
}


def source(name: str, ref: Ref) -> Traced:
    """A tensor of the checkpoint, ready to be traced."""
    return Traced.of(Source(name), ref.shape, _dtype(ref.dtype))


def _dtype(name: str) -> torch.dtype:
    """PyTorch's dtype. Packed and exotic ones move like any other; only a cast tells them apart."""
    row = _dtypes.parse(name)
    dtype = getattr(torch, row.torch or "", None)
    return dtype if row.bits >= 8 and isinstance(dtype, torch.dtype) else torch.uint8


class Conversion(NamedTuple):
    """What becomes of the tensors of a checkpoint."""

    #: For each tensor of the model, how it is made.
    exprs: dict[str, Expr]
    #: Its shape.
    shapes: dict[str, tuple[int, ...]]
    #: Tensors of the checkpoint that the model does not want.
    unexpected: list[str]


def conversion(catalog: Mapping[str, Ref], model: Any, transforms: Any = None) -> Conversion:
    """How the tensors of a model of transformers are made of those of a checkpoint.

    Args:
        catalog: the tensors of the checkpoint.
        model: the model; on the meta device is enough.
        transforms: its `WeightConverter`s and `WeightRenaming`s. Default: what transformers has for
            this model.

    Raises `UnsupportedError` for a converter that computes new values, as dequantising does.
    """
    from transformers import conversion_mapping, core_model_loading

    if transforms is None:
        transforms = conversion_mapping.get_model_conversion_mapping(model)
    wanted = dict(model.state_dict(keep_vars=True))
    rename = _Renamer(transforms, model.base_model_prefix, wanted)
    found: dict[str, Any] = {}
    unexpected: list[str] = []
    for key in sorted(catalog, key=core_model_loading.dot_natural_key):
        target, pattern = rename(key)
        if target not in wanted:
            unexpected.append(key)
            continue
        if target not in found:
            found[target] = rename.mapping(key, target, pattern)
        found[target].add_tensor(target, key, pattern or key, source(key, catalog[key]))
    exprs: dict[str, Expr] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    for first, mapping in found.items():
        for name, made in _converted(mapping, first, model).items():
            tensor = made[0] if isinstance(made, list) else made
            if not isinstance(tensor, Traced):
                raise refused(f"a converter that makes {name} of nothing in the checkpoint")
            if name not in wanted:
                unexpected.extend(dict.fromkeys(tensor.expr.sources()))
                continue
            exprs[name], shapes[name] = tensor.expr, tuple(tensor.shape)
            _check_shape(name, tensor, wanted[name])
    return Conversion(exprs, shapes, unexpected)


def _converted(mapping: Any, first: str, model: Any) -> dict[str, Any]:
    try:
        made: dict[str, Any] = mapping.convert(first, model=model, config=model.config)
        return made
    except _errors.TonnageError as error:
        error.tensor = first
        error.args = (f"{first}: {error}",)
        raise


class _Renamer:
    """Names of the checkpoint to names of the model, as transformers finds them."""

    def __init__(self, transforms: Any, prefix: str, wanted: dict[str, Any]) -> None:
        from transformers import core_model_loading as loading

        self._loading = loading
        self._prefix = prefix
        self._wanted = wanted
        self._renamings = [one for one in transforms if isinstance(one, loading.WeightRenaming)]
        self._converters = [one for one in transforms if isinstance(one, loading.WeightConverter)]
        self._by_pattern = {
            pattern: one for one in self._converters for pattern in one.source_patterns
        }

    def __call__(self, key: str) -> tuple[str, str | None]:
        """The name in the model, and the converter's pattern that matched."""
        target, pattern = self._rename(key, self._renamings, self._converters)
        # A name that is right as it is stays, whatever the renamings would make of it.
        if target not in self._wanted and key in self._wanted:
            return self._rename(key, [], [])
        return target, pattern

    def _rename(self, key: str, renamings: Any, converters: Any) -> tuple[str, str | None]:
        target, pattern = self._loading.rename_source_key(
            key, renamings, converters, self._prefix, self._wanted
        )
        return target, pattern

    def mapping(self, key: str, target: str, pattern: str | None) -> Any:
        """A converter of this target's own, or a plain renaming."""
        if pattern is None:
            return self._loading.WeightRenaming(key, target)
        return copy.deepcopy(self._by_pattern[pattern])


def _check_shape(name: str, made: Traced, wanted: Any) -> None:
    if tuple(made.shape) != tuple(wanted.shape):
        text = (
            f"{name}: the checkpoint gives {list(made.shape)} and the model wants "
            f"{list(wanted.shape)}; is this the configuration that it was saved with?"
        )
        found, needed = str(list(made.shape)), str(list(wanted.shape))
        raise _errors.usage(text, "SHAPE", tensor=name, found=found, needed=needed)
