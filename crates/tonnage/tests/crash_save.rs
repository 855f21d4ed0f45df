//! Whenever a save is killed, the old or the new checkpoint is there, whole.
//!
//! A child process saves one generation after the other into one folder and says when it starts and when
//! it is done with each. It is killed (SIGKILL) at a random moment; then the folder is opened. All
//! tensors must be of one generation: the last one that was done, or the one that was started after it.
//! `TONNAGE_KILLS=1000 cargo test -p tonnage --test crash_save` does it more often.

mod common;
mod victim;

use std::fs;
use std::io::Write;
use std::path::Path;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use common::{Tensor, names, refs};
use tonnage::{Checkpoint, Dtype, Durability, Save, Writer, save};

/// What the child saves in each generation.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Kind {
    /// One file, given by its path.
    Single,
    /// The same number of files with the same names each time.
    Sharded,
    /// One file, two, four, by turns: names appear and go stale.
    Changing,
    /// Several files through the streaming writer.
    Streamed,
    /// One file that is numbered and has an index.
    Numbered,
}

impl Kind {
    const ALL: [Kind; 5] = [
        Kind::Single,
        Kind::Sharded,
        Kind::Changing,
        Kind::Streamed,
        Kind::Numbered,
    ];

    fn path(self, folder: &Path) -> std::path::PathBuf {
        if self == Kind::Single {
            folder.join("model.safetensors")
        } else {
            folder.to_owned()
        }
    }

    fn options(self, generation: u64) -> Save<'static> {
        let max_shard_size = match (self, generation % 3) {
            (Kind::Single | Kind::Numbered, _) | (Kind::Changing, 0) => None,
            (Kind::Changing, 1) => Some(300 << 10),
            _ => Some(128 << 10),
        };
        // Syncing takes most of the time of a small save; without it more kills hit the other steps.
        let durability = if generation.is_multiple_of(4) {
            Durability::Full
        } else {
            Durability::None
        };
        let metadata = vec![("generation".to_owned(), generation.to_string())];
        Save {
            max_shard_size,
            durability,
            metadata,
            numbered: self == Kind::Numbered,
            ..Save::default()
        }
    }

    fn save(self, folder: &Path, generation: u64) -> tonnage::Result<()> {
        let tensors = tensors(generation);
        let options = self.options(generation);
        if self != Kind::Streamed {
            return save(&refs(&tensors), self.path(folder), &options).map(drop);
        }
        let mut writer = Writer::create(folder, &options)?;
        refs(&tensors)
            .iter()
            .try_for_each(|tensor| writer.add(tensor))?;
        writer.finish().map(drop)
    }
}

/// Every byte of a generation is its number.
fn tensors(generation: u64) -> Vec<Tensor> {
    let mut tensors: Vec<Tensor> = (0..8)
        .map(|i| Tensor::new(&format!("layer.{i}"), Dtype::U8, &[64 << 10], 0))
        .collect();
    tensors
        .iter_mut()
        .for_each(|t| t.data.fill(generation as u8));
    tensors
}

/// The generation that a folder holds; panics if it is not whole.
fn generation(kind: Kind, folder: &Path) -> u64 {
    let checkpoint =
        Checkpoint::open(kind.path(folder)).unwrap_or_else(|e| panic!("{e}; {:?}", names(folder)));
    let generation: u64 = checkpoint.metadata()["generation"].parse().unwrap();
    assert!(checkpoint.notes().is_empty(), "{:?}", checkpoint.notes());
    assert_eq!(checkpoint.len(), 8);
    for tensor in checkpoint.iter() {
        let bytes = tensor.read().unwrap();
        let torn = bytes.iter().position(|&b| b != generation as u8);
        assert_eq!(
            (torn, bytes.len()),
            (None, 64 << 10),
            "{} of generation {generation}",
            tensor.name()
        );
    }
    // Another reader that follows the index finds the same: every file that it names is there.
    if let Some(index) = checkpoint.index_path() {
        let json: serde_json::Value = serde_json::from_slice(&fs::read(index).unwrap()).unwrap();
        for file in json["weight_map"].as_object().unwrap().values() {
            assert!(folder.join(file.as_str().unwrap()).is_file());
        }
    }
    generation
}

const CHILD: &str = "TONNAGE_CRASH_CHILD";

/// The process that is killed; the other tests start it.
#[test]
#[ignore = "is the process that the other tests kill"]
fn child() {
    let Ok(job) = std::env::var(CHILD) else {
        return;
    };
    let (kind, rest) = job.split_once(',').unwrap();
    let (first, folder) = rest.split_once(',').unwrap();
    let kind = Kind::ALL[kind.parse::<usize>().unwrap()];
    let mut out = std::io::stdout();
    for generation in first.parse::<u64>().unwrap().. {
        writeln!(out, "\nstart {generation}").unwrap();
        out.flush().unwrap();
        kind.save(Path::new(folder), generation).unwrap();
        writeln!(out, "\ndone {generation}").unwrap();
        out.flush().unwrap();
    }
}

fn random(state: &mut u64) -> u64 {
    *state ^= *state << 13;
    *state ^= *state >> 7;
    *state ^= *state << 17;
    *state
}

/// Starts a child, kills it at a random moment, and gives what it said: started and done last.
fn kill_one(kind: Kind, folder: &Path, first: u64, state: &mut u64) -> (u64, u64) {
    let at = Kind::ALL.iter().position(|k| *k == kind).unwrap();
    // A save takes a few milliseconds, one that syncs some dozens.
    let longest = if random(state).is_multiple_of(2) {
        8_000
    } else {
        60_000
    };
    victim::killed(
        CHILD,
        format!("{at},{first},{}", folder.display()),
        (first, first - 1),
        Duration::from_micros(random(state) % longest),
    )
}

fn kills(kind: Kind) {
    let kills =
        std::env::var("TONNAGE_KILLS").map_or(100, |n| n.parse().unwrap()) / Kind::ALL.len();
    let seed = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .unwrap()
        .as_nanos() as u64
        | 1;
    println!("seed {seed}");
    let mut state = seed;
    let folder = tempfile::tempdir().unwrap();
    kind.save(folder.path(), 0).unwrap();
    let (mut next, mut during, mut between, start) = (1, 0, 0, Instant::now());
    for _ in 0..kills {
        let (started, done) = kill_one(kind, folder.path(), next, &mut state);
        let found = generation(kind, folder.path());
        let done = if done < next { next - 1 } else { done };
        assert!(
            found == done || found == started,
            "found {found}, done {done}, started {started}"
        );
        during += u32::from(started != done);
        let index = fs::read_to_string(folder.path().join("model.safetensors.index.json"));
        between += u32::from(index.is_ok_and(|text| text.contains("\".model")));
        // What was found is what the next child saves over.
        next = found + 1;
    }
    println!(
        "{kind:?}: {kills} kills, {during} during a save, {between} between commit and tidying, {next} saves, {:?}",
        start.elapsed()
    );
    assert!(kills < 10 || during > 0, "no kill fell into a save");

    // The next save works, and hides nothing but what the kills left.
    kind.save(folder.path(), next).unwrap();
    assert_eq!(generation(kind, folder.path()), next);
    let visible = names(folder.path())
        .into_iter()
        .filter(|name| !name.starts_with('.'))
        .count();
    let files = Checkpoint::open(kind.path(folder.path()))
        .unwrap()
        .files()
        .len();
    assert_eq!(
        visible,
        files + usize::from(files > 1 || kind == Kind::Numbered),
        "{:?}",
        names(folder.path())
    );
}

#[test]
fn a_single_file_survives_kills() {
    kills(Kind::Single);
}

#[test]
fn files_that_keep_their_names_survive_kills() {
    kills(Kind::Sharded);
}

#[test]
fn a_checkpoint_that_changes_its_files_survives_kills() {
    kills(Kind::Changing);
}

#[test]
fn a_streamed_checkpoint_survives_kills() {
    kills(Kind::Streamed);
}

#[test]
fn a_single_file_with_an_index_survives_kills() {
    kills(Kind::Numbered);
}
