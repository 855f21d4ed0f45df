//! GPTQ and AutoRound: `qweight` in words down the columns, `qzeros`, `scales`.
//!
//! Bits follow from shapes. What zero points mean does not: version 1 stores them less one, under the same names,
//! dtypes and shapes.

use tonnage_format::Dtype;

use super::{Draft, LOOK, Recogniser, SAMPLES};
use crate::descriptor::Role;
use crate::map::{Confidence, Provenance};
use crate::recognise::names::Module;
use crate::scheme::Param;
use Confidence::{Certain, Guess, Likely};

const ROLES: &[(Role, &str)] = &[
    (Role::Codes, ".qweight"),
    (Role::Zero, ".qzeros"),
    (Role::Scale, ".scales"),
    (Role::GroupIndex, ".g_idx"),
];

/// What stored zero points look like.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Zeros {
    /// All are 2^(b−1) − 1: symmetric weights, less one.
    less_one: bool,
    /// All are 2^(b−1): symmetric weights, as they are.
    as_is: bool,
    /// Some are all ones, which one more wraps.
    full: bool,
    /// They could be read.
    seen: bool,
}

impl<'a> Recogniser<'a, '_> {
    pub(super) fn gptq(&mut self, module: &Module<'a>) -> bool {
        let Some(
            [
                (codes, words, out),
                (zeros, _, zero_words),
                (scales, groups, columns),
            ],
        ) = module.packed()
        else {
            return false;
        };
        // AWQ's two layouts have eight times fewer columns, or as many rows as scales.
        if codes.dtype != Dtype::I32 || zeros.dtype != Dtype::I32 || columns != out {
            return false;
        }
        let Some(bits) = zero_words
            .checked_mul(32)
            .filter(|all| out > 0 && all % out == 0)
            .map(|all| all / out)
            .filter(|bits| (2..=8).contains(bits))
        else {
            return false;
        };
        let mut draft = Draft::default();
        draft.int("bits", bits, Provenance::Shapes, Certain);
        let inner = words.saturating_mul(32) / bits;
        let awq = self.configs.by(&["awq"]).is_some();
        let gemv = words == groups;
        if gemv && awq {
            return false;
        }
        if gemv && self.configs.said.is_empty() {
            let readings = vec!["gptq@1".to_owned(), "awq-gemv@1".to_owned()];
            draft.ambiguous(
                "scheme",
                readings,
                "the shapes fit both, and no configuration says which",
            );
        }
        let said = self.configs.by(&[
            "gptq",
            "auto-round",
            "intel/auto-round",
            "gptqmodel",
            "autoround",
        ]);
        let own = said.and_then(|s| s.of_module("extra_config", module.name));
        let stated = own
            .and_then(|own| own.get("group_size")?.as_i64())
            .or_else(|| said?.int(&["group_size"]));
        let file = said.map(|s| s.file.clone());
        self.group(&mut draft, inner, groups, stated, file.as_deref());
        self.dtype_by(&mut draft, scales);
        let (scheme, from) = self.version(module, &mut draft, bits);
        self.make(module, scheme, ROLES, &[], draft, from)
    }

    /// The group: what the configuration says where it fits the scales, else what the scales say.
    pub(super) fn group(
        &self,
        draft: &mut Draft,
        inner: u64,
        groups: u64,
        stated: Option<i64>,
        file: Option<&str>,
    ) {
        let fits = |group: u64| group > 0 && inner.div_ceil(group) == groups;
        let stated = match stated {
            Some(-1 | 0) => Some(inner),
            Some(group) => u64::try_from(group).ok(),
            None => None,
        };
        match (stated.filter(|group| fits(*group)), file) {
            (Some(group), Some(file)) => {
                draft.int("group", group, Provenance::Config(file.to_owned()), Certain);
            }
            _ if groups > 0 && inner.is_multiple_of(groups) => {
                let sure = if stated.is_some() { Likely } else { Certain };
                draft.int("group", inner / groups, Provenance::Shapes, sure);
            }
            _ => {}
        }
    }

    /// Which of the forms that share names and shapes it is.
    fn version(
        &mut self,
        module: &Module<'a>,
        draft: &mut Draft,
        bits: u64,
    ) -> (&'static str, (Provenance, Confidence)) {
        let said = self
            .configs
            .by(&[
                "gptq",
                "auto-round",
                "intel/auto-round",
                "gptqmodel",
                "autoround",
            ])
            .cloned();
        let Some(said) = said else {
            return self.version_by_values(module, draft, bits);
        };
        let from = Provenance::Config(said.file.clone());
        let wrap = |draft: &mut Draft, how: &str, from: Provenance, sure| {
            draft.put("zero_wrap", Param::Text(how.to_owned()), from, sure);
        };
        if said.method.contains("round") {
            let packing = said
                .text(&["packing_format", "format"])
                .unwrap_or("auto_round");
            if packing.contains("gptq") {
                wrap(draft, "none", from.clone(), Certain);
                return ("gptq", (from, Certain));
            }
            return ("gptq-v2", (from, Certain));
        }
        match said.text(&["checkpoint_format", "format"]) {
            Some("gptq_v2") => return ("gptq-v2", (from, Certain)),
            Some("gptq_p") => return ("gptq-planar", (from, Certain)),
            _ => {}
        }
        let zeros = self.zeros(module, bits);
        if said.flag("sym") == Some(true) && zeros.seen && zeros.as_is {
            // The file says version 1, and all zero points are the middle as it is in version 2.
            let readings = vec!["gptq-v2@1".to_owned(), "gptq@1".to_owned()];
            draft.ambiguous(
                "scheme",
                readings,
                "the configuration says version 1 and symmetric, and all stored zero points are the middle itself",
            );
            return ("gptq-v2", (Provenance::Values, Likely));
        }
        let quantizer = said.map.get("meta").and_then(|meta| meta.get("quantizer"));
        let by = quantizer.map(ToString::to_string).unwrap_or_default();
        if by.contains("gptqmodel") {
            wrap(draft, "word32", from.clone(), Certain);
        } else if zeros.full {
            wrap(draft, "field", Provenance::Default, Guess);
            draft.ambiguous(
                "zero_wrap",
                vec!["field".to_owned(), "word32".to_owned(), "none".to_owned()],
                "a stored zero point is all ones, and libraries add one to it in different ways",
            );
        }
        let sure = match said.text(&["checkpoint_format", "format"]) {
            Some(_) => Certain,
            None => Likely,
        };
        ("gptq", (from, sure))
    }

    fn version_by_values(
        &mut self,
        module: &Module<'a>,
        draft: &mut Draft,
        bits: u64,
    ) -> (&'static str, (Provenance, Confidence)) {
        let zeros = self.zeros(module, bits);
        if !matches!(bits, 2 | 4 | 8) {
            let readings = ["gptq@1", "gptq-v2@1", "gptq-planar@1"];
            draft.ambiguous(
                "scheme",
                readings.map(str::to_owned).to_vec(),
                "codes that do not fill words are a stream of bits or planes, and nothing says which",
            );
            return ("gptq", (Provenance::Default, Guess));
        }
        if zeros.seen && zeros.less_one {
            return ("gptq", (Provenance::Values, Likely));
        }
        if zeros.seen && zeros.as_is {
            return ("gptq-v2", (Provenance::Values, Likely));
        }
        draft.ambiguous(
            "scheme",
            vec!["gptq@1".to_owned(), "gptq-v2@1".to_owned()],
            "no configuration says whether zero points are stored less one, and they are not all alike",
        );
        ("gptq", (Provenance::Default, Guess))
    }

    /// What stored zero points look like, over the first tensors of the checkpoint.
    fn zeros(&mut self, module: &Module<'a>, bits: u64) -> Zeros {
        if let Some(zeros) = self.zeros {
            return zeros;
        }
        let mut found = Zeros {
            less_one: true,
            as_is: true,
            full: false,
            seen: false,
        };
        let mut parts: Vec<&'a crate::scheme::Part> = Vec::new();
        parts.extend(module.get(".qzeros"));
        let mut names: Vec<&&str> = self
            .rows
            .keys()
            .filter(|name| name.ends_with(".qzeros"))
            .collect();
        names.sort_unstable();
        parts.extend(
            names
                .into_iter()
                .take(SAMPLES)
                .filter_map(|name| self.rows.get(name).copied()),
        );
        let middle = 1_u32 << (bits - 1);
        for part in parts {
            // Whole runs of 32 codes, so that none ends outside.
            let Some(bytes) = self.look(part, LOOK / (4 * bits) * (4 * bits)) else {
                continue;
            };
            for run in bytes.chunks_exact(4 * bits as usize) {
                for at in 0..32 {
                    let code = crate::layout::read_bits(run, at * bits, bits as u32);
                    found.seen = true;
                    found.less_one &= code == middle - 1;
                    found.as_is &= code == middle;
                    found.full |= code == (middle - 1) * 2 + 1;
                }
            }
        }
        self.zeros = Some(found);
        found
    }
}
