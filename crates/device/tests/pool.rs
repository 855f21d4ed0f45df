//! The pool never has more bytes than its capacity, lets nobody wait for ever, and gives memory back when idle.

use std::any::Any;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, mpsc};
use std::thread;
use std::time::{Duration, Instant};

use tonnage_device::{
    Cause, Device, DeviceId, Error, HostDevice, Info, Kind, Memory, Pool, Queue, Slot, Staging,
};

/// Staging memory of every device of a test.
#[derive(Debug, Default)]
struct Host {
    live: AtomicUsize,
    most: AtomicUsize,
    made: AtomicUsize,
}

/// A device whose staging memory is counted, and limited.
#[derive(Debug)]
struct Counting {
    info: Info,
    host: Arc<Host>,
    limit: usize,
    instance: usize,
}

#[derive(Debug)]
struct Counted {
    bytes: Vec<u8>,
    host: Arc<Host>,
    instance: usize,
}

impl Counting {
    fn new(host: &Arc<Host>, index: u32) -> Self {
        let mut info = HostDevice::default().info().clone();
        info.id = DeviceId::new(Kind::Cuda, index);
        Counting {
            info,
            host: Arc::clone(host),
            limit: usize::MAX,
            instance: 0,
        }
    }
}

impl Device for Counting {
    fn info(&self) -> &Info {
        &self.info
    }

    fn free_memory(&self) -> Result<u64, Error> {
        Ok(0)
    }

    fn allocate(&self, len: u64) -> Result<Memory, Error> {
        HostDevice::default().allocate(len)
    }

    fn staging(&self, len: usize) -> Result<Box<dyn Staging>, Error> {
        assert_ne!(len, 13, "a driver that panics");
        let live = self.host.live.fetch_add(len, Ordering::SeqCst) + len;
        if live > self.limit {
            self.host.live.fetch_sub(len, Ordering::SeqCst);
            let (needed, free) = (len as u64, None);
            let cause = Cause::OutOfMemory { needed, free };
            return Err(Error::new(self.info.id, "make a staging buffer", cause));
        }
        self.host.most.fetch_max(live, Ordering::SeqCst);
        self.host.made.fetch_add(1, Ordering::SeqCst);
        thread::yield_now();
        Ok(Box::new(Counted {
            bytes: vec![0; len],
            host: Arc::clone(&self.host),
            instance: self.instance,
        }))
    }

    fn copies_from(&self, staging: &dyn Staging) -> bool {
        let staging = staging.as_any().downcast_ref::<Counted>();
        staging.is_some_and(|staging| staging.instance == self.instance)
    }

    fn queue(&self) -> Result<Box<dyn Queue>, Error> {
        HostDevice::default().queue()
    }
}

impl Staging for Counted {
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

impl Drop for Counted {
    fn drop(&mut self) {
        self.host.live.fetch_sub(self.bytes.len(), Ordering::SeqCst);
    }
}

fn lend(pool: &Arc<Pool>, device: &Counting, len: usize, count: usize, least: usize) -> Vec<Slot> {
    pool.lend(device, len, count, least, &|| false).unwrap()
}

#[test]
fn many_who_want_various_things_never_exceed_the_capacity_and_all_are_served() {
    const CAPACITY: usize = 10_000;
    let (host, pool) = (Arc::default(), Pool::new(CAPACITY as u64));
    let devices = [Counting::new(&host, 0), Counting::new(&host, 1)];
    let served = AtomicUsize::new(0);
    thread::scope(|scope| {
        for seed in 0..12_usize {
            let (devices, pool, host, served) = (&devices, &pool, &host, &served);
            scope.spawn(move || {
                let mut random = seed * 7919 + 1;
                let mut below = |end: usize| {
                    random = random
                        .wrapping_mul(6_364_136_223_846_793_005)
                        .wrapping_add(1);
                    (random >> 33) % end
                };
                for _ in 0..400 {
                    let (len, count) = (1000 * (1 + below(3)), 1 + below(3));
                    let least = below(count + 1);
                    let device = &devices[below(2)];
                    let mut slots = lend(pool, device, len, count, least);
                    assert!(slots.len() >= least && slots.len() <= count);
                    for slot in &mut slots {
                        assert_eq!(slot.bytes().len(), len);
                        assert!(
                            slot.bytes().iter().all(|&byte| byte == 0),
                            "nobody else has it"
                        );
                        slot.bytes_mut().fill(1);
                    }
                    thread::yield_now();
                    slots.iter_mut().for_each(|slot| slot.bytes_mut().fill(0));
                    assert!(host.live.load(Ordering::SeqCst) <= CAPACITY);
                    served.fetch_add(1, Ordering::SeqCst);
                }
            });
        }
    });
    assert_eq!(served.into_inner(), 12 * 400);
    let most = host.most.load(Ordering::SeqCst);
    assert!(
        most <= CAPACITY && most > CAPACITY / 2,
        "{most}: there was a squeeze"
    );
    assert!(pool.bytes().1 <= CAPACITY as u64);
    assert_eq!(pool.bytes().0, host.live.load(Ordering::SeqCst) as u64);
    pool.trim();
    assert_eq!((pool.bytes().0, host.live.load(Ordering::SeqCst)), (0, 0));
}

#[test]
fn two_who_need_most_of_it_do_not_wait_for_each_other() {
    let (host, pool) = (Arc::default(), Pool::new(4000));
    let device = Counting::new(&host, 0);
    thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| {
                for _ in 0..500 {
                    assert_eq!(lend(&pool, &device, 1000, 3, 3).len(), 3);
                }
            });
        }
    });
    assert!(
        host.made.load(Ordering::SeqCst) <= 4,
        "slots are used again"
    );
}

#[test]
fn who_came_first_is_served_first() {
    let (host, pool) = (Arc::default(), Pool::new(4000));
    let device = Counting::new(&host, 0);
    let held = lend(&pool, &device, 1000, 4, 4);
    let served = Mutex::new(Vec::new());
    thread::scope(|scope| {
        // A failure gives them back, so that nobody waits for ever.
        let mut held = held;
        for (name, count) in [("all", 4), ("one", 1)] {
            let (waits, waiting) = mpsc::channel();
            let (served, pool, device) = (&served, &pool, &device);
            scope.spawn(move || {
                // Who is asked whether to give up has a place in the line.
                let asked = || {
                    let _ = waits.send(());
                    false
                };
                let slots = pool.lend(device, 1000, count, count, &asked).unwrap();
                served.lock().unwrap().push(name);
                drop(slots);
            });
            waiting.recv().unwrap();
        }
        // One is free now; it is for who came first. Who would not wait gets none.
        drop(held.pop());
        thread::sleep(Duration::from_millis(50));
        assert!(served.lock().unwrap().is_empty());
        assert!(lend(&pool, &device, 1000, 1, 0).is_empty());
        held.clear();
    });
    assert_eq!(*served.lock().unwrap(), ["all", "one"]);
}

/// How long the pool keeps what nobody has.
const LINGER: Duration = Duration::from_secs(5);

#[test]
fn idle_slots_are_freed_a_moment_after_the_last_came_back() {
    let (host, pool) = (Arc::default(), Pool::new(4000));
    let device = Counting::new(&host, 0);
    let live = || host.live.load(Ordering::SeqCst);
    let mut slots = lend(&pool, &device, 1000, 2, 2);
    drop(slots.pop());
    thread::sleep(LINGER + Duration::from_millis(200));
    assert_eq!(live(), 2000, "one is still lent: more may be wanted");
    drop(slots);
    let idle = Instant::now();
    // The next who comes soon has the same ones.
    thread::sleep(Duration::from_millis(300));
    drop(lend(&pool, &device, 1000, 2, 2));
    let found = (live(), host.made.load(Ordering::SeqCst));
    // On a machine so busy that it was not soon, there may be new ones.
    if idle.elapsed() < LINGER {
        assert_eq!(found, (2000, 2));
    }
    while live() > 0 {
        assert!(idle.elapsed() < 20 * LINGER, "never freed");
        thread::sleep(Duration::from_millis(10));
    }
    assert!(
        idle.elapsed() >= LINGER + Duration::from_millis(300),
        "freed too early"
    );
    while pool.bytes().0 > 0 {
        assert!(idle.elapsed() < 20 * LINGER, "never counted out");
    }
    // And so again.
    drop(lend(&pool, &device, 1000, 1, 1));
    let idle = Instant::now();
    while live() > 0 {
        assert!(idle.elapsed() < 20 * LINGER, "never freed");
        thread::sleep(Duration::from_millis(10));
    }
}

#[test]
fn a_host_without_room_gives_what_it_has_and_says_so_below_the_least() {
    let (host, pool) = (Arc::default(), Pool::new(100_000));
    let mut device = Counting::new(&host, 0);
    device.limit = 3500;
    let other = Counting {
        limit: 3500,
        ..Counting::new(&host, 1)
    };
    assert_eq!(lend(&pool, &device, 1000, 4, 2).len(), 3);
    let error = pool.lend(&device, 1000, 4, 4, &|| false).unwrap_err();
    assert!(error.is_out_of_memory(), "{error}");
    assert_eq!(pool.bytes().0, host.live.load(Ordering::SeqCst) as u64);
    // What is idle of one device makes room for another's.
    drop(lend(&pool, &device, 1000, 3, 3));
    assert_eq!(lend(&pool, &other, 1000, 3, 3).len(), 3);
    let error = pool.lend(&device, usize::MAX, 2, 2, &|| false).unwrap_err();
    assert!(error.is_out_of_memory(), "{error}");
}

#[test]
fn a_slot_is_for_the_instance_that_made_it() {
    let (host, pool) = (Arc::default(), Pool::new(1000));
    let first = Counting::new(&host, 0);
    let again = Counting {
        instance: 1,
        ..Counting::new(&host, 0)
    };
    drop(lend(&pool, &first, 1000, 1, 1));
    drop(lend(&pool, &first, 1000, 1, 1));
    assert_eq!(host.made.load(Ordering::SeqCst), 1);
    drop(lend(&pool, &again, 1000, 1, 1));
    assert_eq!(host.made.load(Ordering::SeqCst), 2);
    assert_eq!(
        host.most.load(Ordering::SeqCst),
        1000,
        "the old one went first"
    );
}

#[test]
fn a_driver_that_panics_takes_no_room_with_it() {
    let (host, pool) = (Arc::default(), Pool::new(39));
    let device = Counting::new(&host, 0);
    let panicked = thread::scope(|scope| {
        let asking = scope.spawn(|| lend(&pool, &device, 13, 3, 3));
        asking.join().is_err()
    });
    assert!(panicked);
    assert_eq!(pool.bytes().0, 0);
    assert_eq!(lend(&pool, &device, 39, 1, 1).len(), 1);
}
