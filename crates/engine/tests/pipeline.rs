//! Claim: whatever a source does in the middle of a run (fails, ends early, is slow, panics with a cast), a
//! pipeline ends with what it was about, in time, with every slot back and no memory held.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, mpsc};
use std::thread;
use std::time::{Duration, Instant};

use tonnage_device::{Device, HostDevice, Memory, Pool};
use tonnage_engine::{
    Cancel, Cast, Check, Downloads, Error, Failed, Piece, Pipeline, PipelineOptions, Put, Strategy,
    put,
};
use tonnage_storage::{FileSource, MemorySink, MemorySource, Source};

const SLOT: usize = 64 << 10;
const STAGING: u64 = 4 * SLOT as u64;

fn pattern(len: usize) -> Vec<u8> {
    (0..len)
        .map(|i| (i.wrapping_mul(2_654_435_761) >> 13) as u8)
        .collect()
}

/// A source whose n-th read fails, and whose reads take a while.
#[derive(Debug)]
struct Faulty {
    inner: MemorySource,
    reads: AtomicUsize,
    fails_at: usize,
    takes: Duration,
}

impl Faulty {
    fn new(bytes: Vec<u8>, fails_at: usize, takes: Duration) -> Arc<Self> {
        Arc::new(Faulty {
            inner: MemorySource::new(bytes, "weights.bin"),
            reads: AtomicUsize::new(0),
            fails_at,
            takes,
        })
    }
}

impl Source for Faulty {
    fn label(&self) -> &str {
        self.inner.label()
    }

    fn len(&self) -> u64 {
        self.inner.len()
    }

    fn read_exact_at(&self, offset: u64, dst: &mut [u8]) -> Result<(), tonnage_storage::Error> {
        thread::sleep(self.takes);
        if self.reads.fetch_add(1, Ordering::Relaxed) + 1 == self.fails_at {
            let broken = std::io::Error::from_raw_os_error(5);
            return Err(tonnage_storage::Error::new("read", self.label(), broken));
        }
        self.inner.read_exact_at(offset, dst)
    }
}

fn options(pool: &Arc<Pool>) -> PipelineOptions {
    PipelineOptions {
        staging: STAGING,
        slot: Some(SLOT),
        threads: Some(2),
        pool: Arc::clone(pool),
        ..Default::default()
    }
}

/// Ten pieces of 100,003 bytes, tags 0 to 9, to one memory.
fn pieces(source: &Arc<dyn Source>, memory: &Memory) -> Vec<Piece> {
    (0..10)
        .map(|i| {
            Piece::plain(
                source.clone(),
                i * 100_003,
                100_003,
                memory.clone(),
                i * 100_003,
                i,
            )
        })
        .collect()
}

fn run(
    source: Arc<dyn Source>,
    direct: bool,
    options: PipelineOptions,
) -> (Memory, Result<u64, Failed>) {
    let device: Arc<dyn Device> = Arc::new(HostDevice::new(direct));
    let memory = device.allocate(1_000_030).unwrap();
    let pipeline = Pipeline::start(vec![device], options).unwrap();
    let result = pipeline
        .submit(pieces(&source, &memory))
        .and_then(|()| pipeline.finish())
        .map(|report| report.bytes);
    (memory, result)
}

#[test]
fn the_nth_read_fails_for_every_n() {
    for direct in [false, true] {
        let mut failures = 0;
        for n in 1.. {
            let pool = Pool::new(STAGING);
            let source = Faulty::new(pattern(1_000_030), n, Duration::ZERO);
            let (memory, result) = run(source.clone(), direct, options(&pool));
            assert_eq!(Arc::strong_count(&memory), 1, "nobody holds the memory");
            assert_eq!(Arc::strong_count(&source), 1, "nobody holds the source");
            let (_, peak) = pool.bytes();
            assert!(peak <= STAGING);
            match result {
                Ok(bytes) => {
                    assert_eq!(bytes, 1_000_030);
                    break;
                }
                Err(failed) => {
                    failures += 1;
                    let range = failed.range().unwrap();
                    let tag = failed.tag().unwrap();
                    assert!(range.start / 100_003 == tag || range.start < (tag + 1) * 100_003);
                    assert_eq!(failed.label(), Some("weights.bin"));
                    assert!(matches!(failed.error(), Error::Storage { .. }));
                    let text = failed.to_string();
                    assert!(
                        text.contains("weights.bin") && text.contains(&range.start.to_string()),
                        "{text}"
                    );
                }
            }
        }
        assert!(failures >= 10, "{failures}");
    }
}

/// A cast that panics, or refuses, at the n-th block.
#[derive(Debug)]
struct Broken(AtomicUsize, bool);

impl Cast for Broken {
    fn unit(&self) -> (usize, usize) {
        (1, 2)
    }

    fn cast(
        &self,
        src: &[u8],
        dst: &mut [u8],
    ) -> Result<(), Box<dyn std::error::Error + Send + Sync>> {
        assert_eq!(src.len() * 2, dst.len());
        let at = self.0.fetch_add(1, Ordering::Relaxed);
        assert!(at != 3 || self.1, "planted");
        if at == 3 { Err("no".into()) } else { Ok(()) }
    }
}

#[test]
fn a_cast_that_panics_or_refuses_ends_it() {
    for refuses in [false, true] {
        let device: Arc<dyn Device> = Arc::new(HostDevice::new(false));
        let memory = device.allocate(2_000_000).unwrap();
        let source: Arc<dyn Source> = Arc::new(MemorySource::new(pattern(1_000_000), "<bytes>"));
        let pool = Pool::new(STAGING);
        let pipeline = Pipeline::start(vec![device], options(&pool)).unwrap();
        let piece = Piece {
            cast: Some(Arc::new(Broken(AtomicUsize::new(0), refuses))),
            ..Piece::plain(source, 0, 1_000_000, memory.clone(), 0, 1)
        };
        pipeline.submit(vec![piece]).unwrap();
        let failed = pipeline.finish().unwrap_err();
        let text = failed.to_string();
        assert!(
            text.contains(if refuses { "cast" } else { "panicked" }),
            "{text}"
        );
        assert_eq!(Arc::strong_count(&memory), 1);
    }
}

#[test]
fn a_raised_flag_is_seen_in_time_and_everything_is_free() {
    // A busy machine adds to it what it likes: the soonest of a few shows what the pipeline takes.
    let soonest = (0..5).map(|_| cancelled_after()).min();
    assert!(soonest < Some(Duration::from_millis(100)), "{soonest:?}");
}

/// From a raised flag to all threads gone and everything free, with a source whose reads take 30 ms.
fn cancelled_after() -> Duration {
    let pool = Pool::new(STAGING);
    let cancel = Cancel::new();
    let source = Faulty::new(pattern(1_000_030), 0, Duration::from_millis(30));
    let device: Arc<dyn Device> = Arc::new(HostDevice::new(false));
    let memory = device.allocate(1_000_030).unwrap();
    let options = PipelineOptions {
        cancel: cancel.clone(),
        ..options(&pool)
    };
    let pipeline = Pipeline::start(vec![device], options).unwrap();
    let wide: Arc<dyn Source> = source.clone();
    for _ in 0..8 {
        pipeline.submit(pieces(&wide, &memory)).unwrap();
    }
    drop(wide);
    assert!(pipeline.landed().unwrap().is_some());
    let (tell, told) = mpsc::channel();
    thread::spawn({
        let cancel = cancel.clone();
        move || {
            thread::sleep(Duration::from_millis(50));
            tell.send(Instant::now()).unwrap();
            cancel.cancel();
        }
    });
    let error = loop {
        match pipeline.landed() {
            Ok(landed) => assert!(landed.is_some(), "it can't be over by now"),
            Err(failed) => break failed.into_error(),
        }
    };
    drop(pipeline);
    let took = told.recv().unwrap().elapsed();
    assert!(matches!(error, Error::Cancelled));
    assert_eq!(
        (Arc::strong_count(&memory), Arc::strong_count(&source)),
        (1, 1)
    );
    took
}

#[test]
fn dropping_it_in_the_middle_frees_everything() {
    let pool = Pool::new(STAGING);
    for rest in 0..5 {
        let source = Faulty::new(pattern(1_000_030), 0, Duration::from_millis(1));
        let wide: Arc<dyn Source> = source.clone();
        let device: Arc<dyn Device> = Arc::new(HostDevice::new(false));
        let memory = device.allocate(1_000_030).unwrap();
        let pipeline = Pipeline::start(vec![device], options(&pool)).unwrap();
        pipeline.submit(pieces(&wide, &memory)).unwrap();
        (0..rest).for_each(|_| drop(pipeline.landed().unwrap()));
        drop((pipeline, wide));
        assert_eq!(
            (Arc::strong_count(&memory), Arc::strong_count(&source)),
            (1, 1)
        );
    }
    pool.trim();
    assert_eq!(pool.bytes().0, 0, "every slot came back");
}

#[test]
fn a_file_that_shrinks_or_is_replaced_is_told() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("weights.bin");
    for strategy in [Strategy::Buffered, Strategy::Direct] {
        std::fs::write(&path, pattern(1_000_030)).unwrap();
        let source: Arc<dyn Source> = Arc::new(FileSource::open(&path).unwrap());
        let file = std::fs::OpenOptions::new().write(true).open(&path).unwrap();
        file.set_len(345_678).unwrap();
        let pool = Pool::new(STAGING);
        let asked = || PipelineOptions {
            strategy,
            ..options(&pool)
        };
        let failed = run(source, false, asked()).1.unwrap_err();
        let text = failed.to_string();
        assert!(
            text.contains("weights.bin") && text.contains("345678"),
            "{text}"
        );

        // A file of the same name is another file: what was opened is what is read.
        std::fs::write(&path, pattern(1_000_030)).unwrap();
        let source: Arc<dyn Source> = Arc::new(FileSource::open(&path).unwrap());
        std::fs::write(folder.path().join("new"), vec![0; 10]).unwrap();
        std::fs::rename(folder.path().join("new"), &path).unwrap();
        let (memory, result) = run(source, true, asked());
        assert_eq!(result.unwrap(), 1_000_030);
        let mut same = false;
        assert!(memory.with_host(0..1_000_030, &mut |bytes| same =
            bytes == pattern(1_000_030)));
        assert!(same);
    }
}

/// Counts what it is shown.
#[derive(Debug)]
struct Seen(std::sync::Mutex<Vec<(u64, u64)>>, Vec<u8>, bool);

impl Check for Seen {
    fn check(
        &self,
        source: &dyn Source,
        offset: u64,
        parts: &mut dyn Iterator<Item = &[u8]>,
    ) -> Result<(), Error> {
        let bytes: Vec<u8> = parts.flatten().copied().collect();
        let at = offset as usize;
        assert!(bytes == self.1[at..at + bytes.len()]);
        self.0.lock().unwrap().push((offset, bytes.len() as u64));
        if self.2 && offset > 500_000 {
            let error =
                tonnage_storage::Error::new("read", source.label(), std::io::Error::other("bad"));
            return Err(Error::Storage { error, offset });
        }
        Ok(())
    }
}

#[test]
fn whoever_checks_sees_each_byte_once() {
    for (direct, refuses) in [(false, false), (true, false), (false, true)] {
        let pool = Pool::new(STAGING);
        let seen = Arc::new(Seen(Default::default(), pattern(1_000_030), refuses));
        let options = PipelineOptions {
            check: Some(seen.clone()),
            ..options(&pool)
        };
        let source: Arc<dyn Source> = Arc::new(MemorySource::new(pattern(1_000_030), "<bytes>"));
        let result = run(source, direct, options).1;
        assert_eq!(result.is_err(), refuses);
        if !refuses {
            let mut ranges = seen.0.lock().unwrap().clone();
            ranges.sort_unstable();
            let mut end = 0;
            for (offset, len) in ranges {
                assert_eq!(offset, end);
                end += len;
            }
            assert_eq!(end, 1_000_030);
        }
    }
}

#[test]
fn small_pieces_go_by_few_reads_and_copies() {
    let device: Arc<dyn Device> = Arc::new(HostDevice::new(false));
    let source: Arc<dyn Source> = Arc::new(MemorySource::new(pattern(40 * 10_000), "<bytes>"));
    let memory = device.allocate(256 * 10_000).unwrap();
    let pool = Pool::new(16 << 20);
    let options = PipelineOptions {
        staging: 16 << 20,
        threads: Some(1),
        pool: pool.clone(),
        ..Default::default()
    };
    let pipeline = Pipeline::start(vec![device], options).unwrap();
    let piece = |i: u64| Piece {
        slack: 256 - 40,
        ..Piece::plain(source.clone(), i * 40, 40, memory.clone(), i * 256, i)
    };
    pipeline.submit((0..10_000).map(piece).collect()).unwrap();
    let mut landed = 0;
    while let Some(more) = pipeline.landed().unwrap() {
        landed += more.tags.len();
    }
    let report = pipeline.finish().unwrap();
    assert_eq!(landed, 10_000);
    assert!(report.reads <= 3 && report.transfers <= 3, "{report:?}");
}

#[test]
fn what_cannot_be_is_refused_at_once() {
    let device: Arc<dyn Device> = Arc::new(HostDevice::new(false));
    let source: Arc<dyn Source> = Arc::new(MemorySource::new(*b"0123456789", "<bytes>"));
    let memory = device.allocate(10).unwrap();
    let pipeline = Pipeline::start(vec![device.clone()], PipelineOptions::default()).unwrap();
    let plain = |offset, len, at| Piece::plain(source.clone(), offset, len, memory.clone(), at, 5);
    for piece in [
        plain(5, 6, 0),
        plain(0, 6, 5),
        plain(u64::MAX, 2, 0),
        plain(0, u64::MAX, 0),
        plain(11, 0, 0),
        Piece {
            rows: 3,
            pitch: 1,
            memory_pitch: 2,
            ..plain(0, 2, 0)
        },
        Piece {
            rows: 3,
            pitch: u64::MAX,
            memory_pitch: 2,
            ..plain(0, 2, 0)
        },
        Piece {
            rows: u64::MAX,
            pitch: 2,
            memory_pitch: 2,
            ..plain(0, 2, 0)
        },
        Piece {
            cast: Some(Arc::new(Huge)),
            ..plain(0, 2, 0)
        },
    ] {
        let failed = pipeline.submit(vec![piece]).unwrap_err();
        assert_eq!(failed.tag(), Some(5), "{failed}");
    }
    // Nothing of that has ended it.
    pipeline
        .submit(vec![plain(10, 0, 10), plain(2, 3, 4)])
        .unwrap();
    assert_eq!(pipeline.landed().unwrap().unwrap().tags, [5]);
    assert!(Pipeline::start(vec![], PipelineOptions::default()).is_err());
    assert!(
        Pipeline::start(
            vec![device.clone(), device.clone()],
            PipelineOptions::default()
        )
        .is_err()
    );
    let tiny = PipelineOptions {
        staging: 100_000,
        ..Default::default()
    };
    assert!(
        Pipeline::start(vec![device], tiny)
            .unwrap_err()
            .to_string()
            .contains("131072")
    );
}

#[derive(Debug)]
struct Huge;

impl Cast for Huge {
    fn unit(&self) -> (usize, usize) {
        (usize::MAX, 1)
    }

    fn cast(&self, _: &[u8], _: &mut [u8]) -> Result<(), Box<dyn std::error::Error + Send + Sync>> {
        Ok(())
    }
}

#[test]
fn bytes_come_back_through_slots() {
    for direct in [false, true] {
        let bytes = pattern(9_000_001);
        let device: Arc<dyn Device> = Arc::new(HostDevice::new(direct));
        let memory = device.allocate(9_000_100).unwrap();
        let source: Arc<dyn Source> = Arc::new(MemorySource::new(bytes.clone(), "<bytes>"));
        let pool = Pool::new(16 << 20);
        let up = PipelineOptions {
            pool: pool.clone(),
            ..Default::default()
        };
        let pipeline = Pipeline::start(vec![device.clone()], up).unwrap();
        pipeline
            .submit(vec![Piece::plain(
                source,
                0,
                9_000_001,
                memory.clone(),
                99,
                1,
            )])
            .unwrap();
        pipeline.finish().unwrap();
        let cancel = Cancel::new();
        let downloads = Downloads::new(device, pool, Vec::new(), cancel.clone());
        let from = downloads.from(&memory, 99);
        let sink = MemorySink::new("<out>");
        put(
            &sink,
            &[Put::fill(3, 9_000_001, &from)],
            None,
            &Default::default(),
        )
        .unwrap();
        assert!(sink.into_vec()[3..] == bytes);
        assert!(downloads.read(&memory, 9_000_099, &mut [0; 2]).is_err());
        cancel.cancel();
        let over = downloads.read(&memory, 0, &mut [0; 2]);
        assert!(direct || matches!(over, Err(Error::Cancelled)));
    }
}
