//! The staging pool in every order of its steps: no slot is lent twice, nobody waits for ever, who gives up is in
//! nobody's way, and what is idle is freed. The pool's own source runs here on loom's lock and threads; its waits
//! never time out, so a wake-up that is lost is a deadlock, which loom reports.

#[path = "../src/pool.rs"]
#[allow(dead_code, reason = "the model uses a part of it")]
mod pool;

use std::any::Any;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool as Plain, AtomicUsize as Count, Ordering::SeqCst};

use loom::sync::atomic::{AtomicBool, AtomicUsize};
use loom::thread;
use tonnage_device::{Cause, Device, DeviceId, Error, Info, Memory, Queue, Staging};

use pool::Pool;

/// The lock, the threads and the clock of the model: time is always over, so that the pool's own thread runs at once.
mod sync {
    use std::io;
    use std::sync::atomic::Ordering::SeqCst;
    use std::time::Duration;

    pub(crate) use loom::sync::{Condvar, Mutex, MutexGuard};

    #[derive(Clone, Copy, Debug)]
    pub(crate) struct Instant;

    impl Instant {
        pub fn now() -> Self {
            Instant
        }

        pub fn elapsed(&self) -> Duration {
            Duration::MAX
        }
    }

    pub(crate) fn sleep(_: Duration) {
        loom::thread::yield_now();
    }

    /// A thread that frees what is idle, in the model that has one.
    pub(crate) fn spawn(_: &str, work: impl FnOnce() + Send + 'static) -> io::Result<()> {
        match super::SWEEPS.load(SeqCst) {
            true => {
                loom::thread::spawn(work);
                Ok(())
            }
            false => Err(io::Error::other("no thread")),
        }
    }
}

static SWEEPS: Plain = Plain::new(false);
/// Models take turns.
static TURN: std::sync::Mutex<()> = std::sync::Mutex::new(());

const LEN: usize = 64;

/// A slot that knows whether somebody has it.
#[derive(Debug)]
struct Buffer {
    bytes: Vec<u8>,
    taken: AtomicBool,
    alive: Arc<Count>,
}

impl Staging for Buffer {
    fn bytes(&self) -> &[u8] {
        &self.bytes
    }

    fn bytes_mut(&mut self) -> &mut [u8] {
        &mut self.bytes
    }

    fn as_any(&self) -> &dyn Any {
        self
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        self.alive.fetch_sub(1, SeqCst);
    }
}

#[derive(Debug)]
struct Maker {
    info: Info,
    /// Buffers that exist.
    alive: Arc<Count>,
}

impl Maker {
    fn new() -> Arc<Self> {
        let info = Info {
            id: DeviceId::HOST,
            name: "model".to_owned(),
            total_memory: 0,
            unified: false,
            align: 1,
            max_region: 1,
            pitched: false,
        };
        let alive = Arc::default();
        Arc::new(Maker { info, alive })
    }
}

impl Device for Maker {
    fn info(&self) -> &Info {
        &self.info
    }

    fn free_memory(&self) -> Result<u64, Error> {
        Ok(0)
    }

    fn allocate(&self, _: u64) -> Result<Memory, Error> {
        unreachable!("no memory in this model")
    }

    fn staging(&self, len: usize) -> Result<Box<dyn Staging>, Error> {
        self.alive.fetch_add(1, SeqCst);
        Ok(Box::new(Buffer {
            bytes: vec![0; len],
            taken: AtomicBool::new(false),
            alive: Arc::clone(&self.alive),
        }))
    }

    fn queue(&self) -> Result<Box<dyn Queue>, Error> {
        unreachable!("no queue in this model")
    }
}

/// Lends, looks that nobody else has the slots, and gives them back; false if it was cancelled.
fn use_slots(pool: &Arc<Pool>, maker: &Maker, count: usize, cancelled: bool) -> bool {
    let slots = match pool.lend(maker, LEN, count, count, &|| cancelled) {
        Ok(slots) => slots,
        Err(error) => {
            assert_eq!(*error.cause(), Cause::Cancelled);
            return false;
        }
    };
    assert_eq!(slots.len(), count);
    let taken = |slot: &pool::Slot, is: bool| {
        let buffer = slot
            .staging()
            .and_then(|staging| staging.as_any().downcast_ref::<Buffer>());
        let before = buffer.expect("a buffer").taken.swap(is, SeqCst);
        assert_ne!(before, is, "a slot is lent twice");
    };
    slots.iter().for_each(|slot| taken(slot, true));
    thread::yield_now();
    slots.iter().for_each(|slot| taken(slot, false));
    true
}

/// Every order with two forced switches at most, which finds what is found in practice, in seconds.
fn model(sweeps: bool, body: impl Fn() + Sync + Send + 'static) {
    let turn = TURN.lock();
    SWEEPS.store(sweeps, SeqCst);
    let mut model = loom::model::Builder::new();
    model.preemption_bound = Some(2);
    model.check(body);
    drop(turn);
}

/// Nothing is left of a pool that nobody uses.
fn is_free(pool: &Arc<Pool>, maker: &Maker) {
    pool.trim();
    assert_eq!(pool.bytes().0, 0);
    assert_eq!(maker.alive.load(SeqCst), 0);
}

#[test]
fn who_waits_for_a_slot_gets_it_and_nobody_else_has_it() {
    model(false, || {
        let (pool, maker) = (Pool::new(2 * LEN as u64), Maker::new());
        let others = [1, 2].map(|count| {
            let (pool, maker) = (Arc::clone(&pool), Arc::clone(&maker));
            thread::spawn(move || assert!(use_slots(&pool, &maker, count, false)))
        });
        assert!(use_slots(&pool, &maker, 2, false));
        others.into_iter().for_each(|other| other.join().unwrap());
        assert!(
            pool.bytes().1 <= 2 * LEN as u64,
            "never more than the capacity"
        );
        is_free(&pool, &maker);
    });
}

#[test]
fn who_gives_up_is_in_nobodys_way() {
    model(false, || {
        let (pool, maker) = (Pool::new(LEN as u64), Maker::new());
        let done = Arc::new(AtomicUsize::new(0));
        let others = [true, false].map(|cancelled| {
            let (pool, maker, done) = (Arc::clone(&pool), Arc::clone(&maker), Arc::clone(&done));
            thread::spawn(move || {
                let got = use_slots(&pool, &maker, 1, cancelled);
                assert!(got || cancelled);
                done.fetch_add(1, SeqCst);
            })
        });
        assert!(use_slots(&pool, &maker, 1, false));
        others.into_iter().for_each(|other| other.join().unwrap());
        assert_eq!(done.load(SeqCst), 2);
        is_free(&pool, &maker);
    });
}

#[test]
fn what_is_idle_is_freed_while_others_may_come() {
    model(true, || {
        let (pool, maker) = (Pool::new(LEN as u64), Maker::new());
        let (other, made) = (Arc::clone(&pool), Arc::clone(&maker));
        let other = thread::spawn(move || assert!(use_slots(&other, &made, 1, false)));
        assert!(use_slots(&pool, &maker, 1, false));
        other.join().unwrap();
        // The pool's own thread frees it, and nobody asked for that.
        while pool.bytes().0 > 0 {
            thread::yield_now();
        }
        assert_eq!(maker.alive.load(SeqCst), 0);
    });
}
