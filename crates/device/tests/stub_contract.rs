//! Our devices on the stub driver keep the contract, under CUDA's names and under HIP's, with copies that
//! run late and out of step; and the driver has nothing to complain of.
#![cfg(target_os = "linux")]

mod contract;

use tonnage_device::driver::Driver;
use tonnage_device::{Device, Kind, Pool, Transfer};
use tonnage_stubdriver::find::Stub;

const KINDS: [Kind; 2] = [Kind::Cuda, Kind::Rocm];

#[test]
fn devices_keep_the_contract() {
    let stub = Stub::begin("");
    for kind in KINDS {
        for seed in 1..=5 {
            stub.again(&format!("MEM_MIB=64\nDEVICES=2\nDELAY_US=300\nSEED={seed}"));
            let driver = Driver::open_at(kind, stub.path()).unwrap();
            assert_eq!(driver.count(), 2);
            for index in 0..2 {
                contract::keeps_the_contract(&driver.device(index).unwrap());
            }
            assert_eq!(stub.live().total(), 0, "{:?}", stub.live());
            assert_eq!(stub.violations(), 0);
            assert!(stub.counts().copies > 50, "{:?}", stub.counts());
        }
    }
}

#[test]
fn a_full_device_says_what_was_needed_and_free_and_frees_everything() {
    let stub = Stub::begin("");
    for kind in KINDS {
        stub.again("MEM_MIB=64");
        let driver = Driver::open_at(kind, stub.path()).unwrap();
        let device = driver.device(0).unwrap();
        let held = device.allocate(40 << 20).unwrap();
        let error = device.allocate(40 << 20).unwrap_err();
        let wanted = format!("{} bytes needed, {} free", 40 << 20, 24 << 20);
        assert!(error.to_string().contains(&wanted), "{error}");
        drop(held);
        assert_eq!(device.free_memory().unwrap(), 64 << 20);
        drop(device.allocate(64 << 20).unwrap());
        drop(device);
        assert_eq!(stub.live().total(), 0);
    }
}

#[test]
fn what_was_current_on_a_thread_is_so_again() {
    let stub = Stub::begin("DEVICES=2");
    type Get = extern "C" fn(*mut usize) -> i32;
    type Set = extern "C" fn(usize) -> i32;
    let (get, set) = (
        stub.function::<Get>("cuCtxGetCurrent"),
        stub.function::<Set>("cuCtxSetCurrent"),
    );
    let current = || {
        let mut context = 0;
        assert_eq!(get(&mut context), 0);
        context
    };
    let driver = Driver::open_at(Kind::Cuda, stub.path()).unwrap();
    let (first, second) = (driver.device(0).unwrap(), driver.device(1).unwrap());
    assert_eq!(current(), 0);
    let memory = first.allocate(100).unwrap();
    assert_eq!(current(), 0);
    // Somebody else's context, e.g. a framework's.
    let mut theirs = 0;
    let retain = stub.function::<extern "C" fn(*mut usize, i32) -> i32>("cuDevicePrimaryCtxRetain");
    assert_eq!(retain(&mut theirs, 1), 0);
    assert_eq!(set(theirs), 0);
    let pool = Pool::new(1 << 20);
    let slot = contract::lend(&pool, &first, 1).remove(0);
    let mut queue = first.queue().unwrap();
    let to = Transfer::plain(memory.clone(), 0, 0, 100);
    drop(queue.upload(slot, vec![to]).unwrap());
    assert_eq!(current(), theirs);
    drop((memory, queue, second, first));
    pool.trim();
    assert_eq!(current(), theirs);
    assert_eq!(set(0), 0);
    let release = stub.function::<extern "C" fn(i32) -> i32>("cuDevicePrimaryCtxRelease_v2");
    assert_eq!(release(1), 0);
}
