"""Chapter 13: checksums in metadata.

The CRC here is a second implementation, bit by bit, from the definition in clause 13.3.
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


def value(data, length=None, sums=None):
    if sums is None:
        sums = [crc64(data)] if data else []
    packed = b"".join(each.to_bytes(8, "little") for each in sums)
    length = len(data) if length is None else length
    return f"crc64-nvme;{CHUNK};{length};{base64.b64encode(packed).decode()}"


def add(c):
    assert crc64(b"123456789") == 0xAE8B14860A799888
    tensors = [T("a", "F32", [2], 0, 8), T("b", "U8", [5], 8, 13)]
    data = payload(13, 41)

    def case(name, why, text, code=None, data=data, tensors=tensors, more=None, **extra):
        metadata = {**(more or {})} if text is None else {**(more or {}), KEY: text}
        blob = container(text_of(tensors, metadata or None), data)
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
