//! A header as a value: how many bytes it takes, and what it says.

use tonnage_format::{CatalogBuilder, Dtype, Row, Step, TensorDtype};

use super::error::{Error, Reason};
use super::limits::Limits;
use super::scan::{MAGIC, Scan, Span, Stop, Tensor, scan};
use super::types::{GgmlType, dtype_of, swaps};
use super::value::{ByteOrder, Value, decode};

/// Whether a file that begins with these bytes says that it is GGUF.
pub fn is_gguf(start: &[u8]) -> bool {
    start.starts_with(&MAGIC)
}

/// Looks at the first bytes of a file, as many as there are, and says which are missing for the header to be
/// parsed. `Done(end)` means that the header, without the padding behind it, ends at byte `end` of `prefix`.
///
/// A header does not say how long it is. So that it is not scanned over and over, at least as many bytes are
/// asked for as there are already; never more than the file has.
///
/// # Errors
/// Everything that is wrong with the part that is there (docs/gguf.md, chapters 1 to 5 and 8).
pub fn probe(prefix: &[u8], file_len: u64, limits: &Limits) -> Result<Step<u64>, Error> {
    let have = prefix.len() as u64;
    match scan(prefix, file_len, limits) {
        Ok(scan) => Ok(Step::Done(scan.end as u64)),
        Err(Stop::Refused(error)) => Err(error),
        Err(Stop::More(end)) => {
            let missing = end.saturating_sub(have).max(1);
            let rest = file_len.saturating_sub(have);
            Ok(Step::Need {
                offset: have,
                len: missing.max(have).min(rest.max(1)),
            })
        }
    }
}

/// A tensor of a file.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct GgufTensor<'a> {
    /// Its name.
    pub name: &'a str,
    /// Its type, which says what its blocks mean.
    pub ty: GgmlType,
    /// Its extents in elements, row-major: the last is that of a row. (The file has them the other way round.)
    pub logical_shape: &'a [u64],
    /// First byte, counted from the start of the file.
    pub offset: u64,
    /// Bytes it takes.
    pub len: u64,
}

impl GgufTensor<'_> {
    /// How many elements it has; saturates.
    pub fn elements(&self) -> u64 {
        if self.logical_shape.contains(&0) {
            return 0;
        }
        let extents = self.logical_shape.iter();
        extents.fold(1, |product: u64, &extent| product.saturating_mul(extent))
    }

    /// The dtype it has in a catalog: its own, or `U8` for blocks.
    pub fn dtype(&self) -> Dtype {
        dtype_of(self.ty).unwrap_or(Dtype::U8)
    }

    /// The shape it has in a catalog: its own, or `[.., rows, bytes of a row]` for blocks.
    pub fn stored_shape(&self) -> Vec<u64> {
        let mut shape = self.logical_shape.to_vec();
        if dtype_of(self.ty).is_none()
            && let Some(row) = shape.last_mut()
        {
            // The scan has seen that rows are whole blocks.
            *row = self.ty.row_bytes(*row).unwrap_or(0);
        }
        shape
    }
}

/// A parsed header. It holds the bytes of the header, and where in them everything lies.
#[derive(Clone, Debug)]
pub struct Gguf {
    bytes: Vec<u8>,
    scan: Scan,
    /// Positions of tensors, sorted by name; of entries, by key.
    by_name: Vec<u32>,
    by_key: Vec<u32>,
    data_start: u64,
    file_len: u64,
}

impl Gguf {
    /// Parses the header at the start of `bytes`, the first of a file of `file_len`, and checks where the data
    /// of every tensor lies. Bytes behind the header are let go of.
    ///
    /// # Errors
    /// Everything that docs/gguf.md refuses, chapters 1 to 6 and 8.
    pub fn parse(mut bytes: Vec<u8>, file_len: u64, limits: &Limits) -> Result<Self, Error> {
        let scan = match scan(&bytes, file_len, limits) {
            Ok(scan) => scan,
            Err(Stop::Refused(error)) => return Err(error),
            Err(Stop::More(end)) => {
                let short =
                    Error::new(Reason::Truncated).found(format_args!("{} bytes", bytes.len()));
                return Err(short.needed(format_args!("at least {end}")));
            }
        };
        bytes.truncate(scan.end);
        bytes.shrink_to_fit();
        let data_start = (scan.end as u64).next_multiple_of(scan.alignment);
        let mut gguf = Gguf {
            by_name: (0..scan.tensors.len() as u32).collect(),
            by_key: (0..scan.entries.len() as u32).collect(),
            bytes,
            scan,
            data_start,
            file_len,
        };
        gguf.index()?;
        gguf.check_order()?;
        gguf.check_places()?;
        Ok(gguf)
    }

    fn index(&mut self) -> Result<(), Error> {
        let (mut by_name, mut by_key) = (
            std::mem::take(&mut self.by_name),
            std::mem::take(&mut self.by_key),
        );
        by_name.sort_by(|&a, &b| self.name_at(a as usize).cmp(self.name_at(b as usize)));
        by_key.sort_by(|&a, &b| self.key_at(a as usize).cmp(self.key_at(b as usize)));
        let twice = |positions: &[u32], of: &dyn Fn(usize) -> String| {
            let pairs = positions.windows(2);
            let mut named = pairs.filter_map(|pair| match *pair {
                [a, b] if of(a as usize) == of(b as usize) => Some(of(a as usize)),
                _ => None,
            });
            named.next()
        };
        if let Some(key) = twice(&by_key, &|at| self.key_at(at).to_owned()) {
            return Err(Error::new(Reason::DuplicateKey)
                .key(&key)
                .needed("each key once"));
        }
        if let Some(name) = twice(&by_name, &|at| self.name_at(at).to_owned()) {
            let twice = Error::new(Reason::DuplicateTensor).tensor(&name);
            return Err(twice.needed("each name once"));
        }
        (self.by_name, self.by_key) = (by_name, by_key);
        Ok(())
    }

    fn check_order(&self) -> Result<(), Error> {
        if self.scan.order == ByteOrder::Little {
            return Ok(());
        }
        match self.tensors().find(|tensor| swaps(tensor.ty).is_none()) {
            None => Ok(()),
            Some(tensor) => {
                let wrong = Error::new(Reason::BigEndianBlocks).tensor(tensor.name);
                let wrong = wrong.found(format_args!("{} in a big-endian file", tensor.ty.name()));
                Err(wrong.needed("Q4_0, Q8_0, Q4_K, Q6_K, MXFP4, NVFP4 or plain numbers"))
            }
        }
    }

    fn check_places(&self) -> Result<(), Error> {
        for stored in &self.scan.tensors {
            let end = stored.offset.checked_add(stored.len);
            let end = end.and_then(|end| end.checked_add(self.data_start));
            if end.is_none_or(|end| end > self.file_len) && stored.len > 0 {
                let name = self.text(stored.name);
                let begin = self.data_start.saturating_add(stored.offset);
                let short = Error::new(Reason::DataTruncated).tensor(name).at(begin);
                let short = short.found(format_args!("a file of {} bytes", self.file_len));
                return Err(short.needed(format_args!("{} from byte {begin}", stored.len)));
            }
        }
        let order = self.by_offset();
        for pair in order.windows(2) {
            let [a, b] = *pair else { continue };
            let (Some(a), Some(b)) = (self.tensor(a), self.tensor(b)) else {
                continue;
            };
            // The sum was checked above.
            if a.offset.saturating_add(a.len) > b.offset {
                let wrong = Error::new(Reason::Overlap).tensor(b.name).at(b.offset);
                let wrong = wrong.found(format_args!("it at byte {}", b.offset));
                let end = a.offset.saturating_add(a.len);
                return Err(
                    wrong.needed(format_args!("it behind {:?}, which ends at {end}", a.name))
                );
            }
        }
        Ok(())
    }

    /// Positions of the tensors that have bytes, in the order of their bytes.
    pub fn by_offset(&self) -> Vec<usize> {
        let stored = |at: &usize| self.scan.tensors.get(*at);
        let mut order: Vec<usize> = (0..self.scan.tensors.len())
            .filter(|at| stored(at).is_some_and(|tensor| tensor.len > 0))
            .collect();
        order.sort_by_key(|at| stored(at).map_or(0, |tensor| tensor.offset));
        order
    }

    fn text(&self, span: Span) -> &str {
        let bytes = self.bytes.get(span.start..span.end).unwrap_or(&[]);
        std::str::from_utf8(bytes).unwrap_or("")
    }

    fn name_at(&self, at: usize) -> &str {
        self.scan
            .tensors
            .get(at)
            .map_or("", |tensor| self.text(tensor.name))
    }

    fn key_at(&self, at: usize) -> &str {
        self.scan
            .entries
            .get(at)
            .map_or("", |entry| self.text(entry.key))
    }

    fn value_at(&self, at: usize) -> Option<Value<'_>> {
        let entry = self.scan.entries.get(at)?;
        let bytes = self.bytes.get(entry.value.start..entry.value.end)?;
        Some(decode(entry.ty, bytes, self.scan.order)?.0)
    }

    /// The version of the format: 2 or 3.
    pub fn version(&self) -> u32 {
        self.scan.version
    }

    /// The order of bytes in its numbers.
    pub fn byte_order(&self) -> ByteOrder {
        self.scan.order
    }

    /// What offsets of tensors are multiples of.
    pub fn alignment(&self) -> u64 {
        self.scan.alignment
    }

    /// The header as it is in the file, without the padding behind it.
    pub fn bytes(&self) -> &[u8] {
        &self.bytes
    }

    /// First byte of the data.
    pub fn data_start(&self) -> u64 {
        self.data_start
    }

    /// Bytes of the file.
    pub fn file_len(&self) -> u64 {
        self.file_len
    }

    /// The metadata in the order of the file.
    pub fn metadata(&self) -> impl Iterator<Item = (&str, Value<'_>)> + '_ {
        (0..self.scan.entries.len()).filter_map(|at| Some((self.key_at(at), self.value_at(at)?)))
    }

    /// The metadata value of a key.
    pub fn value(&self, key: &str) -> Option<Value<'_>> {
        let found = self
            .by_key
            .binary_search_by(|&at| self.key_at(at as usize).cmp(key));
        self.value_at(*self.by_key.get(found.ok()?)? as usize)
    }

    /// How many tensors there are.
    pub fn len(&self) -> usize {
        self.scan.tensors.len()
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.scan.tensors.is_empty()
    }

    /// The tensors in the order of the header.
    pub fn tensors(&self) -> impl ExactSizeIterator<Item = GgufTensor<'_>> + '_ {
        let stored = self.scan.tensors.iter().enumerate();
        stored.map(|(at, tensor)| self.describe(at, tensor))
    }

    fn describe<'a>(&'a self, at: usize, tensor: &'a Tensor) -> GgufTensor<'a> {
        let before = at.checked_sub(1).and_then(|at| self.scan.tensors.get(at));
        let start = before.map_or(0, |before| before.dims_end as usize);
        GgufTensor {
            name: self.text(tensor.name),
            ty: tensor.ty,
            logical_shape: self
                .scan
                .dims
                .get(start..tensor.dims_end as usize)
                .unwrap_or(&[]),
            // Checked for those with bytes; those without may say anything.
            offset: self.data_start.saturating_add(tensor.offset),
            len: tensor.len,
        }
    }

    /// The tensor at a position, in the order of the header.
    pub fn tensor(&self, at: usize) -> Option<GgufTensor<'_>> {
        self.scan
            .tensors
            .get(at)
            .map(|tensor| self.describe(at, tensor))
    }

    /// The tensor of this name.
    pub fn get(&self, name: &str) -> Option<GgufTensor<'_>> {
        let found = self
            .by_name
            .binary_search_by(|&at| self.name_at(at as usize).cmp(name));
        self.tensor(*self.by_name.get(found.ok()?)? as usize)
    }

    /// Adds every tensor to a catalog, in the order of its bytes; `source` is the position of the file there.
    ///
    /// # Errors
    /// As [`CatalogBuilder::add`].
    pub fn add_to(
        &self,
        builder: &mut CatalogBuilder,
        source: usize,
    ) -> Result<(), tonnage_format::Error> {
        let mut order: Vec<GgufTensor<'_>> = self.tensors().collect();
        order.sort_by_key(|tensor| (tensor.offset, tensor.len));
        for tensor in order {
            builder.add(Row {
                name: tensor.name,
                dtype: TensorDtype::Known(tensor.dtype()),
                shape: &tensor.stored_shape(),
                source,
                // Nothing lies where a tensor without bytes says that it is.
                offset: tensor.offset.min(self.file_len),
                len: tensor.len,
            })?;
        }
        Ok(())
    }
}
