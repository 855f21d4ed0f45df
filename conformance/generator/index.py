"""Chapter 8: index files, and folders with the files of one checkpoint."""

# ruff: noqa: UP031 (JSON is full of braces, so `%` is what stays readable)

import json

from .build import T, container, payload, text_of


def weight_map(**names):
    return json.dumps({"metadata": {"total_size": 8}, "weight_map": names}, ensure_ascii=False)


def add(c):
    accepted(c)
    forms(c)
    paths(c)
    directories(c)


def accepted(c):
    one = "model-00001-of-00001.safetensors"

    def ok(id, text, why, files, mapping):
        expect = {"weight_map": mapping, "files": files}
        c.index(f"index/{id}", text, "accept", why, expect=expect)

    two = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
    ok("two-shards", weight_map(**two), "The common case.", list(two.values()), two)
    ok("hub-layout", json.dumps({"metadata": {"total_size": 8}, "weight_map": two}, indent=2, sort_keys=True) + "\n", "As the Hub's tools write it: indented, sorted, newline at the end.", list(two.values()), two)
    ok("no-metadata", json.dumps({"weight_map": {"a": one}}), "`metadata` may be missing.", [one], {"a": one})
    ok("no-total-size", json.dumps({"metadata": {}, "weight_map": {"a": one}}), "`total_size` may be missing.", [one], {"a": one})
    ok("metadata-null", json.dumps({"metadata": None, "weight_map": {"a": one}}), "`metadata` is advisory, null included.", [one], {"a": one})
    ok("float-total-size", '{"metadata":{"total_size":8.0},"weight_map":{"a":"%s"}}' % one, "Some tools write a float; the size is advisory.", [one], {"a": one})
    ok("string-total-size", '{"metadata":{"total_size":"8"},"weight_map":{"a":"%s"}}' % one, "A size of the wrong type is ignored: it is advisory.", [one], {"a": one})
    ok("more-metadata", '{"metadata":{"total_size":8,"total_parameters":2,"x":[1,{"y":null}]},"weight_map":{"a":"%s"}}' % one, "Unknown metadata is skipped.", [one], {"a": one})
    ok("more-keys", '{"format":"x","weight_map":{"a":"%s"},"later":[1]}' % one, "Unknown keys are skipped.", [one], {"a": one})
    ok("empty-map", '{"weight_map":{}}', "An index without tensors.", [], {})
    ok("subfolder", '{"weight_map":{"a":"part/one.safetensors"}}', "A file in a folder beneath the index.", ["part/one.safetensors"], {"a": "part/one.safetensors"})
    ok("unicode-file", '{"weight_map":{"a":"modèle 1.safetensors"}}', "File names are Unicode and may hold spaces.", ["modèle 1.safetensors"], {"a": "modèle 1.safetensors"})
    ok("dotted-file", '{"weight_map":{"a":"v1..2/a...safetensors"}}', "Dots inside a component are plain.", ["v1..2/a...safetensors"], {"a": "v1..2/a...safetensors"})
    ok("hidden-file", '{"weight_map":{"a":".cache/x.safetensors"}}', "A component may begin with a dot.", [".cache/x.safetensors"], {"a": ".cache/x.safetensors"})
    ok("escaped", '{"weight_\\u006dap":{"\\u0061":"\\u0078.safetensors"}}', "Escapes are resolved before anything is compared.", ["x.safetensors"], {"a": "x.safetensors"})
    names = {"": one, "__proto__": one, "__metadata__x": one, "../x": one}
    ok("tensor-names", json.dumps({"weight_map": names}), "Tensor names are any strings.", [one], names)
    order = {"c": "2.safetensors", "a": "1.safetensors", "b": "2.safetensors"}
    ok("first-seen-order", json.dumps({"weight_map": order}), "Files are listed once, in the order in which they are first named.", ["2.safetensors", "1.safetensors"], order)
    ok("whitespace", ' \n{ "weight_map" : { "a" : "%s" } }\r\n\t' % one, "JSON whitespace may stand anywhere.", [one], {"a": one})


def forms(c):
    def bad(id, code, text, why):
        c.index(f"index/{id}", text, "reject", why, code)

    for id, text in [("array", "[]"), ("null", "null"), ("string", '"weight_map"'), ("number", "1")]:
        bad(f"top-{id}", "INDEX_FORM", text, "An index is an object.")
    bad("no-weight-map", "INDEX_FORM", '{"metadata":{}}', "`weight_map` is missing.")
    bad("empty-file", "INDEX_FORM", "", "An empty file holds no object.")
    bad("empty-object", "INDEX_FORM", "{}", "`weight_map` is missing.")
    bad("wrong-case", "INDEX_FORM", '{"Weight_Map":{}}', "Keys are case-sensitive.")
    for id, value in [("array", "[]"), ("null", "null"), ("string", '"x.safetensors"'), ("number", "0")]:
        bad(f"map-{id}", "INDEX_FORM", '{"weight_map":%s}' % value, "`weight_map` is an object.")
    for id, value in [("number", "1"), ("null", "null"), ("array", '["x.safetensors"]'), ("object", "{}"), ("true", "true")]:
        bad(f"value-{id}", "INDEX_VALUE", '{"weight_map":{"a":%s}}' % value, "A file is named by a string.")
    bad("duplicate-tensor", "INDEX_DUPLICATE", '{"weight_map":{"a":"1.safetensors","a":"2.safetensors"}}', "Two files for one tensor.")
    bad("duplicate-equal", "INDEX_DUPLICATE", '{"weight_map":{"a":"1.safetensors","a":"1.safetensors"}}', "A key stands once, even with equal values.")
    bad("duplicate-escaped", "INDEX_DUPLICATE", '{"weight_map":{"a":"1.safetensors","\\u0061":"2.safetensors"}}', "Names are compared as decoded.")
    bad("duplicate-map", "INDEX_DUPLICATE", '{"weight_map":{"a":"1.safetensors"},"weight_map":{}}', "`weight_map` twice.")
    bad("duplicate-metadata", "INDEX_DUPLICATE", '{"metadata":{},"metadata":{},"weight_map":{}}', "`metadata` twice.")
    for id, text, why in [
        ("cut", '{"weight_map":{"a":"1.safet', "A download that stopped."),
        ("trailing-comma", '{"weight_map":{"a":"1.safetensors",}}', "JSON allows no comma before a brace."),
        ("comment", '{/**/"weight_map":{}}', "JSON has no comments."),
        ("nan", '{"metadata":{"total_size":NaN},"weight_map":{}}', "NaN is not JSON."),
    ]:
        bad(id, "JSON_SYNTAX", text, why)
    bad("trailing-text", "FRAMING", '{"weight_map":{}} x', "Nothing but whitespace follows the object.")
    bad("invalid-utf8", "INVALID_UTF8", b'{"weight_map":{"\xff":"1.safetensors"}}', "An index is UTF-8.")
    bad("bom", "BYTE_ORDER_MARK", b'\xef\xbb\xbf{"weight_map":{}}', "An index begins with no byte order mark.")
    bad("control", "CONTROL_CHARACTER", '{"weight_map":{"a\n":"1.safetensors"}}', "A raw newline in a string.")
    bad("bad-escape", "INVALID_ESCAPE", '{"weight_map":{"a":"dir\\x.safetensors"}}', "A backslash that nobody escaped.")
    bad("lone-surrogate", "LONE_SURROGATE", '{"weight_map":{"a":"\\ud800.safetensors"}}', "Half a surrogate pair.")
    bad("deep", "NESTING_TOO_DEEP", '{"metadata":' + "[" * 500 + "]" * 500 + ',"weight_map":{}}', "Skipped values nest no deeper than in a header.")
    text = json.dumps({"weight_map": {"a": "1.safetensors", "b": "2.safetensors"}})
    expect = {"weight_map": {"a": "1.safetensors", "b": "2.safetensors"}, "files": ["1.safetensors", "2.safetensors"]}
    c.index("index/limit-bytes", text, "reject", "An index longer than the caller's budget.", "LIMIT_INDEX", limits={"index_bytes": len(text) - 1}, expect=expect)
    c.index("index/limit-shards", text, "reject", "More files than the caller's budget.", "LIMIT_SHARDS", limits={"shards": 1}, expect=expect)


def paths(c):
    for id, path, why in [
        ("absolute", "/etc/secret.safetensors", "An absolute path."),
        ("parent", "../secret.safetensors", "A path that leads out of the folder."),
        ("parent-inside", "a/../../secret.safetensors", "A path that leads out on a detour."),
        ("parent-neutral", "a/../x.safetensors", "A `..` is refused even where it stays inside."),
        ("parent-last", "a/..", "A path that ends with `..`."),
        ("dot", "./x.safetensors", "A `.` component."),
        ("dot-middle", "a/./x.safetensors", "A `.` component in the middle."),
        ("empty", "", "An empty path."),
        ("empty-component", "a//x.safetensors", "An empty component."),
        ("trailing-slash", "a/x.safetensors/", "An empty last component."),
        ("double-slash-start", "//server/x.safetensors", "A network path."),
        ("backslash", "a\\x.safetensors", "A backslash separates components on Windows."),
        ("backslash-parent", "..\\secret.safetensors", "A way out on Windows."),
        ("unc", "\\\\server\\share\\x.safetensors", "A network path of Windows."),
        ("drive", "C:/x.safetensors", "A drive of Windows."),
        ("drive-relative", "C:x.safetensors", "A path relative to a drive."),
        ("stream", "x.safetensors:s.safetensors", "An alternate data stream."),
        ("url", "https://example.org/x.safetensors", "A URL."),
        ("file-url", "file:///etc/x.safetensors", "A file URL."),
        ("query", "x.safetensors?y=.safetensors", "A query, where the index is read over HTTP."),
        ("fragment", "x.safetensors#.safetensors", "A fragment."),
        ("percent", "%2e%2e/secret.safetensors", "A `..` behind percent signs."),
        ("percent-slash", "..%2fsecret.safetensors", "A slash behind percent signs."),
        ("nul", "x.safetensors\0.safetensors", "A NUL, at which C ends the path."),
        ("newline", "x\n.safetensors", "A control character."),
        ("escape-char", "x\x1b.safetensors", "A control character that a terminal obeys."),
        ("del", "x\x7f.safetensors", "U+007F is a control character."),
        ("c1", "x\x85.safetensors", "C1 controls are control characters."),
    ]:
        text = json.dumps({"weight_map": {"a": path}}, ensure_ascii=True)
        c.index(f"index/path-{id}", text, "reject", why, "INDEX_PATH")
    for id, path, why in [
        ("pickle", "pytorch_model.bin", "A pickle is never opened by way of an index."),
        ("none", "model", "A file without extension."),
        ("upper-case", "X.SAFETENSORS", "The extension is lower case."),
        ("trailing-space", "x.safetensors ", "A space after the extension."),
        ("index", "model.safetensors.index.json", "An index does not name an index."),
        ("bare", ".safetensors", "An extension without a name."),
        ("bare-in-folder", "a/.safetensors", "An extension without a name, in a folder."),
        ("longer", "x.safetensors2", "An extension that only begins right."),
    ]:
        text = json.dumps({"weight_map": {"a": path}})
        c.index(f"index/extension-{id}", text, "reject", why, "INDEX_EXTENSION")
    text = json.dumps({"weight_map": {"a": "x.safetensors", "b": "../x.safetensors"}})
    c.index("index/path-second", text, "reject", "Every path is checked, not only the first.", "INDEX_PATH")


def shard(*tensors, metadata=None):
    return container(text_of(tensors, metadata), payload(max((t.end for t in tensors), default=0)))


INDEX = "model.safetensors.index.json"
ONE, TWO = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"


def directories(c):
    a, b = T("a", "U8", [4], 0, 4), T("b", "F32", [2], 0, 8)
    both = {ONE: shard(a), TWO: shard(b)}

    def index(**names):
        return (json.dumps({"metadata": {"total_size": 12}, "weight_map": names}, indent=2, sort_keys=True) + "\n").encode()

    def expect(*pairs):
        return {"tensors": [{**tensor.row(), "file": file} for tensor, file in pairs]}

    good = expect((a, ONE), (b, TWO))
    c.directory("directory/two-shards", {INDEX: index(a=ONE, b=TWO), **both}, "accept", "An index and its two files.", expect=good)
    c.directory("directory/no-index", both, "accept", "Two numbered files without an index.", expect=good)
    c.directory("directory/single", {"model.safetensors": shard(a)}, "accept", "One file and nothing else.", expect=expect((a, "model.safetensors")))
    sub = {"model.safetensors.index.json": index(a="part/one.safetensors"), "part/one.safetensors": shard(a)}
    c.directory("directory/subfolder", sub, "accept", "A file in a folder beneath the index.", expect=expect((a, "part/one.safetensors")))
    wrong = json.dumps({"metadata": {"total_size": 999999}, "weight_map": {"a": ONE, "b": TWO}}).encode()
    c.directory("directory/wrong-total-size", {INDEX: wrong, **both}, "accept", "`total_size` is advisory.", expect=good)
    beside = {INDEX: index(a=ONE, b=TWO), **both, "config.json": b"{}\n", "pytorch_model.bin": b"not read"}
    c.directory("directory/other-files", beside, "accept", "Files that the index does not name are left alone.", expect=good)

    def bad(id, code, files, why, **extra):
        c.directory(f"directory/{id}", files, "reject", why, code, **extra)

    bad("file-missing", "INDEX_FILE_MISSING", {INDEX: index(a=ONE, b=TWO), ONE: shard(a)}, "The index names a file that is not there.")
    bad("tensor-missing", "INDEX_TENSOR_MISSING", {INDEX: index(a=ONE, b=TWO, c=TWO), **both}, "The index places a tensor in a file that lacks it.", tensor="c")
    bad("tensor-elsewhere", "INDEX_TENSOR_MISSING", {INDEX: index(a=TWO, b=TWO), **both}, "The tensor is in another file than the index says.", tensor="a")
    bad("tensor-twice", "INDEX_TENSOR_TWICE", {ONE: shard(a), TWO: shard(a)}, "Two files without an index hold one name.", tensor="a")
    bad("shard-missing", "INDEX_SHARD_MISSING", {ONE: shard(a)}, "The names say two files; one is there.")
    three = "model-00003-of-00003.safetensors"
    bad("shard-middle-missing", "INDEX_SHARD_MISSING", {"model-00001-of-00003.safetensors": shard(a), three: shard(b)}, "The second of three files is missing.")
    bad("not-regular", "INDEX_NOT_REGULAR", {INDEX: index(a="part.safetensors"), "part.safetensors/keep.txt": b"\n"}, "The index names a folder.")
    bad("path-escape", "INDEX_PATH", {INDEX: index(a="../two-shards/" + ONE)}, "The index leads out of its folder by name.")
    bad("bad-shard", "TRAILING_DATA", {INDEX: index(a=ONE, b=TWO), ONE: shard(a), TWO: shard(b) + b"\0"}, "A file of the checkpoint is malformed.")
    bad("bad-index", "JSON_SYNTAX", {INDEX: b'{"weight_map":{', **both}, "A broken index is an error, not a reason to do without it.")
    link = [{"path": ONE, "target": f"../two-shards/{ONE}"}]
    bad("symlink-escape", "INDEX_ESCAPES", {INDEX: index(a=ONE)}, "A symbolic link leads out of the folder.", links=link)
    inner = {INDEX: index(a="link.safetensors"), "real/one.safetensors": shard(a)}
    inside = [{"path": "link.safetensors", "target": "real/one.safetensors"}]
    c.directory("directory/symlink-inside", inner, "accept", "A symbolic link that stays inside the folder.", expect=expect((a, "link.safetensors")), links=inside)
    parent = [{"path": "part", "target": "../two-shards"}]
    bad("symlink-folder", "INDEX_ESCAPES", {INDEX: index(a=f"part/{ONE}")}, "A folder on the way is a symbolic link that leads out.", links=parent)
