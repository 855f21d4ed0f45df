"""Chapter 13: checksums in metadata.

The CRC here is a second implementation, bit by bit, from the definition in clause 13.3, and the BLAKE3 hash one from
the paper, for inputs of one chunk.
"""

import base64

from .build import T, container, payload, text_of

CHUNK = 8_388_608
KEY = "safetensors.checksums"


def crc64(data):
    """CRC-64/NVME, reflected: the polynomial's bits stand the other way round."""
    crc = 2**64 - 1
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = crc >> 1 ^ (0x9A6C9329AC4BC9B5 if crc & 1 else 0)
    return crc ^ 2**64 - 1


IV = [0x6A09E667, 0xBB67AE85, 0x3C6EF372, 0xA54FF53A, 0x510E527F, 0x9B05688C, 0x1F83D9AB, 0x5BE0CD19]
ORDER = [2, 6, 3, 10, 7, 0, 4, 13, 1, 11, 12, 5, 9, 14, 15, 8]
COLUMNS = [(0, 4, 8, 12), (1, 5, 9, 13), (2, 6, 10, 14), (3, 7, 11, 15)]
DIAGONALS = [(0, 5, 10, 15), (1, 6, 11, 12), (2, 7, 8, 13), (3, 4, 9, 14)]


def turn(word, bits):
    return (word >> bits | word << 32 - bits) & 0xFFFFFFFF


def compress(chain, words, length, flags):
    v = chain + IV[:4] + [0, 0, length, flags]
    for _ in range(7):
        for (a, b, c, d), x, y in zip(COLUMNS + DIAGONALS, words[::2], words[1::2], strict=True):
            for word, left, right in ((x, 16, 12), (y, 8, 7)):
                v[a] = (v[a] + v[b] + word) & 0xFFFFFFFF
                v[d] = turn(v[d] ^ v[a], left)
                v[c] = (v[c] + v[d]) & 0xFFFFFFFF
                v[b] = turn(v[b] ^ v[c], right)
        words = [words[at] for at in ORDER]
    return [v[at] ^ v[at + 8] for at in range(8)]


def blake3(data):
    """BLAKE3 of at most 1024 bytes: one chunk, which is the root."""
    assert len(data) <= 1024
    chain, blocks = IV, [data[at : at + 64] for at in range(0, len(data), 64)] or [b""]
    for at, block in enumerate(blocks):
        flags = (1 if at == 0 else 0) | (2 | 8 if at == len(blocks) - 1 else 0)
        padded = block.ljust(64, b"\0")
        words = [int.from_bytes(padded[i : i + 4], "little") for i in range(0, 64, 4)]
        chain = compress(chain, words, len(block), flags)
    return b"".join(word.to_bytes(4, "little") for word in chain).hex()


def value(data, length=None, sums=None):
    if sums is None:
        sums = [crc64(data)] if data else []
    packed = b"".join(each.to_bytes(8, "little") for each in sums)
    length = len(data) if length is None else length
    return f"crc64-nvme;{CHUNK};{length};{base64.b64encode(packed).decode()}"


def add(c):
    assert crc64(b"123456789") == 0xAE8B14860A799888
    assert blake3(b"") == "af1349b9f5f9a1a6a0404dea36dcc9499bcb25c9adc112b7cc9a93cae41f3262"
    tensors = [T("a", "F32", [2], 0, 8), T("b", "U8", [5], 8, 13)]
    data = payload(13, 41)

    def case(name, why, text, code=None, data=data, tensors=tensors, more=None, **extra):
        metadata = {**(more or {})} if text is None else {**(more or {}), KEY: text}
        blob = container(text_of(tensors, metadata or None), data)
        if code == "CHECKSUM_MISMATCH":
            extra["chunk"] = {"offset": len(blob) - len(data), "bytes": len(data)}
        c.checksums(f"checksums/{name}", blob, tensors, metadata or None, why, code, **extra)

    good = value(data)
    case("good", "One chunk, and its sum.", good)
    case("beside-others", "Other metadata stands beside the checksums.", good, more={"format": "pt"})
    case("none", "A file without checksums.", None, more={"format": "pt"})
    case("empty", "No data has no chunks.", value(b""), data=b"", tensors=[])
    case("empty-tensor", "Nor has a tensor without elements.", value(b""), data=b"", tensors=[T("e", "F32", [0], 0, 0)])
    case("other-algorithm", "An algorithm of a later version is metadata like any other.", "sha256;8388608;13;AAAA")
    case("other-chunk", "So is another size of chunks.", "crc64-nvme;4096;13;AAAA")
    case("not-ours", "So is a text of any kind.", "checksums: see README")
    case("flip-first", "The first bit of the data is another.", good, "CHECKSUM_MISMATCH", data=bytes([data[0] ^ 1]) + data[1:])
    case("flip-last", "The last bit of the data is another.", good, "CHECKSUM_MISMATCH", data=data[:-1] + bytes([data[-1] ^ 0x80]))
    one = [T("only", "U8", [13], 0, 13)]
    case("flip-one-tensor", "One tensor lies in the chunk, so it is named.", good, "CHECKSUM_MISMATCH", tensors=one, data=data[:6] + b"\0" + data[7:], tensor="only")
    case("zeroed", "The data is zeros, as after a power cut.", good, "CHECKSUM_MISMATCH", data=bytes(13))
    case("wrong-sum", "The sum of other data of the same length.", value(data, sums=[crc64(payload(13, 42))]), "CHECKSUM_MISMATCH")
    case("big-endian", "A sum with its bytes the other way round.", value(data, sums=[int.from_bytes(crc64(data).to_bytes(8, "little"), "big")]), "CHECKSUM_MISMATCH")
    case("stale-longer", "Checksums of more data.", value(data, length=14), "CHECKSUM_STALE")
    case("stale-shorter", "Checksums of less data.", value(data, length=12), "CHECKSUM_STALE")
    case("stale-empty", "Checksums of no data.", value(b""), "CHECKSUM_STALE")
    case("too-few", "No sum for the chunk.", value(data, sums=[]), "CHECKSUM_FORM")
    case("too-many", "Two sums for one chunk.", value(data, sums=[crc64(data)] * 2), "CHECKSUM_FORM")
    case("three-fields", "The sums are missing, and their separator too.", f"crc64-nvme;{CHUNK};13", "CHECKSUM_FORM")
    case("five-fields", "A separator after the sums.", good + ";", "CHECKSUM_FORM")
    case("leading-zero", "The length is no number in the form of clause 3.9.", good.replace(";13;", ";013;"), "CHECKSUM_FORM")
    case("signed", "Nor has it a sign.", good.replace(";13;", ";+13;"), "CHECKSUM_FORM")
    case("no-padding", "Base64 without its padding.", good.rstrip("="), "CHECKSUM_FORM")
    case("url-alphabet", "Base64 of the other alphabet.", value(data, sums=[0xFFFBFFFBFFFBFFFB]).replace("+", "-").replace("/", "_"), "CHECKSUM_FORM")
    case("unused-bits", "Unused bits of base64 are zero.", value(data, sums=[0])[:-2] + "B=", "CHECKSUM_FORM")
    case("newline", "No whitespace in base64.", good[:-4] + "\n" + good[-4:], "CHECKSUM_FORM")

    def beside(name, why, text=None, code=None, damage=None, sums=None):
        """A file with a sidecar; `text` is made of the right hash and the file's name."""
        metadata = None if sums is None else {KEY: sums}
        blob = container(text_of(tensors, metadata), data)
        line = (text or "{hash}  {name}\n").format(hash=blake3(blob), name=f"{name}.safetensors", upper=blake3(blob).upper())
        blob = blob if damage is None else damage(blob)
        c.checksums(f"checksums/{name}", blob, tensors, metadata, why, code, sidecar=line.encode())

    mismatch, form = "CHECKSUM_MISMATCH", "CHECKSUM_FORM"
    beside("b3-good", "The hash of the whole file lies beside it.")
    beside("b3-and-sums", "A file may have both, and both are right.", sums=good)
    beside("b3-flip-data", "The last bit of the data is another.", code=mismatch, damage=lambda blob: blob[:-1] + bytes([blob[-1] ^ 1]))
    beside("b3-wrong", "The hash of something else.", f"{blake3(b'')}  {{name}}\n", mismatch)
    beside("b3-other-name", "The hash of a file of another name says nothing of this one.", "{hash}  other.safetensors\n", form)
    beside("b3-folder", "The name is without folders.", "{hash}  checksums/{name}\n", form)
    beside("b3-upper-case", "The digits are lower-case.", "{upper}  {name}\n", form)
    beside("b3-short", "A hash has 64 digits.", "{hash:.62}  {name}\n", form)
    beside("b3-one-space", "Two spaces stand behind the hash.", "{hash} {name}\n", form)
    beside("b3-star", "The star of other tools' binary mode is no space.", "{hash} *{name}\n", form)
    beside("b3-no-newline", "The line ends in a newline.", "{hash}  {name}", form)
    beside("b3-carriage-return", "Nothing stands before it.", "{hash}  {name}\r\n", form)
    beside("b3-two-lines", "A sidecar has one line.", "{hash}  {name}\n{hash}  {name}\n", form)
    beside("b3-hash-alone", "The name is missing.", "{hash}\n", form)
    beside("b3-empty", "Nothing at all.", "{hash:.0}", form)
