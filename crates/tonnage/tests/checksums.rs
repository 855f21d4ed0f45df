//! Checksums: every way to save gives those of the data (spec chapter 13), every flipped bit is found, and what
//! changes a file keeps them or drops them.

mod common;

use std::fs;
use std::path::Path;
use std::process::Command;
use std::sync::Arc;

use common::{Tensor, refs};
use tonnage::checksums::{bad_chunks, checksums_of, hex, read_sidecar, sidecar_of};
use tonnage::edit::{Edit, edit};
use tonnage::engine::checksum::{CHUNK, crc};
use tonnage::engine::{Options, hash};
use tonnage::format::TensorSpec;
use tonnage::storage::{FileSource, MemorySource, Source};
use tonnage::{
    Checkpoint, Content, Dtype, Durability, Item, Load, OpenOptions, Save, Writer, save, save_items,
};

fn with_checksums() -> Save<'static> {
    Save {
        checksums: true,
        ..Save::default()
    }
}

/// Tensors of several chunks, with seams inside of tensors and tensors inside of chunks.
fn tensors() -> Vec<Tensor> {
    vec![
        Tensor::new("large", Dtype::F32, &[5 << 20], 1),
        Tensor::new("small", Dtype::F16, &[3, 5], 2),
        Tensor::new("bytes", Dtype::U8, &[7 << 20], 3),
        Tensor::new("empty", Dtype::U8, &[0], 4),
        Tensor::new("last", Dtype::U8, &[12_345], 5),
    ]
}

/// The sums of every file are those of its bytes, read here by hand.
fn all_right(path: &Path) -> Checkpoint {
    let checkpoint = Checkpoint::open(path).unwrap();
    for file in checkpoint.files() {
        let bytes = fs::read(&file.label).unwrap();
        let data = &bytes[file.data_start as usize..];
        let expected: Vec<u64> = data.chunks(CHUNK as usize).map(crc).collect();
        assert_eq!(file.checksums().unwrap(), Some(expected), "{}", file.label);
    }
    checkpoint.load(&verifying()).unwrap();
    checkpoint
}

fn verifying() -> Load<'static> {
    Load {
        verify: true,
        ..Load::default()
    }
}

#[test]
fn every_way_to_save_gives_the_sums_of_the_data() {
    let folder = tempfile::tempdir().unwrap();
    let tensors = tensors();
    let one = folder.path().join("one.safetensors");
    for durability in [Durability::Full, Durability::None] {
        let options = Save {
            durability,
            ..with_checksums()
        };
        save(&refs(&tensors), &one, &options).unwrap();
        all_right(&one);
    }
    let bytes = tonnage::to_bytes(&refs(&tensors), &with_checksums()).unwrap();
    assert!(
        fs::read(&one).unwrap() == bytes,
        "bytes and file are the same"
    );

    let sharded = folder.path().join("sharded");
    let options = Save {
        max_shard_size: Some(10 << 20),
        ..with_checksums()
    };
    let saved = save(&refs(&tensors), &sharded, &options).unwrap();
    assert_eq!(saved.files.len(), 2);
    let checkpoint = all_right(&sharded);
    assert!(checkpoint.metadata().is_empty() && checkpoint.notes().is_empty());

    let specs: Vec<TensorSpec<'_>> = tensors.iter().map(Tensor::spec).collect();
    let declared = folder.path().join("declared.safetensors");
    let mut writer = Writer::declared(&declared, &specs, &with_checksums()).unwrap();
    for tensor in refs(&tensors).iter().rev() {
        writer.add(tensor).unwrap();
    }
    writer.finish().unwrap();
    assert!(fs::read(&declared).unwrap() == bytes, "declared as saved");
    all_right(&declared);

    // Below the size from which a stream keeps its order, and above it.
    for (name, copies) in [("copied", 1), ("kept", 3)] {
        let streamed = folder.path().join(format!("{name}.safetensors"));
        let options = Save {
            durability: Durability::None,
            ..with_checksums()
        };
        let mut writer = Writer::create(&streamed, &options).unwrap();
        for copy in 0..copies {
            // The first and the third are as long as they are aligned.
            for tensor in refs(&tensors).into_iter().step_by(2).take(2) {
                let name = format!("{copy}.{}", tensor.name);
                writer
                    .add(&tonnage::TensorData {
                        name: &name,
                        ..tensor
                    })
                    .unwrap();
            }
        }
        writer.finish().unwrap();
        let checkpoint = all_right(&streamed);
        let in_place = checkpoint.files()[0].data_start == tonnage::ROOM;
        assert_eq!(in_place, name == "kept");
    }
}

#[test]
fn casts_and_copies_get_new_sums_and_an_edit_keeps_the_old_ones() {
    let folder = tempfile::tempdir().unwrap();
    let (one, two) = (
        folder.path().join("one.safetensors"),
        folder.path().join("two.safetensors"),
    );
    save(&refs(&tensors()), &one, &with_checksums()).unwrap();
    let checkpoint = Checkpoint::open(&one).unwrap();
    let cast = |options: &Save<'_>| {
        let items: Vec<Item<'_>> = checkpoint
            .iter()
            .map(|tensor| Item {
                name: tensor.name(),
                dtype: match tensor.dtype().unwrap() {
                    Dtype::F32 => Dtype::BF16,
                    dtype => dtype,
                },
                shape: tensor.shape(),
                content: Content::Stored(tensor),
            })
            .collect();
        save_items(&items, &two, options).unwrap();
        fs::read(&two).unwrap()
    };
    let metadata: Vec<(String, String)> = checkpoint.metadata().clone().into_iter().collect();
    assert_eq!(metadata.len(), 1, "of one file they are metadata");
    let carried = Save {
        metadata,
        ..Save::default()
    };
    cast(&carried);
    let dropped = Checkpoint::open(&two).unwrap();
    assert_eq!(dropped.files()[0].checksums().unwrap(), None);
    let error = dropped.load(&verifying()).unwrap_err();
    assert_eq!(
        (error.code(), error.clause()),
        ("NO_CHECKSUMS", Some("13.8"))
    );
    cast(&Save {
        checksums: true,
        ..carried
    });
    all_right(&two);

    let sums = checkpoint.files()[0].checksums().unwrap();
    let shout = |name: &str| Some(name.to_uppercase());
    let change = Edit {
        set: &[("k".to_owned(), "v".repeat(5000))],
        rename: Some(&shout),
        ..Edit::default()
    };
    edit(&one, &change).unwrap();
    let edited = all_right(&one);
    assert!(edited.get("LARGE").is_some() && edited.metadata().contains_key("k"));
    assert_eq!(edited.files()[0].checksums().unwrap(), sums);
}

/// One bit of a file in memory is another: the load that verifies says in which chunk and tensor.
#[test]
fn a_flipped_bit_fails_the_load_and_names_its_tensor() {
    let bytes = tonnage::to_bytes(&refs(&tensors()), &with_checksums()).unwrap();
    let source = |bytes: &[u8]| -> Arc<dyn Source> { Arc::new(MemorySource::new(bytes, "<m>")) };
    let open = |bytes: &[u8]| {
        Checkpoint::from_sources(vec![source(bytes)], &OpenOptions::default()).unwrap()
    };
    let good = open(&bytes);
    for tensor in good.iter().filter(|tensor| tensor.byte_len() > 0) {
        let mut bad = bytes.clone();
        let at = tensor.offset() + tensor.byte_len() / 2;
        bad[at as usize] ^= 1 << (at % 8);
        let damaged = open(&bad);
        let data_start = damaged.files()[0].data_start;
        let chunk = (at - data_start) / CHUNK;
        let error = damaged.load(&verifying()).unwrap_err();
        assert_eq!(error.code(), "CHECKSUM_MISMATCH");
        let text = error.to_string();
        let begin = data_start + chunk * CHUNK;
        assert!(
            text.contains(&format!("chunk {chunk} (bytes {begin} to ")),
            "{text}"
        );
        // Without being asked nobody looks, and a tensor of sound chunks can be verified.
        damaged.load(&Load::default()).unwrap();
        let named = error.tensor().unwrap();
        assert!(
            named == tensor.name() || text.contains(tensor.name()),
            "{text}"
        );
        for other in damaged.iter() {
            let ends = [
                other.offset(),
                (other.offset() + other.byte_len()).max(1) - 1,
            ];
            let touched = ends.map(|at| (at - data_start) / CHUNK);
            let touches = (touched[0]..=touched[1]).contains(&chunk) && other.byte_len() > 0;
            let load = Load {
                select: vec![other.name().to_owned()],
                ..verifying()
            };
            assert_eq!(damaged.load(&load).is_err(), touches, "{}", other.name());
        }
    }
}

/// 10,000 flips, one at a time. What a load does for each chunk is done for the one that is touched: to
/// read all of a file for each flip would take an hour.
#[test]
fn each_of_ten_thousand_flips_is_found() {
    // A whole chunk, and a last one that is as quickly summed as flips are many.
    let tensors: Vec<Tensor> = (0..64)
        .map(|i| Tensor::new(&format!("t{i:02}"), Dtype::U8, &[100_000 + i * 1_100], i))
        .collect();
    let bytes = tonnage::to_bytes(&refs(&tensors), &with_checksums()).unwrap();
    let source: Arc<dyn Source> = Arc::new(MemorySource::new(&bytes[..], "<m>"));
    let checkpoint = Checkpoint::from_sources(vec![source], &OpenOptions::default()).unwrap();
    let file = &checkpoint.files()[0];
    let (start, len) = (file.data_start, file.data_bytes);
    assert!(len > CHUNK + 100_000 && len < CHUNK + 1_000_000, "{len}");
    let mut bytes = bytes;
    let mut state = 88_172_645_463_325_252_u64;
    let mut seen = vec![0; len.div_ceil(CHUNK) as usize];
    for flip in 0..10_000 {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        let at = if flip % 50 == 0 {
            state % CHUNK
        } else {
            CHUNK + state % (len - CHUNK)
        };
        let bit = 1 << (state >> 61);
        let chunk = at / CHUNK;
        let begin = (start + chunk * CHUNK) as usize;
        let end = (begin + CHUNK as usize).min(bytes.len());
        bytes[(start + at) as usize] ^= bit;
        let checker = file.checker().unwrap();
        let bad = checker
            .feed(begin as u64, [&bytes[begin..end]])
            .unwrap_err();
        bytes[(start + at) as usize] ^= bit;
        assert_eq!((bad.chunk, bad.offset), (chunk, begin as u64));
        let error = checkpoint.corrupt(0, &bad);
        let named = checkpoint.get(error.tensor().unwrap()).unwrap();
        let last = named.offset() + named.byte_len();
        assert!(
            named.offset() < end as u64 && last > begin as u64,
            "{error}"
        );
        seen[chunk as usize] += 1;
    }
    assert!(seen.iter().all(|&flips| flips > 100), "{seen:?}");
    let whole = file.checker().unwrap();
    whole.feed(start, [&bytes[start as usize..]]).unwrap();
}

#[test]
fn a_whole_file_is_looked_at_chunk_by_chunk() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("m.safetensors");
    save(&refs(&tensors()), &path, &with_checksums()).unwrap();
    let mut bytes = fs::read(&path).unwrap();
    let start = Checkpoint::open(&path).unwrap().files()[0].data_start;
    for chunk in [0, 2] {
        bytes[(start + chunk * CHUNK + 99) as usize] ^= 4;
    }
    fs::write(&path, bytes).unwrap();
    let checkpoint = Checkpoint::open(&path).unwrap();
    let file = &checkpoint.files()[0];
    let source = FileSource::open(&path).unwrap();
    let options = Options::default();
    let bad = bad_chunks(&source, &file.checker().unwrap(), &options).unwrap();
    assert_eq!(bad.iter().map(|bad| bad.chunk).collect::<Vec<_>>(), [0, 2]);
    let found = checksums_of(&source, file.data_start, file.data_bytes, &options).unwrap();
    let differ = found.sums.iter().zip(file.checksums().unwrap().unwrap());
    assert_eq!(differ.filter(|(a, b)| *a != b).count(), 2);
}

#[test]
fn a_sidecar_is_what_b3sum_writes_and_never_beside_other_content() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("m.safetensors");
    let options = Save {
        sidecar: true,
        ..Save::default()
    };
    for durability in [Durability::Full, Durability::None] {
        save(
            &refs(&tensors()),
            &path,
            &Save {
                durability,
                ..options.clone()
            },
        )
        .unwrap();
        let expected = hash::blake3_of(&FileSource::open(&path).unwrap(), &Options::default());
        let expected = expected.unwrap();
        assert_eq!(read_sidecar(&path).unwrap(), Some(expected));
        let text = fs::read_to_string(sidecar_of(&path)).unwrap();
        assert_eq!(text, format!("{}  m.safetensors\n", hex(&expected)));
    }
    let mut b3sum = Command::new("b3sum");
    b3sum
        .args(["-c", "m.safetensors.b3"])
        .current_dir(folder.path());
    if let Ok(said) = b3sum.output() {
        assert!(said.status.success(), "{said:?}");
    }
    // An edit that is to drop it and a save without one take it away.
    let set = [("k".to_owned(), "v".to_owned())];
    edit(
        &path,
        &Edit {
            set: &set,
            drop_sidecar: true,
            ..Edit::default()
        },
    )
    .unwrap();
    assert!(!sidecar_of(&path).exists());
    save(&refs(&tensors()), &path, &options).unwrap();
    assert!(sidecar_of(&path).exists());
    save(&refs(&tensors()), &path, &Save::default()).unwrap();
    assert!(!sidecar_of(&path).exists());

    let sharded = folder.path().join("sharded");
    let shards = Save {
        max_shard_size: Some(10 << 20),
        ..options.clone()
    };
    for file in save(&refs(&tensors()), &sharded, &shards).unwrap().files {
        assert!(read_sidecar(&file).unwrap().is_some(), "{file:?}");
    }
    save(&refs(&tensors()), &sharded, &Save::default()).unwrap();
    let left = common::names(&sharded);
    assert!(left.iter().all(|name| !name.ends_with(".b3")), "{left:?}");

    for broken in ["", "00", "m.safetensors", "zz  m.safetensors\n"] {
        fs::write(sidecar_of(&path), broken).unwrap();
        assert_eq!(read_sidecar(&path).unwrap_err().code(), "CHECKSUM_FORM");
    }
}
