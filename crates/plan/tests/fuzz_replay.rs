//! The fuzzer's committed corpus (`fuzz/corpus/plan_json`), through the very checks that the fuzz target
//! runs; and that it is not vacuous: some of it are plans that verify.

#[path = "../../../fuzz/plan_checks.rs"]
mod checks;

use std::fs;
use std::path::Path;

use tonnage_plan::{Plan, Request};

#[test]
#[allow(
    clippy::disallowed_methods,
    reason = "tests read the corpus from files"
)]
fn plans_requests_and_rules() {
    let folder = Path::new(concat!(
        env!("CARGO_MANIFEST_DIR"),
        "/../../fuzz/corpus/plan_json"
    ));
    let (mut plans, mut requests) = (0, 0);
    for entry in fs::read_dir(folder).unwrap() {
        let data = fs::read(entry.unwrap().path()).unwrap();
        checks::plan_json(&data);
        let text = String::from_utf8_lossy(&data);
        plans += u32::from(
            Plan::from_json(&text)
                .and_then(|plan| plan.verify())
                .is_ok(),
        );
        requests += u32::from(Request::from_json(&text).is_ok());
    }
    assert!(plans >= 2 && requests >= 10, "{plans} {requests}");
}
