//! Constants that may never move: every file ever written depends on them (spec 12.1).

/// Bytes of the length prefix, an unsigned little-endian integer (spec 2.1).
pub const PREFIX_LEN: u64 = 8;
/// Most bytes that a header may have, decimal and inclusive (spec 2.3).
pub const MAX_HEADER_LEN: u64 = 100_000_000;
/// Fewest bytes that a header may have: `{}` (spec 2.2).
pub const MIN_HEADER_LEN: u64 = 2;
/// Largest size or offset (spec 3.10).
pub const MAX_INTEGER: u64 = i64::MAX as u64;
/// The key of the metadata object (spec 7.1).
pub const METADATA_KEY: &str = "__metadata__";
/// Header and prefix together are a multiple of this in what we write (spec 9.8).
pub const HEADER_ALIGN: u64 = 8;
/// The same on request, so that the data section starts on a page (spec 9.9).
pub const PAGE_ALIGN: u64 = 4096;
/// The byte that pads a header (spec 9.8).
pub const PAD: u8 = b' ';
/// Extension of a file.
pub const EXTENSION: &str = "safetensors";
/// What the name of an index file ends with (spec 8.1).
pub const INDEX_SUFFIX: &str = ".safetensors.index.json";
/// The metadata key of a file's checksums (spec 13.1).
pub const CHECKSUMS_KEY: &str = "safetensors.checksums";
/// The algorithm, as its value names it (spec 13.1).
pub const CHECKSUM_ALGORITHM: &str = "crc64-nvme";
/// Bytes of a chunk that has a sum of its own (spec 13.2).
pub const CHECKSUM_CHUNK: u64 = 8_388_608;
/// What the name of a file's BLAKE3 sidecar ends with, after the file's own (spec 13.14).
pub const SIDECAR_SUFFIX: &str = ".b3";

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_shipped_stays() {
        let numbers = [
            PREFIX_LEN,
            MAX_HEADER_LEN,
            MIN_HEADER_LEN,
            HEADER_ALIGN,
            PAGE_ALIGN,
        ];
        assert_eq!(numbers, [8, 100_000_000, 2, 8, 4096]);
        assert_eq!(MAX_INTEGER, 9_223_372_036_854_775_807);
        assert_eq!((METADATA_KEY, PAD), ("__metadata__", 0x20));
        assert_eq!(
            (EXTENSION, INDEX_SUFFIX),
            ("safetensors", ".safetensors.index.json")
        );
        assert_eq!(
            (CHECKSUMS_KEY, CHECKSUM_ALGORITHM, CHECKSUM_CHUNK),
            ("safetensors.checksums", "crc64-nvme", 8_388_608)
        );
        assert_eq!(SIDECAR_SUFFIX, ".b3");
    }
}
