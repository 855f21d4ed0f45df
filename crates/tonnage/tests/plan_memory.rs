//! Claim: loading a rank's tensors takes memory for them and for the staging budget, whatever the checkpoint's size:
//! column shards as well, whose blocks are read whole. Counted by the allocator and by the system.
#![cfg(target_os = "linux")]

use std::alloc::{GlobalAlloc, Layout, System};
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread;
use std::time::Duration;

use tonnage::format::{TensorSpec, WriteOptions, layout};
use tonnage::plan::{IoProfile, Mesh, PlanLoad, Rules};
use tonnage::{Checkpoint, Dtype};

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

const MIB: u64 = 1 << 20;
/// What the allocator, stacks and the like may take besides.
const SLACK: u64 = 8 * MIB;
const TENSORS: u64 = 8;

/// Matrices of 64 MiB, in a file that takes no room on the disk.
fn model(folder: &Path) -> PathBuf {
    let path = folder.join("sparse.safetensors");
    let names: Vec<String> = (0..TENSORS).map(|at| format!("w.{at}")).collect();
    let specs: Vec<TensorSpec<'_>> = (names.iter())
        .map(|name| TensorSpec {
            name,
            dtype: Dtype::BF16,
            shape: &[4096, 8192],
        })
        .collect();
    let layout = layout(&specs, None, &WriteOptions::default()).unwrap();
    let file = File::create(&path).unwrap();
    file.write_all_at(&layout.header, 0).unwrap();
    file.set_len(layout.file_len).unwrap();
    path
}

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

/// Calls `work`, and gives by how much anonymous memory and the heap grew meanwhile at most.
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

#[test]
fn a_rank_takes_its_tensors_and_the_staging_budget() {
    let folder = tempfile::tempdir().unwrap();
    let checkpoint = Checkpoint::open(model(folder.path())).unwrap();
    let mesh = Mesh::new(&[("tp", 4)]).unwrap();
    for (dim, profile) in [
        (0, IoProfile::NVME),
        (1, IoProfile::NVME),
        (1, IoProfile::PAGE_CACHE),
    ] {
        let rules = format!(r#"{{"*": {{"shard": {{"dim": {dim}}}}}}}"#);
        let plan = checkpoint
            .plan(&mesh, &Rules::from_json(&rules).unwrap())
            .unwrap();
        let bound = checkpoint.with_plan(&plan).unwrap();
        for (staging, dtype) in [
            (4 * MIB, None),
            (32 * MIB, None),
            (16 * MIB, Some(Dtype::F32)),
        ] {
            let load = PlanLoad {
                staging: Some(staging),
                profile: Some(profile),
                threads: Some(4),
                dtype,
                ..PlanLoad::default()
            };
            let (loaded, grown, heap) = watched(|| bound.load(1, &load).unwrap());
            let tensors: u64 = loaded.iter().map(|(_, bytes)| bytes.len() as u64).sum();
            let each = if dtype.is_some() { 32 } else { 16 };
            assert_eq!(tensors, TENSORS * each * MIB);
            let what = format!(
                "dim {dim} from {}, staging {staging}, {dtype:?}",
                profile.name
            );
            assert!(
                grown >= tensors * 9 / 10,
                "{what}: nothing was counted: {grown}"
            );
            assert!(
                grown <= tensors + staging + SLACK,
                "{what}: {grown} for {tensors}"
            );
            assert!(heap <= SLACK, "{what}: {heap} on the heap");
        }
    }
}
