//! Metadata values on their own, for files to be written.

use super::error::{Error, Reason};
use super::value::{ByteOrder, Value, ValueType};

/// A metadata value that is to be written.
#[derive(Clone, Debug, PartialEq)]
#[allow(missing_docs, reason = "the names are the format's")]
pub enum OwnedValue {
    U8(u8),
    I8(i8),
    U16(u16),
    I16(i16),
    U32(u32),
    I32(i32),
    F32(f32),
    Bool(bool),
    /// Bytes of UTF-8; whatever a file had is written back.
    String(Vec<u8>),
    /// Values of one type.
    Array(ValueType, Vec<OwnedValue>),
    U64(u64),
    I64(i64),
    F64(f64),
}

impl From<Value<'_>> for OwnedValue {
    fn from(value: Value<'_>) -> Self {
        match value {
            Value::U8(v) => OwnedValue::U8(v),
            Value::I8(v) => OwnedValue::I8(v),
            Value::U16(v) => OwnedValue::U16(v),
            Value::I16(v) => OwnedValue::I16(v),
            Value::U32(v) => OwnedValue::U32(v),
            Value::I32(v) => OwnedValue::I32(v),
            Value::F32(v) => OwnedValue::F32(v),
            Value::Bool(v) => OwnedValue::Bool(v),
            Value::String(text) => OwnedValue::String(text.0.to_vec()),
            Value::Array(array) => {
                OwnedValue::Array(array.ty(), array.iter().map(OwnedValue::from).collect())
            }
            Value::U64(v) => OwnedValue::U64(v),
            Value::I64(v) => OwnedValue::I64(v),
            Value::F64(v) => OwnedValue::F64(v),
        }
    }
}

impl OwnedValue {
    /// Its type.
    pub fn ty(&self) -> ValueType {
        match self {
            OwnedValue::U8(_) => ValueType::U8,
            OwnedValue::I8(_) => ValueType::I8,
            OwnedValue::U16(_) => ValueType::U16,
            OwnedValue::I16(_) => ValueType::I16,
            OwnedValue::U32(_) => ValueType::U32,
            OwnedValue::I32(_) => ValueType::I32,
            OwnedValue::F32(_) => ValueType::F32,
            OwnedValue::Bool(_) => ValueType::Bool,
            OwnedValue::String(_) => ValueType::String,
            OwnedValue::Array(..) => ValueType::Array,
            OwnedValue::U64(_) => ValueType::U64,
            OwnedValue::I64(_) => ValueType::I64,
            OwnedValue::F64(_) => ValueType::F64,
        }
    }

    /// Appends it as a file has it, without its type.
    pub(crate) fn write(&self, out: &mut Out) -> Result<(), Error> {
        match self {
            OwnedValue::U8(v) => out.bytes.push(*v),
            OwnedValue::I8(v) => out.put(v.to_le_bytes()),
            OwnedValue::U16(v) => out.put(v.to_le_bytes()),
            OwnedValue::I16(v) => out.put(v.to_le_bytes()),
            OwnedValue::U32(v) => out.put(v.to_le_bytes()),
            OwnedValue::I32(v) => out.put(v.to_le_bytes()),
            OwnedValue::F32(v) => out.put(v.to_le_bytes()),
            OwnedValue::U64(v) => out.put(v.to_le_bytes()),
            OwnedValue::I64(v) => out.put(v.to_le_bytes()),
            OwnedValue::F64(v) => out.put(v.to_le_bytes()),
            OwnedValue::Bool(v) => out.bytes.push((*v).into()),
            OwnedValue::String(text) => out.text(text),
            OwnedValue::Array(ty, values) => {
                out.put((*ty as u32).to_le_bytes());
                out.put((values.len() as u64).to_le_bytes());
                for value in values {
                    if value.ty() != *ty {
                        let wrong = Error::new(Reason::WriteValue);
                        let found = format!("{:?} in an array of {ty:?}", value.ty());
                        return Err(wrong.found(found).needed("values of one type"));
                    }
                    value.write(out)?;
                }
            }
        }
        Ok(())
    }
}

/// Bytes of a header that is being written.
#[derive(Debug, Default)]
pub(crate) struct Out {
    pub bytes: Vec<u8>,
    pub order: ByteOrder,
}

impl Out {
    /// A number, given with its least significant byte first.
    pub fn put<const N: usize>(&mut self, mut number: [u8; N]) {
        if self.order == ByteOrder::Big {
            number.reverse();
        }
        self.bytes.extend_from_slice(&number);
    }

    /// A string: its length and its bytes.
    pub fn text(&mut self, text: &[u8]) {
        self.put((text.len() as u64).to_le_bytes());
        self.bytes.extend_from_slice(text);
    }
}
