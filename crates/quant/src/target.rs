//! What a tensor is made into: a form, which is a scheme as some library writes it, and what is free in it.
//!
//! A target is written as a word: `q4_k`, `awq`, `gptq:bits=4,group=128,symmetric=false`.

use tonnage_format::Dtype;

use crate::descriptor::{Number, Role};
use crate::error::{Error, Reason};
use crate::ggml::GgmlType;
use crate::scheme::Scheme;

/// A scheme as a library writes it.
#[derive(Debug)]
pub struct Form {
    /// Its name.
    pub name: &'static str,
    /// Other names.
    pub aliases: &'static [&'static str],
    /// The row of the table of schemes.
    pub scheme: &'static str,
    /// What stands between the module's name and a part's.
    pub separator: &'static str,
    /// The parts that it can have, and what they are called.
    pub parts: &'static [(Role, &'static str)],
    /// The dtype of the codes.
    pub codes: Dtype,
    /// The dtypes of the scales, the usual one first.
    pub scales: &'static [Dtype],
    /// The widths of codes, the usual one first.
    pub bits: &'static [u32],
    /// The columns of a group where nothing is said; 0 for one group.
    pub group: i64,
    /// Whether codes are symmetric where nothing is said.
    pub symmetric: bool,
    /// Whether scales lie in tiles of 128 × 4.
    pub swizzled: bool,
    /// Whether the codes of a block have an axis of their own.
    pub blocked: bool,
}

/// What a tensor is made into.
#[derive(Clone, Debug)]
pub struct Target {
    /// The form.
    pub to: To,
    /// Bits of a code.
    pub bits: Option<u32>,
    /// Columns of a group; -1 for one group a row.
    pub group: Option<i64>,
    /// Whether zero is in the middle of the codes.
    pub symmetric: Option<bool>,
    /// Rows and columns of a block.
    pub block: Option<[u64; 2]>,
    /// The dtype of the scales.
    pub scale: Option<Dtype>,
    /// What an 8-bit float is.
    pub element: Option<Number>,
    /// How GPTQ's zero points wrap: `field`, `word32`.
    pub zero_wrap: Option<String>,
}

/// A form, or a type of ggml.
#[derive(Clone, Copy, Debug)]
pub enum To {
    /// A scheme of the table.
    Form(&'static Form),
    /// Blocks of ggml.
    Ggml(GgmlType),
}

const HALVES: &[Dtype] = &[Dtype::F16, Dtype::BF16, Dtype::F32];
const ANY_BITS: &[u32] = &[4, 2, 3, 5, 6, 7, 8];
const GPTQ_PARTS: &[(Role, &str)] = &[
    (Role::Codes, "qweight"),
    (Role::Zero, "qzeros"),
    (Role::Scale, "scales"),
    (Role::GroupIndex, "g_idx"),
];
const PACKED: &[(Role, &str)] = &[
    (Role::Codes, "weight_packed"),
    (Role::Scale, "weight_scale"),
];
const PLAIN: &[(Role, &str)] = &[(Role::Codes, "weight"), (Role::Scale, "weight_scale")];
const MLX: &[(Role, &str)] = &[(Role::Codes, "weight"), (Role::Scale, "scales")];

const BASE: Form = Form {
    name: "gptq",
    aliases: &[],
    scheme: "gptq@1",
    separator: ".",
    parts: GPTQ_PARTS,
    codes: Dtype::I32,
    scales: HALVES,
    bits: ANY_BITS,
    group: 128,
    symmetric: true,
    swizzled: false,
    blocked: false,
};
const MX: Form = Form {
    name: "mxfp4",
    aliases: &["mxfp4-ct"],
    scheme: "mxfp4@1",
    parts: PACKED,
    codes: Dtype::U8,
    scales: &[Dtype::U8],
    bits: &[4],
    group: 32,
    ..BASE
};
const NV: Form = Form {
    name: "nvfp4",
    aliases: &["nvfp4-mul", "nvfp4-modelopt"],
    scheme: "nvfp4-mul@1",
    parts: &[
        (Role::Codes, "weight"),
        (Role::Scale, "weight_scale"),
        (Role::GlobalScale, "weight_scale_2"),
    ],
    scales: &[Dtype::F8_E4M3],
    group: 16,
    ..MX
};
const FP8: Form = Form {
    name: "fp8-tensor",
    aliases: &["fp8"],
    scheme: "fp8-tensor@1",
    parts: PLAIN,
    codes: Dtype::F8_E4M3,
    scales: &[Dtype::F32, Dtype::BF16, Dtype::F16, Dtype::F8_E8M0],
    bits: &[8],
    group: 0,
    ..BASE
};

/// Every form.
pub static FORMS: &[Form] = &[
    BASE,
    Form {
        name: "gptq-v2",
        scheme: "gptq-v2@1",
        bits: &[4, 2, 3, 8],
        ..BASE
    },
    Form {
        name: "gptq-planar",
        aliases: &["gptq-p"],
        scheme: "gptq-planar@1",
        ..BASE
    },
    Form {
        name: "awq",
        aliases: &["awq-gemm"],
        scheme: "awq-gemm@1",
        bits: &[4],
        symmetric: false,
        ..BASE
    },
    Form {
        name: "awq-gemv",
        scheme: "awq-gemv@1",
        bits: &[4],
        symmetric: false,
        ..BASE
    },
    Form {
        name: "awq-gemv-fast",
        scheme: "awq-gemv-fast@1",
        codes: Dtype::I16,
        scales: &[Dtype::F16],
        bits: &[4],
        symmetric: false,
        ..BASE
    },
    Form {
        name: "marlin",
        scheme: "marlin@1",
        scales: &[Dtype::F16, Dtype::BF16],
        bits: &[4],
        ..BASE
    },
    Form {
        name: "ct-pack",
        aliases: &["compressed-tensors", "ct", "ct-pack-dense"],
        scheme: "ct-pack-dense@1",
        parts: CT_PARTS,
        bits: &[4, 1, 2, 3, 5, 6, 7, 8],
        ..BASE
    },
    Form {
        name: "ct-pack-word",
        scheme: "ct-pack-word@1",
        parts: CT_PARTS,
        bits: &[4, 1, 2, 3, 5, 6, 7, 8],
        ..BASE
    },
    Form {
        name: "ct-int",
        aliases: &["int8"],
        scheme: "ct-int@1",
        parts: &[
            (Role::Codes, "weight"),
            (Role::Scale, "weight_scale"),
            (Role::Zero, "weight_zero_point"),
        ],
        codes: Dtype::I8,
        bits: &[8],
        group: -1,
        ..BASE
    },
    Form {
        name: "mlx",
        aliases: &["mlx-affine"],
        scheme: "mlx-affine@1",
        parts: &[
            (Role::Codes, "weight"),
            (Role::Scale, "scales"),
            (Role::Zero, "biases"),
        ],
        codes: Dtype::U32,
        bits: &[4, 2, 3, 5, 6, 8],
        group: 64,
        symmetric: false,
        ..BASE
    },
    FP8,
    Form {
        name: "fp8-row",
        aliases: &["fp8-channel"],
        scheme: "fp8-row@1",
        ..FP8
    },
    Form {
        name: "fp8-block",
        aliases: &["deepseek-fp8"],
        scheme: "fp8-block@1",
        parts: &[(Role::Codes, "weight"), (Role::Scale, "weight_scale_inv")],
        ..FP8
    },
    MX,
    Form {
        name: "mxfp4-gpt-oss",
        aliases: &["gpt-oss"],
        separator: "_",
        parts: &[(Role::Codes, "blocks"), (Role::Scale, "scales")],
        blocked: true,
        ..MX
    },
    Form {
        name: "mxfp4-deepseek",
        parts: &[(Role::Codes, "weight"), (Role::Scale, "weight_scale_inv")],
        codes: Dtype::I8,
        scales: &[Dtype::F8_E8M0],
        ..MX
    },
    Form {
        name: "mxfp4-f4",
        aliases: &[],
        parts: PLAIN,
        codes: Dtype::F4,
        scales: &[Dtype::F8_E8M0],
        ..MX
    },
    Form {
        name: "mxfp4-mlx",
        aliases: &["mlx-mxfp4"],
        parts: MLX,
        codes: Dtype::U32,
        ..MX
    },
    Form {
        name: "mxfp6",
        aliases: &[],
        scheme: "mxfp6@1",
        bits: &[6],
        ..MX
    },
    Form {
        name: "mxfp8",
        aliases: &[],
        scheme: "mxfp8@1",
        parts: PLAIN,
        codes: Dtype::F8_E4M3,
        bits: &[8],
        ..MX
    },
    Form {
        name: "mxfp8-mlx",
        aliases: &["mlx-mxfp8"],
        scheme: "mxfp8@1",
        parts: MLX,
        codes: Dtype::U32,
        bits: &[8],
        ..MX
    },
    NV,
    Form {
        name: "nvfp4-torchao",
        aliases: &["nvfp4-swizzled"],
        swizzled: true,
        separator: "._weight_",
        parts: &[
            (Role::Codes, "qdata"),
            (Role::Scale, "scale"),
            (Role::GlobalScale, "per_tensor_scale"),
        ],
        ..NV
    },
    Form {
        name: "nvfp4-ct",
        aliases: &["nvfp4-div"],
        scheme: "nvfp4-div@1",
        parts: &[
            (Role::Codes, "weight_packed"),
            (Role::Scale, "weight_scale"),
            (Role::GlobalScale, "weight_global_scale"),
        ],
        ..NV
    },
    Form {
        name: "bnb4",
        aliases: &["bitsandbytes"],
        scheme: "bnb4@1",
        parts: &[
            (Role::Codes, "weight"),
            (Role::Scale, "weight.absmax"),
            (Role::Table, "weight.quant_map"),
            (Role::State, "weight.quant_state.bitsandbytes__nf4"),
        ],
        codes: Dtype::U8,
        scales: &[Dtype::F32],
        bits: &[4],
        group: 64,
        ..BASE
    },
];

const CT_PARTS: &[(Role, &str)] = &[
    (Role::Codes, "weight_packed"),
    (Role::Scale, "weight_scale"),
    (Role::Zero, "weight_zero_point"),
    (Role::GroupIndex, "weight_g_idx"),
    (Role::Shape, "weight_shape"),
];

impl Form {
    /// The form of a name or an alias, in any case.
    pub fn find(name: &str) -> Option<&'static Form> {
        let same = |other: &str| other.eq_ignore_ascii_case(name);
        FORMS
            .iter()
            .find(|form| same(form.name) || form.aliases.iter().any(|alias| same(alias)))
    }

    /// The row of the table of schemes.
    pub(crate) fn row(&self) -> Result<&'static Scheme, Error> {
        let none = || Error::new(Reason::Unsupported, format!("no scheme {:?}", self.scheme));
        Scheme::find(self.scheme).ok_or_else(none)
    }

    /// What a part of a tensor is called: `model.q_proj.weight` has the part `model.q_proj.qweight`.
    pub fn part_name(&self, tensor: &str, role: Role) -> Option<String> {
        let (_, suffix) = self.parts.iter().find(|(r, _)| *r == role)?;
        let module = tensor.strip_suffix(".weight").unwrap_or(tensor);
        Some(format!("{module}{}{suffix}", self.separator))
    }
}

impl Target {
    /// A target with nothing said.
    pub fn of(to: To) -> Self {
        Target {
            to,
            bits: None,
            group: None,
            symmetric: None,
            block: None,
            scale: None,
            element: None,
            zero_wrap: None,
        }
    }

    /// Reads a target: a name, and behind a colon what is free, with commas: `gptq:bits=4,group=128,symmetric=false`.
    ///
    /// # Errors
    /// No such form, no such option, or no such value.
    pub fn parse(text: &str) -> Result<Self, Error> {
        let (name, options) = text.split_once(':').unwrap_or((text, ""));
        // `mxfp4` and `nvfp4` are safetensors' forms; ggml's are `ggml/MXFP4` and `ggml/NVFP4`.
        let of_ggml = name.strip_prefix("ggml/");
        let form = Form::find(name).filter(|_| of_ggml.is_none());
        let to = match (form, GgmlType::from_name(of_ggml.unwrap_or(name))) {
            (Some(form), _) => To::Form(form),
            (None, Some(ty)) if !ty.is_plain() && !ty.is_runtime_only() => To::Ggml(ty),
            _ => {
                let known: Vec<&str> = FORMS.iter().map(|form| form.name).collect();
                let text = format!(
                    "no scheme {name:?}; there are {}, and ggml's types such as q4_k and ggml/MXFP4",
                    known.join(", ")
                );
                return Err(Error::new(Reason::Unsupported, text));
            }
        };
        let mut target = Target::of(to);
        for option in options.split(',').filter(|option| !option.is_empty()) {
            let (key, value) = option.split_once('=').unwrap_or((option, "true"));
            target.set(key.trim(), value.trim())?;
        }
        Ok(target)
    }

    /// Sets what is free.
    ///
    /// # Errors
    /// No such option, or no such value.
    pub fn set(&mut self, key: &str, value: &str) -> Result<(), Error> {
        let wrong = || {
            Error::new(
                Reason::Parameter,
                format!("option {key}={value} is not known"),
            )
        };
        match key {
            "bits" => self.bits = Some(value.parse().map_err(|_| wrong())?),
            "group" | "group_size" => self.group = Some(value.parse().map_err(|_| wrong())?),
            "symmetric" | "sym" => self.symmetric = Some(value.parse().map_err(|_| wrong())?),
            "block" => {
                let (rows, columns) = value.split_once('x').ok_or_else(wrong)?;
                let size =
                    |text: &str| text.parse().ok().filter(|n: &u64| *n > 0).ok_or_else(wrong);
                self.block = Some([size(rows)?, size(columns)?]);
            }
            "scale" => {
                let all = [Dtype::F32, Dtype::F16, Dtype::BF16, Dtype::F8_E8M0];
                let found = all
                    .into_iter()
                    .find(|d| d.name().eq_ignore_ascii_case(value));
                self.scale = Some(found.ok_or_else(wrong)?);
            }
            "element" => {
                self.element = Some(match value {
                    "e4m3" => Number::E4m3,
                    "e5m2" => Number::E5m2,
                    "e4m3fnuz" => Number::E4m3Fnuz,
                    "e5m2fnuz" => Number::E5m2Fnuz,
                    _ => return Err(wrong()),
                });
            }
            "zero_wrap" if ["field", "word32"].contains(&value) => {
                self.zero_wrap = Some(value.to_owned());
            }
            _ => return Err(wrong()),
        }
        Ok(())
    }

    /// Its name.
    pub fn name(&self) -> &'static str {
        match self.to {
            To::Form(form) => form.name,
            To::Ggml(ty) => ty.name(),
        }
    }
}
