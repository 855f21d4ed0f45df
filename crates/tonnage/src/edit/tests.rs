//! Edits of small files, each way.

use super::*;
use crate::{Checkpoint, ErrorKind};
use tonnage_engine as engine;
use tonnage_format::{Dtype, TensorSpec, WriteOptions, layout};

/// A file with `n` tensors, room for `reserve` bytes, and distinct values.
fn file(folder: &Path, n: usize, reserve: u64) -> PathBuf {
    let names: Vec<String> = (0..n).map(|i| format!("t{i:03}")).collect();
    let specs: Vec<TensorSpec<'_>> = names
        .iter()
        .map(|name| TensorSpec {
            name,
            dtype: Dtype::U8,
            shape: &[3],
        })
        .collect();
    let options = WriteOptions {
        reserve,
        ..WriteOptions::default()
    };
    let mut bytes = layout(&specs, Some(&[("format", "pt")]), &options)
        .unwrap()
        .header;
    bytes.extend((0..3 * n).map(|i| i as u8));
    let path = folder.join("m.safetensors");
    std::fs::write(&path, bytes).unwrap();
    path
}

fn set(key: &str, value: &str) -> [(String, String); 1] {
    [(key.to_owned(), value.to_owned())]
}

fn whole(path: &Path, n: usize) -> Checkpoint {
    let checkpoint = Checkpoint::open(path).unwrap();
    let values: Vec<u8> = checkpoint
        .iter()
        .flat_map(|tensor| tensor.read().unwrap())
        .collect();
    assert_eq!(values, (0..3 * n).map(|i| i as u8).collect::<Vec<_>>());
    let names = std::fs::read_dir(path.parent().unwrap()).unwrap().count();
    assert_eq!(names, 1, "nothing else is left");
    checkpoint
}

#[test]
fn a_change_within_one_sector_moves_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let path = file(folder.path(), 1, 100);
    let inode =
        |path: &Path| std::os::unix::fs::MetadataExt::ino(&std::fs::metadata(path).unwrap());
    let before = inode(&path);
    let done = edit(
        &path,
        &Edit {
            set: &set("k", "value"),
            ..Edit::default()
        },
    )
    .unwrap();
    assert_eq!((done.way, done.renamed, done.deleted), (Way::Sector, 0, 0));
    assert!(done.written < SECTOR as u64);
    assert_eq!(inode(&path), before);
    assert_eq!(whole(&path, 1).metadata()["k"], "value");
    let again = edit(
        &path,
        &Edit {
            set: &set("k", "value"),
            ..Edit::default()
        },
    )
    .unwrap();
    assert_eq!((again.way, again.written), (Way::Unchanged, 0));
    let delete = ["k".to_owned(), "absent".to_owned(), "format".to_owned()];
    let done = edit(
        &path,
        &Edit {
            delete: &delete,
            ..Edit::default()
        },
    )
    .unwrap();
    assert_eq!((done.way, done.deleted), (Way::Sector, 2));
    assert!(whole(&path, 1).metadata().is_empty());
}

#[test]
fn a_longer_change_replaces_the_file_unless_asked_otherwise() {
    let folder = tempfile::tempdir().unwrap();
    let path = file(folder.path(), 100, 200);
    let len = std::fs::metadata(&path).unwrap().len();
    let done = edit(
        &path,
        &Edit {
            set: &set("k", "v"),
            ..Edit::default()
        },
    )
    .unwrap();
    assert_eq!((done.way, done.written), (Way::Replaced, len));
    assert_eq!(whole(&path, 100).metadata()["k"], "v");
    let in_place = Edit {
        set: &set("k", "longer"),
        in_place: true,
        ..Edit::default()
    };
    assert_eq!(edit(&path, &in_place).unwrap().way, Way::InPlace);
    assert_eq!(whole(&path, 100).metadata()["k"], "longer");
    assert!(left_behind(&path).unwrap().is_empty());
    let long = set("k", &"x".repeat(10_000));
    let error = edit(
        &path,
        &Edit {
            set: &long,
            in_place: true,
            ..Edit::default()
        },
    )
    .unwrap_err();
    assert_eq!((error.code(), error.kind()), ("NO_ROOM", ErrorKind::Usage));
    let done = edit(
        &path,
        &Edit {
            set: &long,
            reserve: 4096,
            ..Edit::default()
        },
    )
    .unwrap();
    assert_eq!(done.way, Way::Replaced);
    let checkpoint = whole(&path, 100);
    assert!(checkpoint.files()[0].header_padding >= 4096);
    assert_eq!(checkpoint.files()[0].data_start % 8, 0);
}

#[test]
fn names_change_and_bytes_do_not() {
    let folder = tempfile::tempdir().unwrap();
    let path = file(folder.path(), 20, 0);
    let shout = |name: &str| name.strip_prefix("t00").map(|rest| format!("T{rest}"));
    let done = edit(
        &path,
        &Edit {
            rename: Some(&shout),
            ..Edit::default()
        },
    )
    .unwrap();
    assert_eq!(done.renamed, 10);
    let checkpoint = whole(&path, 20);
    assert!(checkpoint.get("T7").is_some() && checkpoint.get("t007").is_none());
    assert!(checkpoint.get("t010").is_some());
    for (rename, code) in [
        (
            &(|_: &str| Some("same".to_owned())) as Renamer<'_>,
            "WRITE_DUPLICATE",
        ),
        (
            &|name: &str| (name == "T1").then(|| "__metadata__".to_owned()),
            "WRITE_RESERVED_NAME",
        ),
    ] {
        let error = edit(
            &path,
            &Edit {
                rename: Some(rename),
                ..Edit::default()
            },
        )
        .unwrap_err();
        assert_eq!(error.code(), code);
    }
    whole(&path, 20);
}

#[test]
fn a_cancelled_edit_leaves_the_old_file() {
    let folder = tempfile::tempdir().unwrap();
    let path = file(folder.path(), 100, 0);
    let old = std::fs::read(&path).unwrap();
    let cancel = engine::Cancel::new();
    cancel.cancel();
    let options = Options {
        cancel: Some(&cancel),
        ..Options::default()
    };
    for value in ["x", &"x".repeat(5000)] {
        let error = edit(
            &path,
            &Edit {
                set: &set("format", value),
                options,
                ..Edit::default()
            },
        )
        .unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Cancelled);
        assert_eq!(std::fs::read(&path).unwrap(), old);
    }
    whole(&path, 100);
    let source = FileSource::open(&path).unwrap();
    std::fs::remove_file(&path).unwrap();
    std::fs::write(&path, &old).unwrap();
    let error = overwrite(&path, &source, 8, b"x", Durability::None).unwrap_err();
    assert_eq!(error.code(), "CHANGED");
    assert_eq!(std::fs::read(&path).unwrap(), old);
    let absent = folder.path().join("absent.safetensors");
    assert_eq!(
        edit(&absent, &Edit::default()).unwrap_err().kind(),
        ErrorKind::Io
    );
    std::fs::write(&absent, b"short").unwrap();
    assert_eq!(
        edit(&absent, &Edit::default()).unwrap_err().code(),
        "FILE_TOO_SMALL"
    );
}
