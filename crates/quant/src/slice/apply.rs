//! Cuts carried out on bytes in memory.

use super::Step;
use crate::error::{Error, Reason};
use crate::scheme::Part;

/// The bytes of a part after steps. For parts of whole bytes an element.
///
/// # Errors
/// The bytes are not the part's, or a step does not fit it.
pub fn apply(part: &Part, bytes: &[u8], steps: &[Step]) -> Result<Vec<u8>, Error> {
    let size = part.dtype.bitsize() / 8;
    let wrong = |text: String| Error::new(Reason::Usage, text);
    let elements = |shape: &[u64]| {
        let all = shape.iter().try_fold(1_u64, |n, &len| n.checked_mul(len));
        all.and_then(|n| usize::try_from(n).ok())
    };
    if size == 0 || elements(&part.shape).and_then(|n| n.checked_mul(size)) != Some(bytes.len()) {
        return Err(wrong(format!(
            "{} bytes for {:?} {:?}",
            bytes.len(),
            part.name,
            part.shape
        )));
    }
    let (mut shape, mut bytes) = (part.shape.clone(), bytes.to_vec());
    for step in steps {
        let refused = || wrong(format!("{step:?} of {:?} {shape:?}", part.name));
        match step {
            Step::Reshape(to) => {
                if elements(to) != elements(&shape) {
                    return Err(refused());
                }
                shape.clone_from(to);
            }
            &Step::Slice { dim, start, stop } => {
                let (lead, rest) = shape.split_at_checked(dim).ok_or_else(refused)?;
                let (&len, rest) = rest.split_first().ok_or_else(refused)?;
                if start > stop || stop > len {
                    return Err(refused());
                }
                let row = elements(rest).ok_or_else(refused)? * size;
                let keep = start as usize * row..stop as usize * row;
                let mut kept = Vec::with_capacity(elements(lead).ok_or_else(refused)? * keep.len());
                for one in bytes.chunks_exact((len as usize * row).max(1)) {
                    kept.extend_from_slice(one.get(keep.clone()).ok_or_else(refused)?);
                }
                bytes = kept;
                shape[dim] = stop - start;
            }
            &Step::Each { dim, times } => {
                let rest = shape.get(dim + 1..).ok_or_else(refused)?;
                let row = (elements(rest).ok_or_else(refused)? * size).max(1);
                let times = usize::try_from(times).map_err(|_| refused())?;
                bytes = bytes
                    .chunks_exact(row)
                    .flat_map(|one| std::iter::repeat_n(one, times))
                    .flatten()
                    .copied()
                    .collect();
                shape[dim] *= times as u64;
            }
        }
    }
    Ok(bytes)
}
