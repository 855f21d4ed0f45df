//! Loads by GPUDirect Storage on the stub: whole pages go straight to the device, the rest through the ring, and
//! whatever is in the way, the bytes are right or the error is the ring's.
#![cfg(target_os = "linux")]

#[path = "../../device/tests/gds/mod.rs"]
mod gds;

use std::fs;
use std::path::Path;
use std::sync::Arc;

use tonnage_device::driver::Driver;
use tonnage_device::gds::{Gds, Use};
use tonnage_device::{Device, Kind, Pool, Stream};
use tonnage_engine::{
    Cancel, Check, DeviceReport, Error, Piece, Pipeline, PipelineOptions, Strategy,
};
use tonnage_storage::{FileSource, Source};
use tonnage_stubdriver::find::Stub;

const LEN: usize = 10 << 20;

#[test]
fn the_child_that_tries() {
    gds::child();
}

fn pattern() -> Vec<u8> {
    (0..LEN)
        .map(|i| (i.wrapping_mul(2_654_435_761) >> 13) as u8)
        .collect()
}

struct Setup {
    stub: Stub,
    home: tempfile::TempDir,
    journal: std::path::PathBuf,
}

impl Setup {
    fn new() -> Self {
        let home = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
        fs::write(home.path().join("bytes"), pattern()).unwrap();
        let journal = home.path().join("journal");
        let stub = Stub::begin("");
        Setup {
            stub,
            home,
            journal,
        }
    }

    /// A fresh driver with these settings, and a device.
    fn again(&self, settings: &str) -> (Arc<dyn Device>, PipelineOptions) {
        let journal = self.journal.display();
        self.stub
            .again(&format!("MEM_MIB=64\nJOURNAL={journal}\n{settings}"));
        let gds = Gds::open(&gds::settings(&self.stub, self.home.path(), &[])).unwrap();
        let device = Driver::open_at(Kind::Cuda, self.stub.path()).and_then(|of| of.device(0));
        let options = PipelineOptions {
            threads: Some(2),
            pool: Pool::new(8 << 20),
            staging: 8 << 20,
            gds: Use::On(Arc::new(gds)),
            ..PipelineOptions::default()
        };
        (Arc::new(device.unwrap()), options)
    }

    fn file(&self) -> Arc<dyn Source> {
        open(&self.home.path().join("bytes"))
    }

    /// Offset and length of each read of cuFile's.
    fn reads(&self) -> Vec<(u64, u64)> {
        self.stub.flush();
        let text = fs::read_to_string(&self.journal).unwrap();
        let lines = text.lines().filter(|line| line.contains("\"gds_read\""));
        let number = |line: &str, key: &str| {
            let rest = line.split(&format!("\"{key}\":")).nth(1).unwrap();
            rest.split([',', '}'])
                .next()
                .unwrap()
                .parse::<u64>()
                .unwrap()
        };
        lines
            .map(|line| (number(line, "offset"), number(line, "bytes")))
            .collect()
    }

    fn clean(&self) {
        assert_eq!((self.stub.violations(), self.stub.live().total()), (0, 0));
    }
}

fn open(path: &Path) -> Arc<dyn Source> {
    Arc::new(FileSource::open(path).unwrap())
}

/// Where tensors begin in the file, and where they go.
const TENSORS: [(u64, u64, u64); 5] = [
    (0, 5000, 0),
    (5000, 3_000_000, 8192),
    (3_005_000, 70_000, 3_100_160),
    (3_075_000, 133_000, 3_200_000),
    (3_211_264, 6 << 20, 3_400_192),
];

/// Brings the tensors, and gives what is on the device and the report.
fn load(
    setup: &Setup,
    device: &Arc<dyn Device>,
    options: PipelineOptions,
    source: &Arc<dyn Source>,
) -> Result<DeviceReport, String> {
    let text = |error: tonnage_engine::Failed| error.to_string();
    let memory = device.allocate(10 << 20).unwrap();
    let pipeline = Pipeline::start(vec![Arc::clone(device)], options).map_err(text)?;
    pipeline.after(device.info().id, Stream::DEFAULT);
    let pieces = TENSORS.iter().zip(0..).map(|(&(offset, len, at), tag)| {
        Piece::plain(Arc::clone(source), offset, len, memory.clone(), at, tag)
    });
    pipeline.submit(pieces.collect()).map_err(text)?;
    let mut landed = 0;
    while let Some(more) = pipeline.landed().map_err(text)? {
        landed += more.tags.len();
    }
    assert_eq!(landed, TENSORS.len());
    let report = pipeline.finish().map_err(text)?;
    let all = pattern();
    for (offset, len, at) in TENSORS {
        let found = setup.stub.peek(memory.address() + at, len as usize);
        assert!(
            found == all[offset as usize..][..len as usize],
            "the tensor at {offset}"
        );
    }
    Ok(report)
}

#[test]
fn whole_pages_go_straight_and_the_rest_through_the_ring() {
    let setup = Setup::new();
    let (device, options) = setup.again("DELAY_US=100");
    let report = load(&setup, &device, options, &setup.file()).unwrap();
    drop(device);
    let reads = setup.reads();
    assert!(
        reads
            .iter()
            .all(|(offset, len)| offset % 4096 == 0 && len % 4096 == 0)
    );
    let straight: u64 = reads.iter().map(|(_, len)| len).sum();
    assert_eq!(report.bytes_gds, straight);
    // All but the ends of four tensors, and the small one.
    let wanted: u64 = TENSORS.iter().map(|(_, len, _)| len).sum();
    assert!(
        straight + 5000 + 4 * 8192 > wanted,
        "{straight} of {wanted}"
    );
    assert_eq!(report.strategy, "gds");
    assert!(!report.reason.contains("GPUDirect"), "{}", report.reason);
    assert!(report.peak_staging <= 8 << 20);
    setup.clean();
}

/// A framework's stream still writes to the memory when the load begins.
#[test]
fn reads_wait_for_the_streams_that_memory_comes_from() {
    let setup = Setup::new();
    let (device, options) = setup.again("DELAY_US=20000");
    let source = setup.file();
    let memory = device.allocate(1 << 20).unwrap();
    let mut stream = device.queue().unwrap();
    let slot = options
        .pool
        .lend(&*device, 1 << 20, 1, 1, &|| false)
        .unwrap()
        .remove(0);
    let to = tonnage_device::Transfer::plain(memory.clone(), 0, 0, 1 << 20);
    let ticket = stream.upload(slot, vec![to]).unwrap();
    stream.before(Stream::DEFAULT).unwrap();
    let pipeline = Pipeline::start(vec![Arc::clone(&device)], options).unwrap();
    pipeline.after(device.info().id, Stream::DEFAULT);
    let piece = Piece::plain(source, 4096, 1 << 20, memory.clone(), 0, 0);
    pipeline.submit(vec![piece]).unwrap();
    let report = pipeline.finish().unwrap();
    assert_eq!(report.bytes_gds, 1 << 20);
    assert!(setup.stub.peek(memory.address(), 1 << 20) == pattern()[4096..][..1 << 20]);
    drop(ticket);
    drop((stream, memory, device));
    setup.clean();
}

#[test]
fn what_fails_is_done_by_the_ring_and_the_report_says_so() {
    let setup = Setup::new();
    let mut all = 0;
    for (fault, words) in [
        ("FAIL_GDS_FILE", "not supported for this file (5008)"),
        ("FAIL_GDS_READ", "the read failed (cuFile) (5044)"),
        ("FAIL_GDS_BUFFER", ""),
        ("SHORT_GDS_READ", ""),
    ] {
        for n in 1..=4 {
            let (device, options) = setup.again(&format!("DELAY_US=50\n{fault}={n}"));
            let report = load(&setup, &device, options, &setup.file()).unwrap();
            drop(device);
            setup.clean();
            let told = report.reason.contains("not all by GPUDirect Storage");
            assert!(!told || report.reason.contains(words), "{}", report.reason);
            assert!(!told || !words.is_empty(), "{fault}: {}", report.reason);
            all += usize::from(told);
        }
    }
    // One file is asked for once; each of the first four reads fails once.
    assert_eq!(all, 5);
}

#[derive(Debug)]
struct Fine;

impl Check for Fine {
    fn check(
        &self,
        _: &dyn Source,
        _: u64,
        _: &mut dyn Iterator<Item = &[u8]>,
    ) -> Result<(), Error> {
        Ok(())
    }
}

#[test]
fn where_it_does_not_fit_it_is_not_used_and_the_report_says_why() {
    let setup = Setup::new();
    let run = |change: &dyn Fn(&mut PipelineOptions)| {
        let (device, mut options) = setup.again("");
        change(&mut options);
        let report = load(&setup, &device, options, &setup.file()).unwrap();
        assert!(setup.reads().is_empty() && report.bytes_gds == 0);
        report.reason
    };
    let reason = run(&|options| options.check = Some(Arc::new(Fine)));
    assert!(reason.contains("compared with checksums"), "{reason}");
    let reason = run(&|options| options.strategy = Strategy::Buffered);
    assert!(reason.contains("page cache"), "{reason}");
    let reason = run(&|options| options.gds = Use::Not("there is no moon".to_owned()));
    assert!(
        reason.starts_with("no GPUDirect Storage: there is no moon"),
        "{reason}"
    );
    setup.clean();
}

#[test]
fn a_truncated_file_and_a_raised_flag_end_it_as_they_do_without() {
    let setup = Setup::new();
    let (device, options) = setup.again("");
    let path = setup.home.path().join("short");
    fs::write(&path, pattern()).unwrap();
    let source = open(&path);
    fs::OpenOptions::new()
        .write(true)
        .open(&path)
        .unwrap()
        .set_len(5_000_000)
        .unwrap();
    let error = load(&setup, &device, options, &source).unwrap_err();
    assert!(
        error.contains("short") && error.contains("bytes"),
        "{error}"
    );
    drop(device);
    setup.clean();
    let (device, options) = setup.again("");
    let options = PipelineOptions {
        cancel: Cancel::new(),
        ..options
    };
    options.cancel.cancel();
    assert_eq!(
        load(&setup, &device, options, &setup.file()).unwrap_err(),
        "cancelled"
    );
    assert!(setup.reads().is_empty());
    drop(device);
    setup.clean();
}
