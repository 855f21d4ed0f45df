//! Faults of the driver, at every call in turn: always an error that says what happened, never a hang, a
//! double free, or memory that is given back while a copy runs on it; and nothing is left where the device
//! still works.
#![cfg(target_os = "linux")]

mod contract;

use std::sync::mpsc;
use std::time::Duration;

use contract::{lend, pattern};
use tonnage_device::driver::Driver;
use tonnage_device::{Cause, Device, Error, Kind, Pool, Stream, Transfer};
use tonnage_stubdriver::find::{Live, Stub};

const LEN: usize = 64 << 10;

/// A bit of everything: two queues, several allocations and slots, both ways, order, and a look at the bytes.
fn everything(path: &std::path::Path, kind: Kind) -> Result<(), Error> {
    let device = Driver::open_at(kind, path)?.device(0)?;
    let pool = Pool::new(4 * LEN as u64);
    let (mut up, mut down) = (device.queue()?, device.queue()?);
    for round in 0..3 {
        let memory = device.allocate(LEN as u64)?;
        let slots = pool.lend(&device, LEN, 2, 2, &|| false)?;
        let bytes = pattern(LEN, round);
        up.after(Stream::DEFAULT)?;
        let mut tickets = Vec::new();
        for (half, mut slot) in slots.into_iter().enumerate() {
            slot.bytes_mut().copy_from_slice(&bytes);
            let at = half * LEN / 2;
            let to = Transfer::plain(memory.clone(), at as u64, at, LEN / 2);
            tickets.push(up.upload(slot, vec![to])?);
        }
        for ticket in tickets {
            drop(ticket.wait()?);
        }
        let slot = pool.lend(&device, LEN, 1, 1, &|| false)?.remove(0);
        let from = Transfer::plain(memory.clone(), 0, 0, LEN);
        let slot = down.download(slot, vec![from])?.wait()?;
        assert!(slot.bytes() == bytes);
        up.drain()?;
    }
    Ok(())
}

/// Runs it with these settings; fails if it hangs.
fn run(stub: &Stub, kind: Kind, settings: &str) -> Result<(), Error> {
    stub.again(&format!("MEM_MIB=64\nDELAY_US=100\n{settings}"));
    let (path, (tell, told)) = (stub.path().to_owned(), mpsc::channel());
    std::thread::spawn(move || tell.send(everything(&path, kind)));
    let result = told.recv_timeout(Duration::from_secs(120));
    result.unwrap_or_else(|_| panic!("{kind:?} {settings}: a hang or a panic"))
}

/// The n-th time, for every n until it no longer happens.
fn each(stub: &Stub, what: &str, mut check: impl FnMut(Kind, Error, Live)) {
    for kind in [Kind::Cuda, Kind::Rocm] {
        let mut failed = 0;
        for n in 1.. {
            let settings = format!("{what}={n}");
            let Err(error) = run(stub, kind, &settings) else {
                break;
            };
            assert_eq!(stub.violations(), 0, "{kind:?} {settings}: {error}");
            check(kind, error, stub.live());
            failed = n;
        }
        println!("{kind:?}: {what} at each of {failed} calls");
        assert!(failed > 1, "{what} happened {failed} times");
    }
    stub.again("");
}

#[test]
fn allocations_fail() {
    let stub = Stub::begin("");
    each(&stub, "FAIL_ALLOC", |_, error, live| {
        assert!(error.is_out_of_memory(), "{error}");
        assert_eq!(live, Live::default(), "{error}");
    });
}

#[test]
fn staging_buffers_fail() {
    let stub = Stub::begin("");
    each(&stub, "FAIL_PINNED", |_, error, live| {
        assert!(error.is_out_of_memory(), "{error}");
        assert_eq!(live, Live::default(), "{error}");
    });
}

#[test]
fn copies_are_refused() {
    let stub = Stub::begin("");
    each(&stub, "FAIL_ISSUE", |_, error, live| {
        assert!(matches!(error.cause(), Cause::Driver { code: 1, .. }));
        assert_eq!(live, Live::default(), "{error}");
    });
}

#[test]
fn copies_fail_when_they_run() {
    let stub = Stub::begin("");
    each(&stub, "FAIL_COPY", |_, error, live| {
        assert!(
            matches!(error.cause(), Cause::Driver { code: 719, .. }),
            "{error}"
        );
        assert!(error.to_string().contains("LAUNCH_FAIL") || error.to_string().contains("Launch"));
        // What the copies in flight use is given up, for good: nobody knows what still runs.
        assert!(live.pinned <= 2 && live.allocations <= 1, "{live:?}");
    });
}

#[test]
fn the_context_is_lost() {
    let stub = Stub::begin("");
    each(&stub, "LOSE_CONTEXT", |_, error, _| {
        assert!(
            matches!(error.cause(), Cause::Driver { code: 709, .. }),
            "{error}"
        );
    });
}

#[test]
fn without_a_fault_it_all_works() {
    let stub = Stub::begin("");
    for kind in [Kind::Cuda, Kind::Rocm] {
        run(&stub, kind, "").unwrap();
        assert_eq!((stub.violations(), stub.live().total()), (0, 0));
        // `lend` of the contract takes part in no fault; it works on this driver, too.
        let device = Driver::open_at(kind, stub.path()).unwrap().device(0);
        drop(lend(&Pool::new(1 << 20), &device.unwrap(), 2));
    }
}
