//! Copies in order: command buffers, and a timeline that counts them as they end.
//!
//! Invariants:
//! 1. Handles are used with the device that made them, which they keep, and are destroyed once.
//! 2. Structures for the driver live until the call has returned.
//! 3. A command buffer is recorded only when the timeline has passed its last use, and by the one thread
//!    that has the queue.
//! 4. Regions lie within both of their buffers: [`Transfer::fits`] has been asked.
//! 5. What a copy uses lives until the timeline has passed it: the ticket keeps slot and memory.
#![allow(unsafe_code)]

use std::collections::{HashMap, VecDeque};
use std::fmt;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use ash::vk::{self, AccessFlags as Access, PipelineStageFlags as Stage};

use super::context::{Context, refused};
use super::memory::VulkanMemory;
use super::staging::VulkanStaging;
use crate::{Cause, Completion, Error, Queue, Slot, Stream, Ticket, Transfer};

/// Regions of one copy command at most, so that many rows need little memory.
const REGIONS: usize = 1024;

/// How long one wait may take before it is begun again.
const WAIT: u64 = 1_000_000_000;

/// A semaphore that counts a queue's copies as they end.
pub(super) struct Timeline {
    context: Arc<Context>,
    semaphore: vk::Semaphore,
    /// What it was when someone looked last.
    seen: AtomicU64,
}

impl Timeline {
    fn new(context: &Arc<Context>) -> Result<Arc<Timeline>, Error> {
        let mut kind =
            vk::SemaphoreTypeCreateInfo::default().semaphore_type(vk::SemaphoreType::TIMELINE);
        let create = vk::SemaphoreCreateInfo::default().push_next(&mut kind);
        // SAFETY: invariants 1 and 2.
        let semaphore = unsafe { context.device.create_semaphore(&create, None) };
        Ok(Arc::new(Timeline {
            semaphore: semaphore.map_err(|result| refused(context.id, "open a queue", result))?,
            context: Arc::clone(context),
            seen: AtomicU64::new(0),
        }))
    }

    /// How far it is.
    fn look(&self) -> Result<u64, Error> {
        // SAFETY: invariant 1.
        let value = unsafe {
            self.context
                .device
                .get_semaphore_counter_value(self.semaphore)
        };
        let value = value.map_err(|result| refused(self.context.id, "copy", result))?;
        self.seen.fetch_max(value, Ordering::AcqRel);
        Ok(value)
    }

    fn is_past(&self, value: u64) -> Result<bool, Error> {
        Ok(self.seen.load(Ordering::Acquire) >= value || self.look()? >= value)
    }

    pub fn has_passed(&self, value: u64) -> bool {
        self.is_past(value).unwrap_or(false)
    }

    pub fn wait(&self, value: u64) -> Result<(), Error> {
        while !self.is_past(value)? {
            let (semaphores, values) = ([self.semaphore], [value]);
            let wait = vk::SemaphoreWaitInfo::default()
                .semaphores(&semaphores)
                .values(&values);
            // SAFETY: invariants 1 and 2.
            match unsafe { self.context.device.wait_semaphores(&wait, WAIT) } {
                Ok(()) | Err(vk::Result::TIMEOUT) => {}
                Err(result) => return Err(refused(self.context.id, "copy", result)),
            }
        }
        Ok(())
    }
}

impl Drop for Timeline {
    fn drop(&mut self) {
        // SAFETY: invariant 1; its queue has drained before it let go.
        unsafe { self.context.device.destroy_semaphore(self.semaphore, None) };
    }
}

/// The end of one copy.
#[derive(Debug)]
struct End {
    timeline: Arc<Timeline>,
    value: u64,
}

impl Completion for End {
    fn is_done(&mut self) -> Result<bool, Error> {
        self.timeline.is_past(self.value)
    }

    fn wait(&mut self) -> Result<(), Error> {
        self.timeline.wait(self.value)
    }
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Way {
    Up,
    Down,
}

/// A queue of a Vulkan device.
pub(super) struct VulkanQueue {
    context: Arc<Context>,
    lane: usize,
    commands: vk::CommandPool,
    free: Vec<vk::CommandBuffer>,
    /// Command buffers under way, and the value that ends each.
    busy: VecDeque<(u64, vk::CommandBuffer)>,
    timeline: Arc<Timeline>,
    /// What the newest copy takes the timeline to.
    last: u64,
}

impl VulkanQueue {
    pub fn new(context: &Arc<Context>) -> Result<VulkanQueue, Error> {
        let timeline = Timeline::new(context)?;
        let family = context.families.first().copied().unwrap_or(0);
        let create = vk::CommandPoolCreateInfo::default()
            .queue_family_index(family)
            .flags(vk::CommandPoolCreateFlags::RESET_COMMAND_BUFFER);
        // SAFETY: invariants 1 and 2.
        let commands = unsafe { context.device.create_command_pool(&create, None) };
        Ok(VulkanQueue {
            commands: commands.map_err(|result| refused(context.id, "open a queue", result))?,
            context: Arc::clone(context),
            lane: context.lane(),
            free: Vec::new(),
            busy: VecDeque::new(),
            timeline,
            last: 0,
        })
    }

    /// A command buffer that nothing uses.
    fn take_commands(&mut self) -> Result<vk::CommandBuffer, Error> {
        let past = self.timeline.look()?;
        while let Some(&(value, commands)) = self.busy.front()
            && value <= past
        {
            self.busy.pop_front();
            self.free.push(commands);
        }
        if let Some(commands) = self.free.pop() {
            return Ok(commands);
        }
        let allocate = vk::CommandBufferAllocateInfo::default()
            .command_pool(self.commands)
            .command_buffer_count(1);
        // SAFETY: invariants 1 and 2.
        let made = unsafe { self.context.device.allocate_command_buffers(&allocate) };
        let made = made.map_err(|result| refused(self.context.id, "copy", result))?;
        let first = made.first().copied();
        first.ok_or_else(|| Error::unsupported(self.context.id, "command buffers"))
    }

    fn copy(&mut self, way: Way, slot: Slot, transfers: Vec<Transfer>) -> Result<Ticket, Error> {
        let staging = slot
            .staging()
            .and_then(|staging| staging.as_any().downcast_ref::<VulkanStaging>())
            .filter(|staging| Arc::ptr_eq(staging.context(), &self.context))
            .ok_or_else(|| self.invalid("a staging buffer of another device"))?;
        let copies = self.checked(&transfers, slot.bytes().len())?;
        let commands = self.take_commands()?;
        let value = self.last + 1;
        let started = Recording::new(&self.context, commands)
            .record(way, staging.buffer(), &copies)
            .and_then(|()| self.start(commands, &copies, value));
        if let Err(error) = started {
            for (_, memory) in &copies {
                memory.disclaim(&self.timeline, value);
            }
            self.free.push(commands);
            return Err(error);
        }
        self.last = value;
        self.busy.push_back((value, commands));
        let end = End {
            timeline: Arc::clone(&self.timeline),
            value,
        };
        drop(copies);
        Ok(Ticket::new(Box::new(end), slot, transfers))
    }

    /// Each transfer with its memory, if all of them fit.
    fn checked<'a>(
        &self,
        transfers: &'a [Transfer],
        slot: usize,
    ) -> Result<Vec<(&'a Transfer, &'a VulkanMemory)>, Error> {
        let mut checked = Vec::with_capacity(transfers.len());
        for transfer in transfers {
            if !transfer.fits(slot) {
                return Err(self.invalid("a transfer leaves its slot or its memory"));
            }
            let memory = transfer.memory.as_any().downcast_ref::<VulkanMemory>();
            let memory = memory
                .filter(|memory| Arc::ptr_eq(memory.context(), &self.context))
                .ok_or_else(|| self.invalid("memory of another device"))?;
            checked.push((transfer, memory));
        }
        Ok(checked)
    }

    fn invalid(&self, text: &str) -> Error {
        Error::new(self.context.id, "copy", Cause::Invalid(text.to_owned()))
    }

    /// Keeps the host from what is copied, and hands the commands to the device.
    fn start(
        &self,
        commands: vk::CommandBuffer,
        copies: &[(&Transfer, &VulkanMemory)],
        value: u64,
    ) -> Result<(), Error> {
        for (transfer, memory) in copies {
            let range = span(transfer, transfer.offset, transfer.memory_pitch);
            if range.is_empty() {
                continue;
            }
            if !memory.claim(range, &self.timeline, value) {
                return Err(self.invalid("the host is at the memory of a copy"));
            }
        }
        let (commands, signals, values) = ([commands], [self.timeline.semaphore], [value]);
        let mut timeline =
            vk::TimelineSemaphoreSubmitInfo::default().signal_semaphore_values(&values);
        let work = vk::SubmitInfo::default()
            .command_buffers(&commands)
            .signal_semaphores(&signals)
            .push_next(&mut timeline);
        self.context.submit(self.lane, &work)
    }
}

/// All that a transfer touches on one side, from its first byte to its last.
fn span(transfer: &Transfer, start: u64, pitch: u64) -> Range<u64> {
    // `fits` has checked that this does not overflow.
    let rows = (transfer.rows as u64).saturating_sub(1);
    start..start + rows * pitch + transfer.len as u64
}

/// A command buffer being recorded.
struct Recording<'a> {
    context: &'a Context,
    commands: vk::CommandBuffer,
    /// Source, destination, and regions of the copy command to come.
    pair: (vk::Buffer, vk::Buffer),
    regions: Vec<vk::BufferCopy>,
    /// By buffer: what has been written since the last barrier, from its first byte to its last.
    written: HashMap<vk::Buffer, Range<u64>>,
}

impl<'a> Recording<'a> {
    fn new(context: &'a Context, commands: vk::CommandBuffer) -> Self {
        Recording {
            context,
            commands,
            pair: (vk::Buffer::null(), vk::Buffer::null()),
            regions: Vec::new(),
            written: HashMap::new(),
        }
    }

    fn record(
        mut self,
        way: Way,
        (slot, skew): (vk::Buffer, u64),
        copies: &[(&Transfer, &VulkanMemory)],
    ) -> Result<(), Error> {
        let begin = vk::CommandBufferBeginInfo::default()
            .flags(vk::CommandBufferUsageFlags::ONE_TIME_SUBMIT);
        // SAFETY: invariants 1, 2 and 3.
        let begun = unsafe {
            self.context
                .device
                .begin_command_buffer(self.commands, &begin)
        };
        begun.map_err(|result| refused(self.context.id, "copy", result))?;
        // After the copies that came before, of this queue and others on the same lane.
        self.barrier(
            Stage::TRANSFER,
            Access::TRANSFER_READ | Access::TRANSFER_WRITE,
        );
        for (transfer, memory) in copies {
            self.transfer(way, (slot, skew), transfer, memory.raw());
        }
        self.flush();
        // What was written is seen by the host once it has waited: what a semaphore signals is not enough.
        self.barrier(Stage::HOST, Access::HOST_READ | Access::HOST_WRITE);
        // SAFETY: invariants 1 and 3.
        let ended = unsafe { self.context.device.end_command_buffer(self.commands) };
        ended.map_err(|result| refused(self.context.id, "copy", result))
    }

    fn transfer(
        &mut self,
        way: Way,
        (slot, skew): (vk::Buffer, u64),
        transfer: &Transfer,
        memory: vk::Buffer,
    ) {
        if transfer.len == 0 {
            return;
        }
        let at = transfer.at as u64 + skew;
        let (pair, written) = match way {
            Way::Up => (
                (slot, memory),
                span(transfer, transfer.offset, transfer.memory_pitch),
            ),
            Way::Down => (
                (memory, slot),
                span(transfer, at, transfer.slot_pitch as u64),
            ),
        };
        self.write(pair, written);
        for row in 0..transfer.rows as u64 {
            let there = transfer.offset + row * transfer.memory_pitch;
            let here = at + row * transfer.slot_pitch as u64;
            let (from, to) = match way {
                Way::Up => (here, there),
                Way::Down => (there, here),
            };
            let region = vk::BufferCopy::default().src_offset(from).dst_offset(to);
            self.regions.push(region.size(transfer.len as u64));
            if self.regions.len() == REGIONS {
                self.flush();
            }
        }
    }

    /// Sees to it that what is about to be written comes after what the same commands wrote there.
    fn write(&mut self, pair: (vk::Buffer, vk::Buffer), range: Range<u64>) {
        if self.pair != pair {
            self.flush();
            self.pair = pair;
        }
        match self.written.get_mut(&pair.1) {
            // Apart: transfers mostly come in the order of their offsets.
            Some(before) if range.start >= before.end => before.end = range.end,
            Some(before) if range.end <= before.start => before.start = range.start,
            Some(_) => {
                self.flush();
                self.barrier(Stage::TRANSFER, Access::TRANSFER_WRITE);
                self.written.clear();
                self.written.insert(pair.1, range);
            }
            None => {
                self.written.insert(pair.1, range);
            }
        }
    }

    /// Records the copy command that has been gathered.
    fn flush(&mut self) {
        if self.regions.is_empty() {
            return;
        }
        let (from, to) = self.pair;
        // SAFETY: invariants 1 to 5.
        unsafe {
            self.context
                .device
                .cmd_copy_buffer(self.commands, from, to, &self.regions)
        };
        self.regions.clear();
    }

    /// What copies have written so far comes before what this stage does from now on.
    fn barrier(&self, stage: Stage, access: Access) {
        let memory = [vk::MemoryBarrier::default()
            .src_access_mask(Access::TRANSFER_WRITE)
            .dst_access_mask(access)];
        let none = vk::DependencyFlags::empty();
        // SAFETY: invariants 1, 2 and 3.
        unsafe {
            self.context.device.cmd_pipeline_barrier(
                self.commands,
                Stage::TRANSFER,
                stage,
                none,
                &memory,
                &[],
                &[],
            )
        };
    }
}

impl Queue for VulkanQueue {
    fn upload(&mut self, slot: Slot, transfers: Vec<Transfer>) -> Result<Ticket, Error> {
        self.copy(Way::Up, slot, transfers)
    }

    fn download(&mut self, slot: Slot, transfers: Vec<Transfer>) -> Result<Ticket, Error> {
        self.copy(Way::Down, slot, transfers)
    }

    fn after(&mut self, stream: Stream) -> Result<(), Error> {
        self.before(stream)
    }

    fn before(&mut self, stream: Stream) -> Result<(), Error> {
        // There is no default stream that anyone could have given work.
        if stream == Stream::DEFAULT {
            return Ok(());
        }
        Err(Error::unsupported(self.context.id, "a stream of others"))
    }

    fn drain(&mut self) -> Result<(), Error> {
        self.timeline.wait(self.last)
    }
}

impl Drop for VulkanQueue {
    fn drop(&mut self) {
        if self.drain().is_err() {
            // Copies may still run: what they use is given up, together with the device.
            std::mem::forget(Arc::clone(&self.timeline));
            return;
        }
        // SAFETY: invariants 1 and 3: none of its command buffers is in use.
        unsafe {
            self.context
                .device
                .destroy_command_pool(self.commands, None)
        };
    }
}

impl fmt::Debug for VulkanQueue {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("VulkanQueue")
            .field("device", &self.context.id)
            .field("copies", &self.last)
            .finish_non_exhaustive()
    }
}

impl fmt::Debug for Timeline {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Timeline")
            .field("seen", &self.seen)
            .finish_non_exhaustive()
    }
}
