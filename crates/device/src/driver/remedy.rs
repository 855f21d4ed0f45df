//! What there is to do where a driver is missing or refuses to start.

use super::table::Code;
use crate::Kind;

/// What gives a machine the driver of this kind.
pub(super) fn install(kind: Kind) -> &'static str {
    match kind {
        Kind::Rocm => {
            "for AMD's cards, install ROCm and have its lib folder in the loader's path (ldconfig or LD_LIBRARY_PATH)"
        }
        _ => {
            "for NVIDIA's cards, install the NVIDIA driver; start a container with --gpus all and the NVIDIA container toolkit"
        }
    }
}

/// What there is to do where a driver finds no device.
pub(super) fn no_device(kind: Kind) -> &'static str {
    match kind {
        Kind::Rocm => {
            "see whether rocminfo lists a card, whether this user may open /dev/kfd and /dev/dri (groups render and video), and what HIP_VISIBLE_DEVICES and ROCR_VISIBLE_DEVICES leave"
        }
        _ => {
            "see whether nvidia-smi lists a card, what CUDA_VISIBLE_DEVICES leaves, and whether the container was given one (--gpus all)"
        }
    }
}

/// What there is to do about an error of the driver's start, where that is known.
pub(super) fn start(kind: Kind, code: Code) -> Option<&'static str> {
    Some(match (kind, code) {
        (Kind::Cuda, 34) => {
            "this library is the toolkit's stub and no driver: take its folder out of LD_LIBRARY_PATH, and install the NVIDIA driver"
        }
        (Kind::Cuda, 304 | 999) => {
            "see whether this user may open /dev/nvidia* and /dev/nvidia-uvm (nvidia-modprobe -u makes the latter); restart the machine if it has slept"
        }
        (Kind::Cuda, 802) => "start nvidia-fabricmanager, or wait until it is up",
        (Kind::Cuda, 803 | 804) => {
            "the library and the kernel's module are of different versions: restart the machine, or take the other libcuda out of the loader's path"
        }
        _ => return None,
    })
}
