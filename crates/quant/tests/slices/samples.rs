//! Tensors of every scheme, of random shapes and bytes.

use std::collections::BTreeMap;

use tonnage_format::Dtype;
use tonnage_quant::descriptor::Role;
use tonnage_quant::scheme::{Param, Params, Part, Parts, Scheme};

/// A small generator of its own, so that a failure can be made again.
pub struct Rng(pub u64);

impl Rng {
    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        mixed ^ (mixed >> 31)
    }

    pub fn below(&mut self, end: u64) -> u64 {
        self.next() % end.max(1)
    }

    pub fn pick<T: Copy>(&mut self, of: &[T]) -> T {
        of[self.below(of.len() as u64) as usize]
    }
}

pub struct Sample {
    pub scheme: &'static Scheme,
    pub params: Params,
    pub parts: Parts,
    pub bytes: BTreeMap<Role, Vec<u8>>,
}

/// Parameters and parts while they are put together.
#[derive(Default)]
struct Draft(BTreeMap<String, Param>, Parts);

impl Draft {
    fn int(&mut self, name: &str, value: u64) -> &mut Self {
        self.0.insert(name.to_owned(), Param::Int(value as i64));
        self
    }

    fn list(&mut self, name: &str, value: &[u64]) -> &mut Self {
        let list = value.iter().map(|v| *v as i64).collect();
        self.0.insert(name.to_owned(), Param::List(list));
        self
    }

    fn text(&mut self, name: &str, value: &str) -> &mut Self {
        self.0
            .insert(name.to_owned(), Param::Text(value.to_owned()));
        self
    }

    fn part(&mut self, role: Role, dtype: Dtype, shape: &[u64]) -> &mut Self {
        let (name, shape) = (format!("{role:?}"), shape.to_vec());
        self.1.insert(role, Part { name, dtype, shape });
        self
    }
}

fn bytes_of(part: &Part, groups: u64, r: &mut Rng) -> Vec<u8> {
    let count = part.shape.iter().product::<u64>();
    let mut bytes = Vec::new();
    for _ in 0..count {
        match (part.name.as_str(), part.dtype) {
            ("GroupIndex", _) => bytes.extend((r.below(groups) as i32).to_le_bytes()),
            (_, Dtype::F16) => bytes.extend((0x2c00 + r.below(0x0c00) as u16).to_le_bytes()),
            (_, Dtype::BF16) => bytes.extend((0x3c00 + r.below(0x0200) as u16).to_le_bytes()),
            (_, Dtype::F32) => bytes.extend((0.01 + r.below(1000) as f32 / 1e3).to_le_bytes()),
            (_, Dtype::F8_E4M3) => bytes.push(r.next() as u8 & 0x77),
            ("Scale", Dtype::U8) => bytes.push(100 + r.below(50) as u8),
            (_, dtype) => bytes.extend(&r.next().to_le_bytes()[..dtype.bitsize() / 8]),
        }
    }
    bytes
}

/// A tensor of a scheme.
pub fn sample(name: &str, r: &mut Rng) -> Sample {
    let scheme = Scheme::find(name).unwrap();
    let mut d = Draft::default();
    let half = r.pick(&[Dtype::F16, Dtype::BF16]);
    match name {
        "gptq" | "gptq-v2" | "gptq-planar" => gptq(name, &mut d, r),
        "awq-gemm" | "awq-gemv" | "awq-gemv-fast" | "marlin" => awq(name, &mut d, r),
        "ct-pack-dense" | "ct-pack-word" => packed(name == "ct-pack-dense", &mut d, r),
        "ct-int" => {
            let (out, inner, group) = (1 + r.below(40), 1 + r.below(200), r.pick(&[16, 32]));
            let groups = inner.div_ceil(group);
            d.part(Role::Codes, Dtype::I8, &[out, inner]);
            match r.below(3) {
                0 => d.part(Role::Scale, Dtype::BF16, &[1]),
                1 => d.part(Role::Scale, Dtype::BF16, &[out, 1]),
                _ => d
                    .int("group", group)
                    .part(Role::Scale, half, &[out, groups])
                    .part(Role::Zero, Dtype::I8, &[out, groups]),
            };
        }
        "fp8-tensor" | "fp8-row" | "fp8-block" => {
            let mut shape = vec![1 + r.below(300), 1 + r.below(200)];
            if r.below(3) == 0 {
                shape.insert(0, 1 + r.below(4));
            }
            let mut rows = shape.clone();
            d.part(Role::Codes, Dtype::F8_E4M3, &shape);
            let axes = rows.len();
            match name {
                "fp8-tensor" => d.part(Role::Scale, Dtype::F32, &[]),
                "fp8-row" => {
                    rows[axes - 1] = 1;
                    d.part(Role::Scale, Dtype::F32, &rows)
                }
                _ => {
                    let block = [r.pick(&[32, 64, 128]), r.pick(&[16, 128])];
                    rows[axes - 2] = rows[axes - 2].div_ceil(block[0]);
                    rows[axes - 1] = rows[axes - 1].div_ceil(block[1]);
                    d.list("block", &block).part(Role::Scale, Dtype::F32, &rows)
                }
            };
        }
        "mxfp4" | "mxfp6" | "mxfp8" | "nvfp4-mul" | "nvfp4-div" => micro(name, &mut d, r),
        "mlx-affine" => {
            let (bits, group) = (r.pick(&[2, 3, 4, 5, 6, 8]), r.pick(&[32, 64]));
            let (mut shape, groups) = (vec![1 + r.below(20), 0], 1 + r.below(4));
            if r.below(3) == 0 {
                shape.insert(0, 1 + r.below(3));
            }
            let last = shape.len() - 1;
            shape[last] = groups * group * bits / 32;
            d.int("bits", bits)
                .int("group", group)
                .part(Role::Codes, Dtype::U32, &shape);
            shape[last] = groups;
            d.part(Role::Scale, half, &shape)
                .part(Role::Zero, half, &shape);
        }
        "bnb4" => {
            let (rows, columns) = (2 * (1 + r.below(30)), r.pick(&[32, 48, 64, 96, 256]));
            let (blocks, nested) = ((rows * columns).div_ceil(64), r.below(2) == 0);
            d.int("block", 64)
                .list("shape", &[rows, columns])
                .text("dtype", "BF16");
            d.part(Role::Codes, Dtype::U8, &[rows * columns / 2, 1])
                .part(Role::Table, Dtype::F32, &[16]);
            if nested {
                d.int("nested_block", 64)
                    .part(Role::Scale, Dtype::U8, &[blocks]);
                d.part(Role::NestedScale, Dtype::F32, &[blocks.div_ceil(64)])
                    .part(Role::NestedTable, Dtype::F32, &[256]);
            } else {
                d.part(Role::Scale, Dtype::F32, &[blocks]);
            }
        }
        "bnb8" => {
            let shape = [1 + r.below(40), 1 + r.below(60)];
            d.part(Role::Codes, Dtype::I8, &shape)
                .part(Role::Scale, Dtype::F32, &shape[..1]);
        }
        "bitnet" => {
            let shape = [1 + r.below(10), 1 + r.below(60)];
            d.text("scale", "multiply")
                .part(Role::Codes, Dtype::U8, &shape)
                .part(Role::Scale, Dtype::BF16, &[1]);
        }
        "gemma" => {
            let (bits, out, inner) = (r.pick(&[2, 4]), 1 + r.below(20), 1 + r.below(60));
            d.int("bits", bits).list("shape", &[out, inner]);
            d.part(Role::Codes, Dtype::U8, &[out, inner.div_ceil(8 / bits)])
                .part(Role::Scale, Dtype::F32, &[out, 1]);
        }
        "hqq" | "quanto" => rows(name, half, &mut d, r),
        "modelopt-int4-qtensor" => {
            let (out, groups) = (1 + r.below(20), 1 + r.below(8));
            d.int("group", 32)
                .part(Role::Codes, Dtype::U8, &[out, groups * 16])
                .part(Role::Scale, Dtype::BF16, &[out * groups, 1]);
        }
        other => panic!("no sample of {other}"),
    }
    let Draft(params, parts) = d;
    let groups = parts
        .get(&Role::Scale)
        .map_or(1, |part| part.shape.first().copied().unwrap_or(1));
    let groups = match name.starts_with("ct") {
        true => parts[&Role::Scale].shape.last().copied().unwrap_or(1),
        false => groups,
    };
    let bytes = parts
        .iter()
        .map(|(role, part)| (*role, bytes_of(part, groups, r)))
        .collect();
    Sample {
        scheme,
        params: Params(params),
        parts,
        bytes,
    }
}

/// Rows, or groups, some to a byte.
fn rows(name: &str, half: Dtype, d: &mut Draft, r: &mut Rng) {
    let bits = if name == "hqq" {
        r.pick(&[1, 2, 3, 4, 5, 8])
    } else {
        r.pick(&[2, 4, 8])
    };
    let per = match bits {
        3 => 10,
        bits if bits < 5 => 8 / bits,
        _ => 1,
    };
    let (out, group, groups) = (
        1 + r.below(20),
        16 * (1 + r.below(4)),
        r.pick(&[1, 1, 1, 2]),
    );
    let (groups, axis) = match (name, bits) {
        ("quanto", 8) => (1, 1),
        _ => (groups, u64::from(r.below(4) > 0)),
    };
    let axis = if name == "hqq" { axis } else { 1 };
    let all = out * groups;
    let (rows, columns) = if axis == 1 {
        (all, group)
    } else {
        (group, all)
    };
    let carrier = match (name, bits) {
        (_, 3) => Dtype::I32,
        ("quanto", 8) => Dtype::I8,
        _ => Dtype::U8,
    };
    d.int("bits", bits).list("shape", &[out, groups * group]);
    d.part(Role::Codes, carrier, &[rows.div_ceil(per), columns]);
    let scale = if axis == 1 { [rows, 1] } else { [1, columns] };
    d.part(Role::Scale, half, &scale);
    if name == "hqq" {
        d.int("axis", axis);
    }
    if carrier != Dtype::I8 {
        d.part(Role::Zero, half, &scale);
    }
}

fn gptq(name: &str, d: &mut Draft, r: &mut Rng) {
    let bits = if name == "gptq-planar" {
        2 + r.below(7)
    } else {
        r.pick(&[2, 3, 4, 8])
    };
    let (out, inner, group) = (
        32 * (1 + r.below(3)),
        32 * (1 + r.below(12)),
        r.pick(&[32, 64, 128]),
    );
    let groups = inner.div_ceil(group);
    d.int("bits", bits).int("group", group);
    d.part(Role::Codes, Dtype::I32, &[inner * bits / 32, out]);
    d.part(Role::Zero, Dtype::I32, &[groups, out * bits / 32])
        .part(Role::Scale, Dtype::F16, &[groups, out]);
    if r.below(3) == 0 {
        d.part(Role::GroupIndex, Dtype::I32, &[inner]);
    }
    if name == "gptq" {
        d.text("zero_wrap", r.pick(&["field", "word32", "none"]));
    }
}

fn awq(name: &str, d: &mut Draft, r: &mut Rng) {
    let (out, group) = (64 * (1 + r.below(3)), r.pick(&[32, 64, 128]));
    let inner = 64 * (1 + r.below(10));
    let groups = inner.div_ceil(group);
    d.int("group", group);
    match name {
        "awq-gemm" => d
            .part(Role::Codes, Dtype::I32, &[inner, out / 8])
            .part(Role::Zero, Dtype::I32, &[groups, out / 8])
            .part(Role::Scale, Dtype::F16, &[groups, out]),
        "awq-gemv" => {
            let words = groups.div_ceil(8) + r.below(2);
            d.part(Role::Codes, Dtype::I32, &[out, inner / 8])
                .part(Role::Zero, Dtype::I32, &[out, words])
                .part(Role::Scale, Dtype::F16, &[out, 8 * words])
        }
        "awq-gemv-fast" => {
            let wide = groups + r.below(8);
            d.part(Role::Codes, Dtype::I16, &[out / 4, inner])
                .part(Role::Zero, Dtype::F16, &[wide, out])
                .part(Role::Scale, Dtype::F16, &[wide, out])
        }
        _ => d
            .part(Role::Codes, Dtype::I32, &[inner / 16, out * 2])
            .part(Role::Scale, Dtype::F16, &[groups, out]),
    };
}

fn packed(dense: bool, d: &mut Draft, r: &mut Rng) {
    let (bits, group) = (1 + r.below(8), r.pick(&[32, 64, 128]));
    let (out, inner) = (
        1 + r.below(70),
        group * (1 + r.below(4)) + r.pick(&[0, 8, 32]),
    );
    let words = |n: u64| {
        if dense {
            (n * bits).div_ceil(32)
        } else {
            n.div_ceil(32 / bits)
        }
    };
    let groups = inner.div_ceil(group);
    d.int("bits", bits)
        .int("group", group)
        .list("shape", &[out, inner]);
    d.part(Role::Codes, Dtype::I32, &[out, words(inner)]).part(
        Role::Scale,
        Dtype::BF16,
        &[out, groups],
    );
    d.part(Role::Shape, Dtype::I64, &[2]);
    if r.below(2) == 0 {
        d.part(Role::Zero, Dtype::I32, &[words(out), groups]);
    }
    if r.below(3) == 0 {
        d.part(Role::GroupIndex, Dtype::I32, &[inner]);
    }
}

fn micro(name: &str, d: &mut Draft, r: &mut Rng) {
    let (width, block) = match name {
        "mxfp4" => (4, 32),
        "mxfp6" => (6, 32),
        "mxfp8" => (8, 32),
        _ => (4, 16),
    };
    let (out, blocks) = (1 + r.below(150), 1 + r.below(10));
    let bytes = blocks * block * width / 8;
    let lead: &[u64] = if r.below(3) == 0 { &[3] } else { &[] };
    let shaped = |rest: &[u64]| [lead, rest].concat();
    let blocked = name == "mxfp4" && !lead.is_empty() && r.below(2) == 0;
    let codes = if blocked {
        shaped(&[out, blocks, 16])
    } else {
        shaped(&[out, bytes])
    };
    let dtype = if width == 8 {
        Dtype::F8_E4M3
    } else {
        Dtype::U8
    };
    d.part(Role::Codes, dtype, &codes);
    let scale = if block == 16 {
        Dtype::F8_E4M3
    } else {
        Dtype::U8
    };
    if lead.is_empty() && r.below(2) == 0 {
        d.text("scale_layout", "swizzle_128x4");
        d.part(
            Role::Scale,
            scale,
            &[32 * out.div_ceil(128), 16 * blocks.div_ceil(4)],
        );
    } else {
        d.part(Role::Scale, scale, &shaped(&[out, blocks]));
    }
    if block == 16 {
        d.part(Role::GlobalScale, Dtype::F32, &[1]);
    }
}
