//! AWQ: `qweight`, `qzeros`, `scales` in three layouts, and Marlin's tiles.

use tonnage_format::Dtype;

use super::{Draft, Recogniser};
use crate::descriptor::Role;
use crate::map::{Confidence, Provenance};
use crate::recognise::names::Module;
use Confidence::{Certain, Guess, Likely};

const ROLES: &[(Role, &str)] = &[
    (Role::Codes, ".qweight"),
    (Role::Zero, ".qzeros"),
    (Role::Scale, ".scales"),
];

impl<'a> Recogniser<'a, '_> {
    pub(super) fn awq(&mut self, module: &Module<'a>) -> bool {
        let Some(
            [
                (codes, rows, words),
                (_, zero_rows, zero_columns),
                (scales, groups, columns),
            ],
        ) = module.packed()
        else {
            return false;
        };
        let said = self
            .configs
            .by(&["awq", "auto-round", "intel/auto-round"])
            .cloned();
        let stated = said.as_ref().and_then(|s| {
            let own = s.of_module("extra_config", module.name);
            own.and_then(|own| own.get("group_size")?.as_i64())
                .or_else(|| s.int(&["group_size", "q_group_size"]))
        });
        let file = said.as_ref().map(|s| s.file.as_str());
        let mut draft = Draft::default();
        self.dtype_by(&mut draft, scales);
        let by = |sure| match file {
            Some(file) => (Provenance::Config(file.to_owned()), sure),
            None => (Provenance::Shapes, sure),
        };
        if codes.dtype == Dtype::I32
            && words.checked_mul(8) == Some(columns)
            && zero_columns == words
        {
            self.group(&mut draft, rows, groups, stated, file);
            draft.note("bits", 4, Provenance::Shapes, Certain);
            return self.make(module, "awq-gemm", ROLES, &[], draft, by(Certain));
        }
        if codes.dtype == Dtype::I32
            && groups == rows
            && zero_rows == rows
            && zero_columns.checked_mul(8) == Some(columns)
        {
            let inner = words.saturating_mul(8);
            let padded = |group: u64| {
                let step = (128 / group.clamp(32, 128)).max(1);
                inner.div_ceil(group).div_ceil(8).div_ceil(step) * step == zero_columns
            };
            padded_group(&mut draft, inner, stated, file, &padded);
            draft.note("bits", 4, Provenance::Shapes, Certain);
            return self.make(module, "awq-gemv", ROLES, &[], draft, by(Certain));
        }
        if codes.dtype == Dtype::I16 && rows.checked_mul(4) == Some(columns) {
            let inner = words;
            let padded = |group: u64| {
                let step = (128 / group.clamp(32, 128)).max(1);
                inner.div_ceil(group).div_ceil(8).div_ceil(step) * step * 8 == groups
            };
            padded_group(&mut draft, inner, stated, file, &padded);
            draft.note("bits", 4, Provenance::Shapes, Certain);
            return self.make(module, "awq-gemv-fast", ROLES, &[], draft, by(Certain));
        }
        false
    }

    pub(super) fn marlin(&mut self, module: &Module<'a>) -> bool {
        let suffixes = [(".qweight", ".scales"), (".B", ".s")];
        let found = suffixes.iter().find_map(|&(codes, scales)| {
            Some((codes, scales, module.matrix(codes)?, module.matrix(scales)?))
        });
        let Some((codes, scales, (part, tiles, columns), (scale, groups, out))) = found else {
            return false;
        };
        if part.dtype != Dtype::I32
            || out.checked_mul(2) != Some(columns)
            || module.get(".qzeros").is_some()
        {
            return false;
        }
        let said = self.configs.by(&["awq", "gptq", "marlin"]);
        let file = said.map(|s| s.file.clone());
        let stated = said.and_then(|s| s.int(&["group_size", "q_group_size"]));
        let mut draft = Draft::default();
        self.group(
            &mut draft,
            tiles.saturating_mul(16),
            groups,
            stated,
            file.as_deref(),
        );
        draft.note("bits", 4, Provenance::Shapes, Certain);
        self.dtype_by(&mut draft, scale);
        let roles = [(Role::Codes, codes), (Role::Scale, scales)];
        self.make(
            module,
            "marlin",
            &roles,
            &[],
            draft,
            (Provenance::Shapes, Likely),
        )
    }
}

/// The group where columns of scales are padded, so that several groups may fit.
fn padded_group(
    draft: &mut Draft,
    inner: u64,
    stated: Option<i64>,
    file: Option<&str>,
    fits: &dyn Fn(u64) -> bool,
) {
    let stated = match stated {
        Some(-1 | 0) => Some(inner),
        Some(group) => u64::try_from(group)
            .ok()
            .filter(|group| *group > 0 && fits(*group)),
        None => None,
    };
    if let (Some(group), Some(file)) = (stated, file) {
        draft.int("group", group, Provenance::Config(file.to_owned()), Certain);
        return;
    }
    let readings: Vec<u64> = [128, 64, 32]
        .into_iter()
        .filter(|&group| fits(group))
        .collect();
    let Some(&first) = readings.first() else {
        return;
    };
    let sure = if readings.len() == 1 { Likely } else { Guess };
    draft.int("group", first, Provenance::Shapes, sure);
    if readings.len() > 1 {
        draft.ambiguous(
            "group",
            readings.iter().map(ToString::to_string).collect(),
            "the columns of scales are padded, and nothing says how many mean something",
        );
    }
}
