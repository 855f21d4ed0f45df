//! Claim: every byte of every tensor arrives on a device, however it is selected, cut, cast and placed.

mod common;
mod device;

use std::collections::HashMap;
use std::sync::Arc;

use common::{Tensor, model, noise, refs};
use device::{Kind, content, devices};
use tempfile::TempDir;
use tonnage::device::{Device, HostDevice, Pool};
use tonnage::engine::{Progress, Strategy};
use tonnage::{
    Checkpoint, Content, DeviceData, DeviceLoad, DeviceMap, Dtype, ErrorKind, Item, Order, Save,
    Slice, Stream, Writer, save, save_items,
};

/// Many tensors around all the sizes that matter: pages, what is gathered, slots, regions.
fn large_model() -> Vec<Tensor> {
    let sizes = [
        1_u64,
        63,
        255,
        256,
        257,
        4095,
        4096,
        4097,
        65_535,
        65_536,
        65_537,
        200_000,
        1 << 20,
        3_000_001,
    ];
    let mut tensors = model(3);
    for (round, size) in (0..3).flat_map(|round| sizes.map(|size| (round, size))) {
        let name = format!("t{round}.{size}");
        tensors.push(Tensor::new(&name, Dtype::U8, &[size], size + round));
    }
    for i in 0..500 {
        tensors.push(Tensor::new(
            &format!("many.{i:03}"),
            Dtype::F32,
            &[i % 40],
            i,
        ));
    }
    tensors
}

fn saved(tensors: &[Tensor], shard: Option<u64>) -> (TempDir, Checkpoint) {
    let folder = tempfile::tempdir().unwrap();
    let options = Save {
        max_shard_size: shard,
        ..Default::default()
    };
    save(&refs(tensors), folder.path().join("m"), &options).unwrap();
    let checkpoint = Checkpoint::open(folder.path().join("m")).unwrap();
    (folder, checkpoint)
}

fn small_ring(staging: u64) -> DeviceLoad {
    DeviceLoad {
        staging: Some(staging),
        pool: Some(Pool::new(staging)),
        ..Default::default()
    }
}

#[test]
fn every_byte_arrives_by_every_way() {
    let tensors = large_model();
    for shard in [None, Some(1 << 20)] {
        let (_folder, checkpoint) = saved(&tensors, shard);
        for device in devices() {
            for strategy in [
                Strategy::Auto,
                Strategy::Direct,
                Strategy::Buffered,
                Strategy::Mmap,
            ] {
                for staging in [128 << 10, 1 << 20, 64 << 20] {
                    let load = DeviceLoad {
                        strategy,
                        ..small_ring(staging)
                    };
                    let loaded = checkpoint.load_to(&device.device, &load).unwrap();
                    assert_eq!(loaded.tensors().len(), tensors.len());
                    assert!(
                        loaded.report().peak_staging <= staging,
                        "{:?}",
                        loaded.report()
                    );
                    for tensor in &tensors {
                        let found = loaded.get(&tensor.name).unwrap();
                        assert_eq!((found.dtype, &found.shape), (tensor.dtype, &tensor.shape));
                        let same = content(&device.device, found) == tensor.data;
                        assert!(same, "{} {} {strategy} {staging}", device.name, tensor.name);
                    }
                }
            }
        }
    }
}

#[test]
fn slices_of_any_dimension_arrive() {
    let tensors = [
        Tensor::new("rows", Dtype::BF16, &[300, 700], 1),
        Tensor::new("wide", Dtype::U8, &[3, 300_000], 2),
        Tensor::new("deep", Dtype::F32, &[5, 17, 9, 31], 3),
        Tensor::new("line", Dtype::I64, &[50_000], 4),
        Tensor::new("none", Dtype::I64, &[0, 7], 5),
    ];
    let (_folder, checkpoint) = saved(&tensors, None);
    let range = |start, stop, step| Slice { start, stop, step };
    let cases: [(&str, Vec<Slice>); 13] = [
        ("rows", vec![range(10, 200, 1)]),
        ("rows", vec![range(0, 300, 1), range(350, 700, 1)]),
        ("rows", vec![range(7, 300, 13), range(1, 8, 1)]),
        ("rows", vec![range(0, 300, 1), range(0, 700, 2)]),
        ("rows", vec![range(5, 5, 1)]),
        ("wide", vec![range(0, 3, 1), range(1000, 250_000, 1)]),
        ("wide", vec![range(0, 3, 2), range(5, 6, 1)]),
        ("wide", vec![range(1, 3, 1), range(3, 299_999, 997)]),
        (
            "deep",
            vec![
                range(1, 4, 1),
                range(3, 9, 1),
                range(2, 7, 1),
                range(30, 31, 1),
            ],
        ),
        (
            "deep",
            vec![
                range(0, 5, 2),
                range(0, 17, 1),
                range(0, 9, 3),
                range(5, 25, 1),
            ],
        ),
        ("deep", vec![range(0, 5, 1), range(16, 17, 1)]),
        ("line", vec![range(3, 49_999, 1)]),
        ("none", vec![range(0, 0, 1), range(2, 5, 1)]),
    ];
    for device in devices() {
        for (name, ranges) in &cases {
            for dtype in [None, Some(Dtype::F32), Some(Dtype::F8_E5M2)] {
                let load = DeviceLoad {
                    select: vec![(*name).to_owned()],
                    slices: HashMap::from([((*name).to_owned(), ranges.clone())]),
                    dtype,
                    ..small_ring(256 << 10)
                };
                let loaded = checkpoint.load_to(&device.device, &load).unwrap();
                let found = &loaded.tensors()[0];
                let slice = checkpoint.tensor(name).unwrap().slice(ranges).unwrap();
                let from = checkpoint.tensor(name).unwrap().dtype().unwrap();
                let plain = slice.read().unwrap();
                let mut wanted = vec![0; found.len as usize];
                tonnage::cast::cast(from, &plain, found.dtype, &mut wanted).unwrap();
                assert_eq!(found.shape, slice.shape());
                let same = content(&device.device, found) == wanted;
                assert!(same, "{} {name} {ranges:?} {dtype:?}", device.name);
            }
        }
    }
}

#[test]
fn casts_on_the_way_are_those_of_a_host_load() {
    let tensors = [
        Tensor::new("a", Dtype::F32, &[700, 333], 1),
        Tensor::new("b", Dtype::BF16, &[9], 2),
        Tensor::new("c", Dtype::F16, &[100_001], 3),
        Tensor::new("d", Dtype::I32, &[1000], 4),
        Tensor::new("e", Dtype::F4, &[6, 50_000], 5),
        Tensor::new("f", Dtype::F64, &[40_000], 6),
    ];
    let (_folder, checkpoint) = saved(&tensors, None);
    for device in devices() {
        for dtype in [Dtype::F32, Dtype::BF16, Dtype::F64, Dtype::F8_E4M3] {
            let load = DeviceLoad {
                dtype: Some(dtype),
                ..small_ring(128 << 10)
            };
            let loaded = checkpoint.load_to(&device.device, &load).unwrap();
            let host = tonnage::Load {
                dtype: Some(dtype),
                ..Default::default()
            };
            for (tensor, bytes) in checkpoint.load(&host).unwrap().iter() {
                let found = loaded.get(&tensor.name).unwrap();
                assert_eq!((found.dtype, &found.shape), (tensor.dtype, &tensor.shape));
                assert!(
                    content(&device.device, found) == bytes,
                    "{} {dtype}",
                    tensor.name
                );
            }
        }
    }
}

#[test]
fn a_stream_gives_tensors_in_order_and_within_its_budget() {
    let tensors: Vec<Tensor> = (0..60)
        .map(|i| Tensor::new(&format!("t.{i:02}"), Dtype::U8, &[100_000 + i], i))
        .collect();
    let (_folder, checkpoint) = saved(&tensors, None);
    for device in devices() {
        let stream = Stream {
            load: small_ring(1 << 20),
            order: Order::Given(vec![
                "t.31".to_owned(),
                "t.0*".to_owned(),
                "t.31".to_owned(),
            ]),
            ahead: Some(1 << 20),
        };
        let mut names = Vec::new();
        for tensor in checkpoint.stream_to(&device.device, &stream).unwrap() {
            let tensor = tensor.unwrap();
            let wanted = tensors.iter().find(|t| t.name == tensor.name).unwrap();
            assert!(content(&device.device, &tensor) == wanted.data);
            names.push(tensor.name);
        }
        assert_eq!(names.len(), 60);
        assert_eq!(names[..3], ["t.31", "t.00", "t.01"]);
        assert_eq!(names[11..13], ["t.10", "t.11"]);

        let stream = Stream {
            order: Order::Landed,
            ..stream
        };
        let stream = checkpoint.stream_to(&device.device, &stream).unwrap();
        let mut names: Vec<String> = stream.map(|tensor| tensor.unwrap().name).collect();
        names.sort();
        assert!(names.iter().eq(tensors.iter().map(|t| &t.name)));
    }
    let device: Arc<dyn Device> = Arc::new(HostDevice::new(false));
    let unknown = Stream {
        order: Order::Given(vec!["x".to_owned()]),
        ..Default::default()
    };
    assert_eq!(
        checkpoint.stream_to(&device, &unknown).unwrap_err().code(),
        "SELECT"
    );
    let tiny = DeviceLoad {
        staging: Some(1000),
        ..Default::default()
    };
    assert_eq!(
        checkpoint.load_to(&device, &tiny).unwrap_err().code(),
        "STAGING"
    );
}

#[test]
fn a_map_deals_tensors_to_devices_and_targets_may_be_given() {
    let tensors = model(9);
    let (_folder, checkpoint) = saved(&tensors, Some(3000));
    let all = devices();
    let (first, last) = (&all[0], all.last().unwrap());
    let map = DeviceMap::new()
        .to("layers.*", &last.device)
        .to("*", &first.device);
    let memory = first.device.allocate(10_000).unwrap();
    let told = Arc::new(std::sync::Mutex::new(Vec::new()));
    let load = DeviceLoad {
        into: HashMap::from([("mask".to_owned(), (memory.clone(), 77))]),
        progress: Some({
            let told = told.clone();
            Arc::new(move |p: Progress| told.lock().unwrap().push(p))
        }),
        ..Default::default()
    };
    let loaded = checkpoint.load_to(map.clone(), &load).unwrap();
    for tensor in &tensors {
        let found = loaded.get(&tensor.name).unwrap();
        let device = if tensor.name.starts_with("layers.") {
            last
        } else {
            first
        };
        assert_eq!(found.device(), device.device.info().id);
        assert!(content(&device.device, found) == tensor.data);
    }
    assert_eq!(loaded.get("mask").unwrap().offset, 77);
    let told = told.lock().unwrap();
    let total: u64 = tensors.iter().map(|t| t.data.len() as u64).sum();
    assert!(told.iter().all(|p| p.total == total));
    assert_eq!(told.iter().map(|p| p.done).max(), Some(total));
    assert_eq!(checkpoint.report().unwrap().loaded, tensors.len());

    let load = DeviceLoad {
        into: HashMap::from([("mask".to_owned(), (memory, 9_950))]),
        ..Default::default()
    };
    assert_eq!(
        checkpoint.load_to(map, &load).unwrap_err().code(),
        "BUFFER_SIZE"
    );
    let partial = DeviceMap::new().to("layers.*", &first.device);
    let error = checkpoint
        .load_to(partial, &DeviceLoad::default())
        .unwrap_err();
    assert!(error.kind() == ErrorKind::Usage && error.to_string().contains("embed.weight"));
}

#[test]
fn memory_may_come_from_the_caller() {
    let tensors = model(4);
    let (_folder, checkpoint) = saved(&tensors, None);
    let device: Arc<dyn Device> = Arc::new(HostDevice::new(false));
    let asked = Arc::new(std::sync::Mutex::new(Vec::new()));
    let load = DeviceLoad {
        allocate: Some({
            let asked = asked.clone();
            Arc::new(move |device, len| {
                asked.lock().unwrap().push(len);
                device.allocate(len)
            })
        }),
        ..Default::default()
    };
    let loaded = checkpoint.load_to(&device, &load).unwrap();
    let asked = asked.lock().unwrap();
    assert_eq!(asked.len(), 1, "small tensors share a region: {asked:?}");
    assert!(
        loaded
            .tensors()
            .iter()
            .all(|tensor| tensor.memory.len() == asked[0])
    );
    assert_eq!(noise(3, 1), noise(3, 1));
    assert!(matches!(devices()[0].kind, Kind::Host));
}

#[test]
fn device_tensors_are_saved_as_they_are() {
    let tensors = large_model();
    let (_folder, checkpoint) = saved(&tensors, None);
    let target = tempfile::tempdir().unwrap();
    for tried in devices() {
        let loaded = checkpoint
            .load_to(&tried.device, &DeviceLoad::default())
            .unwrap();
        let data: Vec<DeviceData<'_>> = loaded
            .tensors()
            .iter()
            .map(|tensor| DeviceData {
                device: &tried.device,
                memory: &tensor.memory,
                offset: tensor.offset,
                after: None,
            })
            .collect();
        let items: Vec<Item<'_>> = loaded
            .tensors()
            .iter()
            .zip(&data)
            .map(|(tensor, data)| Item {
                name: &tensor.name,
                dtype: tensor.dtype,
                shape: &tensor.shape,
                content: Content::Device(*data),
            })
            .collect();
        let options = Save {
            checksums: true,
            ..Default::default()
        };
        let path = target.path().join("saved.safetensors");
        save_items(&items, &path, &options).unwrap();
        let again = Checkpoint::open(&path).unwrap();
        assert!(common::content(&again) == common::content_of(&tensors));

        let path = target.path().join("written.safetensors");
        let mut writer = Writer::create(&path, &options).unwrap();
        for (tensor, data) in loaded.tensors().iter().zip(&data) {
            writer
                .add_device(&tensor.name, tensor.dtype, &tensor.shape, data)
                .unwrap();
        }
        writer.finish().unwrap();
        let again = Checkpoint::open(&path).unwrap();
        assert!(common::content(&again) == common::content_of(&tensors));

        let short = DeviceData {
            offset: data[0].memory.len(),
            ..data[0]
        };
        let item = Item {
            name: "x",
            dtype: Dtype::U8,
            shape: &[1],
            content: Content::Device(short),
        };
        let error = save_items(&[item], &path, &options).unwrap_err();
        assert_eq!(error.code(), "WRITE_SIZE");
    }
}

#[test]
fn a_wrong_bit_is_told_with_its_tensor() {
    let tensors = large_model();
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("m.safetensors");
    let options = Save {
        checksums: true,
        ..Default::default()
    };
    save(&refs(&tensors), &path, &options).unwrap();
    let load = DeviceLoad {
        verify: true,
        ..small_ring(1 << 20)
    };
    let one = DeviceLoad {
        select: vec!["t1.257".to_owned()],
        ..load.clone()
    };
    for tried in devices() {
        let checkpoint = Checkpoint::open(&path).unwrap();
        checkpoint.load_to(&tried.device, &load).unwrap();
        checkpoint.load_to(&tried.device, &one).unwrap();
        let offset = checkpoint.tensor("t1.257").unwrap().offset() + 100;
        let mut bytes = std::fs::read(&path).unwrap();
        bytes[offset as usize] ^= 4;
        std::fs::write(&path, &bytes).unwrap();
        let checkpoint = Checkpoint::open(&path).unwrap();
        for load in [&load, &one] {
            let error = checkpoint.load_to(&tried.device, load).unwrap_err();
            assert_eq!(error.code(), "CHECKSUM_MISMATCH", "{error}");
            assert!(
                error.to_string().contains("t1.257") || error.to_string().contains("more tensors"),
                "{error}"
            );
            let stream = Stream {
                load: load.clone(),
                ..Default::default()
            };
            let stream = checkpoint.stream_to(&tried.device, &stream).unwrap();
            let error = stream.filter_map(Result::err).next().unwrap();
            assert_eq!(error.code(), "CHECKSUM_MISMATCH", "{error}");
        }
        bytes[offset as usize] ^= 4;
        std::fs::write(&path, &bytes).unwrap();
    }
    let (_plain, checkpoint) = saved(&tensors, None);
    let error = checkpoint.load_to(&devices()[0].device, &load).unwrap_err();
    assert_eq!(error.code(), "NO_CHECKSUMS");
}
