"""Chapters 4, 5 and 7: the entry of a tensor, dtypes, metadata."""

from .build import BITS, T, payload, quirk, text_of

FOUR = payload(4)
A = T("a", "U8", [4], 0, 4)


def entry(fields, name="a"):
    return '{"' + name + '":' + fields + "}"


def add(c):
    forms(c)
    fields(c)
    dtypes(c)
    sub_byte(c)
    metadata(c)


def forms(c):
    for name, value in [("null", "null"), ("number", "4"), ("string", '"U8"'), ("true", "true")]:
        c.bad(f"entry/{name}", "ENTRY_NOT_OBJECT", f"An entry is an object, not a {name}." if name != "null" else "An entry is an object, not null.", entry(value), tensor="a")
    seq = quirk("ENTRY_AS_ARRAY", [A])
    c.bad("entry/array", "ENTRY_NOT_OBJECT", "The fields as an array, which a derived reader takes.", entry('["U8",[4],[0,4]]'), FOUR, "a", seq)
    c.bad("entry/array-empty", "ENTRY_NOT_OBJECT", "An entry is an object, not an empty array.", entry("[]"), b"", "a")
    c.bad("entry/array-short", "ENTRY_NOT_OBJECT", "An array of two fields.", entry('["U8",[4]]'), FOUR, "a")
    c.bad("entry/array-long", "ENTRY_NOT_OBJECT", "An array of four fields.", entry('["U8",[4],[0,4],0]'), FOUR, "a")
    c.bad("entry/array-enum-map", "ENTRY_NOT_OBJECT", "Two shortcuts of a derived reader in one entry.", entry('[{"U8":null},[4],[0,4]]'), FOUR, "a", seq)
    spaced = entry('[ "U8" ,\n[ 4 ] ,\t[ 0 , 4 ] ]')
    c.bad("entry/array-spaced", "ENTRY_NOT_OBJECT", "The array form with whitespace.", spaced, FOUR, "a", seq)
    c.bad("entry/array-unknown-dtype", "ENTRY_NOT_OBJECT", "The array form with an unknown dtype.", entry('["U7",[4],[0,4]]'), FOUR, "a")
    c.bad("entry/array-order", "ENTRY_NOT_OBJECT", "The array form in another order.", entry('[[4],"U8",[0,4]]'), FOUR, "a")
    c.bad("entry/missing-value", "ENTRY_NOT_OBJECT", "A key without a value: no object stands there.", '{"a":}', tensor="a")
    c.bad("entry/empty-object", "MISSING_FIELD", "An entry without fields.", entry("{}"), b"", "a")
    c.bad("entry/only-unknown", "MISSING_FIELD", "An entry with none of the three fields.", entry('{"x":1}'), b"", "a")
    nested = '{"model":{"a":{"dtype":"U8","shape":[4],"data_offsets":[0,4]}}}'
    c.bad("entry/nested-tree", "MISSING_FIELD", "Tensors are not nested by module.", nested, FOUR, "model")


def fields(c):
    c.bad("field/no-dtype", "MISSING_FIELD", "`dtype` is missing.", entry('{"shape":[4],"data_offsets":[0,4]}'), FOUR, "a")
    c.bad("field/no-shape", "MISSING_FIELD", "`shape` is missing.", entry('{"dtype":"U8","data_offsets":[0,4]}'), FOUR, "a")
    c.bad("field/no-offsets", "MISSING_FIELD", "`data_offsets` is missing.", entry('{"dtype":"U8","shape":[4]}'), FOUR, "a")
    c.bad("field/upper-case", "MISSING_FIELD", "Field names are lower case.", entry('{"DTYPE":"U8","shape":[4],"data_offsets":[0,4]}'), FOUR, "a")
    c.bad("field/offsets-alias", "MISSING_FIELD", "`offsets` is not `data_offsets`.", entry('{"dtype":"U8","shape":[4],"offsets":[0,4]}'), FOUR, "a")
    for name, value, accepted in [
        ("null", "null", None),
        ("number", "8", None),
        ("array", '["U8"]', None),
        ("true", "true", None),
        ("enum-map", '{"U8":null}', "DTYPE_AS_ENUM_MAP"),
        ("enum-map-unit", '{"U8":{}}', None),
        ("enum-map-unknown", '{"U7":null}', None),
        ("enum-map-spaced", '{ "U8" : null }', "DTYPE_AS_ENUM_MAP"),
        ("enum-map-value", '{"U8":1}', None),
        ("enum-map-two", '{"U8":null,"I8":null}', None),
        ("empty-object", "{}", None),
    ]:
        text = entry('{"dtype":' + value + ',"shape":[4],"data_offsets":[0,4]}')
        compat = quirk(accepted, [A]) if accepted else None
        c.bad(f"field/dtype-{name}", "DTYPE_NOT_STRING", "A dtype is a string.", text, FOUR, "a", compat)
    for name, value in [("null", "null"), ("number", "4"), ("string", '"4"'), ("object", '{"0":4}'), ("empty-object", "{}")]:
        text = entry('{"dtype":"U8","shape":' + value + ',"data_offsets":[0,4]}')
        c.bad(f"field/shape-{name}", "SHAPE_NOT_ARRAY", "A shape is an array of integers.", text, FOUR, "a")
    for name, value in [
        ("null", "null"), ("number", "4"), ("string", '"0,4"'), ("object", '{"begin":0,"end":4}'),
        ("empty", "[]"), ("one", "[0]"), ("three", "[0,4,4]"), ("nested", "[[0,4]]"),
    ]:  # fmt: skip
        code = "NUMBER_FORM" if name == "nested" else "OFFSETS_FORM"
        text = entry('{"dtype":"U8","shape":[4],"data_offsets":' + value + "}")
        c.bad(f"field/offsets-{name}", code, "`data_offsets` is an array of two integers.", text, FOUR, "a")


def dtypes(c):
    for dtype, bits in BITS.items():
        c.ok(f"dtype/{dtype.lower()}", f"`{dtype}` takes {bits} bits an element.", [T("t", dtype, [2, 4], 0, bits)])
        if bits >= 8:
            c.ok(f"dtype/{dtype.lower()}-scalar", f"One `{dtype}` without dimensions.", [T("t", dtype, [], 0, bits // 8)])
    offset, every = 0, []
    for dtype, bits in BITS.items():
        every.append(T(dtype, dtype, [8], offset, offset + bits))
        offset += bits
    c.ok("dtype/all-22", "Every dtype in one file, in the order of the table.", every)
    c.ok("dtype/bool-any-byte", "A BOOL that is neither 0 nor 1 is valid data.", [T("t", "BOOL", [4], 0, 4)], data=b"\x00\x01\x02\xff")
    c.ok("dtype/nan-payloads", "Bytes are data: no NaN is made canonical.", [T("t", "F32", [2], 0, 8)], data=bytes.fromhex("010080ff0100c07f"))
    for name in ["f32", "F8", "F128", "U256", "I4", "F8_E4M3FN", "C128", "float32", "", "F32 ", "F32\0", "BF16\u0301"]:
        slug = {"": "empty", "f32": "lower-f32", "F32 ": "trailing-space", "F32\0": "trailing-nul", "BF16\u0301": "combining"}.get(name, name.lower())
        c.unsupported(f"dtype/unknown-{slug}", f"`{name!a}` is no dtype of level 1; the file can be listed.", [A, T("t", name, [2], 4, 8)], "t")
    c.bad("dtype/unknown-with-hole", "HOLE", "An unknown dtype does not excuse a hole.", text_of([A, T("t", "X1", [2], 5, 8)]), payload(8), "t", {"verdict": "reject"})
    c.bad("dtype/unknown-reversed", "OFFSETS_REVERSED", "An unknown dtype does not excuse a range that ends before it begins.", text_of([A, T("t", "X1", [2], 8, 4)]), payload(8), "t")
    c.bad("dtype/wrong-size", "SIZE_MISMATCH", "Two F32 take eight bytes, not four.", text_of([T("t", "F32", [2], 0, 4)]), FOUR, "t")


def sub_byte(c):
    for name, dtype, shape, size, why in [
        ("f4-pair", "F4", [2], 1, "Two F4 fill a byte."),
        ("f4-rows-straddle", "F4", [2, 3], 3, "Only the whole tensor fills bytes: rows of three F4 straddle them."),
        ("f4-many-ones", "F4", [1, 1, 1, 2], 1, "Dimensions of one do not matter."),
        ("f4-empty", "F4", [0, 3], 0, "No elements fill no bytes."),
        ("f6-e2m3-four", "F6_E2M3", [4], 3, "Four F6 fill three bytes."),
        ("f6-e3m2-four", "F6_E3M2", [2, 2], 3, "Four F6 fill three bytes in any shape."),
        ("f6-eight", "F6_E3M2", [8], 6, "Eight F6 fill six bytes."),
        ("f6-empty", "F6_E2M3", [1, 0], 0, "No elements fill no bytes."),
    ]:
        c.ok(f"subbyte/{name}", why, [T("t", dtype, shape, 0, size)])
    for name, dtype, shape, size, why in [
        ("f4-scalar", "F4", [], 1, "One F4 is half a byte."),
        ("f4-one", "F4", [1], 1, "One F4 is half a byte."),
        ("f4-odd", "F4", [3, 3], 5, "Nine F4 are four and a half bytes."),
        ("f6-scalar", "F6_E2M3", [], 1, "One F6 is three quarters of a byte."),
        ("f6-one", "F6_E3M2", [1], 1, "One F6 is three quarters of a byte."),
        ("f6-two", "F6_E2M3", [2], 2, "Two F6 are one and a half bytes."),
        ("f6-three", "F6_E3M2", [3], 3, "Three F6 are two and a quarter bytes."),
        ("f6-six", "F6_E3M2", [6], 5, "Six F6 are four and a half bytes."),
    ]:
        c.bad(f"subbyte/{name}", "PARTIAL_BYTE", why, text_of([T("t", dtype, shape, 0, size)]), payload(size), "t")
    c.bad("subbyte/f4-as-bytes", "SIZE_MISMATCH", "F4 is packed: eight elements take four bytes, not eight.", text_of([T("t", "F4", [8], 0, 8)]), payload(8), "t")
    c.bad("subbyte/f6-as-bytes", "SIZE_MISMATCH", "F6 is packed: four elements take three bytes, not four.", text_of([T("t", "F6_E2M3", [4], 0, 4)]), FOUR, "t")


def metadata(c):
    c.ok("metadata/empty", "An empty object is metadata without entries.", [A], metadata={})
    c.ok("metadata/alone", "Metadata without tensors.", [], metadata={"format": "pt"})
    many = {"format": "pt", "": "empty key", "empty value": "", "é": "ü", "json": '{"a":1}', "nul\0": "\0", "__metadata__": "inner"}
    c.ok("metadata/strings", "Keys and values are any strings.", [A], metadata=many)
    middle = '{"a":{"dtype":"U8","shape":[2],"data_offsets":[0,2]},"__metadata__":{"k":"v"},"b":{"dtype":"U8","shape":[2],"data_offsets":[2,4]}}'
    pair = [T("a", "U8", [2], 0, 2), T("b", "U8", [2], 2, 4)]
    c.ok("metadata/middle", "Metadata may stand between tensors.", pair, text=middle, metadata={"k": "v"})
    last = text_of([A])[:-1] + ',"__metadata__":{"k":"v"}}'
    c.ok("metadata/last", "Metadata may stand after the tensors.", [A], text=last, metadata={"k": "v"})
    escaped = '{"\\u005f_metadata_\\u005f":{"\\u006b":"\\u0076"}}'
    c.ok("metadata/escaped", "`__metadata__` is known by its decoded name.", [], text=escaped, metadata={"k": "v"})
    c.ok("metadata/level-1", "A file may declare its level.", [A], metadata={"safetensors.level": "1"})
    c.ok("metadata/level-unknown", "A level that a reader does not know does not refuse a file that it can read.", [A], metadata={"safetensors.level": "7"})
    c.ok("metadata/reserved-unknown", "Reserved keys that a reader does not know are carried along.", [A], metadata={"st.future": "x", "safetensors.future": "y"})
    upper = [T("__METADATA__", "U8", [4], 0, 4)]
    c.ok("metadata/upper-case-name", "`__METADATA__` is a tensor like others.", upper)
    c.ok("metadata/long", "A value of many kilobytes.", [A], metadata={"tokenizer": "0123456789abcdef" * 1024})
    c.bad("metadata/null", "METADATA_NOT_OBJECT", "Null is not an object; leave the key out.", '{"__metadata__":null,' + A.entry() + "}", FOUR, compat=quirk("METADATA_NULL", [A]))
    for name, value in [("array", "[]"), ("string", '"x"'), ("number", "1"), ("false", "false"), ("pairs", '[["k","v"]]')]:
        c.bad(f"metadata/{name}", "METADATA_NOT_OBJECT", "Metadata is an object.", '{"__metadata__":' + value + "}")
    for name, value in [("number", "1"), ("null", "null"), ("true", "true"), ("object", "{}"), ("array", '["v"]'), ("float", "1.5")]:
        c.bad(f"metadata/value-{name}", "METADATA_VALUE", "Metadata values are strings.", '{"__metadata__":{"k":' + value + "}}")
    c.bad("metadata/second-value", "METADATA_VALUE", "Every metadata value is a string, not only the first.", '{"__metadata__":{"k":"v","l":0}}')
    tensor = '{"__metadata__":{"dtype":"U8","shape":[4],"data_offsets":[0,4]}}'
    c.bad("metadata/tensor-entry", "METADATA_VALUE", "No tensor can be called `__metadata__`.", tensor, FOUR)
    c.bad("metadata/unclosed", "JSON_SYNTAX", "The metadata object never closes.", '{"__metadata__":{"k":"v"')
