//! A buffer with memory of its own.
//!
//! Invariants:
//! 1. A [`Buffer`] owns its handles: what made them (its context) outlives them, and its `Drop` destroys
//!    each once. A handle that was not made yet is null, which is destroyed without effect.
//! 2. Structures for the driver live until the call has returned.
//! 3. Memory is bound once, right after both were made, and is as large as the buffer requires.
//! 4. A [`Mapped`] is used only as long as its buffer, which its owner keeps beside it.
//! 5. Host memory that was taken in outlives the buffer: see [`Buffer::import`].
#![allow(unsafe_code)]

use std::ffi::c_void;
use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use ash::vk;

use super::context::{Context, refused};
use crate::{Cause, Error};

/// Memory that the driver has mapped for the host.
#[derive(Clone, Copy, Debug)]
pub(super) struct Mapped(pub NonNull<u8>);

// SAFETY: an address, valid on every thread; whoever reads or writes through it has the right to (invariant 4).
unsafe impl Send for Mapped {}
// SAFETY: as above.
unsafe impl Sync for Mapped {}

/// A buffer and its memory.
pub(super) struct Buffer {
    pub context: Arc<Context>,
    pub raw: vk::Buffer,
    pub memory: vk::DeviceMemory,
    pub memory_type: u32,
    /// Bytes of the memory.
    pub bytes: u64,
}

const IMPORT: vk::ExternalMemoryHandleTypeFlags =
    vk::ExternalMemoryHandleTypeFlags::HOST_ALLOCATION_EXT;

impl Buffer {
    /// A buffer of this length in memory that `choose` picks among those that are allowed.
    pub fn new(
        context: &Arc<Context>,
        doing: &'static str,
        len: u64,
        choose: impl Fn(u32) -> Option<u32>,
    ) -> Result<Buffer, Error> {
        let (mut buffer, needs) = Self::bare(context, doing, len, None)?;
        let chosen = choose(needs.memory_type_bits);
        buffer.memory_type =
            chosen.ok_or_else(|| Error::unsupported(context.id, "memory for buffers"))?;
        // Drivers may take more than they have, and fail later.
        let heap = context.facts.heap(buffer.memory_type);
        if heap.is_none_or(|(_, bytes)| needs.size > bytes) {
            return Err(buffer.too_large(doing, len));
        }
        let mut dedicated = vk::MemoryDedicatedAllocateInfo::default().buffer(buffer.raw);
        let allocate = vk::MemoryAllocateInfo::default()
            .allocation_size(needs.size)
            .memory_type_index(buffer.memory_type)
            .push_next(&mut dedicated);
        buffer.back(doing, len, &allocate)?;
        Ok(buffer)
    }

    /// A buffer over host memory of `len` bytes at `start`, both multiples of what the driver asks for.
    /// The caller keeps that memory until the buffer is gone (invariant 5).
    pub fn import(
        context: &Arc<Context>,
        doing: &'static str,
        start: NonNull<u8>,
        len: u64,
    ) -> Result<Buffer, Error> {
        let unsupported = || Error::unsupported(context.id, "host memory for staging");
        let import = context.import.as_ref().ok_or_else(unsupported)?;
        let start: *mut c_void = start.as_ptr().cast();
        let mut allowed = vk::MemoryHostPointerPropertiesEXT::default();
        let ask = import.fp().get_memory_host_pointer_properties_ext;
        // SAFETY: invariants 1 and 2; the pointer is to host memory (the caller).
        let result = unsafe { ask(import.device(), IMPORT, start, &mut allowed) };
        result
            .result()
            .map_err(|result| refused(context.id, doing, result))?;
        let mut external = vk::ExternalMemoryBufferCreateInfo::default().handle_types(IMPORT);
        let (mut buffer, needs) = Self::bare(context, doing, len, Some(&mut external))?;
        let chosen = context
            .facts
            .staging_type(needs.memory_type_bits & allowed.memory_type_bits);
        buffer.memory_type = chosen.ok_or_else(unsupported)?;
        if needs.size > len {
            return Err(unsupported());
        }
        let mut taken = vk::ImportMemoryHostPointerInfoEXT::default().handle_type(IMPORT);
        taken.p_host_pointer = start;
        let allocate = vk::MemoryAllocateInfo::default()
            .allocation_size(len)
            .memory_type_index(buffer.memory_type)
            .push_next(&mut taken);
        buffer.back(doing, len, &allocate)?;
        Ok(buffer)
    }

    /// A buffer that has no memory yet, and what it needs.
    fn bare(
        context: &Arc<Context>,
        doing: &'static str,
        len: u64,
        external: Option<&mut vk::ExternalMemoryBufferCreateInfo<'_>>,
    ) -> Result<(Buffer, vk::MemoryRequirements), Error> {
        let mut buffer = Buffer {
            context: Arc::clone(context),
            raw: vk::Buffer::null(),
            memory: vk::DeviceMemory::null(),
            memory_type: context.facts.device_type(u32::MAX, false).unwrap_or(0),
            bytes: 0,
        };
        // Shaders bind whole words; a buffer of nothing is refused.
        let size = len.max(4).checked_next_multiple_of(4);
        let size = size.filter(|&size| size <= context.facts.max_buffer);
        let size = size.ok_or_else(|| buffer.too_large(doing, len))?;
        let usage = vk::BufferUsageFlags::TRANSFER_SRC
            | vk::BufferUsageFlags::TRANSFER_DST
            | vk::BufferUsageFlags::STORAGE_BUFFER;
        let mut create = vk::BufferCreateInfo::default().size(size).usage(usage);
        if context.families.len() > 1 {
            // Copied to by one family and used by another, without handing it over each time.
            create = create
                .sharing_mode(vk::SharingMode::CONCURRENT)
                .queue_family_indices(&context.families);
        }
        if let Some(external) = external {
            create = create.push_next(external);
        }
        // SAFETY: invariants 1 and 2.
        let raw = unsafe { context.device.create_buffer(&create, None) };
        buffer.raw = raw.map_err(|result| buffer.failed(doing, len, result))?;
        // SAFETY: invariant 1.
        let needs = unsafe { context.device.get_buffer_memory_requirements(buffer.raw) };
        Ok((buffer, needs))
    }

    /// Allocates memory and binds it.
    fn back(
        &mut self,
        doing: &'static str,
        len: u64,
        allocate: &vk::MemoryAllocateInfo<'_>,
    ) -> Result<(), Error> {
        let context = Arc::clone(&self.context);
        // SAFETY: invariant 2.
        let memory = unsafe { context.device.allocate_memory(allocate, None) };
        self.memory = memory.map_err(|result| self.failed(doing, len, result))?;
        self.bytes = allocate.allocation_size;
        if let Some(allocated) = context.allocated(self.memory_type) {
            allocated.fetch_add(self.bytes, Ordering::Relaxed);
        }
        // SAFETY: invariants 1 and 3.
        let bound = unsafe { context.device.bind_buffer_memory(self.raw, self.memory, 0) };
        bound.map_err(|result| self.failed(doing, len, result))
    }

    /// Maps all of it, for as long as it lives. Called once at most.
    pub fn map(&self, doing: &'static str) -> Result<Mapped, Error> {
        let (whole, none) = (vk::WHOLE_SIZE, vk::MemoryMapFlags::empty());
        // SAFETY: invariant 1; the memory's type was chosen to be visible, and it is mapped once.
        let start = unsafe { self.context.device.map_memory(self.memory, 0, whole, none) };
        let start = start.map_err(|result| self.failed(doing, self.bytes, result))?;
        let start = NonNull::new(start.cast());
        let start = start.ok_or_else(|| Error::unsupported(self.context.id, "mapped memory"))?;
        Ok(Mapped(start))
    }

    fn too_large(&self, doing: &'static str, needed: u64) -> Error {
        let free = Some(self.context.free(self.memory_type));
        Error::new(self.context.id, doing, Cause::OutOfMemory { needed, free })
    }

    fn failed(&self, doing: &'static str, len: u64, result: vk::Result) -> Error {
        match result {
            vk::Result::ERROR_OUT_OF_DEVICE_MEMORY | vk::Result::ERROR_OUT_OF_HOST_MEMORY => {
                self.too_large(doing, len)
            }
            result => refused(self.context.id, doing, result),
        }
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        let context = &self.context;
        // SAFETY: invariant 1; copies have ended, since their tickets hold the owner.
        unsafe { context.device.destroy_buffer(self.raw, None) };
        // SAFETY: invariant 1; freeing also ends the map.
        unsafe { context.device.free_memory(self.memory, None) };
        if let Some(allocated) = context.allocated(self.memory_type) {
            allocated.fetch_sub(self.bytes, Ordering::Relaxed);
        }
    }
}
