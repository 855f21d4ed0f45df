//! Claim: a rank gets exactly the bytes that its plan says, by every way to read them, in host memory and on devices;
//! what it reads is counted, and is hardly more than it needs where its parts are whole ranges.

#![cfg(target_os = "linux")]

mod common;
mod device;
#[path = "../../device/tests/drivers/mod.rs"]
mod drivers;

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use common::{Tensor, refs};
use device::{content, devices};
use tempfile::TempDir;
use tonnage::cast::{cast, cast_len, castable};
use tonnage::device::driver::Driver;
use tonnage::device::{Device, Kind, Pool, vulkan};
use tonnage::engine::{Cancel, Progress, Strategy};
use tonnage::plan::{
    IoProfile, Local, Mesh, Plan, PlanLoad, PlannedLoad, Request, Rules, Way, explain, html,
};
use tonnage::storage::{self, Source};
use tonnage::{Checkpoint, DeviceLoad, Dtype, OnProgressOf, Order, Save, Stream, save};
use tonnage_stubdriver::find::{Live, Stub};

fn tensors() -> Vec<Tensor> {
    let mut made = vec![
        Tensor::new("wide", Dtype::BF16, &[700, 3000], 1),
        Tensor::new("tall", Dtype::F32, &[1310, 700], 2),
        Tensor::new("stack", Dtype::U8, &[8, 96, 1000], 3),
        Tensor::new("qkv", Dtype::F16, &[96, 256], 4),
        Tensor::new("turned", Dtype::BF16, &[300, 500], 5),
        Tensor::new("scalar", Dtype::F32, &[], 6),
        Tensor::new("nothing", Dtype::F32, &[0, 4], 7),
        Tensor::new("packed", Dtype::F4, &[64, 128], 8),
        Tensor::new("norm", Dtype::F32, &[1001], 9),
    ];
    for at in 0..8 {
        made.push(Tensor::new(
            &format!("expert.{at}"),
            Dtype::U8,
            &[64, 300],
            10 + at,
        ));
    }
    made
}

/// Placements of all kinds on two axes, and targets that are put together.
const REQUEST: &str = r#"{"mesh": [["pp", 2], ["tp", 4]], "targets": [
  {"name": "wide", "place": {"tp": {"shard": {"dim": 1}}}},
  {"name": "tall", "place": {"pp": {"shard": {"dim": 0, "uneven": "balanced"}}, "tp": {"shard": {"dim": 1}}}},
  {"name": "stack", "place": {"tp": {"shard": {"dim": 2}}}},
  {"name": "qkv", "place": {"tp": {"segments": {"dim": 0, "sizes": [64, 16, 16],
     "each": [{"shard": {"dim": 0}}, {"shard": {"dim": 0}}, "replicate"]}}}},
  {"name": "turned", "expr": {"permute": {"of": {"source": "turned"}, "dims": [1, 0]}},
   "place": {"tp": {"shard": {"dim": 0}}}},
  {"name": "scalar"}, {"name": "nothing"},
  {"name": "packed", "place": {"tp": {"shard": {"dim": 1}}}},
  {"name": "norm", "expr": {"pad": {"of": {"source": "norm"}, "dim": 0, "before": 0, "after": 23}},
   "place": {"tp": {"shard": {"dim": 0}}}},
  {"name": "experts", "place": {"tp": {"shard": {"dim": 0}}}, "expr": {"stack": {"dim": 0, "of": [
    {"source": "expert.0"}, {"source": "expert.1"}, {"source": "expert.2"}, {"source": "expert.3"},
    {"source": "expert.4"}, {"source": "expert.5"}, {"source": "expert.6"}, {"source": "expert.7"}]}}}
]}"#;

fn saved(tensors: &[Tensor]) -> (TempDir, Checkpoint) {
    let folder = tempfile::tempdir().unwrap();
    let options = Save {
        max_shard_size: Some(4 << 20),
        ..Save::default()
    };
    save(&refs(tensors), folder.path().join("m"), &options).unwrap();
    let checkpoint = Checkpoint::open(folder.path().join("m")).unwrap();
    (folder, checkpoint)
}

fn planned(checkpoint: &Checkpoint) -> Plan {
    let request = Request::from_json(REQUEST).unwrap();
    checkpoint.plan_request(&request).unwrap()
}

/// What a local tensor is, copied run by run from whole files.
fn expected(local: &Local, files: &[Vec<u8>]) -> Vec<u8> {
    let mut bytes = vec![0; local.bytes() as usize];
    for nest in &local.nests {
        let file = &files[nest.file as usize];
        let mut at = vec![(nest.src / 8, nest.dst / 8)];
        for one in &nest.loops {
            let steps = |k: u64| (k * one.src / 8, k * one.dst / 8);
            at = (at.iter())
                .flat_map(|&(src, dst)| {
                    (0..one.extent).map(move |k| (src + steps(k).0, dst + steps(k).1))
                })
                .collect();
        }
        let run = (nest.run / 8) as usize;
        for (src, dst) in at {
            let (src, dst) = (src as usize, dst as usize);
            bytes[dst..dst + run].copy_from_slice(&file[src..src + run]);
        }
    }
    bytes
}

fn files_of(plan: &Plan) -> Vec<Vec<u8>> {
    let files = plan.files().iter();
    files
        .map(|file| std::fs::read(&file.label).unwrap())
        .collect()
}

#[test]
fn every_rank_gets_its_bytes_by_every_way() {
    let (_folder, checkpoint) = saved(&tensors());
    let plan = planned(&checkpoint);
    let files = files_of(&plan);
    let bound = checkpoint.with_plan(&plan).unwrap();
    let profiles = IoProfile::ALL.map(Some).into_iter().chain([None]);
    let mut ways = std::collections::BTreeSet::new();
    for (at, profile) in profiles.enumerate() {
        for strategy in [
            Strategy::Auto,
            Strategy::Direct,
            Strategy::Buffered,
            Strategy::Mmap,
        ] {
            for rank in 0..8 {
                let load = PlanLoad {
                    profile,
                    strategy,
                    staging: Some([1 << 20, 64 << 20][at % 2]),
                    threads: Some(1 + at % 3),
                    ..PlanLoad::default()
                };
                let loaded = bound.load(rank, &load).unwrap();
                let locals = bound.locals(rank).unwrap();
                assert_eq!(loaded.iter().len(), locals.len());
                for (local, (tensor, bytes)) in locals.iter().zip(loaded.iter()) {
                    assert_eq!(
                        (&*local.name, &*local.shape),
                        (&*tensor.name, &tensor.shape[..])
                    );
                    assert!(
                        bytes == expected(local, &files),
                        "{} by {strategy}",
                        local.name
                    );
                }
                let report = loaded.report();
                assert!(report.bytes_needed <= report.bytes_read, "{report:?}");
                assert!(report.peak_staging <= load.staging.unwrap(), "{report:?}");
            }
        }
        let io = bound.io(3, profile).unwrap();
        ways.extend(io.tensors.iter().map(|tensor| tensor.way));
    }
    assert_eq!(ways.len(), 4, "every way is seen: {ways:?}");
}

#[test]
fn casts_on_the_way_are_those_of_whole_tensors() {
    let (_folder, checkpoint) = saved(&tensors());
    let plan = planned(&checkpoint);
    let files = files_of(&plan);
    let bound = checkpoint.with_plan(&plan).unwrap();
    for (to, profile) in [
        (Dtype::F32, IoProfile::NVME),
        (Dtype::BF16, IoProfile::PAGE_CACHE),
        (Dtype::F64, IoProfile::S3),
    ] {
        let load = PlanLoad {
            dtype: Some(to),
            profile: Some(profile),
            ..PlanLoad::default()
        };
        let loaded = bound.load(2, &load).unwrap();
        for (local, (tensor, bytes)) in bound.locals(2).unwrap().iter().zip(loaded.iter()) {
            let plain = expected(local, &files);
            let becomes = if castable(local.dtype, to) {
                to
            } else {
                local.dtype
            };
            let mut wanted =
                vec![0; cast_len(local.dtype, plain.len() as u64, becomes).unwrap() as usize];
            cast(local.dtype, &plain, becomes, &mut wanted).unwrap();
            assert_eq!(tensor.dtype, becomes);
            assert!(bytes == wanted, "{} to {to}", local.name);
        }
    }
}

#[test]
fn elements_at_odd_bytes_are_cast_too() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("odd.safetensors");
    let values: Vec<u8> = common::noise(40 * 60 * 2, 5);
    let header = format!(
        r#"{{"a":{{"dtype":"U8","shape":[3],"data_offsets":[0,3]}},"b":{{"dtype":"BF16","shape":[40,60],"data_offsets":[3,{}]}}}}"#,
        3 + values.len()
    );
    let mut file = (header.len() as u64).to_le_bytes().to_vec();
    file.extend(header.as_bytes());
    file.extend([1, 2, 3]);
    file.extend(&values);
    std::fs::write(&path, &file).unwrap();
    let checkpoint = Checkpoint::open(&path).unwrap();
    let rules = r#"{"b": {"shard": {"dim": 1}}, "*": "replicate"}"#;
    let mesh = Mesh::new(&[("tp", 2)]).unwrap();
    let plan = checkpoint
        .plan(&mesh, &Rules::from_json(rules).unwrap())
        .unwrap();
    let bound = checkpoint.with_plan(&plan).unwrap();
    let load = PlanLoad {
        dtype: Some(Dtype::F32),
        ..PlanLoad::default()
    };
    for rank in 0..2 {
        let loaded = bound.load(rank, &load).unwrap();
        let local = &bound.locals(rank).unwrap()[1];
        let plain = expected(local, std::slice::from_ref(&file));
        let mut wanted = vec![0; plain.len() * 2];
        cast(Dtype::BF16, &plain, Dtype::F32, &mut wanted).unwrap();
        assert!(loaded.get("b").unwrap().1 == wanted);
    }
}

/// First bytes and ends of ranges that were asked for.
type Touched = Arc<std::sync::Mutex<Vec<(u64, u64)>>>;

/// A source that counts what is asked of it.
#[derive(Debug)]
struct Counted {
    inner: Arc<dyn Source>,
    asked: Arc<AtomicU64>,
    touched: Touched,
}

impl Source for Counted {
    fn label(&self) -> &str {
        self.inner.label()
    }

    fn len(&self) -> u64 {
        self.inner.len()
    }

    fn read_exact_at(&self, offset: u64, dst: &mut [u8]) -> Result<(), storage::Error> {
        self.asked.fetch_add(dst.len() as u64, Ordering::Relaxed);
        let end = offset + dst.len() as u64;
        self.touched.lock().unwrap().push((offset, end));
        self.inner.read_exact_at(offset, dst)
    }
}

/// Bytes that each rank asks of its files, and whether all ranks together asked for every byte of the data.
fn asked(checkpoint: &Checkpoint, plan: &Plan, profile: IoProfile) -> (Vec<(u64, u64)>, bool) {
    let mut ranks = Vec::new();
    let touched: Vec<Touched> = checkpoint.files().iter().map(|_| Arc::default()).collect();
    for rank in 0..plan.mesh().size() {
        let count = Arc::new(AtomicU64::new(0));
        let sources = (0..checkpoint.files().len()).map(|at| {
            Arc::new(Counted {
                inner: Arc::clone(checkpoint.source(at).unwrap()),
                asked: Arc::clone(&count),
                touched: Arc::clone(&touched[at]),
            }) as Arc<dyn Source>
        });
        let bound = PlannedLoad::new(plan, sources.collect()).unwrap();
        let load = PlanLoad {
            profile: Some(profile),
            ..PlanLoad::default()
        };
        let loaded = bound.load(rank, &load).unwrap();
        let report = loaded.report();
        assert_eq!(
            count.load(Ordering::Relaxed),
            report.bytes_read,
            "the report is true"
        );
        assert_eq!(
            report.bytes_read,
            bound.io(rank, Some(profile)).unwrap().read
        );
        ranks.push((report.bytes_needed, report.bytes_read));
    }
    let all = checkpoint
        .files()
        .iter()
        .zip(&touched)
        .all(|(file, touched)| {
            let mut touched = touched.lock().unwrap().clone();
            touched.sort_unstable();
            let mut reach = file.data_start;
            for (begin, end) in touched {
                if begin > reach {
                    return false;
                }
                reach = reach.max(end);
            }
            reach == file.len
        });
    (ranks, all)
}

/// A model of layers, with small tensors between the large ones.
fn model() -> Vec<Tensor> {
    let mut made = Vec::new();
    for layer in 0..4 {
        let name = |what: &str| format!("layers.{layer}.{what}");
        made.push(Tensor::new(&name("norm"), Dtype::F32, &[512], layer));
        made.push(Tensor::new(
            &name("up"),
            Dtype::BF16,
            &[1024, 512],
            10 + layer,
        ));
        made.push(Tensor::new(
            &name("down"),
            Dtype::BF16,
            &[64, 8192],
            20 + layer,
        ));
        made.push(Tensor::new(&name("bias"), Dtype::F32, &[1024], 30 + layer));
        made.push(Tensor::new(
            &name("experts"),
            Dtype::BF16,
            &[8, 64, 256],
            40 + layer,
        ));
    }
    made
}

#[test]
fn whole_ranges_are_read_once_and_strided_parts_as_the_cost_model_says() {
    let (_folder, checkpoint) = saved(&model());
    let plan = |mesh: &[(&str, u32)], rules: &str| {
        let mesh = Mesh::new(mesh).unwrap();
        checkpoint
            .plan(&mesh, &Rules::from_json(rules).unwrap())
            .unwrap()
    };
    let rows = r#"{"*.norm": "replicate", "*": {"shard": {"dim": 0}}}"#;
    let experts = r#"{"*.experts": {"shard": {"dim": 0}}, "*": "replicate"}"#;
    let stages =
        r#"{"layers.0.*": {"owner": [0]}, "layers.1.*": {"owner": [0]}, "*": {"owner": [1]}}"#;
    for (what, plan) in [
        ("rows", plan(&[("tp", 4)], rows)),
        ("experts", plan(&[("ep", 4)], experts)),
        ("stages", plan(&[("pp", 2)], stages)),
    ] {
        for profile in IoProfile::ALL {
            let (ranks, all) = asked(&checkpoint, &plan, profile);
            assert!(all, "{what}: the ranks together read all of the files");
            for (needed, read) in ranks {
                let ratio = read as f64 / needed as f64;
                assert!(ratio <= 1.05, "{what} as from {}: {ratio}", profile.name);
            }
        }
    }
    // Half of each row: whole blocks, where a disk is asked; only what is needed, where the page cache is.
    let columns = plan(
        &[("tp", 2)],
        r#"{"*.down": {"shard": {"dim": 1}}, "*": "replicate"}"#,
    );
    let cold = columns.io(0, &IoProfile::NVME).unwrap();
    let cached = columns.io(0, &IoProfile::PAGE_CACHE).unwrap();
    assert!(cold.amplification() > 1.1 && cached.amplification() < 1.05);
    assert!(cold.tensors.iter().any(|tensor| tensor.way == Way::Blocks));
    assert!(cached.tensors.iter().any(|tensor| tensor.way == Way::Runs));
    let (ranks, all) = asked(&checkpoint, &columns, IoProfile::NVME);
    assert!(all && ranks[0] == (cold.needed, cold.read));
}

/// Every rank's tensors there, at once, as a stream, and cast.
fn same_on(name: &str, device: &Arc<dyn Device>) {
    let (_folder, checkpoint) = saved(&tensors());
    let plan = planned(&checkpoint);
    let files = files_of(&plan);
    let bound = checkpoint.with_plan(&plan).unwrap();
    for staging in [256 << 10, 32 << 20] {
        let pool = Pool::new(staging);
        let load = DeviceLoad {
            staging: Some(staging),
            pool: Some(pool.clone()),
            threads: Some(2),
            ..DeviceLoad::default()
        };
        for rank in [0, 3, 5] {
            let locals = bound.locals(rank).unwrap();
            let loaded = bound.load_to(rank, device, &load).unwrap();
            assert_eq!(loaded.tensors().len(), locals.len());
            for (local, tensor) in locals.iter().zip(loaded.tensors()) {
                let found = content(device, tensor);
                assert!(found == expected(local, &files), "{} on {name}", local.name);
            }
            let stream = Stream {
                load: load.clone(),
                order: Order::Given(vec!["*".to_owned()]),
                ahead: Some(1 << 20),
            };
            let streamed = bound.stream_to(rank, device, &stream).unwrap();
            for (local, tensor) in locals.iter().zip(streamed) {
                let tensor = tensor.unwrap();
                assert_eq!(*local.name, *tensor.name);
                let found = content(device, &tensor);
                assert!(found == expected(local, &files), "{} on {name}", local.name);
            }
        }
        pool.trim();
    }
    let cast = DeviceLoad {
        dtype: Some(Dtype::F32),
        ..DeviceLoad::default()
    };
    let there = bound.load_to(1, device, &cast).unwrap();
    let load = PlanLoad {
        dtype: Some(Dtype::F32),
        ..PlanLoad::default()
    };
    let here = bound.load(1, &load).unwrap();
    for tensor in there.tensors() {
        let (_, wanted) = here.get(&tensor.name).unwrap();
        assert!(
            content(device, tensor) == wanted,
            "{} as F32 on {name}",
            tensor.name
        );
    }
    Pool::global().trim();
}

#[test]
fn devices_get_the_same_bytes() {
    for one in devices() {
        same_on(one.name, &one.device);
    }
}

#[test]
fn stub_cards_get_the_same_bytes() {
    let stub = Stub::begin("");
    for kind in [Kind::Cuda, Kind::Rocm] {
        stub.again("MEM_MIB=64\nDELAY_US=50");
        let driver = Driver::open_at(kind, stub.path()).unwrap();
        let device: Arc<dyn Device> = Arc::new(driver.device(0).unwrap());
        same_on(&format!("{kind:?}"), &device);
        drop((device, driver));
        assert_eq!(
            (stub.live(), stub.violations()),
            (Live::default(), 0),
            "{kind:?}"
        );
    }
}

#[test]
fn vulkan_gets_the_same_bytes() {
    drivers::on("lavapipe", "vulkan_gets_the_same_bytes", || {
        for force_staging in [false, true] {
            let settings = vulkan::Settings {
                library: None,
                force_staging,
                driver_pages: false,
            };
            let device: Arc<dyn Device> = vulkan::open(0, &settings).unwrap();
            same_on("vulkan", &device);
        }
    });
}

#[test]
fn a_stream_gives_tensors_in_order_and_ends_when_told() {
    let (_folder, checkpoint) = saved(&tensors());
    let plan = planned(&checkpoint);
    let files = files_of(&plan);
    let bound = checkpoint.with_plan(&plan).unwrap();
    let locals = bound.locals(6).unwrap();
    for ahead in [1, 300_000, 1 << 30] {
        let mut expected_next = locals.iter();
        let ran = bound.stream(6, &PlanLoad::default(), ahead, &mut |tensor| {
            let local = expected_next.next().unwrap();
            assert_eq!(
                (&*local.name, &*local.shape),
                (&*tensor.name, &tensor.shape[..])
            );
            assert!(tensor.bytes() == expected(local, &files), "{}", local.name);
            Ok(())
        });
        assert!(ran.unwrap().report.bytes > 0 && expected_next.next().is_none());
    }
    let mut seen = 0;
    let failed = bound.stream(6, &PlanLoad::default(), 1, &mut |_| {
        seen += 1;
        Err(storage::Error::new("stop", "here", std::io::Error::other("enough")).into())
    });
    assert_eq!((failed.unwrap_err().code(), seen), ("IO", 1));
}

#[test]
fn a_load_tells_how_far_it_is_and_stops_when_told() {
    let (_folder, checkpoint) = saved(&tensors());
    let plan = planned(&checkpoint);
    let bound = checkpoint.with_plan(&plan).unwrap();
    let last = AtomicU64::new(0);
    let progress = |progress: Progress| {
        assert!(progress.done <= progress.total);
        last.fetch_max(progress.done, Ordering::Relaxed);
    };
    let load = PlanLoad {
        progress: Some(OnProgressOf(&progress)),
        ..PlanLoad::default()
    };
    let loaded = bound.load(1, &load).unwrap();
    assert_eq!(last.load(Ordering::Relaxed), loaded.report().bytes_read);
    let cancel = Cancel::new();
    cancel.cancel();
    let load = PlanLoad {
        cancel: Some(&cancel),
        ..PlanLoad::default()
    };
    assert_eq!(bound.load(1, &load).unwrap_err().code(), "CANCELLED");
    let little = PlanLoad {
        staging: Some(1),
        ..PlanLoad::default()
    };
    assert_eq!(bound.load(1, &little).unwrap_err().code(), "STAGING");
    assert_eq!(
        bound.load(8, &PlanLoad::default()).unwrap_err().code(),
        "PLAN_MESH"
    );
}

#[test]
fn a_plan_is_for_its_own_files() {
    let (_folder, checkpoint) = saved(&tensors());
    let plan = planned(&checkpoint);
    let mut others = tensors();
    others[0].shape = vec![3000, 700];
    let (_other, wrong) = saved(&others);
    let error = wrong.with_plan(&plan).unwrap_err();
    assert_eq!(error.code(), "PLAN_FILES");
    assert!(error.to_string().contains("\"wide\""), "{error}");
    let (_model, another) = saved(&model());
    assert_eq!(another.with_plan(&plan).unwrap_err().code(), "PLAN_FILES");
    // The same content elsewhere is as good, through JSON too.
    let (_same, moved) = saved(&tensors());
    let again = Plan::from_json(&plan.to_json()).unwrap();
    let bound = moved.with_plan(&again).unwrap();
    assert!(bound.load(0, &PlanLoad::default()).is_ok());
    assert_eq!(
        PlannedLoad::new(&plan, Vec::new()).unwrap_err().code(),
        "PLAN_FILES"
    );
}

#[test]
fn checksums_are_compared_for_what_is_read() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("m.safetensors");
    let options = Save {
        checksums: true,
        ..Save::default()
    };
    save(&refs(&tensors()), &path, &options).unwrap();
    let checkpoint = Checkpoint::open(&path).unwrap();
    let plan = planned(&checkpoint);
    let load = PlanLoad {
        verify: true,
        ..PlanLoad::default()
    };
    checkpoint.with_plan(&plan).unwrap().load(0, &load).unwrap();
    let mut bytes = std::fs::read(&path).unwrap();
    *bytes.last_mut().unwrap() ^= 1;
    std::fs::write(&path, &bytes).unwrap();
    let checkpoint = Checkpoint::open(&path).unwrap();
    let failed: Vec<&str> = (0..8)
        .filter_map(|rank| {
            let bound = checkpoint.with_plan(&plan).unwrap();
            bound.load(rank, &load).err().map(|error| error.code())
        })
        .collect();
    assert!(
        !failed.is_empty() && failed.iter().all(|&code| code == "CHECKSUM_MISMATCH"),
        "{failed:?}"
    );
}

#[test]
fn a_plan_is_shown() {
    let (_folder, checkpoint) = saved(&tensors());
    let plan = planned(&checkpoint);
    let io = plan.io(5, &IoProfile::NVME).unwrap();
    let text = explain(&plan, 5, &io).unwrap();
    assert!(
        text.starts_with("rank 5 of 8 (pp=1, tp=1): 10 tensors, "),
        "{text}"
    );
    let line = text
        .lines()
        .find(|line| line.trim_start().starts_with("wide "))
        .unwrap();
    assert!(
        line.contains("BF16") && line.contains("[700, 750]"),
        "{line}"
    );
    assert!(
        line.contains("[:, 750:1500]") && line.contains("by blocks"),
        "{line}"
    );
    let page = html(&plan, &IoProfile::NVME).unwrap();
    assert!(page.starts_with("<!DOCTYPE html>") && page.ends_with("</body></html>\n"));
    assert_eq!(page.matches("<svg").count(), page.matches("</svg>").count());
    assert_eq!(page.matches("<tr").count(), page.matches("</tr>").count());
    assert!(page.contains("class=\"blocks\"") && page.contains("class=\"ranges\""));
    assert!(!page.contains("http://") && !page.contains("https://") && !page.contains("<script"));
}
