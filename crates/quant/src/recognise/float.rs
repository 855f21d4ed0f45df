//! Small floats: FP8 with its scales, MX and NVFP4.

use tonnage_format::Dtype;

use super::{Draft, Recogniser, sizes};
use crate::descriptor::Role;
use crate::map::{Confidence, Provenance};
use crate::recognise::config::block;
use crate::recognise::names::Module;
use crate::scheme::{Part, count};
use Confidence::{Certain, Likely};

const SCALES: &[&str] = &[
    ".weight_scale",
    ".weight_scale_inv",
    ".scale",
    ".qscale_weight",
    ".scale_weight",
];
const INPUTS: &[&str] = &[
    ".input_scale",
    ".activation_scale",
    ".qscale_act",
    ".input_scale_ub",
    ".scale_input",
    ".input_global_scale",
];

/// FP8 dtypes.
fn is_fp8(part: &Part) -> bool {
    matches!(
        part.dtype,
        Dtype::F8_E4M3 | Dtype::F8_E5M2 | Dtype::F8_E4M3FNUZ | Dtype::F8_E5M2FNUZ
    )
}

impl<'a> Recogniser<'a, '_> {
    /// Small floats with their scales: by dtypes and by how many columns share a scale.
    pub(super) fn float(&mut self, module: &Module<'a>) -> bool {
        if let (Some(codes), Some(scales)) = (module.get("_blocks"), module.get("_scales")) {
            let roles = [(Role::Codes, "_blocks"), (Role::Scale, "_scales")];
            let fits = codes.dtype == Dtype::U8 && scales.dtype == Dtype::U8;
            return fits && self.micro(module, "mxfp4", &roles, scales);
        }
        let Some((codes_at, codes)) = module.first(&[".weight", ".weight_packed"]) else {
            return false;
        };
        let Some((scale_at, scale)) = module.first(SCALES) else {
            return false;
        };
        let roles = [(Role::Codes, codes_at), (Role::Scale, scale_at)];
        let (Some(&columns), Some(&scales)) = (codes.shape.last(), scale.shape.last()) else {
            return is_fp8(codes) && self.fp8(module, &roles, codes, scale);
        };
        let bits = columns.saturating_mul(codes.dtype.bitsize() as u64);
        let share = |width: u64, block: u64| {
            codes.shape.len() == scale.shape.len()
                && codes
                    .shape
                    .iter()
                    .rev()
                    .skip(1)
                    .eq(scale.shape.iter().rev().skip(1))
                && bits.div_ceil(width).div_ceil(block) == scales
                && bits > 0
        };
        let e8m0 = matches!(scale.dtype, Dtype::U8 | Dtype::F8_E8M0);
        let small = matches!(codes.dtype, Dtype::U8 | Dtype::I8 | Dtype::F4);
        if is_fp8(codes) {
            if e8m0 && share(8, 32) && self.block_of(module).is_none() {
                return self.micro(module, "mxfp8", &roles, scale);
            }
            return self.fp8(module, &roles, codes, scale);
        }
        if small && scale.dtype == Dtype::F8_E4M3 && share(4, 16) {
            return self.nvfp4(module, codes_at, scale_at);
        }
        if small && e8m0 && share(4, 32) {
            return self.micro(module, "mxfp4", &roles, scale);
        }
        let six = matches!(codes.dtype, Dtype::F6_E2M3 | Dtype::F6_E3M2)
            || (codes.dtype == Dtype::U8 && codes_at == ".weight_packed");
        if six && e8m0 && share(6, 32) {
            return self.micro(module, "mxfp6", &roles, scale);
        }
        false
    }

    /// NVFP4: whether the tensor's own scale multiplies or divides follows from its name.
    fn nvfp4(&mut self, module: &Module<'a>, codes: &str, scale: &str) -> bool {
        let divides = module.get(".weight_global_scale").is_some();
        let (scheme, global) = match divides {
            true => ("nvfp4-div", ".weight_global_scale"),
            false => ("nvfp4-mul", ".weight_scale_2"),
        };
        let mut roles = vec![
            (Role::Codes, codes),
            (Role::Scale, scale),
            (Role::GlobalScale, global),
        ];
        self.input(module, &mut roles);
        let mut draft = Draft::default();
        draft.note("bits", 4, Provenance::Shapes, Certain);
        draft.note("group", 16, Provenance::Shapes, Certain);
        self.model_dtype(&mut draft);
        self.make(
            module,
            scheme,
            &roles,
            &[".pre_quant_scale"],
            draft,
            (Provenance::Shapes, Certain),
        )
    }

    fn micro(
        &mut self,
        module: &Module<'a>,
        scheme: &str,
        roles: &[(Role, &str)],
        scale: &Part,
    ) -> bool {
        let mut roles = roles.to_vec();
        self.input(module, &mut roles);
        let mut draft = Draft::default();
        let bits = match scheme {
            "mxfp4" => 4,
            "mxfp6" => 6,
            _ => 8,
        };
        draft.note("bits", bits, Provenance::Shapes, Certain);
        draft.note("group", 32, Provenance::Shapes, Certain);
        self.model_dtype(&mut draft);
        // U8 says nothing of what is in it; F8_E8M0 does.
        let sure = if scale.dtype == Dtype::F8_E8M0 {
            Certain
        } else {
            Likely
        };
        self.make(
            module,
            scheme,
            &roles,
            &[],
            draft,
            (Provenance::Shapes, sure),
        )
    }

    fn model_dtype(&self, draft: &mut Draft) {
        if let Some((dtype, file)) = self.configs.model_dtype() {
            draft.dtype(dtype, Provenance::Config(file.to_owned()), Likely);
        }
    }

    fn input(&self, module: &Module<'a>, roles: &mut Vec<(Role, &str)>) {
        if let Some((suffix, _)) = module.first(INPUTS) {
            roles.push((Role::InputScale, suffix));
        }
    }

    /// The block that a configuration states for a module's scales.
    fn block_of(&self, module: &Module<'a>) -> Option<(Vec<i64>, String)> {
        self.configs.said.iter().find_map(|said| {
            if let Some(block) = said.block("weight_block_size") {
                return Some((block, said.file.clone()));
            }
            let group = said.group(module.name)?;
            let block = block(group.weights.get("block_structure")?)?;
            Some((block, said.file.clone()))
        })
    }

    /// FP8: one scale, one a row, or one a block, whose size the configuration says.
    fn fp8(
        &mut self,
        module: &Module<'a>,
        roles: &[(Role, &str)],
        codes: &Part,
        scale: &Part,
    ) -> bool {
        let mut roles = roles.to_vec();
        self.input(module, &mut roles);
        let mut draft = Draft::default();
        draft.note("bits", 8, Provenance::Shapes, Certain);
        self.dtype_by(&mut draft, scale);
        let Some((_, rows)) = codes.shape.split_last() else {
            return false;
        };
        if count(scale).ok() == Some(1) {
            return self.make(
                module,
                "fp8-tensor",
                &roles,
                &[],
                draft,
                (Provenance::Shapes, Certain),
            );
        }
        let by_row = scale.shape == rows
            || scale
                .shape
                .split_last()
                .is_some_and(|(last, lead)| *last == 1 && lead == rows);
        let stated = self.block_of(module);
        let by_block = stated
            .as_ref()
            .is_some_and(|(block, _)| block.first() == Some(&1));
        if by_row && !by_block {
            return self.make(
                module,
                "fp8-row",
                &roles,
                &[],
                draft,
                (Provenance::Shapes, Certain),
            );
        }
        let from = match stated {
            Some((block, file)) => {
                let shown: Vec<u64> = block.iter().map(|size| size.unsigned_abs()).collect();
                let from = Provenance::Config(file);
                draft.put("block", sizes(&shown), from.clone(), Certain);
                (from, Certain)
            }
            None => {
                // Never by division: 192 rows in blocks of 128 have two scales, as 192 rows in blocks of 96 have.
                draft.put("block", sizes(&[128, 128]), Provenance::Default, Likely);
                draft.ambiguous(
                    "block",
                    vec!["[128, 128]".to_owned(), "any other that gives as many".to_owned()],
                    "no configuration says the size of a block, and the number of scales fits several",
                );
                (Provenance::Shapes, Likely)
            }
        };
        self.make(module, "fp8-block", &roles, &[], draft, from)
    }
}
