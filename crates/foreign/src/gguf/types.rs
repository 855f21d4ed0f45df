//! Types of tensors: the table is `tonnage-quant`'s; here is what of it a container needs.

use tonnage_format::Dtype;
pub use tonnage_quant::ggml::GgmlType;

use super::error::Reason;

pub(crate) fn from_id(id: u32) -> Option<GgmlType> {
    // Types that are for activations only are in no file of a known writer, and their blocks are as any other.
    GgmlType::from_id(id).ok()
}

/// The dtype of a type whose blocks are single numbers.
pub fn dtype_of(ty: GgmlType) -> Option<Dtype> {
    Some(match ty {
        GgmlType::F32 => Dtype::F32,
        GgmlType::F16 => Dtype::F16,
        GgmlType::BF16 => Dtype::BF16,
        GgmlType::F64 => Dtype::F64,
        GgmlType::I8 => Dtype::I8,
        GgmlType::I16 => Dtype::I16,
        GgmlType::I32 => Dtype::I32,
        GgmlType::I64 => Dtype::I64,
        _ => return None,
    })
}

/// Bytes that a tensor takes at most, and elements that it has: their bits are counted in 64 bits further on,
/// and of an empty tensor of blocks the extents other than that of a row are all that is counted.
const MOST_BYTES: u64 = u64::MAX / 8;

/// Bytes of a tensor of this type and row-major shape.
pub(crate) fn byte_len(ty: GgmlType, shape: &[u64]) -> Result<u64, Reason> {
    let (elements, bytes) = (ty.elements() as u64, ty.bytes() as u64);
    // A tensor without dimensions is one number.
    let row = shape.last().copied().unwrap_or(1);
    if elements == 0 || row % elements != 0 {
        return Err(Reason::Row);
    }
    // Extents other than zero are multiplied whatever stands between them, so their order does not matter.
    let product = |shape: &[u64]| {
        let mut extents = shape.iter().filter(|&&extent| extent != 0);
        extents.try_fold(1_u64, |product, &extent| product.checked_mul(extent))
    };
    let all = product(shape).filter(|&all| all <= MOST_BYTES);
    let len = all.and_then(|all| (all / elements).max(1).checked_mul(bytes));
    match len.filter(|&len| len <= MOST_BYTES) {
        None => Err(Reason::SizeOverflow),
        Some(_) if shape.contains(&0) => Ok(0),
        Some(len) => Ok(len),
    }
}

/// Numbers of more than one byte in a block: where each begins, and its bytes. `None` where nobody says what
/// the block looks like in a file of the other byte order.
///
/// The blocks are those of which ggml's own converter (`gguf_convert_endian.py`) says it.
pub(crate) fn swaps(ty: GgmlType) -> Option<&'static [(u16, u8)]> {
    Some(match ty {
        GgmlType::I8 | GgmlType::MXFP4 | GgmlType::NVFP4 => &[],
        GgmlType::F16 | GgmlType::BF16 | GgmlType::I16 => &[(0, 2)],
        GgmlType::F32 | GgmlType::I32 => &[(0, 4)],
        GgmlType::F64 | GgmlType::I64 => &[(0, 8)],
        GgmlType::Q4_0 | GgmlType::Q8_0 => &[(0, 2)],
        GgmlType::Q4_K => &[(0, 2), (2, 2)],
        GgmlType::Q6_K => &[(208, 2)],
        _ => return None,
    })
}
