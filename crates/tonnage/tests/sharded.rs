//! Several writers, one checkpoint: what they write together is what one would have written alone, and what
//! they do not finish leaves the old one.

use std::path::Path;

use tonnage::format::TensorSpec;
use tonnage::sharded::{Files, Patch, Place, sum_part, write};
use tonnage::storage::SharedFile;
use tonnage::{Checkpoint, Dtype, Durability, OpenOptions, Save, TensorData, verify};

const ROWS: u64 = 1500;
const COLUMNS: u64 = 771;

fn matrix() -> Vec<u8> {
    (0..ROWS * COLUMNS * 4)
        .map(|i| (i * 7 % 253) as u8)
        .collect()
}

fn specs() -> [TensorSpec<'static>; 3] {
    let spec = |name, dtype, shape| TensorSpec { name, dtype, shape };
    [
        spec("columns", Dtype::F32, &[ROWS, COLUMNS]),
        spec("rows", Dtype::F32, &[ROWS, COLUMNS]),
        spec("step", Dtype::I64, &[]),
    ]
}

fn settings() -> Save<'static> {
    Save {
        metadata: vec![("format".into(), "pt".into())],
        ..Save::default()
    }
}

fn alone(path: &Path, save: &Save<'_>) {
    let (matrix, step) = (matrix(), 7_i64.to_le_bytes());
    let contents: [&[u8]; 3] = [&matrix, &matrix, &step];
    let specs = specs();
    let tensors: Vec<TensorData<'_>> = (specs.iter().zip(contents))
        .map(|(spec, data)| TensorData {
            name: spec.name,
            dtype: spec.dtype,
            shape: spec.shape,
            data,
        })
        .collect();
    tonnage::save(&tensors, path, save).unwrap();
}

/// Rank `rank` of two: half of the rows of one tensor, half of the columns of the other; the scalar is
/// rank 1's.
fn part(rank: u64, at: &[u64]) -> Vec<Patch<'static>> {
    let matrix: &'static [u8] = Vec::leak(matrix());
    let (half, left) = (ROWS / 2, COLUMNS / 3);
    let columns = if rank == 0 { 0..left } else { left..COLUMNS };
    let strides = vec![COLUMNS * 4, 4];
    let shape = vec![ROWS, COLUMNS];
    let mut patches = vec![
        Patch {
            data: &matrix[columns.start as usize * 4..],
            strides: strides.clone(),
            offset: vec![0, columns.start],
            size: vec![ROWS, columns.end - columns.start],
            shape: shape.clone(),
            unit: 4,
            at: at[0],
        },
        Patch {
            data: &matrix[(rank * half * COLUMNS * 4) as usize..],
            strides,
            offset: vec![rank * half, 0],
            size: vec![half, COLUMNS],
            shape,
            unit: 4,
            at: at[1],
        },
    ];
    if rank == 1 {
        patches.push(Patch {
            data: Vec::leak(7_i64.to_le_bytes().to_vec()),
            strides: vec![],
            offset: vec![],
            size: vec![],
            shape: vec![],
            unit: 8,
            at: at[2],
        });
    }
    patches
}

fn write_as(rank: u64, place: &Place) {
    let file = SharedFile::open(&place.path, place.len, Durability::Full).unwrap();
    write(
        &file,
        place.len,
        &part(rank, &place.tensors),
        &Default::default(),
    )
    .unwrap();
    tonnage::storage::Sink::sync(&file).unwrap();
}

fn together(files: &Files) {
    let place = files.places().next().unwrap().clone();
    std::thread::scope(|scope| {
        for rank in 0..2 {
            let place = &place;
            scope.spawn(move || write_as(rank, place));
        }
    });
}

/// On a disk, where writes go past the page cache, not in memory.
fn folder() -> tempfile::TempDir {
    tempfile::tempdir_in(env!("CARGO_MANIFEST_DIR")).unwrap()
}

#[test]
fn two_ranks_write_the_bytes_of_one() {
    let folder = folder();
    let (one, two) = (
        folder.path().join("one.safetensors"),
        folder.path().join("two"),
    );
    alone(&one, &settings());
    let files = Files::create(&two, &[specs().to_vec()], 0, &settings()).unwrap();
    together(&files);
    let saved = files.commit().unwrap();
    assert_eq!(saved.files, [two.join("model.safetensors")]);
    assert!(std::fs::read(&one).unwrap() == std::fs::read(&saved.files[0]).unwrap());
    assert_eq!(std::fs::read_dir(&two).unwrap().count(), 1);
}

#[test]
fn several_files_get_an_index_and_replace_one() {
    let folder = folder();
    alone(folder.path(), &settings());
    let specs = specs();
    let groups = [vec![specs[0], specs[2]], vec![specs[1]]];
    let files = Files::create(folder.path(), &groups, 0, &settings()).unwrap();
    let places: Vec<Place> = files.places().cloned().collect();
    for rank in 0..2 {
        let mut patches = part(
            rank,
            &[
                places[0].tensors[0],
                places[1].tensors[0],
                places[0].tensors[1],
            ],
        );
        let second = patches.remove(1);
        for (place, patches) in places.iter().zip([patches, vec![second]]) {
            let file = SharedFile::open(&place.path, place.len, Durability::Full).unwrap();
            write(&file, place.len, &patches, &Default::default()).unwrap();
        }
    }
    let saved = files.commit().unwrap();
    assert_eq!(saved.files.len(), 2);
    assert!(saved.index.is_some());
    let checkpoint = Checkpoint::open(folder.path()).unwrap();
    for name in ["columns", "rows"] {
        let tensor = checkpoint.get(name).unwrap();
        let mut bytes = vec![0; tensor.byte_len() as usize];
        tensor.read_into(&mut bytes).unwrap();
        assert!(bytes == matrix(), "{name}");
    }
    assert!(!folder.path().join("model.safetensors").exists());
}

#[test]
fn what_is_not_committed_leaves_the_old_checkpoint_and_nothing_else() {
    let folder = folder();
    let path = folder.path().join("model.safetensors");
    alone(&path, &settings());
    let before = std::fs::read(&path).unwrap();
    let files = Files::create(&path, &[specs().to_vec()], 0, &settings()).unwrap();
    write_as(0, files.places().next().unwrap());
    assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 2);
    drop(files);
    assert!(std::fs::read(&path).unwrap() == before);
    assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 1);
}

/// A header may come later, in its room or, where it has outgrown that, in a copy; checksums too.
#[test]
fn metadata_and_checksums_may_come_last() {
    let folder = folder();
    let save = Save {
        checksums: true,
        ..settings()
    };
    let (one, two) = (folder.path().join("one"), folder.path().join("two"));
    alone(&one, &save);
    for (room, text) in [(4096, "x".repeat(3000)), (0, "y".repeat(9000))] {
        let mut files = Files::create(&two, &[specs().to_vec()], room, &save).unwrap();
        together(&files);
        let place = files.places().next().unwrap().clone();
        let len = place.len - place.data_start;
        let chunk = tonnage::format::forever::CHECKSUM_CHUNK;
        let options = Default::default();
        let mut sums = sum_part(&place.path, place.data_start, 0, chunk, &options).unwrap();
        sums.extend(sum_part(&place.path, place.data_start, chunk, len - chunk, &options).unwrap());
        let metadata = [
            ("format".into(), "pt".into()),
            ("more".into(), text.clone()),
        ];
        assert_eq!(files.seal(0, &metadata, None).unwrap_err().code(), "SEAL");
        files.seal(0, &metadata, Some(sums)).unwrap();
        files.commit().unwrap();
        let checkpoint = Checkpoint::open(&two).unwrap();
        assert_eq!(checkpoint.metadata().get("more"), Some(&text));
        let verdict = verify(&two, &OpenOptions::default()).unwrap();
        assert!(verdict.ok(), "{verdict:?}");
    }
}
