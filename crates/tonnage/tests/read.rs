//! Reading: views, slices and loads give the bytes that were saved, and read no more than they should.

mod common;

use std::fs;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use common::{Tensor, content_of, model, refs};
use tonnage::engine::{Cancel, Options, Progress};
use tonnage::storage::{MemorySource, Source};
use tonnage::{
    ALIGN, Checkpoint, Dtype, GAP, Load, OnProgressOf, OpenOptions, Save, Slice, cast, save,
    to_bytes,
};

/// A source that counts the bytes it gives away.
#[derive(Debug)]
struct Counted(MemorySource, Arc<AtomicU64>);

impl Source for Counted {
    fn label(&self) -> &str {
        self.0.label()
    }
    fn len(&self) -> u64 {
        self.0.len()
    }
    fn read_exact_at(&self, offset: u64, dst: &mut [u8]) -> Result<(), tonnage::storage::Error> {
        self.1.fetch_add(dst.len() as u64, Ordering::Relaxed);
        self.0.read_exact_at(offset, dst)
    }
}

fn counted(tensors: &[Tensor]) -> (Checkpoint, Arc<AtomicU64>) {
    let bytes = to_bytes(&refs(tensors), &Save::default()).unwrap();
    let count = Arc::new(AtomicU64::new(0));
    let source = Counted(MemorySource::new(bytes, "<counted>"), Arc::clone(&count));
    let checkpoint =
        Checkpoint::from_sources(vec![Arc::new(source)], &OpenOptions::default()).unwrap();
    count.store(0, Ordering::Relaxed);
    (checkpoint, count)
}

/// The slice's bytes by the definition: every element whose index every range takes.
fn naive(tensor: &Tensor, ranges: &[Slice]) -> Vec<u8> {
    let size = tensor.dtype.bitsize() / 8;
    let mut out = Vec::new();
    for (i, element) in tensor.data.chunks(size).enumerate() {
        let mut rest = i as u64;
        let mut taken = true;
        for axis in (0..tensor.shape.len()).rev() {
            let at = rest % tensor.shape[axis];
            rest /= tensor.shape[axis];
            taken &= ranges.get(axis).is_none_or(|r| {
                at >= r.start && at < r.stop && (at - r.start).is_multiple_of(r.step)
            });
        }
        if taken {
            out.extend_from_slice(element);
        }
    }
    out
}

#[test]
fn slices_are_what_the_definition_says() {
    let tensor = Tensor::new("t", Dtype::I32, &[7, 11, 5], 3);
    let (checkpoint, _) = counted(std::slice::from_ref(&tensor));
    let stored = checkpoint.tensor("t").unwrap();
    let range = |start, stop, step| Slice { start, stop, step };
    let mut cases: Vec<Vec<Slice>> = vec![
        vec![],
        vec![range(2, 3, 1)],
        vec![range(0, 0, 1)],
        vec![range(5, 3, 1)],
    ];
    for (a, b, c) in [(1, 2, 3), (2, 1, 1), (3, 4, 2), (7, 11, 5)] {
        cases.push(vec![range(0, 7, a), range(1, 10, b), range(0, 5, c)]);
        cases.push(vec![range(1, 7, a), range(0, 11, b)]);
        cases.push(vec![Slice::full(7), range(3, 9, b), range(1, 4, 1)]);
    }
    for ranges in cases {
        let slice = stored.slice(&ranges).unwrap();
        let expected = naive(&tensor, &ranges);
        assert_eq!(slice.read().unwrap(), expected, "{ranges:?}");
        assert_eq!(slice.byte_len(), expected.len() as u64);
        assert_eq!(slice.shape().iter().product::<u64>() * 4, slice.byte_len());
        assert_eq!((slice.shape().len(), slice.tensor().name()), (3, "t"));
    }
    for ranges in [
        vec![range(0, 8, 1)],
        vec![range(0, 1, 0)],
        vec![range(0, 1, 1); 4],
    ] {
        assert_eq!(stored.slice(&ranges).unwrap_err().code(), "SLICE");
    }
    let mut wrong = [0; 3];
    let slice = stored.slice(&[]).unwrap();
    assert_eq!(
        slice
            .read_into(&mut wrong, &Options::default())
            .unwrap_err()
            .code(),
        "BUFFER_SIZE"
    );
}

#[test]
fn a_slice_reads_only_what_it_covers() {
    let tensor = Tensor::new("t", Dtype::F32, &[1000, 1000], 3);
    let (checkpoint, count) = counted(std::slice::from_ref(&tensor));
    let stored = checkpoint.tensor("t").unwrap();
    let row = stored
        .slice(&[Slice {
            start: 500,
            stop: 501,
            step: 1,
        }])
        .unwrap();
    assert_eq!(row.read().unwrap(), tensor.data[2_000_000..2_004_000]);
    assert_eq!(count.swap(0, Ordering::Relaxed), 4000);
    // Rows far enough apart are read one by one.
    let sparse = stored
        .slice(&[Slice {
            start: 0,
            stop: 1000,
            step: 100,
        }])
        .unwrap();
    assert_eq!(sparse.read().unwrap().len(), 40_000);
    assert_eq!(count.swap(0, Ordering::Relaxed), 40_000);
    // A column's elements lie close together: what is between is read with them, up to GAP for each.
    let column = stored
        .slice(&[
            Slice::full(1000),
            Slice {
                start: 7,
                stop: 8,
                step: 1,
            },
        ])
        .unwrap();
    assert_eq!(
        column.read().unwrap(),
        naive(
            &tensor,
            &[
                Slice::full(1000),
                Slice {
                    start: 7,
                    stop: 8,
                    step: 1
                }
            ]
        )
    );
    let read = count.load(Ordering::Relaxed);
    assert!(
        read <= 4_000_000,
        "{read} bytes for 4000, at most {} allowed",
        1000 * (4 + GAP)
    );
}

#[test]
fn views_and_private_maps_show_the_file() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("m.safetensors");
    save(&refs(&model(1)), &path, &Save::default()).unwrap();
    let file = Checkpoint::open(&path).unwrap();
    let memory =
        Checkpoint::from_bytes(fs::read(&path).unwrap(), "<bytes>", &OpenOptions::default())
            .unwrap();
    for checkpoint in [&file, &memory] {
        for tensor in model(1) {
            assert_eq!(checkpoint.view(&tensor.name).unwrap(), tensor.data);
            assert_eq!(
                checkpoint.tensor(&tensor.name).unwrap().view().unwrap(),
                tensor.data
            );
        }
        assert_eq!(
            checkpoint.view("absent").unwrap_err().code(),
            "UNKNOWN_TENSOR"
        );
    }
    let map = file.private_map(0).unwrap();
    assert_eq!(map.as_slice(), fs::read(&path).unwrap());
    assert!(Arc::ptr_eq(&map, &file.private_map(0).unwrap()));
    assert_eq!(
        memory.private_map(0).unwrap_err().io().unwrap().kind(),
        std::io::ErrorKind::Unsupported
    );
    assert!(file.source(0).is_some() && file.source(1).is_none());
}

#[test]
fn many_tensors_are_read_at_once_into_the_callers_buffers() {
    let (checkpoint, count) = counted(&model(1));
    let mut buffers: Vec<Vec<u8>> = checkpoint
        .iter()
        .map(|t| vec![0; t.byte_len() as usize])
        .collect();
    let jobs = buffers
        .iter_mut()
        .enumerate()
        .map(|(i, b)| (i, &mut b[..]))
        .collect();
    let report = checkpoint.read_many(jobs, &Options::default()).unwrap();
    assert_eq!(
        (report.bytes, count.load(Ordering::Relaxed)),
        (checkpoint.total_bytes(), checkpoint.total_bytes())
    );
    for (tensor, buffer) in checkpoint.iter().zip(&buffers) {
        assert_eq!(*buffer, content_of(&model(1))[tensor.name()].2);
    }
    assert_eq!(
        checkpoint
            .read_many(vec![(99, &mut [])], &Options::default())
            .unwrap_err()
            .code(),
        "UNKNOWN_TENSOR"
    );
    assert_eq!(
        checkpoint
            .read_many(vec![(1, &mut [])], &Options::default())
            .unwrap_err()
            .code(),
        "BUFFER_SIZE"
    );
}

#[test]
fn a_load_selects_and_reports() {
    let (checkpoint, count) = counted(&model(1));
    assert!(checkpoint.report().is_none());
    let all = checkpoint.load(&Load::default()).unwrap();
    assert_eq!(
        (all.report().loaded, all.report().bytes_read),
        (8, count.swap(0, Ordering::Relaxed))
    );
    for (tensor, bytes) in all.iter() {
        assert_eq!(tensor.begin as u64 % ALIGN, 0);
        let expected = &content_of(&model(1))[&tensor.name];
        assert_eq!(
            (tensor.dtype, &tensor.shape, bytes),
            (expected.0, &expected.1, &expected.2[..])
        );
    }
    let select = ["layers.0.*", "scale", "scale", "nothing*"]
        .map(str::to_owned)
        .to_vec();
    let some = checkpoint
        .load(&Load {
            select,
            ..Load::default()
        })
        .unwrap();
    let mut names: Vec<&str> = some.iter().map(|(tensor, _)| &*tensor.name).collect();
    names.sort_unstable();
    assert_eq!(names, ["layers.0.down", "layers.0.up", "scale"]);
    assert_eq!(some.report().missing, ["nothing*"]);
    assert_eq!(
        count.load(Ordering::Relaxed),
        2048 * 2 + 8,
        "only what was selected is read"
    );
    assert_eq!(checkpoint.report().as_ref(), Some(some.report()));
    assert!(some.get("scale").is_some() && some.get("mask").is_none());
    let (buffer, tensors, _) = some.into_parts();
    assert!(tensors.iter().all(|tensor| tensor.end <= buffer.len()));
    let error = checkpoint
        .load(&Load {
            select: vec!["scal".to_owned()],
            ..Load::default()
        })
        .unwrap_err();
    assert_eq!(
        (error.code(), error.suggestions()),
        ("SELECT", &["scale".to_owned()][..])
    );
}

#[test]
fn a_load_casts_floats_and_leaves_the_rest() {
    let large = Tensor::new("large", Dtype::BF16, &[3_000_001], 9);
    let mut tensors = model(1);
    tensors.push(large);
    let (checkpoint, _) = counted(&tensors);
    let seen = Mutex::new(Vec::new());
    let progress = |p: Progress| seen.lock().unwrap().push(p);
    let load = Load {
        dtype: Some(Dtype::F32),
        progress: Some(OnProgressOf(&progress)),
        ..Load::default()
    };
    let loaded = checkpoint.load(&load).unwrap();
    for (tensor, bytes) in loaded.iter() {
        let (from, _, data) = &content_of(&tensors)[&tensor.name];
        if cast::castable(*from, Dtype::F32) {
            let mut expected =
                vec![0; cast::cast_len(*from, data.len() as u64, Dtype::F32).unwrap() as usize];
            cast::cast(*from, data, Dtype::F32, &mut expected).unwrap();
            assert!(
                tensor.dtype == Dtype::F32 && bytes == expected,
                "{}",
                tensor.name
            );
        } else {
            assert!(tensor.dtype == *from && bytes == data, "{}", tensor.name);
        }
    }
    assert_eq!(loaded.get("large").unwrap().0.dtype, Dtype::F32);
    assert_eq!(loaded.get("mask").unwrap().0.dtype, Dtype::U8);
    let seen = seen.into_inner().unwrap();
    let last = seen.iter().map(|p| p.done).max().unwrap();
    assert!(
        seen.iter()
            .all(|p| p.total == last && p.total == checkpoint.total_bytes())
    );
}

#[test]
fn a_cancelled_load_ends() {
    let (checkpoint, _) = counted(&model(1));
    let cancel = Cancel::new();
    cancel.cancel();
    let error = checkpoint
        .load(&Load {
            cancel: Some(&cancel),
            ..Load::default()
        })
        .unwrap_err();
    assert_eq!(
        (error.code(), error.kind()),
        ("CANCELLED", tonnage::ErrorKind::Cancelled)
    );
}
