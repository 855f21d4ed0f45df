//! What devices there are, and one shared instance of each that is used.
//!
//! Nothing here reads the environment, but for what drivers themselves read of it: `CUDA_VISIBLE_DEVICES`,
//! say, decides which devices there are and how they are numbered.

use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError, Weak};

use crate::driver::Driver;
use crate::{Device, DeviceId, Error, HostDevice, Info, Kind, vulkan};

/// Where drivers are looked for, and how devices are opened.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Settings {
    /// NVIDIA's driver, instead of the one that the system has.
    pub cuda_driver: Option<PathBuf>,
    /// AMD's.
    pub hip_driver: Option<PathBuf>,
    /// The Vulkan loader.
    pub vulkan_loader: Option<PathBuf>,
    /// Whether memory that a Vulkan device shares with the host is reached through staging buffers all the
    /// same, as a card's is.
    pub vulkan_force_staging: bool,
}

impl Settings {
    fn driver(&self, kind: Kind) -> Result<Driver, Error> {
        let path = match kind {
            Kind::Cuda => &self.cuda_driver,
            _ => &self.hip_driver,
        };
        match path {
            Some(path) => Driver::open_at(kind, path),
            None => Driver::open(kind),
        }
    }

    fn vulkan(&self) -> vulkan::Settings {
        vulkan::Settings {
            library: self.vulkan_loader.clone(),
            force_staging: self.vulkan_force_staging,
            ..vulkan::Settings::default()
        }
    }
}

/// What was found of one kind.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Found {
    /// The kind.
    pub kind: Kind,
    /// Its driver, if there is one: `CUDA 13.0`.
    pub driver: Option<String>,
    /// Its devices, at least one. Or why there is none: a [`Cause::Missing`](crate::Cause::Missing) says what
    /// there is to do.
    pub devices: Result<Vec<Info>, Error>,
}

/// Every kind of device, with the host first. No device is made use of, so none of its memory is taken.
pub fn devices(settings: &Settings) -> Vec<Found> {
    let look = |kind| {
        let (driver, devices) = match kind {
            Kind::Host => (None, Ok(vec![HostDevice::default().info().clone()])),
            Kind::Cuda | Kind::Rocm => match settings.driver(kind) {
                Ok(driver) => (driver.version().ok(), driver.devices()),
                Err(error) => (None, Err(error)),
            },
            Kind::Vulkan => (None, vulkan::devices(&settings.vulkan())),
            Kind::Metal => (None, metal::devices()),
        };
        Found {
            kind,
            driver,
            devices,
        }
    };
    Kind::ALL.into_iter().map(look).collect()
}

/// The device of this name. All who use it at a time, with the same settings, have the same one, and with the
/// last of them it is closed.
///
/// # Errors
/// [`Cause::Missing`](crate::Cause::Missing) with what there is to do; what the driver said.
pub fn open(id: DeviceId, settings: &Settings) -> Result<Arc<dyn Device>, Error> {
    type Opened = (DeviceId, Settings, Weak<dyn Device>);
    static OPEN: Mutex<Vec<Opened>> = Mutex::new(Vec::new());

    // Whoever comes meanwhile for the same device has to wait anyway.
    let mut open = OPEN.lock().unwrap_or_else(PoisonError::into_inner);
    open.retain(|(.., device)| device.strong_count() > 0);
    let same = open
        .iter()
        .find(|(of, with, _)| *of == id && with == settings);
    if let Some(device) = same.and_then(|(.., device)| device.upgrade()) {
        return Ok(device);
    }
    let device: Arc<dyn Device> = match id.kind {
        Kind::Host => Arc::new(HostDevice::default()),
        Kind::Cuda | Kind::Rocm => Arc::new(settings.driver(id.kind)?.device(id.index)?),
        Kind::Vulkan => vulkan::open(id.index, &settings.vulkan())?,
        Kind::Metal => metal::open(id)?,
    };
    open.push((id, settings.clone(), Arc::downgrade(&device)));
    Ok(device)
}

/// Metal, where there is no such thing.
#[cfg(not(target_vendor = "apple"))]
mod metal {
    use super::*;
    use crate::Cause;

    fn none<T>(id: DeviceId) -> Result<T, Error> {
        let text = "Metal is Apple's: there is none on this system".to_owned();
        Err(Error::new(id, "open", Cause::Missing(text)))
    }

    pub fn devices() -> Result<Vec<Info>, Error> {
        none(DeviceId::new(Kind::Metal, 0))
    }

    pub fn open(id: DeviceId) -> Result<Arc<dyn Device>, Error> {
        none(id)
    }
}

#[cfg(target_vendor = "apple")]
mod metal {
    use super::*;
    use crate::Cause;

    pub use crate::metal::devices;

    pub fn open(id: DeviceId) -> Result<Arc<dyn Device>, Error> {
        if id.index != 0 {
            let text = "there is one device, and its number is 0".to_owned();
            return Err(Error::new(id, "open", Cause::Missing(text)));
        }
        Ok(crate::metal::open()?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Cause;

    fn nowhere() -> Settings {
        let path = Some(PathBuf::from("/nowhere/libdriver.so"));
        Settings {
            cuda_driver: path.clone(),
            hip_driver: path.clone(),
            vulkan_loader: path,
            vulkan_force_staging: false,
        }
    }

    #[test]
    fn every_kind_is_found_or_says_what_to_do() {
        let found = devices(&nowhere());
        assert_eq!(
            found.iter().map(|found| found.kind).collect::<Vec<_>>(),
            Kind::ALL
        );
        assert_eq!(found[0].devices.as_ref().unwrap()[0].id, DeviceId::HOST);
        for (found, todo) in found[1..].iter().zip(["install", "install", "install", ""]) {
            let error = found.devices.as_ref().unwrap_err();
            let Cause::Missing(text) = error.cause() else {
                panic!("{error}");
            };
            assert!(text.contains(todo), "{error}");
            let looked = found.kind == Kind::Metal || text.contains("/nowhere/libdriver.so");
            assert!(looked, "{error}");
        }
    }

    #[test]
    fn users_at_a_time_share_a_device() {
        let first = open(DeviceId::HOST, &nowhere()).unwrap();
        let second = open(DeviceId::HOST, &nowhere()).unwrap();
        assert!(Arc::ptr_eq(&first, &second));
        let other = open(DeviceId::HOST, &Settings::default()).unwrap();
        assert!(!Arc::ptr_eq(&first, &other));
        let seen = Arc::downgrade(&first);
        drop((first, second));
        assert!(seen.upgrade().is_none(), "the last user closes it");
    }

    #[test]
    fn a_library_that_is_no_driver_says_what_it_lacks() {
        // A library that every process of this system has.
        if cfg!(target_os = "linux") {
            let error = Driver::open_at(Kind::Cuda, "libc.so.6".as_ref()).unwrap_err();
            assert!(error.to_string().contains("it lacks cuInit"), "{error}");
        }
    }
}
