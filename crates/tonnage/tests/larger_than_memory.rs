//! Claim: a model 1.5 times as large as the memory that a process may have goes to a device as a stream, tensor
//! by tensor; loading all of it at once says how much is needed, and leaves nothing behind.
#![cfg(target_os = "linux")]

mod sparse;

use std::path::Path;
use std::process::Command;
use std::sync::Arc;

use tonnage::device::{Device, HostDevice};
use tonnage::{Checkpoint, DeviceLoad, Order, Stream};

const MIB: u64 = 1 << 20;
/// Addresses that the process may have.
const LIMIT: u64 = 1024 * MIB;
const FILE: &str = "TONNAGE_TEST_FILE";

#[test]
fn a_model_larger_than_memory_streams() {
    if let Some(path) = std::env::var_os(FILE) {
        return inside(path.as_ref());
    }
    let folder = tempfile::tempdir().unwrap();
    let path = sparse::model(folder.path(), LIMIT + LIMIT / 2);
    let mut limited = Command::new("sh");
    limited.args([
        "-c",
        &format!("ulimit -v {} && exec \"$@\"", LIMIT >> 10),
        "sh",
    ]);
    limited.arg(std::env::current_exe().unwrap());
    limited.args([
        "a_model_larger_than_memory_streams",
        "--exact",
        "--nocapture",
        "--test-threads=1",
    ]);
    let output = limited.env(FILE, &path).output().unwrap();
    let text = String::from_utf8_lossy(&output.stdout).into_owned()
        + &String::from_utf8_lossy(&output.stderr);
    assert!(
        output.status.success() && text.contains("1 passed"),
        "{text}"
    );
    assert!(text.contains("streamed"), "{text}");
}

fn inside(path: &Path) {
    // The device's memory is the process's own here, so the limit is the device's too.
    let device: Arc<dyn Device> = Arc::new(HostDevice::new(false));
    let checkpoint = Checkpoint::open(path).unwrap();
    let load = DeviceLoad {
        staging: Some(32 * MIB),
        threads: Some(2),
        ..Default::default()
    };
    let error = checkpoint.load_to(&device, &load).unwrap_err();
    assert_eq!(error.code(), "DEVICE_MEMORY", "{error}");
    let needed = error.to_string();
    assert!(
        needed.contains("bytes needed") && needed.contains("tensor"),
        "{needed}"
    );
    for order in [Order::Landed, Order::Given(vec!["large.7".to_owned()])] {
        let stream = Stream {
            load: load.clone(),
            order,
            ahead: Some(256 * MIB),
        };
        let mut bytes = 0;
        for tensor in checkpoint.stream_to(&device, &stream).unwrap() {
            bytes += tensor.unwrap().len;
        }
        assert_eq!(bytes, checkpoint.total_bytes());
        assert!(bytes > LIMIT + LIMIT / 4);
        println!("streamed {} MiB", bytes / MIB);
    }
}
