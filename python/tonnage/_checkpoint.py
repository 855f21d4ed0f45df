"""`tonnage.open`, `Checkpoint` and `TensorRef`: a checkpoint as a mapping that reads nothing until
asked.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, KeysView, Mapping, Sequence
from os import PathLike
from types import TracebackType
from typing import TYPE_CHECKING, Any, NamedTuple, Self

from tonnage import (
    _arrays,
    _device,
    _display,
    _errors,
    _gguf,
    _load,
    _native,
    _prefetch,
    _quantization,
    _slices,
    _sources,
)
from tonnage._dtypes import Row
from tonnage._native import SafetensorError, _Handle
from tonnage._progress import ProgressLike

if TYPE_CHECKING:
    from tonnage._plan import Plan


class FileInfo(NamedTuple):
    """One file of a checkpoint."""

    #: As the caller named it, or `<bytes>` and the like.
    label: str
    #: Its length in bytes.
    nbytes: int
    #: Position of the data section: length of the header and its prefix.
    data_start: int
    #: Bytes of padding at the end of the header.
    header_padding: int
    #: How many tensors it holds.
    tensors: int


class Note(NamedTuple):
    """Something about a file that is allowed, and that its owner may want to know."""

    code: str
    text: str
    file: str | None


class TensorRef:
    """A tensor of a checkpoint. It knows where its bytes are and reads them when asked.

    `ref[...]` reads a slice: integers, slices with any step, and `...`; only the bytes needed are
    read. `numpy()`, `torch()` and `jax()` read all of it into that framework; `numpy.asarray(ref)`
    and `torch.from_dlpack(ref)` work as well.

    Attributes:
        name: its name.
        dtype: its dtype as the header spells it, such as `"BF16"`.
        shape: its extents, in elements (never in packed units).
        nbytes: bytes it takes in the file.
        file: label of the file that holds it.
        offset: position of its first byte in that file.
    """

    __slots__ = (
        "_checkpoint",
        "_file",
        "_index",
        "dtype",
        "file",
        "name",
        "nbytes",
        "offset",
        "shape",
    )

    name: str
    dtype: str
    shape: tuple[int, ...]
    nbytes: int
    file: str
    offset: int

    def __init__(self, checkpoint: Checkpoint, index: int) -> None:
        self._checkpoint = checkpoint
        self._index = index
        row = checkpoint._handle.row(index)
        self.name, self.dtype, self.shape, self.nbytes, self._file, self.file, self.offset = row

    @property
    def ndim(self) -> int:
        """How many dimensions."""
        return len(self.shape)

    @property
    def size(self) -> int:
        """How many elements."""
        count = 1
        for extent in self.shape:
            count *= extent
        return count

    def __len__(self) -> int:
        if not self.shape:
            raise TypeError(f"{self.name} has no dimensions, so no length")
        return self.shape[0]

    def __repr__(self) -> str:
        return (
            f"TensorRef({_display.plain(self.name)!r}, {self.dtype}, {list(self.shape)}, "
            f"{_display.size(self.nbytes)})"
        )

    def read(self, framework: str | None = None) -> Any:
        """The whole tensor: `framework` is `"torch"`, `"numpy"`, `"jax"`, `"tensorflow"`, `"mlx"`
        or `"paddle"`; by default PyTorch if the process has imported it, else NumPy.

        Raises `UnsupportedError` for a dtype that the framework lacks, `StorageError` for a failed
        read.
        """
        arrays = _arrays.arrays(framework)
        row = _arrays.row_of(self.dtype, self.name)
        slot = arrays.empty(row, self.shape)
        self._checkpoint._handle.read([(self._index, slot.target, None, slot.spread, None)])
        return arrays.finish(slot, row, self.shape)

    def numpy(self) -> Any:
        """The whole tensor as a NumPy array, with `ml_dtypes` for the dtypes that NumPy lacks."""
        return self.read("numpy")

    def torch(self) -> Any:
        """The whole tensor as a PyTorch tensor. `F4` comes packed: the last extent is halved."""
        return self.read("torch")

    def jax(self) -> Any:
        """The whole tensor as a JAX array. Without `jax_enable_x64`, JAX makes 64-bit dtypes
        32-bit.
        """
        return self.read("jax")

    def view(self, framework: str | None = None) -> Any:
        """The tensor over the file's pages, without a copy, for PyTorch and NumPy; else as `read`.

        A page is read when it is touched. Writing to the tensor changes this process's copy, never
        the file. A file that someone truncates under a view ends the process when a lost page is
        touched: `read` has no such risk. There is nothing to view where a file object is not a
            plain file, where a
        dtype takes less than a byte in NumPy, and, for PyTorch, where the bytes are not aligned to
        the dtype or lie in a `bytes` object; then the tensor is read.
        """
        arrays = _arrays.arrays(framework)
        row = _arrays.row_of(self.dtype, self.name)
        memory = self._checkpoint._handle.memory(self._file)
        if memory is not None:
            part = memoryview(memory)[self.offset : self.offset + self.nbytes]
            tensor = arrays.of_buffer(part, row, self.shape)
            if tensor is not None:
                return tensor
        return self.read(framework)

    def slice(self, key: object, framework: str | None = None) -> Any:
        """`ref[key]` in a framework of your choice.

        Raises `SliceError` (an `IndexError`) for a key that does not fit the shape, `TypeError` for
        one that is not made of integers, slices and `...`.
        """
        selection = _slices.select(key, self.shape, self.name)
        arrays = _arrays.arrays(framework)
        row = _arrays.row_of(self.dtype, self.name)
        try:
            tensor = self._read_ranges(arrays, row, selection.ranges, selection.shape)
        except SafetensorError as error:
            if getattr(error, "code", None) != "PARTIAL_BYTE" or row.bits >= 8:
                raise
            tensor = self._read_around(arrays, row, selection)
        return _slices.trim(tensor, selection, arrays.flip)

    def _read_ranges(
        self,
        arrays: _arrays.Arrays,
        row: Row,
        ranges: Sequence[_slices.Range],
        shape: tuple[int, ...],
    ) -> Any:
        slot = arrays.empty(row, shape)
        job = (self._index, slot.target, list(ranges), slot.spread, None)
        self._checkpoint._handle.read([job])
        return arrays.finish(slot, row, shape)

    def _read_around(self, arrays: _arrays.Arrays, row: Row, selection: _slices.Selection) -> Any:
        """A slice that begins or ends inside a byte: whole inner dimensions are read, then cut."""
        if not arrays.spreads:
            text = (
                f"{self.name}: this slice of {self.dtype} begins or ends inside a byte, and "
                f"{arrays.name} keeps elements packed; framework='numpy' has them one a byte"
            )
            raise _errors.make("Usage", text, code="PARTIAL_SLICE", clause="5.4", tensor=self.name)
        ranges = list(selection.ranges)
        cut: list[slice] = [slice(None)] * len(ranges)
        # A whole tensor fills whole bytes, so the last round succeeds.
        for axis in reversed(range(len(ranges))):
            cut[axis] = slice(*ranges[axis])
            ranges[axis] = (0, self.shape[axis], 1)
            shape = tuple(len(range(*found)) for found in ranges)
            try:
                return self._read_ranges(arrays, row, ranges, shape)[tuple(cut)]
            except SafetensorError as error:
                if getattr(error, "code", None) != "PARTIAL_BYTE" or axis == 0:
                    raise
        raise AssertionError("unreachable: a rank of 0 has no slices inside a byte")

    def __getitem__(self, key: object) -> Any:
        return self.slice(key)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> Any:
        if copy is False:
            raise ValueError("a tensor in a file cannot become an array without a copy; use view()")
        array = self.numpy()
        return array if dtype is None else array.astype(dtype, copy=False)

    def __dlpack__(self, **options: Any) -> Any:
        return self.numpy().__dlpack__(**options)

    def __dlpack_device__(self) -> tuple[int, int]:
        # Host memory, kDLCPU = 1.
        return (1, 0)


class Checkpoint(Mapping[str, TensorRef]):
    """A checkpoint of one file or many: names to tensors, in the order of the files.

    Opening reads headers only. It can be used from several threads. As a context manager it closes
    its files at the end of the block; else they close with the last reference.

    Attributes:
        report: what the last `load` or `stream` did; `None` before the first.
    """

    def __init__(self, handle: _Handle, label: str) -> None:
        self._open_handle: _Handle | None = handle
        self._label = label
        self.report: _load.Report | None = None
        self._gguf: _gguf.GgufInfo | None = None
        self._quantization: _quantization.Quantization | None = None

    @property
    def _handle(self) -> _Handle:
        if self._open_handle is None:
            raise _errors.usage(f"{self._label} was closed", "CLOSED", file=self._label)
        return self._open_handle

    def __getitem__(self, name: str) -> TensorRef:
        """The tensor of this name; `UnknownTensorError` (a `KeyError`) suggests near names."""
        return TensorRef(self, self._handle.find(name))

    def __iter__(self) -> Iterator[str]:
        return iter(self._handle.names())

    def __len__(self) -> int:
        return len(self._handle)

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and self._handle.contains(name)

    def keys(self) -> KeysView[str]:
        """The names, in the order of the files."""
        return dict.fromkeys(self._handle.names()).keys()

    @property
    def label(self) -> str:
        """What was opened, as the caller named it."""
        return self._label

    @property
    def metadata(self) -> dict[str, str]:
        """The `__metadata__` of all files; where two disagree on a key, the first has it (see
        `notes`).
        """
        return self._handle.metadata()

    @property
    def gguf(self) -> _gguf.GgufInfo | None:
        """What the headers of GGUF files say: typed metadata, types and logical shapes of tensors.
        `None` for other files.
        """
        if self._gguf is None and _native._gguf_headers(self._handle):
            self._gguf = _gguf.GgufInfo(self._handle)
        return self._gguf

    @property
    def quantization(self) -> _quantization.Quantization:
        """What was recognised of quantised tensors: the scheme of each, its parameters, and by
        which evidence: `quant.map`, what a library wrote into the files, configurations beside
        them, names, dtypes and shapes, and a few values. What is not recognised is a plain tensor.
        """
        if self._quantization is None:
            self._quantization = _quantization.Quantization(self._handle, self._label)
        return self._quantization

    @property
    def quantized(self) -> _quantization.Quantization:
        """The quantised tensors: a `QuantTensor` by logical name or module."""
        return self.quantization

    @property
    def files(self) -> tuple[FileInfo, ...]:
        """The files, in order."""
        return tuple(FileInfo(*row) for row in self._handle.files())

    @property
    def notes(self) -> tuple[Note, ...]:
        """What is allowed but odd: whitespace before the header, metadata that disagrees …"""
        return tuple(Note(*row) for row in self._handle.notes())

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors together."""
        return self._handle.total_bytes

    @property
    def parameters(self) -> int:
        """Elements of all tensors together."""
        return self._handle.parameters

    def load(
        self,
        select: _load.Select = None,
        *,
        framework: str | None = None,
        device: object = "cpu",
        dtype: object = None,
        into: object = None,
        strict: bool | None = None,
        threads: int | None = None,
        staging: int | str = "256MiB",
        strategy: str = "auto",
        progress: ProgressLike = None,
        verify: bool = False,
        gds: bool = False,
        dequantize: bool = False,
    ) -> dict[str, Any]:
        """Reads tensors into memory of their own, in bulk and by several threads.

        Args:
            select: which: a name or a pattern (`*`, `?`, `[…]`, where `*` also matches dots),
                several of them, or a function of the name. Default: all.
            framework: whose tensors: `"torch"`, `"numpy"`, `"jax"`, `"tensorflow"`, `"mlx"`,
                `"paddle"`, `"cupy"`, or `"tonnage"` for `DeviceTensor`s, which others take by
                DLPack. Default: PyTorch if the process has imported it, else NumPy; on a device
                that PyTorch lacks, `DeviceTensor`.
            device: where they go: `"cpu"`, `"cuda:0"`, `"rocm:0"`, `"vulkan:0"`, `"metal"`, another
                device of PyTorch's, or a dict of names and patterns to devices (`{"model.layers.0":
                "cuda:0", "*": "cpu"}`; the first that fits counts), all in one pass. PyTorch's
                tensors lie in memory of its own caching allocator.
            dtype: cast floats to this dtype, rounding once to the nearest, ties to even. Other
                dtypes stay.
            into: existing tensors to fill, by name: a dict of PyTorch tensors or NumPy arrays, or a
                module. Each keeps its dtype and device; floats are cast. Contiguous tensors on the
                host are read into directly. `framework`, `device` and `dtype` do not apply.
            strict: with `into`: `True` raises before anything is read if a tensor is missing from
                the checkpoint, unexpected, or of another shape; `None` warns where one is missing
                or mismatched; `False` only reports.
            threads: how many threads read. Default: one a core, at most 8.
            staging: host memory that bytes pass through on their way to a device, at most.
            strategy: how bytes are read: `"auto"` by what is known of file system, page cache and
                size, `"direct"` past the page cache, `"buffered"` through it.
            progress: `True` for a bar on a terminal or in a notebook, `"always"`, a function
                `(done, total)` in bytes, or a tqdm class or bar.
            verify: compare what is read with the files' checksums: every 8 MiB chunk that holds a
                byte of a tensor that is loaded. Files without checksums are refused; `save(...,
                checksums=True)` and `tonnage checksum add` make them.
            gds: let whole pages of large tensors go straight from files to CUDA devices, by
                NVIDIA's GPUDirect Storage. Where that does not work, and with `verify`, bytes go
                through `staging` as ever, and `report.reason` says why; `tonnage devices` tells
                what to do.
            dequantize: quantised tensors as numbers, each under its logical name in place of its
                parts, which `select` and `into` then go by too. They have the scheme's own dtype,
                or `dtype`. Families that are only carried stay parts. With `verify`, the parts are
                read once more, before.

        Returns:
            The tensors by name, in file order; with `into`, those that were filled.

        Raises:
            UnknownTensorError: a name in `select` is not there, or nothing matches.
            UnsupportedError: a dtype that the framework lacks.
            UsageError: arguments that contradict each other, or a strict load that would be
            incomplete. StorageError: a read failed.
            FormatError: with `verify`, a chunk is not what its checksum says (`code`, `tensor`).
            KeyboardInterrupt: at Ctrl-C, within about a tenth of a second.

        `report` tells what was done.
        """
        if dequantize:
            numbers = self.quantization.checked(select, verify)
            loaded = numbers.load(
                select, framework=framework, device=device, dtype=dtype, into=into, strict=strict,
                threads=threads, staging=staging, strategy=strategy, progress=progress, gds=gds,
            )  # fmt: skip
            self.report = numbers.report
            return loaded
        options = _load.Options(framework, device, dtype, threads, staging, strategy, verify, gds)
        if into is not None:
            return _load.load_into(self, select, into, strict, options, progress)
        if strict is not None:
            raise _errors.usage("strict applies to a load with into=")
        return _load.load(self, select, options, progress)

    def stream(
        self,
        order: Iterable[str] | None = None,
        *,
        select: _load.Select = None,
        framework: str | None = None,
        device: object = "cpu",
        dtype: object = None,
        threads: int | None = None,
        staging: int | str = "256MiB",
        strategy: str = "auto",
        budget: int | str = "256MiB",
        gds: bool = False,
        dequantize: bool = False,
    ) -> Iterator[tuple[str, Any]]:
        """Yields `(name, tensor)` while later tensors are being read.

        Args:
            order: the names to yield, in this order. Default: as bytes land, which is about the
                order of the files and reads fastest.
            select: as for `load`, instead of `order`.
            framework, device, dtype, threads, staging, strategy, gds, dequantize: as for `load`.
            budget: memory, in bytes or as `"256MiB"`, for tensors read ahead and not yet yielded:
                of the host, or of the device that they go to. One tensor is always read, however
                large.

        Raises the errors of `load`, when the iterator comes to them.
        """
        options = _load.Options(framework, device, dtype, threads, staging, strategy, gds=gds)
        if dequantize:
            return self.quantization.stream(self, order, select, options, budget)
        return _load.stream(self, order, select, options, budget)

    def prefetch(
        self,
        plan: _prefetch.Plan | None = None,
        *,
        device: object = "cpu",
        framework: str | None = None,
        dtype: object = None,
        threads: int | None = None,
        staging: int | str = "256MiB",
        strategy: str = "auto",
    ) -> _prefetch.PrefetchLoader:
        """Starts to load in the background, over all files at once; each tensor is handed out once.

        Args:
            plan: what to load, by name. `None` for a whole tensor; a slice of rows (with step 1,
                and within the tensor); a list of rows or slices of rows; or a tuple of such, one a
                dimension, with any positive step. The parts of a list lie one behind the other.
                Default: everything.
            device, framework, dtype, threads, staging, strategy: as for `load`.

        Everything that the plan names is on the device, or on its way there, until it is taken;
        `stream` is for models that are larger than that.

        Raises `SafetensorError` for a plan that does not fit, before anything is read.
        """
        settings = _device.Settings(_load.bytes_of(staging), threads, strategy)
        return _prefetch.start(self._handle, plan, device, framework, settings, dtype)

    def plan(self, what: Any, rules: Any = None, **options: Any) -> Plan:
        """Plans who of many ranks reads what, and proves it before a byte is read.

        Args:
            what: a `Mesh` of ranks; a module or a state dict whose tensors are `DTensor`s, which
                say themselves how they lie (on the meta device is enough); or a request, as a dict.
            rules: with a mesh: a dict of patterns and placements, of which the first that matches a
                name holds, or `"auto"`: those of the model, by its `config.json`.
            options: of `"auto"` and of state dicts, such as `unread=`; with a dict of rules,
                `quantized=` says what quantised tensors mean, and `cuts="aligned"` moves cuts that
                their scales don't allow (`docs/parallel.md`).

        ```python
        plan = ckpt.plan(tonnage.Mesh(tp=2), rules={"*.o_proj.weight": tonnage.Shard(1), ...})
        local = plan.load(rank=0)
        ```

        Raises `UsageError` with the tensor and the range: a tensor without a rule, a dimension that
        does not divide, a byte that nobody reads.
        """
        from tonnage import _plan

        return _plan.make(self, what, rules, options)

    def close(self) -> None:
        """Lets go of the files. Tensors that were read stay; later reads raise `UsageError`."""
        self._open_handle, self._quantization = None, None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        if self._open_handle is None:
            return f"<tonnage checkpoint {_display.plain(self._label)}, closed>"
        return _display.text(self)

    def _repr_html_(self) -> str:
        return _display.html(self)


#: What `open` takes.
Openable = (
    str | PathLike[str] | bytes | bytearray | memoryview | Any | Sequence[str | PathLike[str] | Any]
)


def open(source: Openable, *, allow_symlinks: bool = False) -> Checkpoint:
    """Opens a checkpoint: reads its headers, checks them strictly, and reads no tensor.

    Args:
        source: a path to a `.safetensors` or `.gguf` file, to a folder (its index file decides;
            without one, all its `.safetensors` files, or its GGUF model), or to an index file; a
            list of files; `bytes` or anything
            with the buffer protocol; or a file object open for reading. A file object over a plain
            file is read by position and its own position does not move; another one is read through
            its `seek` and `read`, one read at a time; one that cannot seek is read to its end
            first.
        allow_symlinks: follow symbolic links that lead out of the folder. Links within a Hugging
            Face cache are followed in any case.

    Raises:
        FileNotFoundError: there is no such file, or a file of the checkpoint is missing.
        OSError: whatever else the system says.
        FormatError: the file does not keep to the format; `.code`, `.clause` and `.tensor` say
        where. LimitError: a limit against hostile files is exceeded.
        TypeError: something that none of the above describes.

    All but the `TypeError` are `TonnageError`, and so `SafetensorError`.
    """
    handle, label = _sources.open_handle(source, allow_symlinks)
    return Checkpoint(handle, label)
