//! What this machine can do at most, for `python -m bench host`:
//! `host_limits direct FILE` reads past the page cache with four threads, 4 MiB at a time, into buffers that
//! are used again; `host_limits pread FILE` makes one read of all of it into fresh huge pages;
//! `host_limits small FILE` and `host_limits huge FILE` read it block by block with a thread a processor into
//! fresh pages of that size, and `host_limits taken FILE` into pages that were taken before the clock starts: what
//! the first two take beyond the third is the price of fresh memory, which whoever owns what it loads has to pay.
//!
//! It uses the system's calls and nothing of the engine. Prints `ready`, waits for a line, works, prints what
//! that took, waits for another.

use std::fs::{File, OpenOptions};
use std::io::{BufRead, stdin};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use tonnage::engine::HostBuffer;
use tonnage::storage::pages;

const THREADS: usize = 4;
const BLOCK: usize = 4 << 20;

fn main() {
    let mut args = std::env::args().skip(1);
    let (mode, path) = (args.next().expect("mode"), args.next().expect("file"));
    let direct = mode == "direct";
    let flags = match direct {
        true => rustix::fs::OFlags::DIRECT.bits() as i32,
        false => 0,
    };
    let file = OpenOptions::new()
        .read(true)
        .custom_flags(flags)
        .open(path)
        .expect("open");
    let len = file.metadata().expect("length").len();
    println!("ready");
    wait();
    let (load, sum) = match mode.as_str() {
        "direct" => (read_direct(&file, len), None),
        "pread" | "small" | "huge" | "taken" => {
            let mut memory = HostBuffer::new(len).expect("memory");
            pages::prefer_huge(memory.as_mut_slice(), mode != "small");
            if mode == "taken" {
                pages::take(memory.as_mut_slice());
            }
            let start = Instant::now();
            match mode.as_str() {
                "pread" => file.read_exact_at(memory.as_mut_slice(), 0).expect("read"),
                _ => read_blocks(&file, memory.as_mut_slice()),
            }
            let load = start.elapsed().as_secs_f64();
            (load, Some(added(memory.as_slice())))
        }
        _ => panic!("direct, pread, small, huge or taken, not {mode}"),
    };
    let all = load + sum.unwrap_or(0.0);
    println!("{{\"load\": {load}, \"all\": {all}, \"sum\": null}}");
    wait();
}

fn wait() {
    stdin().lock().lines().next();
}

fn read_direct(file: &File, len: u64) -> f64 {
    let buffer = || {
        let mut memory = HostBuffer::new(BLOCK as u64).expect("memory");
        pages::take(memory.as_mut_slice());
        memory
    };
    let mut buffers: Vec<HostBuffer> = (0..THREADS).map(|_| buffer()).collect();
    let next = AtomicU64::new(0);
    let start = Instant::now();
    std::thread::scope(|scope| {
        for memory in &mut buffers {
            let next = &next;
            scope.spawn(move || {
                loop {
                    let offset = next.fetch_add(BLOCK as u64, Ordering::Relaxed);
                    if offset >= len {
                        break;
                    }
                    let wanted = (len - offset).min(BLOCK as u64) as usize;
                    let mut got = 0;
                    while got < wanted {
                        let rest = &mut memory.as_mut_slice()[got..];
                        got += file.read_at(rest, offset + got as u64).expect("read");
                    }
                }
            });
        }
    });
    start.elapsed().as_secs_f64()
}

/// A thread a processor, 4 MiB at a time.
fn read_blocks(file: &File, memory: &mut [u8]) {
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    let blocks = Mutex::new(memory.chunks_mut(BLOCK).enumerate());
    std::thread::scope(|scope| {
        for _ in 0..threads {
            scope.spawn(|| {
                loop {
                    let Some((i, block)) = blocks.lock().expect("blocks").next() else {
                        break;
                    };
                    file.read_exact_at(block, (i * BLOCK) as u64).expect("read");
                }
            });
        }
    });
}

/// Seconds that reading every byte once takes.
fn added(bytes: &[u8]) -> f64 {
    let start = Instant::now();
    let (words, _) = bytes.as_chunks::<8>();
    let sum = words.iter().fold(0_u64, |sum, word| {
        sum.wrapping_add(u64::from_le_bytes(*word))
    });
    std::hint::black_box(sum);
    start.elapsed().as_secs_f64()
}
