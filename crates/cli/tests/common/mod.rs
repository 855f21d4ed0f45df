//! What the tests of the command line share: running it, and files to run it on.

#![allow(dead_code, reason = "each test file uses a part")]

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use tonnage::{Dtype, Save, TensorData, save};

/// How a run ended.
#[derive(Debug)]
pub struct Ran {
    pub code: i32,
    pub out: String,
    pub err: String,
}

/// The command, with nothing from the environment that changes how it looks.
pub fn command(args: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_tonnage"));
    command
        .args(args)
        .env_remove("NO_COLOR")
        .stdin(Stdio::null());
    command
}

pub fn run(args: &[&str]) -> Ran {
    ended(&mut command(args))
}

pub fn ended(command: &mut Command) -> Ran {
    let output = command.output().expect("the binary runs");
    let text = |bytes: Vec<u8>| String::from_utf8(bytes).expect("output is UTF-8");
    Ran {
        code: output.status.code().unwrap_or(-1),
        out: text(output.stdout),
        err: text(output.stderr),
    }
}

/// Runs, expects this exit code, and gives standard output.
#[track_caller]
pub fn expect(code: i32, args: &[&str]) -> String {
    let ran = run(args);
    assert_eq!(ran.code, code, "{args:?}: {ran:?}");
    if code <= 1 {
        ran.out
    } else {
        assert!(ran.out.is_empty(), "{ran:?}");
        assert_eq!(ran.err.lines().count(), 1, "a failure is one line: {ran:?}");
        ran.err
    }
}

/// The same with `--json`, parsed.
#[track_caller]
pub fn expect_json(code: i32, args: &[&str]) -> serde_json::Value {
    let text = expect(code, &[args, &["--json"]].concat());
    serde_json::from_str(&text).unwrap_or_else(|error| panic!("{error}: {text}"))
}

pub fn text(path: &Path) -> &str {
    path.to_str().expect("a plain path")
}

fn f32s(values: impl IntoIterator<Item = f32>) -> Vec<u8> {
    values.into_iter().flat_map(f32::to_le_bytes).collect()
}

/// A small model: `layers` layers that are alike, an embedding in BF16, a counter in I64.
pub fn model(folder: &Path, name: &str, layers: usize) -> PathBuf {
    let weight = f32s((0..12).map(|i| i as f32 / 4.0 - 1.0));
    let bias = f32s([0.0, f32::NAN, 2.5]);
    let embedding = [0x80, 0x3F, 0x00, 0xC0];
    let counter = 7_i64.to_le_bytes();
    let names: Vec<(String, String)> = (0..layers)
        .map(|i| {
            (
                format!("model.layers.{i}.proj.weight"),
                format!("model.layers.{i}.proj.bias"),
            )
        })
        .collect();
    let mut tensors = vec![
        TensorData {
            name: "model.embed",
            dtype: Dtype::BF16,
            shape: &[1, 2],
            data: &embedding,
        },
        TensorData {
            name: "steps",
            dtype: Dtype::I64,
            shape: &[],
            data: &counter,
        },
    ];
    for (w, b) in &names {
        tensors.push(TensorData {
            name: w,
            dtype: Dtype::F32,
            shape: &[4, 3],
            data: &weight,
        });
        tensors.push(TensorData {
            name: b,
            dtype: Dtype::F32,
            shape: &[3],
            data: &bias,
        });
    }
    let path = folder.join(name);
    let metadata = vec![("format".to_owned(), "pt".to_owned())];
    save(
        &tensors,
        &path,
        &Save {
            metadata,
            ..Save::default()
        },
    )
    .expect("the model is saved");
    path
}

/// A file of exactly this header and so many bytes of data.
pub fn raw(folder: &Path, name: &str, header: &str, data: usize) -> PathBuf {
    let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
    bytes.extend_from_slice(header.as_bytes());
    bytes.resize(bytes.len() + data, 0);
    let path = folder.join(name);
    std::fs::write(&path, bytes).expect("the file is written");
    path
}

/// The names in a folder, hidden ones too.
pub fn listing(folder: &Path) -> Vec<String> {
    let entries = std::fs::read_dir(folder).expect("the folder is there");
    let mut names: Vec<String> = entries
        .map(|entry| entry.unwrap().file_name().to_string_lossy().into_owned())
        .collect();
    names.sort();
    names
}

/// Whether text could do anything to a terminal but show itself and end lines.
pub fn acts_on_terminals(text: &str) -> bool {
    text.chars().any(|c| {
        c.is_control() && c != '\n'
            || matches!(c, '\u{200B}'..='\u{200F}' | '\u{202A}'..='\u{202E}' | '\u{2060}'..='\u{2069}' | '\u{FEFF}')
    })
}
