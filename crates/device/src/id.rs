//! Names of devices: `cpu`, `cuda:0`, `vulkan:1`.

use std::fmt;
use std::str::FromStr;

/// A family of devices that one driver serves.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Kind {
    /// The host's own memory.
    Host,
    /// NVIDIA, through the CUDA driver.
    Cuda,
    /// AMD, through HIP.
    Rocm,
    /// Whatever a Vulkan driver offers.
    Vulkan,
    /// Apple.
    Metal,
}

impl Kind {
    /// Every kind.
    pub const ALL: [Kind; 5] = [
        Kind::Host,
        Kind::Cuda,
        Kind::Rocm,
        Kind::Vulkan,
        Kind::Metal,
    ];

    /// Its name: `cpu`, `cuda`, `rocm`, `vulkan`, `metal`.
    pub fn name(self) -> &'static str {
        match self {
            Kind::Host => "cpu",
            Kind::Cuda => "cuda",
            Kind::Rocm => "rocm",
            Kind::Vulkan => "vulkan",
            Kind::Metal => "metal",
        }
    }

    /// DLPack's `DLDeviceType`.
    pub fn dlpack(self) -> i32 {
        match self {
            Kind::Host => 1,
            Kind::Cuda => 2,
            Kind::Vulkan => 7,
            Kind::Metal => 8,
            Kind::Rocm => 10,
        }
    }
}

/// One device of a kind, by number.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct DeviceId {
    /// Its kind.
    pub kind: Kind,
    /// Its number among its kind, as the driver counts.
    pub index: u32,
}

impl DeviceId {
    /// The host.
    pub const HOST: DeviceId = DeviceId::new(Kind::Host, 0);

    /// The device of this kind and number.
    pub const fn new(kind: Kind, index: u32) -> Self {
        DeviceId { kind, index }
    }
}

impl fmt::Display for DeviceId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.kind {
            Kind::Host => f.write_str("cpu"),
            kind => write!(f, "{}:{}", kind.name(), self.index),
        }
    }
}

/// A text that names no device.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct UnknownDevice(String);

impl fmt::Display for UnknownDevice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{:?} names no device: cpu, cuda, rocm, vulkan or metal, with a number as in cuda:1",
            self.0
        )
    }
}

impl std::error::Error for UnknownDevice {}

impl FromStr for DeviceId {
    type Err = UnknownDevice;

    /// `cuda` is `cuda:0`; `hip` is another name of `rocm`, and `host` of `cpu`.
    fn from_str(text: &str) -> Result<Self, UnknownDevice> {
        let unknown = || UnknownDevice(text.to_owned());
        let (name, index) = match text.split_once(':') {
            Some((name, index)) => {
                let plain = !index.is_empty() && index.bytes().all(|b| b.is_ascii_digit());
                (
                    name,
                    plain
                        .then(|| index.parse().ok())
                        .flatten()
                        .ok_or_else(unknown)?,
                )
            }
            None => (text, 0),
        };
        let name = match name {
            "hip" => "rocm",
            "host" => "cpu",
            name => name,
        };
        let kind = Kind::ALL
            .into_iter()
            .find(|kind| kind.name() == name)
            .ok_or_else(unknown)?;
        if kind == Kind::Host && index != 0 {
            return Err(unknown());
        }
        Ok(DeviceId::new(kind, index))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_read_as_they_are_written() {
        for id in [
            DeviceId::HOST,
            DeviceId::new(Kind::Cuda, 3),
            DeviceId::new(Kind::Vulkan, 0),
        ] {
            assert_eq!(id.to_string().parse(), Ok(id));
        }
        assert_eq!("cuda".parse(), Ok(DeviceId::new(Kind::Cuda, 0)));
        assert_eq!("hip:1".parse(), Ok(DeviceId::new(Kind::Rocm, 1)));
        for wrong in [
            "",
            "gpu",
            "cuda:",
            "cuda:-1",
            "cuda:+1",
            "cpu:1",
            "cuda:99999999999",
        ] {
            let error = wrong.parse::<DeviceId>().unwrap_err();
            assert!(error.to_string().contains("cuda:1"), "{wrong}");
        }
    }
}
