use super::*;

fn offered(name: &str, dtype: &str, shape: &[u64], boxes: &[(&[u64], &[u64])]) -> Offered {
    Offered {
        name: name.to_owned(),
        dtype: dtype.to_owned(),
        shape: shape.to_vec(),
        boxes: boxes
            .iter()
            .map(|(a, b)| Piece(a.to_vec(), b.to_vec()))
            .collect(),
    }
}

fn plan(offers: &[Vec<Offered>]) -> Result<(SavePlan, Vec<Offer>)> {
    let offers: Vec<Offer> = offers
        .iter()
        .map(|t| Offer { tensors: t.clone() })
        .collect();
    let one = |tensors: &[Saved], _: &[u64]| Ok(vec![(0..tensors.len()).collect()]);
    plan_save(&offers, &WriteOptions::default(), one).map(|plan| (plan, offers))
}

#[test]
fn replicas_go_to_whoever_has_the_least_to_write() {
    let shared = |n| offered(&format!("s{n}"), "F32", &[8], &[(&[0], &[8])]);
    let big = offered("w", "F32", &[64], &[(&[0], &[64])]);
    let (plan, _) = plan(&[
        vec![big, shared(1), shared(2)],
        vec![shared(1), shared(2)],
        vec![
            shared(2),
            shared(1),
            offered("e", "F32", &[0], &[(&[0], &[0])]),
        ],
    ])
    .unwrap();
    let of = |rank: usize| -> Vec<&str> {
        plan.writes[rank]
            .iter()
            .map(|w| plan.tensors[w.tensor].name.as_str())
            .collect()
    };
    let wanted = (vec!["w"], vec!["s1"], vec!["s2", "e"]);
    assert_eq!((of(0), of(1), of(2)), wanted);
    let names: Vec<&str> = plan.tensors.iter().map(|t| t.name.as_str()).collect();
    assert_eq!(names, ["w", "s1", "s2", "e"]);
}

#[test]
fn strided_boxes_of_four_ranks_tile() {
    let boxes: [[(&[u64], &[u64]); 2]; 2] = [
        [(&[0, 0], &[2, 5]), (&[4, 0], &[2, 5])],
        [(&[2, 0], &[2, 5]), (&[6, 0], &[1, 5])],
    ];
    let w = |rank: usize| offered("w", "BF16", &[7, 5], &boxes[rank]);
    let step = || offered("step", "F32", &[], &[(&[], &[])]);
    let (plan, offers) = plan(&[vec![w(0), step()], vec![w(1), step()]]).unwrap();
    assert_eq!(plan.writes[0].len() + plan.writes[1].len(), 5);
    plan.verify(&offers).unwrap();
    assert_ne!(
        plan.digest(),
        SavePlan {
            writes: vec![],
            ..plan.clone()
        }
        .digest()
    );
}

#[test]
fn holes_overlaps_and_disagreement_are_named() {
    let w = |shape: &[u64], boxes: &[(&[u64], &[u64])]| vec![offered("w", "F32", shape, boxes)];
    let refused = |offers: &[Vec<Offered>]| {
        let error = plan(offers).unwrap_err();
        (error.reason(), error.to_string())
    };
    let (reason, text) = refused(&[
        w(&[8, 4], &[(&[0, 0], &[4, 4])]),
        w(&[8, 4], &[(&[4, 1], &[4, 3])]),
    ]);
    assert_eq!(reason, Reason::Destination);
    assert!(
        text.contains("[4:8, 0:1]") && text.contains("\"w\""),
        "{text}"
    );
    let (reason, text) = refused(&[
        w(&[8, 4], &[(&[0, 0], &[5, 4])]),
        w(&[8, 4], &[(&[4, 0], &[4, 4])]),
    ]);
    assert_eq!(reason, Reason::Destination);
    assert!(
        text.contains("[4:8, 0:4]") && text.contains("rank 0"),
        "{text}"
    );
    let (reason, text) = refused(&[w(&[8], &[(&[0], &[8])]), w(&[9], &[(&[0], &[9])])]);
    assert_eq!(reason, Reason::Disagree);
    assert!(text.contains("rank 1") && text.contains("rank 0"), "{text}");
    let (reason, _) = refused(&[w(&[8], &[(&[0], &[9])])]);
    assert_eq!(reason, Reason::Bounds);
    let (reason, _) = refused(&[w(&[8], &[(&[u64::MAX], &[1])])]);
    assert_eq!(reason, Reason::Bounds);
    let (reason, _) = refused(&[w(&[1 << 40, 1 << 40], &[])]);
    assert_eq!(reason, Reason::Granularity);
    let (reason, _) = refused(&[vec![offered("w", "F5", &[1], &[])]]);
    assert_eq!(reason, Reason::Dtype);
    let (reason, _) = refused(&[vec![offered(
        "w",
        "F4",
        &[6],
        &[(&[0], &[3]), (&[3], &[3])],
    )]]);
    assert_eq!(reason, Reason::Granularity);
    let (reason, _) = refused(&[w(&[], &[])]);
    assert_eq!(reason, Reason::Destination);
    let (reason, _) = refused(&[vec![offered("__metadata__", "F32", &[], &[(&[], &[])])]]);
    assert_eq!(reason, Reason::Form);
}

#[test]
fn a_plan_that_was_changed_is_refused() {
    let w = |begin: u64| {
        vec![
            offered("w", "F32", &[8], &[(&[begin], &[4])]),
            offered("v", "F32", &[2], &[(&[0], &[2])]),
        ]
    };
    let (plan, offers) = plan(&[w(0), w(4)]).unwrap();
    let changed = |change: &dyn Fn(&mut SavePlan)| {
        let mut plan = plan.clone();
        change(&mut plan);
        plan.verify(&offers).unwrap_err().reason()
    };
    assert_eq!(changed(&|p| p.writes[0].clear()), Reason::Destination);
    assert_eq!(changed(&|p| p.writes[0][0].piece = 1), Reason::Form);
    assert_eq!(
        changed(&|p| {
            let w = p.writes[0][0];
            p.writes[0].push(w)
        }),
        Reason::Destination
    );
    assert_eq!(changed(&|p| p.writes[0][0].tensor = 1), Reason::Form);
    assert_eq!(
        changed(&|p| p.files[0].ranges[0].0 += 4),
        Reason::Destination
    );
    assert_eq!(
        changed(&|p| p.files[0].ranges.swap(0, 1)),
        Reason::Destination
    );
    assert_eq!(
        changed(&|p| {
            p.files[0].tensors.pop();
            p.files[0].ranges.pop();
        }),
        Reason::Destination
    );
    assert_eq!(
        changed(&|p| {
            let f = p.files[0].clone();
            p.files.push(f)
        }),
        Reason::Destination
    );
    assert_eq!(
        changed(&|p| {
            p.writes.pop();
        }),
        Reason::Form
    );
}
