//! Every byte arrives where it belongs, whatever the order, size and number of jobs; failures end the run.

use std::io::ErrorKind;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};

use tonnage_engine::{Cancel, Copy, Error, Options, Progress, Read, Write, copy, read, write};
use tonnage_storage::{MemorySink, MemorySource, Sink, Source};

fn content(len: usize) -> Vec<u8> {
    (0..len)
        .map(|i| (i as u64).wrapping_mul(0x9E37_79B9_7F4A_7C15).to_le_bytes()[7])
        .collect()
}

/// A source that counts its calls and can fail from one offset on.
#[derive(Debug)]
struct Watched {
    inner: MemorySource,
    calls: AtomicUsize,
    fail_from: u64,
}

impl Watched {
    fn new(content: &[u8], fail_from: u64) -> Self {
        Watched {
            inner: MemorySource::new(content, "<watched>"),
            calls: AtomicUsize::new(0),
            fail_from,
        }
    }
}

impl Source for Watched {
    fn label(&self) -> &str {
        self.inner.label()
    }
    fn len(&self) -> u64 {
        self.inner.len()
    }
    fn read_exact_at(&self, offset: u64, dst: &mut [u8]) -> Result<(), tonnage_storage::Error> {
        self.calls.fetch_add(1, Ordering::Relaxed);
        if offset >= self.fail_from {
            return Err(tonnage_storage::Error::new(
                "read",
                self.label(),
                ErrorKind::TimedOut,
            ));
        }
        self.inner.read_exact_at(offset, dst)
    }
    fn read_vectored_at(
        &self,
        offset: u64,
        dst: &mut [&mut [u8]],
    ) -> Result<(), tonnage_storage::Error> {
        self.calls.fetch_add(1, Ordering::Relaxed);
        self.inner.read_vectored_at(offset, dst)
    }
}

/// Sizes of pieces: empty ones, many small ones, one larger than several blocks.
fn pieces() -> Vec<usize> {
    let mut sizes: Vec<usize> = (0..3000).map(|i| i % 50).collect();
    sizes.insert(1500, 100_000);
    sizes.extend([0, 4096, 4095, 4097, 1]);
    sizes
}

#[test]
fn reads_fill_every_buffer_in_few_calls() {
    let sizes = pieces();
    let all = content(sizes.iter().sum());
    for threads in [1, 4] {
        let source = Watched::new(&all, u64::MAX);
        let mut buffers: Vec<Vec<u8>> = sizes.iter().map(|&len| vec![0; len]).collect();
        let mut jobs = Vec::new();
        let mut offset = 0;
        for buffer in &mut buffers {
            let len = buffer.len() as u64;
            jobs.push(Read {
                source: &source,
                offset,
                dst: buffer,
            });
            offset += len;
        }
        jobs.reverse();
        let seen = AtomicU64::new(0);
        let progress = |p: Progress| {
            assert!(p.done <= p.total);
            seen.fetch_max(p.done, Ordering::Relaxed);
        };
        let options = Options {
            threads: Some(threads),
            block: Some(4096),
            progress: Some(&progress),
            ..Options::default()
        };
        let report = read(jobs, &options).unwrap();
        assert!(buffers.concat() == all);
        assert_eq!((report.bytes, report.threads), (all.len() as u64, threads));
        assert_eq!(seen.into_inner(), all.len() as u64);
        // Every block but a few at the seams is full.
        let calls = source.calls.into_inner();
        assert!(
            calls <= all.len() / 4096 + 8,
            "{calls} calls for {} bytes",
            all.len()
        );
    }
}

#[test]
fn reads_from_several_sources_and_with_gaps() {
    let (a, b) = (
        content(10_000),
        content(9_000).into_iter().rev().collect::<Vec<u8>>(),
    );
    let (source_a, source_b) = (Watched::new(&a, u64::MAX), Watched::new(&b, u64::MAX));
    let mut buffers = vec![vec![0; 100]; 4];
    let places: [(&dyn Source, u64); 4] = [
        (&source_b, 8_900),
        (&source_a, 0),
        (&source_b, 0),
        (&source_a, 5_000),
    ];
    let jobs = buffers
        .iter_mut()
        .zip(places)
        .map(|(dst, (source, offset))| Read {
            source,
            offset,
            dst,
        });
    read(jobs.collect(), &Options::default()).unwrap();
    assert_eq!(buffers[0], b[8_900..]);
    assert_eq!(buffers[1], a[..100]);
    assert_eq!(buffers[2], b[..100]);
    assert_eq!(buffers[3], a[5_000..5_100]);
    assert_eq!(read(Vec::new(), &Options::default()).unwrap().bytes, 0);
}

#[test]
fn the_first_failure_ends_a_read_and_is_named() {
    let all = content(1 << 20);
    let source = Watched::new(&all, 40_960);
    let mut buffer = vec![0; all.len()];
    let options = Options {
        threads: Some(1),
        block: Some(4096),
        ..Options::default()
    };
    let jobs = vec![Read {
        source: &source,
        offset: 0,
        dst: &mut buffer,
    }];
    match read(jobs, &options).unwrap_err() {
        Error::Storage { error, offset } => {
            assert_eq!(
                (error.kind(), error.label(), offset),
                (ErrorKind::TimedOut, "<watched>", 40_960)
            );
        }
        other => panic!("{other}"),
    }
    assert_eq!(
        source.calls.into_inner(),
        11,
        "nothing is read after the failure"
    );
}

#[test]
fn cancelling_ends_a_run_before_the_next_block() {
    let all = content(1 << 20);
    let source = Watched::new(&all, u64::MAX);
    let cancel = Cancel::new();
    let stop = |p: Progress| {
        if p.done >= 8192 {
            cancel.clone().cancel();
        }
    };
    let options = Options {
        threads: Some(1),
        block: Some(4096),
        progress: Some(&stop),
        cancel: Some(&cancel),
        ..Options::default()
    };
    let mut buffer = vec![0; all.len()];
    let jobs = vec![Read {
        source: &source,
        offset: 0,
        dst: &mut buffer,
    }];
    let error = read(jobs, &options).unwrap_err();
    assert!(matches!(error, Error::Cancelled) && error.to_string() == "cancelled");
    assert_eq!(source.calls.into_inner(), 2);
    let sink = MemorySink::new("<sink>");
    let error = write(
        &sink,
        &[Write {
            offset: 0,
            data: &all,
        }],
        &options,
    )
    .unwrap_err();
    assert!(matches!(error, Error::Cancelled) && sink.into_vec().is_empty());
}

/// A sink that counts its calls and refuses to grow beyond a size.
#[derive(Debug)]
struct Small(MemorySink, Mutex<usize>, u64);

impl Sink for Small {
    fn label(&self) -> &str {
        "<small>"
    }
    fn write_all_at(&self, offset: u64, src: &[u8]) -> Result<(), tonnage_storage::Error> {
        *self.1.lock().unwrap() += 1;
        if offset + src.len() as u64 > self.2 {
            return Err(tonnage_storage::Error::new(
                "write",
                self.label(),
                ErrorKind::StorageFull,
            ));
        }
        self.0.write_all_at(offset, src)
    }
    fn reserve(&self, len: u64) -> Result<(), tonnage_storage::Error> {
        self.0.reserve(len)
    }
    fn set_len(&self, len: u64) -> Result<(), tonnage_storage::Error> {
        self.0.set_len(len)
    }
    fn sync(&self) -> Result<(), tonnage_storage::Error> {
        self.0.sync()
    }
}

#[test]
fn writes_land_where_they_belong_and_small_ones_are_gathered() {
    let sizes = pieces();
    let all = content(sizes.iter().sum());
    for threads in [1, 4] {
        let mut jobs = Vec::new();
        let mut rest = &all[..];
        let mut offset = 0;
        for &len in &sizes {
            let (data, after) = rest.split_at(len);
            jobs.push(Write { offset, data });
            offset += len as u64;
            rest = after;
        }
        jobs.reverse();
        let sink = Small(MemorySink::new(""), Mutex::new(0), u64::MAX);
        let options = Options {
            threads: Some(threads),
            ..Options::default()
        };
        assert_eq!(
            write(&sink, &jobs, &options).unwrap().bytes,
            all.len() as u64
        );
        assert!(*sink.1.lock().unwrap() < 10);
        assert!(sink.0.into_vec() == all);
    }
    let sink = Small(MemorySink::new(""), Mutex::new(0), 5);
    match write(
        &sink,
        &[Write {
            offset: 3,
            data: b"four",
        }],
        &Options::default(),
    )
    .unwrap_err()
    {
        Error::Storage { error, offset: 3 } => assert_eq!(error.kind(), ErrorKind::StorageFull),
        other => panic!("{other}"),
    }
}

#[test]
fn copies_join_neighbours_and_keep_to_the_block() {
    let all = content(100_000);
    let source = Watched::new(&all, u64::MAX);
    let sink = MemorySink::new("<sink>");
    // Two halves swapped, the second in many small neighbouring pieces.
    let mut jobs = vec![Copy {
        source: &source,
        from: 0,
        to: 50_000,
        len: 50_000,
    }];
    jobs.extend((0..5_000).map(|i| Copy {
        source: &source,
        from: 50_000 + i * 10,
        to: i * 10,
        len: 10,
    }));
    jobs.push(Copy {
        source: &source,
        from: 0,
        to: 0,
        len: 0,
    });
    let report = copy(
        &sink,
        &jobs,
        &Options {
            block: Some(8192),
            ..Options::default()
        },
    )
    .unwrap();
    assert_eq!(report.bytes, 100_000);
    assert!(sink.into_vec() == [&all[50_000..], &all[..50_000]].concat());
    assert!(source.calls.into_inner() <= 16);
    let past = Copy {
        source: &source.inner,
        from: 99_999,
        to: 0,
        len: 2,
    };
    assert!(matches!(
        copy(&MemorySink::new(""), &[past], &Options::default()).unwrap_err(),
        Error::Storage { offset: 99_999, .. }
    ));
}
