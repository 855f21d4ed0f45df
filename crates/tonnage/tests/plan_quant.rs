//! Ranks that load their part of a quantised tensor: together they have its values, whatever the scheme and wherever
//! the cuts fall.

#[path = "../../quant/tests/slices/samples.rs"]
mod samples;

use std::collections::BTreeMap;

use samples::{Rng, Sample, sample};
use tonnage::engine::Options;
use tonnage::plan::{Mesh, PlanLoad, QuantPlan, QuantShard, Request, Rules};
use tonnage::{Checkpoint, Dtype, Save, TensorData};
use tonnage_quant::descriptor::Role;
use tonnage_quant::ggml::GgmlType;
use tonnage_quant::interpret::Bytes;
use tonnage_quant::map::{QTensor, QuantMap};
use tonnage_quant::scheme::{Param, Part, Scheme};
use tonnage_quant::slice::{Cut, Fallback};

const NAME: &str = "layers.0.proj.weight";

/// A checkpoint with one quantised tensor, its map, and its values.
struct Case {
    _folder: tempfile::TempDir,
    checkpoint: Checkpoint,
    map: QuantMap,
    shape: Vec<u64>,
    values: Vec<u32>,
}

fn bits(values: &[f32]) -> Vec<u32> {
    let bits = |value: &f32| {
        if value.is_nan() {
            u32::MAX
        } else {
            value.to_bits()
        }
    };
    values.iter().map(bits).collect()
}

fn case(tensor: QTensor, bytes: &BTreeMap<Role, Vec<u8>>) -> Case {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("model.safetensors");
    let mut data: Vec<TensorData<'_>> = Vec::new();
    for (role, part) in &tensor.parts {
        data.push(TensorData {
            name: &part.name,
            dtype: part.dtype,
            shape: &part.shape,
            data: &bytes[role],
        });
    }
    let norm = [0_u8; 64];
    data.push(TensorData {
        name: "norm.weight",
        dtype: Dtype::F32,
        shape: &[16],
        data: &norm,
    });
    tonnage::save(&data, &path, &Save::default()).unwrap();
    let cut = Cut::whole(&tensor).unwrap();
    let mut values = vec![0.0; tensor.shape.iter().product::<u64>() as usize];
    let given: Bytes<'_> = bytes
        .iter()
        .map(|(role, bytes)| (*role, &bytes[..]))
        .collect();
    cut.values(&given, &mut values).unwrap();
    let shape = tensor.shape.clone();
    let mut map = QuantMap::default();
    map.insert(tensor).unwrap();
    Case {
        _folder: folder,
        checkpoint: Checkpoint::open(&path).unwrap(),
        map,
        shape,
        values: bits(&values),
    }
}

fn of(sample: Sample) -> Case {
    let Sample {
        scheme,
        params,
        mut parts,
        bytes,
    } = sample;
    for part in parts.values_mut() {
        part.name = format!("layers.0.proj.{}", part.name);
    }
    case(
        QTensor::preset_of(NAME, scheme, params, parts).unwrap(),
        &bytes,
    )
}

impl Case {
    fn plan(&self, ranks: u32, axis: usize) -> tonnage::Result<QuantPlan> {
        let table = self.checkpoint.plan_table()?;
        let rules =
            format!(r#"{{"*.proj.weight": {{"shard": {{"dim": {axis}}}}}, "*": "replicate"}}"#);
        let of = Request {
            mesh: Mesh::new(&[("tp", ranks)])?.axes().to_vec(),
            ..Request::default()
        };
        QuantPlan::new(
            &table,
            &self.map,
            &of,
            &Rules::from_json(&rules)?,
            Fallback::Lossless,
        )
    }

    /// The values that all ranks have together, each put where its shard lies; and the notes.
    fn together(&self, plan: &QuantPlan) -> (Vec<u32>, String) {
        let load = self.checkpoint.with_plan(&plan.plan).unwrap();
        let mut all = vec![1; self.values.len()];
        let mut notes = String::new();
        for rank in 0..plan.plan.mesh().size() {
            let loaded = load.load(rank, &PlanLoad::default()).unwrap();
            for shard in plan
                .shards
                .iter()
                .filter(|shard| shard.ranks.contains(&rank))
            {
                let values = shard.values(|name| Some(loaded.get(name)?.1)).unwrap();
                self.put(shard, &bits(&values), &mut all);
                // And as the façade does it by itself, in another dtype.
                let mut halves = vec![0; 2 * values.len()];
                let quiet = PlanLoad::default();
                let options = Options::default();
                load.dequantize(rank, shard, Dtype::BF16, &mut halves, &quiet, &options)
                    .unwrap();
                let wanted: Vec<u8> = values
                    .iter()
                    .flat_map(|value| half::bf16::from_f32(*value).to_le_bytes())
                    .collect();
                assert!(halves == wanted);
            }
            let io = load.io(rank, None).unwrap();
            notes += &tonnage::plan::explain(&plan.plan, rank, &io).unwrap();
        }
        (all, notes)
    }

    fn put(&self, shard: &QuantShard, values: &[u32], all: &mut [u32]) {
        for (mut at, &value) in values.iter().enumerate() {
            let mut place = 0;
            let mut stride = 1;
            for axis in (0..self.shape.len()).rev() {
                let len = shard.cut.shape[axis] as usize;
                place += (shard.start[axis] as usize + at % len) * stride;
                at /= len;
                stride *= self.shape[axis] as usize;
            }
            all[place] = value;
        }
    }
}

#[test]
fn ranks_together_have_the_tensor_of_every_scheme() {
    let mut planned = BTreeMap::<&str, usize>::new();
    for scheme in Scheme::all() {
        // Of groups that run down the columns nothing is cut.
        for seed in 1..if scheme.name == "hqq" { 16 } else { 4 } {
            let case = of(sample(scheme.name, &mut Rng(seed << 33 | 0x51)));
            for ranks in [2, 3, 4] {
                for axis in 0..case.shape.len() {
                    match case.plan(ranks, axis) {
                        Ok(plan) => {
                            let (found, _) = case.together(&plan);
                            assert!(
                                found == case.values,
                                "{} seed {seed}, axis {axis} over {ranks}",
                                scheme.name
                            );
                            plan.plan.verify().unwrap();
                            *planned.entry(scheme.name).or_default() += 1;
                        }
                        Err(error) => assert_eq!(error.code(), "PLAN_QUANTIZED", "{error}"),
                    }
                }
            }
        }
        assert!(
            planned.get(scheme.name) > Some(&2),
            "{}: {planned:?}",
            scheme.name
        );
    }
}

/// A GPTQ tensor of 96 × 768 in groups of 128, with or without an index of groups.
fn gptq(indexed: bool) -> Case {
    for seed in 1.. {
        let mut one = sample("gptq", &mut Rng(seed));
        let (out, inner) = (96, 768);
        one.params.0.insert("bits".to_owned(), Param::Int(4));
        one.params.0.insert("group".to_owned(), Param::Int(128));
        if one.parts.contains_key(&Role::GroupIndex) != indexed {
            continue;
        }
        let mut put = |role: Role, shape: &[u64], width: usize| {
            let count = shape.iter().product::<u64>() as usize;
            one.parts.get_mut(&role).unwrap().shape = shape.to_vec();
            let old = one.bytes[&role].clone();
            let bytes = old.iter().copied().cycle().take(count * width).collect();
            one.bytes.insert(role, bytes);
        };
        put(Role::Codes, &[inner / 8, out], 4);
        put(Role::Zero, &[6, out / 8], 4);
        put(Role::Scale, &[6, out], 2);
        if indexed {
            put(Role::GroupIndex, &[inner], 4);
            let groups = (0..inner as i32).flat_map(|at| (at * 7 % 6).to_le_bytes());
            one.bytes.insert(Role::GroupIndex, groups.collect());
        }
        return of(one);
    }
    unreachable!()
}

#[test]
fn the_plan_says_how_it_cut() {
    let case = gptq(false);
    for (ranks, axis, said) in [
        (2, 1, "axis 1 384:768 of 768: clean"),
        (4, 1, "axis 1 192:384 of 768: groups of 128 as groups of 64"),
        (3, 0, "axis 0 32:64 of 96: clean"),
        (4, 0, "axis 0 24:48 of 96: clean"),
    ] {
        let plan = case.plan(ranks, axis).unwrap();
        let (found, notes) = case.together(&plan);
        assert!(found == case.values);
        assert!(
            notes.contains(said) && notes.contains("gptq@1"),
            "{said}: {notes}"
        );
    }
    // 96 outputs over 5 ranks are 20, 20, 20, 20, 16: words have eight.
    let plan = case.plan(5, 0).unwrap();
    let (found, notes) = case.together(&plan);
    assert!(
        found == case.values && notes.contains("uneven, in multiples of 8"),
        "{notes}"
    );
    // 768 inputs over 7 ranks don't fall on words of eight: whole groups, one rank without any.
    let plan = case.plan(7, 1).unwrap();
    let (found, notes) = case.together(&plan);
    assert!(
        found == case.values && notes.contains("uneven, in multiples of 128"),
        "{notes}"
    );
    let indexed = gptq(true);
    let plan = indexed.plan(4, 1).unwrap();
    let (found, notes) = indexed.together(&plan);
    assert!(
        found == indexed.values && notes.contains("axis 1 192:384 of 768: clean"),
        "{notes}"
    );
    // A rank's scales are all of them, its index its own.
    let shard = plan.shards.iter().find(|shard| shard.ranks == [1]).unwrap();
    let sliced = shard.cut.sliced().unwrap();
    assert_eq!(sliced.parts[&Role::Scale].shape, [6, 96]);
    assert_eq!(sliced.parts[&Role::GroupIndex].shape, [192]);
}

#[test]
fn blocks_of_ggml_are_cut_by_rows_and_between_blocks() {
    for (ty, columns) in [
        (GgmlType::Q4_K, 768),
        (GgmlType::Q6_K, 1024),
        (GgmlType::Q8_0, 96),
        (GgmlType::MXFP4, 160),
    ] {
        let bytes = columns / ty.elements() as u64 * ty.bytes() as u64;
        let part = Part {
            name: NAME.to_owned(),
            dtype: Dtype::U8,
            shape: vec![7, bytes],
        };
        let mut r = Rng(99);
        let codes = (0..7 * bytes).map(|_| r.next() as u8 & 0x3f).collect();
        let case = case(
            QTensor::ggml_of(NAME, ty, part).unwrap(),
            &BTreeMap::from([(Role::Codes, codes)]),
        );
        for ranks in [2, 3, 4] {
            for axis in [0, 1] {
                let plan = case.plan(ranks, axis).unwrap();
                let (found, notes) = case.together(&plan);
                assert!(found == case.values, "{ty}, axis {axis} over {ranks}");
                assert!(
                    notes.contains(&format!("ggml/{ty}@1, axis {axis}")),
                    "{notes}"
                );
            }
        }
    }
}

#[test]
fn what_can_t_be_cut_can_be_on_every_rank() {
    for name in ["hqq", "quanto", "bitnet", "bnb4"] {
        let case = of(sample(name, &mut Rng(3)));
        let table = case.checkpoint.plan_table().unwrap();
        let of = Request {
            mesh: vec![("tp".to_owned(), 2)],
            ..Request::default()
        };
        let rules = Rules::from_json(r#"{"*": "replicate"}"#).unwrap();
        let plan = QuantPlan::new(&table, &case.map, &of, &rules, Fallback::Lossless).unwrap();
        assert!(case.together(&plan).0 == case.values, "{name}");
        assert_eq!(plan.shards.len(), 1);
    }
}

#[test]
fn a_rule_for_a_part_alone_keeps_its_meaning() {
    let case = gptq(false);
    let table = case.checkpoint.plan_table().unwrap();
    let of = Request {
        mesh: vec![("tp".to_owned(), 2)],
        ..Request::default()
    };
    let rules =
        Rules::from_json(r#"{"*.Codes": {"shard": {"dim": 1}}, "*": "replicate"}"#).unwrap();
    let plan = QuantPlan::new(&table, &case.map, &of, &rules, Fallback::Lossless).unwrap();
    assert!(
        plan.shards.is_empty()
            && plan.plan
                == case
                    .checkpoint
                    .plan(&Mesh::new(&[("tp", 2)]).unwrap(), &rules)
                    .unwrap()
    );
    // What can't be moved is refused with the tensor's name.
    let rules = Rules::from_json(
        r#"{"*.proj.weight": {"strided": {"dim": 0, "groups": 2}}, "*": "replicate"}"#,
    )
    .unwrap();
    let refused = QuantPlan::new(&table, &case.map, &of, &rules, Fallback::Lossless).unwrap_err();
    assert!(
        refused.code() == "PLAN_QUANTIZED" && refused.to_string().contains(NAME),
        "{refused}"
    );
}
