//! The dtype table (spec chapter 5): one row a dtype, and every other room asks this table.
//!
//! A row says how many bits an element takes and what the dtype is called elsewhere: in the DLPack
//! protocol, in PyTorch, in NumPy and in the `ml_dtypes` package. To add a dtype, add one row here
//! and one row to the spec's table; a test holds the two equal.

use core::fmt;
use core::str::FromStr;

use crate::error::{Error, Reason};

/// What kind of number an element is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Kind {
    /// One byte, 0 or 1 by convention; other bytes are valid data (spec 5.5).
    Bool,
    /// Two's-complement integer.
    Int,
    /// Unsigned integer.
    UInt,
    /// Floating point, including the one-sign-less exponent type `F8_E8M0`.
    Float,
    /// A pair of floats, real part first.
    Complex,
}

/// One row of the table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DtypeRow {
    /// The dtype that this row describes.
    pub dtype: Dtype,
    /// Its name in a header.
    pub name: &'static str,
    /// Bits an element takes.
    pub bits: u32,
    /// What kind of number it is.
    pub kind: Kind,
    /// DLPack's `(code, bits, lanes)`, for the dtypes that DLPack 1.1 can name.
    pub dlpack: Option<(u8, u8, u16)>,
    /// Attribute of the `torch` module. `F4` names a type that packs two elements a byte.
    pub torch: Option<&'static str>,
    /// NumPy's own name, for the dtypes NumPy has without a helper package.
    pub numpy: Option<&'static str>,
    /// Attribute of the `ml_dtypes` package, for the dtypes that NumPy lacks.
    pub ml_dtypes: Option<&'static str>,
}

macro_rules! dtypes {
    ($($(#[$doc:meta])* $id:ident: $bits:literal $kind:ident $dl:expr, $torch:expr, $np:expr, $ml:expr;)*) => {
        /// The type of a tensor's elements.
        ///
        /// The order of the variants is the order that decides where the canonical writer puts a
        /// tensor (spec 9.6: descending), so it may never change; new dtypes are placed with care.
        #[allow(non_camel_case_types)]
        #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
        #[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
        #[non_exhaustive]
        pub enum Dtype { $($(#[$doc])* $id,)* }

        static TABLE: &[DtypeRow] = &[$(DtypeRow {
            dtype: Dtype::$id, name: stringify!($id), bits: $bits, kind: Kind::$kind,
            dlpack: $dl, torch: $torch, numpy: $np, ml_dtypes: $ml,
        },)*];

        impl Dtype {
            /// Every dtype, in the order of the enum.
            pub const ALL: &'static [Dtype] = &[$(Dtype::$id,)*];
        }
    };
}

// DLPack type codes (dlpack.h, version 1.1).
const INT: u8 = 0;
const UINT: u8 = 1;
const FLOAT: u8 = 2;
const BFLOAT: u8 = 4;
const COMPLEX: u8 = 5;
const BOOL: u8 = 6;
const F8_E4M3FN: u8 = 10;
const F8_E4M3FNUZ: u8 = 11;
const F8_E5M2: u8 = 12;
const F8_E5M2FNUZ: u8 = 13;
const F8_E8M0FNU: u8 = 14;
const F6_E2M3FN: u8 = 15;
const F6_E3M2FN: u8 = 16;
const F4_E2M1FN: u8 = 17;

dtypes! {
    /// Boolean, one byte.
    BOOL: 8 Bool Some((BOOL, 8, 1)), Some("bool"), Some("bool"), None;
    /// 4-bit float, OCP MX E2M1, two elements a byte.
    F4: 4 Float Some((F4_E2M1FN, 4, 1)), Some("float4_e2m1fn_x2"), None, Some("float4_e2m1fn");
    /// 6-bit float, OCP MX E2M3, four elements in three bytes.
    F6_E2M3: 6 Float Some((F6_E2M3FN, 6, 1)), None, None, Some("float6_e2m3fn");
    /// 6-bit float, OCP MX E3M2, four elements in three bytes.
    F6_E3M2: 6 Float Some((F6_E3M2FN, 6, 1)), None, None, Some("float6_e3m2fn");
    /// Unsigned 8-bit integer.
    U8: 8 UInt Some((UINT, 8, 1)), Some("uint8"), Some("uint8"), None;
    /// Signed 8-bit integer.
    I8: 8 Int Some((INT, 8, 1)), Some("int8"), Some("int8"), None;
    /// 8-bit float E5M2 with infinities.
    F8_E5M2: 8 Float Some((F8_E5M2, 8, 1)), Some("float8_e5m2"), None, Some("float8_e5m2");
    /// 8-bit float E4M3, finite with one NaN pattern a sign ("fn").
    F8_E4M3: 8 Float Some((F8_E4M3FN, 8, 1)), Some("float8_e4m3fn"), None, Some("float8_e4m3fn");
    /// 8-bit exponent without sign or mantissa: the MX block scale.
    F8_E8M0: 8 Float Some((F8_E8M0FNU, 8, 1)), Some("float8_e8m0fnu"), None, Some("float8_e8m0fnu");
    /// 8-bit float E4M3, finite, no negative zero ("fnuz").
    F8_E4M3FNUZ: 8 Float Some((F8_E4M3FNUZ, 8, 1)), Some("float8_e4m3fnuz"), None, Some("float8_e4m3fnuz");
    /// 8-bit float E5M2, finite, no negative zero ("fnuz").
    F8_E5M2FNUZ: 8 Float Some((F8_E5M2FNUZ, 8, 1)), Some("float8_e5m2fnuz"), None, Some("float8_e5m2fnuz");
    /// Signed 16-bit integer.
    I16: 16 Int Some((INT, 16, 1)), Some("int16"), Some("int16"), None;
    /// Unsigned 16-bit integer.
    U16: 16 UInt Some((UINT, 16, 1)), Some("uint16"), Some("uint16"), None;
    /// IEEE 754 half precision.
    F16: 16 Float Some((FLOAT, 16, 1)), Some("float16"), Some("float16"), None;
    /// bfloat16: the upper half of an F32.
    BF16: 16 Float Some((BFLOAT, 16, 1)), Some("bfloat16"), None, Some("bfloat16");
    /// Signed 32-bit integer.
    I32: 32 Int Some((INT, 32, 1)), Some("int32"), Some("int32"), None;
    /// Unsigned 32-bit integer.
    U32: 32 UInt Some((UINT, 32, 1)), Some("uint32"), Some("uint32"), None;
    /// IEEE 754 single precision.
    F32: 32 Float Some((FLOAT, 32, 1)), Some("float32"), Some("float32"), None;
    /// Complex of two F32, real part first.
    C64: 64 Complex Some((COMPLEX, 64, 1)), Some("complex64"), Some("complex64"), None;
    /// IEEE 754 double precision.
    F64: 64 Float Some((FLOAT, 64, 1)), Some("float64"), Some("float64"), None;
    /// Signed 64-bit integer.
    I64: 64 Int Some((INT, 64, 1)), Some("int64"), Some("int64"), None;
    /// Unsigned 64-bit integer.
    U64: 64 UInt Some((UINT, 64, 1)), Some("uint64"), Some("uint64"), None;
}

impl Dtype {
    /// This dtype's row of the table.
    pub fn row(self) -> &'static DtypeRow {
        // The macro writes enum and table from one list, so the discriminant is the position.
        &TABLE[self as usize]
    }

    /// The name in a header, such as `"BF16"`.
    pub fn name(self) -> &'static str {
        self.row().name
    }

    /// Bits an element takes: 4 or 6 for the sub-byte floats, else a multiple of 8.
    pub fn bitsize(&self) -> usize {
        self.row().bits as usize
    }

    /// Bytes an element takes, rounded down (0 for `F4`).
    #[deprecated(since = "0.1.0", note = "wrong for sub-byte dtypes: use `bitsize`")]
    pub fn size(&self) -> usize {
        self.bitsize() / 8
    }

    /// Bytes that the elements of a dtype's unit of byte order take: what a big-endian host must
    /// swap. `C64` is two 4-byte units; sub-byte and one-byte dtypes have nothing to swap.
    pub fn swap_unit(self) -> usize {
        match self {
            Dtype::C64 => 4,
            other => (other.bitsize() / 8).max(1),
        }
    }

    /// The dtype of a header name; names are case-sensitive (spec 5.1).
    pub fn from_name(name: &str) -> Option<Dtype> {
        Dtype::from_bytes(name.as_bytes())
    }

    #[inline]
    pub(crate) fn from_bytes(name: &[u8]) -> Option<Dtype> {
        // A match on bytes compiles to length and word compares; this is on the scanner's path.
        Some(match name {
            b"F32" => Dtype::F32,
            b"BF16" => Dtype::BF16,
            b"F16" => Dtype::F16,
            other => TABLE.iter().find(|row| row.name.as_bytes() == other)?.dtype,
        })
    }

    /// Bits that a tensor of this dtype and shape takes, or `None` where the product of the
    /// non-zero extents overflows (spec 6.2: a zero elsewhere does not excuse an overflow).
    pub fn bits_of(self, shape: &[u64]) -> Option<u64> {
        let mut bits = self.row().bits as u64;
        let mut empty = false;
        for &extent in shape {
            if extent == 0 {
                empty = true;
            } else {
                bits = bits.checked_mul(extent)?;
            }
        }
        Some(if empty { 0 } else { bits })
    }

    /// Bytes that a tensor of this dtype and shape takes.
    ///
    /// # Errors
    /// [`Reason::SizeOverflow`] and, where the bits don't fill whole bytes, [`Reason::PartialByte`].
    pub fn bytes_of(self, shape: &[u64]) -> Result<u64, Error> {
        let bits = self.bits_of(shape).ok_or_else(|| {
            Error::new(Reason::SizeOverflow)
                .found(format_args!("shape {shape:?} of {self}"))
                .needed("a size below 2^64 bits")
        })?;
        if bits % 8 != 0 {
            return Err(Error::new(Reason::PartialByte)
                .found(format_args!("{bits} bits for shape {shape:?} of {self}"))
                .needed("a whole number of bytes"));
        }
        Ok(bits / 8)
    }
}

impl fmt::Display for Dtype {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

impl FromStr for Dtype {
    type Err = Error;

    fn from_str(name: &str) -> Result<Self, Error> {
        Dtype::from_name(name).ok_or_else(|| Error::unsupported_dtype(name))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use alloc::string::ToString;

    #[test]
    fn the_table_stands_in_the_order_of_the_enum() {
        for (i, &dtype) in Dtype::ALL.iter().enumerate() {
            assert_eq!(dtype as usize, i);
            assert_eq!(dtype.row().dtype, dtype);
            assert_eq!(Dtype::from_name(dtype.name()), Some(dtype));
            assert_eq!(dtype.to_string(), dtype.name());
            assert_eq!(dtype.name().parse::<Dtype>().unwrap(), dtype);
            assert!(dtype.row().numpy.is_some() ^ dtype.row().ml_dtypes.is_some());
        }
        assert_eq!(Dtype::ALL.len(), 22);
    }

    #[test]
    fn an_unknown_or_lower_case_name_is_refused() {
        assert_eq!(Dtype::from_name("f32"), None);
        let error = "F128".parse::<Dtype>().unwrap_err();
        assert_eq!(error.reason(), Reason::UnsupportedDtype);
        assert!(error.to_string().contains("F128"));
    }

    #[test]
    fn sizes_are_checked() {
        assert_eq!(Dtype::F32.bytes_of(&[2, 3]).unwrap(), 24);
        assert_eq!(Dtype::F32.bytes_of(&[]).unwrap(), 4);
        assert_eq!(Dtype::F4.bytes_of(&[2, 3]).unwrap(), 3);
        assert_eq!(Dtype::F6_E2M3.bytes_of(&[4]).unwrap(), 3);
        assert_eq!(Dtype::U8.bytes_of(&[0, 5]).unwrap(), 0);
        let partial = Dtype::F4.bytes_of(&[3]).unwrap_err();
        assert_eq!(partial.reason(), Reason::PartialByte);
        for shape in [[1 << 63, 4, 0], [0, 1 << 63, 4]] {
            assert_eq!(
                Dtype::U8.bytes_of(&shape).unwrap_err().reason(),
                Reason::SizeOverflow
            );
        }
    }

    #[test]
    fn swap_units_follow_the_scalar_parts() {
        assert_eq!(Dtype::C64.swap_unit(), 4);
        assert_eq!(Dtype::F4.swap_unit(), 1);
        assert_eq!(Dtype::F64.swap_unit(), 8);
        #[allow(deprecated)]
        let sizes = (Dtype::F4.size(), Dtype::BF16.size());
        assert_eq!(sizes, (0, 2));
        assert_eq!(Dtype::BOOL.row().kind, Kind::Bool);
    }
}
