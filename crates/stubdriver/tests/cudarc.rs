//! `cudarc` runs on the stub driver as on the real one: an independent client, which nobody wrote for it.
#![cfg(target_os = "linux")]
#![allow(unsafe_code, reason = "some of its functions are unsafe to call")]

use std::process::Command;
use std::sync::Arc;

use cudarc::driver::{CudaContext, CudaStream, sys};
use tonnage_stubdriver::find;

const INSIDE: &str = "TONNAGE_TEST_CLIENT";
const LEN: usize = 100_000;

/// Runs this test once more, with the library under the driver's usual name.
fn again(test: &str, how: &str, settings: &[(&str, &str)]) -> (Option<i32>, String) {
    let home = tempfile::tempdir().unwrap();
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args([test, "--exact", "--nocapture"]);
    command.env("LD_LIBRARY_PATH", find::folder(home.path()));
    let output = command
        .env(INSIDE, how)
        .envs(settings.iter().copied())
        .output();
    let output = output.unwrap();
    let text = [&output.stdout[..], &output.stderr[..]].concat();
    (output.status.code(), String::from_utf8_lossy(&text).into())
}

fn numbers(seed: u32) -> Vec<u32> {
    (0..LEN as u32)
        .map(|i| i.wrapping_mul(2_654_435_761) ^ seed)
        .collect()
}

fn copies(context: &Arc<CudaContext>, stream: &Arc<CudaStream>) {
    let wanted = numbers(1);
    let device = stream.clone_htod(&wanted).unwrap();
    assert_eq!(stream.clone_dtoh(&device).unwrap(), wanted);
    let same = stream.clone_dtod(&device).unwrap();
    assert_eq!(stream.clone_dtoh(&same).unwrap(), wanted);
    let zeros = stream.alloc_zeros::<u32>(LEN).unwrap();
    assert_eq!(stream.clone_dtoh(&zeros).unwrap(), vec![0; LEN]);
    // Page-locked on both sides: copies run late, and the slice's event tells their end.
    // SAFETY: every element is written before any is read.
    let mut from = unsafe { context.alloc_pinned::<u32>(LEN) }.unwrap();
    // SAFETY: as above.
    let mut to = unsafe { context.alloc_pinned::<u32>(LEN) }.unwrap();
    let mut target = stream.alloc_zeros::<u32>(LEN).unwrap();
    for seed in 0..20 {
        let wanted = numbers(seed);
        from.as_mut_slice().unwrap().copy_from_slice(&wanted);
        stream.memcpy_htod(&from, &mut target).unwrap();
        stream.memcpy_dtoh(&target, &mut to).unwrap();
        // `as_slice` waits only in a process with more than one stream: without this line, the stub driver
        // showed bytes of before.
        stream.synchronize().unwrap();
        assert_eq!(to.as_slice().unwrap(), wanted);
    }
}

#[test]
fn memory_copies_streams_and_events() {
    if std::env::var_os(INSIDE).is_none() {
        let settings = [
            ("STUB_DEVICES", "2"),
            ("STUB_MEM_MIB", "64"),
            ("STUB_DELAY_US", "300"),
        ];
        let (code, text) = again("memory_copies_streams_and_events", "1", &settings);
        assert_eq!(code, Some(0), "{text}");
        assert!(
            text.contains("1 passed") && !text.contains("VIOLATION"),
            "{text}"
        );
        return;
    }
    assert_eq!(CudaContext::device_count().unwrap(), 2);
    let context = CudaContext::new(1).unwrap();
    assert_eq!(context.name().unwrap(), "Stub device 1");
    assert_eq!(context.total_mem().unwrap(), 64 << 20);
    assert_eq!(context.mem_get_info().unwrap(), (64 << 20, 64 << 20));
    assert_eq!(context.compute_capability().unwrap(), (8, 0));
    let default = context.default_stream();
    copies(&context, &default);
    let (first, second) = (context.new_stream().unwrap(), default.fork().unwrap());
    copies(&context, &first);
    copies(&context, &second);

    // Streams joined by events.
    let mut device = first.clone_htod(&numbers(5)).unwrap();
    second.join(&first).unwrap();
    let copy = second.clone_dtod(&device).unwrap();
    let flags = Some(sys::CUevent_flags::CU_EVENT_DEFAULT);
    let event = second.record_event(flags).unwrap();
    first.wait(&event).unwrap();
    first.memset_zeros(&mut device).unwrap();
    assert_eq!(second.clone_dtoh(&copy).unwrap(), numbers(5));
    event.synchronize().unwrap();
    assert!(event.is_complete());

    let error = default.alloc_zeros::<u8>(65 << 20).unwrap_err();
    assert_eq!(error.0, sys::CUresult::CUDA_ERROR_OUT_OF_MEMORY);
    context.synchronize().unwrap();
}

#[test]
fn what_it_leaves_behind_is_seen() {
    if std::env::var_os(INSIDE).is_none() {
        let (code, text) = again("what_it_leaves_behind_is_seen", "1", &[]);
        assert_eq!(code, Some(tonnage_stubdriver::EXIT), "{text}");
        assert!(text.contains("allocations: 1"), "{text}");
        return;
    }
    let context = CudaContext::new(0).unwrap();
    let stream = context.new_stream().unwrap();
    std::mem::forget(stream.alloc_zeros::<u8>(100).unwrap());
}

#[test]
fn its_memory_is_out_of_the_hosts_reach() {
    if std::env::var_os(INSIDE).is_none() {
        let (code, text) = again("its_memory_is_out_of_the_hosts_reach", "1", &[]);
        assert_eq!(code, None, "a signal ends it: {text}");
        return;
    }
    use cudarc::driver::DevicePtr;
    let context = CudaContext::new(0).unwrap();
    let stream = context.new_stream().unwrap();
    let memory = stream.alloc_zeros::<u8>(100).unwrap();
    let (address, _guard) = memory.device_ptr(&stream);
    let address = std::ptr::with_exposed_provenance::<u8>(address as usize);
    // SAFETY: none: this is the mistake that the stub driver has to punish.
    println!("{}", unsafe { address.read_volatile() });
}
