//! Claim: what a load to a device promises holds on CUDA's and HIP's stub driver, with copies that run late, and
//! on Vulkan, as it is and as a card: every byte, streams, saves, and after a fault at any call nothing is left.
#![cfg(target_os = "linux")]

mod common;
mod device;
#[path = "../../device/tests/drivers/mod.rs"]
mod drivers;

use std::path::Path;
use std::sync::Arc;

use common::{Tensor, model, refs};
use tonnage::device::driver::Driver;
use tonnage::device::{Device, Kind, Pool, vulkan};
use tonnage::{
    Checkpoint, Content, DeviceData, DeviceLoad, Dtype, ErrorKind, Item, Order, Save, Stream, save,
    save_items,
};
use tonnage_stubdriver::find::{Live, Stub};

const KINDS: [Kind; 2] = [Kind::Cuda, Kind::Rocm];

fn tensors() -> Vec<Tensor> {
    let mut tensors = model(7);
    for (i, len) in [5_000_001_u64, 1 << 20, 70_000, 65_536, 3]
        .into_iter()
        .enumerate()
    {
        tensors.push(Tensor::new(&format!("t.{i}"), Dtype::U8, &[len], len));
    }
    for i in 0..300 {
        tensors.push(Tensor::new(&format!("many.{i}"), Dtype::F32, &[i % 50], i));
    }
    tensors
}

fn saved(folder: &Path) -> Checkpoint {
    let path = folder.join("m.safetensors");
    save(&refs(&tensors()), &path, &Save::default()).unwrap();
    Checkpoint::open(path).unwrap()
}

fn load(staging: u64) -> (DeviceLoad, Arc<Pool>) {
    let pool = Pool::new(staging);
    let load = DeviceLoad {
        staging: Some(staging),
        threads: Some(2),
        pool: Some(pool.clone()),
        ..Default::default()
    };
    (load, pool)
}

/// There, as a whole and as a stream, and back.
fn there_and_back(device: &Arc<dyn Device>) {
    let folder = tempfile::tempdir().unwrap();
    let (checkpoint, tensors) = (saved(folder.path()), tensors());
    let (load, pool) = load(1 << 20);
    let loaded = checkpoint.load_to(device, &load).unwrap();
    for tensor in &tensors {
        let found = loaded.get(&tensor.name).unwrap();
        assert!(
            device::content(device, found) == tensor.data,
            "{}",
            tensor.name
        );
    }
    let stream = Stream {
        load: load.clone(),
        order: Order::Given(vec!["t.0".to_owned()]),
        ahead: Some(2 << 20),
    };
    for (i, tensor) in checkpoint.stream_to(device, &stream).unwrap().enumerate() {
        let tensor = tensor.unwrap();
        assert!(i > 0 || tensor.name == "t.0");
        let wanted = tensors.iter().find(|t| t.name == tensor.name).unwrap();
        assert!(
            device::content(device, &tensor) == wanted.data,
            "{}",
            tensor.name
        );
    }
    let item = |tensor: &tonnage::DeviceTensor| (tensor.memory.clone(), tensor.offset);
    let places: Vec<_> = loaded.tensors().iter().map(item).collect();
    let items: Vec<Item<'_>> = loaded
        .tensors()
        .iter()
        .zip(&places)
        .map(|(tensor, (memory, offset))| Item {
            name: &tensor.name,
            dtype: tensor.dtype,
            shape: &tensor.shape,
            content: Content::Device(DeviceData {
                device,
                memory,
                offset: *offset,
                after: None,
            }),
        })
        .collect();
    let path = folder.path().join("back.safetensors");
    save_items(&items, &path, &Save::default()).unwrap();
    let same = std::fs::read(&path).unwrap()
        == std::fs::read(folder.path().join("m.safetensors")).unwrap();
    assert!(same, "what comes back is what went there");
    pool.trim();
    Pool::global().trim();
}

#[test]
fn bytes_go_there_and_back_on_stub_cards() {
    let stub = Stub::begin("");
    for kind in KINDS {
        stub.again("MEM_MIB=64\nDELAY_US=200");
        let driver = Driver::open_at(kind, stub.path()).unwrap();
        let device: Arc<dyn Device> = Arc::new(driver.device(0).unwrap());
        there_and_back(&device);
        drop((device, driver));
        assert_eq!(
            (stub.live(), stub.violations()),
            (Live::default(), 0),
            "{kind:?}"
        );
    }
}

#[test]
fn bytes_go_there_and_back_on_vulkan() {
    drivers::on("lavapipe", "bytes_go_there_and_back_on_vulkan", || {
        for force_staging in [false, true] {
            let settings = vulkan::Settings {
                library: None,
                force_staging,
                driver_pages: false,
            };
            let device: Arc<dyn Device> = vulkan::open(0, &settings).unwrap();
            there_and_back(&device);
        }
    });
}

#[test]
fn a_fault_at_any_call_is_told_and_leaves_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let checkpoint = saved(folder.path());
    let stub = Stub::begin("");
    for (what, breaks) in [
        ("FAIL_ALLOC", false),
        ("FAIL_ISSUE", false),
        ("FAIL_COPY", true),
    ] {
        let mut failures = 0;
        for n in 1.. {
            stub.again(&format!("MEM_MIB=64\nDELAY_US=50\n{what}={n}"));
            let driver = Driver::open_at(Kind::Cuda, stub.path()).unwrap();
            let device: Arc<dyn Device> = Arc::new(driver.device(0).unwrap());
            let (load, pool) = load(1 << 20);
            let result = checkpoint.load_to(&device, &load);
            pool.trim();
            drop((device, driver));
            assert_eq!(stub.violations(), 0, "{what} {n}");
            let Err(error) = result else { break };
            failures += 1;
            assert_eq!(error.kind(), ErrorKind::Device, "{what} {n}: {error}");
            assert!(error.tensor().is_some(), "{what} {n}: {error}");
            if what == "FAIL_ALLOC" {
                let text = error.to_string();
                assert!(
                    text.contains("bytes needed") && text.contains(" free"),
                    "{text}"
                );
                assert_eq!(error.code(), "DEVICE_MEMORY");
            }
            // A device that a failed copy broke gives nothing back: its process has to end.
            if !breaks {
                assert_eq!(stub.live(), Live::default(), "{what} {n}");
            }
        }
        println!("{what}: {failures}");
        assert!(failures >= 3, "{what}: {failures}");
    }
    stub.again("");
}

#[test]
fn a_device_that_is_too_small_says_what_is_needed_and_free() {
    let folder = tempfile::tempdir().unwrap();
    let checkpoint = saved(folder.path());
    let stub = Stub::begin("MEM_MIB=5");
    let driver = Driver::open_at(Kind::Cuda, stub.path()).unwrap();
    let device: Arc<dyn Device> = Arc::new(driver.device(0).unwrap());
    let (load, pool) = load(1 << 20);
    let error = checkpoint.load_to(&device, &load).map(drop).unwrap_err();
    let free = format!("{} free", 5 << 20);
    assert!(
        error.to_string().contains(&free) && error.tensor().is_some(),
        "{error}"
    );
    assert_eq!(device.free_memory().unwrap(), 5 << 20);
    pool.trim();
}
