//! A model one and a half times as large as the memory that a process may have is saved through `Writer`,
//! and through `save` from another file: each in a process of its own with a limit on its address space.
//!
//! Address space counts all that a process has, pages in use or not, so the limit is what was there at the
//! start and [`ROOM`] more. A process that asks for half of that much and gets it shows that the limit
//! leaves room; one that asks for the model's size and does not get it, that it binds.
#![cfg(target_os = "linux")]

mod common;

use std::fs;
use std::path::Path;
use std::process::Command;

use rustix::process::{Resource, Rlimit, setrlimit};
use tonnage::format::TensorSpec;
use tonnage::{Checkpoint, Content, Dtype, Durability, Item, Save, Writer, save_items};

/// Memory that the child may take beyond what it has when it starts.
const ROOM: u64 = 192 << 20;
/// Tensors of the model, and bytes of each.
const TENSORS: u64 = 9;
const EACH: u64 = 32 << 20;
/// Bytes of a piece that the child makes and writes.
const PIECE: u64 = 8 << 20;

const CHILD: &str = "TONNAGE_LARGER_CHILD";

fn limit() {
    let status = fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("VmSize:"));
    let kib = line.unwrap().split_whitespace().next().unwrap();
    let most = (kib.parse::<u64>().unwrap() << 10) + ROOM;
    let limit = Rlimit {
        current: Some(most),
        maximum: Some(most),
    };
    setrlimit(Resource::As, limit).unwrap();
    let fits = |bytes: u64| Vec::<u8>::new().try_reserve_exact(bytes as usize).is_ok();
    assert!(fits(ROOM / 2) && !fits(TENSORS * EACH) && !fits(ROOM));
}

fn piece(tensor: u64, at: u64) -> Vec<u8> {
    common::noise(PIECE as usize, tensor * 1000 + at)
}

fn options() -> Save<'static> {
    Save {
        checksums: true,
        durability: Durability::Full,
        ..Save::default()
    }
}

fn stream(path: &Path, declared: bool) {
    let names: Vec<String> = (0..TENSORS).map(|i| format!("t{i}")).collect();
    let shape = [EACH];
    let specs: Vec<TensorSpec<'_>> = names
        .iter()
        .map(|name| TensorSpec {
            name,
            dtype: Dtype::U8,
            shape: &shape,
        })
        .collect();
    let mut writer = match declared {
        true => Writer::declared(path, &specs, &options()),
        false => Writer::create(path, &options()),
    }
    .unwrap();
    // Declared tensors come in any order.
    for i in 0..TENSORS {
        let i = if declared { TENSORS - 1 - i } else { i };
        writer.begin(&names[i as usize], Dtype::U8, &shape).unwrap();
        for at in 0..EACH / PIECE {
            writer.write(&piece(i, at)).unwrap();
        }
        writer.end().unwrap();
    }
    writer.finish().unwrap();
}

#[test]
#[ignore = "is run by the other test in a process of its own"]
fn child() {
    let Some(folder) = std::env::var_os(CHILD) else {
        return;
    };
    let folder = Path::new(&folder);
    limit();
    stream(&folder.join("created.safetensors"), false);
    stream(&folder.join("declared.safetensors"), true);
    let from = Checkpoint::open(folder.join("created.safetensors")).unwrap();
    let items: Vec<Item<'_>> = from
        .iter()
        .map(|tensor| Item {
            name: tensor.name(),
            dtype: Dtype::U8,
            shape: tensor.shape(),
            content: Content::Stored(tensor),
        })
        .collect();
    save_items(&items, folder.join("copied.safetensors"), &options()).unwrap();
}

#[test]
fn a_model_larger_than_memory_is_saved() {
    const { assert!(2 * TENSORS * EACH >= 3 * ROOM) };
    // Beside the sources: the temporary folder may be memory.
    let folder = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let child = Command::new(std::env::current_exe().unwrap())
        .args(["--ignored", "--exact", "child", "--test-threads=1"])
        .env(CHILD, folder.path())
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&child.stdout);
    assert!(
        child.status.success() && said.contains("1 passed"),
        "{said}{}",
        String::from_utf8_lossy(&child.stderr)
    );
    for name in ["created", "declared", "copied"] {
        let path = folder.path().join(format!("{name}.safetensors"));
        let checkpoint = Checkpoint::open(&path).unwrap();
        assert_eq!(checkpoint.total_bytes(), TENSORS * EACH);
        let found = tonnage::verify(&path, &Default::default()).unwrap();
        assert!(found.ok() && found.files[0].chunks == TENSORS * EACH / (8 << 20));
        let mut bytes = vec![0; PIECE as usize];
        for (i, at) in [(0, 0), (4, 1), (TENSORS - 1, EACH / PIECE - 1)] {
            let tensor = checkpoint.tensor(&format!("t{i}")).unwrap();
            tensor.read_at(at * PIECE, &mut bytes).unwrap();
            assert!(bytes == piece(i, at), "{name}: t{i} at {at}");
        }
    }
}
