//! Whatever parts and parameters say: a refusal, or a meaning that reads within its bytes.

use proptest::prelude::*;
use tonnage_format::Dtype;
use tonnage_quant::descriptor::Role;
use tonnage_quant::interpret::{Bytes, interpret};
use tonnage_quant::scheme::{Param, Params, Part, Parts, Scheme};

fn number() -> impl Strategy<Value = u64> {
    prop_oneof![
        8 => prop::sample::select(vec![0_u64, 1, 2, 3, 4, 8, 16, 32, 64, 96, 128, 256]),
        1 => 0..400_u64,
        1 => any::<u64>(),
    ]
}

fn param() -> impl Strategy<Value = Param> {
    prop_oneof![
        4 => prop::sample::select(vec![-1_i64, 0, 1, 2, 3, 4, 5, 6, 7, 8, 16, 32, 64, 128, i64::MIN, i64::MAX])
            .prop_map(Param::Int),
        1 => any::<bool>().prop_map(Param::Flag),
        2 => prop::sample::select(vec!["field", "word32", "F16", "e2m3", "swizzle_128x4", ""])
            .prop_map(|word| Param::Text(word.to_owned())),
        3 => prop::collection::vec(number(), 0..4)
            .prop_map(|list| Param::List(list.into_iter().map(|n| n as i64).collect())),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 20_000, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn nothing_panics_and_nothing_is_read_from_elsewhere(
        row in 0..Scheme::all().count(),
        params in prop::collection::vec((any::<prop::sample::Index>(), param()), 0..5),
        parts in prop::collection::vec(
            (any::<prop::sample::Index>(), prop::collection::vec(number(), 0..4), 0..10_usize),
            6,
        ),
    ) {
        let scheme = Scheme::all().nth(row).unwrap();
        let params = params
            .into_iter()
            .map(|(name, value)| (name.get(scheme.params).to_string(), value));
        let dtype = |at: usize, own: &[Dtype]| own.get(at).copied().unwrap_or(Dtype::ALL[at * 2]);
        let there: Parts = scheme
            .parts
            .iter()
            .zip(parts)
            .map(|(row, (_, shape, at))| {
                let likely: &[Dtype] = match row.role {
                    Role::Codes => &[Dtype::I32, Dtype::U8, Dtype::U32, Dtype::F8_E4M3, Dtype::I8],
                    Role::Zero => &[Dtype::I32, Dtype::F16, Dtype::I8, Dtype::I32],
                    _ => &[Dtype::F16, Dtype::F32, Dtype::U8, Dtype::F8_E4M3, Dtype::BF16],
                };
                let name = format!("m.{}", row.suffixes[0]);
                (row.role, Part { name, dtype: dtype(at, likely), shape })
            })
            .collect();
        let Ok(meaning) = scheme.describe(&Params(params.collect()), &there) else {
            return Ok(());
        };
        let elements = meaning.view.iter().try_fold(1_u64, |n, len| n.checked_mul(*len));
        let Some(elements) = elements.filter(|n| *n < 1 << 20) else {
            return Ok(());
        };
        let bytes: Vec<(Role, Vec<u8>)> = there
            .iter()
            .filter_map(|(role, part)| {
                let bits = part.shape.iter().try_fold(part.dtype.bitsize() as u64, |n, l| n.checked_mul(*l))?;
                (bits < 1 << 24).then(|| (*role, vec![0xA5; (bits / 8) as usize]))
            })
            .collect();
        let data: Bytes<'_> = bytes.iter().map(|(role, bytes)| (*role, &bytes[..])).collect();
        let rows = meaning.shape.iter().rev().skip(1).product();
        let mut out = vec![0.0; elements as usize];
        // An index of groups may point outside; that is an error too, and no panic.
        let _ = interpret(&meaning, &data, 0..rows, &mut out);
    }
}

#[test]
fn a_refusal_names_part_and_sizes() {
    let scheme = Scheme::find("awq-gemm@1").unwrap();
    let part = |name: &str, dtype, shape: &[u64]| Part {
        name: name.to_owned(),
        dtype,
        shape: shape.to_vec(),
    };
    let mut parts = Parts::from([
        (Role::Codes, part("m.qweight", Dtype::I32, &[64, 4])),
        (Role::Zero, part("m.qzeros", Dtype::I32, &[2, 4])),
        (Role::Scale, part("m.scales", Dtype::F16, &[2, 32])),
    ]);
    assert_eq!(
        scheme.describe(&Params::default(), &parts).unwrap().view,
        [32, 64]
    );
    parts.insert(Role::Scale, part("m.scales", Dtype::F16, &[2, 33]));
    let refused = scheme.describe(&Params::default(), &parts).unwrap_err();
    assert!(refused.to_string().contains("m.scales"), "{refused}");
    parts.remove(&Role::Zero);
    let refused = scheme.describe(&Params::default(), &parts).unwrap_err();
    assert!(refused.to_string().contains("Zero"), "{refused}");
    let unknown = Params::of([("colour", Param::Int(1))]);
    assert!(scheme.describe(&unknown, &parts).is_err());
    assert!(Scheme::find("awq-gemm@2").is_none() && Scheme::find("nothing").is_none());
}
