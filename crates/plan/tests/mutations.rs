//! A plan of which any number is changed is refused: more than a thousand changes of copies, boxes
//! and zeros of valid plans, each made in the plan's JSON, each found by the proof.

mod common;

use std::collections::BTreeMap;

use common::{Random, carried_out};
use serde_json::Value;
use tonnage_format::Dtype;
use tonnage_plan::{Allow, Expr, Place, Placement, Plan, Request, Table, Uneven, Wanted, build};

/// A small model that has what there is: shards of either dimension, fused tensors, stacks, repeats,
/// padding, turned tensors, stages.
fn model() -> (Table, Request) {
    let rows: &[(&str, Dtype, &[u64])] = &[
        ("q", Dtype::BF16, &[16, 12]),
        ("o", Dtype::BF16, &[12, 16]),
        ("gate_up", Dtype::F32, &[16, 6]),
        ("e0", Dtype::U8, &[4, 6]),
        ("e1", Dtype::U8, &[4, 6]),
        ("head", Dtype::F16, &[13, 4]),
        ("turned", Dtype::F4, &[4, 8]),
        ("scale", Dtype::F32, &[3]),
    ];
    let shard = |dim| Placement::shard(dim);
    let of = |name: &str| Box::new(Expr::source(name));
    let tp = |placement| common::on("tp", placement);
    let mut stage = tp(shard(1));
    stage.insert("pp".to_owned(), Placement::Owner(vec![1]));
    let with = |name: &str, expr, place| Wanted {
        expr: Some(expr),
        ..Wanted::new(name, place)
    };
    let targets = vec![
        Wanted::new("q", tp(shard(0))),
        Wanted::new("o", stage),
        Wanted::new(
            "gate_up",
            tp(Placement::Strided {
                dim: 0,
                groups: 2,
                uneven: Uneven::Torch,
            }),
        ),
        with(
            "experts",
            Expr::Stack {
                of: vec![*of("e0"), *of("e1")],
                dim: 0,
            },
            tp(shard(2)),
        ),
        Wanted::new(
            "head",
            tp(Placement::Shard {
                dim: 0,
                uneven: Uneven::PadTo(8),
            }),
        ),
        with(
            "wide",
            Expr::Reshape {
                of: of("turned"),
                shape: vec![2, 2, 8],
            },
            tp(shard(2)),
        ),
        with(
            "scales",
            Expr::Repeat {
                of: of("scale"),
                dim: 0,
                times: 2,
            },
            Place::new(),
        ),
    ];
    let request = Request {
        mesh: vec![("pp".to_owned(), 2), ("tp".to_owned(), 2)],
        targets,
        unread: Allow::Unsaid,
        repeated: Allow::Unsaid,
        ..Request::default()
    };
    (common::table(rows), request)
}

/// Where the numbers of all copies, zeros, boxes and shapes are in the JSON.
fn numbers(value: &Value, path: &str, found: &mut Vec<String>) {
    match value {
        Value::Number(_) => found.push(path.to_owned()),
        Value::Array(all) => {
            for (at, one) in all.iter().enumerate() {
                numbers(one, &format!("{path}/{at}"), found);
            }
        }
        Value::Object(all) => {
            for (key, one) in all {
                numbers(one, &format!("{path}/{key}"), found);
            }
        }
        _ => {}
    }
}

/// What the plan brings to every rank.
fn brought(plan: &Plan) -> Vec<Option<common::Array>> {
    let ranks = 0..plan.mesh().size();
    let targets = 0..plan.targets().len();
    targets
        .flat_map(|at| ranks.clone().map(move |rank| carried_out(plan, at, rank)))
        .collect()
}

#[test]
fn every_changed_number_is_found() {
    let (table, request) = model();
    let plan = build(&table, &request).expect("a plan");
    plan.check_every_element(1 << 20)
        .expect("a plan that holds");
    let json: Value = serde_json::from_str(&plan.to_json()).unwrap();
    let mut paths = Vec::new();
    for (at, target) in json["targets"].as_array().unwrap().iter().enumerate() {
        numbers(
            &target["layouts"],
            &format!("/targets/{at}/layouts"),
            &mut paths,
        );
    }
    assert!(paths.len() > 150, "{}", paths.len());
    let mut random = Random(7);
    let mut refusals: BTreeMap<String, usize> = BTreeMap::new();
    let mut changed = 0;
    while changed < 1500 {
        let path = random.pick(&paths).clone();
        let mut other = json.clone();
        let number = other.pointer_mut(&path).unwrap();
        let old = number.as_u64().unwrap();
        let new = match random.below(6) {
            0 => old + 1,
            1 => old.saturating_sub(1),
            2 => old + 8 * random.within(1, 16),
            3 => old.saturating_sub(8 * random.within(1, 16)),
            4 => old * 2,
            _ => random.below(512),
        };
        if new == old {
            continue;
        }
        *number = new.into();
        let verdict =
            Plan::from_json(&other.to_string()).and_then(|plan| plan.verify().map(|_| plan));
        match verdict {
            Err(error) => *refusals.entry(error.code().to_owned()).or_default() += 1,
            Ok(other) => panic!(
                "{path}: {old} became {new}, and nobody saw; brings the same: {}",
                brought(&other) == brought(&plan)
            ),
        }
        changed += 1;
    }
    // Several parts of the proof find something.
    for code in [
        "PLAN_DESTINATION",
        "PLAN_SEMANTICS",
        "PLAN_BOUNDS",
        "PLAN_PLACEMENT",
    ] {
        assert!(
            refusals.get(code).is_some_and(|&count| count > 20),
            "{refusals:?}"
        );
    }
}

#[test]
fn copies_that_are_exchanged_dropped_or_doubled_are_found() {
    let (table, request) = model();
    let plan = build(&table, &request).expect("a plan");
    let json: Value = serde_json::from_str(&plan.to_json()).unwrap();
    let mut tried = 0;
    for (at, target) in json["targets"].as_array().unwrap().iter().enumerate() {
        let layouts = target["layouts"].as_array().unwrap();
        for (which, layout) in layouts.iter().enumerate() {
            let count = layout["nests"].as_array().map_or(0, Vec::len);
            for nest in 0..count {
                let nests = format!("/targets/{at}/layouts/{which}/nests");
                let change = |f: &dyn Fn(&mut Vec<Value>)| {
                    let mut other = json.clone();
                    f(other.pointer_mut(&nests).unwrap().as_array_mut().unwrap());
                    let plan = Plan::from_json(&other.to_string());
                    assert!(
                        plan.and_then(|plan| plan.verify()).is_err(),
                        "{nests}/{nest}"
                    );
                };
                change(&|nests| drop(nests.remove(nest)));
                change(&|nests| nests.push(nests[nest].clone()));
                for source in 0..table.sources().len() {
                    if nest_source(&layout["nests"][nest]) != source {
                        change(&|nests| nests[nest][0] = source.into());
                        tried += 1;
                    }
                }
            }
        }
        // The layouts of two ranks exchanged.
        for other in 1..layouts.len() {
            let mut swapped = json.clone();
            let list = format!("/targets/{at}/layouts");
            swapped
                .pointer_mut(&list)
                .unwrap()
                .as_array_mut()
                .unwrap()
                .swap(0, other);
            let plan = Plan::from_json(&swapped.to_string());
            assert!(plan.and_then(|plan| plan.verify()).is_err(), "{list}");
            tried += 1;
        }
    }
    assert!(tried > 50, "{tried}");
}

fn nest_source(nest: &Value) -> usize {
    nest[0].as_u64().unwrap() as usize
}
