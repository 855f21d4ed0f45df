//! What the fuzz targets hold true of any bytes. Each function panics where a claim fails; the
//! targets feed them random input, and `crates/format/tests/fuzz_replay.rs` the committed corpus.

#![allow(dead_code, reason = "each target uses one of them")]

use arbitrary::Unstructured;
use tonnage_format::slice::{Range, Runs, runs, shape_of};
use tonnage_format::{
    Align, Class, Dtype, Error, Header, Index, IndexBuilder, Order, ReadOptions, Reason, Step,
    TensorDtype, TensorInfo, TensorSpec, WriteOptions, check_shard_path, layout, probe,
};

/// A header reader: `data` is judged as a whole file, and as the JSON of one.
pub fn header(data: &[u8]) {
    file(data, Some(data.len() as u64));
    let mut framed = (data.len() as u64).to_le_bytes().to_vec();
    framed.extend_from_slice(data);
    file(&framed, None);
}

fn file(bytes: &[u8], len: Option<u64>) {
    let strict = judge(bytes, len, &ReadOptions::strict());
    let compat = judge(bytes, len, &ReadOptions::compat());
    let Ok(strict) = strict else {
        return;
    };
    // What the strict profile accepts the reference's accepts with the same content; it refuses
    // only names of dtypes it does not know and numbers, in fields it skips, beyond a double.
    match compat {
        Ok(compat) => {
            assert!(strict.iter().eq(compat.iter()));
            let metadata = |header: &Header<_>| -> Option<Vec<(String, String)>> {
                let pairs = header.metadata()?;
                Some(pairs.iter().map(|(k, v)| (k.into(), v.into())).collect())
            };
            assert_eq!(metadata(&strict), metadata(&compat));
        }
        Err(error) if error.reason() == Reason::UnsupportedDtype => {
            assert!(strict.iter().any(|tensor| tensor.dtype.known().is_err()));
        }
        Err(error) => assert_eq!(error.reason(), Reason::IntegerRange, "{error}"),
    }
    written_again(&strict);
}

/// Parses, and checks everything that must hold of the outcome by itself.
fn judge<'a>(
    bytes: &'a [u8],
    len: Option<u64>,
    options: &ReadOptions,
) -> Result<Header<&'a [u8]>, Error> {
    let parsed = Header::parse(bytes, len, options);
    match (probe(bytes, len, options), &parsed) {
        (Ok(Step::Done(end)), Ok(header)) => assert_eq!(end, header.data_start()),
        (Ok(Step::Done(_)), Err(_)) | (Ok(Step::Need { .. }), Err(_)) => {}
        (Err(probed), Err(error)) => assert_eq!(probed, *error),
        (probed, Ok(_)) => panic!("parsed, but probing says {probed:?}"),
    }
    match &parsed {
        Ok(header) => accepted(header),
        Err(error) => refused(error),
    }
    parsed
}

fn refused(error: &Error) {
    assert!(
        error.class() == Class::Malformed || error.class() == Class::Unsupported,
        "{error}"
    );
    assert!(
        error.to_string().len() < 4096,
        "a message of unbounded length"
    );
    assert!(!error.clause().is_empty());
    error.reference_text();
}

fn accepted(header: &Header<&[u8]>) {
    // In the order of their bytes, the tensors tile the data section.
    let mut end = 0;
    let mut seen = 0;
    for tensor in header.iter_by_offset() {
        assert_eq!(tensor.begin, end);
        assert!(tensor.end >= tensor.begin);
        if let TensorDtype::Known(dtype) = tensor.dtype {
            assert_eq!(bytes_of(dtype, tensor.shape), Some(tensor.byte_len()));
        }
        end = tensor.end;
        seen += 1;
    }
    assert_eq!((seen, end), (header.len(), header.data_len()));
    // Each name once, and found.
    let names: Vec<&str> = header.iter_by_name().map(|tensor| tensor.name).collect();
    assert!(names.is_sorted_by(|a, b| a < b));
    assert_eq!(names.len(), header.len());
    for (i, tensor) in header.iter().enumerate() {
        assert_ne!(tensor.name, "__metadata__");
        assert_eq!(header.position(tensor.name), Some(i));
        assert_eq!(header.tensor(i), Some(tensor));
    }
    if let Some(metadata) = header.metadata() {
        let keys: std::collections::BTreeSet<&str> = metadata.iter().map(|(key, _)| key).collect();
        assert_eq!(keys.len(), metadata.len());
        assert!(
            metadata
                .iter()
                .all(|(key, value)| metadata.get(key) == Some(value))
        );
    }
    assert!(header.padding() < header.data_start() - 8);
    header.lints().iter().for_each(|lint| {
        lint.to_string();
    });
}

/// Bytes of a tensor, in 128 bits and without the code under test. The reference lets a zero
/// excuse what follows it.
fn bytes_of(dtype: Dtype, shape: &[u64]) -> Option<u64> {
    if shape.contains(&0) {
        return Some(0);
    }
    let bits = shape
        .iter()
        .try_fold(dtype.bitsize() as u128, |bits, &extent| {
            bits.checked_mul(extent as u128)
        })?;
    (bits % 8 == 0)
        .then_some(bits / 8)
        .and_then(|bytes| u64::try_from(bytes).ok())
}

/// What was accepted can be written, is read back as it was, and then written to the same bytes.
fn written_again(header: &Header<&[u8]>) {
    let by_offset: Vec<TensorInfo<'_>> = header.iter_by_offset().collect();
    let specs: Option<Vec<TensorSpec<'_>>> = by_offset
        .iter()
        .map(
            |&TensorInfo {
                 name, dtype, shape, ..
             }| {
                dtype
                    .known()
                    .ok()
                    .map(|dtype| TensorSpec { name, dtype, shape })
            },
        )
        .collect();
    let Some(specs) = specs else {
        return;
    };
    let metadata: Option<Vec<(&str, &str)>> = header.metadata().map(|m| m.iter().collect());
    let options = WriteOptions {
        order: Order::Given,
        ..WriteOptions::default()
    };
    let first = layout(&specs, metadata.as_deref(), &options).expect("what was read");
    let again = Header::parse(
        &first.header[..],
        Some(first.file_len),
        &ReadOptions::strict(),
    )
    .expect("what was written");
    assert!(again.iter().eq(by_offset.iter().copied()));
    assert_eq!(
        first.ranges,
        by_offset
            .iter()
            .map(|t| (t.begin, t.end))
            .collect::<Vec<_>>()
    );
    let mut sorted = metadata;
    sorted.iter_mut().for_each(|pairs| pairs.sort_unstable());
    let pairs = again.metadata().map(|m| m.iter().collect::<Vec<_>>());
    assert_eq!(pairs, sorted);
    assert_eq!(
        layout(&specs, pairs.as_deref(), &options).as_ref(),
        Ok(&first)
    );
}

/// An index reader.
pub fn index(data: &[u8]) {
    let index = match Index::parse(data, &ReadOptions::strict()) {
        Ok(index) => index,
        Err(error) => return refused(&error),
    };
    let mut builder = IndexBuilder::new();
    let mut files: Vec<&str> = Vec::new();
    let mut names = std::collections::BTreeMap::new();
    for (name, file) in index.iter() {
        assert_eq!(index.get(name), Some(file));
        assert!(names.insert(name, file).is_none());
        if !files.contains(&file) {
            files.push(file);
        }
        builder.add(name, file, 1);
    }
    assert_eq!(names.len(), index.len());
    assert_eq!(index.files(), files);
    for file in &files {
        check_shard_path(file).expect("a path that was accepted");
        assert!(!file.starts_with('/') && !file.contains('\\') && !file.contains('\0'));
        assert!(file.ends_with(".safetensors"));
        assert!(file.split('/').all(|part| !matches!(part, "" | "." | "..")));
    }
    let text = builder.finish().expect("what was read");
    let again = Index::parse(text.as_bytes(), &ReadOptions::strict()).expect("what was written");
    assert!(
        again
            .iter()
            .eq(names.iter().map(|(name, file)| (*name, *file)))
    );
    assert_eq!(again.total_size, Some(names.len() as u64));
    if let Some(metadata) = index.metadata_json() {
        assert!(std::str::from_utf8(data).is_ok_and(|text| text.contains(metadata)));
    }
}

/// Writer, then reader, over a structure that the bytes choose.
pub fn roundtrip(data: &[u8]) {
    let _ = try_roundtrip(&mut Unstructured::new(data));
}

fn try_roundtrip(u: &mut Unstructured<'_>) -> arbitrary::Result<()> {
    let options = WriteOptions {
        order: *u.choose(&[Order::Canonical, Order::Given])?,
        align: *u.choose(&[Align::Eight, Align::Page])?,
        reserve: u.int_in_range(0..=300)?,
    };
    let metadata: Option<Vec<(&str, &str)>> = u.arbitrary()?;
    let rows: Vec<(&str, u8, Vec<u64>)> = u.arbitrary()?;
    let specs: Vec<TensorSpec<'_>> = rows
        .iter()
        .map(|(name, dtype, shape)| TensorSpec {
            name,
            dtype: Dtype::ALL[*dtype as usize % Dtype::ALL.len()],
            shape,
        })
        .collect();
    let plan = match layout(&specs, metadata.as_deref(), &options) {
        Ok(plan) => plan,
        Err(error) => {
            assert_eq!(error.class(), Class::Usage);
            error.to_string();
            return Ok(());
        }
    };
    let align = if options.align == Align::Page {
        4096
    } else {
        8
    };
    assert_eq!(plan.data_start() % align, 0);
    let wide = plan.ranges.iter().any(|&(_, end)| end > i64::MAX as u64)
        || rows
            .iter()
            .any(|(_, _, shape)| shape.iter().any(|&extent| extent > i64::MAX as u64));
    let parsed = Header::parse(
        &plan.header[..],
        Some(plan.file_len),
        &ReadOptions::strict(),
    );
    if wide {
        // Sizes past 2^63-1 can be laid out for the reference's profile only (spec 3.10).
        assert_eq!(
            parsed.err().map(|error| error.reason()),
            Some(Reason::IntegerRange)
        );
        return Ok(());
    }
    let header = parsed.expect("what was written");
    assert_eq!(header.len(), specs.len());
    assert!(header.padding() >= options.reserve);
    for (spec, range) in specs.iter().zip(&plan.ranges) {
        let tensor = header.get(spec.name).expect(spec.name);
        assert_eq!(tensor.dtype, TensorDtype::Known(spec.dtype));
        assert_eq!(tensor.shape, spec.shape);
        assert_eq!((tensor.begin, tensor.end), *range);
    }
    let order: Vec<&str> = plan.order.iter().map(|&at| specs[at].name).collect();
    assert!(header.iter().map(|tensor| tensor.name).eq(order));
    assert!(header.lints().iter().all(|lint| lint.code() != "UNALIGNED"));
    let mut sorted = metadata;
    sorted.iter_mut().for_each(|pairs| pairs.sort_unstable());
    assert_eq!(
        header.metadata().map(|m| m.iter().collect::<Vec<_>>()),
        sorted
    );
    Ok(())
}

/// Slices: the runs are the elements, one by one, in order.
pub fn slice(data: &[u8]) {
    let _ = try_slice(&mut Unstructured::new(data));
}

fn try_slice(u: &mut Unstructured<'_>) -> arbitrary::Result<()> {
    let dtype = *u.choose(Dtype::ALL)?;
    let rank = u.int_in_range(0..=5)?;
    let small = u.arbitrary::<bool>()?;
    let most = if small { 7 } else { u64::MAX };
    let mut shape = Vec::new();
    let mut ranges = Vec::new();
    for _ in 0..rank {
        shape.push(u.int_in_range(0..=most)?);
        ranges.push(Range {
            start: u.int_in_range(0..=most)?,
            stop: u.int_in_range(0..=most)?,
            step: u.int_in_range(0..=if small { 3 } else { most })?,
        });
    }
    ranges.truncate(u.int_in_range(0..=rank)?);
    match runs(dtype, &shape, &ranges) {
        Err(error) => {
            assert!(matches!(
                error.reason(),
                Reason::Slice | Reason::PartialByte | Reason::SizeOverflow
            ));
            if error.reason() == Reason::PartialByte {
                assert!(dtype.bitsize() < 8);
            }
            error.to_string();
        }
        Ok(found) => {
            bounded(dtype, &shape, &ranges, &found);
            if small {
                exact(dtype, &shape, &ranges, found);
            }
        }
    }
    Ok(())
}

/// Of any tensor, however large: the first thousand runs lie inside it.
fn bounded(dtype: Dtype, shape: &[u64], ranges: &[Range], found: &Runs) {
    let size = bytes_of(dtype, shape).unwrap_or(u64::MAX / 8 + 1);
    assert!(found.byte_len() <= size);
    for (at, len) in found.clone().take(1000) {
        assert!(len > 0 && at.checked_add(len).is_some_and(|end| end <= size));
    }
    assert_eq!(shape_of(shape, ranges).len(), shape.len());
}

/// Of a small one: bit by bit what indexing gives.
fn exact(dtype: Dtype, shape: &[u64], ranges: &[Range], found: Runs) {
    let mut elements = vec![0_u64];
    for (axis, &extent) in shape.iter().enumerate() {
        let range = ranges.get(axis).copied().unwrap_or(Range::full(extent));
        elements = elements
            .iter()
            .flat_map(|&at| {
                let taken = (range.start..range.stop).step_by(range.step as usize);
                taken.map(move |k| at * extent + k)
            })
            .collect();
    }
    let bits = dtype.bitsize() as u64;
    let wanted = elements.iter().flat_map(|&at| at * bits..(at + 1) * bits);
    let total = found.byte_len();
    let runs_counted = found.count_runs();
    let runs: Vec<(u64, u64)> = found.collect();
    assert_eq!(runs.len() as u64, runs_counted);
    assert_eq!(runs.iter().map(|run| run.1).sum::<u64>(), total);
    assert!(wanted.eq(runs.iter().flat_map(|&(at, len)| at * 8..(at + len) * 8)));
}
