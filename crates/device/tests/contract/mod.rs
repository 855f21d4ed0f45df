//! What every device has to do. Each device's own test file calls [`keeps_the_contract`].

#![allow(dead_code, reason = "each test program uses a part of it")]

use std::sync::Arc;

use tonnage_device::{Cause, Device, Memory, Pool, Queue, Slot, Stream, Transfer};

const SLOT: usize = 64 << 10;

pub fn pattern(len: usize, seed: usize) -> Vec<u8> {
    (0..len).map(|i| ((i + seed) * 31 % 251) as u8).collect()
}

pub fn lend(pool: &Arc<Pool>, device: &dyn Device, count: usize) -> Vec<Slot> {
    pool.lend(device, SLOT, count, count, &|| false).unwrap()
}

/// Brings bytes to the device through slots, block by block.
pub fn upload(device: &dyn Device, queue: &mut dyn Queue, memory: &Memory, bytes: &[u8]) {
    let pool = Pool::new(1 << 20);
    let mut tickets = Vec::new();
    for (i, block) in bytes.chunks(SLOT).enumerate() {
        if tickets.len() == 4 {
            tickets.clear();
        }
        let mut slot = lend(&pool, device, 1).remove(0);
        slot.bytes_mut()[..block.len()].copy_from_slice(block);
        let to = Transfer::plain(memory.clone(), (i * SLOT) as u64, 0, block.len());
        tickets.push(queue.upload(slot, vec![to]).unwrap());
    }
}

/// Brings bytes back from the device.
pub fn download(device: &dyn Device, queue: &mut dyn Queue, memory: &Memory) -> Vec<u8> {
    let pool = Pool::new(1 << 20);
    let mut bytes = Vec::new();
    while (bytes.len() as u64) < memory.len() {
        let len = (memory.len() as usize - bytes.len()).min(SLOT);
        let slot = lend(&pool, device, 1).remove(0);
        let from = Transfer::plain(memory.clone(), bytes.len() as u64, 0, len);
        let slot = queue.download(slot, vec![from]).unwrap().wait().unwrap();
        bytes.extend_from_slice(&slot.bytes()[..len]);
    }
    bytes
}

/// Every promise of the documentation of `Device`, `Queue` and `Ticket`.
pub fn keeps_the_contract(device: &dyn Device) {
    let info = device.info();
    assert!(info.align.is_power_of_two() && info.max_region > 0 && !info.name.is_empty());
    let mut queue = device.queue().unwrap();
    bytes_arrive(device, queue.as_mut());
    pieces_arrive(device, queue.as_mut());
    rows_arrive(device, queue.as_mut());
    copies_keep_their_order(device, queue.as_mut());
    what_does_not_fit_is_refused(device, queue.as_mut());
    memory_outlives_its_copies(device, queue.as_mut());
    slots_are_whole_pages(device);
    queue.after(Stream::DEFAULT).unwrap();
    queue.before(Stream::DEFAULT).unwrap();
    queue.drain().unwrap();
    if info.total_memory < u64::MAX {
        the_impossible_is_refused(device);
    }
}

fn bytes_arrive(device: &dyn Device, queue: &mut dyn Queue) {
    for len in [0, 1, 4095, 4096, 3 * SLOT + 5] {
        let (bytes, memory) = (pattern(len, 3), device.allocate(len as u64).unwrap());
        assert_eq!(
            (memory.len(), memory.device()),
            (len as u64, device.info().id)
        );
        upload(device, queue, &memory, &bytes);
        assert!(
            download(device, queue, &memory) == bytes,
            "{len} bytes there and back"
        );
        let mut seen = None;
        if memory.with_host(0..len as u64, &mut |host| seen = Some(host.to_vec())) {
            assert!(seen.unwrap() == bytes, "what the host sees");
        } else {
            assert!(seen.is_none());
        }
    }
}

fn pieces_arrive(device: &dyn Device, queue: &mut dyn Queue) {
    // Odd offsets on both sides, several allocations, one slot.
    let pool = Pool::new(1 << 20);
    let memory: Vec<Memory> = (0..3).map(|_| device.allocate(1000).unwrap()).collect();
    for (at, memory) in memory.iter().enumerate() {
        upload(device, queue, memory, &vec![at as u8; 1000]);
    }
    let mut slot = lend(&pool, device, 1).remove(0);
    let bytes = pattern(SLOT, 9);
    slot.bytes_mut().copy_from_slice(&bytes);
    let transfers = vec![
        Transfer::plain(memory[0].clone(), 7, 13, 301),
        Transfer::plain(memory[2].clone(), 999, 1, 1),
        Transfer::plain(memory[1].clone(), 0, 2000, 1000),
        Transfer::plain(memory[0].clone(), 400, 5, 0),
    ];
    drop(queue.upload(slot, transfers).unwrap());
    let mut wanted = vec![vec![0; 1000], bytes[2000..3000].to_vec(), vec![2; 1000]];
    wanted[0][7..308].copy_from_slice(&bytes[13..314]);
    wanted[2][999] = bytes[1];
    for (memory, wanted) in memory.iter().zip(wanted) {
        assert!(download(device, queue, memory) == wanted);
    }
}

fn rows_arrive(device: &dyn Device, queue: &mut dyn Queue) {
    let memory = device.allocate(10 * 64).unwrap();
    upload(device, queue, &memory, &[0; 640]);
    let pool = Pool::new(1 << 20);
    let mut slot = lend(&pool, device, 1).remove(0);
    let bytes = pattern(SLOT, 1);
    slot.bytes_mut().copy_from_slice(&bytes);
    let rows = Transfer {
        rows: 9,
        memory_pitch: 64,
        slot_pitch: 100,
        ..Transfer::plain(memory.clone(), 16, 40, 32)
    };
    if !device.info().pitched {
        assert!(queue.upload(slot, vec![rows]).is_err());
        return;
    }
    drop(queue.upload(slot, vec![rows]).unwrap());
    let mut wanted = vec![0; 640];
    for row in 0..9 {
        let from = 40 + row * 100;
        wanted[16 + row * 64..][..32].copy_from_slice(&bytes[from..from + 32]);
    }
    assert!(download(device, queue, &memory) == wanted);
}

fn copies_keep_their_order(device: &dyn Device, queue: &mut dyn Queue) {
    // The last of many copies to the same bytes is the one that stays.
    let pool = Pool::new(1 << 20);
    let memory = device.allocate(SLOT as u64).unwrap();
    let mut tickets = Vec::new();
    for (round, mut slot) in lend(&pool, device, 8).into_iter().enumerate() {
        slot.bytes_mut().fill(round as u8);
        tickets.push(
            queue
                .upload(slot, vec![Transfer::plain(memory.clone(), 0, 0, SLOT)])
                .unwrap(),
        );
    }
    let last = tickets.pop().unwrap().wait().unwrap();
    assert_eq!(last.bytes()[0], 7);
    for mut ticket in tickets {
        assert!(
            ticket.is_done().unwrap(),
            "a copy before the last one is over"
        );
    }
    assert!(download(device, queue, &memory).iter().all(|&b| b == 7));
}

fn what_does_not_fit_is_refused(device: &dyn Device, queue: &mut dyn Queue) {
    let pool = Pool::new(SLOT as u64);
    let memory = device.allocate(100).unwrap();
    for (offset, at, len) in [
        (0, 0, 101),
        (100, 0, 1),
        (u64::MAX, 0, 2),
        (0, SLOT, 1),
        (0, usize::MAX, 2),
        (0, 0, usize::MAX),
    ] {
        // There is one slot: each refusal gives it back.
        let slot = lend(&pool, device, 1).remove(0);
        let error = queue.upload(slot, vec![Transfer::plain(memory.clone(), offset, at, len)]);
        assert!(
            matches!(error.unwrap_err().cause(), Cause::Invalid(_)),
            "{offset} {at} {len}"
        );
    }
    let slot = lend(&pool, device, 1).remove(0);
    let overlapping = Transfer {
        rows: 2,
        memory_pitch: 4,
        slot_pitch: 8,
        ..Transfer::plain(memory.clone(), 0, 0, 8)
    };
    assert!(queue.upload(slot, vec![overlapping]).is_err());
    let none = Transfer {
        rows: 0,
        ..Transfer::plain(memory, 0, 0, 8)
    };
    let slot = lend(&pool, device, 1).remove(0);
    assert!(queue.download(slot, vec![none]).is_err());
}

fn memory_outlives_its_copies(device: &dyn Device, queue: &mut dyn Queue) {
    let pool = Pool::new(1 << 20);
    for _ in 0..20 {
        let memory = device.allocate(SLOT as u64).unwrap();
        let slot = lend(&pool, device, 1).remove(0);
        let ticket = queue
            .upload(slot, vec![Transfer::plain(memory, 0, 0, SLOT)])
            .unwrap();
        drop(ticket);
    }
    queue.drain().unwrap();
}

fn slots_are_whole_pages(device: &dyn Device) {
    let slot = device.staging(SLOT).unwrap();
    assert_eq!(slot.bytes().len(), SLOT);
    assert_eq!(slot.bytes().as_ptr().addr() % 4096, 0);
}

fn the_impossible_is_refused(device: &dyn Device) {
    for len in [u64::MAX, device.info().total_memory + 1] {
        let error = device.allocate(len).unwrap_err();
        assert!(error.is_out_of_memory(), "{error}");
        assert!(error.to_string().contains(&len.to_string()), "{error}");
    }
}
