//! A Python index — `int`, `slice`, `...`, a tuple of these, an empty list — as ranges of a tensor.

use pyo3::exceptions::PyOverflowError;
use pyo3::intern;
use pyo3::prelude::*;
use pyo3::types::{PyBool, PyEllipsis, PyList, PySlice, PyTuple};
use tonnage::format::slice::Range;

use crate::error::{self, Fields, Kind};

/// What an index takes of a tensor.
#[derive(Debug, Default)]
pub struct Index {
    /// One range a dimension, for the dimensions that the index speaks of.
    pub ranges: Vec<Range>,
    /// Whether each of these dimensions stays in the result: an `int` drops its own.
    pub kept: Vec<bool>,
    /// The index as the reference's messages show it.
    shown: Vec<String>,
}

/// What a bound past the end of a dimension means.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Bounds {
    /// As much as there is, as in Python.
    Clamp,
    /// An error.
    Check,
}

/// Why there is no [`Index`].
pub enum Refusal {
    /// The index is wrong.
    Error(PyErr),
    /// The index is of a kind that only some frameworks have: a list, `None`, a mask.
    Foreign(PyErr),
}

impl From<PyErr> for Refusal {
    fn from(error: PyErr) -> Self {
        Refusal::Error(error)
    }
}

fn unsupported(text: &str) -> Refusal {
    Refusal::Foreign(error::usage("SLICE", text))
}

impl Index {
    /// Reads an index of a tensor of this shape.
    pub fn parse(key: &Bound<'_, PyAny>, shape: &[u64], bounds: Bounds) -> Result<Self, Refusal> {
        let items: Vec<Bound<'_, PyAny>> = match key.cast::<PyTuple>() {
            Ok(tuple) => tuple.iter().collect(),
            Err(_) => vec![key.clone()],
        };
        let is_ellipsis = |item: &Bound<'_, PyAny>| item.is_instance_of::<PyEllipsis>();
        let ellipses = items.iter().filter(|item| is_ellipsis(item)).count();
        if ellipses > 1 {
            let text = "Only one ellipsis (...) is allowed in slice index";
            return Err(error::argument("SLICE", text).into());
        }
        let skipped = shape.len().saturating_sub(items.len() - ellipses);
        let mut index = Index::default();
        for item in &items {
            if is_ellipsis(item) {
                for _ in 0..skipped {
                    let extent = shape.get(index.ranges.len()).copied().unwrap_or(0);
                    index.push(Range::full(extent), true, ":".to_owned());
                }
            } else {
                index.item(item, shape, bounds)?;
            }
        }
        if index.ranges.len() > shape.len() {
            return Err(index
                .outside(shape, "more slicing indexes than dimensions in tensor")
                .into());
        }
        Ok(index)
    }

    /// The shape of the result.
    pub fn shape(&self, shape: &[u64]) -> Vec<u64> {
        let taken = |(axis, &extent): (usize, &u64)| match self.ranges.get(axis) {
            None => Some(extent),
            Some(range) => self
                .kept
                .get(axis)
                .copied()
                .unwrap_or(true)
                .then(|| range.len()),
        };
        shape.iter().enumerate().filter_map(taken).collect()
    }

    fn push(&mut self, range: Range, kept: bool, shown: String) {
        self.ranges.push(range);
        self.kept.push(kept);
        self.shown.push(shown);
    }

    fn item(
        &mut self,
        item: &Bound<'_, PyAny>,
        shape: &[u64],
        bounds: Bounds,
    ) -> Result<(), Refusal> {
        let axis = self.ranges.len();
        let extent = shape.get(axis).copied();
        if let Ok(list) = item.cast::<PyList>() {
            if !list.is_empty() {
                return Err(unsupported("Non empty lists are not implemented"));
            }
            self.push(
                Range {
                    start: 0,
                    stop: 0,
                    step: 1,
                },
                true,
                "0:0".to_owned(),
            );
            return Ok(());
        }
        if let Ok(slice) = item.cast::<PySlice>() {
            return self.slice(slice, shape, extent, bounds);
        }
        let number = if item.is_instance_of::<PyBool>() {
            None
        } else {
            integer(item)?
        };
        let Some(number) = number else {
            return Err(unsupported(&format!(
                "Unsupported slice index at position {axis}: expected slice, int, or ellipsis"
            )));
        };
        // Past the last dimension any number will do: the whole index is refused for its length.
        let size = extent.unwrap_or(u64::MAX);
        let resolved = if number < 0 {
            size.checked_sub(number.unsigned_abs()).ok_or_else(|| {
                let text = format!("Invalid index {number} for dimension {axis} of size {size}");
                error::raise(
                    Kind::Index,
                    &text,
                    Fields {
                        code: "SLICE",
                        ..Fields::default()
                    },
                )
            })?
        } else {
            number.unsigned_abs()
        };
        let range = Range {
            start: resolved,
            stop: resolved.saturating_add(1),
            step: 1,
        };
        self.push(range, false, resolved.to_string());
        self.within(shape, extent, resolved, axis)
    }

    fn slice(
        &mut self,
        slice: &Bound<'_, PySlice>,
        shape: &[u64],
        extent: Option<u64>,
        bounds: Bounds,
    ) -> Result<(), Refusal> {
        let py = slice.py();
        let start = optional(&slice.getattr(intern!(py, "start"))?)?;
        let stop = optional(&slice.getattr(intern!(py, "stop"))?)?;
        let step = optional(&slice.getattr(intern!(py, "step"))?)?.unwrap_or(1);
        if step <= 0 {
            let text = format!("Slice step must be a positive integer, got {step}");
            return Err(error::argument("SLICE", &text).into());
        }
        let bound = |bound: Option<i64>| bound.map(|b| b.to_string()).unwrap_or_default();
        let mut shown = format!("{}:{}", bound(start), bound(stop));
        if step != 1 {
            shown.push_str(&format!(":{step}"));
        }
        let axis = self.ranges.len();
        let size = extent.unwrap_or(0);
        let resolve = |bound: Option<i64>, default: u64| match bound {
            None => default,
            Some(bound) if bound < 0 => size.saturating_sub(bound.unsigned_abs()),
            Some(bound) => bound.unsigned_abs(),
        };
        let (first, end) = (resolve(start, 0), resolve(stop, size));
        let range = Range {
            start: first.min(size),
            stop: end.min(size),
            step: step.unsigned_abs(),
        };
        self.push(range, true, shown);
        if bounds == Bounds::Check && extent.is_some() {
            if end > size {
                self.within(shape, extent, end - 1, axis)?;
            }
            if first > size {
                self.within(shape, extent, first, axis)?;
            }
        }
        Ok(())
    }

    fn within(
        &self,
        shape: &[u64],
        extent: Option<u64>,
        asked: u64,
        axis: usize,
    ) -> Result<(), Refusal> {
        match extent {
            Some(size) if asked >= size => {
                let why = format!(
                    "index {asked} out of bounds for tensor dimension #{axis} of size {size}"
                );
                Err(self.outside(shape, &why).into())
            }
            _ => Ok(()),
        }
    }

    /// An index that the tensor does not have.
    fn outside(&self, shape: &[u64], why: &str) -> PyErr {
        let shown = self.shown.join(", ");
        let text = format!("Error during slicing [{shown}] with shape {shape:?}: {why}");
        error::raise(
            Kind::Index,
            &text,
            Fields {
                code: "SLICE",
                ..Fields::default()
            },
        )
    }

    /// A slice that the format cannot give, with the index shown.
    pub fn refuse(&self, shape: &[u64], reason: &tonnage::format::Error, tensor: &str) -> PyErr {
        let shown = self.shown.join(", ");
        let context = format!("Error during slicing [{shown}] with shape {shape:?}");
        error::format(&context, &reason.clone().tensor(tensor), None)
    }
}

/// An integer, cut to 64 bits; `None` for what is no integer.
fn integer(item: &Bound<'_, PyAny>) -> PyResult<Option<i64>> {
    match item.extract::<i64>() {
        Ok(number) => Ok(Some(number)),
        Err(error) if error.is_instance_of::<PyOverflowError>(item.py()) => {
            Ok(Some(if item.lt(0)? { i64::MIN } else { i64::MAX }))
        }
        Err(_) => Ok(None),
    }
}

/// A slice's bound: an integer or `None`.
fn optional(bound: &Bound<'_, PyAny>) -> PyResult<Option<i64>> {
    if bound.is_none() {
        return Ok(None);
    }
    let refused =
        || pyo3::exceptions::PyTypeError::new_err("slice bounds must be integers or None");
    integer(bound)?.map(Some).ok_or_else(refused)
}
