//! Loading and saving on the host beside the reference crate, in one run:
//! `cargo run --release -p tonnage --example host_speed -- [MiB] [repetitions] [folder]`.
//!
//! Like is compared with like: owned copies with owned copies, views with views, a durable save with the
//! reference's followed by fsync of the file and its folder. Ways alternate within a repetition, so that
//! what else the machine does hits all of them; the best and the median are shown. "Cold" means that the
//! file's pages were dropped from the cache just before.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::time::Instant;

use safetensors::SafeTensors;
use safetensors::tensor::{Dtype as ReferenceDtype, TensorView};
use tonnage::{Checkpoint, Dtype, Durability, Load, Save, TensorData, save};

const TENSORS: usize = 64;

fn main() {
    let mut args = std::env::args().skip(1);
    let mib: usize = args.next().map_or(1024, |n| n.parse().expect("MiB"));
    let repetitions: usize = args.next().map_or(7, |n| n.parse().expect("repetitions"));
    let folder = args.next().map_or_else(std::env::temp_dir, PathBuf::from);
    let path = folder.join(format!(
        "tonnage-host-speed-{}.safetensors",
        std::process::id()
    ));
    let data: Vec<Vec<u8>> = (0..TENSORS)
        .map(|i| content(mib * (1 << 20) / TENSORS, i as u64))
        .collect();
    let names: Vec<String> = (0..TENSORS)
        .map(|i| format!("layers.{i:03}.weight"))
        .collect();
    let bytes = (mib << 20) as f64;
    println!(
        "{mib} MiB in {TENSORS} tensors, {repetitions} repetitions, {}",
        path.display()
    );
    println!(
        "{:<34}{:>10}{:>10}{:>12}",
        "", "best s", "median s", "best GiB/s"
    );

    let ours = |durability| {
        let (path, names, data) = (&path, &names, &data);
        move || {
            let shape = [data[0].len() as u64];
            let tensors: Vec<TensorData<'_>> = (names.iter().zip(data))
                .map(|(name, data)| TensorData {
                    name,
                    dtype: Dtype::U8,
                    shape: &shape,
                    data,
                })
                .collect();
            save(
                &tensors,
                path,
                &Save {
                    durability,
                    ..Save::default()
                },
            )
            .expect("save");
        }
    };
    let reference = |sync: bool| {
        let (path, names, data) = (&path, &names, &data);
        move || reference_save(path, names, data, sync)
    };
    show(
        bytes,
        repetitions,
        || (),
        &mut [
            ("save, no fsync: reference", &mut reference(false)),
            ("save, no fsync: tonnage", &mut ours(Durability::None)),
        ],
    );
    show(
        bytes,
        repetitions,
        || (),
        &mut [
            ("save, durable: reference + fsync", &mut reference(true)),
            ("save, durable: tonnage", &mut ours(Durability::Full)),
        ],
    );
    let warm = || ();
    let cold = || drop_cache(&path);
    load_table(bytes, repetitions, "warm", &warm, &path);
    load_table(bytes, repetitions, "cold", &cold, &path);
    std::fs::remove_file(&path).expect("remove");
}

fn load_table(bytes: f64, repetitions: usize, state: &str, before: &dyn Fn(), path: &Path) {
    let label = |what: &str| format!("{state}, {what}");
    let names = [
        "owned: reference (read file)",
        "owned: reference (map + copy)",
        "owned: tonnage load",
        "view + sum: reference",
        "view + sum: tonnage",
    ];
    let labels: Vec<String> = names.iter().map(|name| label(name)).collect();
    show(
        bytes,
        repetitions,
        before,
        &mut [
            (&labels[0], &mut || {
                let all = std::fs::read(path).expect("read");
                let tensors = SafeTensors::deserialize(&all).expect("parse");
                let owned: Vec<Vec<u8>> = tensors
                    .iter()
                    .map(|(_, view)| view.data().to_vec())
                    .collect();
                std::hint::black_box(owned);
            }),
            (&labels[1], &mut || {
                let map = tonnage::storage::MmapSource::open(path).expect("map");
                let tensors =
                    SafeTensors::deserialize(tonnage::storage::Source::bytes(&map).expect("map"))
                        .expect("parse");
                let owned: Vec<Vec<u8>> = tensors
                    .iter()
                    .map(|(_, view)| view.data().to_vec())
                    .collect();
                std::hint::black_box(owned);
            }),
            (&labels[2], &mut || {
                let loaded = Checkpoint::open(path)
                    .and_then(|c| c.load(&Load::default()))
                    .expect("load");
                std::hint::black_box(&loaded);
            }),
            (&labels[3], &mut || {
                let map = tonnage::storage::MmapSource::open(path).expect("map");
                let tensors =
                    SafeTensors::deserialize(tonnage::storage::Source::bytes(&map).expect("map"))
                        .expect("parse");
                std::hint::black_box(
                    tensors
                        .iter()
                        .map(|(_, view)| sum(view.data()))
                        .sum::<u64>(),
                );
            }),
            (&labels[4], &mut || {
                let checkpoint = Checkpoint::open(path).expect("open");
                std::hint::black_box(
                    checkpoint
                        .iter()
                        .map(|t| sum(t.view().expect("view")))
                        .sum::<u64>(),
                );
            }),
        ],
    );
}

type Way<'a> = (&'a str, &'a mut dyn FnMut());

fn show(bytes: f64, repetitions: usize, before: impl Fn(), ways: &mut [Way<'_>]) {
    let mut times = vec![Vec::new(); ways.len()];
    for _ in 0..repetitions {
        for ((_, way), times) in ways.iter_mut().zip(&mut times) {
            before();
            let start = Instant::now();
            way();
            times.push(start.elapsed().as_secs_f64());
        }
    }
    for ((name, _), times) in ways.iter().zip(&mut times) {
        times.sort_by(f64::total_cmp);
        let (best, median) = (times[0], times[times.len() / 2]);
        println!(
            "{name:<34}{best:>10.3}{median:>10.3}{:>12.2}",
            bytes / best / f64::from(1 << 30)
        );
    }
}

fn reference_save(path: &Path, names: &[String], data: &[Vec<u8>], sync: bool) {
    let views = names.iter().zip(data).map(|(name, data)| {
        (
            name,
            TensorView::new(ReferenceDtype::U8, vec![data.len()], data).expect("view"),
        )
    });
    safetensors::serialize_to_file(views, None, path).expect("save");
    if sync {
        File::open(path)
            .and_then(|file| file.sync_all())
            .expect("fsync");
        tonnage::storage::sync_dir(path.parent().expect("folder")).expect("fsync");
    }
}

fn drop_cache(path: &Path) {
    let file = File::open(path).expect("open");
    file.sync_all().expect("fsync");
    rustix::fs::fadvise(&file, 0, None, rustix::fs::Advice::DontNeed).expect("fadvise");
}

fn sum(bytes: &[u8]) -> u64 {
    let (words, tail) = bytes.as_chunks::<8>();
    let words: u64 = words
        .iter()
        .fold(0, |sum, word| sum.wrapping_add(u64::from_le_bytes(*word)));
    tail.iter()
        .fold(words, |sum, &byte| sum.wrapping_add(byte.into()))
}

fn content(len: usize, seed: u64) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1;
    let mut bytes = vec![0; len];
    for chunk in bytes.chunks_mut(8) {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        chunk.copy_from_slice(&state.to_le_bytes()[..chunk.len()]);
    }
    bytes
}
