//! Memory for tensors: a buffer, which the host sees too where both share their memory.
//!
//! Invariants:
//! 1. The map of a buffer covers the memory's length, never moves, and lives as long as the memory.
//! 2. No two borrows of its bytes overlap, and none overlaps a copy that is under way: each takes its range in
//!    [`Taken`] first. The host's are given back after the call; the device's when its timeline has passed.
//! 3. Handles are used with the device that made them; structures live until the call has returned.
#![allow(unsafe_code)]

use std::any::Any;
use std::fmt;
use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use ash::vk::{self, Handle, MemoryPropertyFlags as Is};

use super::buffer::{Buffer, Mapped};
use super::context::Context;
use super::queue::Timeline;
use crate::{DeviceId, DeviceMemory, Error};

/// Memory of a Vulkan device: a `VkBuffer` from its first byte on.
///
/// Whoever computes with it finds it through [`DeviceMemory::as_any`] and uses it with the device that
/// [`handles`](VulkanMemory::handles) names. The buffer's usage is copies in both directions, and storage;
/// all families that the device was opened with share it. Wait for the ticket of a copy, or have
/// [`Queue::drain`](crate::Queue::drain) return, before submitting work that reads it.
pub struct VulkanMemory {
    len: u64,
    host: Option<Host>,
    buffer: Buffer,
}

/// The handles behind a [`VulkanMemory`], as numbers. They are valid for as long as it is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct VulkanHandles {
    /// `VkInstance`.
    pub instance: u64,
    /// `VkPhysicalDevice`.
    pub physical_device: u64,
    /// `VkDevice`.
    pub device: u64,
    /// Queue families that the device was opened with: the one of the copies, then one that computes.
    pub families: Vec<u32>,
    /// `VkBuffer`.
    pub buffer: u64,
    /// `VkDeviceMemory`, bound to the buffer alone.
    pub memory: u64,
    /// Where in that memory the buffer starts.
    pub offset: u64,
    /// The memory's type, as the physical device counts.
    pub memory_type: u32,
}

/// What the host sees of it.
struct Host {
    bytes: Mapped,
    coherent: bool,
    taken: Mutex<Taken>,
}

#[derive(Default)]
struct Taken {
    host: Vec<Range<u64>>,
    device: Vec<Claim>,
    /// How many claims there may be before those that are over are looked for.
    enough: usize,
}

/// A range that a copy uses until its timeline has passed a value.
struct Claim {
    range: Range<u64>,
    timeline: Arc<Timeline>,
    value: u64,
}

fn overlap(one: &Range<u64>, other: &Range<u64>) -> bool {
    one.start < other.end && other.start < one.end
}

impl VulkanMemory {
    pub(super) fn new(context: &Arc<Context>, len: u64, shared: bool) -> Result<Self, Error> {
        let choose = |bits| context.facts.device_type(bits, shared);
        let buffer = Buffer::new(context, "allocate", len, choose)?;
        let host = match shared {
            false => None,
            true => Some(Host {
                bytes: buffer.map("allocate")?,
                coherent: context
                    .facts
                    .is(buffer.memory_type)
                    .contains(Is::HOST_COHERENT),
                taken: Mutex::default(),
            }),
        };
        Ok(VulkanMemory { len, host, buffer })
    }

    /// What it is to Vulkan.
    pub fn handles(&self) -> VulkanHandles {
        let context = self.context();
        VulkanHandles {
            instance: context.instance().as_raw(),
            physical_device: context.physical.as_raw(),
            device: context.device.handle().as_raw(),
            families: context.families.clone(),
            buffer: self.buffer.raw.as_raw(),
            memory: self.buffer.memory.as_raw(),
            offset: 0,
            memory_type: self.buffer.memory_type,
        }
    }

    pub(super) fn context(&self) -> &Arc<Context> {
        &self.buffer.context
    }

    pub(super) fn raw(&self) -> vk::Buffer {
        self.buffer.raw
    }

    /// Takes a range for a copy that ends when the timeline passes `value`. False if the host is at it.
    pub(super) fn claim(&self, range: Range<u64>, timeline: &Arc<Timeline>, value: u64) -> bool {
        let Some(host) = &self.host else { return true };
        let mut taken = host.lock();
        if taken.host.iter().any(|other| overlap(other, &range)) {
            return false;
        }
        taken.forget_what_is_over();
        if let Some(last) = taken.device.last_mut()
            && (last.range.end, last.value) == (range.start, value)
            && Arc::ptr_eq(&last.timeline, timeline)
        {
            last.range.end = range.end;
            return true;
        }
        let timeline = Arc::clone(timeline);
        taken.device.push(Claim {
            range,
            timeline,
            value,
        });
        true
    }

    /// Gives back what was taken for a copy that did not start.
    pub(super) fn disclaim(&self, timeline: &Arc<Timeline>, value: u64) {
        if let Some(host) = &self.host {
            let mine =
                |claim: &Claim| claim.value == value && Arc::ptr_eq(&claim.timeline, timeline);
            host.lock().device.retain(|claim| !mine(claim));
        }
    }

    /// Takes a range for the host, after the copies that are at it.
    fn take<'a>(&self, host: &'a Host, range: &Range<u64>) -> Option<GiveBack<'a>> {
        loop {
            let mut taken = host.lock();
            if taken.host.iter().any(|other| overlap(other, range)) {
                return None;
            }
            let copy = taken.device.iter().find(|claim| {
                overlap(&claim.range, range) && !claim.timeline.has_passed(claim.value)
            });
            let Some(copy) = copy else {
                taken.host.push(range.clone());
                return Some(GiveBack(host, range.clone()));
            };
            let (timeline, value) = (Arc::clone(&copy.timeline), copy.value);
            drop(taken);
            timeline.wait(value).ok()?;
        }
    }

    /// The range of a call that makes caches agree: whole atoms around these bytes.
    fn atoms(&self, range: &Range<u64>) -> vk::MappedMemoryRange<'static> {
        let atom = self.context().facts.atom.max(1);
        let start = range.start / atom * atom;
        let end = range.end.checked_next_multiple_of(atom);
        let size = match end {
            Some(end) if end < self.buffer.bytes => end - start,
            _ => vk::WHOLE_SIZE,
        };
        vk::MappedMemoryRange::default()
            .memory(self.buffer.memory)
            .offset(start)
            .size(size)
    }

    fn call(&self, host: &Host, range: &Range<u64>, fill: &mut dyn FnMut(&mut [u8])) -> bool {
        let device = &self.context().device;
        let atoms = [self.atoms(range)];
        // SAFETY: invariant 3.
        if !host.coherent && unsafe { device.invalidate_mapped_memory_ranges(&atoms) }.is_err() {
            return false;
        }
        // SAFETY: within the map (invariant 1; `with_host` has checked the range).
        let start = unsafe { host.bytes.0.as_ptr().add(range.start as usize) };
        let len = (range.end - range.start) as usize;
        // SAFETY: within the map, and nobody else is at this range (invariants 1 and 2).
        let bytes = unsafe { std::slice::from_raw_parts_mut(start, len) };
        fill(bytes);
        // SAFETY: invariant 3.
        host.coherent || unsafe { device.flush_mapped_memory_ranges(&atoms) }.is_ok()
    }
}

impl Host {
    fn lock(&self) -> MutexGuard<'_, Taken> {
        self.taken.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Taken {
    fn forget_what_is_over(&mut self) {
        if self.device.len() >= self.enough.max(32) {
            self.device
                .retain(|claim| !claim.timeline.has_passed(claim.value));
            self.enough = self.device.len() * 2;
        }
    }
}

struct GiveBack<'a>(&'a Host, Range<u64>);

impl Drop for GiveBack<'_> {
    fn drop(&mut self) {
        let mut taken = self.0.lock();
        if let Some(at) = taken.host.iter().position(|range| *range == self.1) {
            taken.host.swap_remove(at);
        }
    }
}

impl DeviceMemory for VulkanMemory {
    fn device(&self) -> DeviceId {
        self.context().id
    }

    fn len(&self) -> u64 {
        self.len
    }

    /// The `VkBuffer`.
    fn address(&self) -> u64 {
        self.buffer.raw.as_raw()
    }

    /// Waits for copies that are at this range.
    fn with_host(&self, range: Range<u64>, fill: &mut dyn FnMut(&mut [u8])) -> bool {
        let Some(host) = &self.host else { return false };
        if range.start > range.end || range.end > self.len {
            return false;
        }
        let taken = self.take(host, &range);
        taken.is_some() && self.call(host, &range, fill)
    }

    fn as_any(&self) -> &dyn Any {
        self
    }
}

impl fmt::Debug for VulkanMemory {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("VulkanMemory")
            .field("device", &self.device())
            .field("len", &self.len)
            .field("seen by the host", &self.host.is_some())
            .finish_non_exhaustive()
    }
}
