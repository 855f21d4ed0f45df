"""Chapter 6 and the names of chapter 4: how tensors tile the data section, overflow, budgets."""

from .build import T, payload, quirk, text_of

TOP = 2**61 - 1  # bytes of the largest tensor whose bits fit 64 bits


def add(c):
    tiling(c)
    empty(c)
    shapes(c)
    overflow(c)
    names(c)
    limits(c)


def tiling(c):
    a, b = T("a", "U8", [4], 0, 4), T("b", "U8", [4], 4, 8)
    c.ok("layout/two", "Two tensors back to back.", [a, b])
    c.ok("layout/key-order", "Keys come in any order; offsets decide.", [b, a])
    c.ok("layout/unsorted-names", "Names need no order.", [T("z", "U8", [1], 0, 1), T("a", "U8", [1], 1, 2), T("m", "U8", [1], 2, 3)])
    c.ok("layout/unaligned", "No tensor needs alignment: an F32 begins at byte 3.", [T("a", "U8", [3], 0, 3), T("b", "F32", [1], 3, 7)])
    c.ok("layout/shuffled-many", "A hundred tensors in an order of their own.", [T(f"t{i}", "U8", [2], 2 * i, 2 * i + 2) for i in sorted(range(100), key=lambda i: i * 37 % 100)])
    for name, tensors, size, culprit, why in [
        ("hole-start", [T("a", "U8", [4], 4, 8)], 8, "a", "Four bytes before the first tensor belong to none."),
        ("hole-middle", [a, T("b", "U8", [4], 5, 9)], 9, "b", "One byte between two tensors belongs to none."),
        ("hole-alignment", [T("a", "U8", [3], 0, 3), T("b", "F32", [1], 4, 8)], 8, "b", "Not even for alignment may a byte lie between tensors."),
        ("hole-key-order", [T("b", "U8", [4], 5, 9), a], 9, "b", "A hole is a hole whatever the order of keys."),
        ("hole-far", [a, T("b", "U8", [4], 2**40, 2**40 + 4)], 8, "b", "A hole of a terabyte."),
    ]:
        c.bad(f"layout/{name}", "HOLE", why, text_of(tensors), payload(size), culprit)
    for name, tensors, size, culprit, why in [
        ("overlap-partial", [a, T("b", "U8", [4], 3, 7)], 7, "b", "One byte belongs to two tensors."),
        ("overlap-contained", [T("a", "U8", [8], 0, 8), T("b", "U8", [2], 2, 4)], 8, "b", "A tensor inside another."),
        ("overlap-prefix", [a, T("b", "U8", [8], 0, 8)], 8, "b", "Two tensors begin at one byte."),
        ("overlap-alias", [a, T("b", "U8", [4], 0, 4)], 4, "b", "Two names for the same bytes."),
        ("overlap-three", [a, b, T("c", "U8", [4], 6, 10)], 10, "c", "The third overlaps the second."),
    ]:
        c.bad(f"layout/{name}", "OVERLAP", why, text_of(tensors), payload(size), culprit if name != "overlap-alias" else None)
    c.bad("layout/reversed", "OFFSETS_REVERSED", "A range that ends before it begins.", text_of([T("a", "U8", [4], 4, 0)]), payload(4), "a")
    c.bad("layout/reversed-empty", "OFFSETS_REVERSED", "No dimension of zero excuses a reversed range.", text_of([T("a", "U8", [0], 4, 0)]), payload(4), "a")
    c.bad("layout/size-short", "SIZE_MISMATCH", "Four bytes for a shape of five.", text_of([T("a", "U8", [5], 0, 4)]), payload(4), "a")
    c.bad("layout/size-long", "SIZE_MISMATCH", "Four bytes for a shape of three.", text_of([T("a", "U8", [3], 0, 4)]), payload(4), "a")
    c.bad("layout/size-empty-shape", "SIZE_MISMATCH", "A shape with a zero takes no bytes.", text_of([T("a", "U8", [4, 0], 0, 4)]), payload(4), "a")
    c.bad("layout/size-empty-range", "SIZE_MISMATCH", "An empty range for a tensor with elements.", text_of([T("a", "U8", [4], 0, 0)]), b"", "a")
    c.bad("layout/size-scalar", "SIZE_MISMATCH", "A scalar is one element, not none.", text_of([T("a", "F32", [], 0, 0)]), b"", "a")
    c.bad("layout/truncated-by-one", "DATA_TRUNCATED", "The last byte is missing.", text_of([a, b]), payload(7))
    c.bad("layout/truncated-all", "DATA_TRUNCATED", "A header without its data.", text_of([a, b]))
    c.bad("layout/trailing-byte", "TRAILING_DATA", "One byte follows the last tensor.", text_of([a]), payload(5))
    c.bad("layout/trailing-page", "TRAILING_DATA", "Zero bytes up to a page boundary follow the last tensor.", text_of([a]), payload(4) + bytes(508))
    c.bad("layout/trailing-no-tensors", "TRAILING_DATA", "Data without tensors.", "{}", payload(4))
    c.bad("layout/trailing-only-empty", "TRAILING_DATA", "Data beside tensors that are all empty.", text_of([T("a", "U8", [0], 0, 0)]), payload(4))


def empty(c):
    a, b = T("a", "U8", [4], 0, 4), T("b", "U8", [4], 4, 8)
    for name, tensors, why in [
        ("only", [T("e", "F32", [0], 0, 0)], "One empty tensor and no data."),
        ("start", [T("e", "F32", [0], 0, 0), a], "An empty tensor before the first byte."),
        ("start-after-neighbour", [a, T("e", "F32", [0], 0, 0)], "The same, listed after its neighbour."),
        ("middle", [a, T("e", "F32", [2, 0], 4, 4), b], "An empty tensor between two tensors."),
        ("middle-listed-last", [a, b, T("e", "F32", [2, 0], 4, 4)], "The same, listed last."),
        ("end", [a, T("e", "F32", [0, 7], 4, 4)], "An empty tensor after the last byte."),
        ("many-at-once", [a, T("e1", "U8", [0], 4, 4), T("e2", "F64", [0, 0], 4, 4), T("e3", "BOOL", [1, 0, 1], 4, 4), b], "Several empty tensors at one place."),
        ("all-places", [T("e0", "U8", [0], 0, 0), a, T("e4", "U8", [0], 4, 4), b, T("e8", "U8", [0], 8, 8)], "Empty tensors at every boundary."),
    ]:
        c.ok(f"empty/{name}", why, tensors)
    c.bad("empty/inside", "EMPTY_INSIDE", "An empty tensor inside another.", text_of([a, T("e", "U8", [0], 2, 2)]), payload(4), "e")
    c.bad("empty/inside-listed-first", "EMPTY_INSIDE", "The order of keys does not matter.", text_of([T("e", "U8", [0], 1, 1), a]), payload(4), "e")
    c.bad("empty/past-end", "HOLE", "An empty tensor after a hole at the end.", text_of([a, T("e", "U8", [0], 8, 8)]), payload(4), "e")
    c.bad("empty/past-end-alone", "HOLE", "An empty tensor at byte 8 of no data.", text_of([T("e", "U8", [0], 8, 8)]), b"", "e")
    c.bad("empty/in-hole", "HOLE", "An empty tensor does not fill a hole.", text_of([a, T("e", "U8", [0], 5, 5), T("b", "U8", [4], 6, 10)]), payload(10), "e")


def shapes(c):
    for rank in (1, 2, 4, 8, 9, 32, 33, 64, 65, 1000):
        c.ok(f"shape/rank-{rank}", f"Rank {rank}.", [T("t", "U8", [1] * (rank - 1) + [3], 0, 3)])
    c.ok("shape/rank-1000-zero", "A thousand dimensions with a zero among them.", [T("t", "U8", [1] * 500 + [0] + [2] * 10 + [1] * 489, 0, 0)])
    c.ok("shape/ones", "Dimensions of one.", [T("t", "F32", [1, 1, 1], 0, 4)])
    c.ok("shape/integer-2-53", "An extent above 2^53 beside a zero is exact.", [T("t", "U8", [2**53 + 1, 0], 0, 0)])
    c.ok("shape/largest-empty", "The largest extent whose bits fit 64 bits, beside a zero.", [T("t", "U8", [TOP, 0], 0, 0)])
    c.bad("shape/rounds-in-double", "SIZE_MISMATCH", "2^53+1 elements are not 2^53, and not one.", text_of([T("t", "U8", [2**53 + 1], 0, 1)]), payload(1), "t")


def overflow(c):
    for name, dtype, shape, why in [
        ("mul-wrap-zero", "U8", [2**32, 2**32], "2^64 elements are none after truncation to 64 bits."),
        ("mul-wrap-small", "U8", [2**33, 2**33, 2], "2^67 elements."),
        ("bits-only", "U8", [2**61], "2^61 bytes fit 64 bits, but their bits do not."),
        ("f64-elements", "F64", [2**58], "2^58 elements of 64 bits."),
        ("many-twos", "U8", [2] * 64, "64 dimensions of two."),
        ("many-twos-200", "U8", [2] * 200, "200 dimensions of two."),
        ("largest", "U8", [2**63 - 1, 2**63 - 1], "The largest extents."),
        ("f4", "F4", [2**62], "2^64 bits of F4."),
        ("before-zero", "U8", [2**62, 8, 0], "A zero at the end excuses no overflow before it."),
    ]:
        c.bad(f"overflow/{name}", "SIZE_OVERFLOW", why, text_of([T("t", dtype, shape, 0, 0)]), b"", "t")
    late = "A zero excuses no overflow, whatever the order of dimensions."
    for name, shape in [("after-zero", [0, 2**62, 8]), ("between", [2**60, 0, 2**60]), ("zero-times-bits", [2**62, 0]), ("two-then-zero", [2**32, 2**31, 0])]:
        tensor = T("t", "U8", shape, 0, 0)
        c.bad(f"overflow/{name}", "SIZE_OVERFLOW", late, text_of([tensor]), b"", "t", quirk("ORDERED_ZERO_OVERFLOW", [tensor]))
    for name, shape in [("u64-after-zero", [0, 2**63, 4]), ("u64-max-zero", [2**64 - 1, 0]), ("u64-zero-max", [0, 2**64 - 1])]:
        tensor = T("t", "U8", shape, 0, 0)
        c.bad(f"overflow/{name}", "INTEGER_RANGE", "Extents stop at 2^63-1 even beside a zero.", text_of([tensor]), b"", "t", quirk("FULL_U64", [tensor]))
    c.bad("overflow/u64-before-zero", "INTEGER_RANGE", "Extents stop at 2^63-1.", text_of([T("t", "U8", [2**63, 4, 0], 0, 0)]), b"", "t")
    c.bad("overflow/largest-size", "SIZE_MISMATCH", "The largest size that fits is still not the range's.", text_of([T("t", "U8", [TOP], 0, 1)]), payload(1), "t")
    c.bad("overflow/largest-range", "DATA_TRUNCATED", "2^61-1 bytes are announced; one is there.", text_of([T("t", "U8", [TOP], 0, TOP)]), payload(1))
    three = [T(f"t{i}", "U8", [TOP], i * TOP, (i + 1) * TOP) for i in range(3)]
    c.bad("overflow/sum-in-range", "DATA_TRUNCATED", "Three ranges whose sum fits 63 bits.", text_of(three), payload(1))
    eight = [T(f"t{i}", "U8", [TOP], i * TOP, (i + 1) * TOP) for i in range(8)]
    c.bad("overflow/sum-wrap", "INTEGER_RANGE", "Prefix, header and data add up past 2^64.", text_of(eight), payload(1), "t4")
    last = T("t8", "U8", [7], 8 * TOP, 8 * TOP + 7)
    c.bad("overflow/sum-wrap-to-max", "INTEGER_RANGE", "The last range ends at 2^64-1.", text_of([*eight, last]), payload(1), "t4")
    c.bad("overflow/offset-max", "HOLE", "The largest offsets.", text_of([T("t", "U8", [1], 2**63 - 2, 2**63 - 1)]), payload(1), "t")
    c.bad("overflow/empty-at-max", "HOLE", "An empty tensor at the largest offset.", text_of([T("t", "U8", [0], 2**63 - 1, 2**63 - 1)]), b"", "t")


def names(c):
    def one(name):
        return [T(name, "U8", [4], 0, 4)]

    for id, name, why in [
        ("empty", "", "The empty string is a name."),
        ("space", " ", "A space is a name."),
        ("nul", "\0", "A NUL is a character like others."),
        ("controls", "\x01\x1b[31m\x7f\x9b", "Control characters are allowed and must be escaped when shown."),
        ("bidi", "a\u202etxt.exe\u202c", "Bidirectional marks are allowed and must be escaped when shown."),
        ("zero-width", "a\u200bb\ufeff", "Zero-width characters are allowed."),
        ("proto", "__proto__", "`__proto__` is a name; JavaScript readers lose it in plain objects."),
        ("path", "../../etc/passwd", "A name is never a path."),
        ("slashes", "a/b\\c", "Slashes and backslashes have no meaning."),
        ("html", "<script>alert(1)</script>&amp;", "Markup has no meaning and must be escaped when shown."),
        ("quote", 'say "hi"', "Quotes are escaped in JSON."),
        ("newline", "a\nb", "A newline is allowed, escaped."),
        ("dtype", "dtype", "Field names are names of tensors too."),
        ("number", "0", "A name of digits."),
        ("emoji", "👩‍👩‍👧", "A name of several code points that looks like one."),
        ("long", "n" * 4096, "A name of 4 KiB."),
        ("64-kib", "layer." * 10923, "A name of 64 KiB."),
    ]:
        c.ok(f"name/{id}", why, one(name))
    c.ok("name/nfc-and-nfd", "Names are not normalised: these two look alike and differ.", [T("é", "U8", [1], 0, 1), T("e\u0301", "U8", [1], 1, 2)])
    c.ok("name/object-keys", "Names of JavaScript's own properties.", [T(name, "U8", [1], i, i + 1) for i, name in enumerate(["__proto__", "constructor", "toString", "hasOwnProperty", "length"])])
    c.ok("name/prefixes", "Names that begin alike.", [T("a" * (i + 1), "U8", [1], i, i + 1) for i in range(20)])
    c.ok("name/500-tensors", "Five hundred tensors.", [T(f"model.layers.{i}.weight", "BF16", [1], 2 * i, 2 * i + 2) for i in range(500)])


def limits(c):
    a, b = T("a", "U8", [2, 2], 0, 4), T("b", "U8", [2, 2, 1], 4, 8)
    text = text_of([a, b])
    c.limit("limit/header", "LIMIT_HEADER", "A header longer than the caller's budget.", {"header_bytes": len(text) - 1}, [a, b])
    c.limit("limit/tensors", "LIMIT_TENSORS", "More tensors than the caller's budget.", {"tensors": 1}, [a, b])
    c.limit("limit/rank", "LIMIT_RANK", "A tensor of more dimensions than the caller's budget.", {"rank": 2}, [a, b], tensor="b")
    c.limit("limit/dims", "LIMIT_DIMS", "More dimensions in all than the caller's budget.", {"dims": 4}, [a, b])
    c.limit("limit/metadata", "LIMIT_METADATA", "More metadata entries than the caller's budget.", {"metadata_entries": 1}, [a, b], {"k": "1", "l": "2"})
