//! Someone who works with a tensor's buffer, by the handles that its memory tells.
//!
//! Invariants: handles are live while the memory is, which is borrowed; structures live until the call has
//! returned; the queue is not used by others meanwhile; what is made is destroyed once, after its use.
#![allow(unsafe_code)]

use ash::vk::{self, Handle};
use tonnage_device::Memory;
use tonnage_device::vulkan::{VulkanHandles, VulkanMemory};

pub struct Consumer<'a> {
    handles: VulkanHandles,
    device: ash::Device,
    _entry: ash::Entry,
    _memory: &'a Memory,
}

impl<'a> Consumer<'a> {
    pub fn of(memory: &'a Memory) -> Self {
        let handles = memory.as_any().downcast_ref::<VulkanMemory>();
        let handles = handles.expect("memory of a Vulkan device").handles();
        assert_eq!(handles.buffer, memory.address());
        // SAFETY: the system's loader.
        let entry = unsafe { ash::Entry::load() }.expect("the loader");
        let instance = vk::Instance::from_raw(handles.instance);
        // SAFETY: a live instance.
        let instance = unsafe { ash::Instance::load(entry.static_fn(), instance) };
        let device = vk::Device::from_raw(handles.device);
        // SAFETY: a live device of it.
        let device = unsafe { ash::Device::load(instance.fp_v1_0(), device) };
        Consumer {
            handles,
            device,
            _entry: entry,
            _memory: memory,
        }
    }

    /// Writes the word all over the buffer, twice, with or without a barrier between.
    pub fn fill(&self, word: u32, barrier: bool) {
        let device = &self.device;
        let family = *self
            .handles
            .families
            .last()
            .expect("a family that computes");
        let create = vk::CommandPoolCreateInfo::default().queue_family_index(family);
        // SAFETY: the module's invariants, here and below.
        let pool = unsafe { device.create_command_pool(&create, None) }.expect("a pool");
        let allocate = vk::CommandBufferAllocateInfo::default()
            .command_pool(pool)
            .command_buffer_count(1);
        // SAFETY: as above.
        let commands = unsafe { device.allocate_command_buffers(&allocate) }.expect("commands");
        let begin = vk::CommandBufferBeginInfo::default();
        // SAFETY: as above.
        unsafe { device.begin_command_buffer(commands[0], &begin) }.expect("begin");
        self.fill_once(commands[0], word);
        if barrier {
            let memory = [vk::MemoryBarrier::default()
                .src_access_mask(vk::AccessFlags::TRANSFER_WRITE)
                .dst_access_mask(vk::AccessFlags::TRANSFER_WRITE)];
            let stage = vk::PipelineStageFlags::TRANSFER;
            let none = vk::DependencyFlags::empty();
            // SAFETY: as above.
            unsafe {
                device.cmd_pipeline_barrier(commands[0], stage, stage, none, &memory, &[], &[])
            };
        }
        self.fill_once(commands[0], word);
        // SAFETY: as above.
        unsafe { device.end_command_buffer(commands[0]) }.expect("end");
        // SAFETY: as above; each family was opened with a queue.
        let queue = unsafe { device.get_device_queue(family, 0) };
        let work = [vk::SubmitInfo::default().command_buffers(&commands)];
        // SAFETY: as above.
        unsafe { device.queue_submit(queue, &work, vk::Fence::null()) }.expect("submit");
        // SAFETY: as above.
        unsafe { device.queue_wait_idle(queue) }.expect("wait");
        // SAFETY: as above.
        unsafe { device.destroy_command_pool(pool, None) };
    }

    fn fill_once(&self, commands: vk::CommandBuffer, word: u32) {
        let buffer = vk::Buffer::from_raw(self.handles.buffer);
        // SAFETY: as above.
        unsafe {
            self.device
                .cmd_fill_buffer(commands, buffer, 0, vk::WHOLE_SIZE, word)
        };
    }
}
