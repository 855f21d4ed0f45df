//! Claim: a load to a device takes host memory for its staging budget and 32 MiB, whatever the size of the
//! model and whichever its container; counted by the allocator and by the system, above what the device itself has.
//!
//! The size that every run takes is 1 GiB with two budgets; `--ignored` takes 4 GiB with three.
#![cfg(target_os = "linux")]

#[path = "../../device/tests/drivers/mod.rs"]
mod drivers;
mod sparse;

use std::alloc::{GlobalAlloc, Layout, System};
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::Duration;

use tonnage::device::driver::Driver;
use tonnage::device::vulkan;
use tonnage::device::{Device, Kind, Pool};
use tonnage::{Checkpoint, DeviceLoad};
use tonnage_stubdriver::find::Stub;

/// Counts bytes that are allocated.
struct Counting;

static LIVE: AtomicUsize = AtomicUsize::new(0);
static PEAK: AtomicUsize = AtomicUsize::new(0);

// SAFETY: everything is passed on to the system's allocator; counting touches no memory of it.
#[allow(unsafe_code)]
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        let live = LIVE.fetch_add(layout.size(), Ordering::Relaxed) + layout.size();
        PEAK.fetch_max(live, Ordering::Relaxed);
        // SAFETY: the caller's promise.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, at: *mut u8, layout: Layout) {
        LIVE.fetch_sub(layout.size(), Ordering::Relaxed);
        // SAFETY: the caller's promise.
        unsafe { System.dealloc(at, layout) }
    }
}

#[global_allocator]
static COUNTING: Counting = Counting;

/// What is measured is all of the process's: tests take turns.
static TURN: Mutex<()> = Mutex::new(());

const MIB: u64 = 1 << 20;
/// What may come on top of the budget.
const SLACK: u64 = 32 * MIB;

/// Anonymous memory of this process that is in the machine, in bytes.
fn anonymous() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status
        .lines()
        .find_map(|line| line.strip_prefix("RssAnon:"))
        .unwrap();
    let kib: u64 = line.trim().trim_end_matches(" kB").trim().parse().unwrap();
    kib << 10
}

/// Calls `work` and gives its result, and by how much anonymous memory and the heap grew meanwhile at most.
fn watched<T>(work: impl FnOnce() -> T) -> (T, u64, u64) {
    let (before, heap) = (anonymous(), LIVE.load(Ordering::Relaxed));
    PEAK.store(heap, Ordering::Relaxed);
    let over = Arc::new(AtomicBool::new(false));
    let watcher = thread::spawn({
        let over = over.clone();
        move || {
            let mut most = before;
            while !over.load(Ordering::Relaxed) {
                most = most.max(anonymous());
                thread::sleep(Duration::from_millis(2));
            }
            most.max(anonymous())
        }
    });
    let result = work();
    over.store(true, Ordering::Relaxed);
    let most = watcher.join().unwrap();
    let heap = PEAK.load(Ordering::Relaxed) - heap;
    (result, most - before, heap as u64)
}

/// What of the device's own memory counts as anonymous memory of this process: all of it or nothing.
fn is_anonymous(device: &Arc<dyn Device>, path: &Path) -> bool {
    let checkpoint = Checkpoint::open(path).unwrap();
    let pool = Pool::new(MIB);
    let load = DeviceLoad {
        select: vec!["large.0".to_owned()],
        staging: Some(MIB),
        pool: Some(pool.clone()),
        ..Default::default()
    };
    let before = anonymous();
    let loaded = checkpoint.load_to(device, &load).unwrap();
    let grown = anonymous().saturating_sub(before);
    drop(loaded);
    pool.trim();
    assert!(!(8 * MIB..56 * MIB).contains(&grown), "neither: {grown}");
    grown > 56 * MIB
}

/// How far a load stays within a budget: what it took beyond the device's own memory, over what it may.
fn within(device: &Arc<dyn Device>, path: &Path, staging: u64, budget: u64) -> Result<(), String> {
    let own = is_anonymous(device, path);
    let checkpoint = Checkpoint::open(path).unwrap();
    let pool = Pool::new(staging);
    let load = DeviceLoad {
        staging: Some(staging),
        // Enough of them to fill a budget with two slots each.
        threads: Some(16),
        pool: Some(pool.clone()),
        ..Default::default()
    };
    let (loaded, grown, heap) = watched(|| checkpoint.load_to(device, &load).unwrap());
    let bytes: u64 = loaded.tensors().iter().map(|tensor| tensor.len).sum();
    assert_eq!(bytes, checkpoint.total_bytes());
    assert_eq!(loaded.report().bytes, bytes);
    let grown = if own {
        grown.saturating_sub(bytes)
    } else {
        grown
    };
    let (_, peak) = pool.bytes();
    pool.trim();
    println!(
        "{}: {} MiB, budget {} MiB: ring {} MiB, anonymous +{:.1} MiB, heap +{:.1} MiB, {:.2} s, {:.2} GB/s, {}",
        device.info().name,
        bytes / MIB,
        budget / MIB,
        peak / MIB,
        grown as f64 / MIB as f64,
        heap as f64 / MIB as f64,
        loaded.report().seconds,
        loaded.report().gb_per_s(),
        loaded.report().strategy,
    );
    let most = budget + SLACK;
    if grown > most || heap > most || peak > budget {
        return Err(format!(
            "anonymous {grown}, heap {heap}, ring {peak}, allowed {most}"
        ));
    }
    Ok(())
}

fn stub(gib: u64, budgets: &[u64]) {
    let _turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
    let folder = tempfile::tempdir().unwrap();
    let path = sparse::model(folder.path(), gib << 30);
    // Copies slower than reads: the ring grows until the budget ends that.
    let settings = format!("MEM_MIB={}\nPOISON=0\nBPS=1500000000", (gib + 1) << 10);
    let stub = Stub::begin(&settings);
    for kind in [Kind::Cuda, Kind::Rocm] {
        let driver = Driver::open_at(kind, stub.path()).unwrap();
        let device: Arc<dyn Device> = Arc::new(driver.device(0).unwrap());
        for &budget in budgets {
            within(&device, &path, budget, budget).unwrap();
        }
        // A GGUF file is no other: its blocks pass as they are.
        let blocks = sparse::gguf(folder.path(), 512 * MIB);
        within(&device, &blocks, 16 * MIB, 16 * MIB).unwrap();
        // A ring that is larger than the budget fails the same check.
        within(&device, &path, 256 * MIB, 16 * MIB).unwrap_err();
        if gib == 1 {
            break;
        }
    }
}

#[test]
fn a_stub_card() {
    stub(1, &[16 * MIB, 64 * MIB]);
}

#[test]
#[ignore = "4 GiB"]
fn a_stub_card_at_full_size() {
    stub(4, &[16 * MIB, 64 * MIB, 256 * MIB]);
}

fn lavapipe(gib: u64, budgets: &[u64]) {
    let folder = tempfile::tempdir().unwrap();
    let path = sparse::model(folder.path(), gib << 30);
    for force_staging in [false, true] {
        let settings = vulkan::Settings {
            library: None,
            force_staging,
            driver_pages: false,
        };
        let device: Arc<dyn Device> = vulkan::open(0, &settings).unwrap();
        for &budget in budgets {
            within(&device, &path, budget, budget).unwrap();
        }
        let blocks = sparse::gguf(folder.path(), 512 * MIB);
        within(&device, &blocks, 16 * MIB, 16 * MIB).unwrap();
    }
}

#[test]
fn lavapipe_at_small_size() {
    let _turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
    drivers::on("lavapipe", "lavapipe_at_small_size", || {
        lavapipe(1, &[16 * MIB, 64 * MIB])
    });
}

#[test]
#[ignore = "4 GiB"]
fn lavapipe_at_full_size() {
    let _turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
    drivers::on("lavapipe", "lavapipe_at_full_size", || {
        lavapipe(4, &[16 * MIB, 64 * MIB, 256 * MIB]);
    });
}
