//! What the fuzz target `plan_json` holds true of any text: requests, rules and plans are refused with a
//! sentence or are values that hold what they promise. `crates/plan/tests/fuzz_replay.rs` feeds it the
//! committed corpus.

use tonnage_format::Dtype;
use tonnage_plan::{Error, Mesh, Plan, Request, Rules, Table, build};

/// Elements of a plan that are compared one by one.
const ELEMENTS: u64 = 1 << 14;

/// Reads the text as each of the three.
pub fn plan_json(data: &[u8]) {
    let Ok(text) = std::str::from_utf8(data) else {
        return;
    };
    match Plan::from_json(text) {
        Ok(plan) => judged(&plan),
        Err(error) => refused(&error),
    }
    let table = table();
    match Request::from_json(text) {
        Ok(request) => planned(&table, &request),
        Err(error) => refused(&error),
    }
    match Rules::from_json(text) {
        Ok(rules) => {
            let mesh = Mesh::new(&[("pp", 2), ("tp", 4)]).expect("a mesh");
            if let Ok(request) = rules.request(&table, &mesh) {
                planned(&table, &request);
            }
        }
        Err(error) => refused(&error),
    }
}

fn table() -> Table {
    let mut table = Table::new();
    let file = table.add_file("a", 4096);
    for (name, dtype, shape, offset) in [
        ("w", Dtype::BF16, &[6, 8][..], 8),
        ("qkv", Dtype::F32, &[12, 4], 104),
        ("packed", Dtype::F4, &[4, 8], 296),
        ("step", Dtype::I64, &[], 312),
        ("none", Dtype::U8, &[0, 3], 320),
    ] {
        table
            .add(name, dtype, shape, file, offset)
            .expect("a tensor that fits");
    }
    table
}

fn refused(error: &Error) {
    assert!(
        error.to_string().len() < 4096,
        "a message of unbounded length"
    );
    assert!(error.code().starts_with("PLAN_"));
}

/// What was planned holds, element by element, and so does its JSON.
fn planned(table: &Table, request: &Request) {
    let Ok(again) = Request::from_json(&request.to_json()) else {
        panic!("what was read cannot be read again");
    };
    assert_eq!(&again, request);
    match build(table, request) {
        Ok(plan) => {
            plan.verify().expect("a plan that was built");
            if let Err(error) = plan.check_every_element(ELEMENTS) {
                assert_eq!(error.code(), "PLAN_LIMIT", "{error}");
            }
            let read = Plan::from_json(&plan.to_json()).expect("a plan that was written");
            assert_eq!(read, plan);
            assert_eq!(read.digest(), plan.digest());
        }
        Err(error) => refused(&error),
    }
}

/// A plan from anywhere: if it verifies, every copy lies inside of its file, and the text is stable.
fn judged(plan: &Plan) {
    let text = plan.to_json();
    assert_eq!(&Plan::from_json(&text).expect("what was read"), plan);
    if let Err(error) = plan.verify() {
        return refused(&error);
    }
    for rank in 0..plan.mesh().size().min(8) {
        for local in plan.rank(rank).expect("a rank") {
            for nest in &local.nests {
                let file = &plan.files()[nest.file as usize];
                assert!(nest.src_end().div_ceil(8) <= file.len);
            }
        }
    }
    let _ = plan.check_every_element(ELEMENTS);
}
