//! Vulkan devices: any card, and any processor that has a driver for it.
//!
//! The loader is opened at run time, and Vulkan 1.2 with timeline semaphores is needed. An allocation is a
//! buffer with memory of its own: the device's, on cards, filled by copies from staging buffers on the queue
//! family that does nothing else; on processors with graphics, memory that both see, which is read into
//! directly. No layers are enabled; the loader's variables do that (`VK_INSTANCE_LAYERS`).

mod buffer;
mod choose;
mod context;
mod memory;
mod queue;
mod staging;

use std::fmt;
use std::path::PathBuf;
use std::sync::Arc;

use crate::{Device, DeviceId, Error, Info, Kind, Memory, Queue, Staging};
use context::{Context, Instance};
use memory::VulkanMemory as Allocated;
use queue::VulkanQueue;
use staging::VulkanStaging;

pub use memory::{VulkanHandles, VulkanMemory};

/// How Vulkan devices are looked for and opened.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Settings {
    /// The loader, instead of the one that the system has.
    pub library: Option<PathBuf>,
    /// Whether memory that the host shares is reached through staging buffers all the same, as a card's is.
    pub force_staging: bool,
    /// Whether staging buffers are the driver's own pages, even where it takes in others. Direct I/O into them
    /// is then refused by many kernels.
    pub driver_pages: bool,
}

/// What there is of one device, and what would be used of it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Survey {
    /// The device; or what it lacks.
    pub device: Result<Info, String>,
    /// The memory type for tensors.
    pub memory_type: Option<u32>,
    /// The memory type for staging buffers.
    pub staging_type: Option<u32>,
    /// The queue family for copies.
    pub copy_family: Option<u32>,
}

/// Everything that the drivers offer, in the loader's order, which is the order of the numbers.
///
/// # Errors
/// [`Cause::Missing`](crate::Cause::Missing) with what there is to do, where there is no loader or no driver;
/// what the driver said.
pub fn survey(settings: &Settings) -> Result<Vec<Survey>, Error> {
    let instance = Instance::new(settings.library.as_ref(), 0)?;
    let all = (0..).zip(instance.devices()?);
    let look = |(index, device)| match instance.facts(device) {
        Ok(facts) => {
            let info = facts.info(index, settings.force_staging);
            let shared = facts.unified() && !settings.force_staging;
            Survey {
                device: info.map_err(|lack| format!("{}: {lack}", facts.name)),
                memory_type: facts.device_type(u32::MAX, shared),
                staging_type: facts.staging_type(u32::MAX),
                copy_family: facts.copy_family(),
            }
        }
        Err(lack) => Survey {
            device: Err(lack),
            memory_type: None,
            staging_type: None,
            copy_family: None,
        },
    };
    Ok(all.map(look).collect())
}

/// Every device that is good for this crate. One that lacks something keeps its number.
///
/// # Errors
/// As [`survey`]; [`Cause::Missing`](crate::Cause::Missing) with what they lack, where no device will do.
pub fn devices(settings: &Settings) -> Result<Vec<Info>, Error> {
    let (mut found, mut lacking) = (Vec::new(), Vec::new());
    for surveyed in survey(settings)? {
        match surveyed.device {
            Ok(info) => found.push(info),
            Err(lack) => lacking.push(lack),
        }
    }
    if found.is_empty() {
        let text = match lacking.is_empty() {
            true => "the Vulkan drivers offer no device".to_owned(),
            false => lacking.join("; "),
        };
        let cause = crate::Cause::Missing(text);
        return Err(Error::new(DeviceId::new(Kind::Vulkan, 0), "open", cause));
    }
    Ok(found)
}

/// Opens the device of this number.
///
/// # Errors
/// As [`devices`].
pub fn open(index: u32, settings: &Settings) -> Result<Arc<VulkanDevice>, Error> {
    let context = Context::open(index, settings.library.as_ref())?;
    let info = context.info(settings.force_staging)?;
    Ok(Arc::new(VulkanDevice {
        info,
        driver_pages: settings.driver_pages,
        context,
    }))
}

/// A Vulkan device, opened.
pub struct VulkanDevice {
    info: Info,
    driver_pages: bool,
    context: Arc<Context>,
}

impl Device for VulkanDevice {
    fn info(&self) -> &Info {
        &self.info
    }

    /// What the driver says is left of its heap; what this process has not allocated of it here, where the
    /// driver does not say.
    fn free_memory(&self) -> Result<u64, Error> {
        let facts = &self.context.facts;
        let chosen = facts.device_type(u32::MAX, self.info.unified);
        Ok(chosen.map_or(0, |chosen| self.context.free(chosen)))
    }

    fn allocate(&self, len: u64) -> Result<Memory, Error> {
        let memory = Allocated::new(&self.context, len, self.info.unified)?;
        Ok(Arc::new(memory))
    }

    fn staging(&self, len: usize) -> Result<Box<dyn Staging>, Error> {
        let made = match self.driver_pages {
            true => VulkanStaging::mapped(&self.context, len),
            false => VulkanStaging::new(&self.context, len),
        };
        Ok(Box::new(made?))
    }

    fn copies_from(&self, staging: &dyn Staging) -> bool {
        let staging = staging.as_any().downcast_ref::<VulkanStaging>();
        staging.is_some_and(|staging| Arc::ptr_eq(staging.context(), &self.context))
    }

    fn queue(&self) -> Result<Box<dyn Queue>, Error> {
        Ok(Box::new(VulkanQueue::new(&self.context)?))
    }
}

impl fmt::Debug for VulkanDevice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("VulkanDevice")
            .field("info", &self.info)
            .finish_non_exhaustive()
    }
}
