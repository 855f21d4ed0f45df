//! Files both ways with the reference crate, over random tensors of every dtype: the bytes we write
//! are the bytes it writes, it reads ours, and we read its.

// The reference crate wants a file system that wasm32 has not.
#![cfg(not(target_family = "wasm"))]
#![allow(
    clippy::disallowed_macros,
    reason = "a test may say what it counted; the crate prints nothing"
)]

mod proof;

use std::collections::{BTreeMap, HashMap};

use proof::Random;
use proof::generate::name;
use safetensors::SafeTensors;
use safetensors::tensor::TensorView;
use tonnage_format::{Dtype, Header, ReadOptions, TensorSpec, WriteOptions, layout};

/// The reference's dtype of the same name.
fn reference_dtype(dtype: Dtype) -> safetensors::Dtype {
    serde_json::from_value(dtype.name().into()).unwrap()
}

struct Tensor {
    name: String,
    dtype: Dtype,
    shape: Vec<u64>,
    data: Vec<u8>,
}

/// A few tensors, the first of the wanted dtype; shapes of up to four dimensions, some empty.
fn tensors(r: &mut Random, first: Dtype) -> Vec<Tensor> {
    let mut found: BTreeMap<String, Tensor> = BTreeMap::new();
    for i in 0..1 + r.below(6) {
        let dtype = if i == 0 { first } else { r.pick(Dtype::ALL) };
        let mut shape: Vec<u64> = (0..r.below(5))
            .map(|_| {
                if r.one_in(12) {
                    0
                } else {
                    1 + r.below(5) as u64
                }
            })
            .collect();
        if dtype.bytes_of(&shape).is_err() {
            shape.push(4);
        }
        let len = dtype.bytes_of(&shape).unwrap();
        let data = (0..len).map(|_| r.next() as u8).collect();
        let name = name(r);
        found.insert(
            name.clone(),
            Tensor {
                name,
                dtype,
                shape,
                data,
            },
        );
    }
    let mut found: Vec<Tensor> = found.into_values().collect();
    r.shuffle(&mut found);
    found
}

fn ours(tensors: &[Tensor], metadata: Option<&[(&str, &str)]>) -> Vec<u8> {
    let specs: Vec<TensorSpec<'_>> = tensors
        .iter()
        .map(
            |Tensor {
                 name, dtype, shape, ..
             }| TensorSpec {
                name,
                dtype: *dtype,
                shape,
            },
        )
        .collect();
    let plan = layout(&specs, metadata, &WriteOptions::default()).unwrap();
    let mut file = plan.header;
    for at in plan.order {
        file.extend_from_slice(&tensors[at].data);
    }
    assert_eq!(file.len() as u64, plan.file_len);
    file
}

fn theirs(tensors: &[Tensor], metadata: Option<&[(&str, &str)]>) -> Vec<u8> {
    let views = tensors.iter().map(|tensor| {
        let shape = tensor.shape.iter().map(|&extent| extent as usize).collect();
        let dtype = reference_dtype(tensor.dtype);
        (
            &tensor.name,
            TensorView::new(dtype, shape, &tensor.data).unwrap(),
        )
    });
    let metadata: Option<HashMap<String, String>> = metadata.map(|pairs| {
        pairs
            .iter()
            .map(|&(key, value)| (key.to_owned(), value.to_owned()))
            .collect()
    });
    safetensors::serialize(views, metadata).unwrap()
}

fn we_read(file: &[u8], tensors: &[Tensor], metadata: Option<&[(&str, &str)]>) {
    let header = Header::parse(file, Some(file.len() as u64), &ReadOptions::strict()).unwrap();
    assert_eq!(header.len(), tensors.len());
    for tensor in tensors {
        let found = header.get(&tensor.name).unwrap();
        assert_eq!(found.dtype.known().unwrap(), tensor.dtype);
        assert_eq!(found.shape, tensor.shape);
        let start = header.data_start() as usize;
        assert_eq!(
            file[start + found.begin as usize..start + found.end as usize],
            tensor.data
        );
    }
    let sorted = |mut pairs: Vec<(&str, &str)>| {
        pairs.sort_unstable();
        pairs
            .into_iter()
            .map(|(k, v)| (k.to_owned(), v.to_owned()))
            .collect::<Vec<_>>()
    };
    let found = header
        .metadata()
        .map(|metadata| sorted(metadata.iter().collect()));
    assert_eq!(found, metadata.map(|pairs| sorted(pairs.to_vec())));
}

fn it_reads(file: &[u8], tensors: &[Tensor], metadata: Option<&[(&str, &str)]>) {
    let read = SafeTensors::deserialize(file).unwrap();
    assert_eq!(read.len(), tensors.len());
    for tensor in tensors {
        let view = read.tensor(&tensor.name).unwrap();
        let shape: Vec<u64> = view.shape().iter().map(|&extent| extent as u64).collect();
        assert_eq!(view.dtype(), reference_dtype(tensor.dtype));
        assert_eq!(shape, tensor.shape);
        assert_eq!(view.data(), tensor.data);
    }
    let (_, read) = SafeTensors::read_metadata(file).unwrap();
    let found: Option<BTreeMap<&str, &str>> = read.metadata().as_ref().map(|map| {
        map.iter()
            .map(|(key, value)| (key.as_str(), value.as_str()))
            .collect()
    });
    assert_eq!(found, metadata.map(|pairs| pairs.iter().copied().collect()));
}

/// The reference writes metadata in a random order; this sorts it, byte for byte otherwise.
fn with_metadata_sorted(file: &[u8], metadata: &[(&str, &str)]) -> Vec<u8> {
    let end = 8 + u64::from_le_bytes(*file.first_chunk().unwrap()) as usize;
    let text = std::str::from_utf8(&file[8..end]).unwrap();
    let map: BTreeMap<&str, &str> = metadata.iter().copied().collect();
    let sorted = format!(
        "{{\"__metadata__\":{}",
        serde_json::to_string(&map).unwrap()
    );
    let rest = &text[sorted.len()..];
    [&file[..8], sorted.as_bytes(), rest.as_bytes(), &file[end..]].concat()
}

fn run(count: u64) {
    let seed = proof::seed();
    let mut with_keys = [0_u64; 4];
    for number in 0..count {
        let r = &mut Random::of_case(seed, number);
        let tensors = tensors(r, Dtype::ALL[number as usize % Dtype::ALL.len()]);
        let keys = r.pick(&[None, Some(1), Some(1), Some(2), Some(5)]);
        let map: Option<BTreeMap<String, String>> =
            keys.map(|keys| (0..keys).map(|_| (name(r), name(r))).collect());
        let mut pairs: Option<Vec<(&str, &str)>> = map.as_ref().map(|map| {
            map.iter()
                .map(|(key, value)| (key.as_str(), value.as_str()))
                .collect()
        });
        if let Some(pairs) = &mut pairs {
            r.shuffle(pairs);
        }
        let metadata = pairs.as_deref();
        let written = ours(&tensors, metadata);
        let reference = theirs(&tensors, metadata);
        let canonical = match metadata {
            Some(pairs) if pairs.len() > 1 => with_metadata_sorted(&reference, pairs),
            _ => reference.clone(),
        };
        assert!(
            written == canonical,
            "case {number} of seed {seed}: other bytes"
        );
        it_reads(&written, &tensors, metadata);
        we_read(&reference, &tensors, metadata);
        with_keys[metadata.map_or(0, <[_]>::len).min(3)] += 1;
    }
    println!("{count} round trips of seed {seed}; with 0, 1, 2, more keys: {with_keys:?}");
    assert!(count < 1000 || with_keys.iter().all(|&cases| cases > 0));
}

#[test]
fn bytes_are_the_references_and_each_reads_the_others() {
    run(proof::cases(22_000));
}

/// `make test-slow`.
#[test]
#[ignore = "minutes: half a million files"]
fn half_a_million_files_are_the_same() {
    run(proof::cases(500_000));
}
