//! The interpreter against checkpoints that other libraries wrote, with those libraries' own values
//! (`conformance/quant`): bit for bit.
#![allow(
    clippy::disallowed_methods,
    reason = "the corpus is files; the room's own code reads none"
)]

mod corpus;

use std::collections::BTreeMap;

use corpus::{File, NO_ROW, cases, compare, corpus, tensor};
use tonnage_quant::scheme::Scheme;

#[test]
fn every_file_decodes_to_its_library_s_own_values() {
    let (mut seen, mut wrong) = (BTreeMap::<&str, usize>::new(), Vec::new());
    let cases = cases();
    for case in &cases {
        let scheme = case["scheme"].as_str().unwrap();
        if NO_ROW.contains(&scheme) {
            assert!(Scheme::find(scheme).is_none(), "{scheme} has a row");
            continue;
        }
        let folder = corpus().join(case["path"].as_str().unwrap());
        let file = File::open(&folder.join("model.safetensors"));
        let expected = File::open(&folder.join("expected.safetensors"));
        for name in case["tensors"].as_object().unwrap().keys() {
            let told = tensor(case, &file, &expected, name);
            match told.and_then(|told| compare(case, &told)) {
                Ok(()) => *seen.entry(scheme).or_default() += 1,
                Err(what) => wrong.push(format!("{} {name}: {what}", case["path"])),
            }
        }
    }
    assert!(
        wrong.is_empty(),
        "{} wrong:\n{}\nright: {seen:?}",
        wrong.len(),
        wrong.join("\n")
    );
    let right: usize = seen.values().sum();
    assert!(right >= 440, "{seen:?}");
}
