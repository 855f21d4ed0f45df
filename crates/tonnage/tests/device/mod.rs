//! The devices that tests run on, and ways to look at what is there.
#![allow(dead_code, reason = "each test program uses a part of it")]

use std::sync::Arc;

use tonnage::DeviceTensor;
use tonnage::device::{Device, HostDevice, Memory, Pool, Transfer};

pub enum Kind {
    Host,
}

pub struct Tried {
    pub name: &'static str,
    pub kind: Kind,
    pub device: Arc<dyn Device>,
}

/// The host as a card, whose memory only copies reach, and as itself.
pub fn devices() -> Vec<Tried> {
    [("copied", false), ("direct", true)]
        .map(|(name, direct)| Tried {
            name,
            kind: Kind::Host,
            device: Arc::new(HostDevice::new(direct)),
        })
        .into()
}

/// The bytes of a tensor, brought back.
pub fn content(device: &Arc<dyn Device>, tensor: &DeviceTensor) -> Vec<u8> {
    download(device, &tensor.memory, tensor.offset, tensor.len)
}

pub fn download(device: &Arc<dyn Device>, memory: &Memory, offset: u64, len: u64) -> Vec<u8> {
    const SLOT: usize = 1 << 20;
    let pool = Pool::new(SLOT as u64);
    let mut queue = device.queue().unwrap();
    let mut bytes = Vec::new();
    while (bytes.len() as u64) < len {
        let take = (len as usize - bytes.len()).min(SLOT);
        let slot = pool
            .lend(&**device, SLOT, 1, 1, &|| false)
            .unwrap()
            .remove(0);
        let from = Transfer::plain(memory.clone(), offset + bytes.len() as u64, 0, take);
        let slot = queue.download(slot, vec![from]).unwrap().wait().unwrap();
        bytes.extend_from_slice(&slot.bytes()[..take]);
    }
    bytes
}
