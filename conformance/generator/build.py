"""Building blocks: files from header text and data, and the manifest's rows about them.

Nothing here parses a header. Every expectation is written by hand beside the case, so that the
corpus is an oracle of its own and not the echo of one reader.
"""

import json

#: Every reason code that a case may carry, with its clause of the specification.
CLAUSES = {
    "FILE_TOO_SMALL": "2.1", "HEADER_TOO_SHORT": "2.2", "HEADER_TOO_LARGE": "2.3", "HEADER_PAST_END": "2.4",
    "INVALID_UTF8": "3.1", "BYTE_ORDER_MARK": "3.2", "FRAMING": "3.3", "NOT_AN_OBJECT": "3.4",
    "JSON_SYNTAX": "3.5", "CONTROL_CHARACTER": "3.6", "INVALID_ESCAPE": "3.7", "LONE_SURROGATE": "3.8",
    "NUMBER_FORM": "3.9", "INTEGER_RANGE": "3.10", "NESTING_TOO_DEEP": "3.11", "DUPLICATE_TENSOR": "3.12",
    "DUPLICATE_FIELD": "3.13", "DUPLICATE_METADATA": "3.14", "DUPLICATE_METADATA_KEY": "3.15",
    "ENTRY_NOT_OBJECT": "4.1", "MISSING_FIELD": "4.2", "DTYPE_NOT_STRING": "4.3", "SHAPE_NOT_ARRAY": "4.4",
    "OFFSETS_FORM": "4.5", "UNSUPPORTED_DTYPE": "5.2", "PARTIAL_BYTE": "5.4", "OFFSETS_REVERSED": "6.1",
    "SIZE_OVERFLOW": "6.2", "SIZE_MISMATCH": "6.3", "HOLE": "6.4", "OVERLAP": "6.5", "EMPTY_INSIDE": "6.6",
    "DATA_TRUNCATED": "6.7", "TRAILING_DATA": "6.8", "METADATA_NOT_OBJECT": "7.1", "METADATA_VALUE": "7.2",
    "INDEX_FORM": "8.1", "INDEX_VALUE": "8.2", "INDEX_DUPLICATE": "8.3", "INDEX_PATH": "8.4",
    "INDEX_EXTENSION": "8.5", "INDEX_ESCAPES": "8.6", "INDEX_NOT_REGULAR": "8.7", "INDEX_FILE_MISSING": "8.8",
    "INDEX_TENSOR_MISSING": "8.9", "INDEX_TENSOR_TWICE": "8.10", "INDEX_SHARD_MISSING": "8.11",
    "LIMIT_HEADER": "10.2", "LIMIT_TENSORS": "10.3", "LIMIT_RANK": "10.4", "LIMIT_DIMS": "10.5",
    "LIMIT_METADATA": "10.6", "LIMIT_INDEX": "10.7", "LIMIT_SHARDS": "10.8",
    "CHECKSUM_FORM": "13.4", "CHECKSUM_STALE": "13.5", "CHECKSUM_MISMATCH": "13.6",
}  # fmt: skip

#: Bits of an element, as the specification's clause 5.1 lists them.
BITS = {
    "BOOL": 8, "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6, "U8": 8, "I8": 8, "F8_E5M2": 8, "F8_E4M3": 8,
    "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8, "I16": 16, "U16": 16, "F16": 16, "BF16": 16,
    "I32": 32, "U32": 32, "F32": 32, "C64": 64, "F64": 64, "I64": 64, "U64": 64,
}  # fmt: skip

#: Largest integer that every JSON reader keeps; larger ones stand in the manifest as strings.
EXACT = 2**53 - 1


def portable(value):
    """An integer for the manifest: a decimal string where a double would round it."""
    return value if value <= EXACT else str(value)


class T:
    """One tensor as a reader should report it, which can also write its entry."""

    def __init__(self, name, dtype, shape, begin, end):
        self.name, self.dtype, self.shape, self.begin, self.end = name, dtype, shape, begin, end

    def row(self):
        return {
            "name": self.name,
            "dtype": self.dtype,
            "shape": [portable(extent) for extent in self.shape],
            "data_offsets": [portable(self.begin), portable(self.end)],
        }

    def fields(self):
        return {"dtype": self.dtype, "shape": self.shape, "data_offsets": [self.begin, self.end]}

    def entry(self):
        return compact(self.name) + ":" + compact(self.fields())


def compact(value):
    return json.dumps(value, separators=(",", ":"), ensure_ascii=False)


def text_of(tensors, metadata=None):
    """A compact header in the order given, metadata first."""
    head = [] if metadata is None else ['"__metadata__":' + compact(metadata)]
    return "{" + ",".join(head + [tensor.entry() for tensor in tensors]) + "}"


def payload(length, seed=1):
    """`length` bytes with no pattern that hides an offset mistake."""
    out, state = bytearray(), seed
    for _ in range(length):
        state = (state * 1103515245 + 12345) & 0x7FFFFFFF
        out.append(state >> 16 & 0xFF)
    return bytes(out)


def container(text, data=b"", length=None):
    """Prefix, header and data; `length` replaces the honest header length."""
    raw = text.encode() if isinstance(text, str) else text
    return (len(raw) if length is None else length).to_bytes(8, "little") + raw + data


class Corpus:
    """The cases in order, and the bytes of their files."""

    def __init__(self):
        self.cases, self.files, self.ids = [], {}, set()

    def add(self, case, files):
        if case["id"] in self.ids:
            raise ValueError(f"two cases are called {case['id']}")
        self.ids.add(case["id"])
        code = case.get("code")
        if code is not None:
            case["clause"] = CLAUSES[code]
        order = ["id", "kind", "file", "sidecar", "verdict", "code", "clause", "tensor", "chunk", "limits", "links", "compat", "expect", "why"]
        self.cases.append({key: case[key] for key in order if key in case})
        for path, blob in files.items():
            if self.files.setdefault(path, blob) != blob:
                raise ValueError(f"two contents for {path}")

    # One header in one file.

    def header(self, id, blob, **case):
        path = f"files/{id}.safetensors"
        case.setdefault("compat", {"verdict": "accept" if case["verdict"] == "accept" else "reject"})
        self.add({"id": id, "kind": "header", "file": path, **case}, {path: blob})

    def ok(self, id, why, tensors, text=None, data=None, metadata=None, compat=None):
        """A file that a reader accepts. Without `text`, the compact header of `tensors`."""
        if data is None:
            data = payload(max((tensor.end for tensor in tensors), default=0))
        blob = container(text_of(tensors, metadata) if text is None else text, data)
        extra = {} if compat is None else {"compat": compat}
        self.header(id, blob, verdict="accept", expect=content(tensors, metadata), why=why, **extra)

    def bad(self, id, code, why, text, data=b"", tensor=None, compat=None, length=None):
        """A file that a strict reader refuses; `compat` where the reference accepts it."""
        extra = {} if compat is None else {"compat": compat}
        if tensor is not None:
            extra["tensor"] = tensor
        self.header(id, container(text, data, length), verdict="reject", code=code, why=why, **extra)

    def raw(self, id, code, why, blob):
        """A file that is refused before it has a header."""
        self.header(id, blob, verdict="reject", code=code, why=why)

    def unsupported(self, id, why, tensors, tensor, metadata=None):
        """A readable header with a tensor whose dtype no level-1 reader knows."""
        blob = container(text_of(tensors, metadata), payload(max(t.end for t in tensors)))
        compat = {"verdict": "reject", "quirk": "UNKNOWN_DTYPE_REFUSED"}
        self.header(
            id, blob, verdict="unsupported", code="UNSUPPORTED_DTYPE", tensor=tensor,
            compat=compat, expect=content(tensors, metadata), why=why,
        )  # fmt: skip

    def limit(self, id, code, why, limits, tensors, metadata=None, tensor=None):
        """A good file over a budget that the caller lowered; without the budget it is accepted."""
        blob = container(text_of(tensors, metadata), payload(max((t.end for t in tensors), default=0)))
        extra = {} if tensor is None else {"tensor": tensor}
        self.header(
            id, blob, verdict="reject", code=code, limits=limits, compat={"verdict": "accept"},
            expect=content(tensors, metadata), why=why, **extra,
        )  # fmt: skip

    # One file to be verified by its checksums; it is good whatever they say.

    def checksums(self, id, blob, tensors, metadata, why, code=None, sidecar=None, **extra):
        path = f"files/{id}.safetensors"
        codes = {} if code is None else {"code": code}
        files = {path: blob}
        if sidecar is not None:
            extra["sidecar"] = f"{path}.b3"
            files[extra["sidecar"]] = sidecar
        case = {"id": id, "kind": "checksums", "file": path, "verdict": "reject" if code else "accept"}
        self.add({**case, "expect": content(tensors, metadata), "why": why, **codes, **extra}, files)

    # One index file.

    def index(self, id, blob, verdict, why, code=None, **extra):
        path = f"files/{id}.safetensors.index.json"
        blob = blob.encode() if isinstance(blob, str) else blob
        codes = {} if code is None else {"code": code}
        self.add({"id": id, "kind": "index", "file": path, "verdict": verdict, "why": why, **codes, **extra}, {path: blob})

    # A folder that holds a checkpoint.

    def directory(self, id, files, verdict, why, code=None, **extra):
        root = f"files/{id}"
        codes = {} if code is None else {"code": code}
        blobs = {f"{root}/{name}": blob for name, blob in files.items()}
        self.add({"id": id, "kind": "directory", "file": root, "verdict": verdict, "why": why, **codes, **extra}, blobs)


def content(tensors, metadata):
    return {"tensors": [tensor.row() for tensor in tensors], "metadata": metadata}


def quirk(name, tensors=None, metadata=None):
    """The reference accepts what the strict profile refuses, and this is what it sees."""
    return {"verdict": "accept", "quirk": name, "expect": content(tensors or [], metadata)}
