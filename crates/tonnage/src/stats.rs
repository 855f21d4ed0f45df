//! What the values of a tensor are like, in one pass and constant memory.

use tonnage_format::Dtype;

use crate::values::{decode, is_real};

/// Elements that callers hand over at a time: whole bytes in every dtype, and small enough for the
/// decoded values to stay in the cache.
pub const BLOCK_ELEMENTS: usize = 1 << 15;

/// Bytes of a block of [`BLOCK_ELEMENTS`] elements.
pub fn block_bytes(dtype: Dtype) -> usize {
    BLOCK_ELEMENTS * dtype.bitsize() / 8
}

/// The summary of a tensor's values. Of complex tensors only `count` is known.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Summary {
    /// Elements.
    pub count: u64,
    /// Smallest finite value.
    pub min: Option<f64>,
    /// Largest finite value.
    pub max: Option<f64>,
    /// Mean of the finite values.
    pub mean: Option<f64>,
    /// Standard deviation of the finite values (of the population, not a sample).
    pub std: Option<f64>,
    /// Elements that are not a number.
    pub nan: u64,
    /// Elements that are infinite.
    pub inf: u64,
    /// Elements that are zero, of either sign.
    pub zeros: u64,
}

/// Collects a [`Summary`] block by block.
#[derive(Clone, Debug)]
pub struct Stats {
    dtype: Dtype,
    values: Vec<f64>,
    summary: Summary,
    finite: u64,
    mean: f64,
    /// Sum of squared distances from the mean.
    spread: f64,
}

impl Stats {
    /// Nothing seen yet.
    pub fn new(dtype: Dtype) -> Self {
        let (values, summary) = (Vec::new(), Summary::default());
        Stats {
            dtype,
            values,
            summary,
            finite: 0,
            mean: 0.0,
            spread: 0.0,
        }
    }

    /// Adds the elements in `bytes`: whole elements that fill whole bytes.
    pub fn update(&mut self, bytes: &[u8]) {
        if !is_real(self.dtype) {
            self.summary.count += (bytes.len() * 8 / self.dtype.bitsize()) as u64;
            return;
        }
        let mut values = std::mem::take(&mut self.values);
        for block in bytes.chunks(block_bytes(self.dtype)) {
            values.clear();
            decode(self.dtype, block, &mut values);
            self.block(&values);
        }
        self.values = values;
    }

    /// Two passes over a block that is in the cache, then joined to what was seen before by Chan's
    /// formula: as exact as two passes over everything.
    fn block(&mut self, values: &[f64]) {
        let (mut min, mut max) = (f64::INFINITY, f64::NEG_INFINITY);
        let (mut finite, mut sum) = (0_u64, 0.0);
        for &value in values {
            if value.is_finite() {
                finite += 1;
                sum += value;
                min = min.min(value);
                max = max.max(value);
                self.summary.zeros += (value == 0.0) as u64;
            } else if value.is_nan() {
                self.summary.nan += 1;
            } else {
                self.summary.inf += 1;
            }
        }
        self.summary.count += values.len() as u64;
        if finite == 0 {
            return;
        }
        self.summary.min = Some(self.summary.min.map_or(min, |old| old.min(min)));
        self.summary.max = Some(self.summary.max.map_or(max, |old| old.max(max)));
        let mean = sum / finite as f64;
        let distances = values
            .iter()
            .filter(|value| value.is_finite())
            .map(|value| (value - mean).powi(2));
        let spread: f64 = distances.sum();
        let (before, all) = (self.finite as f64, (self.finite + finite) as f64);
        let delta = mean - self.mean;
        self.mean += delta * finite as f64 / all;
        self.spread += spread + delta * delta * before * finite as f64 / all;
        self.finite += finite;
    }

    /// The summary of all that was added.
    pub fn finish(self) -> Summary {
        let known = self.finite > 0;
        let std = (self.spread / self.finite.max(1) as f64).sqrt();
        Summary {
            mean: known.then_some(self.mean),
            std: known.then_some(std),
            ..self.summary
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(values: &[f32]) -> Summary {
        let mut stats = Stats::new(Dtype::F32);
        let bytes: Vec<u8> = values.iter().flat_map(|v| v.to_le_bytes()).collect();
        for part in bytes.chunks(8) {
            stats.update(part);
        }
        stats.finish()
    }

    #[test]
    fn a_summary_counts_and_measures() {
        let summary = of(&[1.0, 2.0, 3.0, 4.0, 0.0, -0.0, f32::NAN, f32::INFINITY]);
        assert_eq!(
            (summary.count, summary.nan, summary.inf, summary.zeros),
            (8, 1, 1, 2)
        );
        assert_eq!((summary.min, summary.max), (Some(0.0), Some(4.0)));
        assert!((summary.mean.unwrap() - 10.0 / 6.0).abs() < 1e-12);
        assert!((summary.std.unwrap() - (80.0_f64 / 36.0).sqrt()).abs() < 1e-12);
        assert_eq!(of(&[]), Summary::default());
        assert_eq!(of(&[f32::NAN]).mean, None);
    }

    #[test]
    fn complex_tensors_are_counted() {
        let mut stats = Stats::new(Dtype::C64);
        stats.update(&[0; 24]);
        assert_eq!(
            stats.finish(),
            Summary {
                count: 3,
                ..Summary::default()
            }
        );
        assert_eq!(block_bytes(Dtype::F4) * 2, BLOCK_ELEMENTS);
    }
}
