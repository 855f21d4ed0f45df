//! The stub driver does what the manuals of CUDA and HIP say, where our own devices do not show it.
#![cfg(target_os = "linux")]

use tonnage_stubdriver::find::Stub;

const LEN: usize = 100_000;

/// Calls with up to five arguments, all of a register's size.
struct Calls<'a>(&'a Stub);

impl Calls<'_> {
    fn call(&self, name: &str, arguments: &[usize]) -> i32 {
        type Five = extern "C" fn(usize, usize, usize, usize, usize, usize) -> i32;
        let mut all = [0; 6];
        all[..arguments.len()].copy_from_slice(arguments);
        let [a, b, c, d, e, f] = all;
        self.0.function::<Five>(name)(a, b, c, d, e, f)
    }

    fn ok(&self, name: &str, arguments: &[usize]) {
        assert_eq!(self.call(name, arguments), 0, "{name}");
    }

    fn make(&self, name: &str, arguments: &[usize]) -> usize {
        let mut made = 0_usize;
        let out = std::ptr::from_mut(&mut made).expose_provenance();
        self.ok(name, &[&[out], arguments].concat());
        made
    }
}

fn address(bytes: &mut [u8]) -> usize {
    bytes.as_mut_ptr().expose_provenance()
}

#[test]
fn contexts_are_counted_and_needed() {
    let stub = Stub::begin("DEVICES=2\nMEM_MIB=16");
    let calls = Calls(&stub);
    let mut out = 0_usize;
    let to = std::ptr::from_mut(&mut out).expose_provenance();
    assert_eq!(calls.call("cuMemAlloc_v2", &[to, 100]), 201);
    assert_eq!(calls.call("cuDeviceGet", &[to, 2]), 101);
    let context = calls.make("cuDevicePrimaryCtxRetain", &[0]);
    assert_eq!(calls.make("cuDevicePrimaryCtxRetain", &[0]), context);
    let other = calls.make("cuDevicePrimaryCtxRetain", &[1]);
    assert_eq!(stub.live().contexts, 3);
    calls.ok("cuCtxPushCurrent_v2", &[context]);
    calls.ok("cuCtxPushCurrent_v2", &[other]);
    assert_eq!(calls.make("cuCtxGetCurrent", &[]), other);
    assert_eq!(calls.make("cuCtxPopCurrent_v2", &[]), other);
    assert_eq!(calls.make("cuCtxGetCurrent", &[]), context);
    // Another thread has its own.
    std::thread::scope(|scope| {
        let get = || assert_eq!(calls.make("cuCtxGetCurrent", &[]), 0);
        scope.spawn(get).join().unwrap();
    });
    calls.ok("cuDevicePrimaryCtxRelease_v2", &[0]);
    let memory = calls.make("cuMemAlloc_v2", &[100]);
    calls.ok("cuMemFree_v2", &[memory]);
    calls.ok("cuDevicePrimaryCtxRelease_v2", &[0]);
    assert_eq!(calls.call("cuMemAlloc_v2", &[to, 100]), 201, "it is gone");
    calls.ok("cuDevicePrimaryCtxRelease_v2", &[1]);
    assert_eq!(calls.call("cuDevicePrimaryCtxRelease_v2", &[1]), 201);
    assert_eq!(stub.pardon(), 1, "released too often");
    calls.ok("cuCtxSetCurrent", &[0]);
}

#[test]
fn the_default_stream_and_ordinary_streams_wait_for_each_other() {
    let stub = Stub::begin("MEM_MIB=16\nDELAY_US=500");
    let calls = Calls(&stub);
    let memory = calls.make("hipMalloc", &[LEN]);
    let ordinary = calls.make("hipStreamCreateWithFlags", &[0]);
    let apart = calls.make("hipStreamCreateWithFlags", &[1]);
    for round in 0..20 {
        calls.ok("hipMemsetAsync", &[memory, 2 * round, LEN, 0]);
        calls.ok("hipMemsetAsync", &[memory, 2 * round + 1, LEN, ordinary]);
        // `hipMemcpy` is on the default stream, and waits.
        let mut bytes = vec![0; LEN];
        calls.ok("hipMemcpyDtoH", &[address(&mut bytes), memory, LEN]);
        assert_eq!(bytes, vec![2 * round as u8 + 1; LEN]);
    }
    assert_eq!(stub.violations(), 0);
    calls.ok("hipMemsetAsync", &[memory, 1, LEN, 0]);
    calls.ok("hipMemsetAsync", &[memory, 2, LEN, apart]);
    assert_eq!(stub.pardon(), 1, "a stream that is apart waits for nobody");
    calls.ok("hipDeviceSynchronize", &[]);
    calls.ok("hipFree", &[memory]);
    calls.ok("hipStreamDestroy", &[ordinary]);
    calls.ok("hipStreamDestroy", &[apart]);
}

#[test]
fn copies_among_devices_and_from_registered_memory() {
    let stub = Stub::begin("DEVICES=2\nMEM_MIB=16\nDELAY_US=500");
    let calls = Calls(&stub);
    let first = calls.make("hipMalloc", &[LEN]);
    calls.ok("hipSetDevice", &[1]);
    let second = calls.make("hipMalloc", &[LEN]);
    let stream = calls.make("hipStreamCreateWithFlags", &[1]);
    let mut bytes = vec![7; LEN];
    let host = address(&mut bytes);
    calls.ok("hipHostRegister", &[host, LEN, 0]);
    assert_eq!(calls.call("hipHostRegister", &[host + 5, 1, 0]), 712);
    stub.hold(true);
    calls.ok("hipMemcpyHtoDAsync", &[second, host, LEN, stream]);
    assert_eq!(calls.call("hipStreamQuery", &[stream]), 600, "it runs late");
    calls.ok("hipMemcpyPeerAsync", &[first, 0, second, 1, LEN, stream]);
    stub.hold(false);
    calls.ok("hipStreamSynchronize", &[stream]);
    assert_eq!(stub.peek(first as u64, LEN), vec![7; LEN]);
    calls.ok("hipHostUnregister", &[host]);
    // Now it is memory like any other: the copy is over when the call returns.
    bytes.fill(8);
    calls.ok("hipMemcpyHtoDAsync", &[second, host, LEN, stream]);
    bytes.fill(9);
    assert_eq!(stub.peek(second as u64, LEN), vec![8; LEN]);
    for memory in [first, second] {
        calls.ok("hipFree", &[memory]);
    }
    calls.ok("hipStreamDestroy", &[stream]);
    calls.ok("hipSetDevice", &[0]);
}

#[test]
fn an_early_read_of_what_a_copy_brings_finds_the_old_bytes() {
    let stub = Stub::begin("MEM_MIB=16");
    let calls = Calls(&stub);
    let memory = calls.make("hipMalloc", &[LEN]);
    let pinned = calls.make("hipHostMalloc", &[LEN, 0]);
    let stream = calls.make("hipStreamCreateWithFlags", &[1]);
    let read = || {
        let byte = std::ptr::with_exposed_provenance::<u8>(pinned);
        // SAFETY: memory of the host that the driver gave; no copy runs.
        #[allow(unsafe_code, reason = "what a host does with the driver's memory")]
        unsafe {
            byte.read_volatile()
        }
    };
    stub.hold(true);
    calls.ok("hipMemcpyDtoHAsync", &[pinned, memory, LEN, stream]);
    assert_eq!(read(), 0);
    stub.hold(false);
    calls.ok("hipStreamSynchronize", &[stream]);
    assert_eq!(read(), 0xCD, "fresh memory of a device is not zero");
    calls.ok("hipFree", &[memory]);
    calls.ok("hipHostFree", &[pinned]);
    calls.ok("hipStreamDestroy", &[stream]);
}
