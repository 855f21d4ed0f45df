//! How fast checkpoints reach a device: the first tensor of a large file, many small tensors, all of a file.
//!
//! ```text
//! cargo run --release -p tonnage --example device_speed -- DEVICE [FOLDER [GIB]]
//! ```
//!
//! DEVICE is `cpu` (by copies, as to a card), `stub` (the CUDA driver for tests), or the name of a device
//! such as `cuda:0` or `vulkan:0`. The files are made in FOLDER and removed. Both sides of a ratio run in turns.

use std::error::Error;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Instant;

use tonnage::device::{Device, HostDevice, Pool, Transfer, find};
use tonnage::format::{TensorSpec, WriteOptions, layout};
use tonnage::storage::{AtomicFile, AtomicOptions, Durability, Sink};
use tonnage::{Checkpoint, DeviceLoad, Dtype, Stream};

type Outcome<T> = Result<T, Box<dyn Error>>;

const MIB: u64 = 1 << 20;
const ROUNDS: usize = 5;
const SMALL: usize = 100_000;

fn main() -> Outcome<()> {
    let mut args = std::env::args().skip(1);
    let name = args.next().unwrap_or_else(|| "cpu".to_owned());
    let folder = args.next().map_or_else(std::env::temp_dir, PathBuf::from);
    let gib: u64 = args.next().map_or(Ok(4), |text| text.parse())?;
    let device = open(&name)?;
    println!("{}: {}", device.info().id, device.info().name);
    first_tensor(&device, &folder, gib)?;
    small_tensors(&device, &folder)?;
    Ok(())
}

fn open(name: &str) -> Outcome<Arc<dyn Device>> {
    Ok(match name {
        "cpu" => Arc::new(HostDevice::new(false)),
        #[cfg(target_os = "linux")]
        "stub" => {
            let kind = tonnage::device::Kind::Cuda;
            let path = tonnage_stubdriver::find::path();
            let driver = tonnage::device::driver::Driver::open_at(kind, &path)?;
            Arc::new(driver.device(0)?)
        }
        name => find::open(name.parse()?, &find::Settings::default())?,
    })
}

/// A file of these tensors of bytes that are not all the same, in the page cache.
fn write(path: &Path, lens: impl Iterator<Item = u64>) -> Outcome<()> {
    let tensors: Vec<(String, [u64; 1])> = lens
        .enumerate()
        .map(|(i, len)| (format!("t.{i:06}"), [len]))
        .collect();
    let spec =
        |(name, shape): &'_ (String, [u64; 1])| -> (String, [u64; 1]) { (name.clone(), *shape) };
    let owned: Vec<(String, [u64; 1])> = tensors.iter().map(spec).collect();
    let specs: Vec<TensorSpec<'_>> = owned
        .iter()
        .map(|(name, shape)| TensorSpec {
            name,
            dtype: Dtype::U8,
            shape,
        })
        .collect();
    let layout = layout(&specs, None, &WriteOptions::default())?;
    let options = AtomicOptions {
        durability: Durability::None,
        ..Default::default()
    };
    let file = AtomicFile::create(path, &options)?;
    file.write_all_at(0, &layout.header)?;
    let block: Vec<u8> = (0..8 * MIB).map(|i| (i * 31 % 251) as u8).collect();
    let mut at = layout.data_start();
    while at < layout.file_len {
        let len = (layout.file_len - at).min(block.len() as u64);
        file.write_all_at(at, &block[..len as usize])?;
        at += len;
    }
    file.commit()?;
    Ok(())
}

fn median(mut times: Vec<f64>) -> f64 {
    times.sort_by(f64::total_cmp);
    times[times.len() / 2]
}

fn first_tensor(device: &Arc<dyn Device>, folder: &Path, gib: u64) -> Outcome<()> {
    let path = folder.join("tonnage-device-speed.safetensors");
    write(&path, (0..gib << 6).map(|_| 16 * MIB))?;
    let (mut first, mut all) = (Vec::new(), Vec::new());
    for _ in 0..ROUNDS {
        let begin = Instant::now();
        let checkpoint = Checkpoint::open(&path)?;
        let mut stream = checkpoint.stream_to(device, &Stream::default())?;
        stream.next().ok_or("a tensor")??;
        first.push(begin.elapsed().as_secs_f64() * 1e3);
        for tensor in stream.by_ref() {
            tensor?;
        }
        all.push((gib << 30) as f64 / begin.elapsed().as_secs_f64() / 1e9);
    }
    println!(
        "warm, {gib} GiB: first of {} tensors after {:.1} ms (all: {first:.1?})",
        gib << 6,
        median(first.clone())
    );
    println!(
        "warm, {gib} GiB: all of a stream at {:.2} GB/s",
        median(all)
    );
    std::fs::remove_file(&path)?;
    Ok(())
}

fn small_tensors(device: &Arc<dyn Device>, folder: &Path) -> Outcome<()> {
    let path = folder.join("tonnage-device-small.safetensors");
    write(&path, (0..SMALL as u64).map(|i| 500 + i % 1000))?;
    let checkpoint = Checkpoint::open(&path)?;
    let (mut ours, mut each) = (Vec::new(), Vec::new());
    for _ in 0..ROUNDS {
        let begin = Instant::now();
        let loaded = checkpoint.load_to(device, &DeviceLoad::default())?;
        ours.push(begin.elapsed().as_secs_f64());
        drop(loaded);
        let begin = Instant::now();
        let one_by_one = per_tensor(device, &checkpoint)?;
        each.push(begin.elapsed().as_secs_f64());
        drop(one_by_one);
    }
    let (ours, each) = (median(ours), median(each));
    println!(
        "{SMALL} small tensors: {:.0} ms, one by one {:.0} ms: {:.3} of it",
        ours * 1e3,
        each * 1e3,
        ours / each
    );
    std::fs::remove_file(&path)?;
    Ok(())
}

/// What a loader without a plan does: for each tensor memory of its own, a read, a copy.
fn per_tensor(
    device: &Arc<dyn Device>,
    checkpoint: &Checkpoint,
) -> Outcome<Vec<tonnage::device::Memory>> {
    let pool = Pool::new(64 << 10);
    let mut slot = pool
        .lend(&**device, 64 << 10, 1, 1, &|| false)?
        .pop()
        .ok_or("a slot")?;
    let mut queue = device.queue()?;
    let mut all = Vec::with_capacity(checkpoint.len());
    for tensor in checkpoint.iter() {
        let len = tensor.byte_len() as usize;
        tensor.read_into(&mut slot.bytes_mut()[..len])?;
        let memory = device.allocate(len as u64)?;
        slot = queue
            .upload(slot, vec![Transfer::plain(memory.clone(), 0, 0, len)])?
            .wait()?;
        all.push(memory);
    }
    Ok(all)
}
