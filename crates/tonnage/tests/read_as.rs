//! `Checkpoint::read_as`: many tensors into buffers of the caller's, cast on the way.

use tonnage::engine::Options;
use tonnage::{Checkpoint, Dtype, OpenOptions, Save, TensorData, cast::cast, to_bytes};

fn checkpoint() -> Checkpoint {
    let floats: Vec<u8> = [1.0_f32, -2.5, 0.1, 65504.0]
        .iter()
        .flat_map(|value| value.to_le_bytes())
        .collect();
    let tensors = [
        TensorData {
            name: "float",
            dtype: Dtype::F32,
            shape: &[4],
            data: &floats,
        },
        TensorData {
            name: "whole",
            dtype: Dtype::U8,
            shape: &[3],
            data: b"abc",
        },
    ];
    let bytes = to_bytes(&tensors, &Save::default()).unwrap();
    Checkpoint::from_bytes(bytes, "<bytes>", &OpenOptions::default()).unwrap()
}

#[test]
fn tensors_are_read_and_cast_into_the_callers_buffers() {
    let checkpoint = checkpoint();
    let at = |name: &str| checkpoint.tensor(name).unwrap().index();
    let (mut half, mut bytes) = ([0; 8], [0; 3]);
    let jobs = vec![
        (at("float"), Dtype::BF16, &mut half[..]),
        (at("whole"), Dtype::U8, &mut bytes[..]),
    ];
    let report = checkpoint.read_as(jobs, &Options::default()).unwrap();
    let mut expected = [0; 8];
    let stored = checkpoint.read("float").unwrap();
    cast(Dtype::F32, &stored, Dtype::BF16, &mut expected).unwrap();
    assert_eq!((half, &bytes), (expected, b"abc"));
    assert_eq!(report.bytes, 16 + 3);
}

#[test]
fn what_does_not_fit_is_refused() {
    let checkpoint = checkpoint();
    let at = |name: &str| checkpoint.tensor(name).unwrap().index();
    let code = |position: usize, to: Dtype, len: usize| {
        let mut buffer = vec![0; len];
        let jobs = vec![(position, to, &mut buffer[..])];
        let error = checkpoint.read_as(jobs, &Options::default()).unwrap_err();
        error.code()
    };
    assert_eq!(code(at("float"), Dtype::F32, 15), "BUFFER_SIZE");
    assert_eq!(code(at("float"), Dtype::F16, 16), "BUFFER_SIZE");
    assert_eq!(code(at("whole"), Dtype::F32, 12), "CAST");
    assert_eq!(code(99, Dtype::F32, 4), "UNKNOWN_TENSOR");
}
