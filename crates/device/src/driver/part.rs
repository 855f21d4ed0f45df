//! What a driver is asked for: transfers in the host's own numbers, neighbours joined.

use crate::Transfer;

/// One copy.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Part {
    /// The address on the device.
    pub device: u64,
    /// The first byte in the slot.
    pub at: usize,
    /// Bytes of a row.
    pub len: usize,
    pub rows: usize,
    pub device_pitch: usize,
    pub slot_pitch: usize,
}

impl Part {
    /// Of a transfer that fits, to memory that begins at this address. None where there are no bytes.
    fn new(transfer: &Transfer, address: u64) -> Option<Part> {
        let (len, rows) = (transfer.len, transfer.rows);
        let device = address.checked_add(transfer.offset)?;
        let pitch = usize::try_from(transfer.memory_pitch).ok()?;
        let part = Part {
            device,
            at: transfer.at,
            len,
            rows,
            device_pitch: pitch,
            slot_pitch: transfer.slot_pitch,
        };
        let dense = rows == 1 || (pitch == len && transfer.slot_pitch == len);
        match dense {
            _ if len == 0 => None,
            true => Some(part.plain(device, transfer.at, len.checked_mul(rows)?)),
            false => Some(part),
        }
    }

    fn plain(self, device: u64, at: usize, len: usize) -> Part {
        Part {
            device,
            at,
            len,
            rows: 1,
            device_pitch: 0,
            slot_pitch: 0,
        }
    }

    /// Whether the other one goes on where this one ends, on both sides; then it is part of this one.
    fn take_in(&mut self, next: &Part) -> bool {
        let follows = self.rows == 1
            && next.rows == 1
            && self.device + self.len as u64 == next.device
            && self.at + self.len == next.at;
        if follows {
            self.len += next.len;
        }
        follows
    }

    /// Its rows, each by itself: for rows that are farther apart than the driver takes.
    pub fn each_row(self) -> impl Iterator<Item = Part> {
        (0..self.rows).map(move |row| {
            let device = self.device + row as u64 * self.device_pitch as u64;
            self.plain(device, self.at + row * self.slot_pitch, self.len)
        })
    }
}

/// The copies that transfers come to, in their order. Each fits, and comes with the address that its memory
/// begins at; neighbours in the same memory are joined.
pub(super) fn parts<'a>(transfers: impl Iterator<Item = (&'a Transfer, u64)>) -> Vec<Part> {
    let mut parts: Vec<Part> = Vec::with_capacity(transfers.size_hint().0);
    let mut within = None;
    for (transfer, address) in transfers {
        let Some(part) = Part::new(transfer, address) else {
            continue;
        };
        // Two allocations that happen to be neighbours are not one range.
        let same = within.replace(address) == Some(address);
        if !same || !parts.last_mut().is_some_and(|last| last.take_in(&part)) {
            parts.push(part);
        }
    }
    parts
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Device, HostDevice};

    fn of(transfers: &[Transfer]) -> Vec<Part> {
        parts(transfers.iter().map(|transfer| (transfer, 1000)))
    }

    #[test]
    fn neighbours_are_one_copy_and_others_are_not() {
        let memory = HostDevice::default().allocate(1 << 20).unwrap();
        let plain = |offset, at, len| Transfer::plain(memory.clone(), offset, at, len);
        let joined = of(&[
            plain(0, 10, 5),
            plain(9, 9, 0),
            plain(5, 15, 7),
            plain(12, 22, 1),
        ]);
        assert_eq!(joined.len(), 1);
        assert_eq!(
            (joined[0].device, joined[0].at, joined[0].len),
            (1000, 10, 13)
        );
        assert_eq!(of(&[plain(0, 10, 5), plain(6, 15, 5)]).len(), 2);
        assert_eq!(of(&[plain(0, 10, 5), plain(5, 16, 5)]).len(), 2);
        assert_eq!(of(&[plain(5, 15, 5), plain(0, 10, 5)]).len(), 2);
        let two = [plain(0, 0, 5), plain(0, 5, 5)];
        assert_eq!(
            parts(two.iter().zip([1000, 1005])).len(),
            2,
            "two allocations"
        );
    }

    #[test]
    fn rows_without_gaps_are_one_copy_and_rows_far_apart_are_each_one() {
        let memory = HostDevice::default().allocate(1 << 20).unwrap();
        let mut rows = Transfer {
            rows: 3,
            memory_pitch: 8,
            slot_pitch: 8,
            ..Transfer::plain(memory, 4, 2, 8)
        };
        let dense = of(std::slice::from_ref(&rows))[0];
        assert_eq!((dense.rows, dense.len, dense.device), (1, 24, 1004));
        rows.slot_pitch = 9;
        let part = of(&[rows])[0];
        assert_eq!((part.rows, part.len), (3, 8));
        let each: Vec<(u64, usize)> = part.each_row().map(|row| (row.device, row.at)).collect();
        assert_eq!(each, [(1004, 2), (1012, 11), (1020, 20)]);
    }
}
