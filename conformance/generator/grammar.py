"""Chapter 3: JSON syntax, strings, numbers, nesting and keys that repeat."""

from .build import T, payload, quirk, text_of

A = T("a", "U8", [4], 0, 4)
B = T("b", "U8", [4], 4, 8)
FOUR = payload(4)
EIGHT = payload(8)
ENTRY = '"a":{"dtype":"U8","shape":[4],"data_offsets":[0,4]}'


def with_field(piece):
    """A header whose one entry has a field more, which a reader skips."""
    return '{"a":{"dtype":"U8","shape":[4],"data_offsets":[0,4],' + piece + "}}"


def add(c):
    syntax(c)
    skipped_values(c)
    strings(c)
    surrogates(c)
    numbers(c)
    depth(c)
    duplicates(c)


def syntax(c):
    for name, text, why in [
        ("unclosed-object", "{" + ENTRY, "The object is not closed."),
        ("unclosed-entry", '{"a":{"dtype":"U8","shape":[4],"data_offsets":[0,4]', "The entry is not closed."),
        ("open-brace-only", "{ ", "An object that never closes."),
        ("trailing-comma-object", "{" + ENTRY + ",}", "JSON allows no comma before a brace."),
        ("trailing-comma-entry", '{"a":{"dtype":"U8","shape":[4],"data_offsets":[0,4],}}', "JSON allows no comma before a brace."),
        ("leading-comma", "{," + ENTRY + "}", "JSON allows no comma after an opening brace."),
        ("double-comma", "{" + ENTRY + ",," + B.entry() + "}", "Two commas in a row."),
        ("missing-comma", "{" + ENTRY + " " + B.entry() + "}", "A comma must separate two entries."),
        ("missing-comma-fields", '{"a":{"dtype":"U8" "shape":[4],"data_offsets":[0,4]}}', "A comma must separate two fields."),
        ("missing-colon", '{"a" {"dtype":"U8","shape":[4],"data_offsets":[0,4]}}', "A colon must follow a key."),
        ("single-quotes", "{'a':{'dtype':'U8','shape':[4],'data_offsets':[0,4]}}", "JSON strings have double quotes."),
        ("bare-key", '{a:{"dtype":"U8","shape":[4],"data_offsets":[0,4]}}', "Keys are strings."),
        ("number-key", '{1:{"dtype":"U8","shape":[4],"data_offsets":[0,4]}}', "Keys are strings."),
        ("line-comment", "{//c\n" + ENTRY + "}", "JSON has no comments."),
        ("block-comment", "{/*c*/" + ENTRY + "}", "JSON has no comments."),
        ("hash-comment", "{#c\n" + ENTRY + "}", "JSON has no comments."),
        ("unclosed-string", '{"a', "A string that never closes."),
        ("mismatched-bracket", '{"a":{"dtype":"U8","shape":[4},"data_offsets":[0,4]}}', "A bracket closed by a brace."),
        ("semicolon", "{" + ENTRY + ";" + B.entry() + "}", "Entries are separated by commas only."),
        ("key-without-colon", '{"a"}', "A key alone is not a member."),
    ]:
        c.bad(f"syntax/{name}", "JSON_SYNTAX", why, text, EIGHT if '"b"' in text else FOUR)
    reordered = '{"a":{"data_offsets":[0,4],"shape":[4],"dtype":"U8"}}'
    c.ok("syntax/field-order", "The fields of an entry come in any order.", [A], text=reordered)
    escaped = '{"\\u0061":{"d\\u0074ype":"U\\u0038","sh\\u0061pe":[4],"data\\u005foffsets":[0,4]}}'
    c.ok("syntax/escaped-keys", "A key is what its escapes decode to, and so is a dtype.", [A], text=escaped)


def skipped_values(c):
    for name, value, why in [
        ("null", "null", "An unknown field may hold null."),
        ("bools", "[true,false]", "An unknown field may hold literals."),
        ("numbers", "[0,-0,-1,1.5,1e5,1E+5,1e-5,12345678901234567890123]", "A number that is skipped may have every JSON form."),
        ("string", '"\\u00e9\\n"', "An unknown field may hold a string with escapes."),
        ("object", '{"dtype":"F32","shape":[9],"x":{}}', "Fields of a skipped object have no meaning."),
        ("empty", "[[],{}]", "Empty containers are skipped too."),
    ]:
        c.ok(f"skip/{name}", why, [A], text=with_field('"x":' + value))
    first = '{"a":{"x":[1,{"y":2}],"dtype":"U8","z":"","shape":[4],"data_offsets":[0,4]}}'
    c.ok("skip/between-fields", "Unknown fields may stand anywhere in the entry.", [A], text=first)
    c.ok("skip/empty-key", "An unknown field may have the empty name.", [A], text=with_field('"":1'))
    c.ok("skip/case-differs", "Field names are case-sensitive: `Dtype` is an unknown field.", [A], text=with_field('"Dtype":"F64","SHAPE":[]'))
    for name, value, why in [
        ("nan", "NaN", "NaN is not JSON."),
        ("infinity", "-Infinity", "Infinity is not JSON."),
        ("python-none", "None", "Python's None is not JSON."),
        ("upper-true", "True", "JSON literals are lower case."),
        ("cut-literal", "tru", "A literal is whole."),
        ("hex", "0x10", "JSON has no hexadecimal numbers."),
        ("leading-zero", "01", "JSON numbers have no leading zero."),
        ("plus", "+1", "JSON numbers have no plus sign."),
        ("bare-point", ".5", "A digit must stand before the point."),
        ("open-point", "1.", "A digit must stand after the point."),
        ("open-exponent", "1e", "A digit must stand in the exponent."),
        ("minus-alone", "-", "A sign is no number."),
        ("trailing-comma", "[1,]", "The grammar holds in skipped values too."),
        ("missing-value", "", "A field without a value."),
        ("unclosed", "[1", "A skipped array must close."),
    ]:
        c.bad(f"skip/{name}", "JSON_SYNTAX", why, with_field('"x":' + value), FOUR)
    c.ok(
        "skip/huge-number", "A skipped number has no range: 1e999 is JSON.", [A], text=with_field('"x":1e999'),
        compat={"verdict": "reject", "quirk": "NUMBER_RANGE_IN_SKIPPED"},
    )  # fmt: skip
    for name, value, why in [
        ("huge-negative", "-1e999", "A skipped number has no range below zero either."),
        ("huge-nested", '{"y":[1e400]}', "A huge number deep in a skipped value."),
        ("huge-exponent", "1e99999999999999999999", "An exponent that fits nothing."),
        ("huge-digits", "1" + "0" * 400, "An integer of 401 digits."),
    ]:
        refused = {"verdict": "reject", "quirk": "NUMBER_RANGE_IN_SKIPPED"}
        c.ok(f"skip/{name}", why, [A], text=with_field('"x":' + value), compat=refused)
    for name, value, why in [
        ("zero-huge-exponent", "0e999", "Zero to any power of ten is zero."),
        ("zero-huger-exponent", "-0.0e99999999999999999999", "Zero stays zero whatever the exponent."),
        ("largest-double", "1.7976931348623157e308", "The largest double."),
        ("long-fraction", "0." + "3" * 400, "A fraction of 400 digits."),
        ("tiny-exponent", "1e-99999999999999999999", "An exponent below everything."),
    ]:
        c.ok(f"skip/{name}", why, [A], text=with_field('"x":' + value))
    c.ok("skip/tiny-number", "A skipped number that underflows is JSON too.", [A], text=with_field('"x":1e-999'))


def strings(c):
    text = '{"\\"\\\\\\b\\f\\n\\r\\t\\/\\u0022":{"dtype":"U8","shape":[4],"data_offsets":[0,4]}}'
    c.ok("string/every-escape", "All of JSON's escapes, solidus included.", [T('"\\\b\f\n\r\t/"', "U8", [4], 0, 4)], text=text)
    mixed = '{"\\u00E9\\u00e9\\uABCD\\uabcd":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}'
    c.ok("string/hex-case", "Hexadecimal digits of an escape have either case.", [T("éé\uabcd\uabcd", "U8", [1], 0, 1)], text=mixed)
    c.ok("string/del-raw", "U+007F may stand raw in a string.", [T("a\x7fb", "U8", [1], 0, 1)])
    c.ok("string/c1-raw", "C1 controls and line separators may stand raw in a string.", [T("\x85\u2028\u2029", "U8", [1], 0, 1)])
    c.ok("string/nul-escaped", "An escaped NUL is part of the name, which does not end there.", [T("a\0b", "U8", [1], 0, 1), T("a", "U8", [1], 1, 2)], text='{"a\\u0000b":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},"a":{"dtype":"U8","shape":[1],"data_offsets":[1,2]}}')
    for name, piece, why in [
        ("newline", "a\nb", "A raw newline in a string."),
        ("tab", "a\tb", "A raw tab in a string."),
        ("nul", "a\0b", "A raw zero byte in a string."),
        ("escape-char", "a\x1bb", "A raw escape character in a string."),
        ("1f", "a\x1fb", "The last control character below the space."),
    ]:
        c.bad(f"string/control-{name}", "CONTROL_CHARACTER", why, '{"' + piece + '":{"dtype":"U8","shape":[4],"data_offsets":[0,4]}}', FOUR)
    c.bad("string/control-in-metadata", "CONTROL_CHARACTER", "A raw newline in a metadata value.", '{"__metadata__":{"k":"line\nbreak"}}')
    c.bad("string/control-in-skipped", "CONTROL_CHARACTER", "The grammar of strings holds where they are skipped.", with_field('"x":"\t"'), FOUR)
    for name, piece, why in [
        ("x", "\\x41", "JSON has no \\x escape."),
        ("quote", "\\'", "A single quote needs no escape and has none."),
        ("a", "\\a", "JSON has no \\a escape."),
        ("octal", "\\0", "JSON has no octal escapes."),
        ("upper-u", "\\U00000041", "JSON has no \\U escape."),
        ("short-u", "\\u12", "A \\u escape has four digits."),
        ("bad-digit", "\\u12G4", "The digits of a \\u escape are hexadecimal."),
        ("sign-digit", "\\u+123", "A sign is no hexadecimal digit."),
        ("line-end", "\\\n", "An escaped line end is no escape."),
    ]:
        c.bad(f"string/escape-{name}", "INVALID_ESCAPE", why, '{"' + piece + '":{"dtype":"U8","shape":[4],"data_offsets":[0,4]}}', FOUR)
    c.bad("string/escape-in-metadata", "INVALID_ESCAPE", "A Windows path that nobody escaped.", '{"__metadata__":{"path":"C:\\models"}}')
    c.bad("string/escape-in-skipped", "INVALID_ESCAPE", "Escapes are checked where strings are skipped.", with_field('"x":"\\q"'), FOUR)


def surrogates(c):
    pair = '{"\\uD83D\\uDE00":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}'
    c.ok("surrogate/pair", "A pair of surrogate escapes is one character.", [T("😀", "U8", [1], 0, 1)], text=pair)
    lower = '{"\\ud83d\\ude00":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}'
    c.ok("surrogate/pair-lower", "Hexadecimal digits may be lower case.", [T("😀", "U8", [1], 0, 1)], text=lower)
    for name, piece, why in [
        ("high", "\\ud800", "A high surrogate alone."),
        ("low", "\\udc00", "A low surrogate alone."),
        ("high-high", "\\ud800\\ud800", "Two high surrogates."),
        ("reversed", "\\udc00\\ud800", "A pair in the wrong order."),
        ("high-text", "\\ud800x", "A high surrogate before plain text."),
        ("high-escape", "\\ud800\\n", "A high surrogate before another escape."),
        ("high-plain", "\\ud800\\u0041", "A high surrogate before a character."),
    ]:
        c.bad(f"surrogate/{name}", "LONE_SURROGATE", why, '{"' + piece + '":{"dtype":"U8","shape":[4],"data_offsets":[0,4]}}', FOUR)
    c.bad("surrogate/metadata-key", "LONE_SURROGATE", "Half a pair in a metadata key.", '{"__metadata__":{"\\udfff":""}}')
    c.bad("surrogate/metadata-value", "LONE_SURROGATE", "Half a pair in a metadata value.", '{"__metadata__":{"k":"\\udbff"}}')
    c.bad("surrogate/skipped", "LONE_SURROGATE", "Half a pair in a value that is skipped.", with_field('"x":["\\ud834"]'), FOUR)
    c.bad("surrogate/skipped-key", "LONE_SURROGATE", "Half a pair in a key that is skipped.", with_field('"\\ud834":1'), FOUR)


def numbers(c):
    for name, value, why in [
        ("fraction", "4.0", "A size with a fraction, even a zero one."),
        ("exponent", "4e0", "A size with an exponent."),
        ("negative", "-4", "A negative size."),
        ("minus-zero", "-0", "Minus zero has a sign."),
        ("leading-zero", "04", "A leading zero."),
        ("plus", "+4", "A plus sign."),
        ("string", '"4"', "A string of digits is no number."),
        ("null", "null", "Null is no number."),
        ("true", "true", "A literal is no number."),
        ("nested", "[4]", "An array is no number."),
        ("object", "{}", "An object is no number."),
        ("hex", "0x4", "A hexadecimal number."),
        ("nan", "NaN", "NaN is no number."),
        ("trailing-comma", "4,", "An integer must follow a comma."),
        ("leading-comma", ",4", "An integer must stand before a comma."),
    ]:
        code = "JSON_SYNTAX" if name == "hex" else "NUMBER_FORM"
        shape = '{"a":{"dtype":"U8","shape":[' + value + '],"data_offsets":[0,4]}}'
        c.bad(f"number/shape-{name}", code, why, shape, FOUR, tensor=None if name == "hex" else "a")
    for name, value, why in [
        ("fraction", "[0,4.0]", "An offset with a fraction."),
        ("exponent", "[0,4E0]", "An offset with an exponent."),
        ("negative-begin", "[-4,0]", "A negative offset would lead into the header."),
        ("minus-zero", "[-0,4]", "Minus zero has a sign."),
        ("leading-zero", "[00,4]", "A leading zero."),
        ("string", '[0,"4"]', "A string of digits is no number."),
        ("null", "[null,4]", "Null is no number."),
    ]:
        text = '{"a":{"dtype":"U8","shape":[4],"data_offsets":' + value + "}}"
        c.bad(f"number/offset-{name}", "NUMBER_FORM", why, text, FOUR, tensor="a")
    for name, shape, offsets, why in [
        ("shape-2-64", "[18446744073709551616]", "[0,4]", "2^64 does not fit 64 bits."),
        ("shape-40-digits", "[" + "9" * 40 + "]", "[0,4]", "Forty digits fit nothing."),
        ("offset-2-64", "[4]", "[0,18446744073709551620]", "2^64+4 is 4 after truncation."),
    ]:
        text = '{"a":{"dtype":"U8","shape":' + shape + ',"data_offsets":' + offsets + "}}"
        c.bad(f"number/{name}", "INTEGER_RANGE", why, text, FOUR, tensor="a")
    c.bad("number/shape-2-63", "INTEGER_RANGE", "Sizes stop at 2^63-1.", text_of([T("a", "U8", [2**63], 0, 4)]), FOUR, tensor="a")
    c.bad("number/offset-2-63", "INTEGER_RANGE", "Offsets stop at 2^63-1.", text_of([T("a", "U8", [4], 0, 2**63)]), FOUR, tensor="a")


def depth(c):
    def nested(levels):
        return with_field('"x":' + "[" * levels + "]" * levels)

    c.ok("depth/32", "The header's object is level 1 and the entry level 2, so 30 arrays reach level 32.", [A], text=nested(30))
    objects = with_field('"x":' + '{"y":' * 29 + "{}" + "}" * 29)
    c.ok("depth/32-objects", "Objects count like arrays.", [A], text=objects)
    c.bad("depth/33", "NESTING_TOO_DEEP", "Level 33 is one too deep.", nested(31), FOUR, compat=quirk("DEPTH_127", [A]))
    c.bad("depth/33-objects", "NESTING_TOO_DEEP", "Level 33 is one too deep for objects too.", with_field('"x":' + '{"y":' * 30 + "{}" + "}" * 30), FOUR, compat=quirk("DEPTH_127", [A]))
    c.bad("depth/100", "NESTING_TOO_DEEP", "Level 100.", nested(98), FOUR, compat=quirk("DEPTH_127", [A]))
    c.bad("depth/127", "NESTING_TOO_DEEP", "The deepest that the reference reads.", nested(125), FOUR, compat=quirk("DEPTH_127", [A]))
    c.bad("depth/128", "NESTING_TOO_DEEP", "One level deeper than the reference reads.", nested(126), FOUR)
    c.bad("depth/5000", "NESTING_TOO_DEEP", "Deep enough to exhaust the stack of a recursive reader.", nested(5000), FOUR)


def duplicates(c):
    same = "{" + ENTRY + "," + ENTRY + "}"
    last = quirk("DUPLICATE_TENSOR_LAST_WINS", [A])
    c.bad("duplicate/tensor-same", "DUPLICATE_TENSOR", "One name twice with equal entries.", same, FOUR, "a", last)
    other = '{"a":{"dtype":"F64","shape":[9],"data_offsets":[7,79]},' + ENTRY + "}"
    c.bad("duplicate/tensor-differs", "DUPLICATE_TENSOR", "One name twice; readers disagree on which entry counts.", other, FOUR, "a", last)
    both = "{" + ENTRY + ',"a":{"dtype":"U8","shape":[4],"data_offsets":[4,8]}}'
    c.bad("duplicate/tensor-both-tile", "DUPLICATE_TENSOR", "One name twice, each with its own bytes.", both, EIGHT, "a")
    escaped = "{" + ENTRY + ',"\\u0061":{"dtype":"U8","shape":[4],"data_offsets":[0,4]}}'
    c.bad("duplicate/tensor-escaped", "DUPLICATE_TENSOR", "Names are compared as decoded.", escaped, FOUR, "a", last)
    apart = "{" + ENTRY + "," + B.entry() + "," + ENTRY + "}"
    c.bad("duplicate/tensor-apart", "DUPLICATE_TENSOR", "One name twice with another between.", apart, EIGHT, "a", quirk("DUPLICATE_TENSOR_LAST_WINS", [A, B]))
    empty = '{"":{"dtype":"U8","shape":[0],"data_offsets":[0,0]},"":{"dtype":"U8","shape":[4],"data_offsets":[0,4]}}'
    c.bad("duplicate/tensor-empty-name", "DUPLICATE_TENSOR", "The empty name twice.", empty, FOUR, "", quirk("DUPLICATE_TENSOR_LAST_WINS", [T("", "U8", [4], 0, 4)]))
    for field, value in [("dtype", '"U8"'), ("shape", "[4]"), ("data_offsets", "[0,4]")]:
        c.bad(f"duplicate/field-{field}", "DUPLICATE_FIELD", f"`{field}` twice in one entry.", with_field(f'"{field}":{value}'), FOUR, "a")
    c.bad("duplicate/field-escaped", "DUPLICATE_FIELD", "Field names are compared as decoded.", with_field('"\\u0064type":"U8"'), FOUR, "a")
    repeat = quirk("UNKNOWN_FIELD_REPEATS", [A])
    c.bad("duplicate/unknown-field", "DUPLICATE_FIELD", "Even a field that is skipped stands once.", with_field('"x":1,"x":2'), FOUR, "a", repeat)
    c.bad("duplicate/unknown-field-escaped", "DUPLICATE_FIELD", "Skipped names are compared as decoded.", with_field('"x":1,"\\u0078":2'), FOUR, "a", repeat)
    c.bad("duplicate/skipped-object", "DUPLICATE_FIELD", "Keys stand once in skipped objects too.", with_field('"x":{"y":1,"y":1}'), FOUR, "a", repeat)
    c.ok("duplicate/skipped-siblings", "Two objects may hold the same key.", [A], text=with_field('"x":[{"y":1},{"y":1}],"y":{"x":1}'))
    c.bad("duplicate/metadata", "DUPLICATE_METADATA", "`__metadata__` twice.", '{"__metadata__":{"a":"1"},"__metadata__":{"b":"2"}}')
    c.bad("duplicate/metadata-equal", "DUPLICATE_METADATA", "`__metadata__` twice, equal and empty.", '{"__metadata__":{},"__metadata__":{}}')
    c.bad("duplicate/metadata-escaped", "DUPLICATE_METADATA", "`__metadata__` is known by its decoded name.", '{"__metadata__":{},"\\u005f_metadata__":{}}')
    c.bad("duplicate/metadata-key", "DUPLICATE_METADATA_KEY", "A metadata key twice.", '{"__metadata__":{"k":"1","k":"2"}}', compat=quirk("DUPLICATE_METADATA_KEY_LAST_WINS", [], {"k": "2"}))
    c.bad("duplicate/metadata-key-escaped", "DUPLICATE_METADATA_KEY", "Metadata keys are compared as decoded.", '{"__metadata__":{"k":"1","\\u006b":"2"}}', compat=quirk("DUPLICATE_METADATA_KEY_LAST_WINS", [], {"k": "2"}))
    broken = '{"a":{"shape":[4],"data_offsets":[0,4]},' + ENTRY + "}"
    c.bad("duplicate/tensor-first-broken", "MISSING_FIELD", "A broken entry is no better for being repeated whole.", broken, FOUR, "a")
    hole = "{" + ENTRY + ',"a":{"dtype":"U8","shape":[4],"data_offsets":[2,6]}}'
    c.bad("duplicate/tensor-last-leaves-hole", "DUPLICATE_TENSOR", "The entry that comes last does not tile either.", hole, payload(6), "a")
    thrice = "{" + ",".join([ENTRY] * 3) + "}"
    c.bad("duplicate/tensor-thrice", "DUPLICATE_TENSOR", "One name three times.", thrice, FOUR, "a", last)
    nul = '{"\\u0000":{"dtype":"U8","shape":[4],"data_offsets":[0,4]},"\\u0000":{"dtype":"U8","shape":[4],"data_offsets":[0,4]}}'
    c.bad("duplicate/tensor-nul", "DUPLICATE_TENSOR", "A name of one NUL twice.", nul, FOUR, "\0", quirk("DUPLICATE_TENSOR_LAST_WINS", [T("\0", "U8", [4], 0, 4)]))
    c.bad("duplicate/metadata-null-twice", "METADATA_NOT_OBJECT", "Null metadata twice.", '{"__metadata__":null,"__metadata__":null}')
    c.bad("duplicate/metadata-null-object", "METADATA_NOT_OBJECT", "Null metadata, then an object.", '{"__metadata__":null,"__metadata__":{}}')
    keys = '{"__metadata__":{"k":"1","l":"2","k":"3","k":"4"}}'
    c.bad("duplicate/metadata-key-thrice", "DUPLICATE_METADATA_KEY", "A metadata key three times.", keys, compat=quirk("DUPLICATE_METADATA_KEY_LAST_WINS", [], {"k": "4", "l": "2"}))
    distinct = [T("K", "U8", [1], 0, 1), T("k", "U8", [1], 1, 2), T("k ", "U8", [1], 2, 3)]
    c.ok("duplicate/case-and-space", "Names that differ in case or by a space are different names.", distinct)
