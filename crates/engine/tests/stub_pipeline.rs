//! The pipeline on the stub driver, whose copies run late and out of step: reading and copying overlap, faults
//! end it cleanly, and a queue with a bug does not go unnoticed. Nothing here looks at a clock.
#![cfg(target_os = "linux")]

#[path = "../../device/tests/buggy/mod.rs"]
mod buggy;

use std::ffi::{CStr, c_char};
use std::fmt;
use std::fs;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, mpsc};
use std::thread;
use std::time::Duration;

use buggy::{Bug, Buggy};
use tonnage_device::driver::Driver;
use tonnage_device::{Device, Kind, Pool};
use tonnage_engine::{Piece, Pipeline, PipelineOptions};
use tonnage_storage::{MemorySource, Source};
use tonnage_stubdriver::find::Stub;

const KINDS: [Kind; 2] = [Kind::Cuda, Kind::Rocm];
const SLOT: usize = 64 << 10;
const LEN: usize = 4 << 20;

fn pattern() -> Vec<u8> {
    (0..LEN)
        .map(|i| (i.wrapping_mul(2_654_435_761) >> 13) as u8)
        .collect()
}

/// A source that notes its reads in the driver's journal.
struct Noted {
    inner: MemorySource,
    mark: extern "C" fn(*const c_char),
}

impl fmt::Debug for Noted {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Noted")
    }
}

impl Source for Noted {
    fn label(&self) -> &str {
        self.inner.label()
    }

    fn len(&self) -> u64 {
        self.inner.len()
    }

    fn read_exact_at(&self, offset: u64, dst: &mut [u8]) -> Result<(), tonnage_storage::Error> {
        let note = |what: &'static CStr| (self.mark)(what.as_ptr());
        note(c"read begins");
        let result = self.inner.read_exact_at(offset, dst);
        note(c"read ends");
        result
    }
}

fn source(stub: &Stub) -> Arc<dyn Source> {
    Arc::new(Noted {
        inner: MemorySource::new(pattern(), "<bytes>"),
        mark: stub.function("stub_mark"),
    })
}

fn options(pool: &Arc<Pool>) -> PipelineOptions {
    PipelineOptions {
        staging: 16 * SLOT as u64,
        slot: Some(SLOT),
        threads: Some(2),
        pool: Arc::clone(pool),
        ..PipelineOptions::default()
    }
}

/// What failed, as its user reads it.
fn text(error: impl fmt::Display) -> String {
    error.to_string()
}

/// Brings the whole pattern in pieces of many sizes, and gives what the device has in the end.
fn load(
    stub: &Stub,
    device: &Arc<dyn Device>,
    source: &Arc<dyn Source>,
) -> Result<Vec<u8>, String> {
    let pool = Pool::new(16 * SLOT as u64);
    let memory = device.allocate(LEN as u64).map_err(text)?;
    let pipeline = Pipeline::start(vec![Arc::clone(device)], options(&pool)).map_err(text)?;
    let (mut at, mut pieces) = (0, Vec::new());
    for tag in 0.. {
        let len = (LEN as u64 - at).min(1 + tag * 7919 % 300_000);
        if len == 0 {
            break;
        }
        let memory = memory.clone();
        pieces.push(Piece::plain(Arc::clone(source), at, len, memory, at, tag));
        at += len;
    }
    let tags = pieces.len();
    pipeline.submit(pieces).map_err(text)?;
    let mut landed = 0;
    while let Some(more) = pipeline.landed().map_err(text)? {
        landed += more.tags.len();
    }
    assert_eq!(landed, tags);
    assert_eq!(pipeline.finish().map_err(text)?.bytes, LEN as u64);
    Ok(stub.peek(memory.address(), LEN))
}

fn open(stub: &Stub, kind: Kind) -> Result<Arc<dyn Device>, String> {
    let device = Driver::open_at(kind, stub.path()).and_then(|driver| driver.device(0));
    Ok(Arc::new(device.map_err(text)?))
}

#[test]
fn bytes_arrive_and_nothing_is_left() {
    let stub = Stub::begin("");
    for kind in KINDS {
        for seed in 1..=3 {
            stub.again(&format!("MEM_MIB=64\nDELAY_US=300\nSEED={seed}"));
            let device = open(&stub, kind).unwrap();
            let found = load(&stub, &device, &source(&stub)).unwrap();
            assert!(found == pattern());
            drop(device);
            assert_eq!((stub.violations(), stub.live().total()), (0, 0));
        }
    }
}

#[test]
fn reading_goes_on_while_two_copies_or_more_are_under_way() {
    let home = tempfile::tempdir().unwrap();
    let journal = home.path().join("journal");
    let stub = Stub::begin("");
    for kind in KINDS {
        stub.again(&format!("MEM_MIB=64\nJOURNAL={}", journal.display()));
        let device = open(&stub, kind).unwrap();
        let source = source(&stub);
        // No copy ends until reading has come as far as it can without: a pipeline that waits for its copies
        // before it reads on stays at one copy for each thread.
        stub.hold(true);
        let found = thread::scope(|scope| {
            let loading = scope.spawn(|| load(&stub, &device, &source));
            // The number of looks only keeps a pipeline that never gets there from hanging.
            for _ in 0..30_000 {
                if stub.counts().in_flight >= 6 || loading.is_finished() {
                    break;
                }
                thread::sleep(Duration::from_millis(1));
            }
            stub.hold(false);
            loading.join().unwrap()
        });
        assert!(found.unwrap() == pattern());
        stub.flush();
        let text = fs::read_to_string(&journal).unwrap();
        let overlapped = |line: &&str| {
            let in_flight = line.split("\"in_flight\":").nth(1);
            let count = in_flight.and_then(|rest| rest.trim_end_matches('}').parse::<u64>().ok());
            line.contains("read begins") && count.is_some_and(|count| count >= 2)
        };
        let reads = text.lines().filter(overlapped).count();
        let first_done = text
            .lines()
            .position(|line| line.contains("\"op\":\"done\""));
        let before = text.lines().take(first_done.unwrap());
        let held = before.filter(overlapped).count();
        println!(
            "{kind:?}: {reads} reads began while two copies were under way; {held} before any was over"
        );
        assert!(held >= 2 && stub.counts().max_in_flight >= 6);
        drop(device);
        assert_eq!((stub.violations(), stub.live().total()), (0, 0));
    }
}

/// The load with a fault at the n-th call, for every n up to `most` or until it no longer happens.
fn each_fault(what: &str, most: usize, check: impl Fn(&Stub, &str)) {
    let stub = Stub::begin("");
    for kind in KINDS {
        let mut failed = 0;
        for n in 1..=most {
            stub.again(&format!("MEM_MIB=64\nDELAY_US=100\n{what}={n}"));
            let source = source(&stub);
            let (tell, told) = mpsc::channel();
            let result = thread::scope(|scope| {
                scope.spawn(|| {
                    let result = open(&stub, kind).and_then(|device| load(&stub, &device, &source));
                    tell.send(result)
                });
                let result = told.recv_timeout(Duration::from_secs(120));
                if result.is_err() {
                    eprintln!("{kind:?} {what}={n}: a hang or a panic");
                    std::process::abort();
                }
                result.unwrap()
            });
            assert_eq!(stub.violations(), 0, "{kind:?} {what}={n}");
            match result {
                Ok(found) => {
                    assert!(found == pattern(), "{kind:?} {what}={n}");
                    assert_eq!(stub.live().total(), 0, "{kind:?} {what}={n}");
                }
                Err(error) => {
                    failed += 1;
                    check(&stub, &error);
                }
            }
        }
        println!("{kind:?}: {what}: {failed} of {most} runs failed");
        assert!(failed > 0, "{what} never happened");
    }
    stub.again("");
}

#[test]
fn a_full_device_leaves_nothing_behind() {
    each_fault("FAIL_ALLOC", 2, |stub, error| {
        assert!(error.contains("out of memory"), "{error}");
        assert_eq!(stub.live().total(), 0, "{error}");
    });
}

#[test]
fn too_little_staging_memory_ends_it_or_slows_it_down() {
    each_fault("FAIL_PINNED", 6, |stub, error| {
        assert!(error.contains("out of memory"), "{error}");
        assert_eq!(stub.live().total(), 0, "{error}");
    });
}

#[test]
fn a_refused_copy_leaves_nothing_behind() {
    each_fault("FAIL_ISSUE", 12, |stub, error| {
        assert!(error.contains("<bytes>"), "{error}");
        assert_eq!(stub.live().total(), 0, "{error}");
    });
}

#[test]
fn a_copy_that_fails_when_it_runs_is_told_with_its_source() {
    each_fault("FAIL_COPY", 12, |_, error| {
        assert!(error.contains("<bytes>"), "{error}");
        assert!(error.contains("719"), "{error}");
    });
}

#[test]
fn a_lost_context_is_told() {
    each_fault("LOSE_CONTEXT", 40, |_, error| {
        assert!(error.contains("709"), "{error}");
    });
}

#[test]
fn a_queue_with_a_bug_does_not_go_unnoticed() {
    let stub = Stub::begin("");
    for bug in [Bug::None, Bug::Hasty, Bug::Leak, Bug::Twice] {
        stub.again("MEM_MIB=64\nDELAY_US=500");
        let device: Arc<dyn Device> = Arc::new(Buggy::new(&stub, bug));
        let source = source(&stub);
        let load = || load(&stub, &device, &source).is_ok_and(|found| found == pattern());
        let right = catch_unwind(AssertUnwindSafe(load)).unwrap_or(false);
        drop(device);
        let (broken, live) = (stub.violations(), stub.live().total());
        println!("{bug:?}: right: {right}, rules broken: {broken}, left: {live}");
        let unseen = right && broken == 0 && live == 0;
        assert_eq!(unseen, bug == Bug::None, "{bug:?}");
    }
    stub.again("");
}
