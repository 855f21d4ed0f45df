//! A Vulkan device, opened: loader, instance, device, and its queues.
//!
//! Invariants:
//! 1. Handles are used only with the instance or device that made them, which outlives them: whatever has
//!    a handle has an `Arc` of its [`Context`], and a `Context` of its [`Instance`].
//! 2. A handle is destroyed once, by the `Drop` of what owns it.
//! 3. Structures for the driver live until the call has returned, and everything that they chain is of a
//!    kind that the driver's version or an extension of it knows.
//! 4. Only versions and extensions that the driver offers are used, so no call's address is missing.
#![allow(unsafe_code)]

use std::ffi::CStr;
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError, Weak};

use ash::{ext, vk};

use super::choose::Facts;
use crate::{Cause, DeviceId, Error, Info, Kind};

/// Timeline semaphores are part of this.
const VERSION: u32 = vk::API_VERSION_1_2;

/// Queues of a family that are asked for at most. Readers that have one each never wait for the same lock.
const QUEUES: u32 = 4;

/// The cause of what a call returned.
pub(super) fn refused(id: DeviceId, doing: &'static str, result: vk::Result) -> Error {
    let (code, text) = (i64::from(result.as_raw()), result.to_string());
    Error::new(id, doing, Cause::Driver { code, text })
}

fn missing(index: u32, text: String) -> Error {
    let id = DeviceId::new(Kind::Vulkan, index);
    Error::new(id, "open", Cause::Missing(text))
}

/// The loader, and an instance of ours.
pub(super) struct Instance {
    raw: ash::Instance,
    /// Keeps the library open.
    _entry: ash::Entry,
}

impl Instance {
    /// Opens the loader of this path, or the one that the system has, for the sake of a device.
    pub fn new(library: Option<&PathBuf>, index: u32) -> Result<Instance, Error> {
        let opened = match library {
            // SAFETY: whoever names the library vouches that it is a Vulkan loader.
            Some(path) => unsafe { ash::Entry::load_from(path) },
            // SAFETY: under this name systems have the Vulkan loader.
            None => unsafe { ash::Entry::load() },
        };
        let entry = opened.map_err(|error| {
            missing(index,
                format!(
                    "no Vulkan loader ({error}): install libvulkan (Debian: libvulkan1, Fedora: vulkan-loader)"
                ),
            )
        })?;
        // SAFETY: a call without conditions.
        let version = unsafe { entry.try_enumerate_instance_version() };
        if version.ok().flatten().is_none_or(|found| found < VERSION) {
            return Err(missing(
                index,
                "the Vulkan loader is older than 1.2".to_owned(),
            ));
        }
        let application = vk::ApplicationInfo::default()
            .application_name(c"tonnage")
            .api_version(VERSION);
        let create = vk::InstanceCreateInfo::default().application_info(&application);
        // SAFETY: invariant 3.
        let raw = unsafe { entry.create_instance(&create, None) };
        let raw = raw.map_err(|result| match result {
            vk::Result::ERROR_INCOMPATIBLE_DRIVER => missing(index,
                "the Vulkan loader found no driver: install the vendor's, or Mesa's (Debian: mesa-vulkan-drivers)".to_owned(),
            ),
            result => refused(DeviceId::new(Kind::Vulkan, index), "open", result),
        })?;
        Ok(Instance { raw, _entry: entry })
    }

    pub fn raw(&self) -> &ash::Instance {
        &self.raw
    }

    /// Every device, in the loader's order.
    pub fn devices(&self) -> Result<Vec<vk::PhysicalDevice>, Error> {
        // SAFETY: invariant 1.
        let found = unsafe { self.raw.enumerate_physical_devices() };
        found.map_err(|result| refused(DeviceId::new(Kind::Vulkan, 0), "list devices", result))
    }

    /// What its driver says of a device; or what it lacks.
    pub fn facts(&self, device: vk::PhysicalDevice) -> Result<Facts, String> {
        // SAFETY: invariant 1.
        let basic = unsafe { self.raw.get_physical_device_properties(device) };
        let name = basic.device_name_as_c_str().unwrap_or(c"unnamed");
        let name = name.to_string_lossy().into_owned();
        if basic.api_version < VERSION {
            return Err(format!("{name}: its driver is older than Vulkan 1.2"));
        }
        let mut timeline = vk::PhysicalDeviceTimelineSemaphoreFeatures::default();
        let mut features = vk::PhysicalDeviceFeatures2::default().push_next(&mut timeline);
        // SAFETY: invariants 1 and 3.
        unsafe {
            self.raw
                .get_physical_device_features2(device, &mut features)
        };
        // SAFETY: invariant 1.
        let extensions = unsafe { self.raw.enumerate_device_extension_properties(device) };
        let extensions = extensions.unwrap_or_default();
        let offers = |wanted: &CStr| {
            extensions
                .iter()
                .any(|found| found.extension_name_as_c_str() == Ok(wanted))
        };
        let imports = offers(ext::external_memory_host::NAME);
        let limits = self.limits(device, basic.api_version, imports);
        // SAFETY: invariant 1.
        let memory = unsafe { self.raw.get_physical_device_memory_properties(device) };
        // SAFETY: invariant 1.
        let families = unsafe { self.raw.get_physical_device_queue_family_properties(device) };
        Ok(Facts {
            name,
            kind: basic.device_type,
            types: memory
                .memory_types
                .iter()
                .take(memory.memory_type_count as usize)
                .map(|kind| (kind.property_flags, kind.heap_index as usize))
                .collect(),
            heaps: memory
                .memory_heaps
                .iter()
                .take(memory.memory_heap_count as usize)
                .map(|heap| heap.size)
                .collect(),
            families: families
                .iter()
                .map(|family| (family.queue_flags, family.queue_count))
                .collect(),
            max_allocation: limits.0,
            max_buffer: limits.1,
            import_align: limits.2,
            storage_align: basic.limits.min_storage_buffer_offset_alignment,
            atom: basic.limits.non_coherent_atom_size,
            budget: offers(ext::memory_budget::NAME),
            timelines: timeline.timeline_semaphore != 0,
        })
    }

    /// The largest allocation, the largest buffer, and the alignment of imports.
    fn limits(
        &self,
        device: vk::PhysicalDevice,
        version: u32,
        imports: bool,
    ) -> (u64, u64, Option<u64>) {
        let mut allocation = vk::PhysicalDeviceMaintenance3Properties::default();
        let mut buffer = vk::PhysicalDeviceMaintenance4Properties::default();
        let mut import = vk::PhysicalDeviceExternalMemoryHostPropertiesEXT::default();
        let mut all = vk::PhysicalDeviceProperties2::default().push_next(&mut allocation);
        if version >= vk::API_VERSION_1_3 {
            all = all.push_next(&mut buffer);
        }
        if imports {
            all = all.push_next(&mut import);
        }
        // SAFETY: invariants 1, 3 and 4.
        unsafe { self.raw.get_physical_device_properties2(device, &mut all) };
        // Zero: an older driver, which does not say.
        let said = |bytes: u64| if bytes == 0 { u64::MAX } else { bytes };
        let align = import.min_imported_host_pointer_alignment;
        (
            said(allocation.max_memory_allocation_size),
            said(buffer.max_buffer_size),
            (imports && align.is_power_of_two()).then_some(align),
        )
    }
}

impl Drop for Instance {
    fn drop(&mut self) {
        // SAFETY: invariants 1 and 2: devices are gone before.
        unsafe { self.raw.destroy_instance(None) };
    }
}

/// An opened device.
pub(super) struct Context {
    pub id: DeviceId,
    pub device: ash::Device,
    pub physical: vk::PhysicalDevice,
    pub facts: Facts,
    /// The family for copies first.
    pub families: Vec<u32>,
    /// Takes in host memory, where the driver does.
    pub import: Option<ext::external_memory_host::Device>,
    /// A queue is used by one thread at a time.
    lanes: Vec<Mutex<vk::Queue>>,
    next_lane: AtomicUsize,
    /// By heap: bytes that are allocated through this.
    allocated: [AtomicU64; vk::MAX_MEMORY_HEAPS],
    instance: Instance,
}

/// Devices that are open, so that a staging buffer fits whoever opens its device again.
static OPEN: Mutex<Vec<(Option<PathBuf>, Weak<Context>)>> = Mutex::new(Vec::new());

impl Context {
    /// The device of this number.
    pub fn open(index: u32, library: Option<&PathBuf>) -> Result<Arc<Context>, Error> {
        let mut open = OPEN.lock().unwrap_or_else(PoisonError::into_inner);
        open.retain(|(_, context)| context.strong_count() > 0);
        let found = open
            .iter()
            .filter(|(from, _)| from.as_ref() == library)
            .filter_map(|(_, context)| context.upgrade())
            .find(|context| context.id.index == index);
        if let Some(context) = found {
            return Ok(context);
        }
        let context = Arc::new(Context::create(index, library)?);
        open.push((library.cloned(), Arc::downgrade(&context)));
        Ok(context)
    }

    fn create(index: u32, library: Option<&PathBuf>) -> Result<Context, Error> {
        let id = DeviceId::new(Kind::Vulkan, index);
        let instance = Instance::new(library, index)?;
        let devices = instance.devices()?;
        let physical = devices.get(index as usize).copied().ok_or_else(|| {
            let text = format!("the Vulkan drivers offer {} devices", devices.len());
            missing(index, text)
        })?;
        let facts = instance
            .facts(physical)
            .map_err(|lack| missing(index, lack))?;
        facts
            .info(index, false)
            .map_err(|lack| missing(index, format!("{}: {lack}", facts.name)))?;
        let families = facts.open_families();
        let wanted: Vec<_> = families
            .iter()
            .map(|&family| (family, Self::queue_count(&facts, family)))
            .collect();
        let device = Self::device(id, &instance, physical, &facts, &wanted)?;
        let lanes = wanted
            .first()
            .into_iter()
            .flat_map(|&(family, count)| (0..count).map(move |at| (family, at)))
            .map(|(family, at)| {
                // SAFETY: invariant 1, and the device was created with this queue.
                Mutex::new(unsafe { device.get_device_queue(family, at) })
            })
            .collect();
        let import = facts
            .import_align
            .map(|_| ext::external_memory_host::Device::new(instance.raw(), &device));
        Ok(Context {
            id,
            device,
            physical,
            facts,
            families,
            import,
            lanes,
            next_lane: AtomicUsize::new(0),
            allocated: Default::default(),
            instance,
        })
    }

    fn queue_count(facts: &Facts, family: u32) -> u32 {
        let offered = facts.families.get(family as usize);
        offered.map_or(0, |&(_, count)| count.min(QUEUES))
    }

    fn device(
        id: DeviceId,
        instance: &Instance,
        physical: vk::PhysicalDevice,
        facts: &Facts,
        wanted: &[(u32, u32)],
    ) -> Result<ash::Device, Error> {
        if wanted.is_empty() {
            return Err(missing(id.index, "no queue of it copies".to_owned()));
        }
        let priorities = [1.0; QUEUES as usize];
        let queues: Vec<_> = wanted
            .iter()
            .map(|&(family, count)| {
                vk::DeviceQueueCreateInfo::default()
                    .queue_family_index(family)
                    .queue_priorities(&priorities[..count as usize])
            })
            .collect();
        let mut extensions = Vec::new();
        if facts.import_align.is_some() {
            extensions.push(ext::external_memory_host::NAME.as_ptr());
        }
        if facts.budget {
            extensions.push(ext::memory_budget::NAME.as_ptr());
        }
        let mut timeline =
            vk::PhysicalDeviceTimelineSemaphoreFeatures::default().timeline_semaphore(true);
        let create = vk::DeviceCreateInfo::default()
            .queue_create_infos(&queues)
            .enabled_extension_names(&extensions)
            .push_next(&mut timeline);
        // SAFETY: invariants 1, 3 and 4.
        let device = unsafe { instance.raw().create_device(physical, &create, None) };
        device.map_err(|result| refused(id, "open", result))
    }

    pub fn instance(&self) -> vk::Instance {
        self.instance.raw().handle()
    }

    /// What the device is.
    pub fn info(&self, force_staging: bool) -> Result<Info, Error> {
        let info = self.facts.info(self.id.index, force_staging);
        info.map_err(|lack| missing(self.id.index, format!("{}: {lack}", self.facts.name)))
    }

    /// The count of what is allocated of the heap of this type.
    pub fn allocated(&self, memory_type: u32) -> Option<&AtomicU64> {
        self.allocated.get(self.facts.heap(memory_type)?.0)
    }

    /// Bytes that are free in the heap of this type: what the driver says, or what is left of its size.
    pub fn free(&self, memory_type: u32) -> u64 {
        let Some((heap, size)) = self.facts.heap(memory_type) else {
            return 0;
        };
        if !self.facts.budget {
            let allocated = self.allocated(memory_type);
            let used = allocated.map_or(0, |bytes| bytes.load(Ordering::Relaxed));
            return size.saturating_sub(used);
        }
        let mut budget = vk::PhysicalDeviceMemoryBudgetPropertiesEXT::default();
        let mut all = vk::PhysicalDeviceMemoryProperties2::default().push_next(&mut budget);
        let instance = self.instance.raw();
        // SAFETY: invariants 1, 3 and 4.
        unsafe { instance.get_physical_device_memory_properties2(self.physical, &mut all) };
        let of = |bytes: &[u64; vk::MAX_MEMORY_HEAPS]| bytes.get(heap).copied().unwrap_or(0);
        of(&budget.heap_budget).saturating_sub(of(&budget.heap_usage))
    }

    /// One of the queues for copies: each who asks gets the next one.
    pub fn lane(&self) -> usize {
        self.next_lane.fetch_add(1, Ordering::Relaxed) % self.lanes.len().max(1)
    }

    /// Hands work to a queue.
    pub fn submit(&self, lane: usize, work: &vk::SubmitInfo<'_>) -> Result<(), Error> {
        let lane = self.lanes.get(lane);
        let lane = lane.ok_or_else(|| Error::unsupported(self.id, "a queue for copies"))?;
        let queue = lane.lock().unwrap_or_else(PoisonError::into_inner);
        // SAFETY: invariants 1 and 3, and the lock keeps others from this queue.
        let submitted = unsafe {
            self.device
                .queue_submit(*queue, std::slice::from_ref(work), vk::Fence::null())
        };
        submitted.map_err(|result| refused(self.id, "copy", result))
    }
}

impl Drop for Context {
    fn drop(&mut self) {
        // SAFETY: invariants 1 and 2: what was made with the device is gone before.
        unsafe { self.device.destroy_device(None) };
    }
}
