//! What the fuzz target `gguf` holds true of any bytes: they are refused with a sentence, or are a header that
//! can be walked through, covers its file without overlap, is written anew as it was read, and is restored from
//! what is carried of it. `crates/foreign/tests/fuzz_replay.rs` feeds it the committed corpus.

use tonnage_foreign::gguf::{
    Error, Gguf, Limits, OwnedValue, TensorSpec, WriteOptions, gaps, layout, probe, quant_map,
    restored,
};
use tonnage_format::{CatalogBuilder, Step};

/// Reads the bytes as a whole file, and as the start of a larger one.
pub fn gguf(data: &[u8]) {
    for more in [0, 1 << 20] {
        let file_len = data.len() as u64 + more;
        judged(data, file_len);
    }
}

/// Whether they are a header. Of a part of them, the step function asks for no more than the file has.
pub fn judged(data: &[u8], file_len: u64) -> bool {
    let limits = Limits::default();
    let step = probe(data, file_len, &limits);
    for cut in [data.len() / 3, data.len() / 2, data.len().saturating_sub(1)] {
        match probe(&data[..cut], file_len, &limits) {
            Ok(Step::Need { offset, len }) => {
                assert_eq!(offset, cut as u64);
                assert!(len > 0 && len <= file_len - offset);
            }
            Ok(Step::Done(end)) => assert_eq!(step, Ok(Step::Done(end))),
            // What is wrong with a part is wrong with all.
            Err(error) => assert_eq!(step, Err(error)),
        }
    }
    let parsed = Gguf::parse(data.to_vec(), file_len, &limits);
    match (step, &parsed) {
        (Ok(Step::Done(end)), Ok(gguf)) => assert_eq!(end, gguf.bytes().len() as u64),
        (_, Err(error)) => refused(error),
        (step, Ok(_)) => panic!("read, though the step function says {step:?}"),
    }
    parsed.is_ok_and(|gguf| {
        walked(&gguf);
        true
    })
}

fn refused(error: &Error) {
    let text = error.to_string();
    assert!(text.ends_with(&format!("(gguf {})", error.reason().clause())));
    assert!(text.len() < 4096);
}

fn walked(gguf: &Gguf) {
    let kv: Vec<(String, OwnedValue)> = gguf
        .metadata()
        .map(|(key, value)| (key.to_owned(), value.into()))
        .collect();
    let mut covered = gguf.bytes().len() as u64;
    for tensor in gguf.tensors() {
        covered += tensor.len;
        assert_eq!(gguf.get(tensor.name), Some(tensor));
        let stored = tensor.dtype().bytes_of(&tensor.stored_shape());
        assert_eq!(stored.expect("bytes"), tensor.len);
    }
    covered += gaps(gguf)
        .iter()
        .map(|(begin, end)| end - begin)
        .sum::<u64>();
    assert_eq!(covered, gguf.file_len());
    let mut builder = CatalogBuilder::new();
    let source = builder.add_source("fuzz", gguf.file_len());
    gguf.add_to(&mut builder, source).expect("rows");
    assert_eq!(builder.finish().expect("names once").len(), gguf.len());
    quant_map(&[gguf]);
    let again = restored(gguf.bytes().to_vec(), gguf.file_len()).expect("itself");
    assert_eq!(again.len(), gguf.len());
    let tensors: Vec<_> = gguf.tensors().collect();
    let specs: Vec<TensorSpec<'_>> = tensors
        .iter()
        .map(|tensor| TensorSpec {
            name: tensor.name,
            ty: tensor.ty,
            shape: tensor.logical_shape,
        })
        .collect();
    let options = WriteOptions {
        version: gguf.version(),
        order: gguf.byte_order(),
    };
    let plan = layout(&kv, &specs, &options).expect("what was read can be written");
    // The same but for offsets, so as long.
    assert_eq!(plan.header.len(), gguf.bytes().len());
    let again =
        Gguf::parse(plan.header, plan.file_len, &Limits::default()).expect("what was written");
    assert!(
        again
            .tensors()
            .map(|tensor| tensor.name)
            .eq(gguf.tensors().map(|tensor| tensor.name))
    );
}
