//! DLPack: how memory of a device becomes a tensor of any framework, and a framework's memory comes here.
//!
//! A [`Tensor`] says what there is to show; [`Tensor::legacy`] and [`Tensor::versioned`] make the protocol's
//! structure of it, which keeps the memory until its consumer is done. An [`Owned`] is such a structure,
//! whoever made it: dropped, it tells its maker. [`Exchange`] is the table of C functions that a framework
//! offers since DLPack 1.2, e.g. to allocate with its own allocator. Capsules are Python's, and not here.
//!
//! Invariants:
//! 1. The structures are laid out as `dlpack.h` 1.3 lays them out.
//! 2. What we make is one `Held`, boxed and leaked: the protocol's structure, and all that its pointers lead
//!    to. `manager_ctx` points to the whole; the deleter makes a box of it again.
//! 3. An [`Owned`] has the only right to call its structure's deleter, and the structure is valid until then.
#![allow(unsafe_code)]

mod exchange;

use std::ffi::c_void;
use std::mem;
use std::ptr::{self, NonNull};

use crate::{Cause, Error, Kind, Memory};

pub use exchange::{Allocate, Exchange, ExchangeHeader, ExchangeTable, SetError};

/// The protocol's version, as what is made here says it.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Version {
    /// Others than ours are not understood.
    pub major: u32,
    /// Grows with what is added.
    pub minor: u32,
}

/// The one that knows the 8-bit and 4-bit floats.
const VERSION: Version = Version { major: 1, minor: 1 };

/// The bit of [`Versioned::flags`] for tensors that must not be written to.
pub const READ_ONLY: u64 = 1;

/// Where a tensor is: `DLDevice`.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RawDevice {
    /// `DLDeviceType`.
    pub kind: i32,
    /// Its number.
    pub index: i32,
}

/// An element's type: `DLDataType`.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RawDtype {
    /// `DLDataTypeCode`: 0 signed, 1 unsigned, 2 float, 4 bfloat, 5 complex, 6 bool, and one a small float.
    pub code: u8,
    /// Bits of one lane.
    pub bits: u8,
    /// Values of an element; 1 but for packed ones.
    pub lanes: u16,
}

/// Bytes, as every byte dtype is allocated.
pub const BYTES: RawDtype = RawDtype {
    code: 1,
    bits: 8,
    lanes: 1,
};

/// A tensor without an owner: `DLTensor`.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct RawTensor {
    /// An address on the device, or a handle.
    pub data: *mut c_void,
    /// Where.
    pub device: RawDevice,
    /// How many extents.
    pub ndim: i32,
    /// Of its elements.
    pub dtype: RawDtype,
    /// Its extents.
    pub shape: *mut i64,
    /// From one to the next along each, in elements; null for row-major order.
    pub strides: *mut i64,
    /// The first byte after `data`.
    pub byte_offset: u64,
}

/// A tensor with an owner, as it was before versions: `DLManagedTensor`.
#[repr(C)]
#[derive(Debug)]
pub struct Legacy {
    /// The tensor.
    pub tensor: RawTensor,
    /// Its maker's.
    pub manager_ctx: *mut c_void,
    /// Called once, by whoever is done with it.
    pub deleter: Option<unsafe extern "C" fn(*mut Legacy)>,
}

/// A tensor with an owner: `DLManagedTensorVersioned`.
#[repr(C)]
#[derive(Debug)]
pub struct Versioned {
    /// Of the structure.
    pub version: Version,
    /// Its maker's.
    pub manager_ctx: *mut c_void,
    /// Called once, by whoever is done with it.
    pub deleter: Option<unsafe extern "C" fn(*mut Versioned)>,
    /// E.g. [`READ_ONLY`].
    pub flags: u64,
    /// The tensor.
    pub tensor: RawTensor,
}

/// Either structure.
pub trait Managed: Sized + sealed::Sealed {
    /// The tensor in it.
    fn tensor(&self) -> &RawTensor;

    #[doc(hidden)]
    fn tensor_mut(&mut self) -> &mut RawTensor;

    #[doc(hidden)]
    fn deleter(&self) -> Option<unsafe extern "C" fn(*mut Self)>;
}

mod sealed {
    pub trait Sealed {}
    impl Sealed for super::Legacy {}
    impl Sealed for super::Versioned {}
}

impl Managed for Legacy {
    fn tensor(&self) -> &RawTensor {
        &self.tensor
    }

    fn tensor_mut(&mut self) -> &mut RawTensor {
        &mut self.tensor
    }

    fn deleter(&self) -> Option<unsafe extern "C" fn(*mut Self)> {
        self.deleter
    }
}

impl Managed for Versioned {
    fn tensor(&self) -> &RawTensor {
        &self.tensor
    }

    fn tensor_mut(&mut self) -> &mut RawTensor {
        &mut self.tensor
    }

    fn deleter(&self) -> Option<unsafe extern "C" fn(*mut Self)> {
        self.deleter
    }
}

/// A managed tensor that is ours to delete.
#[derive(Debug)]
pub struct Owned<T: Managed>(NonNull<T>);

// SAFETY: the structure is only read, and its deleter may be called on any thread: ours may, and whoever
// called `from_raw` said so of theirs.
unsafe impl<T: Managed> Send for Owned<T> {}
// SAFETY: as above.
unsafe impl<T: Managed> Sync for Owned<T> {}

impl<T: Managed> Owned<T> {
    /// Takes a managed tensor over.
    ///
    /// # Safety
    /// It is valid, nobody else deletes it, and its deleter may be called on any thread.
    pub unsafe fn from_raw(managed: NonNull<T>) -> Self {
        Owned(managed)
    }

    /// Gives it to someone who calls its deleter.
    pub fn into_raw(self) -> NonNull<T> {
        let managed = self.0;
        mem::forget(self);
        managed
    }

    /// The structure.
    pub fn get(&self) -> &T {
        // SAFETY: invariant 3.
        unsafe { self.0.as_ref() }
    }

    /// The address of its first byte.
    pub fn address(&self) -> u64 {
        let tensor = self.get().tensor();
        (tensor.data.addr() as u64).wrapping_add(tensor.byte_offset)
    }
}

impl<T: Managed> Drop for Owned<T> {
    fn drop(&mut self) {
        if let Some(delete) = self.get().deleter() {
            // SAFETY: invariant 3.
            unsafe { delete(self.0.as_ptr()) };
        }
    }
}

/// What there is to show: elements in row-major order at a place of some memory.
#[derive(Clone, Debug)]
pub struct Tensor {
    memory: Memory,
    offset: u64,
    dtype: RawDtype,
    shape: Vec<i64>,
}

/// The protocol's structure and all that it points to.
struct Held<T> {
    managed: T,
    shape: Vec<i64>,
    strides: Vec<i64>,
    _memory: Memory,
}

impl Tensor {
    /// Elements of this dtype and shape, the first of them at `offset`. Values of less than a byte are packed.
    ///
    /// # Errors
    /// [`Cause::Invalid`] if they do not fit in the memory.
    pub fn new(
        memory: Memory,
        offset: u64,
        dtype: RawDtype,
        shape: &[u64],
    ) -> Result<Tensor, Error> {
        let bits = u64::from(dtype.bits).checked_mul(dtype.lanes.into());
        let len = shape
            .iter()
            .try_fold(1_u64, |len, extent| len.checked_mul(*extent));
        let end = bits
            .zip(len)
            .and_then(|(bits, len)| bits.checked_mul(len))
            .and_then(|bits| offset.checked_add(bits.div_ceil(8)));
        let extents = shape.iter().map(|extent| i64::try_from(*extent).ok());
        let extents: Option<Vec<i64>> = extents.collect();
        let place = i32::try_from(memory.device().index).is_ok();
        match (end, extents) {
            (Some(end), Some(shape))
                if end <= memory.len() && i32::try_from(shape.len()).is_ok() && place =>
            {
                Ok(Tensor {
                    memory,
                    offset,
                    dtype,
                    shape,
                })
            }
            _ => {
                let text = format!("a tensor of shape {shape:?} at {offset} leaves its memory");
                Err(Error::new(memory.device(), "show", Cause::Invalid(text)))
            }
        }
    }

    /// In the form that consumers know which ask for no version.
    pub fn legacy(self) -> Owned<Legacy> {
        let managed = Legacy {
            tensor: self.raw(),
            manager_ctx: ptr::null_mut(),
            deleter: Some(delete_legacy),
        };
        let held = self.hold(managed);
        // SAFETY: invariant 2: it was just leaked, and nobody else has it.
        let managed = unsafe { &mut (*held).managed };
        managed.manager_ctx = held.cast();
        Owned(NonNull::from(managed))
    }

    /// In the form of version 1.
    pub fn versioned(self) -> Owned<Versioned> {
        let managed = Versioned {
            version: VERSION,
            manager_ctx: ptr::null_mut(),
            deleter: Some(delete_versioned),
            flags: 0,
            tensor: self.raw(),
        };
        let held = self.hold(managed);
        // SAFETY: as above.
        let managed = unsafe { &mut (*held).managed };
        managed.manager_ctx = held.cast();
        Owned(NonNull::from(managed))
    }

    /// The tensor, whose pointers to extents follow.
    fn raw(&self) -> RawTensor {
        let (id, address) = (self.memory.device(), self.memory.address());
        // A handle is no address to add to. Where there are addresses, frameworks overlook the offset.
        let (data, byte_offset) = match id.kind {
            _ if self.is_empty() => (0, 0),
            Kind::Vulkan | Kind::Metal => (address, self.offset),
            Kind::Host | Kind::Cuda | Kind::Rocm => (address.wrapping_add(self.offset), 0),
        };
        RawTensor {
            data: ptr::with_exposed_provenance_mut(data as usize),
            device: RawDevice {
                kind: id.kind.dlpack(),
                index: id.index as i32,
            },
            ndim: self.shape.len() as i32,
            dtype: self.dtype,
            shape: ptr::null_mut(),
            strides: ptr::null_mut(),
            byte_offset,
        }
    }

    fn is_empty(&self) -> bool {
        self.shape.contains(&0)
    }

    /// Row-major, in elements.
    fn strides(&self) -> Vec<i64> {
        let mut step = 1_i64;
        let mut strides: Vec<i64> = Vec::with_capacity(self.shape.len());
        for extent in self.shape.iter().rev() {
            strides.push(step);
            // Where an extent is 0, nobody takes a step.
            step = step.saturating_mul((*extent).max(1));
        }
        strides.reverse();
        strides
    }

    fn hold<T: Managed>(self, managed: T) -> *mut Held<T> {
        let mut held = Box::new(Held {
            managed,
            strides: self.strides(),
            shape: self.shape,
            _memory: self.memory,
        });
        let tensor = held.managed.tensor_mut();
        tensor.shape = held.shape.as_mut_ptr();
        tensor.strides = held.strides.as_mut_ptr();
        Box::into_raw(held)
    }
}

unsafe extern "C" fn delete_legacy(managed: *mut Legacy) {
    // SAFETY: what this deleter came with, valid until now (invariants 2 and 3).
    let held = unsafe { (*managed).manager_ctx };
    // SAFETY: invariant 2, and this is called once (invariant 3).
    drop(unsafe { Box::from_raw(held.cast::<Held<Legacy>>()) });
}

unsafe extern "C" fn delete_versioned(managed: *mut Versioned) {
    // SAFETY: what this deleter came with, valid until now (invariants 2 and 3).
    let held = unsafe { (*managed).manager_ctx };
    // SAFETY: invariant 2, and this is called once (invariant 3).
    drop(unsafe { Box::from_raw(held.cast::<Held<Versioned>>()) });
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Device, HostDevice};
    use std::mem::offset_of;
    use std::sync::Arc;

    const F32: RawDtype = RawDtype {
        code: 2,
        bits: 32,
        lanes: 1,
    };

    fn memory(len: u64) -> Memory {
        HostDevice::default().allocate(len).unwrap()
    }

    #[test]
    fn structures_are_laid_out_as_the_header_lays_them_out() {
        // What a C compiler says of dlpack.h 1.3 with pointers of 8 bytes.
        assert_eq!((size_of::<RawTensor>(), align_of::<RawTensor>()), (48, 8));
        assert_eq!(offset_of!(RawTensor, device), 8);
        assert_eq!(offset_of!(RawTensor, ndim), 16);
        assert_eq!(offset_of!(RawTensor, dtype), 20);
        assert_eq!(offset_of!(RawTensor, shape), 24);
        assert_eq!(offset_of!(RawTensor, byte_offset), 40);
        assert_eq!((size_of::<Legacy>(), offset_of!(Legacy, deleter)), (64, 56));
        assert_eq!(
            (size_of::<Versioned>(), offset_of!(Versioned, deleter)),
            (80, 16)
        );
        assert_eq!(
            (offset_of!(Versioned, flags), offset_of!(Versioned, tensor)),
            (24, 32)
        );
        assert_eq!(
            (size_of::<ExchangeTable>(), size_of::<ExchangeHeader>()),
            (56, 16)
        );
        assert_eq!(offset_of!(ExchangeTable, current_work_stream), 48);
    }

    #[test]
    fn a_tensor_keeps_its_memory_until_its_consumer_is_done() {
        let memory = memory(1000);
        let tensor = || Tensor::new(memory.clone(), 40, F32, &[3, 0, 5]);
        assert!(
            tensor().unwrap().versioned().get().tensor.data.is_null(),
            "nothing to point to"
        );
        let tensor = || Tensor::new(memory.clone(), 40, F32, &[3, 4, 5]).unwrap();
        let (legacy, versioned) = (tensor().legacy(), tensor().versioned());
        assert_eq!(Arc::strong_count(&memory), 3);
        assert_eq!(versioned.get().version, Version { major: 1, minor: 1 });
        assert_eq!(versioned.get().flags, 0);
        for raw in [legacy.get().tensor(), versioned.get().tensor()] {
            assert_eq!(raw.data.addr() as u64, memory.address() + 40);
            assert_eq!((raw.ndim, raw.dtype, raw.byte_offset), (3, F32, 0));
            assert_eq!(raw.device, RawDevice { kind: 1, index: 0 });
            // SAFETY: three extents, for as long as the tensor lives.
            let shape = unsafe { std::slice::from_raw_parts(raw.shape, 3) };
            // SAFETY: as above.
            let strides = unsafe { std::slice::from_raw_parts(raw.strides, 3) };
            assert_eq!((shape, strides), (&[3, 4, 5][..], &[20, 5, 1][..]));
        }
        // A consumer calls the deleter, on whatever thread.
        let raw = versioned.into_raw();
        assert_eq!(Arc::strong_count(&memory), 3);
        // SAFETY: just given up.
        let owned = unsafe { Owned::from_raw(raw) };
        std::thread::spawn(move || drop(owned)).join().unwrap();
        assert_eq!(Arc::strong_count(&memory), 2);
        drop(legacy);
        assert_eq!(Arc::strong_count(&memory), 1);
    }

    #[test]
    fn what_leaves_its_memory_is_refused() {
        let memory = memory(100);
        let show = |offset, dtype, shape: &[u64]| {
            Tensor::new(memory.clone(), offset, dtype, shape).map(|_| ())
        };
        assert!(show(0, F32, &[25]).is_ok() && show(96, F32, &[]).is_ok());
        let packed = RawDtype {
            code: 17,
            bits: 4,
            lanes: 1,
        };
        assert!(show(0, packed, &[200]).is_ok() && show(0, packed, &[201]).is_err());
        for (offset, shape) in [
            (0, &[26_u64][..]),
            (1, &[25]),
            (97, &[]),
            (u64::MAX, &[1]),
            (0, &[u64::MAX, u64::MAX]),
            (0, &[1 << 62, 4]),
            (0, &[0, u64::MAX]),
        ] {
            let error = show(offset, F32, shape).unwrap_err();
            assert!(
                matches!(error.cause(), Cause::Invalid(_)),
                "{offset} {shape:?}"
            );
        }
    }
}
