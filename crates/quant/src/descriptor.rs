//! What a quantised tensor's values are: codes, scales, zero points, and the rule that joins them.
//!
//! A [`Descriptor`] is a scheme's normative meaning for one tensor: every scheme of the table expands to one
//! (`crate::schemes`), the interpreter runs it (`crate::interpret`), and fast paths are proven equal to it. It holds
//! no bytes: parts are named by their [`Role`].

use serde::{Deserialize, Serialize};

use crate::layout::Layout;

/// What a part of a quantised tensor is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum Role {
    /// The packed codes.
    Codes,
    /// The scale of each group.
    Scale,
    /// The scale of the scales, or of the whole tensor.
    GlobalScale,
    /// Zero points, or biases in the domain of values.
    Zero,
    /// The group of each column (`g_idx`).
    GroupIndex,
    /// The logical shape, as a tensor.
    Shape,
    /// The values that codes stand for.
    Table,
    /// Of a nested scale: the scale of its groups.
    NestedScale,
    /// Of a nested scale: the values that its codes stand for.
    NestedTable,
    /// What else the library keeps of the tensor: read by the recogniser, not by the interpreter.
    State,
    /// The scale of activations: kept, of no meaning for the weight.
    InputScale,
    /// Which elements are there, one bit each.
    Bitmask,
    /// Where each row begins among the elements that are there.
    RowOffsets,
    /// Something that is carried along.
    Other,
}

impl Role {
    /// Its name: `group_index`.
    pub fn name(self) -> &'static str {
        match self {
            Role::Codes => "codes",
            Role::Scale => "scale",
            Role::GlobalScale => "global_scale",
            Role::Zero => "zero",
            Role::GroupIndex => "group_index",
            Role::Shape => "shape",
            Role::Table => "table",
            Role::NestedScale => "nested_scale",
            Role::NestedTable => "nested_table",
            Role::State => "state",
            Role::InputScale => "input_scale",
            Role::Bitmask => "bitmask",
            Role::RowOffsets => "row_offsets",
            Role::Other => "other",
        }
    }
}

/// How the bits of a scale, a zero point or a table become a number.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[non_exhaustive]
pub enum Number {
    /// IEEE single precision.
    F32,
    /// IEEE half precision.
    F16,
    /// bfloat16.
    Bf16,
    /// OCP E8M0: a power of two; 255 is NaN.
    E8m0,
    /// OCP E4M3, finite.
    E4m3,
    /// E4M3 with one zero and no infinity.
    E4m3Fnuz,
    /// OCP E5M2.
    E5m2,
    /// E5M2 with one zero and no infinity.
    E5m2Fnuz,
    /// OCP E2M3.
    E2m3,
    /// OCP E3M2.
    E3m2,
    /// OCP E2M1.
    E2m1,
    /// An unsigned integer of the layout's bits, less an offset.
    Unsigned {
        /// What is taken off.
        offset: i64,
    },
    /// A two's-complement integer of the layout's bits.
    Signed,
}

/// A number for each block of the tensor, read from a part.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Field {
    /// The part.
    pub role: Role,
    /// How its bits are read.
    pub number: Number,
    /// Elements of a block on each axis of the descriptor's shape; 0 is the whole axis.
    pub block: Vec<u64>,
    /// Where the first element lies in its block, on each axis: not 0 for a shard that begins within one.
    pub phase: Vec<u64>,
    /// Where the bits are, by block.
    pub layout: Layout,
    /// Added to the code before it is read, in the way that a library wraps.
    pub bias: Bias,
}

/// What is added to a code on disk.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Bias {
    /// Nothing.
    #[default]
    None,
    /// One, within the bits of the code: what GPTQ's v1 means where a code is not the lowest.
    Field,
    /// One to each code of a 32-bit word, as one addition to the word: carries run into the neighbours, as GPTQModel's own.
    Word,
    /// One, with nothing to wrap it: the code may be one more than its bits hold.
    Open,
}

/// What a field's number is multiplied by, or looked up in, before it is used.
#[derive(Clone, Debug, PartialEq)]
pub struct Scale {
    /// The number.
    pub field: Field,
    /// A table of F32 in which the field's code is looked up.
    pub table: Option<Role>,
    /// Another field whose number multiplies it.
    pub times: Option<Field>,
    /// Added last: a number of the tensor itself.
    pub plus: f32,
    /// Whether values are multiplied or divided by it.
    pub op: Op,
}

/// How a scale applies.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Op {
    /// Values are multiplied by it.
    Multiply,
    /// Values are divided by it.
    Divide,
}

/// What an element's code stands for.
#[derive(Clone, Debug, PartialEq)]
pub enum Element {
    /// A number by itself.
    Number(Number),
    /// An entry of a table of the format.
    Known(&'static [f32]),
    /// An entry of a table of F32 that is a part.
    Table(Role),
}

/// What is taken off a code.
#[derive(Clone, Debug, PartialEq)]
pub enum Zero {
    /// The same for all.
    Constant(f32),
    /// A number for each block.
    Field(Field),
}

/// How code, zero and scale are joined; `rnd` rounds to the tensor's dtype, to nearest.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Rule {
    /// `rnd((q − z) · s)`, in single precision; several scales are joined first, in their order.
    Product,
    /// `rnd(rnd(q − z) · s)`: HQQ.
    RoundedDifference,
    /// `rnd(rnd(q · s) + z)`: MLX's affine mode, with biases.
    ProductThenAdd,
    /// `rnd(rnd(q · s) − z)`: quanto.
    ProductThenSubtract,
    /// `rnd((q − rint(−z / s)) · s)`: AWQ's fast form stores `−s · z`, rounded, from which the integer comes back.
    RecoveredZero,
    /// `rnd(q · s · factor)`, the product with the factor taken last.
    ProductTimes(f32),
}

/// The dtype that a scheme's values have.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum Float {
    /// IEEE single precision.
    F32,
    /// IEEE half precision.
    F16,
    /// bfloat16.
    #[serde(rename = "BF16")]
    Bf16,
}

/// The meaning of one tensor.
#[derive(Clone, Debug, PartialEq)]
pub struct Descriptor {
    /// The shape in which codes, scales and zeros are laid out.
    pub shape: Vec<u64>,
    /// The tensor's own shape; of as many elements, in the same order.
    pub view: Vec<u64>,
    /// What a code stands for.
    pub element: Element,
    /// The part and the layout of the codes.
    pub codes: (Role, Layout),
    /// Scales, joined in this order.
    pub scales: Vec<Scale>,
    /// What is taken off.
    pub zero: Option<Zero>,
    /// The part that says the group of each coordinate of the last axis; without it, groups follow each other.
    pub group_index: Option<Role>,
    /// How they are joined.
    pub rule: Rule,
    /// The dtype of the values, to which the rule rounds.
    pub dtype: Float,
}
