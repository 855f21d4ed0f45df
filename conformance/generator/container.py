"""Chapter 2 and the frame of chapter 3: the prefix, the length, what may stand around the object."""

from .build import T, container, payload, text_of

A = T("a", "U8", [4], 0, 4)
DATA = payload(4)


def add(c):
    prefix(c)
    lengths(c)
    encoding(c)
    framing(c)
    not_an_object(c)


def prefix(c):
    c.raw("container/empty-file", "FILE_TOO_SMALL", "A file of no bytes has no prefix.", b"")
    c.raw("container/one-byte", "FILE_TOO_SMALL", "One byte is no prefix.", b"\x02")
    c.raw("container/seven-bytes", "FILE_TOO_SMALL", "Seven bytes are one short of the prefix.", b"\x02" + bytes(6))
    c.raw("container/prefix-only-zero", "HEADER_TOO_SHORT", "A prefix of zero announces no header.", bytes(8))
    c.raw("container/zero-length-with-data", "HEADER_TOO_SHORT", "A zero prefix stays refused whatever follows.", bytes(8) + b"{}")
    c.raw("container/length-one", "HEADER_TOO_SHORT", "One byte cannot hold an object.", container("{", length=1))
    c.ok("container/smallest", "Two bytes of header, no tensor, no data: the smallest file.", [], text="{}")


def lengths(c):
    text = text_of([A])
    c.raw("container/length-past-end", "HEADER_PAST_END", "The header is announced one byte longer than the file.", container(text, b"", len(text) + 1))
    c.raw("container/length-only", "HEADER_PAST_END", "The prefix announces a header that does not follow.", (64).to_bytes(8, "little"))
    c.raw("container/cut-header", "HEADER_PAST_END", "A download that stopped inside the header.", container(text)[:-20])
    c.raw("container/length-at-cap", "HEADER_PAST_END", "100,000,000 is allowed as a length, so only the missing bytes refuse this file.", container("{}", length=100_000_000))
    c.raw("container/length-over-cap", "HEADER_TOO_LARGE", "100,000,001 is over the cap.", container("{}", length=100_000_001))
    c.raw("container/length-2-31", "HEADER_TOO_LARGE", "A length that is negative as a signed 32-bit integer.", container("{}", length=1 << 31))
    c.raw("container/length-2-32-plus-2", "HEADER_TOO_LARGE", "A length that is 2 after truncation to 32 bits.", container("{}", length=(1 << 32) + 2))
    c.raw("container/length-2-63", "HEADER_TOO_LARGE", "A length that is negative as a signed 64-bit integer.", container("{}", length=1 << 63))
    c.raw("container/length-max", "HEADER_TOO_LARGE", "Adding 8 to this length wraps around.", container("{}", length=(1 << 64) - 1))
    c.raw("container/length-wraps-to-file", "HEADER_TOO_LARGE", "Prefix and length add up to the file's size modulo 2^64.", container("{}", length=(1 << 64) - 6))
    c.raw("container/big-endian-length", "HEADER_TOO_LARGE", "The length is little-endian.", (len(text)).to_bytes(8, "big") + text.encode() + DATA)
    c.raw("container/git-lfs-pointer", "HEADER_TOO_LARGE", "A Git LFS pointer in place of the file.", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 4\n")
    c.raw("container/html-page", "HEADER_TOO_LARGE", "An error page in place of the file.", b"<!DOCTYPE html><html><body>404</body></html>")
    c.raw("container/zip-archive", "HEADER_TOO_LARGE", "The first bytes of a zip archive, as PyTorch writes.", b"PK\x03\x04\x00\x00\x08\x08\x00\x00\x00\x00")
    c.bad("container/length-one-short", "JSON_SYNTAX", "The length stops before the closing brace, which then counts as data.", text, DATA, length=len(text) - 1)
    c.bad("container/length-eats-data", "FRAMING", "The length reaches one byte into the data.", text, b"\x00" + DATA[1:], length=len(text) + 1)


def encoding(c):
    bad = [
        ("ff", b"\xff", "The byte FF never occurs in UTF-8."),
        ("overlong", b"\xc0\xaf", "An overlong form of `/`."),
        ("overlong-nul", b"\xc0\x80", "Modified UTF-8 for NUL is not UTF-8."),
        ("surrogate", b"\xed\xa0\x80", "An encoded surrogate is not UTF-8."),
        ("above-10ffff", b"\xf4\x90\x80\x80", "A code point above U+10FFFF."),
        ("truncated", b"\xe2\x82", "A sequence that is cut short."),
        ("lone-continuation", b"\x80", "A continuation byte on its own."),
    ]
    for name, piece, why in bad:
        text = text_of([A]).encode().replace(b'"a"', b'"' + piece + b'"')
        c.bad(f"utf8/name-{name}", "INVALID_UTF8", why, text, DATA)
    meta = b'{"__metadata__":{"k":"\xe9"}}'
    c.bad("utf8/metadata-latin1", "INVALID_UTF8", "Latin-1 text in a metadata value.", meta)
    skipped = b'{"a":{"dtype":"U8","shape":[4],"data_offsets":[0,4],"x":"\xfe"}}'
    c.bad("utf8/skipped-field", "INVALID_UTF8", "The whole header is UTF-8, fields that are skipped included.", skipped, DATA)
    c.bad("utf8/padding", "INVALID_UTF8", "The whole header is UTF-8, its padding included.", text_of([A]).encode() + b"\xa0", DATA)
    c.bad("utf8/utf16-bom", "INVALID_UTF8", "A header in UTF-16.", b"\xff\xfe" + text_of([A]).encode("utf-16-le"), DATA)
    c.bad("utf8/bom", "BYTE_ORDER_MARK", "A header begins with no byte order mark.", b"\xef\xbb\xbf" + text_of([A]).encode(), DATA)
    c.bad("utf8/bom-alone", "BYTE_ORDER_MARK", "A byte order mark and nothing else.", b"\xef\xbb\xbf")
    c.ok("utf8/four-byte-name", "Names are Unicode: one to four bytes a character.", [T("é€😀", "U8", [4], 0, 4)])
    c.ok("utf8/last-code-point", "U+10FFFF is a character like others.", [T("\U0010ffff", "U8", [1], 0, 1)])
    c.ok("utf8/noncharacters", "Noncharacters such as U+FFFE and U+FFFF are valid UTF-8.", [T("\ufffe\uffff", "U8", [1], 0, 1)])
    c.ok("utf8/bom-inside-name", "U+FEFF inside a string is a character, not a mark.", [T("\ufeffa", "U8", [1], 0, 1)])


def framing(c):
    body = text_of([A])
    for name, pad, why in [
        ("spaces", "   ", "Spaces pad the header."),
        ("newline", "\n", "A newline after the object is whitespace."),
        ("tab", "\t", "A tab after the object is whitespace."),
        ("return", "\r\n", "Carriage return and newline are whitespace."),
        ("page", " " * (4096 - 8 - len(body)), "Padding that puts the data on a page boundary."),
    ]:
        c.ok(f"framing/trailing-{name}", why, [A], text=body + pad)
    for name, pad, why in [
        ("space", " ", "A reader tolerates a space before the object."),
        ("mixed", " \t\r\n", "A reader tolerates whitespace of every kind before the object."),
    ]:
        c.ok(f"framing/leading-{name}", why, [A], text=pad + body)
    spaced = '{ "a" :\t{"dtype" : "U8" ,\n "shape" : [ 4 ] , "data_offsets" : [ 0 , 4 ] } } '
    c.ok("framing/inner-whitespace", "Whitespace may stand between any two tokens.", [A], text=spaced)
    c.ok("framing/unpadded", "A reader needs no padding: data may begin at any byte.", [A], text=body)
    for name, piece, why in [
        ("nul", "\0\0\0\0", "Zero bytes are no padding, though some writers make them."),
        ("form-feed", "\f", "Form feed is not JSON whitespace."),
        ("vertical-tab", "\v", "Vertical tab is not JSON whitespace."),
        ("nbsp", "\u00a0", "A no-break space is not JSON whitespace."),
        ("line-separator", "\u2028", "U+2028 is not JSON whitespace."),
        ("letter", "x", "Nothing but whitespace follows the object."),
        ("brace", "}", "One brace too many."),
        ("second-object", "{}", "A header is one object."),
        ("bom", "\ufeff", "A byte order mark is no padding."),
        ("after-spaces", "    x", "Spaces do not excuse what comes after them."),
    ]:
        c.bad(f"framing/trailing-{name}", "FRAMING", why, body + piece, DATA)
    for name, piece, why in [
        ("nul", "\0", "A zero byte before the object."),
        ("form-feed", "\f", "Form feed is not JSON whitespace."),
        ("letter", "x", "Only whitespace may stand before the object."),
        ("comma", ",", "Only whitespace may stand before the object."),
    ]:
        c.bad(f"framing/leading-{name}", "FRAMING", why, piece + body, DATA)


def not_an_object(c):
    for name, text, why in [
        ("array", "[]", "The header is an object, not an array."),
        ("array-of-object", "[{}]", "An object inside an array is not the header's object."),
        ("null", "null", "The header is an object, not null."),
        ("true", "true", "The header is an object, not a literal."),
        ("number", "12", "The header is an object, not a number."),
        ("string", '"{}"', "The header is an object, not a string."),
        ("deep-arrays", "[" * 200 + "]" * 200, "Nested arrays are not an object, however deep."),
    ]:
        c.bad(f"framing/{name}", "NOT_AN_OBJECT", why, text)
    c.bad("framing/only-spaces", "JSON_SYNTAX", "A header of whitespace alone holds no object.", " " * 16)
