//! Requests from names: what the usual names of transformer weights say, with numbers from `config.json`.
//!
//! What the names do not say is replicated, which is always right. Fused tensors are among that: how one is cut is
//! not in its name.

use std::path::Path;

use serde_json::Value;
use tonnage_plan::{Mesh, Place, Placement, Request, Table, Uneven, Wanted, matches};

/// The numbers of a model that rules need.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ModelConfig {
    /// Query heads.
    pub heads: Option<u64>,
    /// Heads of keys and values.
    pub kv_heads: Option<u64>,
}

impl ModelConfig {
    /// What `config.json` beside a checkpoint says, if it is there.
    pub fn beside(path: &Path) -> ModelConfig {
        let folder = if path.is_dir() {
            Some(path)
        } else {
            path.parent()
        };
        let text =
            folder.and_then(|folder| std::fs::read_to_string(folder.join("config.json")).ok());
        let config = text.and_then(|text| serde_json::from_str::<Value>(&text).ok());
        config.map_or_else(ModelConfig::default, |config| ModelConfig::of(&config))
    }

    fn of(config: &Value) -> ModelConfig {
        let config = config.get("text_config").unwrap_or(config);
        let number = |key: &str| config.get(key).and_then(Value::as_u64).filter(|&n| n > 0);
        let heads = number("num_attention_heads");
        ModelConfig {
            heads,
            kv_heads: number("num_key_value_heads").or(heads),
        }
    }
}

/// A request for all tensors of a table, each placed by its name: rows of `q_proj`, `k_proj`, `v_proj`, `gate_proj`,
/// `up_proj`, of embeddings and of the head on the axis `tp`, columns of `o_proj` and `down_proj`; layers in equal
/// numbers on `pp`, the first ranks one more, embeddings with the first and all else with the last; experts that are
/// tensors of their own on `ep`. Axes that the mesh does not have say nothing.
pub fn auto(table: &Table, mesh: &Mesh, config: ModelConfig) -> Request {
    let count = |words| table.names().filter_map(|name| number(name, words)).max();
    let (layers, experts) = (count(LAYERS), count(EXPERTS));
    let targets = table.names().map(|name| {
        let mut place = Place::new();
        let owner = |part| Placement::Owner(vec![part]);
        let expert = number(name, EXPERTS).zip(experts).zip(size(mesh, "ep"));
        if let Some(((expert, last), size)) = expert {
            place.insert("ep".to_owned(), owner(share(expert, last + 1, size)));
        } else if let Some(size) = size(mesh, "tp") {
            let shape = table.shape(name).unwrap_or(&[]);
            let placement = sharded(name, shape, config).filter(|one| fits(one, size));
            place.extend(placement.map(|one| ("tp".to_owned(), one)));
        }
        if let Some(size) = size(mesh, "pp") {
            let stage = match number(name, LAYERS).zip(layers) {
                Some((layer, last)) => share(layer, last + 1, size),
                None if any(name, &["*embed_tokens*", "*wte*", "*word_embeddings*"]) => 0,
                None => size - 1,
            };
            place.insert("pp".to_owned(), owner(stage));
        }
        Wanted::new(name, place)
    });
    Request {
        mesh: mesh.axes().to_vec(),
        alt: mesh.alt().to_vec(),
        targets: targets.collect(),
        ..Request::default()
    }
}

const LAYERS: &[&str] = &["layers", "h", "blocks", "block"];
const EXPERTS: &[&str] = &["experts"];

fn size(mesh: &Mesh, axis: &str) -> Option<u32> {
    mesh.axis(axis).map(|axis| axis.size)
}

/// The number behind one of these words in a dotted name.
fn number(name: &str, words: &[&str]) -> Option<u64> {
    let mut parts = name.split('.');
    while let Some(part) = parts.next() {
        if words.contains(&part)
            && let Some(number) = parts.next().and_then(|next| next.parse().ok())
        {
            return Some(number);
        }
    }
    None
}

/// Which of `size` parts of `all`, the first ones larger, has an item.
fn share(item: u64, all: u64, size: u32) -> u32 {
    let size = u64::from(size);
    let (each, more) = (all / size, all % size);
    let large = more * (each + 1);
    let part = if item < large {
        item / (each + 1)
    } else {
        more + (item - large) / each.max(1)
    };
    part.min(size - 1) as u32
}

fn any(name: &str, patterns: &[&str]) -> bool {
    patterns.iter().any(|pattern| matches(pattern, name))
}

/// The placement on `tp` that a name says.
fn sharded(name: &str, shape: &[u64], config: ModelConfig) -> Option<Placement> {
    let &rows = shape.first()?;
    let heads = |heads: Option<u64>| match heads.filter(|&heads| rows.is_multiple_of(heads)) {
        Some(heads) => Placement::Heads {
            dim: 0,
            heads,
            head_dim: rows / heads,
            uneven: Uneven::Error,
        },
        None => Placement::shard(0),
    };
    if any(name, &["*.q_proj.weight", "*.q_proj.bias"]) {
        return Some(heads(config.heads));
    }
    if any(
        name,
        &[
            "*.k_proj.weight",
            "*.k_proj.bias",
            "*.v_proj.weight",
            "*.v_proj.bias",
        ],
    ) {
        return Some(heads(config.kv_heads));
    }
    let columns = ["*.o_proj.weight", "*.down_proj.weight", "*.w2.weight"];
    if shape.len() == 2 && any(name, &columns) {
        return Some(Placement::shard(1));
    }
    let rows_of = [
        "*.gate_proj.weight",
        "*.gate_proj.bias",
        "*.up_proj.weight",
        "*.up_proj.bias",
        "*.w1.weight",
        "*.w3.weight",
        "*embed_tokens.weight",
        "*lm_head.weight",
    ];
    (shape.len() <= 2 && any(name, &rows_of)).then(|| Placement::shard(0))
}

/// Whether heads come out even; others always do.
fn fits(placement: &Placement, size: u32) -> bool {
    let size = u64::from(size);
    match placement {
        Placement::Heads { heads, .. } => heads.is_multiple_of(size) || size.is_multiple_of(*heads),
        _ => true,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_are_as_equal_as_can_be() {
        let shares = |all, size| {
            (0..all)
                .map(|item| share(item, all, size))
                .collect::<Vec<_>>()
        };
        assert_eq!(shares(5, 2), [0, 0, 0, 1, 1]);
        assert_eq!(shares(4, 4), [0, 1, 2, 3]);
        assert_eq!(shares(2, 4), [0, 1]);
    }

    #[test]
    fn names_say_where_weights_go() {
        let config = serde_json::json!({"num_attention_heads": 4, "num_key_value_heads": 1});
        let config = ModelConfig::of(&config);
        let heads = |heads, head_dim| Placement::Heads {
            dim: 0,
            heads,
            head_dim,
            uneven: Uneven::Error,
        };
        let said = |name: &str, shape: &[u64]| sharded(name, shape, config);
        assert_eq!(
            said("model.layers.0.self_attn.q_proj.weight", &[32, 8]),
            Some(heads(4, 8))
        );
        assert_eq!(
            said("model.layers.0.self_attn.k_proj.weight", &[8, 8]),
            Some(heads(1, 8))
        );
        assert_eq!(
            said("model.layers.0.mlp.down_proj.weight", &[8, 32]),
            Some(Placement::shard(1))
        );
        assert_eq!(said("lm_head.weight", &[99, 8]), Some(Placement::shard(0)));
        assert_eq!(
            said("model.layers.0.self_attn.qkv_proj.weight", &[48, 8]),
            None
        );
        assert_eq!(
            number("model.layers.12.mlp.experts.3.w1.weight", EXPERTS),
            Some(3)
        );
        let table = {
            let mut table = Table::new();
            let file = table.add_file("m", 1 << 12);
            for (name, shape) in [
                ("model.embed_tokens.weight", [8, 4]),
                ("model.layers.0.mlp.up_proj.weight", [8, 4]),
                ("model.layers.1.mlp.experts.1.down_proj.weight", [4, 8]),
            ] {
                let dtype = tonnage_format::Dtype::U8;
                table
                    .add(name, dtype, &shape, file, 0)
                    .expect("a tensor that fits");
            }
            table
        };
        let mesh = Mesh::new(&[("pp", 2), ("ep", 2)]).expect("a mesh");
        let asked = auto(&table, &mesh, config);
        let owner = |axis: &str, part| (axis.to_owned(), Placement::Owner(vec![part]));
        let places = asked.targets.iter().map(|one| (*one.place).clone());
        let wanted = [
            Place::from([owner("pp", 0)]),
            Place::from([owner("pp", 0)]),
            Place::from([owner("pp", 1), owner("ep", 1)]),
        ];
        assert!(places.eq(wanted), "{asked:?}");
    }
}
