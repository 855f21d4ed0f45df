//! Headers beside the reference crate, in one run: time and peak heap of reading and of writing them.
//!
//!     cargo bench -p tonnage --bench header
//!
//! Contenders take turns, and the medians of the thread's processor time are compared, so that others at
//! work on the machine disturb little. Heap is counted in rounds of their own, so that counting costs no time. The table goes to the terminal and to
//! `bench/results/header.json`; a target that is missed ends with status 1.
//!
//! Invariants of the counting allocator:
//! 1. Every call goes to `System` with the caller's own arguments, so the caller's promises to us are our
//!    promises to `System`.
//! 2. What is counted beside it never touches the memory.
#![allow(unsafe_code)]

use std::alloc::{GlobalAlloc, Layout, System};
use std::fmt::Write as _;
use std::hint::black_box;
use std::process::ExitCode;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering::Relaxed};

use safetensors as reference;
use tonnage::compat;
use tonnage::format::{Dtype, Header, ReadOptions, TensorSpec, WriteOptions, layout};

struct Counting;

static ON: AtomicBool = AtomicBool::new(false);
static LIVE: AtomicUsize = AtomicUsize::new(0);
static PEAK: AtomicUsize = AtomicUsize::new(0);

fn grown(bytes: usize) {
    if ON.load(Relaxed) {
        let live = LIVE.fetch_add(bytes, Relaxed) + bytes;
        PEAK.fetch_max(live, Relaxed);
    }
}

fn shrunk(bytes: usize) {
    if ON.load(Relaxed) {
        // What was there before counting began may be freed under it.
        let _ = LIVE.fetch_update(Relaxed, Relaxed, |live| Some(live.saturating_sub(bytes)));
    }
}

// SAFETY: invariants 1 and 2: `System` keeps the contract.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        grown(layout.size());
        // SAFETY: invariant 1.
        unsafe { System.alloc(layout) }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        grown(layout.size());
        // SAFETY: invariant 1.
        unsafe { System.alloc_zeroed(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        shrunk(layout.size());
        // SAFETY: invariant 1.
        unsafe { System.dealloc(pointer, layout) }
    }

    unsafe fn realloc(&self, pointer: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        // While the bytes move, old and new are there: what a peak has to hold.
        grown(size);
        shrunk(layout.size());
        // SAFETY: invariant 1.
        unsafe { System.realloc(pointer, layout, size) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// Bytes of heap that `run` takes at most, beyond what is there before it.
fn peak<T>(run: impl FnOnce() -> T) -> usize {
    LIVE.store(0, Relaxed);
    PEAK.store(0, Relaxed);
    ON.store(true, Relaxed);
    let result = black_box(run());
    ON.store(false, Relaxed);
    drop(result);
    PEAK.load(Relaxed)
}

/// Processor time of this thread.
fn cpu_nanos() -> f64 {
    let time = rustix::time::clock_gettime(rustix::time::ClockId::ThreadCPUTime);
    time.tv_sec as f64 * 1e9 + time.tv_nsec as f64
}

/// One way to do a job. `run` gives the nanoseconds of one turn; dropping the result is not timed.
struct Contender<'a> {
    name: &'static str,
    run: Box<dyn Fn() -> f64 + 'a>,
    peak: Box<dyn Fn() -> usize + 'a>,
}

fn contender<'a, T>(name: &'static str, job: impl Fn() -> T + Copy + 'a) -> Contender<'a> {
    Contender {
        name,
        run: Box::new(move || {
            let start = cpu_nanos();
            let result = black_box(job());
            let time = cpu_nanos() - start;
            drop(result);
            time
        }),
        peak: Box::new(move || peak(job)),
    }
}

/// One line of the table.
struct Row {
    job: &'static str,
    tensors: usize,
    name: &'static str,
    micros: f64,
    heap: usize,
    time_ratio: f64,
    heap_ratio: f64,
    /// Most that the ratios may be.
    targets: Option<(f64, Option<f64>)>,
}

impl Row {
    fn met(&self) -> bool {
        self.targets.is_none_or(|(time, heap)| {
            self.time_ratio <= time && heap.is_none_or(|heap| self.heap_ratio <= heap)
        })
    }
}

type Target = (f64, Option<f64>);

/// The first contender is the reference; `target` holds for those that are marked.
fn compare(
    job: &'static str,
    tensors: usize,
    contenders: &[(Contender<'_>, bool)],
    target: Target,
) -> Vec<Row> {
    let rounds = if tensors > 10_000 { 25 } else { 400 };
    let mut times = vec![Vec::with_capacity(rounds); contenders.len()];
    for round in 0..rounds + rounds / 5 {
        for ((contender, _), times) in contenders.iter().zip(&mut times) {
            let time = (contender.run)();
            // The first rounds warm caches and branch predictors.
            if round >= rounds / 5 {
                times.push(time);
            }
        }
    }
    let medians: Vec<f64> = times.iter_mut().map(|times| median(times)).collect();
    let heaps: Vec<usize> = contenders.iter().map(|(c, _)| (c.peak)()).collect();
    let row = |at: usize| Row {
        job,
        tensors,
        name: contenders[at].0.name,
        micros: medians[at] / 1e3,
        heap: heaps[at],
        time_ratio: medians[at] / medians[0],
        heap_ratio: heaps[at] as f64 / heaps[0] as f64,
        targets: contenders[at].1.then_some(target),
    };
    (0..contenders.len()).map(row).collect()
}

fn median(times: &mut [f64]) -> f64 {
    times.sort_unstable_by(f64::total_cmp);
    times[times.len() / 2]
}

/// Names as decoder models with experts have them: `model.layers.12.self_attn.q_proj.weight`.
fn names(count: usize) -> Vec<String> {
    const PARTS: [&str; 8] = [
        "input_layernorm.weight",
        "post_attention_layernorm.weight",
        "self_attn.k_proj.weight",
        "self_attn.o_proj.weight",
        "self_attn.q_proj.weight",
        "self_attn.v_proj.weight",
        "mlp.gate.weight",
        "self_attn.q_norm.weight",
    ];
    let experts = if count > 10_000 { 512 } else { 4 };
    let mut names = vec![
        "lm_head.weight".to_owned(),
        "model.embed_tokens.weight".to_owned(),
        "model.norm.weight".to_owned(),
    ];
    for layer in 0.. {
        names.extend(
            PARTS
                .iter()
                .map(|part| format!("model.layers.{layer}.{part}")),
        );
        for expert in 0..experts {
            for projection in ["down", "gate", "up"] {
                names.push(format!(
                    "model.layers.{layer}.mlp.experts.{expert}.{projection}_proj.weight"
                ));
            }
        }
        if names.len() >= count {
            break;
        }
    }
    names.truncate(count);
    names
}

fn dtype(name: &str) -> Dtype {
    if name.contains("norm") {
        Dtype::F32
    } else {
        Dtype::BF16
    }
}

/// Reading a whole header: `shape` is that of each tensor.
fn read(count: usize) -> Vec<Row> {
    let names = names(count);
    let specs: Vec<TensorSpec<'_>> = names
        .iter()
        .map(|name| TensorSpec {
            name,
            dtype: dtype(name),
            shape: &[32, 16],
        })
        .collect();
    let metadata = [("format", "pt")];
    let plan = layout(&specs, Some(&metadata), &WriteOptions::default()).expect("a valid layout");
    let mut file = plan.header;
    file.resize(plan.file_len as usize, 0);
    let bytes = &file[..];
    let parse = || Header::parse(bytes, Some(bytes.len() as u64), &ReadOptions::strict());
    let contenders = [
        (
            contender("reference: SafeTensors::deserialize", || {
                reference::SafeTensors::deserialize(bytes)
            }),
            false,
        ),
        (contender("format: Header::parse", parse), true),
        (
            contender("compat: SafeTensors::deserialize", || {
                compat::SafeTensors::deserialize(bytes)
            }),
            true,
        ),
    ];
    let mut rows = compare("read", count, &contenders, (0.20, Some(0.50)));
    let contenders = [
        (
            contender("reference: SafeTensors::read_metadata", || {
                reference::SafeTensors::read_metadata(bytes)
            }),
            false,
        ),
        (
            contender("compat: SafeTensors::read_metadata", || {
                compat::SafeTensors::read_metadata(bytes)
            }),
            true,
        ),
    ];
    let owned = compare("read, owned", count, &contenders, (0.20, Some(0.50)));
    rows.extend(owned);
    rows
}

/// Writing a file whose data is two bytes or four a tensor, so that the header is the work. The target is
/// for laying out headers; `compat` also sorts by keys of any type and copies the data.
fn write(count: usize) -> Vec<Row> {
    let names = names(count);
    let data = [0_u8; 4];
    let bytes = |name: &str| &data[..dtype(name).bitsize() / 8];
    // The reference is given its tensors as its users have them, in a hash map; so are we.
    let theirs: std::collections::HashMap<&str, reference::tensor::TensorView<'_>> = names
        .iter()
        .map(|name| {
            let dtype = match dtype(name) {
                Dtype::F32 => reference::Dtype::F32,
                _ => reference::Dtype::BF16,
            };
            let view = reference::tensor::TensorView::new(dtype, vec![1, 1], bytes(name));
            (name.as_str(), view.expect("a valid view"))
        })
        .collect();
    let ours: std::collections::HashMap<&str, compat::TensorView<'_>> = names
        .iter()
        .map(|name| {
            let view = compat::TensorView::new(dtype(name), vec![1, 1], bytes(name));
            (name.as_str(), view.expect("a valid view"))
        })
        .collect();
    let shape = [1_u64, 1];
    let specs: Vec<TensorSpec<'_>> = ours
        .iter()
        .map(|(name, view)| TensorSpec {
            name,
            dtype: view.dtype(),
            shape: &shape,
        })
        .collect();
    assert_eq!(
        reference::serialize(&theirs, None).expect("valid"),
        compat::serialize(&ours, None).expect("valid"),
        "the same bytes, or the comparison is none"
    );
    let contenders = [
        (
            contender("reference: serialize", || {
                reference::serialize(&theirs, None)
            }),
            false,
        ),
        (
            contender("format: layout", || {
                layout(&specs, None, &WriteOptions::default())
            }),
            true,
        ),
        (
            contender("compat: serialize", || compat::serialize(&ours, None)),
            false,
        ),
    ];
    compare("write", count, &contenders, (0.30, None))
}

/// This machine in words.
fn machine() -> String {
    let info = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let model = info
        .lines()
        .find_map(|line| line.strip_prefix("model name"));
    let model = model.map_or("unknown processor", |model| {
        model.trim_start_matches([' ', '\t', ':'])
    });
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    format!(
        "{model}, {cores} cores, {} {}",
        std::env::consts::OS,
        std::env::consts::ARCH
    )
}

fn table(rows: &[Row]) -> String {
    let mut text = String::new();
    for row in rows {
        let verdict = match (row.targets, row.met()) {
            (None, _) => String::new(),
            (Some((time, heap)), met) => {
                let heap = heap.map_or(String::new(), |heap| format!(", heap {heap:.2}"));
                let word = if met { "met" } else { "MISSED" };
                format!("target time {time:.2}{heap}: {word}")
            }
        };
        let _ = writeln!(
            text,
            "{:12} {:>7} {:40} {:>11.1} µs {:>6.3}× {:>10} B {:>6.3}×  {verdict}",
            row.job, row.tensors, row.name, row.micros, row.time_ratio, row.heap, row.heap_ratio
        );
    }
    text
}

fn json(rows: &[Row]) -> serde_json::Value {
    let row = |row: &Row| {
        serde_json::json!({
            "job": row.job,
            "tensors": row.tensors,
            "contender": row.name,
            "median_cpu_us": row.micros,
            "time_ratio": row.time_ratio,
            "peak_heap_bytes": row.heap,
            "peak_heap_ratio": row.heap_ratio,
            "target_time_ratio": row.targets.map(|(time, _)| time),
            "target_heap_ratio": row.targets.and_then(|(_, heap)| heap),
            "met": row.met(),
        })
    };
    serde_json::json!({
        "command": "cargo bench -p tonnage --bench header",
        "machine": machine(),
        "reference": "safetensors 0.8.0 (crate)",
        "rows": rows.iter().map(row).collect::<Vec<_>>(),
    })
}

fn main() -> ExitCode {
    let mut rows = Vec::new();
    for count in [1_000, 100_000] {
        rows.extend(read(count));
        rows.extend(write(count));
    }
    print!("{}\n{}", machine(), format_args!("\n{}", table(&rows)));
    let path = concat!(
        env!("CARGO_MANIFEST_DIR"),
        "/../../bench/results/header.json"
    );
    let text = format!("{:#}\n", json(&rows));
    if let Err(error) = std::fs::write(path, text) {
        eprintln!("cannot write {path}: {error}");
        return ExitCode::FAILURE;
    }
    if rows.iter().all(Row::met) {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    }
}
