//! A process that is killed while it edits a header leaves the old file or the new one, whole; if the header
//! was to be overwritten where it stands, at least the old one beside the file, which mends it.

mod common;

use std::os::unix::fs::FileExt;
use std::path::Path;
use std::time::Instant;

use common::{command, expect, listing, raw, text};

#[test]
fn a_killed_edit_leaves_the_old_file_or_the_new_one() {
    const KILLS: u32 = 60;
    let folder = tempfile::tempdir().unwrap();
    let names: Vec<String> = (0..200)
        .map(|i| {
            let (begin, end) = (i * 80_000, (i + 1) * 80_000);
            format!(r#""t{i:03}":{{"dtype":"U8","shape":[80000],"data_offsets":[{begin},{end}]}}"#)
        })
        .collect();
    let header = format!("{{\"__metadata__\":{{\"k\":\"0\"}},{}}}", names.join(","));
    let path = raw(folder.path(), "m.safetensors", &header, 200 * 80_000);
    let value = || {
        expect(0, &["verify", text(&path), "--quiet"]);
        let value = expect(0, &["metadata", "get", text(&path), "k"]);
        value.trim_end().parse::<u32>().unwrap()
    };
    // How long an edit takes here; the kills are spread over a little more than that.
    let start = Instant::now();
    expect(0, &["metadata", "set", text(&path), "k=1000000"]);
    let mut whole = start.elapsed();
    let (mut killed, mut finished) = (0, 0);
    for i in 1..=KILLS {
        let before = value();
        // Long and short values take turns, so that the rest of the header moves each time and no
        // edit fits into one sector.
        let new = if before < 1000 { 1_000_000 + i } else { i };
        let pair = format!("k={new}");
        let mut child = command(&["metadata", "set", text(&path), &pair])
            .spawn()
            .unwrap();
        let delay = whole * 2 * i / KILLS;
        std::thread::sleep(delay);
        // A child that is done already cannot be killed, which is as good.
        let _ = child.kill();
        match child.wait().unwrap().code() {
            None => {
                killed += 1;
                // On a machine that got busier an edit takes longer than the first one did.
                whole = whole.max(delay * 3 / 2);
            }
            Some(code) => {
                assert_eq!(code, 0);
                finished += 1;
            }
        }
        let after = value();
        assert!(
            after == before || after == new,
            "kill {i}: {before}, {after}, {new}"
        );
    }
    assert!(
        killed > 0 && finished > 0,
        "{killed} killed, {finished} finished: the delays miss the work"
    );
    // What the dead left is hidden, and no checkpoint to anybody who looks for one.
    let visible = listing(folder.path())
        .into_iter()
        .filter(|name| !name.starts_with('.'));
    assert_eq!(visible.collect::<Vec<_>>(), ["m.safetensors"]);
    expect(0, &["inspect", text(folder.path())]);
}

/// The header that lies beside a file, if there is one: the name, and the bytes.
fn kept_beside(folder: &Path) -> Option<(String, Vec<u8>)> {
    let kept = |name: &String| name.starts_with(".m.safetensors.") && name.ends_with(".header");
    let name = listing(folder).into_iter().find(kept)?;
    let bytes = std::fs::read(folder.join(&name)).unwrap();
    Some((name, bytes))
}

#[test]
fn a_killed_edit_in_place_leaves_a_whole_file_or_what_mends_it() {
    const KILLS: u32 = 60;
    const TENSORS: usize = 20_000;
    let folder = tempfile::tempdir().unwrap();
    // A header of more than a megabyte, so that writing it takes a while, with room for a longer one.
    let entry = |i: usize| {
        format!(
            r#""t{i:05}":{{"dtype":"U8","shape":[1],"data_offsets":[{i},{}]}}"#,
            i + 1
        )
    };
    let entries: Vec<String> = (0..TENSORS).map(entry).collect();
    let metadata = r#""__metadata__":{"k":"0"}"#;
    let room = " ".repeat(64);
    let header = format!("{{{metadata},{}}}{room}", entries.join(","));
    let path = raw(folder.path(), "m.safetensors", &header, TENSORS);
    let data = std::fs::read(&path).unwrap().split_off(8 + header.len());
    let value = || {
        expect(0, &["verify", text(&path), "--quiet"]);
        let value = expect(0, &["metadata", "get", text(&path), "k"]);
        value.trim_end().parse::<u32>().unwrap()
    };
    let set = |pair: &str| command(&["metadata", "set", text(&path), pair, "--in-place"]).spawn();
    let start = Instant::now();
    assert!(set("k=1000000").unwrap().wait().unwrap().success());
    let mut whole = start.elapsed();
    let (mut killed, mut finished, mut kept) = (0, 0, 0);
    for i in 1..=KILLS {
        let before = value();
        // Another length each time, so that all of the header moves.
        let new = if before < 1000 { 1_000_000 + i } else { i };
        let mut child = set(&format!("k={new}")).unwrap();
        let delay = whole * 3 * i / KILLS / 2;
        std::thread::sleep(delay);
        let _ = child.kill();
        match child.wait().unwrap().code() {
            None => {
                killed += 1;
                // On a machine that got busier an edit takes longer than the first one did.
                whole = whole.max(delay * 3 / 2);
            }
            Some(code) => {
                assert_eq!(code, 0);
                finished += 1;
            }
        }
        let verdict = common::run(&["verify", text(&path), "--quiet"]);
        if let Some((name, old)) = kept_beside(folder.path()) {
            kept += 1;
            if verdict.code != 0 {
                // Torn, which a kill can do between two pages of one write: the old header mends it.
                assert_eq!(old.len(), 8 + header.len(), "kill {i}: {verdict:?}");
                let file = std::fs::OpenOptions::new().write(true).open(&path).unwrap();
                file.write_all_at(&old, 0).unwrap();
                assert_eq!(value(), before, "kill {i}");
            }
            std::fs::remove_file(folder.path().join(name)).unwrap();
        }
        let after = value();
        assert!(
            after == before || after == new,
            "kill {i}: {before}, {after}, {new}"
        );
        let now = std::fs::read(&path).unwrap();
        assert!(
            now[8 + header.len()..] == data[..],
            "kill {i}: the data moved"
        );
    }
    println!("{killed} killed, {finished} finished, {kept} left the old header beside the file");
    assert!(
        killed > 0 && finished > 0,
        "{killed} killed, {finished} finished: the delays miss the work"
    );
    assert_eq!(listing(folder.path()), ["m.safetensors"]);
}
