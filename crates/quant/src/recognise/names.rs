//! Which tensors hang on one module: the module's name is what is left when a part's suffix is taken off.

use std::collections::BTreeMap;

use crate::scheme::Part;

/// What parts are called, of any scheme.
const SUFFIXES: &[&str] = &[
    ".weight",
    ".qweight",
    ".qzeros",
    ".scales",
    ".g_idx",
    ".weight_packed",
    ".weight_scale",
    ".weight_zero_point",
    ".weight_shape",
    ".weight_g_idx",
    ".weight_global_scale",
    ".input_global_scale",
    ".weight_scale_2",
    ".weight_scale_inv",
    ".input_scale",
    ".input_scale_ub",
    ".output_scale",
    ".activation_scale",
    ".input_activation_scale",
    ".output_activation_scale",
    ".scale",
    ".zero",
    ".qscale_weight",
    ".qscale_act",
    ".scale_weight",
    ".scale_input",
    ".pre_quant_scale",
    ".biases",
    ".qbiases",
    ".SCB",
    ".weight_format",
    ".weight.SCB",
    ".weight.weight_format",
    ".weight.absmax",
    ".weight.quant_map",
    ".weight.nested_absmax",
    ".weight.nested_quant_map",
    ".weight.quant_state.bitsandbytes__nf4",
    ".weight.quant_state.bitsandbytes__fp4",
    "_blocks",
    "_scales",
    ".weight._data._data",
    ".weight._data",
    ".weight._scale",
    ".weight._shift",
    ".B",
    ".s",
    ".s_channel",
    ".s_group",
    ".scale_packed",
    ".meta",
    ".compressed",
    ".bitmask",
    ".row_offsets",
    ".trellis",
    ".suh",
    ".svh",
    ".su",
    ".sv",
    ".mcg",
    ".mul1",
    ".q_weight",
    ".q_scale",
    ".q_scale_max",
    ".q_groups",
    ".q_group_map",
    ".q_invperm",
    ".q_perm",
    ".codes",
    ".codebooks",
    ".centroids",
    ".indices",
    ".res_centroids",
    ".res_indices",
    ".outlier_centroids",
    ".outlier_indices",
    ".weight_bias",
    ".weight_scales",
    ".tables",
    ".tables2",
    ".dqweight",
    ".forward_hadamard_matrix",
    ".backward_hadamard_matrix",
    ".comfy_quant",
    ".W_q",
];

/// The tensors that HQQ keeps of each weight besides codes, scales and zero points.
pub(super) const HQQ_SCALARS: &[&str] = &[
    ".nbits",
    ".group_size",
    ".axis",
    ".shape",
    ".packing",
    ".compute_dtype",
    ".channel_wise",
    ".encoded_state_dict",
    ".offload_meta",
    ".optimize",
    ".quant_scale",
    ".quant_zero",
    ".round_zero",
    ".stores_quant_config",
    ".unpack_view_dtype",
    ".view_as_float",
];

/// A module and the parts that hang on it, by suffix.
#[derive(Debug)]
pub(crate) struct Module<'a> {
    /// Its name.
    pub(crate) name: &'a str,
    /// The parts.
    pub(crate) parts: BTreeMap<&'static str, &'a Part>,
}

impl<'a> Module<'a> {
    /// The logical name of the tensor: the module's `weight`.
    pub(crate) fn logical(&self) -> String {
        if self.parts.contains_key("_blocks") || self.name.ends_with(".weight") {
            return self.name.to_owned();
        }
        format!("{}.weight", self.name)
    }

    /// A part.
    pub(crate) fn get(&self, suffix: &str) -> Option<&'a Part> {
        self.parts.get(suffix).copied()
    }

    /// A part with two axes.
    pub(crate) fn matrix(&self, suffix: &str) -> Option<(&'a Part, u64, u64)> {
        let part = self.get(suffix)?;
        match part.shape[..] {
            [rows, columns] => Some((part, rows, columns)),
            _ => None,
        }
    }

    /// Codes, zero points and scales under the names of GPTQ and AWQ, with their extents.
    pub(crate) fn packed(&self) -> Option<[(&'a Part, u64, u64); 3]> {
        Some([
            self.matrix(".qweight")?,
            self.matrix(".qzeros")?,
            self.matrix(".scales")?,
        ])
    }

    /// The first of some parts that is there, with its suffix.
    pub(crate) fn first(&self, suffixes: &[&'static str]) -> Option<(&'static str, &'a Part)> {
        suffixes
            .iter()
            .find_map(|&suffix| Some((suffix, self.get(suffix)?)))
    }
}

/// The modules of a checkpoint.
pub(crate) fn modules(rows: &[Part]) -> BTreeMap<&str, Module<'_>> {
    let mut modules: BTreeMap<&str, Module<'_>> = BTreeMap::new();
    for part in rows {
        let longest = SUFFIXES
            .iter()
            .chain(HQQ_SCALARS)
            .filter(|suffix| part.name.ends_with(**suffix))
            .max_by_key(|suffix| suffix.len());
        let Some(suffix) = longest else { continue };
        let Some(name) = part.name.strip_suffix(suffix) else {
            continue;
        };
        let module = modules.entry(name).or_insert_with(|| Module {
            name,
            parts: BTreeMap::new(),
        });
        module.parts.insert(suffix, part);
    }
    modules
}
