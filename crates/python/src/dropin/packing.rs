//! Dtypes smaller than a byte, for frameworks that keep one element a byte (`ml_dtypes`).
//!
//! Elements lie least significant bit first (spec 5.3): of a byte, the first F4 element is the low nibble;
//! of three bytes, the first F6 element is the low six bits of the first.

use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;
use pyo3::types::PyBytes;

/// Spreads packed elements of `bits` (4 or 6) out, one a byte, in the byte's low bits.
pub fn unpack(packed: &[u8], bits: u32, elements: &mut [u8]) {
    let mask = (1_u32 << bits) - 1;
    let (mut window, mut have) = (0_u32, 0_u32);
    let mut bytes = packed.iter();
    for element in elements {
        if have < bits {
            window |= u32::from(bytes.next().copied().unwrap_or(0)) << have;
            have += 8;
        }
        *element = (window & mask) as u8;
        window >>= bits;
        have -= bits;
    }
}

/// Elements of `bits` (4 or 6), one a byte, from the packed bytes of that many whole elements.
#[pyfunction]
#[pyo3(name = "_unpack", signature = (packed, bits))]
pub fn unpacked<'py>(py: Python<'py>, packed: &[u8], bits: u32) -> PyResult<Bound<'py, PyBytes>> {
    if !(bits == 4 || bits == 6) {
        let text = format!("elements of {bits} bits are not packed");
        return Err(PyValueError::new_err(text));
    }
    let len = packed.len() / bits as usize * 8 + packed.len() % bits as usize * 8 / bits as usize;
    PyBytes::new_with(py, len, |elements| {
        unpack(packed, bits, elements);
        Ok(())
    })
}

/// Packs elements given one a byte, in the byte's low bits, `bits` (4 or 6) each.
///
/// Raises `ValueError` where they don't fill whole bytes.
#[pyfunction]
#[pyo3(name = "_pack", signature = (elements, bits))]
pub fn pack<'py>(py: Python<'py>, elements: &[u8], bits: u32) -> PyResult<Bound<'py, PyBytes>> {
    if !(bits == 4 || bits == 6) || !(elements.len() * bits as usize).is_multiple_of(8) {
        let text = format!(
            "{} elements of {bits} bits do not fill whole bytes",
            elements.len()
        );
        return Err(PyValueError::new_err(text));
    }
    let len = elements.len() * bits as usize / 8;
    PyBytes::new_with(py, len, |out| {
        let (mut window, mut have) = (0_u32, 0_u32);
        let mut out = out.iter_mut();
        for &element in elements {
            window |= (u32::from(element) & ((1 << bits) - 1)) << have;
            have += bits;
            if have >= 8 {
                if let Some(byte) = out.next() {
                    *byte = window as u8;
                }
                window >>= 8;
                have -= 8;
            }
        }
        Ok(())
    })
}
