"""Frozen files: every dtype with real values, a sharded checkpoint, a writer's exact bytes.

The writer here is a second implementation of chapter 9, on purpose: what both write is the text.
A frozen file is written once. Where it exists this module leaves it alone, and its line of
`SHA256SUMS` with it.
"""

import hashlib
import json
import struct

from .build import BITS, compact, payload

ORDER = list(BITS)  # the table's order, which the canonical writer sorts by, descending


def string(text):
    """A JSON string with the escapes of clause 9.7."""
    short = {'"': '\\"', "\\": "\\\\", "\b": "\\b", "\f": "\\f", "\n": "\\n", "\r": "\\r", "\t": "\\t"}
    return '"' + "".join(short.get(c, f"\\u{ord(c):04x}" if c < " " else c) for c in text) + '"'


def write(tensors, metadata=None, order="canonical", align=8, reserve=0):
    """A file from `(name, dtype, shape, data)` in any order."""
    if order == "canonical":
        tensors = sorted(tensors, key=lambda t: (-ORDER.index(t[1]), t[0].encode()))
    parts, at, body = [], 0, b""
    if metadata is not None:
        pairs = sorted(metadata.items(), key=lambda pair: pair[0].encode())
        parts.append('"__metadata__":{' + ",".join(string(k) + ":" + string(v) for k, v in pairs) + "}")
    for name, dtype, shape, data in tensors:
        extents = ",".join(map(str, shape))
        parts.append(f'{string(name)}:{{"dtype":"{dtype}","shape":[{extents}],"data_offsets":[{at},{at + len(data)}]}}')
        at, body = at + len(data), body + data
    text = ("{" + ",".join(parts) + "}").encode()
    length = -(-(8 + len(text) + reserve) // align) * align - 8
    return length.to_bytes(8, "little") + text.ljust(length) + body


# Values. Small floats: every code there is, with its value from the definition of the format.


def small_float(code, exponent_bits, mantissa_bits, bias, nans, infinities=()):
    if code in nans:
        return "nan"
    sign = -1.0 if code >> (exponent_bits + mantissa_bits) & 1 else 1.0
    if code in infinities:
        return repr(sign * float("inf"))
    exponent = code >> mantissa_bits & ((1 << exponent_bits) - 1)
    mantissa = code & ((1 << mantissa_bits) - 1)
    if exponent == 0:
        value = mantissa / (1 << mantissa_bits) * 2.0 ** (1 - bias)
    else:
        value = (1 + mantissa / (1 << mantissa_bits)) * 2.0 ** (exponent - bias)
    return repr(sign * value)


SMALL = {
    "F4": (4, 2, 1, 1, (), ()),
    "F6_E2M3": (6, 2, 3, 1, (), ()),
    "F6_E3M2": (6, 3, 2, 3, (), ()),
    "F8_E5M2": (8, 5, 2, 15, (0x7D, 0x7E, 0x7F, 0xFD, 0xFE, 0xFF), (0x7C, 0xFC)),
    "F8_E4M3": (8, 4, 3, 7, (0x7F, 0xFF), ()),
    "F8_E4M3FNUZ": (8, 4, 3, 8, (0x80,), ()),
    "F8_E5M2FNUZ": (8, 5, 2, 16, (0x80,), ()),
}


def pack(codes, bits):
    """LSB-first: element k takes bits k·bits and up of one little-endian integer."""
    whole = sum(code << (k * bits) for k, code in enumerate(codes))
    return whole.to_bytes(len(codes) * bits // 8, "little")


def values(dtype):
    """Some elements of a dtype: their values as text, and their bytes."""
    if dtype in SMALL:
        bits, *rest = SMALL[dtype]
        return [small_float(code, *rest) for code in range(1 << bits)], pack(range(1 << bits), bits)
    if dtype == "F8_E8M0":
        return [repr(2.0 ** (code - 127)) if code < 255 else "nan" for code in range(256)], bytes(range(256))
    if dtype == "BOOL":
        return ["True", "False", "False", "True"], bytes([1, 0, 0, 1])
    if dtype == "C64":
        pairs = [(1.5, -2.0), (0.0, float("inf")), (-0.0, 3.25)]
        return [f"{re!r} {im!r}" for re, im in pairs], b"".join(struct.pack("<2f", *pair) for pair in pairs)
    if dtype[0] in "IU":
        bits = BITS[dtype]
        low, high = (-(1 << (bits - 1)), (1 << (bits - 1)) - 1) if dtype[0] == "I" else (0, (1 << bits) - 1)
        numbers = [0, 1, low, high, high - 1, low + 100, 42]
        return [str(n) for n in numbers], b"".join((n % (1 << bits)).to_bytes(bits // 8, "little") for n in numbers)
    floats = [0.0, -0.0, 1.0, -2.5, 0.15625, 96.0, float("inf"), float("-inf"), float("nan")]
    if dtype == "BF16":
        return [repr(f) for f in floats], b"".join(struct.pack("<f", f)[2:] for f in floats)
    form = {"F16": "<e", "F32": "<f", "F64": "<d"}[dtype]
    return [repr(f) for f in floats], b"".join(struct.pack(form, f) for f in floats)


def dtype_files():
    table, files, every = {}, {}, []
    for dtype in ORDER:
        texts, data = values(dtype)
        table[dtype] = {"file": f"dtypes/{dtype}.safetensors", "tensor": "values", "shape": [len(texts)], "values": texts}
        files[f"dtypes/{dtype}.safetensors"] = write([("values", dtype, [len(texts)], data)])
        every.append((f"values.{dtype}", dtype, [len(texts)], data))
    files["dtypes/all.safetensors"] = write(every, {"format": "pt"})
    rows = ",\n".join(f'"{dtype}": {compact(row)}' for dtype, row in table.items())
    files["dtypes.json"] = ("{\n" + rows + "\n}\n").encode()
    return files


def sharded_files():
    def tensor(name, dtype, shape, seed):
        count = 1
        for extent in shape:
            count *= extent
        return name, dtype, shape, payload(count * BITS[dtype] // 8, seed)

    first = [tensor("model.embed.weight", "BF16", [8, 4], 11), tensor("model.layers.0.up.weight", "F8_E4M3", [4, 8], 12), tensor("model.layers.0.up.scale", "F32", [], 13)]
    second = [tensor("model.layers.1.up.weight", "F4", [4, 8], 14), tensor("model.norm.weight", "F32", [4], 15), tensor("model.empty", "I64", [0, 3], 16)]
    names = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    files = {f"sharded/{name}": write(shard, {"format": "pt"}) for name, shard in zip(names, (first, second), strict=True)}
    places = {name: file for file, shard in zip(names, (first, second), strict=True) for name, *_ in shard}
    total = sum(len(data) for shard in (first, second) for *_, data in shard)
    index = {"metadata": {"total_size": total}, "weight_map": places}
    files["sharded/model.safetensors.index.json"] = (json.dumps(index, indent=2, sort_keys=True) + "\n").encode()
    return files


def writer_files():
    """Inputs and the exact bytes that each writer profile makes of them."""
    mixed = [
        ("b.bool", "BOOL", [3], bytes([1, 0, 1])),
        ("f4", "F4", [2, 4], payload(4, 21)),
        ("z", "F32", [2], payload(8, 22)),
        ("a", "F32", [], payload(4, 23)),
        ("e", "F16", [0, 5], b""),
        ("u8", "U8", [5], payload(5, 24)),
        ("i", "I64", [1, 1], payload(8, 25)),
        ("f6", "F6_E3M2", [4], payload(3, 26)),
    ]
    odd = [("tab\there", "U8", [1], b"\1"), ("ü/\x7f\u2028", "U8", [1], b"\2"), ('q"b\\', "U8", [1], b"\3"), ("\x01\x1f", "U8", [1], b"\4"), ("", "U8", [1], b"\5"), ("😀", "U8", [1], b"\6"), ("\uffff", "U8", [1], b"\7")]
    table = [(f"t.{dtype}", dtype, [8], payload(BITS[dtype], 30 + i)) for i, dtype in enumerate(ORDER)]
    jobs = [
        ("empty", [], None, {}),
        ("empty-metadata", [], {}, {}),
        ("metadata-only", [], {"format": "pt"}, {}),
        ("one", [("w", "F32", [2, 2], payload(16, 20))], None, {}),
        ("one-metadata", [("w", "F32", [2, 2], payload(16, 20))], {"format": "pt"}, {}),
        ("mixed", mixed, None, {}),
        ("mixed-given-order", mixed, {"format": "pt"}, {"order": "given"}),
        ("names", odd, None, {}),
        ("metadata-sorted", mixed[:2], {"z": "1", "a": "line\nbreak", "é": "ü", "B": '"', "": ""}, {}),
        ("all-dtypes", table, None, {}),
        ("page", mixed, {"format": "pt"}, {"align": 4096}),
        ("reserve", mixed[:3], {"format": "pt"}, {"reserve": 100}),
        ("page-reserve", mixed[:3], None, {"align": 4096, "reserve": 5000}),
    ]
    rows, files = [], {}
    for name, tensors, metadata, options in jobs:
        row = {
            "id": name, "file": f"writer/{name}.safetensors",
            "options": {"order": "canonical", "align": 8, "reserve": 0, **options}, "metadata": metadata,
            "tensors": [{"name": n, "dtype": d, "shape": s, "data": data.hex()} for n, d, s, data in tensors],
        }  # fmt: skip
        rows.append(json.dumps(row, ensure_ascii=True))
        files[row["file"]] = write(tensors, metadata, **options)
    files["writer.json"] = ("[\n" + ",\n".join(rows) + "\n]\n").encode()
    return files


def missing(root):
    """Frozen files that do not exist yet, and the sums with their lines added.

    A frozen file that exists and that this script would write differently is only named: its bytes
    stand, and the script is what has to change.
    """
    folder, wanted = root / "frozen", {}
    for path, blob in {**dtype_files(), **sharded_files(), **writer_files()}.items():
        target = folder / path
        if not target.is_file():
            wanted[f"frozen/{path}"] = blob
        elif target.read_bytes() != blob:
            print(f"frozen, and this script differs: frozen/{path}")
    sums = folder / "SHA256SUMS"
    text = sums.read_text() if sums.is_file() else ""
    lines = [f"{hashlib.sha256(blob).hexdigest()}  {path.removeprefix('frozen/')}\n" for path, blob in sorted(wanted.items())]
    wanted["frozen/SHA256SUMS"] = (text + "".join(lines)).encode()
    return wanted


def verdicts(root, corpus):
    """One line a case, `id verdict code digest`; lines that exist stand, new cases are added."""
    path = root / "frozen/VERDICTS"
    text = path.read_text() if path.is_file() else ""
    known = {line.split(" ", 1)[0] for line in text.splitlines()}
    for case in corpus.cases:
        if case["id"] not in known:
            text += f"{case['id']} {case['verdict']} {case.get('code', '-')} {digest(corpus, case['file'], case.get('sidecar'))}\n"
    return {"frozen/VERDICTS": text.encode()}


def digest(corpus, path, sidecar=None):
    """SHA-256 of a file and its sidecar, or of the names and bytes of a folder's files."""
    if path in corpus.files:
        return hashlib.sha256(corpus.files[path] + corpus.files.get(sidecar, b"")).hexdigest()
    whole = hashlib.sha256()
    for name in sorted(name for name in corpus.files if name.startswith(path + "/")):
        whole.update(name.removeprefix(path + "/").encode() + b"\0" + corpus.files[name])
    return whole.hexdigest()
