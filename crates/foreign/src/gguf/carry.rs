//! What of a GGUF file is no tensor, carried in safetensors so that the file can be made again, byte for byte
//! (docs/gguf.md, chapter 9).
//!
//! The header travels whole, as a tensor of bytes: with it come metadata, order, types, offsets and alignment.
//! What lies between tensors is zero in every file of a known writer, and travels only where it is not.

use super::error::{Error, Reason};
use super::header::Gguf;
use super::limits::Limits;

/// Name of the tensor that carries a header; with `.00001` and so on behind it where there are several files.
pub const HEADER: &str = "gguf.header";
/// Name of the tensor that carries what lies between tensors, where some of it is not zero.
pub const PADDING: &str = "gguf.padding";
/// Metadata: the length of each file, in decimal, with commas between them.
pub const LENGTHS: &str = "gguf.lengths";

/// Names and bytes of tensors, and metadata.
pub type Carried = (Vec<(String, Vec<u8>)>, Vec<(String, String)>);

/// The name that `HEADER` or `PADDING` has for the file at `position` of `count`.
pub fn numbered(name: &str, position: usize, count: usize) -> String {
    match count {
        1 => name.to_owned(),
        _ => format!("{name}.{:05}", position + 1),
    }
}

/// Whether a tensor of this name carries something and is none of the model's.
pub fn is_carried(name: &str) -> bool {
    let rest = name
        .strip_prefix(HEADER)
        .or_else(|| name.strip_prefix(PADDING));
    rest.is_some_and(|rest| rest.is_empty() || rest.starts_with('.'))
}

/// The ranges of a file that belong to no tensor, behind its header: begin and end, ascending.
pub fn gaps(gguf: &Gguf) -> Vec<(u64, u64)> {
    let mut gaps = Vec::new();
    let mut at = gguf.bytes().len() as u64;
    for tensor in gguf
        .by_offset()
        .into_iter()
        .filter_map(|at| gguf.tensor(at))
    {
        if tensor.offset > at {
            gaps.push((at, tensor.offset));
        }
        at = tensor.offset.saturating_add(tensor.len);
    }
    if gguf.file_len() > at {
        gaps.push((at, gguf.file_len()));
    }
    gaps
}

/// What is to be carried of some files: names and bytes of tensors, and metadata. What lies between the
/// tensors is asked of `read(file, begin, end)`.
///
/// # Errors
/// [`Reason::Carried`] for a tensor whose name is taken; what `read` says.
pub fn carried_files<E: From<Error>>(
    files: &[&Gguf],
    mut read: impl FnMut(usize, u64, u64) -> Result<Vec<u8>, E>,
) -> Result<Carried, E> {
    let mut tensors = Vec::new();
    for (position, gguf) in files.iter().enumerate() {
        if let Some(taken) = gguf.tensors().find(|tensor| is_carried(tensor.name)) {
            return Err(Error::new(Reason::Carried).tensor(taken.name).into());
        }
        let name = numbered(HEADER, position, files.len());
        tensors.push((name, gguf.bytes().to_vec()));
        let mut padding = Vec::new();
        for (begin, end) in gaps(gguf) {
            padding.extend(read(position, begin, end)?);
        }
        if padding.iter().any(|&byte| byte != 0) {
            tensors.push((numbered(PADDING, position, files.len()), padding));
        }
    }
    let lengths: Vec<String> = files
        .iter()
        .map(|file| file.file_len().to_string())
        .collect();
    Ok((tensors, vec![(LENGTHS.to_owned(), lengths.join(","))]))
}

/// The lengths of the files that are carried.
pub fn carried_lengths(metadata: &str) -> Result<Vec<u64>, Error> {
    let parse = |text: &str| text.parse::<u64>().ok();
    let lengths: Option<Vec<u64>> = metadata.split(',').map(parse).collect();
    lengths.ok_or_else(|| {
        let wrong = Error::new(Reason::Carried).key(LENGTHS).found(metadata);
        wrong.needed("decimal numbers with commas between them")
    })
}

/// The header that was carried.
///
/// # Errors
/// As [`Gguf::parse`]; [`Reason::Carried`] if bytes follow the header.
pub fn restored(bytes: Vec<u8>, file_len: u64) -> Result<Gguf, Error> {
    let len = bytes.len();
    // The file may be larger than its header by anything: that what it says lies within it is checked.
    let gguf = Gguf::parse(bytes, file_len, &Limits::default())?;
    if gguf.bytes().len() != len {
        let wrong = Error::new(Reason::Carried).tensor(HEADER);
        let wrong = wrong.found(format_args!("{len} bytes"));
        return Err(wrong.needed(gguf.bytes().len()));
    }
    Ok(gguf)
}
