//! Tensors that are brought back from devices while they are saved.

use std::sync::Arc;

use tonnage_device::{DeviceId, Pool, Stream};
use tonnage_engine::{Cancel, Downloads, FromDevice};

use super::{Content, DeviceData, Item};

/// Brings tensors back from their devices; one queue and ring for all tensors of a device and stream.
#[derive(Debug, Default)]
pub(crate) struct Backs(Vec<(DeviceId, Option<Stream>, Downloads)>);

impl Backs {
    /// Takes in the device of some data.
    pub fn add(&mut self, data: &DeviceData<'_>, cancel: Option<&Cancel>) {
        let id = data.device.info().id;
        if self.get(data).is_none() {
            let cancel = cancel.cloned().unwrap_or_default();
            let after = data.after.into_iter().collect();
            let pool = Arc::clone(Pool::global());
            let downloads = Downloads::new(Arc::clone(data.device), pool, after, cancel);
            self.0.push((id, data.after, downloads));
        }
    }

    /// What brings an item back, if it is on a device.
    pub fn fill<'a>(&'a self, item: &Item<'a>) -> Option<FromDevice<'a>> {
        match item.content {
            Content::Device(data) => Some(self.get(&data)?.from(data.memory, data.offset)),
            Content::Bytes(_) | Content::Stored(_) => None,
        }
    }

    pub fn get(&self, data: &DeviceData<'_>) -> Option<&Downloads> {
        let of = (data.device.info().id, data.after);
        self.0
            .iter()
            .find(|(id, after, _)| (*id, *after) == of)
            .map(|(.., downloads)| downloads)
    }
}
