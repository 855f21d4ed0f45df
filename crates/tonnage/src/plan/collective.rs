//! Ranks that load by messages: each byte is read once, by one of them, and sent to those that need it.
//!
//! The messages themselves are the caller's, since every framework has its own. For each round it asks what goes
//! where ([`Together::message_sizes`]), lets the blocks be read ([`Together::read_round`]), exchanges, and lets what
//! came be put in its place ([`Together::take_messages`], [`Together::take_broadcast`]).

use tonnage_engine::Options;
use tonnage_plan::io::Copy;

use super::load::{LocalMemory, PlanLoad, Ran};
use super::scatter;
use super::together::{Places, Raw, Together};
use crate::error::{Error, Result};

/// What goes where in a round.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct MessageSizes {
    /// Bytes to each member.
    pub send: Vec<u64>,
    /// Bytes from each member.
    pub receive: Vec<u64>,
    /// Then, one after the other: who sends all members how much.
    pub broadcasts: Vec<(u32, u64)>,
    /// Bytes of those broadcasts that this member makes.
    pub own: u64,
}

impl Together<'_> {
    /// What goes where in a round.
    pub fn message_sizes(&self, round: usize) -> MessageSizes {
        let splits = self.share.splits(round);
        MessageSizes {
            send: splits.send,
            receive: splits.receive,
            broadcasts: self.exchange.broadcasts(round),
            own: self.share.broadcast_len(round),
        }
    }

    /// Reads a member's blocks of a round: into the rank's tensors what it needs itself, into `send` what goes to
    /// each of the others, one behind the other, into `own` what it sends to all.
    ///
    /// # Errors
    /// As [`PlannedLoad::load`](super::PlannedLoad::load); `BUFFER_SIZE` for buffers of another length.
    pub fn read_round(
        &self,
        round: usize,
        parts: &mut [LocalMemory<'_>],
        raw: &mut Raw,
        (send, own): (&mut [u8], &mut [u8]),
        load: &PlanLoad<'_>,
        options: &Options<'_>,
    ) -> Result<Ran> {
        let sizes = self.message_sizes(round);
        let sent: u64 = sizes.send.iter().sum();
        for (found, needed) in [(send.len(), sent), (own.len(), sizes.own)] {
            if found as u64 != needed {
                let text =
                    format!("a buffer for messages of {found} bytes where {needed} are sent");
                return Err(Error::usage("BUFFER_SIZE", text));
            }
        }
        if load.verify {
            return Err(Error::usage(
                "NO_CHECKSUMS",
                "checksums are compared where each rank reads for itself",
            ));
        }
        let cores = std::thread::available_parallelism().map_or(1, usize::from);
        let asked = options
            .threads
            .unwrap_or(cores.clamp(1, Options::MAX_THREADS));
        let (threads, block) = self.scratch(load, options, asked)?;
        let options = Options {
            threads: Some(threads),
            block: Some(block as usize),
            ..*options
        };
        let files: Vec<scatter::File<'_>> = self.load.files(options.strategy)?;
        let extra = [send, own];
        let io = self.share.reads(round);
        let mut ran = self.run(&files, io, Places { parts, raw, extra }, &options)?;
        ran.report.reason = "each byte was read by one rank, and sent to those that need it";
        ran.needed = 0;
        Ok(ran)
    }

    /// Puts what came from all members, one behind the other, into the rank's tensors.
    ///
    /// # Errors
    /// `BUFFER_SIZE` for messages of another length.
    pub fn take_messages(
        &self,
        round: usize,
        received: &[u8],
        parts: &mut [LocalMemory<'_>],
        raw: &mut Raw,
        options: &Options<'_>,
    ) -> Result<()> {
        let needed: u64 = self.share.splits(round).receive.iter().sum();
        self.whole(received, needed)?;
        let io = self.share.message_takes(round);
        self.take(io, received, parts, raw, options).map(drop)
    }

    /// Puts what a broadcast brought, counted in the round, into the rank's tensors.
    ///
    /// # Errors
    /// `BUFFER_SIZE` for a broadcast of another length, or one that is none.
    pub fn take_broadcast(
        &self,
        (round, position): (usize, usize),
        received: &[u8],
        parts: &mut [LocalMemory<'_>],
        raw: &mut Raw,
        options: &Options<'_>,
    ) -> Result<()> {
        let sizes = self.exchange.broadcasts(round);
        let needed = sizes.get(position).map_or(u64::MAX, |one| one.1);
        self.whole(received, needed)?;
        let io = self.share.broadcast_takes(round, position);
        self.take(io, received, parts, raw, options).map(drop)
    }

    /// What would be taken out of the messages of a round, or out of its broadcast of this position: for tensors
    /// that lie where only a framework reaches.
    pub fn copies(&self, round: usize, broadcast: Option<usize>) -> Vec<Copy> {
        match broadcast {
            None => self.share.message_takes(round).copies,
            Some(position) => self.share.broadcast_takes(round, position).copies,
        }
    }

    fn whole(&self, received: &[u8], needed: u64) -> Result<()> {
        if received.len() as u64 == needed {
            return Ok(());
        }
        let text = format!(
            "messages of {} bytes where {needed} were due",
            received.len()
        );
        Err(Error::usage("BUFFER_SIZE", text))
    }
}
