//! Claim: whatever is in a header, it is refused with its reason or read; nothing panics, and nothing that a
//! file says is believed before its real length bears it out.

use tonnage_foreign::gguf::{
    Error, GgmlType, Gguf, Limits, OwnedValue, Reason, TensorSpec, ValueType, WriteOptions, layout,
    probe,
};
use tonnage_format::Step;

/// Bytes of a header, by hand.
#[derive(Default, Clone)]
struct Raw(Vec<u8>);

impl Raw {
    fn new(tensors: u64, entries: u64) -> Self {
        Raw(b"GGUF".to_vec()).u32(3).u64(tensors).u64(entries)
    }

    fn u8(mut self, value: u8) -> Self {
        self.0.push(value);
        self
    }

    fn u32(mut self, value: u32) -> Self {
        self.0.extend(value.to_le_bytes());
        self
    }

    fn u64(mut self, value: u64) -> Self {
        self.0.extend(value.to_le_bytes());
        self
    }

    fn text(mut self, text: impl AsRef<[u8]>) -> Self {
        self = self.u64(text.as_ref().len() as u64);
        self.0.extend(text.as_ref());
        self
    }

    fn entry(self, key: &str, ty: ValueType) -> Self {
        self.text(key).u32(ty as u32)
    }

    fn tensor(self, name: &str, dims: &[u64], ty: GgmlType, offset: u64) -> Self {
        let start = self.text(name).u32(dims.len() as u32);
        let raw = dims.iter().fold(start, |raw, &extent| raw.u64(extent));
        raw.u32(ty.id()).u64(offset)
    }

    /// What becomes of it in a file with `more` bytes behind it.
    fn parse(self, more: u64) -> Result<Gguf, Error> {
        let file_len = self.0.len() as u64 + more;
        Gguf::parse(self.0, file_len, &Limits::default())
    }

    #[track_caller]
    fn refused(self, more: u64, reason: Reason) -> Error {
        let error = self.parse(more).unwrap_err();
        assert_eq!(error.reason(), reason, "{error}");
        error
    }
}

#[test]
fn openings() {
    Raw(b"GGUX\x03\0\0\0".to_vec()).refused(100, Reason::Magic);
    Raw(b"GGUF".to_vec()).u32(1).refused(100, Reason::Version);
    Raw(b"GGUF".to_vec()).u32(4).refused(100, Reason::Version);
    Raw(b"GGUF".to_vec()).u32(0).refused(100, Reason::Version);
    Raw(b"GG".to_vec()).refused(0, Reason::Truncated);
    Raw(b"GGUF".to_vec())
        .u32(3)
        .u64(0)
        .refused(7, Reason::Truncated);
    assert!(Raw::new(0, 0).parse(0).unwrap().is_empty());
}

#[test]
fn counts_are_believed_only_if_the_file_could_hold_them() {
    for count in [1, 5, 1 << 40, u64::MAX / 14, u64::MAX] {
        Raw::new(count, 0).refused(8, Reason::Count);
        Raw::new(0, count).refused(8, Reason::Count);
    }
    let limits = Limits {
        keys: 3,
        tensors: 2,
        header_bytes: 60,
        ..Limits::default()
    };
    let few = |raw: Raw| Gguf::parse(raw.0, 1 << 40, &limits).unwrap_err().reason();
    assert_eq!(few(Raw::new(0, 4)), Reason::LimitKeys);
    assert_eq!(few(Raw::new(3, 0)), Reason::LimitTensors);
    assert_eq!(
        few(Raw::new(0, 1).entry("k", ValueType::String).u64(50)),
        Reason::LimitHeader
    );
}

#[test]
fn keys_and_values() {
    Raw::new(0, 1).u64(0).u32(0).u8(0).refused(9, Reason::Key);
    Raw::new(0, 1).u64(1 << 16).refused(1 << 20, Reason::Key);
    Raw::new(0, 1)
        .text([0xff])
        .u32(0)
        .u8(0)
        .refused(9, Reason::Key);
    Raw::new(0, 1)
        .text("key")
        .u32(13)
        .refused(99, Reason::ValueType);
    let twice = Raw::new(0, 2)
        .entry("k", ValueType::U8)
        .u8(1)
        .entry("k", ValueType::Bool)
        .u8(1);
    let error = twice.refused(0, Reason::DuplicateKey);
    assert_eq!(error.key_name(), Some("k"));
    Raw::new(0, 1)
        .entry("k", ValueType::Bool)
        .u8(2)
        .refused(0, Reason::Bool);
    Raw::new(0, 1)
        .entry("k", ValueType::String)
        .u64(u64::MAX)
        .refused(99, Reason::Truncated);
    let array = |ty: ValueType, len| {
        Raw::new(0, 1)
            .entry("k", ValueType::Array)
            .u32(ty as u32)
            .u64(len)
    };
    for ty in ValueType::ALL {
        for len in [100, u64::MAX / 8, u64::MAX] {
            array(ty, len).refused(20, Reason::Truncated);
        }
    }
    array(ValueType::Bool, 3)
        .u8(1)
        .u8(0)
        .u8(7)
        .refused(0, Reason::Bool);
    let mut nested = Raw::new(0, 1).entry("k", ValueType::Array);
    for _ in 0..3 {
        nested = nested.u32(ValueType::Array as u32).u64(1);
    }
    let deeper = nested
        .clone()
        .u32(ValueType::Array as u32)
        .u64(1)
        .u32(0)
        .u64(0);
    deeper.refused(0, Reason::Nesting);
    let gguf = nested
        .u32(ValueType::U8 as u32)
        .u64(2)
        .u8(7)
        .u8(9)
        .parse(0)
        .unwrap();
    let inner = OwnedValue::Array(ValueType::U8, vec![OwnedValue::U8(7), OwnedValue::U8(9)]);
    let wrap = |value| OwnedValue::Array(ValueType::Array, vec![value]);
    let found = OwnedValue::from(gguf.value("k").unwrap());
    assert_eq!(found, wrap(wrap(wrap(inner))));
}

#[test]
fn alignments() {
    for bad in [0, 1, 4, 12, 24, 33, u32::MAX] {
        let raw = Raw::new(0, 1)
            .entry("general.alignment", ValueType::U32)
            .u32(bad);
        raw.refused(0, Reason::Alignment);
    }
    let raw = Raw::new(0, 1)
        .entry("general.alignment", ValueType::U64)
        .u64(32);
    raw.refused(0, Reason::Alignment);
    for good in [8, 32, 64, 4096, 1 << 31] {
        let raw = Raw::new(0, 1)
            .entry("general.alignment", ValueType::U32)
            .u32(good);
        assert_eq!(raw.parse(0).unwrap().alignment(), u64::from(good));
    }
}

#[test]
fn tensors() {
    use GgmlType::{F32, Q4_K};
    let one = |dims: &[u64], ty, offset| Raw::new(1, 0).tensor("w", dims, ty, offset);
    let error = one(&[4, 4], F32, 32).refused(64, Reason::DataTruncated);
    assert_eq!(error.tensor_name(), Some("w"));
    assert!(error.to_string().contains("(gguf G5.2)"), "{error}");
    one(&[4], F32, 8).refused(1 << 20, Reason::Offset);
    one(&[4], F32, u64::MAX - 31).refused(1 << 20, Reason::DataTruncated);
    one(&[255], Q4_K, 0).refused(1 << 20, Reason::Row);
    one(&[], Q4_K, 0).refused(1 << 20, Reason::Row);
    one(&[1; 9], F32, 0).refused(1 << 20, Reason::Rank);
    Raw::new(1, 0)
        .text("w")
        .u32(u32::MAX)
        .refused(1 << 20, Reason::Rank);
    // Zeros do not hide what overflows, wherever they stand.
    for dims in [
        [1 << 32, 1 << 32, 0],
        [0, 1 << 32, 1 << 32],
        [1 << 32, 0, 1 << 32],
        [1 << 62, 1, 1],
        [1 << 59, 0, 1],
    ] {
        one(&dims, F32, 0).refused(1 << 20, Reason::SizeOverflow);
    }
    // Of blocks without a row, too: what is counted further on are the other extents.
    one(&[0, 1 << 62], GgmlType::Q2_0, 0).refused(1 << 20, Reason::SizeOverflow);
    for id in [4, 5, 31, 36, 43, 1 << 20, u32::MAX] {
        let raw = Raw::new(1, 0).text("bad").u32(1).u64(4).u32(id).u64(0);
        let error = raw.refused(1 << 20, Reason::Type);
        assert_eq!(error.tensor_name(), Some("bad"));
    }
    let two = |name: &str, at| {
        Raw::new(2, 0)
            .tensor("a", &[16], F32, 0)
            .tensor(name, &[8], F32, at)
    };
    two("a", 64).refused(200, Reason::DuplicateTensor);
    two("b", 32).refused(200, Reason::Overlap);
    two("b", 0).refused(200, Reason::Overlap);
    let gguf = two("b", 128).parse(300).unwrap();
    assert_eq!(gguf.get("b").unwrap().offset, gguf.data_start() + 128);
    // A tensor without bytes may lie anywhere, inside another too: it claims nothing.
    let empty = Raw::new(2, 0)
        .tensor("a", &[64], F32, 0)
        .tensor("b", &[0, 9], F32, 32);
    let gguf = empty.parse(400).unwrap();
    assert_eq!(gguf.get("b").unwrap().logical_shape, [9, 0]);
}

#[test]
fn blocks_without_a_big_endian_form_are_refused_by_name() {
    use GgmlType::{Q4_K, Q5_K};
    let spec = |name, ty| TensorSpec {
        name,
        ty,
        shape: &[2, 256],
    };
    let options = WriteOptions {
        order: tonnage_foreign::gguf::ByteOrder::Big,
        ..WriteOptions::default()
    };
    let plan = layout(&[], &[spec("a", Q4_K)], &options).unwrap();
    assert!(Gguf::parse(plan.header.clone(), plan.file_len, &Limits::default()).is_ok());
    let mut header = plan.header;
    let at = header.len() - 12;
    header[at..at + 4].copy_from_slice(&Q5_K.id().to_be_bytes());
    let error = Gguf::parse(header, 1 << 20, &Limits::default()).unwrap_err();
    assert_eq!(
        (error.reason(), error.tensor_name()),
        (Reason::BigEndianBlocks, Some("a"))
    );
    let error = layout(&[], &[spec("b", Q5_K)], &options).unwrap_err();
    assert_eq!(
        (error.reason(), error.tensor_name()),
        (Reason::BigEndianBlocks, Some("b"))
    );
}

fn sample() -> (Vec<u8>, u64) {
    let text = |text: &str| OwnedValue::String(text.into());
    let kv = [
        ("general.architecture".to_owned(), text("llama")),
        ("general.alignment".to_owned(), OwnedValue::U32(64)),
        (
            "a".to_owned(),
            OwnedValue::Array(ValueType::String, vec![text(""), text("zwei"), text("3")]),
        ),
        (
            "b".to_owned(),
            OwnedValue::Array(ValueType::Bool, vec![OwnedValue::Bool(true)]),
        ),
        ("c".to_owned(), OwnedValue::F64(-0.5)),
    ];
    let tensors = [
        TensorSpec {
            name: "one",
            ty: GgmlType::Q6_K,
            shape: &[3, 2, 512],
        },
        TensorSpec {
            name: "two",
            ty: GgmlType::BF16,
            shape: &[5],
        },
        TensorSpec {
            name: "",
            ty: GgmlType::F64,
            shape: &[],
        },
    ];
    let plan = layout(&kv, &tensors, &WriteOptions::default()).unwrap();
    (plan.header, plan.file_len)
}

#[test]
fn every_prefix_asks_for_more_and_every_shorter_file_is_refused() {
    let (header, file_len) = sample();
    let limits = Limits::default();
    for have in 0..header.len() {
        match probe(&header[..have], file_len, &limits).unwrap() {
            Step::Need { offset, len } => {
                assert_eq!(offset, have as u64);
                assert!(len > 0 && offset + len <= file_len);
            }
            Step::Done(end) => panic!("{have} bytes are no header, and yet it ends at {end}"),
        }
        assert!(probe(&header[..have], have as u64, &limits).is_err());
        assert!(Gguf::parse(header[..have].to_vec(), file_len, &limits).is_err());
    }
    assert_eq!(
        probe(&header, file_len, &limits).unwrap(),
        Step::Done(header.len() as u64)
    );
    // The reads double: a header of n bytes takes about log n of them.
    let (mut have, mut reads) = (0, 0);
    while let Step::Need { len, .. } =
        probe(&header[..have.min(header.len())], file_len, &limits).unwrap()
    {
        (have, reads) = (have + len as usize, reads + 1);
    }
    assert!(reads < 16, "{reads} reads");
}

#[test]
fn every_bit_flipped_is_read_or_refused() {
    let (header, file_len) = sample();
    let (mut read, mut refused) = (0, 0);
    for bit in 0..header.len() * 8 {
        let mut changed = header.clone();
        changed[bit / 8] ^= 1 << (bit % 8);
        match Gguf::parse(changed, file_len, &Limits::default()) {
            Ok(gguf) => {
                // Whatever was read can be walked through.
                let values: Vec<OwnedValue> =
                    gguf.metadata().map(|(_, value)| value.into()).collect();
                assert!(values.len() <= 5);
                assert!(
                    gguf.tensors()
                        .all(|tensor| tensor.len == 0 || tensor.offset + tensor.len <= file_len)
                );
                read += 1;
            }
            Err(error) => {
                assert!(!error.to_string().is_empty());
                refused += 1;
            }
        }
    }
    assert!(
        read > 400 && refused > 1500,
        "{read} read, {refused} refused"
    );
}
