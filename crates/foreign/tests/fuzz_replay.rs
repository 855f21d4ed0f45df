//! The fuzzer's committed corpus (`fuzz/corpus/gguf`), through the very checks that the fuzz target runs; and
//! that it is not vacuous: some of it are headers.

#[path = "../../../fuzz/gguf_checks.rs"]
mod checks;

use std::fs;
use std::path::Path;

#[test]
fn headers() {
    let folder = Path::new(concat!(
        env!("CARGO_MANIFEST_DIR"),
        "/../../fuzz/corpus/gguf"
    ));
    let (mut read, mut all) = (0, 0);
    for entry in fs::read_dir(folder).unwrap() {
        let data = fs::read(entry.unwrap().path()).unwrap();
        checks::gguf(&data);
        read += u32::from(checks::judged(&data, data.len() as u64 + (1 << 20)));
        all += 1;
    }
    assert!(read >= 8 && all >= 25, "{read} of {all}");
}
