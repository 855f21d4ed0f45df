//! A real NVIDIA card keeps the contract. Runs where `TONNAGE_TEST_GPU=1` says that there is one; the
//! stub driver's tests run the same suite everywhere.

mod contract;

use std::time::Instant;

use tonnage_device::driver::Driver;
use tonnage_device::{Cause, Device, Kind, Pool, Transfer};

/// The card, or nothing and a word why.
fn card() -> Option<tonnage_device::driver::DriverDevice> {
    if std::env::var_os("TONNAGE_TEST_GPU").is_none() {
        eprintln!("not run: TONNAGE_TEST_GPU is not set");
        return None;
    }
    let driver = Driver::open(Kind::Cuda).expect("NVIDIA's driver");
    assert!(driver.count() > 0, "a card");
    println!("driver {:?}", driver.version());
    Some(driver.device(0).expect("the first card"))
}

#[test]
fn a_card_keeps_the_contract() {
    let Some(device) = card() else { return };
    println!("{:?}", device.info());
    contract::keeps_the_contract(&device);
}

#[test]
fn a_full_card_says_what_was_needed_and_free_and_frees_everything() {
    let Some(device) = card() else { return };
    let free = device.free_memory().unwrap();
    let mut held = Vec::new();
    let error = loop {
        match device.allocate(8 << 30) {
            Ok(memory) => held.push(memory),
            Err(error) => break error,
        }
    };
    println!("{error}");
    let Cause::OutOfMemory {
        needed,
        free: Some(left),
    } = *error.cause()
    else {
        panic!("{error}");
    };
    assert!(needed == 8 << 30 && left < needed);
    drop(held);
    assert!(device.free_memory().unwrap() >= free - (64 << 20));
}

#[test]
fn a_card_takes_bytes_at_the_speed_of_its_bus() {
    const SLOT: usize = 8 << 20;
    const TOTAL: u64 = 4 << 30;
    let Some(device) = card() else { return };
    let memory = device.allocate(TOTAL).unwrap();
    let pool = Pool::new(4 * SLOT as u64);
    let mut queue = device.queue().unwrap();
    for round in 0..3 {
        let began = Instant::now();
        let mut slots = pool.lend(&device, SLOT, 4, 4, &|| false).unwrap();
        let lent = began.elapsed();
        let began = Instant::now();
        let mut tickets = std::collections::VecDeque::new();
        for i in 0..TOTAL / SLOT as u64 {
            let slot = slots.pop().unwrap_or_else(|| {
                let oldest: tonnage_device::Ticket = tickets.pop_front().unwrap();
                oldest.wait().unwrap()
            });
            let to = Transfer::plain(memory.clone(), i * SLOT as u64, 0, SLOT);
            tickets.push_back(queue.upload(slot, vec![to]).unwrap());
        }
        drop(tickets);
        let seconds = began.elapsed().as_secs_f64();
        println!(
            "round {round}: {:.1} GB/s; slots in {lent:?}",
            TOTAL as f64 / seconds / 1e9
        );
        if round == 0 {
            let began = Instant::now();
            pool.trim();
            println!("pages unlocked in {:?}", began.elapsed());
        }
    }
}
