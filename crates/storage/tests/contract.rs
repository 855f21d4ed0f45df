//! One contract for every source, and what only some of them have to withstand.

use std::fs::{self, File};
use std::io::ErrorKind;
use std::sync::Arc;

use tonnage_storage::{
    DirectAlign, DirectRead, FileSource, MemorySource, MmapSource, ReadAhead, Residency, Source,
    StorageKind,
};

fn content(len: usize) -> Vec<u8> {
    (0..len).map(|i| (i * 31 % 251) as u8).collect()
}

/// Every promise of the `Source` documentation.
fn keeps_the_contract(source: &dyn Source, expected: &[u8]) {
    let len = expected.len() as u64;
    assert_eq!(
        (source.len(), source.is_empty()),
        (len, expected.is_empty())
    );
    assert!(!source.label().is_empty());

    let mut all = vec![0; expected.len()];
    source.read_exact_at(0, &mut all).unwrap();
    assert!(all == expected, "the whole content");

    // Nothing can be read up to the end, and not past it.
    source.read_exact_at(0, &mut []).unwrap();
    source.read_exact_at(len, &mut []).unwrap();
    for (offset, wanted) in [
        (len + 1, 0),
        (len, 1),
        (0, expected.len() + 1),
        (u64::MAX, 1),
        (u64::MAX, 0),
        (1 << 63, 8),
    ] {
        let error = source
            .read_exact_at(offset, &mut vec![0; wanted])
            .unwrap_err();
        assert_eq!(
            error.kind(),
            ErrorKind::UnexpectedEof,
            "{wanted} at {offset}"
        );
        assert!(error.to_string().contains(source.label()));
        let mut buffer = vec![0; wanted];
        assert!(
            source
                .read_vectored_at(offset, &mut [&mut [], &mut buffer])
                .is_err()
        );
    }
    if let Some(bytes) = source.bytes() {
        assert!(bytes == expected);
    }
    reads_many_buffers(source, expected);
    reads_from_many_threads(source, expected);
    knows_the_page_cache(source, expected);
    if let Some(direct) = source.direct() {
        reads_past_the_page_cache(direct, source.label(), expected);
    }
    let mut again = vec![0; expected.len()];
    source.read_exact_at(0, &mut again).unwrap();
    assert!(again == expected, "whatever was read or forgotten before");
}

/// Residency is a count of pages of what was asked, for any range; forgetting changes no byte.
fn knows_the_page_cache(source: &dyn Source, expected: &[u8]) {
    let len = expected.len() as u64;
    for (offset, len) in [
        (0, len),
        (0, 0),
        (len / 2, 1),
        (len, 1),
        (7, u64::MAX),
        (u64::MAX, 9),
    ] {
        match source.residency(offset, len) {
            Residency::Unknown => {}
            Residency::Pages { cached, total } => assert!(cached <= total),
        }
        source.forget(offset, len);
    }
    let kind = source.kind();
    assert!(
        matches!(kind, StorageKind::Local | StorageKind::Memory),
        "{kind:?}"
    );
}

/// A buffer of at least one step whose address is a multiple of `memory`.
fn aligned(room: &mut Vec<u8>, memory: usize, len: usize) -> &mut [u8] {
    room.clear();
    room.resize(len + memory, 0xA5);
    let skip = room.as_ptr().addr().wrapping_neg() % memory;
    &mut room[skip..skip + len]
}

fn reads_past_the_page_cache(direct: &dyn DirectRead, label: &str, expected: &[u8]) {
    let DirectAlign {
        offset: step,
        memory,
    } = direct.align();
    assert!(step.is_power_of_two() && memory.is_power_of_two());
    let mut room = Vec::new();
    for offset in (0..expected.len()).step_by(step * 3) {
        for steps in [1, 2, 33] {
            let dst = aligned(&mut room, memory, steps * step);
            let there = dst.len().min(expected.len() - offset);
            let got = direct.read_at_least(offset as u64, dst, there).unwrap();
            assert!(there <= got && got <= dst.len());
            assert!(dst[..there] == expected[offset..offset + there]);
        }
    }
    reads_many_aligned_buffers(direct, expected);
    let dst = aligned(&mut room, memory, 2 * step);
    assert_eq!(direct.read_at_least(0, dst, 0).unwrap(), 0);
    let past = (expected.len().next_multiple_of(step) + step) as u64;
    for (offset, needed) in [(past, 1), (past, 0), (u64::MAX - step as u64 + 1, step)] {
        let error = direct.read_at_least(offset, dst, needed).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::UnexpectedEof);
        assert!(error.to_string().contains(label));
    }
    let refused = |result: Result<usize, tonnage_storage::Error>| {
        assert_eq!(result.unwrap_err().kind(), ErrorKind::InvalidInput);
    };
    refused(direct.read_at_least(0, dst, 2 * step + 1));
    if step > 1 {
        refused(direct.read_at_least(1, dst, 0));
        refused(direct.read_at_least(0, &mut dst[..step + 1], 0));
    }
    if memory > 1 {
        refused(direct.read_at_least(0, &mut dst[1..step + 1], 0));
    }
}

fn reads_many_buffers(source: &dyn Source, expected: &[u8]) {
    let mut parts: Vec<Vec<u8>> = Vec::new();
    let (mut left, mut size) = (expected.len(), 0);
    while left > 0 {
        // Empty buffers among them, and more than one call to the system takes.
        let take = size.min(left);
        parts.push(vec![0; take]);
        left -= take;
        size = (size + 1) % 40;
    }
    let mut buffers: Vec<&mut [u8]> = parts.iter_mut().map(Vec::as_mut_slice).collect();
    source.read_vectored_at(0, &mut buffers).unwrap();
    assert!(parts.concat() == expected);
    source
        .read_vectored_at(expected.len() as u64, &mut [])
        .unwrap();
}

fn reads_from_many_threads(source: &dyn Source, expected: &[u8]) {
    std::thread::scope(|scope| {
        for thread in 0..8 {
            scope.spawn(move || {
                for i in 0..200 {
                    let from = (thread * 7919 + i * 104_729) % (expected.len() + 1);
                    let to = (from + i * 13).min(expected.len());
                    let mut part = vec![0; to - from];
                    source.read_exact_at(from as u64, &mut part).unwrap();
                    assert!(part == expected[from..to]);
                }
            });
        }
    });
}

fn each_kind(expected: &[u8]) -> Vec<Box<dyn Source>> {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("source");
    fs::write(&path, expected).unwrap();
    let owner: Arc<dyn AsRef<[u8]> + Send + Sync> = Arc::new(expected.to_vec());
    // The folder goes away when this returns: what is open stays readable.
    vec![
        Box::new(FileSource::open(&path).unwrap()),
        Box::new(ReadAhead::new(FileSource::open(&path).unwrap())),
        Box::new(FileSource::from_file(File::open(&path).unwrap(), "given").unwrap()),
        Box::new(MmapSource::open(&path).unwrap()),
        Box::new(MmapSource::from_file(File::open(&path).unwrap(), "given").unwrap()),
        Box::new(MemorySource::new(expected.to_vec(), "<bytes>")),
        Box::new(MemorySource::from_owner(owner, "<owned>")),
    ]
}

#[test]
fn every_source_keeps_the_contract() {
    for len in [0, 1, 4095, 4096, 100_003] {
        let expected = content(len);
        for source in each_kind(&expected) {
            keeps_the_contract(source.as_ref(), &expected);
        }
    }
}

#[test]
fn only_what_is_in_memory_or_mapped_shows_its_bytes() {
    let shows: Vec<bool> = each_kind(b"x")
        .iter()
        .map(|s| s.bytes().is_some())
        .collect();
    assert_eq!(shows, [false, false, false, true, true, true, true]);
    let files: Vec<bool> = each_kind(b"x").iter().map(|s| s.file().is_some()).collect();
    assert_eq!(files, [true, true, true, true, true, false, false]);
}

fn reads_many_aligned_buffers(direct: &dyn DirectRead, expected: &[u8]) {
    let DirectAlign {
        offset: step,
        memory,
    } = direct.align();
    let mut rooms: Vec<Vec<u8>> = vec![Vec::new(); 4];
    for offset in [0, 3 * step] {
        let sizes = [step, 20 * step, step, 9 * step];
        let there = expected.len().saturating_sub(offset);
        let mut parts: Vec<&mut [u8]> = (rooms.iter_mut().zip(sizes))
            .map(|(room, size)| aligned(room, memory, size))
            .collect();
        let needed = there.min(31 * step);
        if expected.len() >= offset {
            direct
                .read_vectored_at_least(offset as u64, &mut parts, needed)
                .unwrap();
            assert!(parts.concat()[..needed] == expected[offset..offset + needed]);
        }
        let more = there + 1;
        let kind = match more > 31 * step {
            true => ErrorKind::InvalidInput,
            false => ErrorKind::UnexpectedEof,
        };
        let error = direct.read_vectored_at_least(offset as u64, &mut parts, more);
        assert_eq!(error.unwrap_err().kind(), kind);
    }
}

#[test]
#[cfg(target_os = "linux")]
fn a_direct_read_leaves_nothing_in_the_page_cache() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("source");
    let expected = content(4 << 20);
    fs::write(&path, &expected).unwrap();
    File::open(&path).unwrap().sync_all().unwrap();
    let source = FileSource::open(&path).unwrap();
    let all = source.len();
    let cached = |offset, len| source.residency(offset, len).fraction();
    assert_eq!(source.kind(), StorageKind::Local, "this test needs a disk");
    if cached(0, all).is_none() {
        return; // Before Linux 6.5 nobody can tell.
    }
    assert_eq!(cached(0, all), Some(1.0), "what was just written");
    source.forget(1 << 20, all - (1 << 20));
    assert_eq!(
        (cached(0, 1 << 20), cached(2 << 20, 1 << 20)),
        (Some(1.0), Some(0.0))
    );
    source.forget(0, all);
    assert_eq!(cached(0, all), Some(0.0));

    let direct = source.direct().expect("direct reads on a local disk");
    let mut room = Vec::new();
    let dst = aligned(&mut room, direct.align().memory, 4 << 20);
    assert_eq!(direct.read_at_least(0, dst, 4 << 20).unwrap(), 4 << 20);
    assert!(dst == expected);
    assert_eq!(cached(0, all), Some(0.0));
    let mut byte = [0];
    source.read_exact_at(100_000, &mut byte).unwrap();
    assert!(cached(0, all) > Some(0.0), "and the count is no constant");
}

#[test]
fn truncation_behind_an_open_source_is_an_error_and_no_signal() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("source");
    type Open = fn(&std::path::Path) -> Box<dyn Source>;
    let open: [Open; 2] = [
        |p| Box::new(FileSource::open(p).unwrap()),
        |p| Box::new(MmapSource::open(p).unwrap()),
    ];
    for open in open {
        fs::write(&path, content(100_000)).unwrap();
        let source = open(&path);
        File::options()
            .write(true)
            .open(&path)
            .unwrap()
            .set_len(10_000)
            .unwrap();
        let mut part = vec![0; 10_000];
        source.read_exact_at(0, &mut part).unwrap();
        for result in [
            source.read_exact_at(5_000, &mut part),
            source.read_exact_at(90_000, &mut part),
            source.read_vectored_at(5_000, &mut [&mut part[..]]),
        ] {
            let error = result.unwrap_err();
            assert_eq!(error.kind(), ErrorKind::UnexpectedEof);
            assert!(error.to_string().contains("of 10000"), "{error}");
        }
        if let Some(direct) = source.direct() {
            let mut room = Vec::new();
            let dst = aligned(&mut room, direct.align().memory, 64 << 10);
            assert!(direct.read_at_least(0, dst, 10_000).unwrap() >= 10_000);
            let error = direct.read_at_least(0, dst, 10_001).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::UnexpectedEof);
            assert!(error.to_string().contains("of 10000"), "{error}");
        }
    }
}

#[test]
fn what_cannot_be_opened_says_why() {
    let folder = tempfile::tempdir().unwrap();
    assert_eq!(
        FileSource::open(folder.path().join("absent"))
            .unwrap_err()
            .kind(),
        ErrorKind::NotFound
    );
    assert_eq!(
        FileSource::open(folder.path()).unwrap_err().kind(),
        ErrorKind::IsADirectory
    );
    assert_eq!(
        MmapSource::open(folder.path()).unwrap_err().kind(),
        ErrorKind::IsADirectory
    );
    assert_eq!(
        FileSource::open("/dev/null").unwrap_err().kind(),
        ErrorKind::InvalidInput
    );
    let pipe = folder.path().join("pipe");
    rustix::fs::mkfifoat(rustix::fs::CWD, &pipe, rustix::fs::Mode::RUSR).unwrap();
    assert_eq!(
        FileSource::open(&pipe).unwrap_err().kind(),
        ErrorKind::InvalidInput
    );
}
