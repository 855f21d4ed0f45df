//! How far two tensors of one shape are apart, in one pass and constant memory.

use tonnage_format::Dtype;

use crate::stats::{BLOCK_ELEMENTS, block_bytes};
use crate::values::{decode, is_real};

/// The distance between two tensors, element by element.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Difference {
    /// Elements compared.
    pub count: u64,
    /// Elements whose values differ. Two NaNs agree, and so do 0.0 and -0.0.
    pub different: u64,
    /// Largest distance of two finite values.
    pub max_abs: f64,
    /// Mean distance over all pairs of finite values, equal ones included.
    pub mean_abs: f64,
    /// Pairs of which one only is NaN or infinite, or that are infinities of opposite sign; they
    /// count as different and have no distance.
    pub not_finite: u64,
}

/// Collects a [`Difference`] block by block.
#[derive(Clone, Debug)]
pub struct ValueDiff {
    dtypes: (Dtype, Dtype),
    values: (Vec<f64>, Vec<f64>),
    found: Difference,
    sum: f64,
    finite: u64,
}

impl ValueDiff {
    /// Nothing compared yet. The dtypes may differ: values are compared, not bits.
    pub fn new(left: Dtype, right: Dtype) -> Self {
        let (values, found) = (Default::default(), Difference::default());
        ValueDiff {
            dtypes: (left, right),
            values,
            found,
            sum: 0.0,
            finite: 0,
        }
    }

    /// Adds the next elements of both: as many on the left as on the right, whole bytes of each. A
    /// caller with much data hands over blocks of [`BLOCK_ELEMENTS`] elements.
    pub fn update(&mut self, left: &[u8], right: &[u8]) {
        let (a, b) = self.dtypes;
        if a == b && left == right {
            let count = (left.len() * 8 / a.bitsize()) as u64;
            self.found.count += count;
            // Equal bits have distance 0, but a NaN has none; the mean is over what has one.
            self.finite += count - self.count_not_finite(left);
            return;
        }
        if !is_real(a) || !is_real(b) {
            self.update_opaque(left, right);
            return;
        }
        let (mut x, mut y) = std::mem::take(&mut self.values);
        for (left, right) in left
            .chunks(block_bytes(a))
            .zip(right.chunks(block_bytes(b)))
        {
            x.clear();
            y.clear();
            decode(a, left, &mut x);
            decode(b, right, &mut y);
            x.iter().zip(&y).for_each(|(&x, &y)| self.pair(x, y));
        }
        self.values = (x, y);
    }

    fn pair(&mut self, x: f64, y: f64) {
        self.found.count += 1;
        if x.is_finite() && y.is_finite() {
            let distance = (x - y).abs();
            self.finite += 1;
            self.sum += distance;
            self.found.max_abs = self.found.max_abs.max(distance);
            self.found.different += (x != y) as u64;
        } else if !(x == y || x.is_nan() && y.is_nan()) {
            self.found.different += 1;
            self.found.not_finite += 1;
        }
    }

    fn count_not_finite(&mut self, bytes: &[u8]) -> u64 {
        let dtype = self.dtypes.0;
        if dtype.row().kind != tonnage_format::Kind::Float {
            return 0;
        }
        let values = &mut self.values.0;
        let mut count = 0;
        for block in bytes.chunks(block_bytes(dtype)) {
            values.clear();
            decode(dtype, block, values);
            count += values.iter().filter(|value| !value.is_finite()).count() as u64;
        }
        count
    }

    /// Complex numbers have a distance of their own, the length of their difference.
    fn update_opaque(&mut self, left: &[u8], right: &[u8]) {
        let parts = |bytes: &[u8], dtype: Dtype| -> Vec<(f64, f64)> {
            let mut values = Vec::new();
            let complex = !is_real(dtype);
            decode(if complex { Dtype::F32 } else { dtype }, bytes, &mut values);
            if !complex {
                return values.into_iter().map(|real| (real, 0.0)).collect();
            }
            values
                .as_chunks()
                .0
                .iter()
                .map(|&[re, im]| (re, im))
                .collect()
        };
        let (a, b) = self.dtypes;
        for (left, right) in left
            .chunks(block_bytes(a))
            .zip(right.chunks(block_bytes(b)))
        {
            for (x, y) in parts(left, a).into_iter().zip(parts(right, b)) {
                let finite = [x.0, x.1, y.0, y.1].iter().all(|part| part.is_finite());
                match (x == y, finite) {
                    (_, true) => self.pair((x.0 - y.0).hypot(x.1 - y.1), 0.0),
                    (true, false) => self.found.count += 1,
                    (false, false) => self.pair(f64::NAN, 0.0),
                }
            }
        }
    }

    /// The difference over all that was added.
    pub fn finish(mut self) -> Difference {
        self.found.mean_abs = self.sum / self.finite.max(1) as f64;
        self.found
    }
}

/// Bytes of each side of a block of [`BLOCK_ELEMENTS`] elements.
pub fn block_lens(left: Dtype, right: Dtype) -> (usize, usize) {
    debug_assert!(BLOCK_ELEMENTS.is_multiple_of(8));
    (block_bytes(left), block_bytes(right))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn f32s(values: &[f32]) -> Vec<u8> {
        values.iter().flat_map(|v| v.to_le_bytes()).collect()
    }

    fn diff(a: Dtype, left: &[u8], b: Dtype, right: &[u8]) -> Difference {
        let mut diff = ValueDiff::new(a, b);
        diff.update(left, right);
        diff.finish()
    }

    #[test]
    fn distances_are_of_values() {
        let found = diff(
            Dtype::F32,
            &f32s(&[1.0, 2.0, f32::NAN, 0.0, f32::INFINITY, 1.0]),
            Dtype::F32,
            &f32s(&[1.0, 2.5, f32::NAN, -0.0, f32::INFINITY, f32::NAN]),
        );
        assert_eq!((found.count, found.different, found.not_finite), (6, 2, 1));
        assert_eq!((found.max_abs, found.mean_abs), (0.5, 0.5 / 3.0));
    }

    #[test]
    fn equal_bits_differ_in_nothing_and_the_mean_counts_what_has_a_distance() {
        let same = f32s(&[1.0, f32::NAN, 3.0]);
        let mut diff = ValueDiff::new(Dtype::F32, Dtype::F32);
        diff.update(&same, &same);
        diff.update(&f32s(&[1.0]), &f32s(&[4.0]));
        let found = diff.finish();
        assert_eq!((found.count, found.different, found.max_abs), (4, 1, 3.0));
        assert_eq!(found.mean_abs, 1.0);
    }

    #[test]
    fn dtypes_may_differ() {
        let found = diff(
            Dtype::F32,
            &f32s(&[1.0, 1.001]),
            Dtype::BF16,
            &[0x80, 0x3F, 0x80, 0x3F],
        );
        assert_eq!((found.count, found.different), (2, 1));
        assert!(found.max_abs > 0.0009 && found.max_abs < 0.0011);
        assert_eq!(
            block_lens(Dtype::F32, Dtype::F4),
            (4 * BLOCK_ELEMENTS, BLOCK_ELEMENTS / 2)
        );
    }

    #[test]
    fn complex_numbers_have_the_length_of_their_difference() {
        let found = diff(
            Dtype::C64,
            &f32s(&[0.0, 0.0, 1.0, 1.0, f32::NAN, 0.0]),
            Dtype::C64,
            &f32s(&[3.0, 4.0, 1.0, 1.0, 0.0, 0.0]),
        );
        assert_eq!((found.count, found.different, found.not_finite), (3, 2, 1));
        assert_eq!((found.max_abs, found.mean_abs), (5.0, 2.5));
    }
}
