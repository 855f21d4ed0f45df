//! How long planning takes, with the proof: every rank of a model like Llama-3-405B on TP8 × PP4, and
//! of a mixture of experts with 100,000 tensors on EP8 × PP4.
//!
//! ```text
//! cargo run --release -p tonnage-plan --example plan_speed
//! ```

#![allow(
    clippy::disallowed_types,
    clippy::disallowed_macros,
    reason = "it measures and prints; the room does neither"
)]

use std::sync::Arc;
use std::time::Instant;

use tonnage_format::Dtype;
use tonnage_plan::{Place, Placement, Plan, Request, Table, Wanted, build};

/// Tensors with their placements, in files of some gigabytes.
#[derive(Default)]
struct Model {
    table: Table,
    targets: Vec<Wanted>,
    file: u32,
    used: u64,
}

const FILE: u64 = 5 << 30;

impl Model {
    fn add(&mut self, name: &str, shape: &[u64], place: &[(&str, Placement)]) {
        let bytes = 2 * shape.iter().product::<u64>();
        if self.table.files().is_empty() || self.used + bytes > FILE {
            let label = format!("model-{:05}.safetensors", self.table.files().len());
            self.file = self.table.add_file(&label, 1 << 40);
            self.used = 1 << 16;
        }
        let added = self
            .table
            .add(name, Dtype::BF16, shape, self.file, self.used);
        added.expect("a tensor that fits");
        self.used += bytes;
        let place = place
            .iter()
            .map(|(axis, one)| ((*axis).to_owned(), one.clone()));
        self.targets.push(Wanted {
            place: Arc::new(place.collect::<Place>()),
            ..Wanted::new(name, Place::new())
        });
    }

    fn attention(&mut self, layer: &str, hidden: u64, heads: u64, kv: u64, stage: u32) {
        let here = ("pp", Placement::Owner(vec![stage]));
        let rows = |heads| Placement::Heads {
            dim: 0,
            heads,
            head_dim: 128,
            uneven: tonnage_plan::Uneven::Error,
        };
        for (name, heads) in [("q", heads), ("k", kv), ("v", kv)] {
            let place = [here.clone(), ("tp", rows(heads))];
            self.add(
                &format!("{layer}.self_attn.{name}_proj.weight"),
                &[heads * 128, hidden],
                &place,
            );
        }
        let place = [here.clone(), ("tp", Placement::shard(1))];
        self.add(
            &format!("{layer}.self_attn.o_proj.weight"),
            &[hidden, heads * 128],
            &place,
        );
        for norm in ["input_layernorm", "post_attention_layernorm"] {
            self.add(
                &format!("{layer}.{norm}.weight"),
                &[hidden],
                std::slice::from_ref(&here),
            );
        }
    }

    fn mlp(
        &mut self,
        name: &str,
        hidden: u64,
        inner: u64,
        place: &[(&str, Placement)],
        shard: bool,
    ) {
        for (part, shape, dim) in [
            ("gate_proj", [inner, hidden], 0),
            ("up_proj", [inner, hidden], 0),
            ("down_proj", [hidden, inner], 1),
        ] {
            let mut place = place.to_vec();
            if shard {
                place.push(("tp", Placement::shard(dim)));
            }
            self.add(&format!("{name}.{part}.weight"), &shape, &place);
        }
    }
}

fn llama() -> (Model, Vec<(String, u32)>) {
    let mut model = Model::default();
    let (hidden, inner, layers) = (16384, 53248, 126);
    let vocabulary = |stage| {
        [
            ("pp", Placement::Owner(vec![stage])),
            ("tp", Placement::shard(0)),
        ]
    };
    model.add(
        "model.embed_tokens.weight",
        &[128_256, hidden],
        &vocabulary(0),
    );
    for layer in 0..layers {
        let stage = layer * 4 / layers;
        let name = format!("model.layers.{layer}");
        model.attention(&name, hidden, 128, 8, stage);
        let here = [("pp", Placement::Owner(vec![stage]))];
        model.mlp(&format!("{name}.mlp"), hidden, inner, &here, true);
    }
    model.add(
        "model.norm.weight",
        &[hidden],
        &[("pp", Placement::Owner(vec![3]))],
    );
    model.add("lm_head.weight", &[128_256, hidden], &vocabulary(3));
    (model, vec![("pp".to_owned(), 4), ("tp".to_owned(), 8)])
}

fn experts() -> (Model, Vec<(String, u32)>) {
    let mut model = Model::default();
    let (hidden, layers, experts) = (4096, 64, 518);
    for layer in 0..layers {
        let stage = layer * 4 / layers;
        let name = format!("model.layers.{layer}");
        for expert in 0..experts {
            let place = [
                ("pp", Placement::Owner(vec![stage])),
                ("ep", Placement::Owner(vec![expert * 8 / experts])),
            ];
            model.mlp(
                &format!("{name}.mlp.experts.{expert}"),
                hidden,
                1536,
                &place,
                false,
            );
        }
        let here = [("pp", Placement::Owner(vec![stage]))];
        for norm in ["input_layernorm", "post_attention_layernorm", "mlp.gate"] {
            model.add(&format!("{name}.{norm}.weight"), &[hidden], &here);
        }
    }
    while model.targets.len() < 100_000 {
        let name = format!("extra.{}", model.targets.len());
        model.add(&name, &[hidden], &[]);
    }
    (model, vec![("pp".to_owned(), 4), ("ep".to_owned(), 8)])
}

fn measure(what: &str, model: Model, mesh: Vec<(String, u32)>) {
    let request = Request {
        mesh,
        targets: model.targets,
        ..Request::default()
    };
    let mut rounds: Vec<[f64; 4]> = Vec::new();
    let mut shown = String::new();
    for _ in 0..5 {
        let clock = Instant::now();
        let plan = build(&model.table, &request).expect("a plan");
        let built = clock.elapsed();
        let digest = plan.digest();
        let digested = clock.elapsed() - built;
        let clock = Instant::now();
        let text = plan.to_json();
        let written = clock.elapsed();
        let again = Plan::from_json(&text).expect("the plan");
        let proof = again.verify().expect("a plan that holds");
        let verified = clock.elapsed() - written;
        assert_eq!(again.digest(), digest);
        let seconds = [built, digested, written, verified].map(|one| one.as_secs_f64());
        rounds.push(seconds);
        shown = format!(
            "{} tensors, {} ranks, {} layouts, {} copies, {} points, {:.1} MB of JSON",
            plan.targets().len(),
            plan.mesh().size(),
            proof.layouts,
            proof.nests,
            proof.points,
            text.len() as f64 / 1e6
        );
    }
    let median = |which: usize| {
        let mut all: Vec<f64> = rounds.iter().map(|round| round[which]).collect();
        all.sort_by(f64::total_cmp);
        all[all.len() / 2]
    };
    println!("{what}: {shown}");
    println!(
        "  build with proof {:.3} s, digest {:.3} s, to JSON {:.3} s, from JSON with verify {:.3} s",
        median(0),
        median(1),
        median(2),
        median(3)
    );
}

fn main() {
    let (model, mesh) = llama();
    measure("Llama-3-405B-like, PP4 x TP8", model, mesh);
    let (model, mesh) = experts();
    measure("mixture of experts, PP4 x EP8", model, mesh);
}
