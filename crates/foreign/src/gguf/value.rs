//! Metadata values, where they lie in the header: nothing is copied until it is asked for.

use std::str;

/// The order of the bytes of a number.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum ByteOrder {
    /// The least significant byte first: almost every file.
    #[default]
    Little,
    /// The most significant byte first.
    Big,
}

/// The type of a metadata value.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u32)]
#[allow(missing_docs, reason = "the names are the format's")]
pub enum ValueType {
    U8 = 0,
    I8 = 1,
    U16 = 2,
    I16 = 3,
    U32 = 4,
    I32 = 5,
    F32 = 6,
    Bool = 7,
    String = 8,
    Array = 9,
    U64 = 10,
    I64 = 11,
    F64 = 12,
}

impl ValueType {
    /// Every type, in the order of their numbers.
    pub const ALL: [ValueType; 13] = [
        ValueType::U8,
        ValueType::I8,
        ValueType::U16,
        ValueType::I16,
        ValueType::U32,
        ValueType::I32,
        ValueType::F32,
        ValueType::Bool,
        ValueType::String,
        ValueType::Array,
        ValueType::U64,
        ValueType::I64,
        ValueType::F64,
    ];

    /// The type of a number in a file.
    pub fn from_id(id: u32) -> Option<Self> {
        Self::ALL.get(usize::try_from(id).ok()?).copied()
    }

    /// Bytes of a value, where they are always the same.
    pub fn size(self) -> Option<u64> {
        match self {
            ValueType::U8 | ValueType::I8 | ValueType::Bool => Some(1),
            ValueType::U16 | ValueType::I16 => Some(2),
            ValueType::U32 | ValueType::I32 | ValueType::F32 => Some(4),
            ValueType::U64 | ValueType::I64 | ValueType::F64 => Some(8),
            ValueType::String | ValueType::Array => None,
        }
    }

    /// Bytes that a value takes at least.
    pub(crate) fn least(self) -> u64 {
        match self {
            // A length; a type and a length.
            ValueType::String => 8,
            ValueType::Array => 12,
            other => other.size().unwrap_or(1),
        }
    }
}

/// A metadata value.
#[derive(Clone, Copy, Debug, PartialEq)]
#[allow(missing_docs, reason = "the names are the format's")]
pub enum Value<'a> {
    U8(u8),
    I8(i8),
    U16(u16),
    I16(i16),
    U32(u32),
    I32(i32),
    F32(f32),
    Bool(bool),
    String(Text<'a>),
    Array(Array<'a>),
    U64(u64),
    I64(i64),
    F64(f64),
}

/// A string of a file. The format says UTF-8; tokens of some files are other bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Text<'a>(pub &'a [u8]);

impl<'a> Text<'a> {
    /// The text, if it is UTF-8.
    pub fn as_str(self) -> Option<&'a str> {
        str::from_utf8(self.0).ok()
    }
}

/// Values of one type in a row.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Array<'a> {
    pub(crate) ty: ValueType,
    pub(crate) len: u64,
    pub(crate) bytes: &'a [u8],
    pub(crate) order: ByteOrder,
}

impl<'a> Array<'a> {
    /// The type of its values.
    pub fn ty(&self) -> ValueType {
        self.ty
    }

    /// How many there are.
    pub fn len(&self) -> u64 {
        self.len
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The values as they lie in the file.
    pub fn bytes(&self) -> &'a [u8] {
        self.bytes
    }

    /// The values in their order.
    pub fn iter(&self) -> Values<'a> {
        Values {
            ty: self.ty,
            left: self.len,
            rest: self.bytes,
            order: self.order,
        }
    }
}

/// The values of an [`Array`], one after the other.
#[derive(Clone, Debug)]
pub struct Values<'a> {
    ty: ValueType,
    left: u64,
    rest: &'a [u8],
    order: ByteOrder,
}

impl<'a> Iterator for Values<'a> {
    type Item = Value<'a>;

    fn next(&mut self) -> Option<Value<'a>> {
        self.left = self.left.checked_sub(1)?;
        let (value, rest) = decode(self.ty, self.rest, self.order)?;
        self.rest = rest;
        Some(value)
    }
}

impl<'a> Value<'a> {
    /// Its type.
    pub fn ty(&self) -> ValueType {
        match self {
            Value::U8(_) => ValueType::U8,
            Value::I8(_) => ValueType::I8,
            Value::U16(_) => ValueType::U16,
            Value::I16(_) => ValueType::I16,
            Value::U32(_) => ValueType::U32,
            Value::I32(_) => ValueType::I32,
            Value::F32(_) => ValueType::F32,
            Value::Bool(_) => ValueType::Bool,
            Value::String(_) => ValueType::String,
            Value::Array(_) => ValueType::Array,
            Value::U64(_) => ValueType::U64,
            Value::I64(_) => ValueType::I64,
            Value::F64(_) => ValueType::F64,
        }
    }

    /// An integer of any width, if it is one and not negative.
    pub fn as_u64(&self) -> Option<u64> {
        match *self {
            Value::U8(v) => Some(v.into()),
            Value::U16(v) => Some(v.into()),
            Value::U32(v) => Some(v.into()),
            Value::U64(v) => Some(v),
            Value::I8(v) => v.try_into().ok(),
            Value::I16(v) => v.try_into().ok(),
            Value::I32(v) => v.try_into().ok(),
            Value::I64(v) => v.try_into().ok(),
            _ => None,
        }
    }

    /// The text, if it is a string in UTF-8.
    pub fn as_str(&self) -> Option<&'a str> {
        match self {
            Value::String(text) => text.as_str(),
            _ => None,
        }
    }

    /// Scalars and strings as text, for places that only take strings; `None` for arrays.
    pub fn to_text(&self) -> Option<String> {
        Some(match self {
            Value::U8(v) => v.to_string(),
            Value::I8(v) => v.to_string(),
            Value::U16(v) => v.to_string(),
            Value::I16(v) => v.to_string(),
            Value::U32(v) => v.to_string(),
            Value::I32(v) => v.to_string(),
            Value::F32(v) => v.to_string(),
            Value::Bool(v) => v.to_string(),
            Value::U64(v) => v.to_string(),
            Value::I64(v) => v.to_string(),
            Value::F64(v) => v.to_string(),
            Value::String(text) => String::from_utf8_lossy(text.0).into_owned(),
            Value::Array(_) => return None,
        })
    }
}

/// Numbers of a file in its byte order.
macro_rules! number {
    ($bytes:expr, $order:expr, $ty:ty) => {{
        let (first, rest) = $bytes.split_first_chunk()?;
        let value = match $order {
            ByteOrder::Little => <$ty>::from_le_bytes(*first),
            ByteOrder::Big => <$ty>::from_be_bytes(*first),
        };
        (value, rest)
    }};
}

/// The value at the start of `bytes`, and what follows it. `None` where bytes are missing or make no value;
/// the scan has seen to it that neither happens in a header that it accepted.
pub(crate) fn decode(ty: ValueType, bytes: &[u8], order: ByteOrder) -> Option<(Value<'_>, &[u8])> {
    macro_rules! plain {
        ($name:ident, $ty:ty) => {{
            let (value, rest) = number!(bytes, order, $ty);
            (Value::$name(value), rest)
        }};
    }
    Some(match ty {
        ValueType::U8 => plain!(U8, u8),
        ValueType::I8 => plain!(I8, i8),
        ValueType::U16 => plain!(U16, u16),
        ValueType::I16 => plain!(I16, i16),
        ValueType::U32 => plain!(U32, u32),
        ValueType::I32 => plain!(I32, i32),
        ValueType::F32 => plain!(F32, f32),
        ValueType::U64 => plain!(U64, u64),
        ValueType::I64 => plain!(I64, i64),
        ValueType::F64 => plain!(F64, f64),
        ValueType::Bool => {
            let (value, rest) = number!(bytes, order, u8);
            (Value::Bool(value != 0), rest)
        }
        ValueType::String => {
            let (len, rest) = number!(bytes, order, u64);
            let (text, rest) = rest.split_at_checked(usize::try_from(len).ok()?)?;
            (Value::String(Text(text)), rest)
        }
        ValueType::Array => {
            let (ty, rest) = number!(bytes, order, u32);
            let (len, rest) = number!(rest, order, u64);
            let ty = ValueType::from_id(ty)?;
            let taken = extent(ty, len, rest, order)?;
            let (bytes, rest) = rest.split_at_checked(taken)?;
            let array = Array {
                ty,
                len,
                bytes,
                order,
            };
            (Value::Array(array), rest)
        }
    })
}

/// Bytes that `len` values of a type take at the start of `bytes`.
fn extent(ty: ValueType, len: u64, bytes: &[u8], order: ByteOrder) -> Option<usize> {
    if let Some(size) = ty.size() {
        return usize::try_from(len.checked_mul(size)?).ok();
    }
    // Every one takes some bytes, so this ends; the scan has bounded how deep arrays nest.
    let mut rest = bytes;
    for _ in 0..len {
        rest = decode(ty, rest, order)?.1;
    }
    bytes.len().checked_sub(rest.len())
}
