//! Families that only a vendor's kernel reads: known by the names of their parts, carried as they are.

use tonnage_format::Dtype;

use super::{Draft, Recogniser};
use crate::descriptor::Role;
use crate::map::{Confidence, Provenance};
use crate::recognise::names::Module;

/// A family: the parts that give it away, the first of which is its codes, and the others that it may have.
struct Family {
    name: &'static str,
    signature: &'static [&'static str],
    others: &'static [&'static str],
}

const FAMILIES: &[Family] = &[
    Family {
        name: "exl3",
        signature: &[".trellis"],
        others: &[".suh", ".svh", ".su", ".sv", ".mcg", ".mul1"],
    },
    Family {
        name: "exl2",
        signature: &[".q_weight", ".q_scale"],
        others: &[
            ".q_scale_max",
            ".q_groups",
            ".q_group_map",
            ".q_invperm",
            ".q_perm",
        ],
    },
    Family {
        name: "aqlm",
        signature: &[".codes", ".codebooks"],
        others: &[".scales"],
    },
    Family {
        name: "vptq",
        signature: &[".indices", ".centroids"],
        others: &[
            ".res_centroids",
            ".res_indices",
            ".outlier_centroids",
            ".outlier_indices",
            ".weight_scale",
            ".weight_bias",
        ],
    },
    Family {
        name: "higgs",
        signature: &[".weight", ".scales", ".tables"],
        others: &[".tables2"],
    },
    Family {
        name: "fp-quant",
        signature: &[".qweight", ".scales", ".forward_hadamard_matrix"],
        others: &[
            ".backward_hadamard_matrix",
            ".dqweight",
            ".weight_global_scale",
        ],
    },
    Family {
        name: "qqq",
        signature: &[".B", ".s_channel"],
        others: &[".s_group"],
    },
];

impl<'a> Recogniser<'a, '_> {
    pub(super) fn opaque(&mut self, module: &Module<'a>) -> bool {
        let from = (Provenance::Shapes, Confidence::Likely);
        let family = FAMILIES.iter().find(|family| {
            family
                .signature
                .iter()
                .all(|suffix| module.get(suffix).is_some())
        });
        if let Some(family) = family {
            let (codes, rest) = family.signature.split_at(1);
            let extras: Vec<&str> = rest.iter().chain(family.others).copied().collect();
            let roles: Vec<_> = codes.iter().map(|suffix| (Role::Codes, *suffix)).collect();
            return self.make(module, family.name, &roles, &extras, Draft::default(), from);
        }
        let weights = module.get(".weight");
        if let (Some(codes), Some(_)) = (weights, module.get(".weight_scales"))
            && codes.dtype == Dtype::I8
        {
            let roles = [(Role::Codes, ".weight"), (Role::Scale, ".weight_scales")];
            return self.make(module, "eetq", &roles, &[], Draft::default(), from);
        }
        // Methods whose parts share names with others, and whose packing depends on the configuration alone.
        let method = ["quark", "sinq", "fouroversix", "spqr"]
            .into_iter()
            .find(|method| self.configs.by(&[method]).is_some());
        if let (Some(method), Some(codes)) = (method, weights)
            && !matches!(codes.dtype, Dtype::F16 | Dtype::BF16 | Dtype::F32)
            && module.parts.len() > 1
        {
            let extras: Vec<&str> = module
                .parts
                .keys()
                .copied()
                .filter(|s| *s != ".weight")
                .collect();
            return self.make(
                module,
                method,
                &[(Role::Codes, ".weight")],
                &extras,
                Draft::default(),
                from,
            );
        }
        false
    }
}
