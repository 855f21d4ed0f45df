//! The catalog: a checkpoint of any container as one table of byte ranges.
//!
//! A row says name, dtype, shape, and where the bytes lie: source, offset, length. What can be read
//! into this table gets everything above it; nothing above it knows containers.

use alloc::string::{String, ToString};
use alloc::vec::Vec;

use crate::dtype::Dtype;
use crate::error::{Error, Reason};
use crate::header::{Header, TensorDtype};
use crate::names::NameIndex;

/// A place that bytes come from: one file, one buffer, one object.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Source {
    /// What messages call it: a path as the user gave it, or `<bytes>`.
    pub label: String,
    /// Its length in bytes.
    pub len: u64,
}

#[derive(Clone, Copy, Debug)]
struct Stored {
    name_end: u32,
    dims_end: u32,
    source: u32,
    dtype: Option<Dtype>,
    offset: u64,
    len: u64,
}

/// One row of a catalog.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Row<'a> {
    /// The tensor's name.
    pub name: &'a str,
    /// Its dtype.
    pub dtype: TensorDtype<'a>,
    /// Its extents in elements.
    pub shape: &'a [u64],
    /// Position of its source.
    pub source: usize,
    /// First byte, counted from the start of the source.
    pub offset: u64,
    /// Bytes it takes.
    pub len: u64,
}

impl Row<'_> {
    /// How many elements it has; saturates where that overflows (only with a zero elsewhere).
    pub fn elements(&self) -> u64 {
        if self.shape.contains(&0) {
            return 0;
        }
        self.shape
            .iter()
            .fold(1, |product: u64, &extent| product.saturating_mul(extent))
    }
}

/// The table. Rows keep the order in which they were added.
#[derive(Clone, Debug, Default)]
pub struct Catalog {
    sources: Vec<Source>,
    names: String,
    dims: Vec<u64>,
    rows: Vec<Stored>,
    /// Names of dtypes that are not in the dtype table, by row, ascending.
    unknown: Vec<(u32, String)>,
    by_name: NameIndex,
}

/// Collects the rows of a [`Catalog`].
#[derive(Clone, Debug, Default)]
pub struct CatalogBuilder {
    catalog: Catalog,
}

impl CatalogBuilder {
    /// An empty table.
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds a source and gives its position.
    pub fn add_source(&mut self, label: &str, len: u64) -> usize {
        self.catalog.sources.push(Source {
            label: label.to_string(),
            len,
        });
        self.catalog.sources.len() - 1
    }

    /// Adds a row.
    ///
    /// # Errors
    /// A range that reaches past its source ([`Reason::DataTruncated`]), or a table too large for
    /// 32-bit positions ([`Reason::LimitTensors`]).
    pub fn add(&mut self, row: Row<'_>) -> Result<(), Error> {
        let catalog = &mut self.catalog;
        let source_len = catalog.sources.get(row.source).map(|source| source.len);
        let end = row.offset.checked_add(row.len);
        if end.is_none() || source_len < end {
            return Err(Error::new(Reason::DataTruncated)
                .tensor(row.name)
                .found(format_args!("{} bytes", source_len.unwrap_or(0)))
                .needed(format_args!("{} from byte {}", row.len, row.offset)));
        }
        let full = |_| Error::over(Reason::LimitTensors, u64::MAX, u32::MAX as u64);
        let name_end = u32::try_from(catalog.names.len() + row.name.len()).map_err(full)?;
        let dims_end = u32::try_from(catalog.dims.len() + row.shape.len()).map_err(full)?;
        let position = u32::try_from(catalog.rows.len()).map_err(full)?;
        catalog.names.push_str(row.name);
        catalog.dims.extend_from_slice(row.shape);
        let dtype = match row.dtype {
            TensorDtype::Known(dtype) => Some(dtype),
            TensorDtype::Unknown(name) => {
                catalog.unknown.push((position, name.to_string()));
                None
            }
        };
        let source = row.source as u32;
        let (offset, len) = (row.offset, row.len);
        catalog.rows.push(Stored {
            name_end,
            dims_end,
            source,
            dtype,
            offset,
            len,
        });
        catalog
            .by_name
            .push(row.name.as_bytes(), position, usize::MAX);
        Ok(())
    }

    /// Adds every tensor of a header that lies at the start of `source`, in the order of its bytes.
    ///
    /// # Errors
    /// As [`CatalogBuilder::add`].
    pub fn add_header<B: AsRef<[u8]>>(
        &mut self,
        header: &Header<B>,
        source: usize,
    ) -> Result<(), Error> {
        for info in header.iter_by_offset() {
            self.add(Row {
                name: info.name,
                dtype: info.dtype,
                shape: info.shape,
                source,
                offset: header.data_start() + info.begin,
                len: info.byte_len(),
            })?;
        }
        Ok(())
    }

    /// The table, with its names indexed.
    ///
    /// # Errors
    /// [`Reason::IndexTensorTwice`] if two rows have one name.
    pub fn finish(self) -> Result<Catalog, Error> {
        let mut catalog = self.catalog;
        let mut by_name = core::mem::take(&mut catalog.by_name);
        by_name.finish(
            |i| catalog.name(i as usize).as_bytes(),
            |earlier, later| {
                let label = |i: u32| {
                    let source = catalog
                        .rows
                        .get(i as usize)
                        .map_or(0, |row| row.source as usize);
                    catalog
                        .sources
                        .get(source)
                        .map_or("", |source| source.label.as_str())
                };
                Err(Error::new(Reason::IndexTensorTwice)
                    .tensor(catalog.name(earlier as usize))
                    .found(format_args!("it in {:?}", label(later)))
                    .needed(format_args!("it once: {:?} holds it", label(earlier))))
            },
        )?;
        catalog.by_name = by_name;
        Ok(catalog)
    }
}

impl Catalog {
    /// How many rows there are.
    pub fn len(&self) -> usize {
        self.rows.len()
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.rows.is_empty()
    }

    /// The sources, in the order in which they were added.
    pub fn sources(&self) -> &[Source] {
        &self.sources
    }

    fn before(&self, position: usize) -> (usize, usize) {
        let previous = position.checked_sub(1).and_then(|at| self.rows.get(at));
        previous.map_or((0, 0), |row| (row.name_end as usize, row.dims_end as usize))
    }

    fn name(&self, position: usize) -> &str {
        let end = self
            .rows
            .get(position)
            .map_or(0, |row| row.name_end as usize);
        self.names.get(self.before(position).0..end).unwrap_or("")
    }

    /// The row at a position.
    pub fn row(&self, position: usize) -> Option<Row<'_>> {
        let stored = self.rows.get(position)?;
        let dtype = match stored.dtype {
            Some(dtype) => TensorDtype::Known(dtype),
            None => TensorDtype::Unknown(self.unknown_dtype(position)),
        };
        let shape = self
            .dims
            .get(self.before(position).1..stored.dims_end as usize)?;
        let name = self.name(position);
        let source = stored.source as usize;
        Some(Row {
            name,
            dtype,
            shape,
            source,
            offset: stored.offset,
            len: stored.len,
        })
    }

    fn unknown_dtype(&self, position: usize) -> &str {
        let found = self
            .unknown
            .binary_search_by_key(&(position as u32), |(at, _)| *at);
        found
            .ok()
            .and_then(|at| self.unknown.get(at))
            .map_or("", |(_, name)| name)
    }

    /// Position of the row of this name.
    pub fn position(&self, name: &str) -> Option<usize> {
        let found = self
            .by_name
            .find(name.as_bytes(), |i| self.name(i as usize).as_bytes());
        found.map(|i| i as usize)
    }

    /// The row of this name.
    pub fn get(&self, name: &str) -> Option<Row<'_>> {
        self.position(name).and_then(|position| self.row(position))
    }

    /// The rows in their order.
    pub fn iter(&self) -> impl ExactSizeIterator<Item = Row<'_>> + '_ {
        let none = Row {
            name: "",
            dtype: TensorDtype::Unknown(""),
            shape: &[],
            source: 0,
            offset: 0,
            len: 0,
        };
        (0..self.len()).map(move |i| self.row(i).unwrap_or(none))
    }

    /// Positions of the rows, sorted by name. Sorts anew at each call.
    pub fn positions_by_name(&self) -> Vec<usize> {
        let mut positions: Vec<usize> = (0..self.len()).collect();
        positions.sort_unstable_by(|&a, &b| self.name(a).cmp(self.name(b)));
        positions
    }

    /// Bytes of all tensors together.
    pub fn total_bytes(&self) -> u64 {
        self.rows
            .iter()
            .fold(0, |sum: u64, row| sum.saturating_add(row.len))
    }

    /// Elements of all tensors together.
    pub fn elements(&self) -> u64 {
        self.iter()
            .fold(0, |sum: u64, row| sum.saturating_add(row.elements()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row<'a>(name: &'a str, shape: &'a [u64], source: usize, offset: u64) -> Row<'a> {
        let len = shape.iter().product();
        Row {
            name,
            dtype: TensorDtype::Known(Dtype::U8),
            shape,
            source,
            offset,
            len,
        }
    }

    #[test]
    fn rows_come_back_as_they_were_added() {
        let mut builder = CatalogBuilder::new();
        let one = builder.add_source("one", 100);
        let two = builder.add_source("two", 50);
        let rows = [
            row("b", &[2, 3], one, 8),
            row("a", &[], two, 49),
            row("", &[0, 9], two, 50),
        ];
        for row in rows {
            builder.add(row).unwrap();
        }
        let strange = Row {
            dtype: TensorDtype::Unknown("U3"),
            ..row("c", &[4], one, 0)
        };
        builder.add(strange).unwrap();
        let catalog = builder.finish().unwrap();
        assert_eq!(catalog.iter().collect::<Vec<_>>()[..3], rows);
        assert_eq!(catalog.get("c"), Some(strange));
        assert_eq!(catalog.get("").unwrap().elements(), 0);
        assert_eq!(catalog.get("d"), None);
        assert_eq!(catalog.positions_by_name(), [2, 1, 0, 3]);
        assert_eq!((catalog.len(), catalog.is_empty()), (4, false));
        assert_eq!((catalog.total_bytes(), catalog.elements()), (11, 11));
        assert_eq!(catalog.sources()[two].label, "two");
    }

    #[test]
    fn ranges_past_a_source_and_names_that_repeat_are_refused() {
        let mut builder = CatalogBuilder::new();
        let one = builder.add_source("one", 10);
        assert_eq!(
            builder.add(row("a", &[3], one, 8)).unwrap_err().reason(),
            Reason::DataTruncated
        );
        assert_eq!(
            builder
                .add(row("a", &[3], one, u64::MAX))
                .unwrap_err()
                .reason(),
            Reason::DataTruncated
        );
        assert_eq!(
            builder.add(row("a", &[3], 7, 0)).unwrap_err().reason(),
            Reason::DataTruncated
        );
        builder.add(row("a", &[3], one, 0)).unwrap();
        builder.add(row("a", &[3], one, 3)).unwrap();
        let error = builder.finish().unwrap_err();
        assert_eq!(error.reason(), Reason::IndexTensorTwice);
    }
}
