//! Claim: a checkpoint that had checksums has right ones after every copy and edit, one that had none has none, and a
//! bit that was flipped in what is copied is reported with its tensor and place and never made good by a new sum.

mod common;

use std::fs;
use std::path::{Path, PathBuf};

use common::{Tensor, refs};
use tonnage::checksums::{read_sidecar, sidecar_of, write_sidecar};
use tonnage::edit::{Edit, Way, edit, left_behind};
use tonnage::engine::checksum::{CHUNK, crc};
use tonnage::engine::{Options, hash};
use tonnage::gguf::{GgmlType, GgufContent, GgufItem, GgufSave, OwnedValue, convert, save_gguf};
use tonnage::plan::{Mesh, Origin, PlanLoad, Rules, reshard};
use tonnage::storage::FileSource;
use tonnage::{
    Checkpoint, Content, Dtype, Durability, Error, Item, OpenOptions, Result, Save, Saved, save,
    save_items,
};

/// More than a chunk, with a seam inside of a tensor.
fn tensors() -> Vec<Tensor> {
    vec![
        Tensor::new("large", Dtype::F32, &[9 << 18], 1),
        Tensor::new("small", Dtype::F16, &[3, 5], 2),
        Tensor::new("last", Dtype::U8, &[12_345], 3),
    ]
}

fn settings() -> Save<'static> {
    Save {
        durability: Durability::None,
        ..Save::default()
    }
}

fn keeping(max_shard_size: Option<u64>) -> Save<'static> {
    Save {
        max_shard_size,
        keep: true,
        ..settings()
    }
}

/// A source of one file, or of two.
fn source(folder: &Path, sharded: bool, checksums: bool, sidecar: bool) -> PathBuf {
    let path = folder.join(if sharded { "in" } else { "in.safetensors" });
    let how = Save {
        checksums,
        sidecar,
        max_shard_size: sharded.then_some(1 << 20),
        ..settings()
    };
    let saved = save(&refs(&tensors()), &path, &how).unwrap();
    assert_eq!(saved.files.len(), if sharded { 2 } else { 1 });
    path
}

/// Which kinds the files of a checkpoint have; those that they have are right.
fn kinds(path: &Path) -> (bool, bool) {
    let checkpoint = Checkpoint::open(path).unwrap();
    let mut found = Vec::new();
    for file in checkpoint.files() {
        let bytes = fs::read(&file.label).unwrap();
        let chunks = bytes[file.data_start as usize..].chunks(CHUNK as usize);
        let sums = file.checksums().unwrap();
        if let Some(sums) = &sums {
            assert_eq!(*sums, chunks.map(crc).collect::<Vec<_>>(), "{}", file.label);
        }
        let hash = read_sidecar(Path::new(&file.label)).unwrap();
        if let Some(hash) = hash {
            let source = FileSource::open(&file.label).unwrap();
            assert_eq!(hash, hash::blake3_of(&source, &Options::default()).unwrap());
        }
        found.push((sums.is_some(), hash.is_some()));
    }
    found.dedup();
    assert_eq!(found.len(), 1, "all files alike: {found:?}");
    found[0]
}

/// Copies a checkpoint, keeping its checksums unless told otherwise.
type CopyTo = fn(&Checkpoint, &Path, Option<bool>) -> Result<Saved>;

/// Every way to copy a checkpoint with other names, dtypes and numbers of files.
fn copies() -> Vec<(&'static str, CopyTo)> {
    fn copy(from: &Checkpoint, to: &Path, max: Option<u64>, keep: Option<bool>) -> Result<Saved> {
        let items: Vec<Item<'_>> = from
            .iter()
            .map(|tensor| Item {
                name: if tensor.name() == "last" {
                    "final"
                } else {
                    tensor.name()
                },
                dtype: match (tensor.dtype().unwrap(), max) {
                    (Dtype::F32, Some(0)) => Dtype::BF16,
                    (dtype, _) => dtype,
                },
                shape: tensor.shape(),
                content: Content::Stored(tensor),
            })
            .collect();
        let how = Save {
            metadata: from.metadata().clone().into_iter().collect(),
            keep: keep.unwrap_or(true),
            ..keeping(max.filter(|&max| max > 0))
        };
        save_items(&items, to, &how)
    }
    vec![
        ("merged.safetensors", |from, to, keep| {
            copy(from, to, None, keep)
        }),
        ("split", |from, to, keep| {
            copy(from, to, Some(1 << 20), keep)
        }),
        ("cast.safetensors", |from, to, keep| {
            copy(from, to, Some(0), keep)
        }),
        ("converted.safetensors", |from, to, keep| {
            let how = Save {
                keep: keep.unwrap_or(true),
                ..keeping(None)
            };
            convert(from, to, &how)
        }),
    ]
}

#[test]
fn a_copy_has_the_kinds_that_its_source_had() {
    for (sharded, checksums, sidecar) in [
        (false, true, false),
        (true, true, true),
        (true, false, false),
        (false, false, true),
    ] {
        let folder = tempfile::tempdir().unwrap();
        let from = source(folder.path(), sharded, checksums, sidecar);
        let checkpoint = Checkpoint::open(&from).unwrap();
        for (name, copy) in copies() {
            let to = folder.path().join(name);
            let saved = copy(&checkpoint, &to, None).unwrap();
            assert!(saved.notes.is_empty(), "{:?}", saved.notes);
            assert_eq!(kinds(&to), (checksums, sidecar), "{name}");
            copy(&checkpoint, &to, Some(false)).unwrap();
            assert_eq!(
                kinds(&to),
                (false, false),
                "{name}: only where it is asked for"
            );
        }
    }
}

/// Flips a bit of the first file of a checkpoint: of its header's last byte but padding, or of its data.
fn flip(from: &Path, at: impl Fn(&tonnage::CheckpointFile) -> u64) -> u64 {
    let checkpoint = Checkpoint::open(from).unwrap();
    let file = &checkpoint.files()[0];
    let at = at(file);
    let mut bytes = fs::read(&file.label).unwrap();
    bytes[at as usize] ^= 1;
    fs::write(&file.label, bytes).unwrap();
    at
}

fn is_reported(error: &Error, tensor: &str, at: u64) {
    assert_eq!(error.code(), "CHECKSUM_MISMATCH", "{error}");
    assert_eq!(error.tensor(), Some(tensor), "{error}");
    assert!(error.file().is_some(), "{error}");
    let text = error.to_string();
    let place = text.split("(bytes ").nth(1).expect("a place");
    let mut ends = place
        .split(|c: char| !c.is_ascii_digit())
        .filter(|n| !n.is_empty());
    let mut end = || ends.next().unwrap().parse::<u64>().unwrap();
    let (begin, end) = (end(), end());
    assert!((begin..end).contains(&at), "{at} in {text}");
}

#[test]
fn a_flipped_bit_is_reported_by_every_copy_and_nothing_is_written() {
    for sharded in [false, true] {
        let folder = tempfile::tempdir().unwrap();
        let from = source(folder.path(), sharded, true, false);
        // In the second chunk, which the tensor shares with others, if they lie in the same file.
        let at = flip(&from, |file| file.data_start + CHUNK + 100);
        let checkpoint = Checkpoint::open(&from).unwrap();
        for (name, copy) in copies() {
            let to = folder.path().join(name);
            is_reported(&copy(&checkpoint, &to, None).unwrap_err(), "large", at);
            let left = common::names(folder.path());
            // A folder is made before anything is read.
            assert!(left.len() == 1 || to.is_dir(), "{left:?}");
            if to.is_dir() {
                let left = common::names(&to);
                assert!(left.is_empty(), "{left:?}");
            }
            // Who does not want to know gets a copy, and it has no sums that say that it is good.
            copy(&checkpoint, &to, Some(false)).unwrap();
            assert_eq!(kinds(&to), (false, false));
            match to.is_dir() {
                true => fs::remove_dir_all(&to).unwrap(),
                false => fs::remove_file(&to).unwrap(),
            }
        }
    }
}

/// A copy of one small tensor verifies the whole chunk that it lies in.
#[test]
fn the_rest_of_a_chunk_is_compared_too() {
    let folder = tempfile::tempdir().unwrap();
    let from = source(folder.path(), false, true, false);
    let at = flip(&from, |file| file.len - 1);
    let checkpoint = Checkpoint::open(&from).unwrap();
    let small = checkpoint.tensor("small").unwrap();
    let items = [Item {
        name: "small",
        dtype: Dtype::F16,
        shape: small.shape(),
        content: Content::Stored(small),
    }];
    let to = folder.path().join("out.safetensors");
    let error = save_items(&items, &to, &keeping(None)).unwrap_err();
    assert!(
        error.to_string().contains(&format!("{}", at + 1)),
        "{error}"
    );
    assert!(!to.exists());
}

#[test]
fn sums_that_say_nothing_of_the_data_are_not_replaced_by_ones_that_do() {
    let folder = tempfile::tempdir().unwrap();
    let from = source(folder.path(), false, true, false);
    let to = folder.path().join("out.safetensors");
    for (value, code) in [
        ("crc64-nvme;8388608;4;iJh5CoYUi64=", Some("CHECKSUM_STALE")),
        ("crc64-nvme;8388608;x", Some("CHECKSUM_FORM")),
        ("sha256;8388608;4;AAAA", None),
    ] {
        let set = [("safetensors.checksums".to_owned(), value.to_owned())];
        let change = Edit {
            set: &set,
            ..Edit::default()
        };
        edit(&from, &change).unwrap();
        let checkpoint = Checkpoint::open(&from).unwrap();
        let copied = convert(&checkpoint, &to, &keeping(None));
        match (copied, code) {
            (Err(error), Some(code)) => assert_eq!(error.code(), code),
            (Ok(saved), None) => {
                assert_eq!(saved.notes[0].code, "CHECKSUM_UNKNOWN");
                assert_eq!(kinds(&to), (false, false));
            }
            (copied, _) => panic!("{value}: {copied:?}"),
        }
    }
}

#[test]
fn ranks_have_the_kinds_that_the_whole_had_and_the_whole_those_of_ranks() {
    let rules = Rules::from_json(r#"{"large": {"tp": {"shard": {"dim": 0}}}, "*": "replicate"}"#);
    let rules = rules.unwrap();
    let run = |from: &Path, to: &Path, size: u32| {
        let origin = Origin::open(from, &OpenOptions::default()).unwrap();
        let plan = origin
            .plan(&Mesh::new(&[("tp", size)]).unwrap(), &rules)
            .unwrap();
        reshard(&origin, &plan, to, &PlanLoad::default(), &keeping(None))
    };
    for (checksums, sidecar) in [(true, false), (true, true), (false, false)] {
        let folder = tempfile::tempdir().unwrap();
        let from = source(folder.path(), true, checksums, sidecar);
        let (two, one) = (
            folder.path().join("two"),
            folder.path().join("one.safetensors"),
        );
        run(&from, &two, 2).unwrap();
        for rank in ["rank-00000.safetensors", "rank-00001.safetensors"] {
            assert_eq!(kinds(&two.join(rank)), (checksums, sidecar));
        }
        run(&two, &one, 1).unwrap();
        assert_eq!(kinds(&one), (checksums, sidecar));
        if !checksums {
            continue;
        }
        for (from, to) in [(&from, "a"), (&two.join("rank-00000.safetensors"), "b")] {
            let at = flip(from, |file| file.data_start + 4096);
            let from = if to == "a" { from.as_path() } else { &two };
            let to = folder.path().join(to);
            let error = run(from, &to, 2).unwrap_err();
            if !sidecar {
                is_reported(&error, "large", at);
            }
            assert_eq!(error.code(), "CHECKSUM_MISMATCH");
            assert!(!to.exists() || common::names(&to).is_empty());
        }
    }
}

#[test]
fn a_container_without_sums_says_so_and_keeps_the_hash() {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name);
    let kv = [(
        "general.architecture".to_owned(),
        OwnedValue::String(b"llama".to_vec()),
    )];
    let item = GgufItem {
        name: "output_norm.weight",
        ty: GgmlType::F32,
        shape: &[3],
        content: GgufContent::Bytes(&[7; 12]),
    };
    let how = GgufSave {
        sidecar: true,
        ..GgufSave::default()
    };
    save_gguf(&kv, &[item], path("m.gguf"), &how).unwrap();
    assert!(read_sidecar(&path("m.gguf")).unwrap().is_some());
    let checkpoint = Checkpoint::open(path("m.gguf")).unwrap();
    let carried = Save {
        checksums: true,
        ..keeping(None)
    };
    convert(&checkpoint, path("m.safetensors"), &carried).unwrap();
    assert_eq!(kinds(&path("m.safetensors")), (true, true));
    let checkpoint = Checkpoint::open(path("m.safetensors")).unwrap();
    let saved = convert(&checkpoint, path("again.gguf"), &keeping(None)).unwrap();
    assert_eq!(saved.notes[0].code, "CHECKSUM_LEFT_OUT");
    assert_eq!(
        fs::read(path("again.gguf")).unwrap(),
        fs::read(path("m.gguf")).unwrap()
    );
    let (same, other) = (
        read_sidecar(&path("again.gguf")),
        read_sidecar(&path("m.gguf")),
    );
    assert_eq!(same.unwrap(), other.unwrap());
    // A save over it that is not asked for one leaves none that is stale.
    save_gguf(&kv, &[item], path("again.gguf"), &GgufSave::default()).unwrap();
    assert!(!sidecar_of(&path("again.gguf")).exists());

    fs::remove_file(sidecar_of(&path("m.safetensors"))).unwrap();
    flip(&path("m.safetensors"), |file| file.data_start + 1);
    let checkpoint = Checkpoint::open(path("m.safetensors")).unwrap();
    let error = convert(&checkpoint, path("bad.gguf"), &keeping(None)).unwrap_err();
    assert_eq!(error.code(), "CHECKSUM_MISMATCH", "{error}");
    assert!(!path("bad.gguf").exists());
    let mut bytes = fs::read(path("m.gguf")).unwrap();
    *bytes.last_mut().unwrap() ^= 1;
    fs::write(path("m.gguf"), bytes).unwrap();
    let checkpoint = Checkpoint::open(path("m.gguf")).unwrap();
    let error = convert(&checkpoint, path("bad.safetensors"), &keeping(None)).unwrap_err();
    assert_eq!(error.code(), "CHECKSUM_MISMATCH", "{error}");
}

/// The edits that go each way.
fn edits() -> [(Way, &'static str, bool); 4] {
    [
        (Way::Sector, "v", false),
        (Way::InPlace, "w", true),
        (Way::Replaced, "x", false),
        (Way::Replaced, "long", false),
    ]
}

/// Edits the file; the value is so long that the edit has to go the way that it should.
fn change(path: &Path, way: Way, value: &str, in_place: bool, drop: bool) -> Result<()> {
    let len = match (way, value) {
        (Way::Sector, _) => 1,
        (_, "long") => 9000,
        _ => 1200,
    };
    let set = [("k".to_owned(), value.repeat(len))];
    let edited = edit(
        path,
        &Edit {
            set: &set,
            in_place,
            drop_sidecar: drop,
            durability: Durability::None,
            ..Edit::default()
        },
    )?;
    assert_eq!(edited.way, way, "{value}");
    assert!(left_behind(path).unwrap().is_empty());
    Ok(())
}

fn with_room(folder: &Path, checksums: bool) -> PathBuf {
    let path = folder.join("m.safetensors");
    let mut how = Save {
        checksums,
        sidecar: true,
        ..settings()
    };
    how.write.reserve = 4096;
    save(&refs(&tensors()), &path, &how).unwrap();
    path
}

#[test]
fn an_edit_keeps_sums_and_renews_the_hash_whichever_way_it_goes() {
    for checksums in [true, false] {
        let folder = tempfile::tempdir().unwrap();
        let path = with_room(folder.path(), checksums);
        for (way, value, in_place) in edits() {
            change(&path, way, value, in_place, false).unwrap();
            assert_eq!(kinds(&path), (checksums, true), "{way:?}");
        }
        // By a link: the hash beside the file itself is renewed, too.
        let link = folder.path().join("link.safetensors");
        std::os::unix::fs::symlink("m.safetensors", &link).unwrap();
        change(&link, Way::Replaced, "y", false, false).unwrap();
        assert_eq!(kinds(&path), (checksums, true));
        change(&path, Way::Replaced, "z", false, true).unwrap();
        assert_eq!(kinds(&path), (checksums, false));
    }
}

#[test]
fn an_edit_that_copies_damage_reports_it_and_leaves_the_old_file() {
    let folder = tempfile::tempdir().unwrap();
    let path = with_room(folder.path(), true);
    let at = flip(&path, |file| file.data_start + CHUNK + 5);
    let before = fs::read(&path).unwrap();
    for (way, value, in_place) in edits() {
        // The whole file is not what the hash beside it says.
        let error = change(&path, way, value, in_place, false).unwrap_err();
        assert_eq!(error.code(), "CHECKSUM_MISMATCH", "{error}");
        assert!(fs::read(&path).unwrap() == before);
        assert!(sidecar_of(&path).exists(), "what says so stays");
        if way == Way::Replaced {
            // The data is not what its sums say.
            let error = change(&path, way, value, in_place, true).unwrap_err();
            is_reported(&error, "large", at);
            assert!(fs::read(&path).unwrap() == before);
            assert!(sidecar_of(&path).exists());
        }
    }
    // Where no data moves, the sums stay as they are and go on saying it.
    change(&path, Way::Sector, "v", false, true).unwrap();
    let found = tonnage::verify(&path, &OpenOptions::default()).unwrap();
    assert!(!found.ok());
}

#[test]
fn what_is_no_hash_of_the_file_is_removed_and_said() {
    let folder = tempfile::tempdir().unwrap();
    let path = with_room(folder.path(), false);
    let moved = folder.path().join("moved.safetensors");
    fs::rename(&path, &moved).unwrap();
    fs::rename(sidecar_of(&path), sidecar_of(&moved)).unwrap();
    let set = [("k".to_owned(), "v".to_owned())];
    let change = Edit {
        set: &set,
        ..Edit::default()
    };
    let edited = edit(&moved, &change).unwrap();
    assert_eq!(edited.notes[0].code, "SIDECAR_UNKNOWN");
    assert!(!sidecar_of(&moved).exists());
    // Nothing changes: nothing is removed either.
    write_sidecar(&moved, &[0; 32], Durability::None).unwrap();
    assert_eq!(edit(&moved, &change).unwrap().way, Way::Unchanged);
    assert!(sidecar_of(&moved).exists());
}
