//! The host keeps the contract of devices; the pool keeps its capacity.

mod contract;

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use tonnage_device::{Cause, Device, HostDevice, Pool};

#[test]
fn the_host_is_a_device() {
    contract::keeps_the_contract(&HostDevice::new(true));
    contract::keeps_the_contract(&HostDevice::new(false));
}

#[test]
fn the_host_sees_its_memory_and_no_range_twice() {
    let memory = HostDevice::new(true).allocate(100).unwrap();
    let mut inner = None;
    assert!(memory.with_host(0..50, &mut |_| {
        let same = memory.with_host(49..60, &mut |_| ());
        let other = memory.with_host(50..60, &mut |_| ());
        inner = Some((same, other));
    }));
    assert_eq!(inner, Some((false, true)));
    assert!(memory.with_host(49..60, &mut |_| ()), "given back");
    #[allow(
        clippy::reversed_empty_ranges,
        reason = "a range that ends before it begins has to be refused"
    )]
    for range in [0..101, 101..102, 60..50] {
        assert!(!memory.with_host(range, &mut |_| ()));
    }
    let apart = HostDevice::new(false).allocate(100).unwrap();
    assert!(!apart.with_host(0..1, &mut |_| ()));
}

#[test]
fn slots_never_exceed_the_capacity() {
    let (host, pool) = (HostDevice::default(), Pool::new(10 << 10));
    let first = pool.lend(&host, 4096, 8, 1, &|| false).unwrap();
    assert_eq!((first.len(), pool.bytes().0), (2, 8192));
    // None is left, and nobody gives one back.
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let waiting =
            scope.spawn(|| pool.lend(&host, 4096, 1, 1, &|| stop.load(Ordering::Relaxed)));
        std::thread::sleep(Duration::from_millis(50));
        assert!(!waiting.is_finished());
        stop.store(true, Ordering::Relaxed);
        let error = waiting.join().unwrap().unwrap_err();
        assert_eq!(error.cause(), &Cause::Cancelled);
    });
    // One comes back while another waits for it.
    std::thread::scope(|scope| {
        let waiting = scope.spawn(|| pool.lend(&host, 4096, 1, 1, &|| false).unwrap().len());
        std::thread::sleep(Duration::from_millis(30));
        drop(first);
        assert_eq!(waiting.join().unwrap(), 1);
    });
    // Other sizes push idle slots out; a capacity too small for one grows.
    let large = pool.lend(&host, 64 << 10, 3, 1, &|| false).unwrap();
    assert_eq!((large.len(), pool.bytes().0), (1, 64 << 10));
    drop(large);
    pool.trim();
    assert_eq!(pool.bytes(), (0, 64 << 10));
}
