//! CUDA devices keep the contract and share the process with others who use the driver.
//!
//! On a real card where `TONNAGE_TEST_GPU=1` says that there is one; on the library that
//! `TONNAGE_TEST_CUDA_DRIVER` names; else on the stub driver. Sizes follow what there is.

mod client;
mod contract;

use std::collections::VecDeque;
use std::env;
use std::ffi::OsString;
use std::path::Path;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::Instant;

use client::Client;
use tonnage_device::driver::{Driver, DriverDevice};
use tonnage_device::find::{self, Settings};
use tonnage_device::{
    Cause, Device, DeviceId, Error, Kind, Memory, Pool, Stream, Ticket, Transfer,
};

const MIB: usize = 1 << 20;

/// A driver for one test; the tests take turns, since they share a primary context.
struct Rig {
    library: OsString,
    driver: Driver,
    real: bool,
    #[cfg(target_os = "linux")]
    _stub: Option<tonnage_stubdriver::find::Stub>,
    _turn: MutexGuard<'static, ()>,
}

impl Rig {
    /// None, with a word why, where there is neither a card nor a library nor a stub.
    fn new() -> Option<Rig> {
        static TURN: Mutex<()> = Mutex::new(());
        let turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
        if env::var_os("TONNAGE_TEST_GPU").is_some_and(|value| value == "1") {
            let driver = Driver::open(Kind::Cuda).expect("NVIDIA's driver");
            let name = if cfg!(windows) {
                "nvcuda.dll"
            } else {
                "libcuda.so.1"
            };
            return Some(Rig {
                library: name.into(),
                driver,
                real: true,
                #[cfg(target_os = "linux")]
                _stub: None,
                _turn: turn,
            });
        }
        if let Some(library) = env::var_os("TONNAGE_TEST_CUDA_DRIVER") {
            let driver = Driver::open_at(Kind::Cuda, Path::new(&library)).expect("the driver");
            return Some(Rig {
                library,
                driver,
                real: false,
                #[cfg(target_os = "linux")]
                _stub: None,
                _turn: turn,
            });
        }
        Self::on_stub(turn)
    }

    #[cfg(target_os = "linux")]
    fn on_stub(turn: MutexGuard<'static, ()>) -> Option<Rig> {
        let stub = tonnage_stubdriver::find::Stub::begin("MEM_MIB=512\nDELAY_US=100");
        Some(Rig {
            library: stub.path().into(),
            driver: Driver::open_at(Kind::Cuda, stub.path()).expect("the stub driver"),
            real: false,
            _stub: Some(stub),
            _turn: turn,
        })
    }

    #[cfg(not(target_os = "linux"))]
    fn on_stub(_: MutexGuard<'static, ()>) -> Option<Rig> {
        eprintln!("not run: no card (TONNAGE_TEST_GPU=1), and the stub driver is for Linux");
        None
    }

    fn device(&self) -> DriverDevice {
        self.driver.device(0).expect("the first device")
    }

    fn client(&self) -> Client {
        Client::new(&self.library)
    }
}

/// Copies slots one after the other to memory, `slots` of them under way; the seconds that it took.
fn fill(
    device: &DriverDevice,
    memory: &Memory,
    slot: usize,
    slots: usize,
    with: &dyn Fn(u64, &mut [u8]),
) -> f64 {
    let pool = Pool::new((slot * slots) as u64);
    let mut free = pool.lend(device, slot, slots, slots, &|| false).unwrap();
    let mut queue = device.queue().unwrap();
    let mut tickets: VecDeque<Ticket> = VecDeque::new();
    let began = Instant::now();
    let mut at = 0;
    while at < memory.len() {
        let len = slot.min((memory.len() - at) as usize);
        let mut slot = match free.pop() {
            Some(slot) => slot,
            None => tickets.pop_front().unwrap().wait().unwrap(),
        };
        with(at, &mut slot.bytes_mut()[..len]);
        let to = Transfer::plain(memory.clone(), at, 0, len);
        tickets.push_back(queue.upload(slot, vec![to]).unwrap());
        at += len as u64;
    }
    queue.drain().unwrap();
    began.elapsed().as_secs_f64()
}

#[test]
fn a_device_keeps_the_contract() {
    let Some(rig) = Rig::new() else { return };
    let device = rig.device();
    println!("{}: {:?}", rig.driver.version().unwrap(), device.info());
    contract::keeps_the_contract(&device);
}

#[test]
fn a_device_is_found_and_opened_once() {
    let Some(rig) = Rig::new() else { return };
    let settings = Settings {
        cuda_driver: (!rig.real).then(|| rig.library.clone().into()),
        ..Settings::default()
    };
    let found = find::devices(&settings);
    let cuda = found.iter().find(|found| found.kind == Kind::Cuda).unwrap();
    assert!(
        cuda.driver.as_ref().unwrap().starts_with("CUDA "),
        "{cuda:?}"
    );
    let info = &cuda.devices.as_ref().unwrap()[0];
    let id = DeviceId::new(Kind::Cuda, 0);
    let first = find::open(id, &settings).unwrap();
    assert_eq!(first.info(), info);
    assert!(Arc::ptr_eq(&first, &find::open(id, &settings).unwrap()));
    let count = rig.driver.count();
    let error = find::open(DeviceId::new(Kind::Cuda, count), &settings).unwrap_err();
    assert!(matches!(error.cause(), Cause::Missing(_)), "{error}");
}

#[test]
fn a_hundred_mebibytes_there_and_back() {
    let Some(rig) = Rig::new() else { return };
    let device = rig.device();
    let memory = device.allocate((100 * MIB) as u64 + 13).unwrap();
    // Each byte depends on its place, with no period that a slot could have.
    let byte = |at: u64| (at ^ (at >> 8) ^ (at >> 16) ^ (at / 251)) as u8;
    fill(&device, &memory, 4 * MIB, 3, &|start, bytes| {
        for (i, place) in bytes.iter_mut().enumerate() {
            *place = byte(start + i as u64);
        }
    });
    let pool = Pool::new(4 * MIB as u64);
    let mut queue = device.queue().unwrap();
    let mut at = 0;
    while at < memory.len() {
        let len = (4 * MIB).min((memory.len() - at) as usize);
        let slot = pool
            .lend(&device, 4 * MIB, 1, 1, &|| false)
            .unwrap()
            .remove(0);
        let from = Transfer::plain(memory.clone(), at, 0, len);
        let slot = queue.download(slot, vec![from]).unwrap().wait().unwrap();
        let wrong = (0..len).find(|&i| slot.bytes()[i] != byte(at + i as u64));
        assert_eq!(wrong.map(|i| at + i as u64), None, "the first wrong byte");
        at += len as u64;
    }
}

#[test]
fn columns_are_cut_out_by_the_device() {
    let Some(rig) = Rig::new() else { return };
    let device = rig.device();
    let pool = Pool::new(16 * MIB as u64);
    let mut queue = device.queue().unwrap();
    let (rows, row) = (1000, 8192);
    let bytes = contract::pattern(8 * MIB, 5);
    // From dense rows to the half of their columns, packed; and to rows with gaps, by odd numbers.
    for (first, width, pitch) in [
        (2048, 4096, 4096),
        (1, 4095, 5001),
        (8191, 1, 1),
        (0, 8192, 8192),
    ] {
        let memory = device.allocate((rows * pitch) as u64).unwrap();
        let mut slot = pool
            .lend(&device, 8 * MIB, 1, 1, &|| false)
            .unwrap()
            .remove(0);
        slot.bytes_mut().copy_from_slice(&bytes);
        let columns = Transfer {
            rows,
            memory_pitch: pitch as u64,
            slot_pitch: row,
            ..Transfer::plain(memory.clone(), 0, first, width)
        };
        // The last row needs no gap behind it.
        let mut slot = queue
            .upload(slot, vec![columns.clone()])
            .unwrap()
            .wait()
            .unwrap();
        slot.bytes_mut().fill(0xEE);
        let slot = queue.download(slot, vec![columns]).unwrap().wait().unwrap();
        for (at, byte) in slot.bytes().iter().enumerate() {
            let (line, column) = (at / row, at % row);
            let inside = line < rows && (first..first + width).contains(&column);
            assert_eq!(
                *byte,
                if inside { bytes[at] } else { 0xEE },
                "{line} {column} of {width}"
            );
        }
    }
}

#[test]
fn the_primary_context_is_shared_and_let_go() {
    let Some(rig) = Rig::new() else { return };
    let mut client = rig.client();
    let device = rig.device();
    let memory = device.allocate(1000).unwrap();
    assert_eq!(client.context_of(memory.address()), client.context());
    let staging = device.staging(4096).unwrap();
    let queue = device.queue().unwrap();
    client.let_go();
    if client.is_active().is_none() {
        return eprintln!("this driver does not say whether a context is in use");
    }
    let active = |wanted| assert_eq!(client.is_active(), Some(wanted));
    active(true);
    drop(device);
    drop(memory);
    active(true);
    drop(staging);
    active(true);
    // The last of them.
    drop(queue);
    active(false);
}

#[test]
fn what_was_current_is_current_again() {
    let Some(rig) = Rig::new() else { return };
    let client = rig.client();
    let device = rig.device();
    type Create = extern "C" fn(*mut usize, u32, i32) -> i32;
    let mut other = 0;
    let made = client.find::<Create>("cuCtxCreate_v2");
    if let Some(create) = made {
        assert_eq!(create(&mut other, 0, 0), 0);
    }
    let others = [other, 0, client.context()];
    for current in &others[usize::from(made.is_none())..] {
        client.make_current(*current);
        // To make none current takes one off the thread's stack, where other tests may have left more.
        while client.current() != *current {
            client.make_current(*current);
        }
        let work = || -> Result<(), Error> {
            let memory = device.allocate(4096)?;
            device.free_memory()?;
            let mut queue = device.queue()?;
            let pool = Pool::new(MIB as u64);
            let slot = contract::lend(&pool, &device, 1).remove(0);
            let mut ticket = queue.upload(slot, vec![Transfer::plain(memory, 0, 0, 4096)])?;
            queue.after(Stream::DEFAULT)?;
            queue.before(Stream::DEFAULT)?;
            ticket.is_done()?;
            drop(ticket.wait()?);
            queue.drain()
        };
        work().unwrap();
        assert_eq!(client.current(), *current);
        device.allocate(u64::MAX).unwrap_err();
        assert_eq!(client.current(), *current);
    }
    if other != 0 {
        client.make_current(client.context());
        let destroy = client.function::<extern "C" fn(usize) -> i32>("cuCtxDestroy_v2");
        assert_eq!(destroy(other), 0);
    }
}

/// Owns somebody's memory, and counts how often it is let go.
struct Owner(Arc<AtomicUsize>);

impl Drop for Owner {
    fn drop(&mut self) {
        self.0.fetch_add(1, Ordering::SeqCst);
    }
}

#[allow(unsafe_code, reason = "the test allocates what it hands over")]
fn adopt(device: &DriverDevice, address: u64, len: usize, gone: &Arc<AtomicUsize>) -> Memory {
    let owner = Box::new(Owner(Arc::clone(gone)));
    // SAFETY: the caller's client has it until the owner is gone, and uses it in stream order.
    unsafe { device.adopt(address, len as u64, owner) }.unwrap()
}

#[allow(unsafe_code, reason = "the test makes the stream")]
fn stream_of(handle: usize) -> Stream {
    // SAFETY: a stream of the client's that lives until the end of the test.
    unsafe { Stream::from_raw(handle as u64) }
}

#[test]
fn memory_of_others_is_filled_in_the_order_of_their_stream() {
    let Some(rig) = Rig::new() else { return };
    let (client, device) = (rig.client(), rig.device());
    let len = if rig.real { 256 * MIB } else { 4 * MIB };
    let address = client.allocate(len);
    let gone = Arc::new(AtomicUsize::new(0));
    let memory = adopt(&device, address, len, &gone);
    assert_eq!((memory.address(), memory.len()), (address, len as u64));
    let pool = Pool::new(MIB as u64);
    let own = client.stream();
    let mut queue = device.queue().unwrap();
    for handle in [own, 0] {
        for round in 1..=5_u8 {
            // Their work takes a while, and ends with the bytes that we are about to write.
            for byte in [0xAA, 0xBB, 0xCC] {
                client.fill(handle, address, byte, len);
            }
            queue.after(stream_of(handle)).unwrap();
            let mut slot = contract::lend(&pool, &device, 1).remove(0);
            slot.bytes_mut().fill(round);
            let part = slot.bytes().len();
            let at = (len - part) as u64;
            let to = Transfer::plain(memory.clone(), at, 0, part);
            let ticket = queue.upload(slot, vec![to]).unwrap();
            queue.before(stream_of(handle)).unwrap();
            // No wait of ours: their stream has it.
            let seen = client.read(handle, address + at - 1, part + 1);
            assert_eq!(seen[0], 0xCC);
            assert!(seen[1..].iter().all(|&byte| byte == round), "round {round}");
            drop(ticket);
        }
    }
    assert_eq!(gone.load(Ordering::SeqCst), 0);
    drop(memory);
    assert_eq!(gone.load(Ordering::SeqCst), 1);
    drop(queue);
    client.destroy(own);
    client.free(address);
}

#[test]
fn what_the_driver_refuses_leaves_nothing_behind() {
    let Some(rig) = Rig::new() else { return };
    let (client, device) = (rig.client(), rig.device());
    let gone = Arc::new(AtomicUsize::new(0));
    // Half of it is nobody's memory.
    let address = client.allocate(4 * MIB);
    let nowhere = adopt(&device, address, 8 * MIB, &gone);
    let memory = device.allocate(4096).unwrap();
    let pool = Pool::new(64 << 10);
    let mut queue = device.queue().unwrap();
    for _ in 0..3 {
        // There is one slot: each refusal gives it back.
        let slot = contract::lend(&pool, &device, 1).remove(0);
        let transfers = vec![
            Transfer::plain(memory.clone(), 0, 0, 4096),
            Transfer::plain(nowhere.clone(), (4 * MIB - 2048) as u64, 4096, 4096),
        ];
        let error = queue.upload(slot, transfers).unwrap_err();
        assert!(
            matches!(error.cause(), Cause::Driver { code: 1, .. }),
            "{error}"
        );
        let text = error.to_string();
        assert!(text.starts_with("cuda:0: cannot copy to it: "), "{text}");
        assert!(text.contains("CUDA_ERROR_INVALID_VALUE"), "{text}");
    }
    drop(nowhere);
    assert_eq!(gone.load(Ordering::SeqCst), 1);
    // All is as before.
    drop((memory, queue));
    client.free(address);
    contract::keeps_the_contract(&device);
}

#[test]
fn threads_with_queues_of_their_own_do_not_disturb_each_other() {
    let Some(rig) = Rig::new() else { return };
    let device = rig.device();
    thread::scope(|scope| {
        for seed in 0..8 {
            let device = &device;
            scope.spawn(move || {
                let (mut queue, bytes) = (device.queue().unwrap(), contract::pattern(MIB, seed));
                let memory = device.allocate(MIB as u64).unwrap();
                contract::upload(device, queue.as_mut(), &memory, &bytes);
                let mut other = device.queue().unwrap();
                queue.drain().unwrap();
                assert!(contract::download(device, other.as_mut(), &memory) == bytes);
            });
        }
    });
}

#[test]
fn a_full_device_says_what_was_needed_and_free_and_frees_everything() {
    let Some(rig) = Rig::new() else { return };
    let device = rig.device();
    let free = device.free_memory().unwrap();
    let chunk = device.info().total_memory / 9;
    let mut held = Vec::new();
    let error = loop {
        match device.allocate(chunk) {
            Ok(memory) => held.push(memory),
            Err(error) => break error,
        }
        assert!(held.len() < 10, "more than there is");
    };
    println!("{error}");
    let Cause::OutOfMemory {
        needed,
        free: Some(left),
    } = *error.cause()
    else {
        panic!("{error}");
    };
    assert!(needed == chunk && left < needed);
    let wanted =
        format!("cuda:0: cannot allocate: out of memory: {needed} bytes needed, {left} free");
    assert_eq!(error.to_string(), wanted);
    drop(held);
    assert!(device.free_memory().unwrap() >= free - (64 << 20));
}

#[test]
fn a_device_takes_bytes_at_the_speed_of_its_bus() {
    let Some(rig) = Rig::new() else { return };
    let device = rig.device();
    let total = if rig.real { 2 << 30 } else { 64 << 20 };
    let memory = device.allocate(total).unwrap();
    for round in 0..3 {
        let seconds = fill(&device, &memory, 8 * MIB, 4, &|_, _| ());
        let rate = total as f64 / seconds / 1e9;
        println!("round {round}: {rate:.1} GB/s through 4 slots of 8 MiB");
        // A bus of today moves 20 and more; what is pageable, or waits in between, 8 at most.
        assert!(!rig.real || rate > 12.0, "{rate} GB/s");
    }
    let pool = Pool::new(256 << 20);
    let began = Instant::now();
    let slots = pool.lend(&device, 16 * MIB, 16, 16, &|| false).unwrap();
    println!("256 MiB locked in {:?}", began.elapsed());
    drop(slots);
    let began = Instant::now();
    pool.trim();
    println!("and unlocked in {:?}", began.elapsed());
}
