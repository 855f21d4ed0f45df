//! Requests, rules and plans from anywhere: a refusal or a value, never a panic, never more memory
//! than their own size explains.

mod common;

use common::{on, request, table};
use tonnage_format::Dtype;
use tonnage_plan::{Placement, Plan, Reason, Request, Rules, build};

const LARGE: u64 = u64::MAX;

fn plan_json() -> String {
    let table = table(&[("w", Dtype::BF16, &[4, 6])]);
    let asked = request(&[("tp", 2)], "w", None, on("tp", Placement::shard(1)));
    build(&table, &asked).unwrap().to_json()
}

#[test]
fn every_cut_and_every_changed_byte_of_a_plan_is_survived() {
    let text = plan_json();
    for at in 0..text.len() {
        assert!(Plan::from_json(&text[..at]).is_err());
        for byte in *b"0919-\"[]{},:e\\" {
            let mut other = text.clone().into_bytes();
            other[at] = byte;
            if let Ok(plan) = Plan::from_json(&String::from_utf8(other).unwrap()) {
                let _ = plan.verify();
                let _ = plan.check_every_element(1 << 12);
                let _ = plan.rank(0);
            }
        }
    }
}

#[test]
fn numbers_at_the_end_of_their_range_are_survived() {
    let text = plan_json();
    let digits = |at: usize| text[at..].bytes().take_while(u8::is_ascii_digit).count();
    let mut at = 0;
    let mut tried = 0;
    while at < text.len() {
        let count = digits(at);
        if count == 0 {
            at += 1;
            continue;
        }
        for number in [
            0,
            1,
            u64::from(u32::MAX),
            1 << 62,
            LARGE / 8,
            LARGE - 1,
            LARGE,
        ] {
            let other = format!("{}{number}{}", &text[..at], &text[at + count..]);
            if let Ok(plan) = Plan::from_json(&other) {
                let _ = plan.verify();
            }
            tried += 1;
        }
        at += count;
    }
    assert!(tried > 200, "{tried}");
}

fn refused(request: &str) -> Reason {
    let table = table(&[("w", Dtype::BF16, &[4, 6])]);
    let asked = match Request::from_json(request) {
        Ok(asked) => asked,
        Err(error) => return error.reason(),
    };
    build(&table, &asked).expect_err(request).reason()
}

/// A request for one tensor, of this expression, placed so.
fn wanted(expr: &str, place: &str) -> String {
    format!(
        r#"{{"mesh":[["tp",2]],"targets":[{{"name":"w","expr":{expr},"place":{place}}}],"unread":"allow","repeated":"allow"}}"#
    )
}

#[test]
fn requests_that_ask_for_too_much_are_refused() {
    let w = r#"{"source":"w"}"#;
    for (expr, reason) in [
        (
            format!(r#"{{"repeat":{{"of":{w},"dim":0,"times":{LARGE}}}}}"#),
            Reason::Limit,
        ),
        (
            format!(
                r#"{{"repeat":{{"of":{w},"dim":0,"times":{}}}}}"#,
                1_u64 << 60
            ),
            Reason::Limit,
        ),
        (
            format!(r#"{{"pad":{{"of":{w},"dim":0,"after":{LARGE}}}}}"#),
            Reason::Limit,
        ),
        (
            format!(
                r#"{{"pad":{{"of":{w},"dim":0,"before":{},"after":{LARGE}}}}}"#,
                2
            ),
            Reason::Limit,
        ),
        (
            format!(r#"{{"slice":{{"of":{w},"dim":0,"start":0,"stop":{LARGE}}}}}"#),
            Reason::View,
        ),
        (
            format!(r#"{{"slice":{{"of":{w},"dim":0,"start":3,"stop":1}}}}"#),
            Reason::View,
        ),
        (
            format!(r#"{{"slice":{{"of":{w},"dim":0,"start":0,"stop":4,"step":0}}}}"#),
            Reason::View,
        ),
        (
            format!(
                r#"{{"slice":{{"of":{w},"dim":{},"start":0,"stop":4}}}}"#,
                i64::MIN
            ),
            Reason::View,
        ),
        (
            format!(r#"{{"reshape":{{"of":{w},"shape":[{LARGE},{LARGE}]}}}}"#),
            Reason::Limit,
        ),
        (
            format!(r#"{{"permute":{{"of":{w},"dims":[0,0]}}}}"#),
            Reason::View,
        ),
        (
            format!(r#"{{"permute":{{"of":{w},"dims":[0]}}}}"#),
            Reason::View,
        ),
        (r#"{"concat":{"of":[],"dim":0}}"#.to_owned(), Reason::View),
        (r#"{"stack":{"of":[],"dim":0}}"#.to_owned(), Reason::View),
        (
            r#"{"interleave":{"of":[],"dim":0}}"#.to_owned(),
            Reason::View,
        ),
        (r#"{"source":"x"}"#.to_owned(), Reason::UnknownTensor),
        (r#"{"cast":{"of":"w"}}"#.to_owned(), Reason::Form),
    ] {
        assert_eq!(refused(&wanted(&expr, "{}")), reason, "{expr}");
    }
    let mut deep = w.to_owned();
    for _ in 0..50 {
        deep = format!(r#"{{"permute":{{"of":{deep},"dims":[0,1]}}}}"#);
    }
    assert_eq!(refused(&wanted(&deep, "{}")), Reason::Limit);
    for _ in 0..5000 {
        deep = format!(r#"{{"permute":{{"of":{deep},"dims":[0,1]}}}}"#);
    }
    assert_eq!(refused(&wanted(&deep, "{}")), Reason::Form);
}

#[test]
fn placements_and_meshes_that_cannot_be_are_refused() {
    let w = r#"{"source":"w"}"#;
    for (place, reason) in [
        (r#"{"shard":{"dim":2}}"#, Reason::View),
        (
            r#"{"shard":{"dim":0,"uneven":{"pad_to":0}}}"#,
            Reason::Placement,
        ),
        (
            r#"{"shard":{"dim":0,"uneven":{"pad_to":18446744073709551615}}}"#,
            Reason::Uneven,
        ),
        (
            r#"{"shard":{"dim":0,"uneven":{"pad_to":9223372036854775808}}}"#,
            Reason::Limit,
        ),
        (
            r#"{"shard":{"dim":0,"uneven":{"granular":0}}}"#,
            Reason::Placement,
        ),
        (r#"{"strided":{"dim":0,"groups":0}}"#, Reason::Placement),
        (
            r#"{"strided":{"dim":0,"groups":18446744073709551615}}"#,
            Reason::Limit,
        ),
        (
            r#"{"segments":{"dim":0,"sizes":[18446744073709551615,5],"each":["replicate","replicate"]}}"#,
            Reason::Placement,
        ),
        (
            r#"{"heads":{"dim":0,"heads":18446744073709551615,"head_dim":2}}"#,
            Reason::Placement,
        ),
        (
            r#"{"heads":{"dim":0,"heads":0,"head_dim":0}}"#,
            Reason::Placement,
        ),
        (
            r#"{"blocks":{"dim":0,"block":0,"extent":4}}"#,
            Reason::Placement,
        ),
        (r#"{"owner":[4294967295]}"#, Reason::Placement),
        (r#"{"partial":{}}"#, Reason::Form),
    ] {
        let found = refused(&wanted(w, &format!(r#"{{"tp":{place}}}"#)));
        assert_eq!(found, reason, "{place}");
    }
    for mesh in [
        r#"[["tp",0]]"#,
        r#"[["",2]]"#,
        r#"[["tp",2],["tp",2]]"#,
        r#"[["tp",4294967295]]"#,
        r#"[["a",65536],["b",65536],["c",65536],["d",65536],["e",65536]]"#,
    ] {
        let asked = format!(r#"{{"mesh":{mesh},"targets":[]}}"#);
        assert_eq!(refused(&asked), Reason::Mesh, "{mesh}");
    }
    // So many ranks and targets that a list of them all would not fit.
    let target = r#"{"name":"w"},"#.repeat(1000);
    let asked = format!(
        r#"{{"mesh":[["a",1048576]],"targets":[{}]}}"#,
        target.trim_end_matches(',')
    );
    assert_eq!(refused(&asked), Reason::Limit);
}

#[test]
fn rules_say_what_is_wrong_with_them() {
    let table = table(&[("a.w", Dtype::BF16, &[4]), ("b.w", Dtype::BF16, &[4])]);
    let mesh = |axes: &[(&str, u32)]| tonnage_plan::Mesh::new(axes).unwrap();
    let asked = |rules: &str, axes: &[(&str, u32)]| {
        Rules::from_json(rules).and_then(|rules| rules.request(&table, &mesh(axes)))
    };
    let error = asked(r#"{"a.*":{"shard":{"dim":0}}}"#, &[("tp", 2)]).unwrap_err();
    assert_eq!(
        (error.reason(), error.tensor_name()),
        (Reason::NoRule, Some("b.w"))
    );
    let error = asked(r#"{"*":{"shard":{"dim":0}}}"#, &[("x", 2), ("y", 2)]).unwrap_err();
    assert_eq!(error.reason(), Reason::Placement);
    let error = asked(r#"{"*":{"z":{"shard":{"dim":0}}}}"#, &[("x", 2), ("y", 2)]).unwrap_err();
    assert_eq!(error.reason(), Reason::UnknownAxis);
    assert_eq!(
        asked(r#"{"*":{"sharded":0}}"#, &[("tp", 2)])
            .unwrap_err()
            .reason(),
        Reason::Form
    );
    assert_eq!(
        asked(r#"["*"]"#, &[("tp", 2)]).unwrap_err().reason(),
        Reason::Form
    );
    // The first rule that matches holds; a lone placement is for `tp`, an owner for `pp`.
    let both = r#"{"a.*":{"owner":[1]},"*.w":{"shard":{"dim":0}},"*":"replicate"}"#;
    let request = asked(both, &[("pp", 2), ("tp", 2)]).unwrap();
    assert_eq!(
        *request.targets[0].place,
        on("pp", Placement::Owner(vec![1]))
    );
    assert_eq!(*request.targets[1].place, on("tp", Placement::shard(0)));
    assert_eq!(Request::from_json(&request.to_json()).unwrap(), request);
    let alone = asked(r#"{"*":{"shard":{"dim":0}}}"#, &[("x", 1), ("y", 2)]).unwrap();
    assert_eq!(*alone.targets[0].place, on("y", Placement::shard(0)));
}
