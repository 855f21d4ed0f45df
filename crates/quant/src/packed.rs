//! A quantised tensor in memory: what its parts mean, and their bytes.

use std::collections::BTreeMap;
use std::ops::Range;

use crate::descriptor::{Float, Role};
use crate::error::{Error, Reason};
use crate::ggml;
use crate::interpret::{Bytes, interpret, round_to};
use crate::map::{Meaning, QTensor};
use crate::scheme::bits_of;

/// A quantised tensor with its bytes.
#[derive(Clone, Debug, PartialEq)]
pub struct Packed {
    /// What it is.
    pub tensor: QTensor,
    /// The bytes of its parts.
    pub bytes: BTreeMap<Role, Vec<u8>>,
}

/// What differs between the values of two tensors.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Difference {
    /// How many elements there are.
    pub elements: u64,
    /// How many of them have another value. Zeros of either sign are one value, and so are NaN.
    pub changed: u64,
    /// The largest difference of two values.
    pub largest: f32,
}

impl Packed {
    /// A tensor and its bytes, which must be as long as dtypes and shapes of the parts say.
    ///
    /// # Errors
    /// A part is missing, or its bytes are of another length.
    pub fn new(tensor: QTensor, bytes: BTreeMap<Role, Vec<u8>>) -> Result<Self, Error> {
        for (role, part) in &tensor.parts {
            let there = bytes.get(role).map(|bytes| bytes.len() as u64);
            let needed = bits_of(part)?.div_ceil(8);
            if there != Some(needed) {
                return Err(Error::new(
                    Reason::Size,
                    format!(
                        "{:?} has {there:?} bytes, {} {:?} needs {needed}",
                        part.name, part.dtype, part.shape
                    ),
                )
                .of(&tensor.name));
            }
        }
        Ok(Packed { tensor, bytes })
    }

    /// The bytes of the parts.
    pub fn view(&self) -> Bytes<'_> {
        let parts = self.bytes.iter();
        parts.map(|(role, bytes)| (*role, &bytes[..])).collect()
    }

    /// The bytes of one part.
    pub(crate) fn part(&self, role: Role) -> Result<&[u8], Error> {
        let missing = || Error::new(Reason::Missing, format!("the part {role:?} is missing"));
        self.bytes.get(&role).map(|b| &b[..]).ok_or_else(missing)
    }

    /// The shape by whose rows values are read: that of the layout, which may be another view of the tensor's own.
    ///
    /// # Errors
    /// The parts don't fit their scheme.
    pub fn layout_shape(&self) -> Result<Vec<u64>, Error> {
        match self.tensor.meaning {
            Meaning::Ggml(_) => Ok(self.tensor.shape.clone()),
            _ => Ok(self.tensor.describe()?.shape),
        }
    }

    /// The values of some rows of [`Packed::layout_shape`], rounded to the tensor's dtype.
    ///
    /// # Errors
    /// The parts don't fit their scheme, the rows are not there, or the family is opaque.
    pub fn values(&self, rows: Range<u64>, out: &mut [f32]) -> Result<(), Error> {
        let named = |error: Error| error.of(&self.tensor.name);
        let Meaning::Ggml(ty) = self.tensor.meaning else {
            let meaning = self.tensor.describe()?;
            return interpret(&meaning, &self.view(), rows, out).map_err(named);
        };
        let columns = self.tensor.shape.last().copied().unwrap_or(0);
        let row = ty.row_bytes(columns).map_err(from_ggml).map_err(named)?;
        let place = |at: u64| at.checked_mul(row).and_then(|at| usize::try_from(at).ok());
        let bytes = place(rows.start)
            .zip(place(rows.end))
            .and_then(|(start, end)| self.bytes.get(&Role::Codes)?.get(start..end))
            .ok_or_else(|| {
                let text = format!("rows {} to {} are not there", rows.start, rows.end);
                named(Error::new(Reason::Usage, text))
            })?;
        ggml::dequantize(ty, bytes, out)
            .map_err(from_ggml)
            .map_err(named)?;
        let whole = self.global_scale()?.unwrap_or(1.0);
        for value in out {
            *value = round_to(self.tensor.dtype, *value * whole);
        }
        Ok(())
    }

    /// The scale of a whole tensor of ggml's blocks.
    pub(crate) fn global_scale(&self) -> Result<Option<f32>, Error> {
        let Some(bytes) = self.bytes.get(&Role::GlobalScale) else {
            return Ok(None);
        };
        match bytes.first_chunk() {
            Some(four) => Ok(Some(f32::from_le_bytes(*four))),
            None => {
                Err(Error::new(Reason::Size, "the tensor's scale is no F32").of(&self.tensor.name))
            }
        }
    }

    /// All values, by pieces of whole rows: `each` gets the place of the first and the values.
    pub(crate) fn by_rows(
        &self,
        mut each: impl FnMut(u64, &[f32]) -> Result<(), Error>,
    ) -> Result<(), Error> {
        let shape = self.layout_shape()?;
        let (rows, columns) = rows_of(&shape)?;
        let at_once = (PIECE / columns.max(1)).max(1);
        let mut piece = Vec::new();
        let mut row = 0;
        while row < rows && columns > 0 {
            let end = rows.min(row + at_once);
            let len = usize::try_from((end - row) * columns).map_err(|_| too_large())?;
            piece.resize(len, 0.0);
            self.values(row..end, &mut piece)?;
            each(row * columns, &piece)?;
            row = end;
        }
        Ok(())
    }

    /// All values, row-major.
    ///
    /// # Errors
    /// As [`Packed::values`].
    pub fn all_values(&self) -> Result<Vec<f32>, Error> {
        let mut all = Vec::new();
        self.by_rows(|_, values| {
            all.extend_from_slice(values);
            Ok(())
        })?;
        Ok(all)
    }

    /// How the values of another tensor differ, rounded to this one's dtype.
    ///
    /// # Errors
    /// As [`Packed::values`]; the two have other numbers of elements.
    pub fn difference(&self, other: &Packed) -> Result<Difference, Error> {
        let (mine, theirs) = (self.layout_shape()?, other.layout_shape()?);
        let (rows, columns) = rows_of(&mine)?;
        let mut found = Difference {
            elements: rows.checked_mul(columns).ok_or_else(too_large)?,
            ..Difference::default()
        };
        if rows_of(&theirs)? == (rows, columns) {
            let mut piece = Vec::new();
            self.by_rows(|at, values| {
                piece.resize(values.len(), 0.0);
                let first = at / columns;
                other.values(first..first + values.len() as u64 / columns, &mut piece)?;
                found.add(self.tensor.dtype, values, &piece);
                Ok(())
            })?;
            return Ok(found);
        }
        let theirs = other.all_values()?;
        if theirs.len() as u64 != found.elements {
            let text = format!("{} and {} elements", found.elements, theirs.len());
            return Err(Error::new(Reason::Size, text).of(&self.tensor.name));
        }
        self.by_rows(|at, values| {
            let first = at as usize;
            let others = theirs.get(first..first + values.len()).unwrap_or(&[]);
            found.add(self.tensor.dtype, values, others);
            Ok(())
        })?;
        Ok(found)
    }
}

/// Values that are looked at together.
const PIECE: u64 = 1 << 16;

impl Difference {
    pub(crate) fn add(&mut self, dtype: Float, mine: &[f32], theirs: &[f32]) {
        for (a, b) in mine.iter().zip(theirs) {
            let b = round_to(dtype, *b);
            if *a == b || (a.is_nan() && b.is_nan()) {
                continue;
            }
            self.changed += 1;
            let apart = (*a - b).abs();
            // A NaN that was a number is as far away as can be.
            self.largest = self
                .largest
                .max(if apart.is_nan() { f32::INFINITY } else { apart });
        }
    }
}

/// Rows and columns: all axes but the last, and the last.
pub(crate) fn rows_of(shape: &[u64]) -> Result<(u64, u64), Error> {
    let (columns, lead) = shape.split_last().ok_or_else(too_large)?;
    let rows = lead.iter().try_fold(1_u64, |n, len| n.checked_mul(*len));
    let rows = rows.filter(|rows| rows.checked_mul(*columns).is_some());
    rows.map(|rows| (rows, *columns)).ok_or_else(too_large)
}

pub(crate) fn too_large() -> Error {
    Error::new(Reason::Size, "a shape whose product does not fit")
}

pub(crate) fn from_ggml(error: ggml::GgmlError) -> Error {
    Error::new(Reason::Size, error.to_string())
}
