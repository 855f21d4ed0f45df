//! What the system shows of GPUDirect Storage, before its library is opened.

use std::fs;
use std::path::Path;

/// How a disk could write to a card's memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Way {
    /// NVIDIA's kernel module for it is loaded.
    NvidiaFs,
    /// The kernel's own peer-to-peer transfers: a card offers its memory on the PCI bus.
    PeerToPeer,
}

const TODO: &str = "load NVIDIA's kernel module nvidia-fs (package nvidia-gds), or use the open kernel driver of a \
                    release that offers its memory for PCI peer-to-peer transfers";

/// The way there is, or why there is none and what to do. `root` is `/` but for tests.
pub(super) fn look(root: &Path) -> Result<Way, String> {
    let count = fs::read_to_string(root.join("proc/driver/nvidia-fs/devcount"));
    match count.map(|text| text.trim().parse::<u64>()) {
        Ok(Ok(0)) => Err(
            "nvidia-fs is loaded and knows no device: load it after the card's driver".to_owned(),
        ),
        Ok(_) => Ok(Way::NvidiaFs),
        Err(_) if offers(root) => Ok(Way::PeerToPeer),
        Err(_) => Err(format!(
            "no kernel support: /proc/driver/nvidia-fs is not there, and no NVIDIA card offers its memory to others \
             on the PCI bus: {TODO}"
        )),
    }
}

/// Whether one of NVIDIA's cards has memory that other devices may write to.
fn offers(root: &Path) -> bool {
    let devices = fs::read_dir(root.join("sys/bus/pci/devices"));
    devices.into_iter().flatten().flatten().any(|device| {
        let read = |name: &str| fs::read_to_string(device.path().join(name)).unwrap_or_default();
        let size = read("p2pmem/size");
        read("vendor").trim() == "0x10de" && size.trim().parse::<u64>().is_ok_and(|size| size > 0)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kernel_support_is_found_where_it_is() {
        let home = tempfile::tempdir().unwrap();
        let root = home.path();
        let why = look(root).unwrap_err();
        assert!(why.contains("nvidia-fs") && why.contains("load"), "{why}");
        let card = root.join("sys/bus/pci/devices/0000:01:00.0");
        fs::create_dir_all(card.join("p2pmem")).unwrap();
        fs::write(card.join("vendor"), "0x1002\n").unwrap();
        fs::write(card.join("p2pmem/size"), "1024\n").unwrap();
        assert!(look(root).is_err(), "another maker's");
        fs::write(card.join("vendor"), "0x10de\n").unwrap();
        assert_eq!(look(root), Ok(Way::PeerToPeer));
        fs::create_dir_all(root.join("proc/driver/nvidia-fs")).unwrap();
        let count = root.join("proc/driver/nvidia-fs/devcount");
        fs::write(&count, "0\n").unwrap();
        assert!(look(root).unwrap_err().contains("no device"));
        fs::write(&count, "2\n").unwrap();
        assert_eq!(look(root), Ok(Way::NvidiaFs));
    }
}
