//! A rank's tensors in host memory one after the other, while the next ones are being read.

use std::sync::Arc;
use std::sync::mpsc::sync_channel;

use tonnage_engine::{self as engine, Cancel, HostBuffer, Options};
use tonnage_format::Dtype;

use super::PlannedLoad;
use super::load::{LocalMemory, PlanLoad, Ran, len_as, wanted};
use crate::error::{Error, Result};

/// Tensors of this many bytes are read together: a stack of small ones costs one request.
const PORTION: u64 = 32 << 20;

/// A tensor that a stream hands out.
#[derive(Clone, Debug)]
pub struct PlannedTensor {
    /// What the rank calls it.
    pub name: String,
    /// Its dtype after casting.
    pub dtype: Dtype,
    /// Its extents in elements.
    pub shape: Vec<u64>,
    memory: Arc<HostBuffer>,
    begin: usize,
    end: usize,
}

impl PlannedTensor {
    /// Its bytes. The memory, which it may share with its neighbours, is free with the last of them.
    pub fn bytes(&self) -> &[u8] {
        self.memory
            .as_slice()
            .get(self.begin..self.end)
            .unwrap_or_default()
    }
}

impl PlannedLoad<'_> {
    /// Calls `each` with a rank's tensors, one after the other in the order of the request, while the next ones are
    /// read: never more than `ahead` bytes of them that were not handed out, but for a single tensor that is larger.
    ///
    /// # Errors
    /// As [`PlannedLoad::load`]; what `each` says, which ends it.
    pub fn stream(
        &self,
        rank: u32,
        load: &PlanLoad<'_>,
        ahead: u64,
        each: &mut dyn FnMut(PlannedTensor) -> Result<()>,
    ) -> Result<Ran> {
        let locals = self.locals(rank)?;
        let mut lens = Vec::with_capacity(locals.len());
        for local in &locals {
            lens.push(len_as(local, wanted(local, load.dtype))?);
        }
        // One portion is with the caller, one waits, one is being read.
        let portions = portions(&lens, PORTION.min(ahead / 3));
        let over = Cancel::new();
        let mut ran = Ran::default();
        std::thread::scope(|scope| {
            let (send, receive) = sync_channel(0);
            let (over, options) = (&over, load.options());
            let (locals, lens) = (&locals, &lens);
            scope.spawn(move || {
                for portion in portions {
                    if over.is_cancelled() {
                        return;
                    }
                    let read = self.portion(locals, lens, portion, load, &options, over);
                    let failed = read.is_err();
                    // Nobody listens once the caller has had enough.
                    if send.send(read).is_err() || failed {
                        return;
                    }
                }
            });
            let handed_out = receive.iter().try_for_each(|portion| {
                let (tensors, done) = portion?;
                ran.add(&done);
                tensors.into_iter().try_for_each(&mut *each)
            });
            over.cancel();
            drop(receive);
            handed_out
        })?;
        Ok(ran)
    }

    fn portion(
        &self,
        locals: &[super::Local],
        lens: &[u64],
        portion: std::ops::Range<usize>,
        load: &PlanLoad<'_>,
        options: &Options<'_>,
        over: &Cancel,
    ) -> Result<(Vec<PlannedTensor>, Ran)> {
        let mut places = Vec::with_capacity(portion.len());
        let mut end = 0_u64;
        for at in portion {
            let (Some(local), Some(&len)) = (locals.get(at), lens.get(at)) else {
                continue;
            };
            let too_large = || Error::from(tonnage_format::Reason::SizeOverflow);
            let begin = end
                .checked_next_multiple_of(crate::load::ALIGN)
                .ok_or_else(too_large)?;
            end = begin
                .checked_add(len)
                .filter(|&end| isize::try_from(end).is_ok())
                .ok_or_else(too_large)?;
            places.push((at, local, begin as usize, end as usize));
        }
        let mut memory = HostBuffer::new(end)?;
        let (mut rest, mut done) = (memory.as_mut_slice(), 0);
        let mut parts = Vec::with_capacity(places.len());
        for &(local, of, begin, end) in &places {
            let (_, after) = std::mem::take(&mut rest).split_at_mut(begin - done);
            let (part, after) = after.split_at_mut(end - begin);
            (rest, done) = (after, end);
            parts.push(LocalMemory {
                local,
                dtype: wanted(of, load.dtype),
                memory: part,
                zeroed: true,
            });
        }
        // Whoever listens may have had enough, whatever flag of the caller's there is.
        if over.is_cancelled() {
            return Err(engine::Error::Cancelled.into());
        }
        let ran = self.load_into(locals, parts, load, options)?;
        let memory = Arc::new(memory);
        let tensors = places
            .into_iter()
            .map(|(_, local, begin, end)| PlannedTensor {
                name: local.name.to_string(),
                dtype: wanted(local, load.dtype),
                shape: local.shape.to_vec(),
                memory: Arc::clone(&memory),
                begin,
                end,
            });
        Ok((tensors.collect(), ran))
    }
}

/// Positions in portions of at most `most` bytes, or of one.
fn portions(lens: &[u64], most: u64) -> Vec<std::ops::Range<usize>> {
    let (mut made, mut begin, mut held) = (Vec::new(), 0, 0_u64);
    for (at, &len) in lens.iter().enumerate() {
        if at > begin && held.saturating_add(len) > most {
            made.push(begin..at);
            (begin, held) = (at, 0);
        }
        held = held.saturating_add(len);
    }
    if begin < lens.len() {
        made.push(begin..lens.len());
    }
    made
}
