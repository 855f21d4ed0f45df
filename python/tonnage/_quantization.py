"""What a checkpoint's quantised tensors mean: `Checkpoint.quantization` and `quantized`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple

from tonnage import _errors, _load
from tonnage._native import _Handle, _QuantMap

if TYPE_CHECKING:
    from tonnage._checkpoint import Checkpoint, TensorRef
    from tonnage._quantize import PackedTensor


class Evidence(NamedTuple):
    """How a field of a tensor's meaning is known."""

    #: The field: `"scheme"`, `"bits"`, `"group"` …
    field: str
    #: Its value, as it is shown.
    value: str
    #: Who says so: `"quant.map"`, a file beside the checkpoint such as `"config.json"`, what the
    #: library wrote into the file, `"names, dtypes and shapes"`, `"values"` or `"default"`.
    source: str
    #: `"certain"`, `"likely"` or `"guess"`.
    confidence: str


class Ambiguity(NamedTuple):
    """A field with several possible readings."""

    tensor: str
    field: str
    #: The readings that fit, the one taken first.
    readings: tuple[str, ...]
    why: str


class QuantTensor:
    """A quantised tensor of a checkpoint.

    Attributes:
        name: its logical name, such as `"model.layers.0.mlp.up_proj.weight"`.
        scheme: the scheme with its version: `"gptq@1"`, `"ggml/Q4_K@1"`, `"opaque/exl3"`.
        dtype: the dtype of its values, such as `"BF16"`.
        shape: the logical shape; `()` where it is not known (opaque families).
        params: the scheme's parameters, such as bits and group.
        evidence: how each field is known.
    """

    def __init__(self, owner: Quantization, name: str) -> None:
        row = owner._map.tensor(name)
        self._owner, self.name = owner, name
        self.scheme, self.dtype, self.shape = row[0], row[1], tuple(row[2])
        self._parts, self._extras = row[3], row[4]
        self.evidence = tuple(Evidence(*one) for one in row[5])
        self.params: dict[str, Any] = owner._map.params(name)

    @property
    def components(self) -> dict[str, TensorRef]:
        """The tensors of the checkpoint that it is made of, by what they are for: `"codes"`,
        `"scale"`, `"zero"`, `"group_index"` …
        """
        checkpoint = self._owner.parts
        return {role: checkpoint[part] for role, part in self._parts}

    @property
    def nbytes(self) -> int:
        """Bytes of all its components."""
        return sum(ref.nbytes for ref in self.components.values())

    def dequantize(
        self, dtype: object = None, *, framework: str | None = None, device: object = "cpu"
    ) -> Any:
        """Its values, exact to the scheme's own rounding.

        Args:
            dtype: of the values. Default: the scheme's own; another is rounded to once more, to
                the nearest.
            framework, device: as for `Checkpoint.load`.

        Raises `UnknownTensorError` for an opaque family, which stays its parts.
        """
        numbers = self._owner.numbers
        return numbers.load(self.name, framework=framework, device=device, dtype=dtype)[self.name]

    def read(self, framework: str = "numpy") -> PackedTensor:
        """Its parts in memory, for `tonnage.repack`."""
        from tonnage._quantize import PackedTensor

        owner = self._owner
        packed = owner._map.packed(owner._handle, self.name)
        return PackedTensor(packed, framework)

    def __repr__(self) -> str:
        params = "".join(f", {key}={value}" for key, value in self.params.items())
        return f"QuantTensor({self.name!r}, {self.scheme}{params}, {self.dtype} {list(self.shape)})"


class Quantization(Mapping[str, QuantTensor]):
    """The quantised tensors of a checkpoint, by logical name; a module's name finds its weight.

    Attributes:
        ambiguities: fields with several possible readings, of which the likeliest was taken.
        refused: tensors that look like a scheme's and do not fit it, with the reason; they are
            plain tensors.
        warnings: what was seen and not followed, such as a configuration that can't be read.
    """

    def __init__(self, handle: _Handle, label: str) -> None:
        # Not the checkpoint: it has this object, and a circle would keep its files open.
        self._handle, self._label = handle, label
        self._map = _QuantMap.of(handle, False)
        self._names = dict.fromkeys(self._map.names())
        self.ambiguities = tuple(
            Ambiguity(tensor, field, tuple(readings), why)
            for tensor, field, readings, why in self._map.ambiguities()
        )
        self.refused = dict(self._map.refused())
        self.warnings = tuple(self._map.warnings())

    def _find(self, name: object) -> str | None:
        if not isinstance(name, str):
            return None
        return next((one for one in (name, f"{name}.weight") if one in self._names), None)

    def __getitem__(self, name: str) -> QuantTensor:
        found = self._find(name)
        if found is None:
            text = f"no quantised tensor is called {name!r}"
            raise _errors.usage(text, "UNKNOWN_TENSOR", tensor=name)
        return QuantTensor(self, found)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def __contains__(self, name: object) -> bool:
        return self._find(name) is not None

    @cached_property
    def schemes(self) -> dict[str, int]:
        """How many tensors each scheme has, most first."""
        return dict(Counter(self[name].scheme for name in self).most_common())

    def require_certain(self) -> None:
        """Raises `UsageError` that names the first tensor with several readings, or that looks like
        a scheme's and does not fit it.
        """
        _QuantMap.of(self._handle, True)

    def to_json(self) -> str:
        """The value of the metadata key `quant.map` that says all this."""
        return self._map.to_json(self._handle)

    @cached_property
    def numbers(self) -> Checkpoint:
        """The checkpoint with each quantised tensor as one tensor of numbers under its logical
        name, in place of its parts. Nothing is read before it is asked for.
        """
        from tonnage._checkpoint import Checkpoint

        return Checkpoint(self._map.numbers(self._handle), self._label)

    @cached_property
    def parts(self) -> Checkpoint:
        """The checkpoint as it is stored."""
        from tonnage._checkpoint import Checkpoint

        return Checkpoint(self._handle, self._label)

    def checked(self, select: _load.Select, verify: bool) -> Checkpoint:
        """`numbers`; with `verify`, after what the selected ones are made of was compared with its
        checksums.
        """
        if verify:
            handle = self.numbers._handle
            positions, _ = _load.chosen(self.numbers, select)
            parts: list[str] = []
            for name in (handle.row(at)[0] for at in positions):
                known = name in self._names
                parts += [part for _, part in self._map.tensor(name)[3]] if known else [name]
            options = _load.Options("numpy", "cpu", None, None, verify=True)
            for _ in _load.stream(self.parts, None, parts, options, _load.STAGING):
                pass
        return self.numbers

    def stream(
        self,
        owner: Checkpoint,
        order: Iterable[str] | None,
        select: _load.Select,
        options: _load.Options,
        budget: int | str,
    ) -> Iterator[tuple[str, Any]]:
        """`Checkpoint.stream(dequantize=True)`. Mistakes are told at once, as by `stream`."""
        numbers = self.numbers
        return _told(owner, numbers, _load.stream(numbers, order, select, options, budget))

    def __repr__(self) -> str:
        if not self:
            return "Quantization: nothing is quantised"
        kinds = ", ".join(f"{count} {scheme}" for scheme, count in self.schemes.items())
        doubt = f", {len(self.ambiguities)} ambiguous" if self.ambiguities else ""
        wrong = f", {len(self.refused)} refused" if self.refused else ""
        return f"Quantization: {kinds}{doubt}{wrong}"


def _told(
    owner: Checkpoint, numbers: Checkpoint, items: Iterator[tuple[str, Any]]
) -> Iterator[tuple[str, Any]]:
    """The items; at the end, the report of their checkpoint is its owner's."""
    yield from items
    owner.report = numbers.report
