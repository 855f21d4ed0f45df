//! Loading to host memory: the way that is chosen, what it leaves in the page cache, how fast it stops, and
//! what it says when a file changes beneath it.
#![cfg(target_os = "linux")]

use std::fs::{self, File};
use std::io::ErrorKind;
use std::path::PathBuf;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use tonnage_engine::{Cancel, Error, HostBuffer, Options, Progress, Read, Report, Strategy, read};
use tonnage_storage::{FileSource, MemorySource, Source, StorageKind};

const MIB: usize = 1 << 20;

fn content(len: usize) -> Vec<u8> {
    (0..len)
        .map(|i| (i as u64).wrapping_mul(0x9E37_79B9_7F4A_7C15).to_le_bytes()[7])
        .collect()
}

struct OnDisk {
    _folder: tempfile::TempDir,
    path: PathBuf,
    content: Vec<u8>,
}

impl OnDisk {
    fn new(len: usize) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("weights");
        let content = content(len);
        fs::write(&path, &content).unwrap();
        File::open(&path).unwrap().sync_all().unwrap();
        OnDisk {
            _folder: folder,
            path,
            content,
        }
    }

    fn cold(&self) -> FileSource {
        let source = FileSource::open(&self.path).unwrap();
        // On a busy machine some pages are still on their way to or from the disk.
        for _ in 0..200 {
            source.forget(0, source.len());
            if cached(&source) == 0.0 {
                break;
            }
            File::open(&self.path).unwrap().sync_all().unwrap();
            std::thread::sleep(Duration::from_millis(10));
        }
        assert_eq!(cached(&source), 0.0, "the page cache lets the file go");
        assert_eq!(source.kind(), StorageKind::Local, "this test needs a disk");
        source
    }
}

fn cached(source: &dyn Source) -> f64 {
    let part = source.residency(0, source.len()).fraction();
    part.expect("Linux 6.5 or newer")
}

/// Small and large pieces, at odd places of the file and of memory; checks every byte.
fn load(source: &dyn Source, expected: &[u8], options: &Options<'_>) -> Report {
    let sizes = [MIB, 5, 3 * MIB + 511, 0, 100_000, 7, 4096, 9 * MIB, 1];
    let mut memory = HostBuffer::new(2 * expected.len() as u64).unwrap();
    let mut jobs = Vec::new();
    let (mut rest, mut offset, mut places) = (memory.as_mut_slice(), 3, Vec::new());
    let mut at = 0;
    for (i, size) in sizes.into_iter().cycle().enumerate() {
        let size = size.min(expected.len() - offset);
        if offset == expected.len() {
            break;
        }
        // Some lie in memory as they do in the file, most do not.
        let gap = if i % 2 == 0 {
            (offset + 8192 - at % 4096) % 4096
        } else {
            i % 70
        };
        let (_, after) = std::mem::take(&mut rest).split_at_mut(gap);
        let (dst, after) = after.split_at_mut(size);
        (rest, at) = (after, at + gap + size);
        places.push((at - size, offset, size));
        jobs.push(Read {
            source,
            offset: offset as u64,
            dst,
        });
        offset += size;
    }
    jobs.reverse();
    let report = read(jobs, options).unwrap();
    for (at, offset, size) in places {
        let found = &memory.as_slice()[at..at + size];
        assert!(
            found == &expected[offset..offset + size],
            "{size} at {offset}"
        );
    }
    report
}

#[test]
fn a_cold_file_is_read_past_the_page_cache_and_leaves_nothing_in_it() {
    let disk = OnDisk::new(40 * MIB + 123);
    for options in [
        Options::default(),
        Options {
            block: Some(MIB),
            threads: Some(3),
            ..Options::default()
        },
        Options {
            strategy: Strategy::Direct,
            ..Options::default()
        },
    ] {
        let source = disk.cold();
        let report = load(&source, &disk.content, &options);
        assert_eq!(report.strategy, "direct", "{report:?}");
        assert!(!report.reason.is_empty());
        assert!(cached(&source) < 0.01, "{}", cached(&source));
        let threads = report.threads as u64;
        let block = options.block.unwrap_or(Options::BLOCK) as u64;
        assert!(report.peak_staging > 0);
        assert!(
            report.peak_staging <= threads * (block + 8192),
            "{report:?}"
        );
    }
}

#[test]
fn a_cached_file_is_read_through_the_cache_and_stays_there() {
    let disk = OnDisk::new(24 * MIB);
    let source = FileSource::open(&disk.path).unwrap();
    assert_eq!(cached(&source), 1.0, "what was just written");
    let report = load(&source, &disk.content, &Options::default());
    assert_eq!(
        (report.strategy, report.reason),
        ("buffered", "the page cache has it")
    );
    assert_eq!((cached(&source), report.peak_staging), (1.0, 0));
}

#[test]
fn what_is_cached_comes_from_the_cache_and_the_rest_past_it() {
    let disk = OnDisk::new(48 * MIB);
    let source = disk.cold();
    let mut half = vec![0; 24 * MIB];
    source.read_exact_at(0, &mut half).unwrap();
    // What the system read ahead is not what this is about.
    let (middle, rest) = (24 * MIB as u64, 24 * MIB as u64);
    for _ in 0..200 {
        source.forget(middle, rest);
        if source.residency(middle, rest).fraction() < Some(0.1) {
            break;
        }
        std::thread::sleep(Duration::from_millis(10));
    }
    let before = cached(&source);
    assert!((0.4..0.6).contains(&before), "{before}");
    let options = Options {
        block: Some(MIB),
        ..Options::default()
    };
    let report = load(&source, &disk.content, &options);
    assert_eq!(report.strategy, "direct and buffered");
    assert!(cached(&source) <= before + 0.05, "{}", cached(&source));
}

#[test]
fn every_strategy_reads_every_byte() {
    let disk = OnDisk::new(20 * MIB + 1);
    for strategy in Strategy::ALL {
        let source = disk.cold();
        let options = Options {
            strategy,
            ..Options::default()
        };
        let report = load(&source, &disk.content, &options);
        let expected = match strategy {
            Strategy::Auto | Strategy::Lazy | Strategy::Direct => "direct",
            Strategy::Buffered => "buffered",
            Strategy::Mmap => "mmap",
        };
        assert_eq!(report.strategy, expected);
        let memory = MemorySource::new(disk.content.clone(), "<bytes>");
        let report = load(&memory, &disk.content, &options);
        let known = ["memory", "buffered", "mmap"];
        assert!(known.contains(&report.strategy), "{report:?}");
    }
}

/// A source that is slow, or claims to lie elsewhere; counts the reads that are under way at once.
#[derive(Debug)]
struct Elsewhere {
    inner: MemorySource,
    kind: StorageKind,
    /// Time that each MiB takes.
    wait: Duration,
    under_way: AtomicUsize,
    most: AtomicUsize,
    /// Reads wait until so many have come, or for 20 seconds: how many come does not depend on how busy
    /// the machine is.
    meet: usize,
}

impl Elsewhere {
    fn new(len: usize, kind: StorageKind, wait: Duration) -> Self {
        Elsewhere {
            inner: MemorySource::new(content(len), "elsewhere"),
            kind,
            wait,
            under_way: AtomicUsize::new(0),
            most: AtomicUsize::new(0),
            meet: 0,
        }
    }
}

impl Source for Elsewhere {
    fn label(&self) -> &str {
        self.inner.label()
    }

    fn len(&self) -> u64 {
        self.inner.len()
    }

    fn kind(&self) -> StorageKind {
        self.kind
    }

    fn read_exact_at(&self, offset: u64, dst: &mut [u8]) -> Result<(), tonnage_storage::Error> {
        let now = self.under_way.fetch_add(1, Ordering::SeqCst) + 1;
        self.most.fetch_max(now, Ordering::SeqCst);
        let began = Instant::now();
        while self.most.load(Ordering::SeqCst) < self.meet && began.elapsed().as_secs() < 20 {
            std::thread::sleep(Duration::from_millis(1));
        }
        std::thread::sleep(self.wait.mul_f64(dst.len() as f64 / MIB as f64));
        self.under_way.fetch_sub(1, Ordering::SeqCst);
        self.inner.read_exact_at(offset, dst)
    }
}

#[test]
fn a_network_file_system_gets_many_reads_side_by_side() {
    let network = StorageKind::Network("nfs");
    let source = Elsewhere {
        meet: 8,
        ..Elsewhere::new(160 * MIB, network, Duration::from_micros(500))
    };
    let mut memory = HostBuffer::new(160 * MIB as u64).unwrap();
    let job = Read {
        source: &source,
        offset: 0,
        dst: memory.as_mut_slice(),
    };
    let report = read(vec![job], &Options::default()).unwrap();
    assert_eq!((report.threads, report.strategy), (16, "buffered"));
    assert!(report.reason.contains("network"), "{report:?}");
    assert!(source.most.into_inner() >= 8);
    assert!(memory.as_slice() == content(160 * MIB));
}

#[test]
fn a_slow_load_stops_within_a_tenth_of_a_second() {
    // A busy machine adds to it what it likes: the soonest of a few shows what the load takes.
    let soonest = (0..5).map(|_| cancelled_after()).min();
    assert!(soonest < Some(Duration::from_millis(100)), "{soonest:?}");
}

/// From a raised flag to the error, with a source of 20 MB/s: a whole block would take 0.4 s.
fn cancelled_after() -> Duration {
    let source = Elsewhere::new(64 * MIB, StorageKind::Remote, Duration::from_millis(50));
    let cancel = Cancel::new();
    let mut memory = HostBuffer::new(64 * MIB as u64).unwrap();
    let options = Options {
        threads: Some(4),
        cancel: Some(&cancel),
        ..Options::default()
    };
    let job = Read {
        source: &source,
        offset: 0,
        dst: memory.as_mut_slice(),
    };
    std::thread::scope(|scope| {
        let stopper = scope.spawn(|| {
            std::thread::sleep(Duration::from_millis(300));
            cancel.cancel();
            Instant::now()
        });
        let error = read(vec![job], &options).unwrap_err();
        let over = Instant::now();
        assert!(matches!(error, Error::Cancelled), "{error}");
        over.saturating_duration_since(stopper.join().unwrap())
    })
}

#[test]
fn a_file_that_is_cut_off_in_mid_load_is_an_error_that_says_where() {
    for strategy in [Strategy::Auto, Strategy::Direct, Strategy::Buffered] {
        let disk = OnDisk::new(32 * MIB);
        let source = disk.cold();
        let mut memory = HostBuffer::new(32 * MIB as u64).unwrap();
        let file = File::options().write(true).open(&disk.path).unwrap();
        let cut = |progress: Progress| {
            if progress.done >= 4 * MIB as u64 {
                file.set_len(20 * MIB as u64 + 5).unwrap();
            }
        };
        let options = Options {
            threads: Some(1),
            block: Some(4 * MIB),
            progress: Some(&cut),
            strategy,
            ..Options::default()
        };
        let job = Read {
            source: &source,
            offset: 0,
            dst: memory.as_mut_slice(),
        };
        match read(vec![job], &options).unwrap_err() {
            Error::Storage { error, offset } => {
                assert_eq!(error.kind(), ErrorKind::UnexpectedEof);
                assert_eq!(error.label(), disk.path.to_str().unwrap());
                assert!(
                    (18 * MIB as u64..=20 * MIB as u64).contains(&offset),
                    "{offset}"
                );
                assert!(
                    error.to_string().contains(&format!("of {}", 20 * MIB + 5)),
                    "{error}"
                );
            }
            other => panic!("{other}"),
        }
        let start = &memory.as_slice()[..16 * MIB];
        assert!(start == &disk.content[..16 * MIB]);
    }
}

#[test]
fn a_failed_group_of_small_pieces_names_the_one_that_is_not_there() {
    let disk = OnDisk::new(8 * MIB);
    let source = FileSource::open(&disk.path).unwrap();
    let file = File::options().write(true).open(&disk.path).unwrap();
    file.set_len(5000).unwrap();
    let mut memory = vec![0; 100_000];
    let jobs = memory.chunks_mut(1000).enumerate().map(|(i, dst)| Read {
        source: &source,
        offset: 1000 * i as u64,
        dst,
    });
    match read(jobs.collect(), &Options::default()).unwrap_err() {
        Error::Storage { offset, .. } => assert_eq!(offset, 5000),
        other => panic!("{other}"),
    }
}
