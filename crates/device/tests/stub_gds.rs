//! cuFile on the stub: it is opened only after it was seen to start elsewhere, whatever it does there; and its reads
//! fill what they were asked for.
#![cfg(target_os = "linux")]

mod gds;

use std::fs::{self, File, OpenOptions};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::time::Duration;

use tonnage_device::driver::Driver;
use tonnage_device::gds::{Gds, Settings, Way, probe};
use tonnage_device::{Cause, Device, HostDevice, Kind};
use tonnage_stubdriver::find::Stub;

const LEN: usize = 1 << 20;

#[test]
fn the_child_that_tries() {
    gds::child();
}

fn why(settings: &Settings) -> String {
    let error = Gds::open(settings).unwrap_err();
    let Cause::Missing(text) = error.cause() else {
        panic!("{error}");
    };
    text.clone()
}

#[test]
fn what_is_missing_is_told_and_nothing_is_opened() {
    let (stub, home) = (Stub::begin("MEM_MIB=64"), tempfile::tempdir().unwrap());
    let works = gds::settings(&stub, home.path(), &[]);
    let empty = tempfile::tempdir().unwrap();
    let said = |settings: Settings, word: &str| {
        let text = why(&settings);
        assert!(text.contains(word), "{word}: {text}");
    };
    let with = |change: fn(&mut Settings)| {
        let mut settings = works.clone();
        change(&mut settings);
        settings
    };
    said(
        Settings {
            root: empty.path().to_owned(),
            ..works.clone()
        },
        "nvidia-fs is not there",
    );
    said(with(|settings| settings.log = None), "CUFILE_LOGFILE_PATH");
    said(with(|settings| settings.child.clear()), "no program");
    said(
        with(|settings| settings.child = vec!["/nowhere/program".into()]),
        "/nowhere/program",
    );
    said(
        with(|settings| settings.child = vec!["false".into()]),
        "exit status: 1",
    );
    let library = with(|settings| settings.library = Some("/nowhere/libcufile.so".into()));
    said(library, "/nowhere/libcufile.so");
}

#[test]
fn a_start_that_fails_hangs_or_ends_its_process_does_so_elsewhere() {
    let (stub, home) = (Stub::begin("MEM_MIB=64"), tempfile::tempdir().unwrap());
    let settings = |way: &str| gds::settings(&stub, home.path(), &[way]);
    assert!(why(&settings("STUB_GDS_OPEN=fails")).contains("nvidia-fs is not loaded (5001)"));
    assert!(why(&settings("STUB_GDS_OPEN=aborts")).contains("signal: 6"));
    let hangs = Settings {
        limit: Duration::from_millis(300),
        ..settings("STUB_GDS_OPEN=hangs")
    };
    assert!(why(&hangs).contains("did not start within"));
    assert!(probe(&hangs).is_err());
    // The child starts it, and this process can't.
    stub.again("MEM_MIB=64\nGDS_OPEN=fails");
    assert_eq!(probe(&settings("STUB_MEM_MIB=64")).unwrap(), Way::NvidiaFs);
    assert!(why(&settings("STUB_MEM_MIB=64")).contains("5001"));
}

fn pattern() -> Vec<u8> {
    (0..LEN + 100).map(|i| (i * 31 % 251) as u8).collect()
}

/// A file of the pattern, open for direct reads.
fn direct(home: &Path) -> File {
    let path = home.join("bytes");
    fs::write(&path, pattern()).unwrap();
    let flags = rustix::fs::OFlags::DIRECT.bits();
    let flags = i32::try_from(flags).unwrap();
    OpenOptions::new()
        .read(true)
        .custom_flags(flags)
        .open(path)
        .unwrap()
}

#[test]
fn reads_fill_what_they_are_asked_for_and_leave_nothing_behind() {
    let stub = Stub::begin("");
    let home = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    for fault in [
        "",
        "SHORT_GDS_READ=1",
        "SHORT_GDS_READ=3",
        "FAIL_GDS_BUFFER=1",
    ] {
        stub.again(&format!("MEM_MIB=64\n{fault}"));
        let opened = Gds::open(&gds::settings(&stub, home.path(), &[])).unwrap();
        let device = Driver::open_at(Kind::Cuda, stub.path())
            .unwrap()
            .device(0)
            .unwrap();
        let memory = device.allocate(LEN as u64).unwrap();
        let file = opened.file(&direct(home.path())).unwrap();
        for (offset, at, len) in [(0, 0, 4096), (4096, 4096, 65536), (8192, 100, 512 << 10)] {
            assert_eq!(
                file.read(offset, &*memory, at, len).unwrap(),
                len,
                "{fault}"
            );
            let found = stub.peek(memory.address() + at, len);
            assert!(found == pattern()[offset as usize..][..len], "{fault}");
        }
        // The end of the file comes early.
        assert_eq!(file.read(LEN as u64, &*memory, 0, 4096).unwrap(), 100);
        for (at, len) in [(LEN as u64, 1), (LEN as u64 - 511, 512), (u64::MAX, 512)] {
            let error = file.read(0, &*memory, at, len).unwrap_err();
            assert!(error.to_string().contains("leaves its memory"), "{error}");
        }
        let host = HostDevice::default().allocate(4096).unwrap();
        assert!(file.read(0, &*host, 0, 4096).is_err(), "not a card's");
        drop(memory);
        drop((file, device));
        assert_eq!((stub.violations(), stub.live().total()), (0, 0), "{fault}");
    }
}

#[test]
fn what_cufile_refuses_is_told_with_its_words() {
    let stub = Stub::begin("");
    let home = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    stub.again("MEM_MIB=64\nFAIL_GDS_FILE=2\nFAIL_GDS_READ=1");
    let opened = Gds::open(&gds::settings(&stub, home.path(), &[])).unwrap();
    let file = opened.file(&direct(home.path())).unwrap();
    let plain = File::open(home.path().join("bytes")).unwrap();
    let refused = opened.file(&plain).unwrap_err().to_string();
    assert!(
        refused.contains("not supported for this file (5008)"),
        "{refused}"
    );
    let refused = opened.file(&plain).unwrap_err().to_string();
    assert!(
        refused.contains("not open for direct reads (5020)"),
        "{refused}"
    );
    let device = Driver::open_at(Kind::Cuda, stub.path())
        .unwrap()
        .device(0)
        .unwrap();
    let memory = device.allocate(LEN as u64).unwrap();
    let error = file.read(0, &*memory, 0, 4096).unwrap_err();
    assert!(
        matches!(error.cause(), Cause::Driver { code: 5044, .. }),
        "{error}"
    );
    assert_eq!(
        file.read(0, &*memory, 0, 4096).unwrap(),
        4096,
        "and goes on to work"
    );
}
