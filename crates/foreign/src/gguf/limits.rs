//! Budgets of a reader, passed in as a value (docs/gguf.md, chapter 8).

/// How much a reader is willing to take on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Bytes of the header: metadata and the table of tensors. Default 512 MiB: tokenizers make the largest
    /// ones seen, 7 to 20 MB; whatever this says, no more is asked for than the file has.
    pub header_bytes: u64,
    /// Metadata entries. Default 65,536: real files have dozens.
    pub keys: u64,
    /// Tensors of one file. Default 1,048,576: the largest models have thousands.
    pub tensors: u64,
    /// Bytes of a key or of a tensor's name. Default 65,535, which the format gives for keys.
    pub name_bytes: u64,
    /// How deep arrays nest. Default 4: no writer is known to nest them at all.
    pub depth: u32,
}

impl Default for Limits {
    fn default() -> Self {
        Limits {
            header_bytes: 512 << 20,
            keys: 1 << 16,
            tensors: 1 << 20,
            name_bytes: u16::MAX as u64,
            depth: 4,
        }
    }
}
