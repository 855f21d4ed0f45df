//! Stored tensors that are cast while they are written.

use tonnage_engine::{self as engine, Check};
use tonnage_format::Dtype;
use tonnage_storage as storage;

use super::{Content, Item};
use crate::cast::{cast, cast_len};
use crate::error::Result;

/// Casts a stored tensor while it is written.
pub(super) struct CastFill<'a> {
    source: &'a dyn storage::Source,
    offset: u64,
    len: u64,
    from: Dtype,
    to: Dtype,
    /// Looks at what is read.
    check: Option<&'a dyn Check>,
}

impl<'a> CastFill<'a> {
    /// `None` for a tensor that keeps its dtype.
    pub fn of(item: &Item<'a>, check: Option<&'a dyn Check>) -> Result<Option<CastFill<'a>>> {
        let Content::Stored(tensor) = item.content else {
            return Ok(None);
        };
        let (from, to) = (tensor.dtype()?, item.dtype);
        if from == to {
            return Ok(None);
        }
        Ok(Some(CastFill {
            source: tensor.source()?,
            offset: tensor.offset(),
            len: tensor.byte_len(),
            from,
            to,
            check,
        }))
    }

    /// Casts the elements from `first` on, in groups of eight, of which `dst` holds whole ones, but perhaps
    /// for the last of the tensor.
    fn groups(&self, first: u64, src: &mut Vec<u8>, dst: &mut [u8]) -> Result<(), engine::Error> {
        // Eight elements of a dtype take as many bytes as one has bits.
        let begin = first * self.from.bitsize() as u64;
        let count = (dst.len() as u64).div_ceil(self.to.bitsize() as u64);
        let len = (count * self.from.bitsize() as u64).min(self.len.saturating_sub(begin));
        let offset = self.offset.saturating_add(begin);
        src.resize(len as usize, 0);
        let failed = |error| engine::Error::Storage { error, offset };
        self.source.read_exact_at(offset, src).map_err(failed)?;
        if let Some(check) = self.check {
            check.check(self.source, offset, &mut [&src[..]].into_iter())?;
        }
        cast(self.from, src, self.to, dst).map_err(|e| {
            let other = std::io::Error::other(e);
            failed(storage::Error::new("cast", self.source.label(), other))
        })
    }
}

impl engine::Fill for CastFill<'_> {
    fn fill(&self, mut at: u64, mut dst: &mut [u8]) -> Result<(), engine::Error> {
        /// Groups that are cast at a time: what is read for them stays in the processor's cache.
        const GROUPS: u64 = 8 << 10;
        let unit = self.to.bitsize() as u64;
        let all = cast_len(self.from, self.len, self.to).unwrap_or(0);
        let mut src = Vec::new();
        while !dst.is_empty() {
            let (first, skip) = (at / unit, (at % unit) as usize);
            let left = all.saturating_sub(first * unit);
            let whole = (dst.len() as u64 / unit).min(GROUPS) * unit;
            // A block may begin or end inside of a group: that group is cast apart.
            let (now, rest) = if skip == 0 && (whole > 0 || left <= dst.len() as u64) {
                let len = if whole > 0 { whole } else { left };
                let (now, rest) = dst.split_at_mut((len as usize).min(dst.len()));
                self.groups(first, &mut src, now)?;
                (now.len(), rest)
            } else {
                let mut group = vec![0; left.min(unit) as usize];
                self.groups(first, &mut src, &mut group)?;
                let part = group.get(skip..).unwrap_or_default();
                let len = part.len().min(dst.len());
                let (now, rest) = dst.split_at_mut(len);
                now.copy_from_slice(&part[..len]);
                if len == 0 {
                    let over = std::io::ErrorKind::UnexpectedEof;
                    let error = storage::Error::new("cast", self.source.label(), over);
                    return Err(engine::Error::Storage { error, offset: at });
                }
                (len, rest)
            };
            at += now as u64;
            dst = rest;
        }
        Ok(())
    }
}
