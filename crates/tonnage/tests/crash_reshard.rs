//! Whenever resharding to files of ranks is killed, the old ranks or the new ones are there, whole.
//!
//! A child process reshards one generation after the other into one folder, to two ranks and three by turns, and says
//! when it starts and when it is done with each. It is killed (SIGKILL) at a random moment; then the folder is opened.
//! `TONNAGE_KILLS=500 cargo test -p tonnage --test crash_reshard` does it more often.

mod common;
mod victim;

use std::fs;
use std::io::Write;
use std::path::Path;
use std::time::Duration;

use common::{Tensor, names, refs};
use tonnage::plan::{Mesh, Origin, Plan, PlanLoad, RECORD, Rules, reshard};
use tonnage::{Checkpoint, Dtype, Durability, OpenOptions, Save, save};

const CHILD: &str = "TONNAGE_RESHARD_CHILD";

/// Saves a generation, every byte of which is its number.
fn source(folder: &Path, generation: u64) -> std::path::PathBuf {
    let mut tensors: Vec<Tensor> = (0..6)
        .map(|i| Tensor::new(&format!("layer.{i}"), Dtype::U8, &[96, 128], 0))
        .collect();
    for tensor in &mut tensors {
        tensor.data.fill(generation as u8);
    }
    let path = folder.join(format!("{generation}.safetensors"));
    let options = Save {
        durability: Durability::None,
        ..Save::default()
    };
    save(&refs(&tensors), &path, &options).unwrap();
    path
}

fn plan(origin: &Origin, ranks: u32) -> Plan {
    let rules = Rules::from_json(r#"{"*": {"shard": {"dim": 0}}}"#).unwrap();
    origin
        .plan(&Mesh::new(&[("tp", ranks)]).unwrap(), &rules)
        .unwrap()
}

fn one(sources: &Path, folder: &Path, generation: u64) {
    let path = source(sources, generation);
    let origin = Origin::open(&path, &OpenOptions::default()).unwrap();
    // Ranks appear and go stale, and so do the files of each.
    let plan = plan(&origin, 2 + (generation % 2) as u32);
    let options = Save {
        max_shard_size: generation.is_multiple_of(3).then_some(16 << 10),
        durability: match generation % 4 {
            0 => Durability::Full,
            _ => Durability::None,
        },
        sidecar: generation.is_multiple_of(5),
        ..Save::default()
    };
    reshard(&origin, &plan, folder, &PlanLoad::default(), &options).unwrap();
}

/// The generation that a folder holds; panics if it is not whole.
fn generation(folder: &Path) -> u64 {
    let origin = Origin::open(folder, &OpenOptions::default())
        .unwrap_or_else(|e| panic!("{e}; {:?}", names(folder)));
    let to = tempfile::tempdir().unwrap();
    let path = to.path().join("whole.safetensors");
    let options = Save {
        durability: Durability::None,
        ..Save::default()
    };
    reshard(
        &origin,
        &plan(&origin, 1),
        &path,
        &PlanLoad::default(),
        &options,
    )
    .unwrap();
    let whole = Checkpoint::open(&path).unwrap();
    assert_eq!(whole.len(), 6);
    let all: Vec<u8> = whole.iter().flat_map(|one| one.read().unwrap()).collect();
    assert_eq!(all.len(), 6 * 96 * 128);
    let first = all[0];
    assert!(all.iter().all(|&byte| byte == first), "of two generations");
    first.into()
}

/// The process that is killed; the other test starts it.
#[test]
#[ignore = "is the process that the other test kills"]
fn child() {
    let Ok(job) = std::env::var(CHILD) else {
        return;
    };
    let (first, folder) = job.split_once(',').unwrap();
    let folder = Path::new(folder);
    let mut out = std::io::stdout();
    for generation in first.parse::<u64>().unwrap().. {
        writeln!(out, "\nstart {generation}").unwrap();
        out.flush().unwrap();
        one(&folder.join("sources"), &folder.join("ranks"), generation);
        writeln!(out, "\ndone {generation}").unwrap();
        out.flush().unwrap();
    }
}

#[test]
fn killed_at_any_moment_the_old_ranks_or_the_new_are_whole() {
    let kills = std::env::var("TONNAGE_KILLS").map_or(30, |n| n.parse().unwrap());
    let folder = tempfile::tempdir().unwrap();
    let (sources, ranks) = (folder.path().join("sources"), folder.path().join("ranks"));
    fs::create_dir(&sources).unwrap();
    one(&sources, &ranks, 1);
    let (mut held, mut next, mut state, mut cut) = (1, 2, 88_172_645_463_325_252_u64, 0);
    for _ in 0..kills {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        let (started, done) = victim::killed(
            CHILD,
            format!("{next},{}", folder.path().display()),
            (next, held),
            Duration::from_micros(state % 50_000),
        );
        let found = generation(&ranks);
        let wanted = [started, done].map(|n| u64::from(n as u8));
        assert!(wanted.contains(&found), "{found}, not of {wanted:?}");
        cut += u32::from(started != done);
        // Generations are numbered modulo 256 in the bytes.
        held = if found == wanted[0] { started } else { done };
        next = started + 1;
    }
    assert!(cut > 0, "no kill came while files were written");
    // The next save leaves nothing of the dead ones.
    one(&sources, &ranks, 7);
    assert_eq!(generation(&ranks), 7);
    let left = names(&ranks);
    let stays = |name: &String| name.ends_with(".ranks") || name == RECORD;
    assert!(!left.iter().any(stays), "{left:?}");
}
