//! `tonnage::compat` beside the reference crate: what is equal, and where we are right instead.

use std::borrow::Cow;
use std::collections::HashMap;
use std::error::Error as _;
use std::path::Path;

use proptest::prelude::*;
use safetensors as reference;
use tonnage::compat::slice::{IndexOp, InvalidSlice, TensorIndexer, slice_byte_ranges};
use tonnage::compat::{
    Dtype, Metadata, SafeTensorError, SafeTensors, TensorInfo, TensorView, View, serialize,
    serialize_to_file,
};
use tonnage::format::ReadOptions;

fn file(json: &str, data: usize) -> Vec<u8> {
    let mut file = (json.len() as u64).to_le_bytes().to_vec();
    file.extend_from_slice(json.as_bytes());
    file.resize(file.len() + data, 0);
    file
}

fn info(dtype: Dtype, shape: &[usize], data_offsets: (usize, usize)) -> TensorInfo {
    TensorInfo {
        dtype,
        shape: shape.to_vec(),
        data_offsets,
    }
}

/// The reference's dtype of the same name.
fn theirs(dtype: Dtype) -> reference::Dtype {
    serde_json::from_value(serde_json::to_value(dtype).unwrap()).unwrap()
}

#[test]
fn every_dtype_has_the_references_name_size_and_place() {
    for &dtype in Dtype::ALL {
        let other = theirs(dtype);
        assert_eq!(other.to_string(), dtype.to_string());
        assert_eq!(other.bitsize(), dtype.bitsize());
        for &second in Dtype::ALL {
            assert_eq!(other.cmp(&theirs(second)), dtype.cmp(&second));
        }
    }
}

fn tensors() -> impl Strategy<Value = Vec<(String, Dtype, Vec<usize>)>> {
    let shape = prop::collection::vec(0_usize..5, 0..4);
    let tensor = (any::<String>(), 0..Dtype::ALL.len(), shape);
    prop::collection::vec(tensor, 0..12).prop_map(|tensors| {
        let mut unique = HashMap::new();
        for (name, dtype, mut shape) in tensors {
            let dtype = Dtype::ALL[dtype];
            if dtype.bitsize() < 8 {
                shape.push(4);
            }
            unique.insert(name, (dtype, shape));
        }
        unique
            .into_iter()
            .map(|(name, (dtype, shape))| (name, dtype, shape))
            .collect()
    })
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 2000, failure_persistence: None, ..ProptestConfig::default() })]

    /// Bytes are equal both ways, and each reads what the other wrote.
    #[test]
    fn files_are_the_references(tensors in tensors(), note in prop::option::of((any::<String>(), any::<String>()))) {
        let data: Vec<u8> = (0..1 << 14).map(|i| (i * 7 % 251) as u8).collect();
        let bytes = |dtype: Dtype, shape: &[usize]| {
            &data[..shape.iter().product::<usize>() * dtype.bitsize() / 8]
        };
        let metadata = note.map(|pair| HashMap::from([pair]));
        let ours: Vec<_> = tensors.iter().map(|(name, dtype, shape)| {
            (name, TensorView::new(*dtype, shape.clone(), bytes(*dtype, shape)).unwrap())
        }).collect();
        let others = tensors.iter().map(|(name, dtype, shape)| {
            (name, reference::tensor::TensorView::new(theirs(*dtype), shape.clone(), bytes(*dtype, shape)).unwrap())
        });
        let expected = reference::serialize(others, metadata.clone()).unwrap();
        let found = serialize(ours.iter().map(|(name, view)| (name, view)), metadata.clone()).unwrap();
        prop_assert_eq!(&found, &expected);

        let read = SafeTensors::deserialize(&expected).unwrap();
        prop_assert_eq!(read.len(), tensors.len());
        prop_assert_eq!(read.is_empty(), tensors.is_empty());
        for (name, view) in &ours {
            prop_assert_eq!(&read.tensor(name).unwrap(), view);
        }
        let (length, header) = SafeTensors::read_metadata(&expected).unwrap();
        let (their_length, their_header) = reference::SafeTensors::read_metadata(&found).unwrap();
        prop_assert_eq!(length, their_length);
        prop_assert_eq!(header.metadata(), their_header.metadata());
        // Empty tensors at one place come in any order from the reference.
        let taking_bytes = |keys: Vec<String>, empty: &dyn Fn(&str) -> bool| -> Vec<String> {
            keys.into_iter().filter(|name| !empty(name)).collect()
        };
        let empty = |name: &str| header.info(name).is_none_or(|info| info.shape.contains(&0));
        prop_assert_eq!(taking_bytes(header.offset_keys(), &empty), taking_bytes(their_header.offset_keys(), &empty));
        prop_assert_eq!(header.data_len(), their_header.data_len());
        prop_assert_eq!(serde_json::to_value(&header).unwrap(), serde_json::to_value(&their_header).unwrap());
        let names: Vec<&str> = read.iter().map(|(name, _)| name).collect();
        prop_assert_eq!(&names, &read.names());
        prop_assert_eq!(names, header.offset_keys());
    }

    /// A slice has the reference's bytes and shape wherever the reference gives any.
    #[test]
    fn slices_are_the_references(
        dtype in 0..Dtype::ALL.len(),
        dims in prop::collection::vec((1_usize..6, 0_usize..6, 0_usize..6, 1_usize..4, 0..3), 0..4),
        given in 0_usize..5,
    ) {
        use std::{num::NonZeroUsize, ops::Bound};
        let dtype = Dtype::ALL[dtype];
        let shape: Vec<usize> = dims.iter().map(|dim| dim.0).collect();
        let bits = shape.iter().product::<usize>() * dtype.bitsize();
        prop_assume!(bits.is_multiple_of(8));
        let index = |&(_, a, b, step, kind): &(usize, usize, usize, usize, i32)| match kind {
            0 => (TensorIndexer::Select(a), reference::slice::TensorIndexer::Select(a)),
            _ => {
                // Ranges that are empty or reversed are ours alone: the reference panics or takes all.
                let (start, stop) = (Bound::Included(a.min(b)), Bound::Included(a.max(b)));
                let stop = if kind == 1 { stop } else { Bound::Unbounded };
                let step = NonZeroUsize::new(step).unwrap();
                (TensorIndexer::Narrow(start, stop, step), reference::slice::TensorIndexer::Narrow(start, stop, step))
            }
        };
        let (ours, others): (Vec<_>, Vec<_>) = dims.iter().take(given).map(index).unzip();
        prop_assert_eq!(format!("{ours:?}"), format!("{others:?}"));
        for (a, b) in ours.iter().zip(&others) {
            prop_assert_eq!(a.to_string(), b.to_string());
        }
        let in_bounds = dims.iter().take(given).all(|&(extent, a, b, _, kind)| match kind {
            0 => a < extent,
            1 => a.max(b) < extent,
            _ => a.min(b) < extent,
        });
        // The one range that the reference refuses and we take, as Rust's slices do.
        let empty_at_end = dims.iter().take(given).any(|&(extent, a, b, _, kind)| kind > 1 && a.min(b) == extent);
        let expected = reference::slice::slice_byte_ranges(theirs(dtype), &shape, &others);
        match (slice_byte_ranges(dtype, &shape, &ours), expected) {
            (Ok((ranges, newshape)), Ok((their_ranges, their_newshape))) => {
                prop_assert!(in_bounds);
                let each = |ranges: Vec<(usize, usize)>| ranges.into_iter().flat_map(|(a, b)| a..b).collect::<Vec<_>>();
                prop_assert_eq!(each(ranges), each(their_ranges));
                prop_assert_eq!(newshape, their_newshape);
            }
            // Both refuse; a slice that is wrong in two ways may be refused for either.
            (Err(InvalidSlice::MisalignedSlice), Err(_)) | (Err(_), Err(reference::slice::InvalidSlice::MisalignedSlice)) => {}
            (Err(_), Err(_)) if empty_at_end => {}
            (Err(error), Err(other)) => prop_assert_eq!(error.to_string(), other.to_string()),
            // Of elements that share bytes the reference refuses some that together are whole bytes; we give those.
            (Ok((ranges, _)), Err(reference::slice::InvalidSlice::MisalignedSlice)) if !empty_at_end => {
                prop_assert!(in_bounds);
                let mut chosen = vec![0];
                for (at, &(extent, a, b, step, kind)) in dims.iter().enumerate() {
                    let picks: Vec<usize> = match kind {
                        _ if at >= given => (0..extent).collect(),
                        0 => vec![a],
                        1 => (a.min(b)..=a.max(b)).step_by(step).collect(),
                        _ => (a.min(b)..extent).step_by(step).collect(),
                    };
                    chosen = chosen.iter().flat_map(|lead| picks.iter().map(move |pick| lead * extent + pick)).collect();
                }
                let width = dtype.bitsize();
                let bits: Vec<usize> = chosen.iter().flat_map(|element| element * width..(element + 1) * width).collect();
                let given: Vec<usize> = ranges.iter().flat_map(|&(start, stop)| start * 8..stop * 8).collect();
                prop_assert_eq!(given, bits);
            }
            (Ok((ranges, _)), Err(_)) => prop_assert!(ranges.is_empty() && empty_at_end),
            (ours, others) => prop_assert!(false, "{:?} {:?}", ours, others),
        }
    }
}

#[test]
fn refusals_have_the_references_variant_and_text() {
    let cases: &[(&str, Vec<u8>)] = &[
        ("header too small", vec![0; 7]),
        ("header too large", u64::MAX.to_le_bytes().to_vec()),
        ("invalid header length", file("{}", 0)[..9].to_vec()),
        (
            "invalid UTF-8",
            [&1_u64.to_le_bytes()[..], b"\xFF"].concat(),
        ),
        ("invalid JSON", file("{", 0)),
        (
            "invalid JSON",
            file(r#"{"a":{"dtype":"F8","shape":[],"data_offsets":[0,1]}}"#, 1),
        ),
        (
            "invalid offset for tensor `a`",
            file(
                r#"{"a":{"dtype":"U8","shape":[1],"data_offsets":[1,2]}}"#,
                2,
            ),
        ),
        (
            "invalid shape",
            file(
                r#"{"a":{"dtype":"U8","shape":[2],"data_offsets":[0,1]}}"#,
                1,
            ),
        ),
        (
            "incomplete metadata",
            file(
                r#"{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}"#,
                2,
            ),
        ),
        (
            "overflow",
            file(
                r#"{"a":{"dtype":"U16","shape":[2,9223372036854775807],"data_offsets":[0,16]}}"#,
                16,
            ),
        ),
        (
            "subbytes",
            file(
                r#"{"a":{"dtype":"F4","shape":[3],"data_offsets":[0,1]}}"#,
                1,
            ),
        ),
    ];
    for (text, bytes) in cases {
        let ours = SafeTensors::deserialize(bytes).unwrap_err();
        let other = reference::SafeTensors::deserialize(bytes).unwrap_err();
        let variant = |debug: String| debug.split('(').next().unwrap_or_default().to_owned();
        assert_eq!(
            variant(format!("{ours:?}")),
            variant(format!("{other:?}")),
            "{text}"
        );
        assert!(ours.to_string().contains(text), "{ours}");
        assert!(other.to_string().contains(text), "{other}");
        assert_eq!(ours.source().is_some(), other.source().is_some(), "{text}");
        if !text.contains("JSON") {
            assert_eq!(ours.to_string(), other.to_string());
        }
    }
}

#[test]
fn the_profile_is_strict_unless_asked() {
    let twice = r#"{"a":{"dtype":"U8","shape":[9],"data_offsets":[7,9]},"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}"#;
    for (json, data) in [(twice, 1), (r#"{"a":["U8",[2],[0,2]]}"#, 2)] {
        let bytes = file(json, data);
        assert!(
            reference::SafeTensors::deserialize(&bytes).is_ok(),
            "{json}"
        );
        assert!(SafeTensors::deserialize(&bytes).is_err(), "{json}");
        let read = SafeTensors::deserialize_with(&bytes, &ReadOptions::compat()).unwrap();
        assert_eq!(read.header().data_len(), data as u64);
    }
    // Null metadata, as MLX writes it, is the one exception.
    let null = file(r#"{"__metadata__":null}"#, 0);
    assert!(SafeTensors::deserialize(&null).unwrap().is_empty());
    assert!(SafeTensors::deserialize_with(&null, &ReadOptions::strict()).is_err());
    let missing = SafeTensors::deserialize(&file("{}", 0))
        .unwrap()
        .tensor("x")
        .unwrap_err();
    assert_eq!(missing.to_string(), "tensor `x` not found");
}

#[test]
fn tensors_borrow_from_the_file() {
    let bytes = file(
        r#"{"a":{"dtype":"U8","shape":[4],"data_offsets":[0,4]}}"#,
        4,
    );
    let view = SafeTensors::deserialize(&bytes)
        .unwrap()
        .tensor("a")
        .unwrap();
    assert!(bytes.as_ptr_range().contains(&view.data().as_ptr()));
    let debug = format!("{:?}", SafeTensors::deserialize(&bytes).unwrap());
    assert!(debug.contains("\"a\"") && debug.contains("U8"), "{debug}");
}

// The defects of the reference that are errors here.

#[test]
fn a_repeated_name_is_refused_not_a_panic() {
    let view = TensorView::new(Dtype::U8, vec![1], &[7]).unwrap();
    let error = serialize([("a", &view), ("a", &view)], None).unwrap_err();
    assert!(matches!(error, SafeTensorError::JsonError(_)));
    assert!(error.to_string().contains("\"a\""), "{error}");
    let wide = TensorView::new(Dtype::U16, vec![1], &[7, 7]).unwrap();
    serialize([("a", &view), ("a", &wide)], None).unwrap_err();

    let infos = [(0, 1), (1, 2)].map(|offsets| ("a".to_owned(), info(Dtype::U8, &[1], offsets)));
    let error = Metadata::new(None, infos.to_vec()).unwrap_err();
    assert!(matches!(error, SafeTensorError::JsonError(_)));
    let reserved = vec![("__metadata__".to_owned(), info(Dtype::U8, &[1], (0, 1)))];
    Metadata::new(None, reserved).unwrap_err();
    serialize([("__metadata__", &view)], None).unwrap_err();
}

#[test]
fn a_view_whose_size_overflows_is_refused() {
    for shape in [
        vec![1 << 32, 1 << 32],
        vec![usize::MAX, 2],
        vec![1 << 62, 4, 0],
    ] {
        let error = TensorView::new(Dtype::U8, shape, &[]).unwrap_err();
        assert!(matches!(error, SafeTensorError::ValidationOverflow));
    }
    let error = TensorView::new(Dtype::F32, vec![2, 3], &[0; 5]).unwrap_err();
    assert_eq!(
        error.to_string(),
        "tensor of type F32 and shape (2, 3) can't be created from 5 bytes"
    );
    let error = TensorView::new(Dtype::F4, vec![1; 9], &[0]).unwrap_err();
    assert!(matches!(error, SafeTensorError::MisalignedSlice));
}

#[test]
fn a_reversed_slice_is_refused_and_an_empty_one_is_empty() {
    let data = [0; 12];
    let view = TensorView::new(Dtype::U8, vec![4, 3], &data).unwrap();
    #[allow(clippy::reversed_empty_ranges)]
    let error = view.slice(3..1).unwrap_err();
    assert_eq!(
        error,
        InvalidSlice::SliceOutOfRange {
            dim_index: 0,
            asked: 3,
            dim_size: 4
        }
    );
    for (slice, shape) in [
        (view.slice((2..2, 0..1)), [0, 1]),
        (view.slice((4.., 1..)), [0, 2]),
    ] {
        let slice = slice.unwrap();
        assert_eq!(
            (slice.remaining_byte_len(), slice.newshape()),
            (0, shape.to_vec())
        );
        assert_eq!(slice.flatten().count(), 0);
    }
    for end in [view.slice(..=usize::MAX), view.slice(usize::MAX)] {
        end.unwrap_err();
    }
    assert_eq!(
        view.slice((0, 0, 0)).unwrap_err(),
        InvalidSlice::TooManySlices
    );
    let mut rows = view.slice((1..=2, 1)).unwrap();
    assert_eq!((rows.remaining_byte_len(), rows.newshape()), (2, vec![2]));
    rows.next().unwrap();
    assert_eq!(rows.remaining_byte_len(), 1);
    let huge = slice_byte_ranges(Dtype::U64, &[usize::MAX, 2], &[]);
    assert_eq!(huge.unwrap_err(), InvalidSlice::MisalignedSlice);
}

/// A tensor that promises `promised` bytes and gives `given`.
struct Liar {
    shape: Vec<usize>,
    promised: usize,
    given: usize,
}

impl View for Liar {
    fn dtype(&self) -> Dtype {
        Dtype::U8
    }
    fn shape(&self) -> &[usize] {
        &self.shape
    }
    fn data(&self) -> Cow<'_, [u8]> {
        vec![1; self.given].into()
    }
    fn data_len(&self) -> usize {
        self.promised
    }
}

#[test]
fn a_view_that_gives_other_than_it_promised_leaves_no_file() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("x.safetensors");
    std::fs::write(&path, b"old").unwrap();
    for given in [3, 5] {
        let liar = || {
            [(
                "a",
                Liar {
                    shape: vec![4],
                    promised: 4,
                    given,
                },
            )]
        };
        let error = serialize(liar(), None).unwrap_err();
        assert!(
            matches!(error, SafeTensorError::InvalidTensorView(Dtype::U8, ref s, n) if *s == [4] && n == given)
        );
        serialize_to_file(liar(), None, &path).unwrap_err();
    }
    let wrong = Liar {
        shape: vec![4],
        promised: 5,
        given: 5,
    };
    let error = serialize([("a", wrong)], None).unwrap_err();
    assert!(matches!(error, SafeTensorError::TensorInvalidInfo));
    let vast = Liar {
        shape: vec![1 << 60],
        promised: 1 << 60,
        given: 1,
    };
    assert!(matches!(
        serialize([("a", vast)], None),
        Err(SafeTensorError::IoError(_))
    ));
    assert_eq!(std::fs::read(&path).unwrap(), b"old");
    assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 1);
}

#[test]
fn a_file_holds_what_serialize_gives() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("x.safetensors");
    let large = vec![3; 3 << 20];
    let small: Vec<(String, Vec<u8>)> = (0..3000)
        .map(|i| (format!("small.{i}"), vec![i as u8; 1000]))
        .collect();
    let mut views: HashMap<&str, TensorView<'_>> = small
        .iter()
        .map(|(name, data)| {
            (
                name.as_str(),
                TensorView::new(Dtype::U8, vec![10, 100], data).unwrap(),
            )
        })
        .collect();
    views.insert(
        "large",
        TensorView::new(Dtype::F32, vec![3 << 18], &large).unwrap(),
    );
    let notes: HashMap<String, String> =
        (0..20).map(|i| (format!("k{i}"), i.to_string())).collect();
    serialize_to_file(&views, Some(notes.clone()), &path).unwrap();
    let bytes = serialize(&views, Some(notes)).unwrap();
    assert_eq!(std::fs::read(&path).unwrap(), bytes);
    let read = reference::SafeTensors::deserialize(&bytes).unwrap();
    assert_eq!(read.len(), 3001);
    assert_eq!(
        SafeTensors::deserialize(&bytes).unwrap().tensors().len(),
        3001
    );

    let error = serialize_to_file(&views, None, Path::new("/nowhere/x")).unwrap_err();
    assert!(
        matches!(error, SafeTensorError::IoError(ref e) if e.kind() == std::io::ErrorKind::NotFound)
    );
    assert!(error.to_string().starts_with("I/O error: ") && error.source().is_some());
}

/// A key that sorts backwards and displays in capitals, as the reference's bounds allow.
#[derive(PartialEq, Eq)]
struct Backwards(&'static str);

impl AsRef<str> for Backwards {
    fn as_ref(&self) -> &str {
        self.0
    }
}

impl std::fmt::Display for Backwards {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.0.to_uppercase())
    }
}

impl Ord for Backwards {
    fn cmp(&self, other: &Self) -> std::cmp::Ordering {
        other.0.cmp(self.0)
    }
}

impl PartialOrd for Backwards {
    fn partial_cmp(&self, other: &Self) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}

#[test]
fn keys_are_ordered_and_written_by_their_own_rules() {
    let names = || ["b", "c", "a"].map(Backwards).into_iter();
    let data = [1, 2];
    let ours = TensorView::new(Dtype::U8, vec![2], &data).unwrap();
    let other = reference::tensor::TensorView::new(reference::Dtype::U8, vec![2], &data).unwrap();
    let expected = reference::serialize(names().map(|name| (name, &other)), None).unwrap();
    let found = serialize(names().map(|name| (name, &ours)), None).unwrap();
    assert_eq!(found, expected);
    assert_eq!(
        SafeTensors::deserialize(&found).unwrap().names(),
        ["C", "B", "A"]
    );
}

#[test]
fn a_header_too_long_is_refused() {
    let notes = HashMap::from([("k".to_owned(), "a".repeat(100_000_000))]);
    let nothing: [(&str, TensorView<'_>); 0] = [];
    let error = serialize(nothing, Some(notes)).unwrap_err();
    assert!(matches!(error, SafeTensorError::HeaderTooLarge));
}

#[test]
fn metadata_passes_through_serde_and_is_checked() {
    let json = r#"{"__metadata__":{"a":"1","b":"2"},"x":{"dtype":"F4","shape":[2],"data_offsets":[0,1]},"y":{"dtype":"U8","shape":[],"data_offsets":[1,2]}}"#;
    let metadata: Metadata = serde_json::from_str(json).unwrap();
    assert_eq!(serde_json::to_string(&metadata).unwrap(), json);
    assert_eq!(metadata.info("x").unwrap().data_offsets, (0, 1));
    assert!(metadata.info("z").is_none());
    assert_eq!((metadata.tensors().len(), metadata.data_len()), (2, 2));
    for wrong in [
        r#"{"x":{"dtype":"U8","shape":[2],"data_offsets":[0,1]}}"#,
        r#"{"x":{"dtype":"U8","shape":[1],"data_offsets":[1,2]}}"#,
        r#"{"x":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},"x":{"dtype":"U8","shape":[1],"data_offsets":[1,2]}}"#,
        r#"{"__metadata__":{"a":"1","a":"2"}}"#,
        r#"{"__metadata__":{},"__metadata__":{}}"#,
        "[]",
    ] {
        serde_json::from_str::<Metadata>(wrong).unwrap_err();
    }
    let reversed = vec![
        ("x".to_owned(), info(Dtype::U8, &[], (0, 1))),
        ("y".to_owned(), info(Dtype::U8, &[0], (1, 0))),
    ];
    let error = Metadata::new(None, reversed).unwrap_err();
    assert_eq!(error.to_string(), "invalid offset for tensor `y`");
}
