//! Another user of the CUDA driver in the same process, as a framework is: it shares the primary context,
//! and has memory, streams and work of its own.
//!
//! Invariants:
//! 1. Functions have the signatures of `cuda.h` at the places that name them.
#![allow(unsafe_code)]
#![allow(dead_code, reason = "each test program uses a part of it")]

use std::ffi::{OsStr, c_int, c_uint};

use libloading::Library;

type Give<T> = extern "C" fn(*mut T) -> c_int;

/// The client, whose context is current on this thread while it lives.
pub struct Client {
    library: Library,
    context: usize,
}

impl Client {
    pub fn new(driver: &OsStr) -> Client {
        // SAFETY: a CUDA driver.
        let library = unsafe { Library::new(driver) }.expect("the driver");
        let mut client = Client {
            library,
            context: 0,
        };
        let retain = client
            .function::<extern "C" fn(*mut usize, c_int) -> c_int>("cuDevicePrimaryCtxRetain");
        assert_eq!(retain(&mut client.context, 0), 0);
        client.make_current(client.context);
        client
    }

    /// A function of the driver's.
    pub fn function<T: Copy>(&self, name: &str) -> T {
        self.find(name).unwrap_or_else(|| panic!("no {name}"))
    }

    /// The same, where the driver has it.
    pub fn find<T: Copy>(&self, name: &str) -> Option<T> {
        // SAFETY: invariant 1.
        let found = unsafe { self.library.get::<T>(name.as_bytes()) };
        found.ok().map(|symbol| *symbol)
    }

    pub fn context(&self) -> usize {
        self.context
    }

    pub fn current(&self) -> usize {
        let mut context = 1;
        assert_eq!(
            self.function::<Give<usize>>("cuCtxGetCurrent")(&mut context),
            0
        );
        context
    }

    pub fn make_current(&self, context: usize) {
        let set = self.function::<extern "C" fn(usize) -> c_int>("cuCtxSetCurrent");
        assert_eq!(set(context), 0);
    }

    /// Whether anybody keeps the device's primary context.
    pub fn is_active(&self) -> Option<bool> {
        type Ask = extern "C" fn(c_int, *mut c_uint, *mut c_int) -> c_int;
        let ask = self.find::<Ask>("cuDevicePrimaryCtxGetState")?;
        let (mut flags, mut active) = (0, 0);
        assert_eq!(ask(0, &mut flags, &mut active), 0);
        Some(active == 1)
    }

    /// Lets the primary context go, so that others' use of it can be seen.
    pub fn let_go(&mut self) {
        if self.context != 0 {
            self.make_current(0);
            self.context = 0;
            let release =
                self.function::<extern "C" fn(c_int) -> c_int>("cuDevicePrimaryCtxRelease_v2");
            assert_eq!(release(0), 0);
        }
    }

    /// The context that memory is of.
    pub fn context_of(&self, address: u64) -> usize {
        type Ask = extern "C" fn(*mut usize, c_int, u64) -> c_int;
        let mut context = 0;
        let ask = self.function::<Ask>("cuPointerGetAttribute");
        assert_eq!(ask(&mut context, 1, address), 0);
        context
    }

    pub fn allocate(&self, len: usize) -> u64 {
        type Allocate = extern "C" fn(*mut u64, usize) -> c_int;
        let mut address = 0;
        assert_eq!(
            self.function::<Allocate>("cuMemAlloc_v2")(&mut address, len),
            0
        );
        address
    }

    pub fn free(&self, address: u64) {
        let free = self.function::<extern "C" fn(u64) -> c_int>("cuMemFree_v2");
        assert_eq!(free(address), 0, "it was ours, and there");
    }

    /// A stream that does not wait for the default stream.
    pub fn stream(&self) -> usize {
        type Create = extern "C" fn(*mut usize, c_uint) -> c_int;
        let mut stream = 0;
        assert_eq!(self.function::<Create>("cuStreamCreate")(&mut stream, 1), 0);
        stream
    }

    pub fn destroy(&self, stream: usize) {
        let destroy = self.function::<extern "C" fn(usize) -> c_int>("cuStreamDestroy_v2");
        assert_eq!(destroy(stream), 0);
    }

    /// Gives a stream work: bytes set, in order.
    pub fn fill(&self, stream: usize, address: u64, byte: u8, len: usize) {
        type Fill = extern "C" fn(u64, u8, usize, usize) -> c_int;
        let fill = self.function::<Fill>("cuMemsetD8Async");
        assert_eq!(fill(address, byte, len, stream), 0);
    }

    /// What is there once the stream has done what it was given so far.
    pub fn read(&self, stream: usize, address: u64, len: usize) -> Vec<u8> {
        type Download = extern "C" fn(*mut u8, u64, usize, usize) -> c_int;
        let mut bytes = vec![0; len];
        let download = self.function::<Download>("cuMemcpyDtoHAsync_v2");
        assert_eq!(download(bytes.as_mut_ptr(), address, len, stream), 0);
        let wait = self.function::<extern "C" fn(usize) -> c_int>("cuStreamSynchronize");
        assert_eq!(wait(stream), 0);
        bytes
    }
}

impl Drop for Client {
    fn drop(&mut self) {
        if !std::thread::panicking() {
            self.let_go();
        }
    }
}
