//! The house's directions: which room may use which, and what a pure room may stand on.
//!
//! Rooms are crates under `crates/`. Each has one line below; a new room fails this test until its
//! line says what it may use. Development dependencies obey the same directions among rooms, so
//! that no room can be tested only together with one above it.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

use cargo_metadata::{DependencyKind, Metadata, MetadataCommand, Package};

/// One room: the rooms that it may use, and the crates from outside that it may stand on.
struct Room {
    name: &'static str,
    rooms: &'static [&'static str],
    /// `None`: any, since the room is an edge whose work is translation.
    outside: Option<&'static [&'static str]>,
}

const FORMAT: &str = "tonnage-format";
const PLAN: &str = "tonnage-plan";
const QUANT: &str = "tonnage-quant";
const FOREIGN: &str = "tonnage-foreign";
const STORAGE: &str = "tonnage-storage";
const ENGINE: &str = "tonnage-engine";
const DEVICE: &str = "tonnage-device";
const FACADE: &str = "tonnage";

/// A driver for tests: nobody may use it but for development, and everybody may for that.
const STUB_DRIVER: &str = "tonnage-stubdriver";

const HOUSE: &[Room] = &[
    Room {
        name: STUB_DRIVER,
        rooms: &[],
        // The operating system's memory; what tests open it with.
        outside: Some(&["libc", "libloading"]),
    },
    Room {
        name: FORMAT,
        rooms: &[],
        // Pure: bytes and numbers in, values out.
        outside: Some(&["serde"]),
    },
    Room {
        name: PLAN,
        rooms: &[FORMAT],
        // Pure, as `format` is: requests and plans are JSON, and a plan has a digest.
        outside: Some(&["blake3", "serde", "serde_json", "smallvec"]),
    },
    Room {
        name: QUANT,
        rooms: &[FORMAT],
        // Pure: descriptions of schemes are JSON; half precision.
        outside: Some(&["half", "serde", "serde_json"]),
    },
    Room {
        name: STORAGE,
        rooms: &[],
        // The operating system's calls and its maps; `libc` for the one call that `rustix` lacks.
        outside: Some(&["io-uring", "libc", "memmap2", "rustix"]),
    },
    Room {
        name: FOREIGN,
        rooms: &[FORMAT, QUANT, STORAGE],
        outside: Some(&["serde", "serde_json"]),
    },
    Room {
        name: DEVICE,
        rooms: &[FORMAT],
        // Anonymous maps for the host; tables of Vulkan's calls. Drivers are opened at run time.
        outside: Some(&[
            "ash",
            "block2",
            "libloading",
            "memmap2",
            "objc2",
            "objc2-metal",
        ]),
    },
    Room {
        name: ENGINE,
        rooms: &[FORMAT, STORAGE, DEVICE],
        // Anonymous maps, for destinations in huge pages; checksums, with the processor's instructions for them.
        outside: Some(&["blake3", "crc-fast", "memmap2"]),
    },
    Room {
        name: FACADE,
        rooms: &[FORMAT, PLAN, QUANT, FOREIGN, STORAGE, DEVICE, ENGINE],
        // Half precision for conversions; serde for `compat`, whose types are part of its API.
        outside: Some(&["half", "serde", "serde_json"]),
    },
    Room {
        name: "tonnage-python",
        rooms: &[FACADE],
        outside: None,
    },
    Room {
        name: "tonnage-cli",
        rooms: &[FACADE],
        outside: None,
    },
];

/// The only files that may hold `unsafe`, each with numbered invariants at its top.
const UNSAFE: &[&str] = &[
    "crates/storage/src/mmap.rs",
    "crates/storage/src/pages.rs",
    "crates/storage/src/residency.rs",
    "crates/storage/src/uring.rs",
    "crates/storage/src/window.rs",
    "crates/device/src/dlpack.rs",
    "crates/device/src/dlpack/exchange.rs",
    "crates/device/src/driver/call.rs",
    "crates/device/src/driver/device.rs",
    "crates/device/src/driver/table.rs",
    "crates/device/src/gds/table.rs",
    "crates/device/src/host.rs",
    // Signatures that state a caller's promise; no unsafe operation.
    "crates/device/src/lib.rs",
    "crates/device/src/queue.rs",
    "crates/device/src/metal.rs",
    "crates/device/src/vulkan/buffer.rs",
    "crates/device/src/vulkan/context.rs",
    "crates/device/src/vulkan/memory.rs",
    "crates/device/src/vulkan/queue.rs",
    "crates/device/src/vulkan/staging.rs",
    "crates/python/src/buffer.rs",
    "crates/python/src/device/dlpack.rs",
    "crates/python/src/device/memory.rs",
    "crates/quant/src/arch/avx2.rs",
    "crates/quant/src/arch/avx2/lanes.rs",
    "crates/stubdriver/src/control.rs",
    "crates/stubdriver/src/cuda.rs",
    "crates/stubdriver/src/cufile.rs",
    "crates/stubdriver/src/find.rs",
    "crates/stubdriver/src/hip.rs",
    "crates/stubdriver/src/raw.rs",
];

fn root() -> PathBuf {
    let here = Path::new(env!("CARGO_MANIFEST_DIR"));
    here.ancestors().nth(2).expect("crates/ in the root").into()
}

fn workspace() -> Metadata {
    MetadataCommand::new()
        .manifest_path(root().join("Cargo.toml"))
        .no_deps()
        .exec()
        .expect("cargo metadata of the workspace")
}

fn room(name: &str) -> Option<&'static Room> {
    HOUSE.iter().find(|room| room.name == name)
}

/// What `package` does wrong, a sentence for each.
fn offences(package: &Package, members: &BTreeSet<&str>) -> Vec<String> {
    let Some(room) = room(&package.name) else {
        return vec![format!(
            "{} is no room of the house: give it a line here",
            package.name
        )];
    };
    let mut found = Vec::new();
    for dependency in &package.dependencies {
        let name = dependency.name.as_str();
        let allowed = if members.contains(name) {
            room.rooms.contains(&name)
                || (name == STUB_DRIVER && dependency.kind == DependencyKind::Development)
        } else {
            dependency.kind == DependencyKind::Development
                || room.outside.is_none_or(|outside| outside.contains(&name))
        };
        if !allowed {
            found.push(format!(
                "{} may not use {name} ({})",
                room.name, dependency.kind
            ));
        }
    }
    found
}

#[test]
fn every_dependency_follows_the_directions() {
    let metadata = workspace();
    let packages = metadata.workspace_packages();
    let members: BTreeSet<&str> = packages
        .iter()
        .map(|package| package.name.as_str())
        .collect();
    let found: Vec<String> = packages
        .iter()
        .flat_map(|package| offences(package, &members))
        .collect();
    assert!(found.is_empty(), "\n{}\n", found.join("\n"));
    assert!(
        members.contains(FORMAT) && members.contains(FACADE),
        "no rooms found: {members:?}"
    );
}

#[test]
fn a_wrong_edge_is_seen() {
    let metadata = workspace();
    let packages = metadata.workspace_packages();
    let members: BTreeSet<&str> = packages
        .iter()
        .map(|package| package.name.as_str())
        .collect();
    let engine = packages
        .iter()
        .find(|package| *package.name == ENGINE)
        .expect("the engine");

    // The engine's own dependencies, as if `format` had them: an edge up, and a crate from outside.
    let mut package = (*engine).clone();
    package.name = "tonnage-format".parse().expect("a package name");
    let found = offences(&package, &members);
    assert!(found.iter().any(|line| line.contains(STORAGE)), "{found:?}");

    package.name = "tonnage-new".parse().expect("a package name");
    assert!(offences(&package, &members)[0].contains("no room of the house"));
}

#[test]
fn the_rooms_use_each_other_without_a_cycle() {
    // A room may use only rooms that stand above it in the table.
    for (position, room) in HOUSE.iter().enumerate() {
        for used in room.rooms {
            let place = HOUSE.iter().position(|other| other.name == *used);
            assert!(
                place.is_some_and(|place| place < position),
                "{} uses {used}",
                room.name
            );
        }
    }
}

fn sources(folder: &Path, into: &mut Vec<PathBuf>) {
    for entry in fs::read_dir(folder).expect("a readable folder") {
        let path = entry.expect("a readable entry").path();
        if path.is_dir() {
            sources(&path, into);
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            into.push(path);
        }
    }
}

#[test]
fn unsafe_lives_in_few_files() {
    let root = root();
    let mut files = Vec::new();
    for package in workspace().workspace_packages() {
        let home = package.manifest_path.parent().expect("a folder");
        sources(home.join("src").as_std_path(), &mut files);
    }
    assert!(files.len() > 10, "few sources found: {files:?}");
    for file in files {
        let text = fs::read_to_string(&file).expect("a readable source");
        let name = file
            .strip_prefix(&root)
            .expect("inside the root")
            .to_str()
            .expect("UTF-8");
        // The workspace denies `unsafe`, so code that has some must say `allow(unsafe_code)`.
        if text.contains("allow(unsafe_code)") {
            assert!(UNSAFE.contains(&name), "{name} may not hold unsafe code");
            let head: String = text.lines().take(60).collect::<Vec<_>>().join("\n");
            assert!(
                head.contains("nvariant"),
                "{name} must open with its numbered invariants"
            );
        }
    }
}
