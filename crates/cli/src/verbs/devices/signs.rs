//! What a machine shows of devices besides its drivers: cards on the bus, device files, containers.
//!
//! A driver that is missing can't say why it is; this can often tell a machine without a card from a
//! container that was not given it, or a user who may not open it.

use std::fs;
use std::io::ErrorKind;
use std::path::Path;

use tonnage::device::Kind;

/// A device file, as this user finds it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Access {
    Absent,
    Denied,
    Allowed,
}

/// What was seen.
#[derive(Debug)]
pub struct Signs {
    /// Makers of the graphics cards on the bus; nothing where the system shows no bus.
    makers: Option<Vec<u32>>,
    /// NVIDIA's module is in the kernel.
    nvidia_module: bool,
    nvidia: Access,
    kfd: Access,
    render: Access,
    container: bool,
    /// Files that describe Vulkan drivers.
    vulkan_drivers: Vec<String>,
    /// Variables that narrow down what drivers show, with their values.
    variables: Vec<(&'static str, String)>,
}

const NVIDIA: u32 = 0x10de;
const AMD: u32 = 0x1002;

const VARIABLES: [(&str, Kind); 7] = [
    ("CUDA_VISIBLE_DEVICES", Kind::Cuda),
    ("NVIDIA_VISIBLE_DEVICES", Kind::Cuda),
    ("HIP_VISIBLE_DEVICES", Kind::Rocm),
    ("ROCR_VISIBLE_DEVICES", Kind::Rocm),
    ("VK_DRIVER_FILES", Kind::Vulkan),
    ("VK_ICD_FILENAMES", Kind::Vulkan),
    ("VK_LOADER_DRIVERS_DISABLE", Kind::Vulkan),
];

impl Signs {
    /// Looks. Nothing is opened for longer than that.
    pub fn of_this_machine() -> Self {
        let exists = |path: &str| Path::new(path).exists();
        let set = |&(name, _): &(&'static str, Kind)| {
            let value = std::env::var_os(name)?;
            Some((name, value.to_string_lossy().into_owned()))
        };
        Signs {
            makers: makers(Path::new("/sys/bus/pci/devices")),
            nvidia_module: exists("/proc/driver/nvidia/version"),
            nvidia: access(Path::new("/dev/nvidiactl")),
            kfd: access(Path::new("/dev/kfd")),
            render: first_render(Path::new("/dev/dri")),
            container: exists("/.dockerenv")
                || exists("/run/.containerenv")
                || std::env::var_os("KUBERNETES_SERVICE_HOST").is_some(),
            vulkan_drivers: vulkan_drivers(),
            variables: VARIABLES.iter().filter_map(set).collect(),
        }
    }

    /// What follows for a kind of which there is no device.
    pub fn hints(&self, kind: Kind) -> Vec<String> {
        let mut hints = match kind {
            Kind::Cuda => self.nvidia(),
            Kind::Rocm => self.amd(),
            Kind::Vulkan => self.vulkan(),
            Kind::Host | Kind::Metal => Vec::new(),
        };
        for (name, value) in &self.variables {
            if VARIABLES.contains(&(*name, kind)) {
                hints.push(format!(
                    "{name} is set to {value:?}; it decides what the driver shows"
                ));
            }
        }
        hints
    }

    fn card(&self, maker: u32) -> Option<bool> {
        self.makers.as_ref().map(|makers| makers.contains(&maker))
    }

    fn nvidia(&self) -> Vec<String> {
        let hint = match (self.nvidia, self.nvidia_module, self.card(NVIDIA)) {
            (Access::Denied, ..) => {
                "/dev/nvidiactl is there and this user may not open it: see its group and mode, or the \
                 container's device permissions"
            }
            (Access::Allowed, ..) => {
                "/dev/nvidiactl is there, so a card is too: the driver's library libcuda.so.1 must be in the \
                 loader's path (ldconfig -p); in a container, NVIDIA_DRIVER_CAPABILITIES must have compute"
            }
            (Access::Absent, true, _) if self.container => {
                "the kernel has NVIDIA's module, and this container has no /dev/nvidia*: start it with \
                 --gpus all (Docker), --device nvidia.com/gpu=all (Podman), or a limit nvidia.com/gpu (Kubernetes)"
            }
            (Access::Absent, true, _) => {
                "the kernel has NVIDIA's module and there is no /dev/nvidiactl: nvidia-modprobe makes it"
            }
            (Access::Absent, false, Some(true)) => {
                "an NVIDIA card is on the bus and its driver is not loaded: install the driver, and see \
                 dmesg if it is (secure boot refuses modules that are not signed)"
            }
            (Access::Absent, false, Some(false)) => {
                "no NVIDIA card is on the PCI bus of this machine"
            }
            (Access::Absent, false, None) => {
                "there is no /dev/nvidiactl, and the PCI bus cannot be seen"
            }
        };
        vec![hint.to_owned()]
    }

    fn amd(&self) -> Vec<String> {
        let hint = match (self.kfd, self.card(AMD)) {
            (Access::Denied, _) => {
                "/dev/kfd is there and this user may not open it: add the user to the groups render and video; \
                 in a container, --group-add render --group-add video"
            }
            (Access::Allowed, _) if self.render != Access::Allowed => {
                "/dev/kfd is there and no /dev/dri/renderD* that this user may open: give a container both, \
                 --device /dev/kfd --device /dev/dri"
            }
            (Access::Allowed, _) => {
                "/dev/kfd is there: ROCm's libamdhip64.so must be in the loader's path (ldconfig -p)"
            }
            (Access::Absent, Some(true)) => {
                "an AMD card is on the bus and there is no /dev/kfd: install the amdgpu driver; give a container \
                 --device /dev/kfd --device /dev/dri"
            }
            (Access::Absent, Some(false)) => "no AMD card is on the PCI bus of this machine",
            (Access::Absent, None) => "there is no /dev/kfd, and the PCI bus cannot be seen",
        };
        vec![hint.to_owned()]
    }

    fn vulkan(&self) -> Vec<String> {
        let mut hints = Vec::new();
        if self.vulkan_drivers.is_empty() {
            hints.push(
                "no driver is described in /usr/share/vulkan/icd.d, /usr/local/share/vulkan/icd.d or \
                 /etc/vulkan/icd.d: install one (Debian: mesa-vulkan-drivers, which has one for processors too), \
                 or name its file in VK_DRIVER_FILES"
                    .to_owned(),
            );
        } else {
            hints.push(format!(
                "drivers are described in {}",
                self.vulkan_drivers.join(", ")
            ));
        }
        if self.render == Access::Denied {
            hints.push(
                "this user may not open /dev/dri/renderD*: add the user to the group render, or give a \
                 container --device /dev/dri"
                    .to_owned(),
            );
        }
        hints
    }
}

fn access(path: &Path) -> Access {
    match fs::OpenOptions::new().read(true).write(true).open(path) {
        Ok(_) => Access::Allowed,
        Err(error) if error.kind() == ErrorKind::NotFound => Access::Absent,
        Err(_) => Access::Denied,
    }
}

/// The best of the render nodes.
fn first_render(folder: &Path) -> Access {
    let mut best = Access::Absent;
    for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
        if entry.file_name().to_string_lossy().starts_with("renderD") {
            match access(&entry.path()) {
                Access::Allowed => return Access::Allowed,
                _ => best = Access::Denied,
            }
        }
    }
    best
}

/// Makers of display and processing cards (PCI classes 03 and 12).
fn makers(folder: &Path) -> Option<Vec<u32>> {
    let number = |path: &Path| {
        let text = fs::read_to_string(path).ok()?;
        u32::from_str_radix(text.trim().trim_start_matches("0x"), 16).ok()
    };
    let mut makers = Vec::new();
    for entry in fs::read_dir(folder).ok()?.flatten() {
        let class = number(&entry.path().join("class")).map(|class| class >> 16);
        if let (Some(0x03 | 0x12), Some(maker)) = (class, number(&entry.path().join("vendor"))) {
            makers.push(maker);
        }
    }
    Some(makers)
}

fn vulkan_drivers() -> Vec<String> {
    let folders = ["/usr/share", "/usr/local/share", "/etc"].map(|at| format!("{at}/vulkan/icd.d"));
    let mut found = Vec::new();
    for entry in folders
        .iter()
        .filter_map(|at| fs::read_dir(at).ok())
        .flatten()
        .flatten()
    {
        found.push(entry.path().display().to_string());
    }
    found.sort();
    found
}

/// Bytes of memory, and of what is free of it.
pub fn host_memory() -> (Option<u64>, Option<u64>) {
    let text = fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let field = |name: &str| {
        let line = text.lines().find(|line| line.starts_with(name))?;
        let kib: u64 = line.split_ascii_whitespace().nth(1)?.parse().ok()?;
        kib.checked_mul(1024)
    };
    (field("MemTotal:"), field("MemAvailable:"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn nothing() -> Signs {
        Signs {
            makers: Some(Vec::new()),
            nvidia_module: false,
            nvidia: Access::Absent,
            kfd: Access::Absent,
            render: Access::Absent,
            container: false,
            vulkan_drivers: Vec::new(),
            variables: Vec::new(),
        }
    }

    #[test]
    fn a_machine_without_a_card_is_told_from_one_that_hides_it() {
        let says = |signs: &Signs, kind, word: &str| {
            let hints = signs.hints(kind).join("\n");
            assert!(hints.contains(word), "{word}: {hints}");
        };
        says(&nothing(), Kind::Cuda, "no NVIDIA card");
        says(
            &Signs {
                makers: Some(vec![NVIDIA]),
                ..nothing()
            },
            Kind::Cuda,
            "install the driver",
        );
        says(
            &Signs {
                makers: None,
                ..nothing()
            },
            Kind::Cuda,
            "cannot be seen",
        );
        says(
            &Signs {
                nvidia: Access::Denied,
                ..nothing()
            },
            Kind::Cuda,
            "may not open",
        );
        says(
            &Signs {
                nvidia: Access::Allowed,
                ..nothing()
            },
            Kind::Cuda,
            "libcuda.so.1",
        );
        let container = Signs {
            nvidia_module: true,
            container: true,
            ..nothing()
        };
        says(&container, Kind::Cuda, "--gpus all");
        says(&nothing(), Kind::Rocm, "no AMD card");
        says(
            &Signs {
                makers: Some(vec![AMD]),
                ..nothing()
            },
            Kind::Rocm,
            "amdgpu",
        );
        says(
            &Signs {
                kfd: Access::Denied,
                ..nothing()
            },
            Kind::Rocm,
            "groups render and video",
        );
        says(
            &Signs {
                kfd: Access::Allowed,
                ..nothing()
            },
            Kind::Rocm,
            "--device /dev/dri",
        );
        says(&nothing(), Kind::Vulkan, "VK_DRIVER_FILES");
        says(
            &Signs {
                render: Access::Denied,
                ..nothing()
            },
            Kind::Vulkan,
            "group render",
        );
        assert!(nothing().hints(Kind::Metal).is_empty());
    }

    #[test]
    fn variables_that_hide_devices_are_named() {
        let variables = vec![
            ("CUDA_VISIBLE_DEVICES", "\u{1b}".to_owned()),
            ("VK_DRIVER_FILES", "/x".to_owned()),
        ];
        let signs = Signs {
            variables,
            ..nothing()
        };
        let hints = signs.hints(Kind::Cuda).join("\n");
        assert!(
            hints.contains("CUDA_VISIBLE_DEVICES") && !hints.contains("VK_DRIVER_FILES"),
            "{hints}"
        );
        assert!(!hints.contains('\u{1b}'));
    }

    #[test]
    fn cards_are_read_off_the_bus() {
        let folder = tempfile::tempdir().unwrap();
        for (name, class, vendor) in [
            ("a", "0x030200\n", "0x10de\n"),
            ("b", "0x020000\n", "0x1002\n"),
        ] {
            let device = folder.path().join(name);
            fs::create_dir(&device).unwrap();
            fs::write(device.join("class"), class).unwrap();
            fs::write(device.join("vendor"), vendor).unwrap();
        }
        assert_eq!(makers(folder.path()), Some(vec![NVIDIA]));
        assert_eq!(makers(&folder.path().join("none")), None);
    }
}
