//! Claim: what is written is read as it was given, in both byte orders and versions, and a big-endian file
//! is, through [`Swapped`], the little-endian one, however it is cut into reads.

use std::sync::Arc;

use proptest::prelude::*;
use tonnage_foreign::gguf::{
    ByteOrder, GgmlType, Gguf, Limits, OwnedValue, Swapped, TensorSpec, ValueType, WriteOptions,
    layout,
};
use tonnage_storage::{MemorySource, Source};

fn scalar() -> impl Strategy<Value = OwnedValue> {
    prop_oneof![
        any::<u8>().prop_map(OwnedValue::U8),
        any::<i8>().prop_map(OwnedValue::I8),
        any::<u16>().prop_map(OwnedValue::U16),
        any::<i16>().prop_map(OwnedValue::I16),
        any::<u32>().prop_map(OwnedValue::U32),
        any::<i32>().prop_map(OwnedValue::I32),
        (-1e30f32..1e30).prop_map(OwnedValue::F32),
        any::<bool>().prop_map(OwnedValue::Bool),
        any::<Vec<u8>>().prop_map(OwnedValue::String),
        any::<u64>().prop_map(OwnedValue::U64),
        any::<i64>().prop_map(OwnedValue::I64),
        (-1e300f64..1e300).prop_map(OwnedValue::F64),
    ]
}

fn value() -> impl Strategy<Value = OwnedValue> {
    let array = (scalar(), 0..5_usize)
        .prop_map(|(value, len)| OwnedValue::Array(value.ty(), vec![value; len]));
    let nested = (array, 0..3_usize).prop_map(|(value, len)| match len {
        0 => value,
        len => OwnedValue::Array(ValueType::Array, vec![value; len]),
    });
    prop_oneof![scalar(), nested]
}

fn tensor() -> impl Strategy<Value = (GgmlType, Vec<u64>)> {
    let types = prop::sample::select(GgmlType::ALL);
    (types, prop::collection::vec(0..4_u64, 0..3), 0..3_u64).prop_map(|(ty, mut shape, row)| {
        shape.push(row * ty.elements() as u64);
        (ty, shape)
    })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]

    #[test]
    fn what_is_written_is_read(
        values in prop::collection::vec(value(), 0..8),
        tensors in prop::collection::vec(tensor(), 0..8),
        big: bool,
        version in 2..=3_u32,
        alignment in prop::sample::select(&[8_u32, 32, 256][..]),
    ) {
        let mut kv: Vec<(String, OwnedValue)> = values.into_iter().enumerate()
            .map(|(at, value)| (format!("key.{at}"), value)).collect();
        kv.push(("general.alignment".into(), OwnedValue::U32(alignment)));
        let names: Vec<String> = (0..tensors.len()).map(|at| format!("t.{}", 9 - at)).collect();
        let specs: Vec<TensorSpec<'_>> = tensors.iter().zip(&names)
            .map(|((ty, shape), name)| TensorSpec { name, ty: *ty, shape }).collect();
        let order = if big { ByteOrder::Big } else { ByteOrder::Little };
        let Ok(plan) = layout(&kv, &specs, &WriteOptions { version, order }) else {
            prop_assert!(big, "only blocks without a big-endian form are refused");
            return Ok(());
        };
        prop_assert_eq!(plan.data_start % u64::from(alignment), 0);
        let gguf = Gguf::parse(plan.header.clone(), plan.file_len, &Limits::default()).unwrap();
        prop_assert_eq!((gguf.version(), gguf.byte_order()), (version, order));
        let found: Vec<(String, OwnedValue)> = gguf.metadata()
            .map(|(key, value)| (key.to_owned(), value.into())).collect();
        prop_assert_eq!(&found, &kv);
        for (key, value) in &kv {
            prop_assert_eq!(&OwnedValue::from(gguf.value(key).unwrap()), value);
        }
        prop_assert_eq!(gguf.value("key"), None);
        for (at, spec) in specs.iter().enumerate() {
            let tensor = gguf.tensor(at).unwrap();
            prop_assert_eq!(gguf.get(spec.name), Some(tensor));
            prop_assert_eq!((tensor.ty, tensor.logical_shape), (spec.ty, spec.shape));
            prop_assert_eq!((tensor.offset, tensor.len), plan.places[at]);
            let stored: u64 = tensor.stored_shape().iter().product();
            prop_assert_eq!(tensor.dtype().bytes_of(&tensor.stored_shape()).ok(), Some(tensor.len));
            prop_assert!(stored <= tensor.len || tensor.len == 0);
        }
    }

    #[test]
    fn a_big_endian_file_reads_as_the_little_endian_one(
        seed: u64,
        cuts in prop::collection::vec((0.0..1.0_f64, 0.0..1.0_f64), 1..40),
    ) {
        use GgmlType::{BF16, F16, F32, F64, I8, I16, I32, I64, MXFP4, Q4_0, Q4_K, Q6_K, Q8_0};
        let types = [F32, F16, BF16, F64, I8, I16, I32, I64, Q4_0, Q8_0, Q4_K, Q6_K, MXFP4];
        let names: Vec<String> = types.iter().map(|ty| ty.name().to_owned()).collect();
        let specs: Vec<TensorSpec<'_>> = types.iter().zip(&names)
            .map(|(&ty, name)| TensorSpec { name, ty, shape: &[3, 256] }).collect();
        let options = WriteOptions { order: ByteOrder::Big, ..WriteOptions::default() };
        let plan = layout(&[], &specs, &options).unwrap();
        let mut state = seed | 1;
        let little: Vec<u8> = (0..plan.file_len).map(|_| {
            state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            (state >> 56) as u8
        }).collect();
        // The other file, turned round by hand.
        let mut big = little.clone();
        for (spec, &(offset, len)) in specs.iter().zip(&plan.places) {
            let fields: &[(usize, usize)] = match spec.ty {
                I8 | MXFP4 => &[],
                F16 | BF16 | I16 | Q4_0 | Q8_0 => &[(0, 2)],
                F32 | I32 => &[(0, 4)],
                F64 | I64 => &[(0, 8)],
                Q4_K => &[(0, 2), (2, 2)],
                Q6_K => &[(208, 2)],
                _ => unreachable!(),
            };
            let data = &mut big[offset as usize..(offset + len) as usize];
            for block in data.chunks_mut(spec.ty.bytes()) {
                for &(at, len) in fields {
                    block[at..at + len].reverse();
                }
            }
        }
        let gguf = Gguf::parse(plan.header, plan.file_len, &Limits::default()).unwrap();
        let inner: Arc<dyn Source> = Arc::new(MemorySource::new(big.clone(), "big"));
        let swapped = Swapped::of(&gguf, &inner).unwrap();
        prop_assert!(swapped.bytes().is_none() && swapped.file().is_none());
        for (begin, len) in cuts.into_iter().chain([(0.0, 1.0)]) {
            let begin = (begin * little.len() as f64) as usize;
            let len = (len * (little.len() - begin) as f64) as usize;
            let mut read = vec![0; len];
            swapped.read_exact_at(begin as u64, &mut read).unwrap();
            prop_assert!(read == little[begin..begin + len]);
        }
        let past = swapped.read_exact_at(plan.file_len - 1, &mut [0; 2]).unwrap_err();
        prop_assert_eq!(past.io().kind(), std::io::ErrorKind::UnexpectedEof);
    }
}
