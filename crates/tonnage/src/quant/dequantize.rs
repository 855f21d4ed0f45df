//! A checkpoint whose quantised tensors are numbers: each under its logical name, in place of its parts.
//!
//! ```text
//!  w.qweight ─┐
//!  w.qzeros  ─┼─ Numbers, a source: bytes a..b of `w.weight` are read by reading what they are made of
//!  w.scales  ─┘  and dequantising it, in the thread that asked, into the memory that it gave
//! ```
//!
//! So everything that reads tensors reads dequantised ones as well: loads to host memory and to devices, streams, slices,
//! plans, saves. Memory: each reading thread has the parts' bytes of [`PIECE`] elements. Where the codes of a row are
//! spread over a part (GPTQ, AWQ, Marlin), the part is kept whole; of parts that are kept, those used last stay, up to
//! [`HELD`] bytes or one.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::ops::Range;
use std::sync::{Arc, Mutex, PoisonError};

use tonnage_engine::{self as engine, Options, Read};
use tonnage_format::{CatalogBuilder, Dtype, Reason, Row, TensorDtype};
use tonnage_quant::dequantize::{Dequantizer, Window, Windows};
use tonnage_quant::descriptor::{Float, Role};
use tonnage_quant::map::{Meaning, QTensor, QuantMap};
use tonnage_storage::{self as storage, Residency, Source, StorageKind};

use super::{failed, raised};
use crate::checkpoint::{Checkpoint, CheckpointFile};
use crate::error::{Error, Result};
use crate::tensor::room;

/// Elements that are dequantised at a time: a megabyte of single precision.
pub const PIECE: u64 = 1 << 18;
/// Bytes of parts that are kept whole.
pub const HELD: u64 = 64 << 20;
/// A span of a part that is longer than this, and than what its elements take, is no run of rows.
const SPAN: u64 = 4 << 20;

/// The dtype of a tensor's numbers where a dtype is asked for: that one if values can have it, else the scheme's own.
fn float(tensor: &QTensor, wanted: Option<Dtype>) -> Float {
    match wanted {
        Some(Dtype::F32) => Float::F32,
        Some(Dtype::F16) => Float::F16,
        Some(Dtype::BF16) => Float::Bf16,
        _ => tensor.dtype,
    }
}

fn dtype_of(float: Float) -> Dtype {
    match float {
        Float::F32 => Dtype::F32,
        Float::F16 => Dtype::F16,
        Float::Bf16 => Dtype::BF16,
    }
}

impl Checkpoint {
    /// This checkpoint with every quantised tensor of a map as one tensor of numbers under its logical name; its parts are gone,
    /// plain tensors as ever, and families that are carried as they are stay parts. Numbers have the scheme's own dtype, or
    /// `dtype` where it is F32, F16 or BF16: rounded once more, to nearest. Nothing is read yet.
    ///
    /// # Errors
    /// `QUANT_SIZE` for parts that don't fit the scheme; `QUANT_UNSUPPORTED` where a plain tensor has a logical name.
    pub fn dequantized(&self, map: &QuantMap, dtype: Option<Dtype>) -> Result<Checkpoint> {
        let meant = |tensor: &&QTensor| !matches!(tensor.meaning, Meaning::Opaque(_));
        let chosen: Vec<&QTensor> = map.tensors().filter(meant).collect();
        let parts: BTreeSet<&str> = chosen
            .iter()
            .flat_map(|tensor| tensor.all_parts().map(|part| part.name.as_str()))
            .collect();
        let mut builder = CatalogBuilder::new();
        let (mut sources, mut files) = (Vec::new(), self.files().to_vec());
        for (at, file) in self.files().iter().enumerate() {
            let source = self
                .source(at)
                .ok_or_else(|| Error::from(Reason::UnknownTensor))?;
            builder.add_source(&file.label, source.len());
            sources.push(Arc::clone(source));
        }
        for row in self
            .catalog()
            .iter()
            .filter(|row| !parts.contains(row.name))
        {
            if map.get(row.name).as_ref().is_some_and(meant) {
                let why = "a plain tensor has this name already";
                return Err(failed(row.name, why.to_owned()));
            }
            builder.add(row)?;
        }
        let held = Arc::new(Held::default());
        for tensor in chosen {
            let numbers = Numbers::new(self, tensor, float(tensor, dtype), &held)?;
            let (label, len) = (numbers.label.clone(), numbers.len());
            let at = builder.add_source(&label, len);
            builder.add(Row {
                name: &tensor.name,
                dtype: TensorDtype::Known(dtype_of(numbers.float)),
                shape: &tensor.shape,
                source: at,
                offset: 0,
                len,
            })?;
            files.push(CheckpointFile {
                label,
                len,
                data_start: 0,
                header_padding: 0,
                tensors: 1,
                data_bytes: len,
                metadata: None,
            });
            sources.push(Arc::new(numbers));
        }
        let mut metadata = self.metadata().clone();
        metadata.remove("quant.map");
        let mut made = Checkpoint::with(
            builder.finish()?,
            sources,
            files,
            metadata,
            self.notes.clone(),
            self.layout(),
        );
        made.root.clone_from(&self.root);
        Ok(made)
    }

    /// The tensors of this checkpoint that selected ones of its numbers are made of.
    pub(crate) fn made_of<'a>(
        &'a self,
        numbers: &Checkpoint,
        map: &'a QuantMap,
        select: &[String],
    ) -> Vec<&'a str> {
        let (positions, _) = numbers.select(select);
        let mut names = Vec::new();
        for tensor in positions.into_iter().filter_map(|at| numbers.at(at)) {
            match map.get(tensor.name()) {
                Some(meant) if !matches!(meant.meaning, Meaning::Opaque(_)) => {
                    names.extend(meant.parts.values().map(|part| part.name.as_str()));
                }
                _ => names.extend(self.get(tensor.name()).map(|own| own.row.name)),
            }
        }
        names
    }

    /// Compares the files of tensors with their checksums, by reading these tensors: what a load of numbers does before it,
    /// since what they are made of is read out of order.
    ///
    /// # Errors
    /// As [`Checkpoint::load`] with [`crate::Load::verify`].
    pub fn verify_tensors(&self, names: &[&str], options: &Options<'_>) -> Result<()> {
        let tensors: Vec<_> = names.iter().filter_map(|name| self.get(name)).collect();
        let files: Vec<usize> = tensors.iter().map(|tensor| tensor.file()).collect();
        self.verified(files, options, |options| {
            let mut memory = room(SPAN)?;
            for tensor in &tensors {
                let mut at = 0;
                while at < tensor.byte_len() {
                    let len = (tensor.byte_len() - at).min(SPAN);
                    let dst = memory.get_mut(..len as usize).unwrap_or_default();
                    let (source, offset) = (tensor.source()?, tensor.offset() + at);
                    let read = Read {
                        source,
                        offset,
                        dst,
                    };
                    engine::read(vec![read], options).map_err(|error| self.name_tensor(error))?;
                    at += len;
                }
            }
            Ok(())
        })
    }
}

/// Where a part's bytes are.
#[derive(Debug)]
struct Place {
    source: Arc<dyn Source>,
    offset: u64,
    len: u64,
}

/// The numbers of a quantised tensor, as a source of bytes.
#[derive(Debug)]
struct Numbers {
    label: String,
    float: Float,
    ready: Dequantizer,
    parts: BTreeMap<Role, Place>,
    kind: StorageKind,
    held: Arc<Held>,
}

/// Parts that are kept whole, those used last behind.
#[derive(Debug, Default)]
struct Held(Mutex<VecDeque<(String, Arc<Vec<u8>>)>>);

/// Bytes of a part: of its own, or of a part that is kept.
enum Bytes {
    Own(u64, Vec<u8>),
    Kept(Arc<Vec<u8>>),
}

impl Numbers {
    fn new(
        checkpoint: &Checkpoint,
        tensor: &QTensor,
        float: Float,
        held: &Arc<Held>,
    ) -> Result<Self> {
        let ready = Dequantizer::new(tensor).map_err(raised)?;
        let mut parts = BTreeMap::new();
        let mut label = String::new();
        let mut kind = StorageKind::Memory;
        for (role, part) in &tensor.parts {
            let found = checkpoint.tensor(&part.name)?;
            if found.dtype()? != part.dtype || found.shape() != part.shape {
                let why = format!(
                    "{:?} is {} {:?}",
                    part.name,
                    found.dtype_name(),
                    found.shape()
                );
                return Err(failed(&tensor.name, why));
            }
            let lost = || Error::from(Reason::UnknownTensor);
            let source = Arc::clone(checkpoint.source(found.file()).ok_or_else(lost)?);
            if *role == Role::Codes {
                label = format!("{} of {}", tensor.name, source.label());
                kind = source.kind();
            }
            let (offset, len) = (found.offset(), found.byte_len());
            parts.insert(
                *role,
                Place {
                    source,
                    offset,
                    len,
                },
            );
        }
        let bytes = ready.elements().checked_mul(float.bytes() as u64);
        bytes.ok_or_else(|| Error::from(Reason::SizeOverflow))?;
        Ok(Numbers {
            label,
            float,
            ready,
            parts,
            kind,
            held: Arc::clone(held),
        })
    }

    fn fetch(&self, role: Role, span: Range<u64>, wanted: u64) -> Result<Bytes, storage::Error> {
        let lost =
            || storage::Error::new("find a part of", &self.label, std::io::ErrorKind::NotFound);
        let place = self.parts.get(&role).ok_or_else(lost)?;
        let len = span.end.saturating_sub(span.start);
        if len > SPAN.max(4 * wanted) {
            return self
                .held
                .get(&format!("{role:?} {}", self.label), place)
                .map(Bytes::Kept);
        }
        let mut bytes = room(len).map_err(|e| self.error(e))?;
        let offset = place.offset.saturating_add(span.start);
        place.source.read_exact_at(offset, &mut bytes)?;
        Ok(Bytes::Own(span.start, bytes))
    }

    fn error(&self, error: impl std::fmt::Display) -> storage::Error {
        let text = std::io::Error::other(error.to_string());
        storage::Error::new("dequantise", &self.label, text)
    }

    /// Elements, into memory of their length.
    fn piece(&self, elements: Range<u64>, out: &mut [u8]) -> Result<(), storage::Error> {
        let mut fetched = Vec::new();
        for (role, span) in self.ready.needs(elements.clone()) {
            fetched.push((role, self.fetch(role, span, out.len() as u64)?));
        }
        let windows: Windows<'_> = (fetched.iter())
            .map(|(role, bytes)| match bytes {
                Bytes::Own(start, bytes) => (
                    *role,
                    Window {
                        start: *start,
                        bytes,
                    },
                ),
                Bytes::Kept(bytes) => (*role, Window { start: 0, bytes }),
            })
            .collect();
        let done = self.ready.run(elements, &windows, self.float, out);
        done.map_err(|error| self.error(error))
    }
}

impl Held {
    /// A part's bytes, read where they are not kept. One is read at a time.
    fn get(&self, key: &str, place: &Place) -> Result<Arc<Vec<u8>>, storage::Error> {
        let mut kept = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(at) = kept.iter().position(|(name, _)| name == key)
            && let Some(one) = kept.remove(at)
        {
            let bytes = Arc::clone(&one.1);
            kept.push_back(one);
            return Ok(bytes);
        }
        let all = |kept: &VecDeque<(String, Arc<Vec<u8>>)>| -> u64 {
            kept.iter().map(|(_, bytes)| bytes.len() as u64).sum()
        };
        while !kept.is_empty() && all(&kept).saturating_add(place.len) > HELD {
            kept.pop_front();
        }
        let failed = |error: Error| {
            let text = std::io::Error::other(error.to_string());
            storage::Error::new("keep a part of", place.source.label(), text)
        };
        let mut bytes = room(place.len).map_err(failed)?;
        place.source.read_exact_at(place.offset, &mut bytes)?;
        let bytes = Arc::new(bytes);
        kept.push_back((key.to_owned(), Arc::clone(&bytes)));
        Ok(bytes)
    }
}

impl Source for Numbers {
    fn label(&self) -> &str {
        &self.label
    }

    fn len(&self) -> u64 {
        self.ready
            .elements()
            .saturating_mul(self.float.bytes() as u64)
    }

    fn read_exact_at(&self, offset: u64, dst: &mut [u8]) -> Result<(), storage::Error> {
        let size = self.float.bytes() as u64;
        let end = offset.checked_add(dst.len() as u64);
        if end.is_none_or(|end| end > self.len()) {
            let past = std::io::ErrorKind::UnexpectedEof;
            return Err(storage::Error::new("read", &self.label, past));
        }
        let (mut at, mut rest) = (offset, dst);
        while !rest.is_empty() {
            let (first, within) = (at / size, (at % size) as usize);
            let whole = (rest.len() as u64 / size).min(PIECE);
            let len = if within > 0 || whole == 0 {
                // A piece of one number.
                let mut one = [0; 4];
                let one = one.get_mut(..size as usize).unwrap_or_default();
                self.piece(first..first + 1, one)?;
                let from = one.get(within..).unwrap_or_default();
                let len = from.len().min(rest.len());
                for (to, byte) in rest.iter_mut().zip(from) {
                    *to = *byte;
                }
                len
            } else {
                let len = (whole * size) as usize;
                let out = rest.get_mut(..len).unwrap_or_default();
                self.piece(first..first + whole, out)?;
                len
            };
            at += len as u64;
            rest = rest.get_mut(len..).unwrap_or_default();
        }
        Ok(())
    }

    fn residency(&self, _: u64, len: u64) -> Residency {
        // The processor makes these bytes: reading them past a cache is not a choice.
        Residency::all(len)
    }

    fn kind(&self) -> StorageKind {
        self.kind
    }
}
