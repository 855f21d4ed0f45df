//! Integers: compressed-tensors' packed and whole ones, MLX's words, bitsandbytes' rows, BitNet, Gemma, Model Optimizer.

use tonnage_format::Dtype;

use super::{Draft, Recogniser, shape_in, sizes};
use crate::descriptor::Role;
use crate::map::{Confidence, Provenance};
use crate::recognise::config::{Said, at_least};
use crate::recognise::names::Module;
use crate::scheme::{Param, Part, count};
use Confidence::{Certain, Guess, Likely};

impl<'a> Recogniser<'a, '_> {
    /// compressed-tensors' `pack-quantized`, and its tiles for sparse weights.
    pub(super) fn packed(&mut self, module: &Module<'a>) -> bool {
        let Some((codes, rows, words)) = module.matrix(".weight_packed") else {
            return false;
        };
        if codes.dtype != Dtype::I32 {
            return false;
        }
        let said = self.configs.by(&["compressed-tensors"]).cloned();
        if let (Some(scales), Some(_)) = (module.get(".scale_packed"), module.get(".meta")) {
            return self.marlin_24(module, codes, scales, said.as_ref());
        }
        let Some((scale, groups)) = module.get(".weight_scale").map(|scale| {
            let groups = match scale.shape[..] {
                [_, groups] => groups,
                _ => 1,
            };
            (scale, groups)
        }) else {
            return false;
        };
        let mut draft = Draft::default();
        let shape = module
            .get(".weight_shape")
            .and_then(|part| self.look(part, 16))
            .and_then(|bytes| shape_in(&bytes));
        let inner = match shape.as_deref() {
            Some(&[out, inner]) if out == rows => Some(inner),
            _ => None,
        };
        let (bits, group, file) = self.weights_of(module, said.as_ref());
        let bits = match (bits, inner, &file) {
            (Some(bits), _, Some(file)) => {
                draft.int("bits", bits, Provenance::Config(file.clone()), Certain);
                bits
            }
            (_, Some(inner), _) => {
                let readings: Vec<u64> = (1..=8)
                    .filter(|&b| {
                        (inner * b).div_ceil(32) == words || inner.div_ceil(32 / b) == words
                    })
                    .collect();
                let Some(&likely) = readings
                    .iter()
                    .find(|b| matches!(b, 4 | 8))
                    .or(readings.first())
                else {
                    return false;
                };
                let sure = if readings.len() == 1 { Certain } else { Guess };
                draft.int("bits", likely, Provenance::Shapes, sure);
                if readings.len() > 1 {
                    let readings = readings.iter().map(ToString::to_string).collect();
                    draft.ambiguous("bits", readings, "packed columns fit several widths");
                }
                likely
            }
            _ => return false,
        };
        if let Some(inner) = inner {
            draft.put(
                "shape",
                sizes(&[rows, inner]),
                Provenance::Own("weight_shape".to_owned()),
                Certain,
            );
        } else if 32 % bits != 0 {
            return false;
        }
        let whole = inner.unwrap_or_else(|| words.saturating_mul(32 / bits.max(1)));
        if module.get(".weight_g_idx").is_none() {
            self.group(&mut draft, whole, groups, group, file.as_deref());
        }
        self.dtype_by(&mut draft, scale);
        let (scheme, from) = packing(&mut draft, bits, whole, words, said.as_ref());
        let roles = [
            (Role::Codes, ".weight_packed"),
            (Role::Scale, ".weight_scale"),
            (Role::Zero, ".weight_zero_point"),
            (Role::GroupIndex, ".weight_g_idx"),
            (Role::Shape, ".weight_shape"),
        ];
        self.make(module, scheme, &roles, &[], draft, from)
    }

    /// Bits and group of a module's weights, and the file that says them.
    fn weights_of(
        &self,
        module: &Module<'a>,
        said: Option<&Said>,
    ) -> (Option<u64>, Option<i64>, Option<String>) {
        let Some(said) = said else {
            return (None, None, None);
        };
        let Some(group) = said.group(module.name) else {
            return (None, None, None);
        };
        let bits = group
            .int("num_bits")
            .and_then(|bits| u64::try_from(bits).ok());
        (
            bits.filter(|bits| (1..=8).contains(bits)),
            group.int("group_size"),
            Some(said.file.clone()),
        )
    }

    fn marlin_24(
        &mut self,
        module: &Module<'a>,
        codes: &Part,
        scales: &Part,
        said: Option<&Said>,
    ) -> bool {
        let mut draft = Draft::default();
        let (stated, group, file) = self.weights_of(module, said);
        // [in/32, out·16·b/32]; scales [groups, out]. The first says b, the second out.
        let (Some(&columns), Some(&out)) = (codes.shape.last(), scales.shape.last()) else {
            return false;
        };
        let Some(bits) = (out > 0 && columns * 2 % out == 0).then(|| columns * 2 / out) else {
            return false;
        };
        let _ = stated;
        draft.int("bits", bits, Provenance::Shapes, Certain);
        if let (Some(inner), [groups, _]) = (codes.shape.first(), &scales.shape[..]) {
            self.group(
                &mut draft,
                inner.saturating_mul(32),
                *groups,
                group,
                file.as_deref(),
            );
        }
        self.dtype_by(&mut draft, scales);
        let roles = [
            (Role::Codes, ".weight_packed"),
            (Role::Scale, ".scale_packed"),
            (Role::Other, ".meta"),
        ];
        self.make(
            module,
            "ct-marlin-24",
            &roles,
            &[],
            draft,
            (Provenance::Shapes, Certain),
        )
    }

    /// compressed-tensors' bit masks.
    pub(super) fn sparse(&mut self, module: &Module<'a>) -> bool {
        let (Some(values), Some(_)) = (module.get(".compressed"), module.get(".bitmask")) else {
            return false;
        };
        let mut draft = Draft::default();
        let shape = module
            .get(".shape")
            .and_then(|part| self.look(part, 16))
            .and_then(|bytes| shape_in(&bytes));
        if let Some(shape) = shape {
            draft.put(
                "shape",
                sizes(&shape),
                Provenance::Own("shape".to_owned()),
                Certain,
            );
        }
        self.dtype_by(&mut draft, values);
        let scheme = match module.get(".row_offsets") {
            Some(_) => "ct-sparse-bitmask",
            None => "ct-sparse-24-bitmask",
        };
        let roles = [
            (Role::Codes, ".compressed"),
            (Role::Bitmask, ".bitmask"),
            (Role::RowOffsets, ".row_offsets"),
            (Role::Shape, ".shape"),
        ];
        self.make(
            module,
            scheme,
            &roles,
            &[],
            draft,
            (Provenance::Shapes, Certain),
        )
    }

    /// MLX: words of 32 bits.
    pub(super) fn words(&mut self, module: &Module<'a>) -> bool {
        let (Some(codes), Some(scales)) = (module.get(".weight"), module.get(".scales")) else {
            return false;
        };
        if codes.dtype != Dtype::U32 {
            return false;
        }
        let (Some(&words), Some(&groups)) = (codes.shape.last(), scales.shape.last()) else {
            return false;
        };
        if groups == 0 || words == 0 {
            return false;
        }
        let roles = [(Role::Codes, ".weight"), (Role::Scale, ".scales")];
        if scales.dtype == Dtype::U8 {
            // Bits that share a scale: 16 or 32 codes of 4 bits, 32 of 8.
            let mut draft = Draft::default();
            let (scheme, bits, group) = match words.saturating_mul(32).checked_div(groups) {
                Some(64) => ("nvfp4-mul", 4, 16),
                Some(128) => ("mxfp4", 4, 32),
                Some(256) => ("mxfp8", 8, 32),
                _ => return false,
            };
            draft.note("bits", bits, Provenance::Shapes, Certain);
            draft.note("group", group, Provenance::Shapes, Certain);
            return self.make(
                module,
                scheme,
                &roles,
                &[],
                draft,
                (Provenance::Shapes, Certain),
            );
        }
        let Some((biases, _)) = module.first(&[".biases", ".qbiases"]) else {
            return false;
        };
        let mut draft = Draft::default();
        self.affine(module, &mut draft, words.saturating_mul(32), groups);
        self.dtype_by(&mut draft, scales);
        let roles = [roles[0], roles[1], (Role::Zero, biases)];
        self.make(
            module,
            "mlx-affine",
            &roles,
            &[],
            draft,
            (Provenance::Shapes, Certain),
        )
    }

    /// Bits and group of MLX's words: only their product follows from shapes.
    fn affine(&self, module: &Module<'a>, draft: &mut Draft, bits: u64, groups: u64) {
        let fits = |b: u64, g: u64| bits.is_multiple_of(b) && (bits / b).div_ceil(g) == groups;
        let said = self.configs.by(&["mlx", "metal"]);
        if let Some(said) = said {
            let own = said.map.get(module.name).and_then(|own| own.as_object());
            let number = |key: &str| {
                let own = own.and_then(|own| own.get(key)?.as_u64());
                own.or_else(|| said.map.get(key)?.as_u64())
            };
            if let (Some(b), Some(g)) = (number("bits"), number("group_size"))
                && (2..=8).contains(&b)
                && g > 0
                && fits(b, g)
            {
                let from = Provenance::Config(said.file.clone());
                draft.int("bits", b, from.clone(), Certain);
                draft.int("group", g, from, Certain);
                return;
            }
        }
        let usual = [(4, 64), (8, 64), (4, 32), (4, 128), (8, 32), (8, 128)];
        let all = [2, 3, 4, 5, 6, 8]
            .into_iter()
            .flat_map(|b| [64, 32, 128].map(|g| (b, g)));
        let mut readings: Vec<(u64, u64)> = usual
            .into_iter()
            .chain(all)
            .filter(|&(b, g)| fits(b, g))
            .collect();
        let mut seen = std::collections::BTreeSet::new();
        readings.retain(|reading| seen.insert(*reading));
        let Some(&(b, g)) = readings.first() else {
            return;
        };
        let sure = if readings.len() == 1 { Likely } else { Guess };
        draft.int("bits", b, Provenance::Shapes, sure);
        draft.int("group", g, Provenance::Shapes, sure);
        if readings.len() > 1 {
            draft.ambiguous(
                "bits",
                readings
                    .iter()
                    .map(|(b, g)| format!("{b} bits, groups of {g}"))
                    .collect(),
                "words and scales fit several, and no configuration that fits says which",
            );
        }
    }

    /// Integers of a byte, or several in one.
    pub(super) fn integers(&mut self, module: &Module<'a>) -> bool {
        let Some(codes) = module.get(".weight") else {
            return false;
        };
        if let (Dtype::I8, Some((suffix, _))) =
            (codes.dtype, module.first(&[".SCB", ".weight.SCB"]))
        {
            let mut draft = Draft::default();
            draft.note("bits", 8, Provenance::Shapes, Certain);
            self.model_dtype_of(&mut draft);
            let state = module.first(&[".weight_format", ".weight.weight_format"]);
            let mut roles = vec![(Role::Codes, ".weight"), (Role::Scale, suffix)];
            roles.extend(state.map(|(suffix, _)| (Role::State, suffix)));
            return self.make(
                module,
                "bnb8",
                &roles,
                &[],
                draft,
                (Provenance::Shapes, Certain),
            );
        }
        let Some(scale) = module.get(".weight_scale") else {
            return false;
        };
        if !matches!(scale.dtype, Dtype::F16 | Dtype::BF16 | Dtype::F32) {
            return false;
        }
        if let Some(said) = self.configs.by(&["gemma"]).cloned() {
            return self.gemma(module, &said, codes);
        }
        match codes.dtype {
            Dtype::I8 => self.whole(module, codes, scale),
            Dtype::U8 if count(scale).ok() == Some(1) => self.bitnet(module, scale),
            Dtype::U8 => self.nibbles(module, codes, scale),
            _ => false,
        }
    }

    fn model_dtype_of(&self, draft: &mut Draft) {
        if let Some((dtype, file)) = self.configs.model_dtype() {
            draft.dtype(dtype, Provenance::Config(file.to_owned()), Likely);
        }
    }

    /// One code a byte.
    fn whole(&mut self, module: &Module<'a>, codes: &Part, scale: &Part) -> bool {
        let said = self.configs.by(&["compressed-tensors"]).cloned();
        let (bits, stated, file) = self.weights_of(module, said.as_ref());
        let mut draft = Draft::default();
        match (bits, &file) {
            (Some(bits), Some(file)) => {
                draft.note("bits", bits, Provenance::Config(file.clone()), Certain)
            }
            _ => draft.note("bits", 8, Provenance::Shapes, Likely),
        }
        if let ([_, inner], [_, groups]) = (&codes.shape[..], &scale.shape[..])
            && *groups > 1
        {
            self.group(&mut draft, *inner, *groups, stated, file.as_deref());
        }
        self.dtype_by(&mut draft, scale);
        let mut roles = vec![
            (Role::Codes, ".weight"),
            (Role::Scale, ".weight_scale"),
            (Role::Zero, ".weight_zero_point"),
            (Role::InputScale, ".input_scale"),
        ];
        roles.retain(|(_, suffix)| module.get(suffix).is_some());
        self.make(
            module,
            "ct-int",
            &roles,
            &[".pre_quant_scale"],
            draft,
            (Provenance::Shapes, Likely),
        )
    }

    /// Ternary codes, of which nothing but the configuration says whether the scale multiplies.
    fn bitnet(&mut self, module: &Module<'a>, scale: &Part) -> bool {
        let said = self.configs.by(&["bitnet"]).cloned();
        let mut draft = Draft::default();
        draft.note("bits", 2, Provenance::Shapes, Certain);
        let word = |op: &str| Param::Text(op.to_owned());
        let class = said.as_ref().and_then(|s| s.text(&["linear_class"]));
        let from = match (&said, class) {
            (Some(said), Some(class)) => {
                let op = if class == "autobitlinear" {
                    "multiply"
                } else {
                    "divide"
                };
                let from = Provenance::Config(said.file.clone());
                draft.put("scale", word(op), from.clone(), Certain);
                (from, Certain)
            }
            _ => {
                let bytes = self.look(scale, 4);
                let large = bytes
                    .and_then(|bytes| first_float(&bytes, scale.dtype))
                    .is_some_and(|v| v.abs() > 1.0);
                let op = if large { "divide" } else { "multiply" };
                draft.put("scale", word(op), Provenance::Values, Guess);
                draft.ambiguous(
                    "scale",
                    vec![
                        op.to_owned(),
                        if large { "multiply" } else { "divide" }.to_owned(),
                    ],
                    "nothing says whether the scale of ternary weights multiplies or divides",
                );
                (Provenance::Shapes, Guess)
            }
        };
        self.dtype_by(&mut draft, scale);
        let roles = [
            (Role::Codes, ".weight"),
            (Role::Scale, ".weight_scale"),
            (Role::InputScale, ".input_scale"),
        ];
        self.make(module, "bitnet", &roles, &[], draft, from)
    }

    fn gemma(&mut self, module: &Module<'a>, said: &Said, codes: &Part) -> bool {
        let own = said.of_module("module_quant_configs", module.name);
        let bits = own
            .and_then(|own| own.get("num_bits")?.as_i64())
            .or_else(|| said.int(&["num_bits"]));
        let from = Provenance::Config(said.file.clone());
        let mut draft = Draft::default();
        let bits = match (bits, codes.dtype) {
            (Some(bits @ (2 | 4 | 8)), _) => bits.unsigned_abs(),
            (_, Dtype::I8) => 8,
            _ => return false,
        };
        draft.int("bits", bits, from.clone(), Certain);
        // Rows may end inside a byte, which no file says; the columns are those of whole bytes.
        draft.note("shape", "whole bytes", Provenance::Shapes, Likely);
        self.model_dtype_of(&mut draft);
        let roles = [
            (Role::Codes, ".weight"),
            (Role::Scale, ".weight_scale"),
            (Role::InputScale, ".input_activation_scale"),
            (Role::Other, ".output_activation_scale"),
        ];
        self.make(module, "gemma", &roles, &[], draft, (from, Certain))
    }

    /// Two codes a byte, with scales of groups: Model Optimizer's two packings.
    fn nibbles(&mut self, module: &Module<'a>, codes: &Part, scale: &Part) -> bool {
        let (&[rows, bytes], &[groups_down, groups]) = (&codes.shape[..], &scale.shape[..]) else {
            return false;
        };
        let roles = [(Role::Codes, ".weight"), (Role::Scale, ".weight_scale")];
        let mut draft = Draft::default();
        draft.note("bits", 4, Provenance::Shapes, Certain);
        self.dtype_by(&mut draft, scale);
        let all = rows.saturating_mul(bytes).saturating_mul(2);
        if groups == 1 && groups_down > rows && all.is_multiple_of(groups_down.max(1)) {
            draft.int("group", all / groups_down, Provenance::Shapes, Certain);
            return self.make(
                module,
                "modelopt-int4-qtensor",
                &roles,
                &[],
                draft,
                (Provenance::Shapes, Likely),
            );
        }
        if groups_down == rows.saturating_mul(2) && groups > 0 && bytes.is_multiple_of(groups) {
            draft.int("group", bytes / groups, Provenance::Shapes, Certain);
            return self.make(
                module,
                "modelopt-int4",
                &roles,
                &[".pre_quant_scale", ".input_scale"],
                draft,
                (Provenance::Shapes, Likely),
            );
        }
        false
    }
}

/// Which of the two packings that share the name `pack-quantized`.
fn packing(
    draft: &mut Draft,
    bits: u64,
    inner: u64,
    words: u64,
    said: Option<&Said>,
) -> (&'static str, (Provenance, Confidence)) {
    let version = said.and_then(|said| {
        let newer = at_least(said.text(&["version"])?, 0, 18)?;
        Some((newer, said.file.clone()))
    });
    let dense = inner.saturating_mul(bits).div_ceil(32) == words;
    let word = inner.div_ceil((32 / bits).max(1)) == words;
    let by_version = |version: Option<(bool, String)>| match version {
        Some((newer, file)) => {
            let name = if newer {
                "ct-pack-dense"
            } else {
                "ct-pack-word"
            };
            Some((name, (Provenance::Config(file), Certain)))
        }
        None => None,
    };
    match (dense, word) {
        (true, false) => ("ct-pack-dense", (Provenance::Shapes, Certain)),
        (false, true) => ("ct-pack-word", (Provenance::Shapes, Certain)),
        // Of widths that fill words the two are the same.
        _ if 32 % bits == 0 => {
            by_version(version).unwrap_or(("ct-pack-dense", (Provenance::Shapes, Certain)))
        }
        _ => by_version(version).unwrap_or_else(|| {
            draft.ambiguous(
                "scheme",
                vec!["ct-pack-dense@1".to_owned(), "ct-pack-word@1".to_owned()],
                "both packings have as many words, and no version says which wrote it",
            );
            ("ct-pack-dense", (Provenance::Default, Guess))
        }),
    }
}

fn first_float(bytes: &[u8], dtype: Dtype) -> Option<f32> {
    let half = || Some(u16::from_le_bytes(*bytes.first_chunk::<2>()?));
    match dtype {
        Dtype::F32 => Some(f32::from_le_bytes(*bytes.first_chunk::<4>()?)),
        Dtype::F16 => Some(crate::numbers::f16_to_f32(half()?)),
        Dtype::BF16 => Some(crate::numbers::bf16_to_f32(half()?)),
        _ => None,
    }
}
