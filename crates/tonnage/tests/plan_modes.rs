//! Claim: ranks that load together, through a window or by messages, get what each would load by itself, also where
//! tensors are cast, and each byte of the files is read by one of them. Where one fails, the others hear of it.

#![cfg(target_os = "linux")]

mod common;

use std::path::Path;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use common::{Tensor, refs};
use tempfile::TempDir;
use tonnage::engine::Cancel;
use tonnage::plan::{
    Exchange, IoProfile, LocalMemory, Means, Meeting, Plan, PlanLoad, PlannedLoad, Request,
    Together, WINDOW, exchange, messages,
};
use tonnage::{Checkpoint, Dtype, Loaded, Save, save};

fn tensors() -> Vec<Tensor> {
    vec![
        Tensor::new("wide", Dtype::BF16, &[700, 3000], 1),
        Tensor::new("tall", Dtype::F32, &[1310, 700], 2),
        Tensor::new("stack", Dtype::U8, &[8, 96, 1000], 3),
        Tensor::new("qkv", Dtype::F16, &[96, 256], 4),
        Tensor::new("turned", Dtype::BF16, &[300, 500], 5),
        Tensor::new("scalar", Dtype::F32, &[], 6),
        Tensor::new("nothing", Dtype::F32, &[0, 4], 7),
        Tensor::new("packed", Dtype::F4, &[64, 128], 8),
        Tensor::new("norm", Dtype::F32, &[1001], 9),
        Tensor::new("tied", Dtype::F16, &[1000, 300], 10),
    ]
}

/// Placements of all kinds on two axes; the last tensor goes to two targets.
const REQUEST: &str = r#"{"mesh": [["pp", 2], ["tp", 4]], "repeated": "allow", "targets": [
  {"name": "wide", "place": {"tp": {"shard": {"dim": 1}}}},
  {"name": "tall", "place": {"pp": {"shard": {"dim": 0, "uneven": "balanced"}}, "tp": {"shard": {"dim": 1}}}},
  {"name": "stack", "place": {"pp": {"owner": [1]}, "tp": {"shard": {"dim": 2}}}},
  {"name": "qkv", "place": {"tp": {"segments": {"dim": 0, "sizes": [64, 16, 16],
     "each": [{"shard": {"dim": 0}}, {"shard": {"dim": 0}}, "replicate"]}}}},
  {"name": "turned", "expr": {"permute": {"of": {"source": "turned"}, "dims": [1, 0]}},
   "place": {"tp": {"shard": {"dim": 0}}}},
  {"name": "scalar"}, {"name": "nothing"},
  {"name": "packed", "place": {"tp": {"shard": {"dim": 1}}}},
  {"name": "norm", "expr": {"pad": {"of": {"source": "norm"}, "dim": 0, "before": 0, "after": 23}},
   "place": {"tp": {"shard": {"dim": 0}}}},
  {"name": "embed", "expr": {"source": "tied"}, "place": {"pp": {"owner": [0]}, "tp": {"shard": {"dim": 0}}}},
  {"name": "head", "expr": {"source": "tied"}, "place": {"tp": {"shard": {"dim": 1}}}}
]}"#;

fn saved() -> (TempDir, Checkpoint, Plan) {
    let folder = tempfile::tempdir().unwrap();
    let options = Save {
        max_shard_size: Some(4 << 20),
        ..Save::default()
    };
    save(&refs(&tensors()), folder.path().join("m"), &options).unwrap();
    let checkpoint = Checkpoint::open(folder.path().join("m")).unwrap();
    let plan = checkpoint.plan_request(&Request::from_json(REQUEST).unwrap());
    (folder, checkpoint, plan.unwrap())
}

fn data_bytes() -> u64 {
    let tensors = tensors();
    refs(&tensors)
        .iter()
        .map(|tensor| tensor.data.len() as u64)
        .sum()
}

const RANKS: [u32; 8] = [0, 1, 2, 3, 4, 5, 6, 7];

fn same(one: &Loaded, other: &Loaded) {
    assert_eq!(one.iter().len(), other.iter().len());
    for ((tensor, bytes), (needed, wanted)) in one.iter().zip(other.iter()) {
        assert_eq!(
            (&tensor.name, tensor.dtype, &tensor.shape),
            (&needed.name, needed.dtype, &needed.shape)
        );
        assert!(bytes == wanted, "{}", tensor.name);
    }
}

fn shm<'a>(
    bound: &PlannedLoad<'_>,
    exchange: &Exchange,
    path: &Path,
    load: &(dyn Fn(usize) -> PlanLoad<'a> + Sync),
) -> Vec<tonnage::Result<Loaded>> {
    let meeting = Meeting {
        path,
        timeout: Duration::from_secs(60),
    };
    std::thread::scope(|scope| {
        let ranks: Vec<_> = (0..exchange.members().len())
            .map(|member| {
                scope.spawn(move || bound.load_shm(exchange, member, &meeting, &load(member)))
            })
            .collect();
        ranks.into_iter().map(|rank| rank.join().unwrap()).collect()
    })
}

#[test]
fn a_window_brings_each_rank_what_it_would_load_alone() {
    let (folder, checkpoint, plan) = saved();
    let bound = checkpoint.with_plan(&plan).unwrap();
    let path = folder.path().join("window");
    for (half, dtype) in [(WINDOW, None), (300_000, None), (1 << 20, Some(Dtype::F32))] {
        let together = exchange(&plan, &RANKS, Means::Window { half }).unwrap();
        let load = |_| PlanLoad {
            dtype,
            threads: Some(2),
            staging: Some(1 << 20),
            ..PlanLoad::default()
        };
        let loaded = shm(&bound, &together, &path, &load);
        let mut read = 0;
        for (rank, loaded) in RANKS.into_iter().zip(&loaded) {
            let loaded = loaded.as_ref().unwrap();
            same(loaded, &bound.load(rank, &load(0)).unwrap());
            assert!(loaded.report().peak_staging <= 1 << 20);
            read += loaded.report().bytes_read;
        }
        assert_eq!(read, data_bytes(), "each byte once");
        assert!(!path.exists());
    }
}

/// Carries messages from memory to memory, as a group of processes would.
fn by_messages(
    bound: &PlannedLoad<'_>,
    exchange: &Exchange,
    load: &PlanLoad<'_>,
) -> (Vec<Vec<Vec<u8>>>, u64) {
    let members = exchange.members().len();
    let ranks: Vec<Together<'_>> = (0..members)
        .map(|at| Together::new(bound, exchange, at).unwrap())
        .collect();
    let options = tonnage::engine::Options::default();
    let mut memory: Vec<Vec<Vec<u8>>> = Vec::new();
    for (at, together) in ranks.iter().enumerate() {
        let alone = bound.load(exchange.members()[at], load).unwrap();
        assert_eq!(together.locals().len(), alone.iter().len());
        memory.push(
            alone
                .iter()
                .map(|(_, bytes)| vec![0xee; bytes.len()])
                .collect(),
        );
    }
    let mut parts: Vec<Vec<LocalMemory<'_>>> = Vec::new();
    for (together, memory) in ranks.iter().zip(&mut memory) {
        let wanted = together.wanted(load.dtype);
        let parts_of = memory.iter_mut().zip(wanted).enumerate();
        parts.push(
            parts_of
                .map(|(local, (memory, dtype))| LocalMemory {
                    local,
                    dtype,
                    memory,
                    zeroed: false,
                })
                .collect(),
        );
    }
    let mut read = 0;
    let mut raws = Vec::new();
    for (together, parts) in ranks.iter().zip(&mut parts) {
        let mut raw = together.begin(parts).unwrap();
        read += together
            .direct(parts, &mut raw, load, &options)
            .unwrap()
            .report
            .bytes;
        raws.push(raw);
    }
    for round in 0..exchange.rounds().len() {
        let mut sent = Vec::new();
        for ((together, parts), raw) in ranks.iter().zip(&mut parts).zip(&mut raws) {
            let sizes = together.message_sizes(round);
            let mut send = vec![0; sizes.send.iter().sum::<u64>() as usize];
            let mut own = vec![0; sizes.own as usize];
            let ran = together
                .read_round(round, parts, raw, (&mut send, &mut own), load, &options)
                .unwrap();
            read += ran.report.bytes;
            assert!(ran.report.peak_staging <= load.staging.unwrap() / 2);
            sent.push((sizes, send, own));
        }
        let mut begun = vec![0; members];
        for (member, ((together, parts), raw)) in
            ranks.iter().zip(&mut parts).zip(&mut raws).enumerate()
        {
            let mut received = Vec::new();
            for (sizes, send, _) in &sent {
                let begin = sizes.send[..member].iter().sum::<u64>() as usize;
                received.extend_from_slice(&send[begin..begin + sizes.send[member] as usize]);
            }
            together
                .take_messages(round, &received, parts, raw, &options)
                .unwrap();
            begun.fill(0);
            for (position, &(reader, len)) in sent[0].0.broadcasts.iter().enumerate() {
                let begin = &mut begun[reader as usize];
                let bytes = &sent[reader as usize].2[*begin..*begin + len as usize];
                *begin += len as usize;
                together
                    .take_broadcast((round, position), bytes, parts, raw, &options)
                    .unwrap();
            }
        }
    }
    for ((together, parts), raw) in ranks.iter().zip(&mut parts).zip(raws) {
        together.end(parts, raw).unwrap();
    }
    drop(parts);
    (memory, read)
}

#[test]
fn messages_bring_each_rank_what_it_would_load_alone() {
    let (_folder, checkpoint, plan) = saved();
    let bound = checkpoint.with_plan(&plan).unwrap();
    for (staging, dtype) in [(1 << 20, None), (64 << 20, Some(Dtype::F32))] {
        let together = exchange(&plan, &RANKS, messages(staging, false)).unwrap();
        let load = PlanLoad {
            dtype,
            staging: Some(staging),
            threads: Some(2),
            ..PlanLoad::default()
        };
        let (memory, read) = by_messages(&bound, &together, &load);
        for (rank, memory) in RANKS.into_iter().zip(memory) {
            let alone = bound.load(rank, &load).unwrap();
            for ((tensor, wanted), found) in alone.iter().zip(memory) {
                assert!(found == wanted, "{} of rank {rank}", tensor.name);
            }
        }
        assert_eq!(read, data_bytes(), "each byte once");
    }
}

#[test]
fn a_rank_that_fails_ends_the_load_of_all() {
    let (folder, checkpoint, plan) = saved();
    let bound = checkpoint.with_plan(&plan).unwrap();
    let path = folder.path().join("window");
    let together = exchange(&plan, &RANKS, Means::Window { half: 300_000 }).unwrap();
    let (cancel, seen) = (Cancel::new(), AtomicUsize::new(0));
    let progress = |_| {
        if seen.fetch_add(1, Ordering::Relaxed) == 1 {
            cancel.cancel();
        }
    };
    let told = tonnage::OnProgressOf(&progress);
    let load = |member| match member {
        5 => PlanLoad {
            cancel: Some(&cancel),
            progress: Some(told),
            ..PlanLoad::default()
        },
        _ => PlanLoad::default(),
    };
    let began = Instant::now();
    for (member, loaded) in shm(&bound, &together, &path, &load).into_iter().enumerate() {
        let error = loaded.unwrap_err();
        match member {
            5 => assert_eq!(error.code(), "CANCELLED"),
            _ => assert!(
                error.to_string().contains("ended before the others"),
                "{error}"
            ),
        }
    }
    assert!(began.elapsed() < Duration::from_secs(30));
    assert!(!path.exists());
    // Nobody comes.
    let meeting = Meeting {
        path: &path,
        timeout: Duration::from_millis(50),
    };
    let error = bound
        .load_shm(&together, 1, &meeting, &PlanLoad::default())
        .unwrap_err();
    assert!(error.to_string().contains("waited"), "{error}");
}

#[test]
fn other_plans_are_not_loaded_together() {
    let (folder, checkpoint, plan) = saved();
    let other = REQUEST.replace(
        r#"{"name": "scalar"}"#,
        r#"{"name": "scalar", "local": "other"}"#,
    );
    let other = checkpoint
        .plan_request(&Request::from_json(&other).unwrap())
        .unwrap();
    let path = folder.path().join("window");
    let meeting = Meeting {
        path: &path,
        timeout: Duration::from_secs(60),
    };
    let plans = [&plan, &other];
    let codes: Vec<String> = std::thread::scope(|scope| {
        let (checkpoint, meeting) = (&checkpoint, &meeting);
        let ranks: Vec<_> = (0..2)
            .map(|member| {
                scope.spawn(move || {
                    let bound = checkpoint.with_plan(plans[member]).unwrap();
                    let together =
                        exchange(plans[member], &RANKS[..2], Means::Window { half: WINDOW })
                            .unwrap();
                    let loaded = bound.load_shm(&together, member, meeting, &PlanLoad::default());
                    loaded.unwrap_err().code().to_owned()
                })
            })
            .collect();
        ranks.into_iter().map(|rank| rank.join().unwrap()).collect()
    });
    assert_eq!(codes, ["PLAN_DIGEST", "PLAN_DIGEST"]);
}

#[test]
fn what_cannot_be_is_refused() {
    let (folder, checkpoint, plan) = saved();
    let bound = checkpoint.with_plan(&plan).unwrap();
    let path = folder.path().join("window");
    let meeting = Meeting {
        path: &path,
        timeout: Duration::from_millis(50),
    };
    let by_window = exchange(&plan, &RANKS[..1], Means::Window { half: WINDOW }).unwrap();
    let by_messages = exchange(&plan, &RANKS[..1], messages(1 << 20, false)).unwrap();
    let code = |exchange, member, load: &PlanLoad<'_>| {
        bound
            .load_shm(exchange, member, &meeting, load)
            .unwrap_err()
            .code()
            .to_owned()
    };
    let verify = PlanLoad {
        verify: true,
        ..PlanLoad::default()
    };
    let small = PlanLoad {
        staging: Some(1000),
        profile: Some(IoProfile::NFS),
        ..PlanLoad::default()
    };
    assert_eq!(code(&by_messages, 0, &PlanLoad::default()), "WINDOW");
    assert_eq!(code(&by_window, 1, &PlanLoad::default()), "PLAN_MESH");
    assert_eq!(code(&by_window, 0, &verify), "NO_CHECKSUMS");
    assert_eq!(code(&by_window, 0, &small), "STAGING");
    let together = Together::new(&bound, &by_messages, 0).unwrap();
    let mut none = tonnage::plan::Raw::default();
    let options = tonnage::engine::Options::default();
    assert_eq!(together.begin(&mut []).unwrap_err().code(), "PLAN_MESH");
    let taken = together.take_broadcast((99, 0), &[1], &mut [], &mut none, &options);
    assert_eq!(taken.unwrap_err().code(), "BUFFER_SIZE");
    assert!(Together::new(&bound, &by_messages, 7).is_err());
    // One rank alone reads for itself, and meets nobody.
    let loaded = bound
        .load_shm(&by_window, 0, &meeting, &PlanLoad::default())
        .unwrap();
    same(&loaded, &bound.load(0, &PlanLoad::default()).unwrap());
}
