//! A process that is killed while it edits a header leaves the old file or the new one, whole.

mod common;

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
    let whole = start.elapsed();
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
        std::thread::sleep(whole * 2 * i / KILLS);
        // A child that is done already cannot be killed, which is as good.
        let _ = child.kill();
        match child.wait().unwrap().code() {
            None => killed += 1,
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
