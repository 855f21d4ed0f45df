//! A file in memory, read in place: a header over the caller's bytes, and views into them.

use std::fmt;

use super::{Metadata, SafeTensorError, TensorView};
use crate::format::{Header, Quirks, ReadOptions, TensorInfo};

/// Bytes of the length before the header.
const PREFIX: usize = 8;

/// The tensors of a file that lies in `data`. Borrows it: no tensor is copied.
pub struct SafeTensors<'data> {
    header: Header<&'data [u8]>,
    data: &'data [u8],
}

impl<'data> SafeTensors<'data> {
    /// The length of the header, without the 8 bytes before it, and what the header says. `buffer` is the
    /// whole file.
    ///
    /// # Errors
    /// As [`SafeTensors::deserialize`].
    pub fn read_metadata(buffer: &'data [u8]) -> Result<(usize, Metadata), SafeTensorError> {
        let header = parse(buffer, &ReadOptions::default())?;
        let length = header.data_start() as usize - PREFIX;
        Ok((length, Metadata::of_header(&header)?))
    }

    /// Reads a whole file that lies in memory.
    ///
    /// # Errors
    /// The reference's variant for what the default profile refuses (see the [module](crate::compat)).
    pub fn deserialize(buffer: &'data [u8]) -> Result<Self, SafeTensorError> {
        Self::deserialize_with(buffer, &ReadOptions::default())
    }

    /// The same with a profile and budgets of the caller's choice: [`ReadOptions::compat`] accepts whatever
    /// the reference accepts. A dtype that is not known refuses the file in any profile, since a
    /// [`TensorView`] cannot name it.
    ///
    /// # Errors
    /// As [`SafeTensors::deserialize`].
    pub fn deserialize_with(
        buffer: &'data [u8],
        options: &ReadOptions,
    ) -> Result<Self, SafeTensorError> {
        let header = parse(buffer, options)?;
        let data = buffer.get(header.data_start() as usize..).unwrap_or(&[]);
        Ok(SafeTensors { header, data })
    }

    /// The tensors in the order of their bytes.
    pub fn tensors(&self) -> Vec<(String, TensorView<'data>)> {
        self.iter()
            .map(|(name, view)| (name.to_owned(), view))
            .collect()
    }

    /// The tensors in the order of their bytes.
    pub fn iter(&self) -> impl Iterator<Item = (&str, TensorView<'data>)> {
        self.header
            .iter_by_offset()
            .filter_map(|info| Some((info.name, self.view(&info)?)))
    }

    /// The tensor of this name.
    ///
    /// # Errors
    /// [`SafeTensorError::TensorNotFound`].
    pub fn tensor(&self, tensor_name: &str) -> Result<TensorView<'data>, SafeTensorError> {
        let info = self.header.get(tensor_name);
        info.and_then(|info| self.view(&info))
            .ok_or_else(|| SafeTensorError::TensorNotFound(tensor_name.to_owned()))
    }

    /// The names in the order of the tensors' bytes.
    pub fn names(&self) -> Vec<&'_ str> {
        self.header.iter_by_offset().map(|info| info.name).collect()
    }

    /// How many tensors there are.
    #[inline]
    pub fn len(&self) -> usize {
        self.header.len()
    }

    /// Whether there is none.
    #[inline]
    pub fn is_empty(&self) -> bool {
        self.header.is_empty()
    }

    /// The header as Tonnage reads it: metadata, layout, lints.
    pub fn header(&self) -> &Header<&'data [u8]> {
        &self.header
    }

    /// `None` only if the bytes changed since they were checked.
    fn view(&self, info: &TensorInfo<'_>) -> Option<TensorView<'data>> {
        let data = self.data.get(info.begin as usize..info.end as usize)?;
        let shape = info.shape.iter().map(|&extent| extent as usize).collect();
        Some(TensorView::checked(info.dtype.known().ok()?, shape, data))
    }
}

impl fmt::Debug for SafeTensors<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let infos = self.header.iter_by_offset().map(|info| (info.name, info));
        f.debug_map().entries(infos).finish()
    }
}

fn parse<'data>(
    buffer: &'data [u8],
    options: &ReadOptions,
) -> Result<Header<&'data [u8]>, SafeTensorError> {
    let mut options = *options;
    options.quirks = options.quirks.with(Quirks::UNKNOWN_DTYPE_REFUSED);
    let header = Header::parse(buffer, Some(buffer.len() as u64), &options)
        .map_err(|error| SafeTensorError::from_format(&error, json_of(buffer)))?;
    // Offsets reach no further than the buffer, but an extent beside a zero can be any number.
    let fits = |info: TensorInfo<'_>| {
        info.shape
            .iter()
            .all(|&extent| usize::try_from(extent).is_ok())
    };
    if usize::BITS < u64::BITS && !header.iter().all(fits) {
        return Err(SafeTensorError::ValidationOverflow);
    }
    Ok(header)
}

/// The header's bytes, as far as there are any.
fn json_of(buffer: &[u8]) -> &[u8] {
    let Some((prefix, rest)) = buffer.split_first_chunk() else {
        return &[];
    };
    usize::try_from(u64::from_le_bytes(*prefix))
        .ok()
        .and_then(|length| rest.get(..length))
        .unwrap_or(&[])
}
