//! The devices of a bench: which, and what copies to them reach.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Instant;

use tonnage::device::find::{self, Settings};
use tonnage::device::{Device, DeviceId, Pool, Queue, Slot, Ticket, Transfer};

use super::report::Limit;
use crate::exit::Failure;
use crate::terminal::cancel;

/// Where loads go.
#[derive(Debug)]
pub struct Targets {
    /// The host's memory too.
    pub host: bool,
    /// Devices, opened.
    pub devices: Vec<Arc<dyn Device>>,
}

/// The devices that were named, or the host and all that are found. A device that cannot be opened is an
/// error if it was named, and a note if not.
///
/// # Errors
/// A name that names none; a device that is not there.
pub fn targets(
    wanted: &[String],
    settings: &Settings,
    notes: &mut Vec<String>,
) -> Result<Targets, Failure> {
    let mut targets = Targets {
        host: wanted.is_empty(),
        devices: Vec::new(),
    };
    for name in wanted {
        let id: DeviceId = name
            .parse()
            .map_err(|error| Failure::Usage(format!("{error}")))?;
        if id == DeviceId::HOST {
            targets.host = true;
        } else {
            targets
                .devices
                .push(find::open(id, settings).map_err(tonnage::Error::from)?);
        }
    }
    if wanted.is_empty() {
        let found = find::devices(settings);
        for info in found
            .iter()
            .flat_map(|found| found.devices.iter().flatten())
        {
            if info.id == DeviceId::HOST {
                continue;
            }
            match find::open(info.id, settings) {
                Ok(device) => targets.devices.push(device),
                Err(error) => notes.push(error.to_string()),
            }
        }
    }
    Ok(targets)
}

const SLOT: usize = 8 << 20;
const SLOTS: usize = 4;
/// Bytes of a round.
const TOTAL: u64 = 512 << 20;
/// Device memory that they go to, over and over.
const MEMORY: u64 = 64 << 20;

/// What copies to a device and back reach, with staging buffers of its own.
///
/// # Errors
/// No room; what the driver said.
pub fn copies(device: &Arc<dyn Device>) -> Result<Vec<Limit>, Failure> {
    let id = device.info().id.to_string();
    let pool = Pool::new((SLOTS * SLOT) as u64);
    let cancelled = || cancel().is_cancelled();
    let failed = |error| Failure::from(tonnage::Error::from(error));
    let mut slots = pool
        .lend(device.as_ref(), SLOT, SLOTS, 1, &cancelled)
        .map_err(failed)?;
    slots.iter_mut().for_each(|slot| slot.bytes_mut().fill(1));
    let mut queue = device.queue().map_err(failed)?;
    let mut limits = Vec::new();
    for (up, what) in [
        (true, "copy to the device"),
        (false, "copy from the device"),
    ] {
        let mut limit = Limit::new(id.clone(), format!("{id}: {what}, 8 MiB staging buffers"));
        for round in 0..4 {
            let start = Instant::now();
            slots = copy(device, queue.as_mut(), slots, up).map_err(failed)?;
            // The first round pays for what is made at first use.
            if round > 0 {
                limit.add(TOTAL, start.elapsed().as_secs_f64());
            }
        }
        limits.push(limit);
    }
    Ok(limits)
}

/// Copies all of it, with every slot under way at a time, and gives the slots back.
fn copy(
    device: &Arc<dyn Device>,
    queue: &mut dyn Queue,
    slots: Vec<Slot>,
    up: bool,
) -> Result<Vec<Slot>, tonnage::device::Error> {
    let memory = device.allocate(MEMORY)?;
    let mut free = slots;
    let mut under_way: VecDeque<Ticket> = VecDeque::new();
    for block in 0..TOTAL / SLOT as u64 {
        let slot = match free.pop() {
            Some(slot) => slot,
            None => match under_way.pop_front() {
                Some(oldest) => oldest.wait()?,
                // There is at least one slot, and each is in one of the two.
                None => break,
            },
        };
        let at = block * SLOT as u64 % MEMORY;
        let transfers = vec![Transfer::plain(Arc::clone(&memory), at, 0, SLOT)];
        under_way.push_back(match up {
            true => queue.upload(slot, transfers)?,
            false => queue.download(slot, transfers)?,
        });
    }
    for ticket in under_way {
        free.push(ticket.wait()?);
    }
    Ok(free)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn copies_to_the_host_as_a_device_are_timed_and_give_their_slots_back() {
        let host: Arc<dyn Device> = Arc::new(tonnage::device::HostDevice::new(false));
        let limits = copies(&host).unwrap();
        assert_eq!(limits.len(), 2);
        assert!(
            limits
                .iter()
                .all(|limit| limit.speed().is_some_and(|speed| speed > 0.0))
        );
        let pool = Pool::new(3 * SLOT as u64);
        let slots = pool.lend(host.as_ref(), SLOT, 3, 3, &|| false).unwrap();
        let mut queue = host.queue().unwrap();
        assert_eq!(copy(&host, queue.as_mut(), slots, true).unwrap().len(), 3);
    }

    #[test]
    fn what_names_no_device_is_refused() {
        let wrong = targets(&["gpu".to_owned()], &Settings::default(), &mut Vec::new());
        assert!(matches!(wrong, Err(Failure::Usage(_))));
        let host = targets(&["cpu".to_owned()], &Settings::default(), &mut Vec::new()).unwrap();
        assert!(host.host && host.devices.is_empty());
    }
}
