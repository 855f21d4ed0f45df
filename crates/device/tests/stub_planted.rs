//! Planted bugs: each is caught, by the driver's own checks or by the suite that devices have to pass. So a
//! pass of that suite means something.
#![cfg(target_os = "linux")]
#![allow(
    unsafe_code,
    reason = "streams of a framework's are named by their handles"
)]

mod buggy;
mod contract;

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::process::Command;

use buggy::{Bug, Buggy};
use tonnage_device::driver::Driver;
use tonnage_device::{Device, Kind, Pool, Stream, Transfer};
use tonnage_stubdriver::find::Stub;

const LEN: usize = 1 << 20;
const SLOW: &str = "MEM_MIB=64\nDELAY_US=500";

/// A framework that fills memory on its stream, has us copy into a part of it, and reads it on its stream.
fn streams_are_ordered(stub: &Stub, device: &dyn Device) {
    let create = stub.function::<extern "C" fn(*mut u64, u32) -> i32>("hipStreamCreateWithFlags");
    let set = stub.function::<extern "C" fn(u64, i32, usize, u64) -> i32>("hipMemsetAsync");
    let get = stub.function::<extern "C" fn(usize, u64, usize, u64) -> i32>("hipMemcpyDtoHAsync");
    let sync = stub.function::<extern "C" fn(u64) -> i32>("hipStreamSynchronize");
    let destroy = stub.function::<extern "C" fn(u64) -> i32>("hipStreamDestroy");
    let mut theirs = 0;
    assert_eq!(create(&mut theirs, 1), 0);
    // SAFETY: a live stream, until the end of this function.
    let stream = unsafe { Stream::from_raw(theirs) };
    let memory = device.allocate(LEN as u64).unwrap();
    let mut staging = device.staging(LEN).unwrap();
    staging.bytes_mut().fill(0);
    let pool = Pool::new(1 << 20);
    let mut slot = contract::lend(&pool, device, 1).remove(0);
    let len = slot.bytes().len();
    slot.bytes_mut().fill(7);
    let mut queue = device.queue().unwrap();

    assert_eq!(set(memory.address(), 5, LEN, theirs), 0);
    queue.after(stream).unwrap();
    let ticket = queue.upload(slot, vec![Transfer::plain(memory.clone(), 100, 0, len)]);
    queue.before(stream).unwrap();
    let to = staging.bytes_mut().as_mut_ptr().expose_provenance();
    assert_eq!(get(to, memory.address(), LEN, theirs), 0);
    assert_eq!(sync(theirs), 0);
    drop(ticket.unwrap());
    let mut wanted = vec![5; LEN];
    wanted[100..100 + len].fill(7);
    let right = staging.bytes() == wanted;
    assert_eq!(destroy(theirs), 0);
    assert!(right, "what the framework reads");
}

fn whole_suite(stub: &Stub, device: &dyn Device) {
    contract::keeps_the_contract(device);
    streams_are_ordered(stub, device);
}

#[test]
fn orders_among_streams_are_kept() {
    let stub = Stub::begin("");
    for kind in [Kind::Cuda, Kind::Rocm] {
        stub.again(SLOW);
        // CUDA's streams need a context; HIP's names make one current, and the handles are the same.
        let device = Driver::open_at(kind, stub.path()).unwrap().device(0);
        streams_are_ordered(&stub, &device.unwrap());
        assert_eq!((stub.violations(), stub.live().total()), (0, 0));
    }
}

#[test]
fn the_suite_catches_every_planted_bug() {
    let stub = Stub::begin(SLOW);
    whole_suite(&stub, &Buggy::new(&stub, Bug::None));
    assert_eq!((stub.violations(), stub.live().total()), (0, 0));
    for bug in Bug::ALL {
        stub.again(SLOW);
        let device = Buggy::new(&stub, bug);
        let passed = catch_unwind(AssertUnwindSafe(|| whole_suite(&stub, &device))).is_ok();
        drop(device);
        let (broken, live) = (stub.violations(), stub.live().total());
        println!("{bug:?}: suite passed: {passed}, rules broken: {broken}, left: {live}");
        assert!(!passed || broken > 0 || live > 0, "{bug:?} goes unseen");
        match bug {
            Bug::Hasty | Bug::NoAfter | Bug::NoBefore | Bug::Twice => {
                assert!(broken > 0, "{bug:?}")
            }
            Bug::Leak => assert!(passed && live > 0),
            _ => assert!(!passed, "{bug:?}"),
        }
    }
    stub.again("");
}

/// A small uploader on the driver's own functions.
struct Raw<'a> {
    stub: &'a Stub,
    context: usize,
}

type Code = i32;

impl<'a> Raw<'a> {
    fn new(stub: &'a Stub) -> Self {
        assert_eq!(stub.function::<extern "C" fn(u32) -> Code>("cuInit")(0), 0);
        let retain =
            stub.function::<extern "C" fn(*mut usize, i32) -> Code>("cuDevicePrimaryCtxRetain");
        let mut context = 0;
        assert_eq!(retain(&mut context, 0), 0);
        let raw = Raw { stub, context };
        raw.one("cuCtxSetCurrent", context);
        raw
    }

    /// A call with one argument, which has to succeed.
    fn one(&self, name: &str, argument: usize) {
        assert_eq!(self.try_one(name, argument), 0, "{name}");
    }

    fn try_one(&self, name: &str, argument: usize) -> Code {
        self.stub.function::<extern "C" fn(usize) -> Code>(name)(argument)
    }

    /// A call that makes something.
    fn make(&self, name: &str, argument: usize, more: usize) -> usize {
        let mut made = 0;
        let make = self
            .stub
            .function::<extern "C" fn(*mut usize, usize, usize) -> Code>(name);
        assert_eq!(make(&mut made, argument, more), 0, "{name}");
        made
    }

    fn copy(&self, name: &str, to: usize, from: usize, len: usize, stream: usize) {
        let copy = self
            .stub
            .function::<extern "C" fn(usize, usize, usize, usize) -> Code>(name);
        assert_eq!(copy(to, from, len, stream), 0, "{name}");
    }
}

impl Drop for Raw<'_> {
    fn drop(&mut self) {
        assert!(self.context != 0);
        self.try_one("cuCtxSetCurrent", 0);
        self.try_one("cuDevicePrimaryCtxRelease_v2", 0);
    }
}

#[test]
fn a_missing_event_wait_is_seen_even_if_the_bytes_are_right() {
    let stub = Stub::begin("");
    for waits in [true, false] {
        // No delay: the copies most probably run in the right order.
        stub.again("MEM_MIB=64");
        let raw = Raw::new(&stub);
        let memory = raw.make("cuMemAlloc_v2", LEN, 0);
        let pinned = raw.make("cuMemHostAlloc", 2 * LEN, 0);
        let (first, second) = (
            raw.make("cuStreamCreate", 1, 0),
            raw.make("cuStreamCreate", 1, 0),
        );
        let event = raw.make("cuEventCreate", 2, 0);
        raw.copy("cuMemcpyHtoDAsync_v2", memory, pinned, LEN, first);
        let record = stub.function::<extern "C" fn(usize, usize) -> Code>("cuEventRecord");
        assert_eq!(record(event, first), 0);
        if waits {
            let wait =
                stub.function::<extern "C" fn(usize, usize, u32) -> Code>("cuStreamWaitEvent");
            assert_eq!(wait(second, event, 0), 0);
        }
        raw.copy("cuMemcpyDtoHAsync_v2", pinned + LEN, memory, LEN, second);
        raw.one("cuStreamSynchronize", second);
        raw.one("cuStreamSynchronize", first);
        raw.one("cuEventDestroy_v2", event);
        raw.one("cuStreamDestroy_v2", first);
        raw.one("cuStreamDestroy_v2", second);
        raw.one("cuMemFree_v2", memory);
        raw.one("cuMemFreeHost", pinned);
        assert_eq!(stub.pardon(), u64::from(!waits));
    }
}

#[test]
fn a_staging_buffer_that_is_reused_too_early_is_seen_and_spoils_the_bytes() {
    let stub = Stub::begin("");
    for waits in [true, false] {
        stub.again("MEM_MIB=64");
        let raw = Raw::new(&stub);
        let memory = raw.make("cuMemAlloc_v2", LEN, 0);
        let pinned = raw.make("cuMemHostAlloc", LEN, 0);
        let stream = raw.make("cuStreamCreate", 1, 0);
        // SAFETY: memory of the host that the driver gave, of this length.
        let slot = unsafe {
            std::slice::from_raw_parts_mut(std::ptr::with_exposed_provenance_mut::<u8>(pinned), LEN)
        };
        slot.fill(1);
        stub.hold(!waits);
        raw.copy("cuMemcpyHtoDAsync_v2", memory, pinned, LEN, stream);
        if waits {
            raw.one("cuStreamSynchronize", stream);
        }
        slot.fill(2);
        stub.hold(false);
        raw.one("cuStreamSynchronize", stream);
        let wanted = if waits { 1 } else { 2 };
        assert_eq!(stub.peek(memory as u64, LEN), vec![wanted; LEN]);
        raw.one("cuStreamDestroy_v2", stream);
        raw.one("cuMemFree_v2", memory);
        raw.one("cuMemFreeHost", pinned);
        assert_eq!(stub.pardon(), u64::from(!waits));
    }
}

#[test]
fn double_frees_late_uses_and_frees_under_a_copy_are_seen() {
    let stub = Stub::begin("MEM_MIB=64");
    let raw = Raw::new(&stub);
    let stream = raw.make("cuStreamCreate", 1, 0);
    let (memory, other) = (
        raw.make("cuMemAlloc_v2", LEN, 0),
        raw.make("cuMemAlloc_v2", LEN, 0),
    );
    let pinned = raw.make("cuMemHostAlloc", LEN, 0);
    raw.one("cuMemFree_v2", memory);
    assert_eq!(raw.try_one("cuMemFree_v2", memory), 1);
    assert_eq!(stub.pardon(), 1, "freed twice");
    assert_eq!(raw.try_one("cuMemFree_v2", other + 512), 1);
    assert_eq!(stub.pardon(), 1, "freed by an address within");
    let copy =
        stub.function::<extern "C" fn(usize, usize, usize, usize) -> Code>("cuMemcpyHtoDAsync_v2");
    assert_eq!(copy(memory, pinned, LEN, stream), 1);
    assert_eq!(stub.pardon(), 1, "used after it was freed");
    assert_eq!(copy(other + 1, pinned, LEN, stream), 1);
    assert_eq!(copy(other, pinned + 1, LEN, stream), 1);
    assert_eq!(copy(pinned, other, 1, stream), 1);
    assert_eq!(
        stub.pardon(),
        0,
        "ranges that leave their block are refused"
    );
    raw.copy("cuMemcpyHtoDAsync_v2", other, pinned, LEN, stream);
    raw.one("cuMemFree_v2", other);
    raw.one("cuMemFreeHost", pinned);
    assert_eq!(stub.pardon(), 2, "freed while a copy ran");
    assert_eq!(raw.try_one("cuMemFreeHost", pinned), 1);
    assert_eq!(stub.pardon(), 1, "freed twice");
    raw.one("cuStreamDestroy_v2", stream);
    assert_eq!(raw.try_one("cuStreamSynchronize", stream), 400);
}

#[test]
fn a_leak_is_seen_by_the_test_and_by_the_end_of_the_process() {
    const INSIDE: &str = "TONNAGE_TEST_LEAK";
    if std::env::var_os(INSIDE).is_some() {
        // `Stub` is not used to its end: only the end of the process looks.
        let stub = std::mem::ManuallyDrop::new(Stub::begin("MEM_MIB=64"));
        let driver = Driver::open_at(Kind::Cuda, stub.path()).unwrap();
        let memory = driver.device(0).unwrap().allocate(1000).unwrap();
        if std::env::var(INSIDE).unwrap() == "leaks" {
            std::mem::forget(memory);
        }
        return;
    }
    for (how, code) in [("leaks", tonnage_stubdriver::EXIT), ("frees", 0)] {
        let mut again = Command::new(std::env::current_exe().unwrap());
        again.args([
            "a_leak_is_seen_by_the_test_and_by_the_end_of_the_process",
            "--exact",
        ]);
        let output = again.env(INSIDE, how).output().unwrap();
        assert_eq!(output.status.code(), Some(code), "{how}: {output:?}");
    }
    let leaks = catch_unwind(|| {
        // This process ends with what is leaked here.
        let stub = Stub::begin("MEM_MIB=64\nEXIT_CHECK=off");
        let driver = Driver::open_at(Kind::Cuda, stub.path()).unwrap();
        std::mem::forget(driver.device(0).unwrap().allocate(1000).unwrap());
    });
    assert!(leaks.is_err());
}
