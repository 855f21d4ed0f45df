//! Tensors to bytes: laid out by `format`, put into one buffer or written to one file.

use std::cmp::Ordering;
use std::collections::HashMap;
use std::fmt::{Display, Write as _};
use std::io;
use std::path::Path;

use super::{SafeTensorError, View};
use crate::format::{Layout, Order, TensorSpec, WriteOptions, layout};
use crate::storage::{AtomicFile, AtomicOptions, Sink};

/// Tensors, the order in which the file has them, and the bytes before them.
struct Prepared<V> {
    header: Vec<u8>,
    file_len: u64,
    order: Vec<usize>,
    views: Vec<V>,
}

impl<V> Prepared<V> {
    /// The tensors in the order of the file.
    fn views(&self) -> impl Iterator<Item = &V> {
        self.order.iter().filter_map(|&at| self.views.get(at))
    }
}

/// The bytes of a file that holds these tensors: ordered by dtype, widest first, then by name.
///
/// # Errors
/// [`SafeTensorError::JsonError`] for a name that repeats or is `__metadata__`;
/// [`SafeTensorError::TensorInvalidInfo`], [`SafeTensorError::ValidationOverflow`] and
/// [`SafeTensorError::MisalignedSlice`] for a tensor whose length is not that of its dtype and shape;
/// [`SafeTensorError::InvalidTensorView`] for one that gives other than it promised;
/// [`SafeTensorError::HeaderTooLarge`].
pub fn serialize<S: AsRef<str> + Ord + Display, V: View, I: IntoIterator<Item = (S, V)>>(
    data: I,
    data_info: Option<HashMap<String, String>>,
) -> Result<Vec<u8>, SafeTensorError> {
    let mut prepared = prepare(data, data_info)?;
    let no_room = |_| io::Error::from(io::ErrorKind::OutOfMemory);
    let len = usize::try_from(prepared.file_len).map_err(no_room)?;
    let mut file = std::mem::take(&mut prepared.header);
    file.try_reserve_exact(len - file.len())
        .map_err(|_| io::Error::from(io::ErrorKind::OutOfMemory))?;
    for view in prepared.views() {
        file.extend_from_slice(&promised(view, view.data())?);
    }
    Ok(file)
}

/// The same, written to a file. The file is replaced whole or not at all, and when this returns it is on the
/// disk. One tensor at a time is asked for its bytes.
///
/// # Errors
/// As [`serialize`], and [`SafeTensorError::IoError`]; the file is then as it was.
pub fn serialize_to_file<S, V, I>(
    data: I,
    data_info: Option<HashMap<String, String>>,
    filename: &Path,
) -> Result<(), SafeTensorError>
where
    S: AsRef<str> + Ord + Display,
    V: View,
    I: IntoIterator<Item = (S, V)>,
{
    let mut prepared = prepare(data, data_info)?;
    let file = AtomicFile::create(filename, &AtomicOptions::default())?;
    file.reserve(prepared.file_len)?;
    let mut out = Appender {
        sink: &file,
        pending: std::mem::take(&mut prepared.header),
        at: 0,
    };
    for view in prepared.views() {
        out.append(&promised(view, view.data())?)?;
    }
    out.flush()?;
    Ok(file.commit()?)
}

/// A tensor's bytes, if they are as many as it said.
fn promised<V: View, D: AsRef<[u8]>>(view: &V, data: D) -> Result<D, SafeTensorError> {
    let found = data.as_ref().len();
    if found == view.data_len() {
        Ok(data)
    } else {
        let (dtype, shape) = (view.dtype(), view.shape().to_vec());
        Err(SafeTensorError::InvalidTensorView(dtype, shape, found))
    }
}

/// Gathers small tensors into writes of a megabyte.
struct Appender<'a, S: Sink> {
    sink: &'a S,
    pending: Vec<u8>,
    /// Where the pending bytes belong.
    at: u64,
}

impl<S: Sink> Appender<'_, S> {
    const BLOCK: usize = 1 << 20;

    fn append(&mut self, data: &[u8]) -> Result<(), SafeTensorError> {
        if self.pending.len() + data.len() > Self::BLOCK {
            self.flush()?;
        }
        if data.len() >= Self::BLOCK {
            self.write(data)
        } else {
            self.pending.extend_from_slice(data);
            Ok(())
        }
    }

    fn write(&mut self, data: &[u8]) -> Result<(), SafeTensorError> {
        self.sink.write_all_at(self.at, data)?;
        self.sink.start_writeback(self.at, data.len() as u64);
        self.at += data.len() as u64;
        Ok(())
    }

    fn flush(&mut self) -> Result<(), SafeTensorError> {
        let mut pending = std::mem::take(&mut self.pending);
        self.write(&pending)?;
        pending.clear();
        self.pending = pending;
        Ok(())
    }
}

fn prepare<S, V, I>(
    data: I,
    data_info: Option<HashMap<String, String>>,
) -> Result<Prepared<V>, SafeTensorError>
where
    S: AsRef<str> + Ord + Display,
    V: View,
    I: IntoIterator<Item = (S, V)>,
{
    let mut data: Vec<(S, V)> = data.into_iter().collect();
    let mut layout = lay_out(&data, data_info.as_ref(), Order::Canonical)?;
    // The canonical order is that of the names as text; a key may have an order of its own.
    let in_order = layout
        .order
        .is_sorted_by(|&a, &b| match (data.get(a), data.get(b)) {
            (Some(a), Some(b)) => compare(a, b).is_le(),
            _ => false,
        });
    if !in_order {
        data.sort_by(compare);
        layout = lay_out(&data, data_info.as_ref(), Order::Given)?;
    }
    for ((_, view), range) in data.iter().zip(&layout.ranges) {
        if view.data_len() as u64 != range.1 - range.0 {
            return Err(SafeTensorError::TensorInvalidInfo);
        }
    }
    Ok(Prepared {
        header: layout.header,
        file_len: layout.file_len,
        order: layout.order,
        views: data.into_iter().map(|(_, view)| view).collect(),
    })
}

/// The order of the file: dtypes descending, then names by their own order.
fn compare<S: Ord, V: View>(left: &(S, V), right: &(S, V)) -> Ordering {
    let dtypes = right.1.dtype().cmp(&left.1.dtype());
    dtypes.then_with(|| left.0.cmp(&right.0))
}

fn lay_out<S: AsRef<str> + Display, V: View>(
    data: &[(S, V)],
    data_info: Option<&HashMap<String, String>>,
    order: Order,
) -> Result<Layout, SafeTensorError> {
    // All extents in one allocation; a shape ends where the next begins.
    let mut extents = Vec::with_capacity(2 * data.len());
    for (_, view) in data {
        extents.extend(view.shape().iter().map(|&extent| extent as u64));
    }
    let mut rest = &extents[..];
    let mut specs = Vec::with_capacity(data.len());
    for (name, view) in data {
        let (shape, others) = rest
            .split_at_checked(view.shape().len())
            .unwrap_or_default();
        rest = others;
        specs.push(TensorSpec {
            name: name.as_ref(),
            dtype: view.dtype(),
            shape,
        });
    }
    // The name in the file is what the key displays as, which is nearly always what it is as text.
    let mut texts = Vec::new();
    if !data
        .iter()
        .all(|(name, _)| displays_as(name, name.as_ref()))
    {
        texts.extend(data.iter().map(|(name, _)| name.to_string()));
    }
    for (spec, text) in specs.iter_mut().zip(&texts) {
        spec.name = text;
    }
    let pairs: Option<Vec<(&str, &str)>> =
        data_info.map(|info| info.iter().map(|(k, v)| (&**k, &**v)).collect());
    let options = WriteOptions {
        order,
        ..WriteOptions::default()
    };
    layout(&specs, pairs.as_deref(), &options)
        .map_err(|error| SafeTensorError::from_format(&error, &[]))
}

/// Whether `value` displays as `text`, found without writing it anywhere.
fn displays_as(value: &impl Display, text: &str) -> bool {
    let mut rest = Rest(text);
    write!(rest, "{value}").is_ok() && rest.0.is_empty()
}

/// What is still to come of an expected text.
struct Rest<'a>(&'a str);

impl std::fmt::Write for Rest<'_> {
    fn write_str(&mut self, part: &str) -> std::fmt::Result {
        self.0 = self.0.strip_prefix(part).ok_or(std::fmt::Error)?;
        Ok(())
    }
}
