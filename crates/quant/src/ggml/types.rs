//! The table of ggml's tensor types, as GGUF files number them (`enum ggml_type` of ggml's `ggml.h`).

use std::fmt;

use super::GgmlError;

/// One row a type: number, name, elements a block, bytes a block.
macro_rules! types {
    ($($(#[$doc:meta])* $name:ident = $id:literal, $elements:literal, $bytes:literal;)*) => {
        /// A tensor type of ggml. Its [`name`](GgmlType::name) is ggml's.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
        #[allow(non_camel_case_types)]
        #[non_exhaustive]
        pub enum GgmlType {
            $($(#[$doc])* $name,)*
        }

        impl GgmlType {
            /// All types, in the order of their numbers.
            pub const ALL: &[GgmlType] = &[$(GgmlType::$name,)*];

            /// The type of a number in a GGUF file.
            ///
            /// # Errors
            ///
            /// [`GgmlError::UnknownId`] for numbers that ggml has not given out, or has taken back (4, 5, 31 to 33,
            /// 36 to 38).
            pub const fn from_id(id: u32) -> Result<GgmlType, GgmlError> {
                match id {
                    $($id => Ok(GgmlType::$name),)*
                    _ => Err(GgmlError::UnknownId { id }),
                }
            }

            /// The type's number in a GGUF file.
            pub const fn id(self) -> u32 {
                match self {
                    $(GgmlType::$name => $id,)*
                }
            }

            /// The type's name: `Q4_K`.
            pub const fn name(self) -> &'static str {
                match self {
                    $(GgmlType::$name => stringify!($name),)*
                }
            }

            /// The elements of a block; 1 for plain numbers.
            pub const fn elements(self) -> usize {
                match self {
                    $(GgmlType::$name => $elements,)*
                }
            }

            /// The bytes of a block.
            pub const fn bytes(self) -> usize {
                match self {
                    $(GgmlType::$name => $bytes,)*
                }
            }
        }
    };
}

types! {
    /// Plain binary32.
    F32 = 0, 1, 4;
    /// Plain binary16.
    F16 = 1, 1, 2;
    /// 4 bits, symmetric, 32 with one scale.
    Q4_0 = 2, 32, 18;
    /// 4 bits, 32 with a scale and a minimum.
    Q4_1 = 3, 32, 20;
    /// 5 bits, symmetric, 32 with one scale.
    Q5_0 = 6, 32, 22;
    /// 5 bits, 32 with a scale and a minimum.
    Q5_1 = 7, 32, 24;
    /// 8 bits, symmetric, 32 with one scale.
    Q8_0 = 8, 32, 34;
    /// 8 bits with a sum: activations at run time, in no file.
    Q8_1 = 9, 32, 36;
    /// 2 bits, 16 with a 4-bit scale and minimum.
    Q2_K = 10, 256, 84;
    /// 3 bits, symmetric, 16 with a 6-bit scale.
    Q3_K = 11, 256, 110;
    /// 4 bits, 32 with a 6-bit scale and minimum.
    Q4_K = 12, 256, 144;
    /// 5 bits, 32 with a 6-bit scale and minimum.
    Q5_K = 13, 256, 176;
    /// 6 bits, symmetric, 16 with an 8-bit scale.
    Q6_K = 14, 256, 210;
    /// 8 bits with sums: activations at run time, in no file.
    Q8_K = 15, 256, 292;
    /// 2.06 bits: a grid of 256 points in 8 dimensions, signs apart.
    IQ2_XXS = 16, 256, 66;
    /// 2.31 bits: a grid of 512 points in 8 dimensions, signs apart.
    IQ2_XS = 17, 256, 74;
    /// 3.06 bits: a grid of 256 points in 4 dimensions, signs apart.
    IQ3_XXS = 18, 256, 98;
    /// 1.56 bits: a grid of 2048 ternary points in 8 dimensions.
    IQ1_S = 19, 256, 50;
    /// 4 bits through a table of 16 uneven values, 32 with one scale.
    IQ4_NL = 20, 32, 18;
    /// 3.44 bits: a grid of 512 points in 4 dimensions, signs apart.
    IQ3_S = 21, 256, 110;
    /// 2.56 bits: a grid of 1024 points in 8 dimensions, signs apart.
    IQ2_S = 22, 256, 82;
    /// 4 bits through the table of `IQ4_NL`, 32 with a 6-bit scale.
    IQ4_XS = 23, 256, 136;
    /// Plain 8-bit integers.
    I8 = 24, 1, 1;
    /// Plain 16-bit integers.
    I16 = 25, 1, 2;
    /// Plain 32-bit integers.
    I32 = 26, 1, 4;
    /// Plain 64-bit integers.
    I64 = 27, 1, 8;
    /// Plain binary64.
    F64 = 28, 1, 8;
    /// 1.75 bits: the grid of `IQ1_S`, 16 with a 3-bit scale.
    IQ1_M = 29, 256, 56;
    /// Plain bfloat16.
    BF16 = 30, 1, 2;
    /// Ternary, five to a byte.
    TQ1_0 = 34, 256, 54;
    /// Ternary, four to a byte.
    TQ2_0 = 35, 256, 66;
    /// e2m1, 32 with a power of two (OCP MX).
    MXFP4 = 39, 32, 17;
    /// e2m1, 16 with an unsigned e4m3; the tensor's own scale is a tensor beside it, `<name>.scale`.
    NVFP4 = 40, 64, 36;
    /// Signs, 128 with one scale.
    Q1_0 = 41, 128, 18;
    /// 2 bits from -1 to 2, 64 with one scale.
    Q2_0 = 42, 64, 18;
}

impl GgmlType {
    /// The type of a name, in any case: `Q4_K` or `q4_k`.
    pub fn from_name(name: &str) -> Option<GgmlType> {
        let same = |ty: &&GgmlType| ty.name().eq_ignore_ascii_case(name);
        GgmlType::ALL.iter().find(same).copied()
    }

    /// Whether an element is a number of its own, with no block around it.
    pub const fn is_plain(self) -> bool {
        self.elements() == 1
    }

    /// Whether ggml keeps this type for activations, and no file holds it.
    pub const fn is_runtime_only(self) -> bool {
        matches!(self, GgmlType::Q8_1 | GgmlType::Q8_K)
    }

    /// The bytes of a row of `elements`.
    ///
    /// # Errors
    ///
    /// [`GgmlError::Elements`] when they are no whole number of blocks, or their bytes are more than `u64` counts.
    pub fn row_bytes(self, elements: u64) -> Result<u64, GgmlError> {
        let block = self.elements() as u64;
        (elements / block)
            .checked_mul(self.bytes() as u64)
            .filter(|_| elements.is_multiple_of(block))
            .ok_or(GgmlError::Elements { ty: self, elements })
    }
}

impl fmt::Display for GgmlType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_and_names_lead_back_to_the_type() {
        for &ty in GgmlType::ALL {
            assert_eq!(GgmlType::from_id(ty.id()), Ok(ty));
            assert_eq!(GgmlType::from_name(&ty.name().to_lowercase()), Some(ty));
        }
        assert!(GgmlType::ALL.is_sorted_by_key(|ty| ty.id()));
        for id in [4, 5, 31, 32, 33, 36, 37, 38, 43, 1 << 16, u32::MAX] {
            assert_eq!(GgmlType::from_id(id), Err(GgmlError::UnknownId { id }));
        }
        assert_eq!(GgmlType::from_name("Q4_K_M"), None);
    }

    #[test]
    fn rows_are_whole_blocks_and_counted_without_overflow() {
        assert_eq!(GgmlType::Q4_K.row_bytes(512), Ok(288));
        assert_eq!(GgmlType::F64.row_bytes(3), Ok(24));
        assert!(GgmlType::Q4_K.row_bytes(640).is_err());
        assert!(GgmlType::F64.row_bytes(u64::MAX / 4).is_err());
    }
}
