//! What tensors are called in GGUF and in Hugging Face's checkpoints, and what llama.cpp's converter does to
//! their values on the way.
//!
//! The tables are data, a row a name; `{}` stands for the number of a layer. A row holds for the weight and,
//! where there is one, for the bias. Mixtures of experts, whose tensors are stacked in GGUF, are left out.

/// How the values of a tensor differ between the two.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Change {
    /// They are the same.
    None,
    /// The rows of each head stand in another order: pairs that are turned together lie side by side in GGUF,
    /// and half a head apart in Hugging Face's. The key has the number of heads; see [`rope_row`].
    RopeRows {
        /// The metadata key that has the number of heads of this tensor.
        heads: &'static str,
    },
    /// GGUF has the weight of a norm plus one.
    PlusOne,
}

/// The names of an architecture.
#[derive(Clone, Copy, Debug)]
pub struct Names {
    /// What `general.architecture` says.
    pub architecture: &'static str,
    /// What `model_type` says in Hugging Face's configurations.
    pub model_types: &'static [&'static str],
    rows: &'static [&'static [(&'static str, &'static str)]],
    rope_rows: bool,
    norms_plus_one: bool,
}

const OUTSIDE: &[(&str, &str)] = &[
    ("token_embd", "model.embed_tokens"),
    ("output_norm", "model.norm"),
];

/// What gives the next token, where it may differ from the embedding.
const HEAD: &[(&str, &str)] = &[("output", "lm_head")];

const ATTENTION: &[(&str, &str)] = &[
    ("blk.{}.attn_norm", "model.layers.{}.input_layernorm"),
    ("blk.{}.attn_q", "model.layers.{}.self_attn.q_proj"),
    ("blk.{}.attn_k", "model.layers.{}.self_attn.k_proj"),
    ("blk.{}.attn_v", "model.layers.{}.self_attn.v_proj"),
    ("blk.{}.attn_output", "model.layers.{}.self_attn.o_proj"),
];

/// Norms of queries and keys.
const HEAD_NORMS: &[(&str, &str)] = &[
    ("blk.{}.attn_q_norm", "model.layers.{}.self_attn.q_norm"),
    ("blk.{}.attn_k_norm", "model.layers.{}.self_attn.k_norm"),
];

const GATED: &[(&str, &str)] = &[
    ("blk.{}.ffn_gate", "model.layers.{}.mlp.gate_proj"),
    ("blk.{}.ffn_up", "model.layers.{}.mlp.up_proj"),
    ("blk.{}.ffn_down", "model.layers.{}.mlp.down_proj"),
];

/// One norm before each half of a layer.
const TWO_NORMS: &[(&str, &str)] = &[(
    "blk.{}.ffn_norm",
    "model.layers.{}.post_attention_layernorm",
)];

/// One norm before and one behind each half of a layer.
const FOUR_NORMS: &[(&str, &str)] = &[
    (
        "blk.{}.post_attention_norm",
        "model.layers.{}.post_attention_layernorm",
    ),
    (
        "blk.{}.ffn_norm",
        "model.layers.{}.pre_feedforward_layernorm",
    ),
    (
        "blk.{}.post_ffw_norm",
        "model.layers.{}.post_feedforward_layernorm",
    ),
];

/// Phi-3 has queries, keys and values in one tensor, and gate and up in another.
const FUSED: &[(&str, &str)] = &[
    ("blk.{}.attn_norm", "model.layers.{}.input_layernorm"),
    ("blk.{}.attn_qkv", "model.layers.{}.self_attn.qkv_proj"),
    ("blk.{}.attn_output", "model.layers.{}.self_attn.o_proj"),
    ("blk.{}.ffn_up", "model.layers.{}.mlp.gate_up_proj"),
    ("blk.{}.ffn_down", "model.layers.{}.mlp.down_proj"),
];

/// Every architecture whose names are known.
pub const ARCHITECTURES: &[Names] = &[
    Names {
        architecture: "llama",
        // Mistral's models are of this architecture in GGUF.
        model_types: &["llama", "mistral"],
        rows: &[OUTSIDE, HEAD, ATTENTION, TWO_NORMS, GATED],
        rope_rows: true,
        norms_plus_one: false,
    },
    Names {
        architecture: "qwen2",
        model_types: &["qwen2"],
        rows: &[OUTSIDE, HEAD, ATTENTION, TWO_NORMS, GATED],
        rope_rows: false,
        norms_plus_one: false,
    },
    Names {
        architecture: "qwen3",
        model_types: &["qwen3"],
        rows: &[OUTSIDE, HEAD, ATTENTION, HEAD_NORMS, TWO_NORMS, GATED],
        rope_rows: false,
        norms_plus_one: false,
    },
    Names {
        architecture: "gemma",
        model_types: &["gemma"],
        rows: &[OUTSIDE, ATTENTION, TWO_NORMS, GATED],
        rope_rows: false,
        norms_plus_one: true,
    },
    Names {
        architecture: "gemma2",
        model_types: &["gemma2"],
        rows: &[OUTSIDE, ATTENTION, FOUR_NORMS, GATED],
        rope_rows: false,
        norms_plus_one: true,
    },
    Names {
        architecture: "gemma3",
        model_types: &["gemma3_text"],
        rows: &[OUTSIDE, HEAD, ATTENTION, HEAD_NORMS, FOUR_NORMS, GATED],
        rope_rows: false,
        norms_plus_one: true,
    },
    Names {
        architecture: "phi3",
        model_types: &["phi3"],
        rows: &[OUTSIDE, HEAD, FUSED, TWO_NORMS],
        rope_rows: false,
        norms_plus_one: false,
    },
];

/// What stands behind the names of the tables.
const SUFFIXES: [&str; 2] = [".weight", ".bias"];

impl Names {
    /// The names of what `general.architecture` says.
    pub fn of_architecture(architecture: &str) -> Option<&'static Names> {
        let mut all = ARCHITECTURES.iter();
        all.find(|names| names.architecture == architecture)
    }

    /// The names of what `model_type` says in a configuration.
    pub fn of_model_type(model_type: &str) -> Option<&'static Names> {
        let mut all = ARCHITECTURES.iter();
        all.find(|names| names.model_types.contains(&model_type))
    }

    /// The name that a tensor of GGUF has in Hugging Face's checkpoints; `None` where it has none there.
    pub fn to_hf(&self, gguf: &str) -> Option<String> {
        self.translate(gguf, |&(from, to)| (from, to))
    }

    /// The name that a tensor of Hugging Face's has in GGUF.
    pub fn to_gguf(&self, hf: &str) -> Option<String> {
        self.translate(hf, |&(to, from)| (from, to))
    }

    fn translate(
        &self,
        name: &str,
        turn: impl Fn(&(&'static str, &'static str)) -> (&'static str, &'static str),
    ) -> Option<String> {
        let (stem, suffix) = split_suffix(name)?;
        let (form, number) = open(stem);
        let mut rows = self.rows.iter().flat_map(|rows| rows.iter()).map(turn);
        let (_, to) = rows.find(|(from, _)| *from == form)?;
        Some(format!("{}{suffix}", to.replacen("{}", number, 1)))
    }

    /// How the values of a tensor differ, by its name in GGUF.
    pub fn change(&self, gguf: &str) -> Change {
        let Some((stem, suffix)) = split_suffix(gguf) else {
            return Change::None;
        };
        let last = stem.rsplit('.').next().unwrap_or(stem);
        match last {
            "attn_q" if self.rope_rows => Change::RopeRows {
                heads: "llama.attention.head_count",
            },
            "attn_k" if self.rope_rows => Change::RopeRows {
                heads: "llama.attention.head_count_kv",
            },
            _ if self.norms_plus_one && suffix == ".weight" && last.ends_with("norm") => {
                Change::PlusOne
            }
            _ => Change::None,
        }
    }

    /// The rows of the table: GGUF's name and Hugging Face's, without `.weight` and `.bias`.
    pub fn rows(&self) -> impl Iterator<Item = (&'static str, &'static str)> + '_ {
        self.rows.iter().flat_map(|rows| rows.iter()).copied()
    }
}

fn split_suffix(name: &str) -> Option<(&str, &str)> {
    let mut suffixes = SUFFIXES.iter();
    suffixes.find_map(|suffix| Some((name.strip_suffix(suffix)?, *suffix)))
}

/// A name with the number of its layer left open, and the number: the first part that is digits only.
fn open(stem: &str) -> (String, &str) {
    let is_number = |part: &&str| !part.is_empty() && part.bytes().all(|b| b.is_ascii_digit());
    let number = stem.split('.').find(is_number).unwrap_or("");
    let parts = stem
        .split('.')
        .map(|part| if is_number(&part) { "{}" } else { part });
    let form: Vec<&str> = parts.collect();
    (form.join("."), number)
}

/// Which row of GGUF's tensor is row `row` of Hugging Face's, where each of `heads` heads has `rows / heads`
/// rows: pair `p` of a head is rows `p` and `p + half` there, and rows `2p` and `2p + 1` here.
///
/// `None` where the rows are not `heads` heads of an even number of rows each, or `row` is none of them.
pub fn rope_row(row: u64, rows: u64, heads: u64) -> Option<u64> {
    let size = rows.checked_div(heads)?;
    if size == 0 || size % 2 != 0 || size.checked_mul(heads) != Some(rows) || row >= rows {
        return None;
    }
    let (head, within) = (row / size, row % size);
    let half = size / 2;
    // All of it is less than `rows`.
    Some(head * size + (within % half) * 2 + within / half)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_there_and_back() {
        for names in ARCHITECTURES {
            for (gguf, hf) in names.rows() {
                for suffix in SUFFIXES {
                    let gguf = format!("{}{suffix}", gguf.replace("{}", "17"));
                    let hf = format!("{}{suffix}", hf.replace("{}", "17"));
                    assert_eq!(names.to_hf(&gguf).as_ref(), Some(&hf));
                    assert_eq!(names.to_gguf(&hf).as_ref(), Some(&gguf));
                }
            }
            for other in [
                "blk.0.attn_q",
                "blk.x.attn_q.weight",
                "",
                ".weight",
                "blk.0.1.attn_q.weight",
            ] {
                assert_eq!(names.to_hf(other), None, "{other}");
            }
        }
        let llama = Names::of_model_type("mistral").unwrap();
        assert_eq!(llama.architecture, "llama");
        let heads = "llama.attention.head_count_kv";
        assert_eq!(
            llama.change("blk.3.attn_k.weight"),
            Change::RopeRows { heads }
        );
        assert_eq!(llama.change("blk.3.attn_norm.weight"), Change::None);
        let gemma = Names::of_architecture("gemma3").unwrap();
        assert_eq!(gemma.change("blk.3.attn_q_norm.weight"), Change::PlusOne);
        assert_eq!(gemma.change("blk.3.attn_q.weight"), Change::None);
    }

    #[test]
    fn rows_of_heads_are_each_taken_once() {
        // As the converter's reshape(heads, 2, half).swapaxes(1, 2) has it: two heads of six rows.
        let taken: Vec<u64> = (0..12).map(|row| rope_row(row, 12, 2).unwrap()).collect();
        assert_eq!(taken, [0, 2, 4, 1, 3, 5, 6, 8, 10, 7, 9, 11]);
        for (row, rows, heads) in [(12, 12, 2), (0, 12, 0), (0, 12, 5), (0, 9, 3), (0, 0, 1)] {
            assert_eq!(rope_row(row, rows, heads), None);
        }
    }
}
