//! How the command behaves around its work: exit codes, one-line failures, hostile names, pipes,
//! terminals, interruption, and JSON that programs can rely on.

mod common;

use std::io::Read;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use common::{
    acts_on_terminals, command, ended, expect, expect_json, listing, model, raw, run, text,
};
use serde_json::{Value, json};

const VERBS: [&str; 12] = [
    "inspect",
    "verify",
    "diff",
    "metadata",
    "rename",
    "cast",
    "shard",
    "merge",
    "checksum",
    "devices",
    "bench",
    "completions",
];

#[test]
fn exit_codes_tell_the_kind() {
    let folder = tempfile::tempdir().unwrap();
    let short = folder.path().join("short.safetensors");
    std::fs::write(&short, b"1234").unwrap();
    let line = expect(3, &["inspect", text(&short)]);
    assert!(
        line.starts_with("error[FILE_TOO_SMALL]: ") && line.contains("short.safetensors"),
        "{line}"
    );
    assert!(
        line.ends_with("found 4 bytes, needed at least 8 (spec 2.1)\n"),
        "{line}"
    );
    let rank = vec!["1"; 70_000].join(",");
    let deep = format!(r#"{{"a":{{"dtype":"U8","shape":[{rank}],"data_offsets":[0,1]}}}}"#);
    let deep = raw(folder.path(), "deep.safetensors", &deep, 1);
    assert!(expect(4, &["inspect", text(&deep)]).contains("LIMIT_RANK"));
    let odd = r#"{"a":{"dtype":"F9","shape":[1],"data_offsets":[0,1]}}"#;
    let odd = raw(folder.path(), "odd.safetensors", odd, 1);
    let copy = folder.path().join("copy.safetensors");
    let line = expect(5, &["merge", text(&odd), text(&copy)]);
    assert!(
        line.contains("\"a\"") && line.contains("F9") && line.contains("(spec 5.2)"),
        "{line}"
    );
    assert!(!copy.exists());
    assert!(expect(0, &["inspect", text(&odd), "--stats"]).contains("F9"));
    let line = expect(6, &["inspect", "/absent/m.safetensors"]);
    assert_eq!(
        line,
        "error[IO]: cannot open /absent/m.safetensors: No such file or directory (os error 2)\n"
    );
    let ran = run(&["inspect"]);
    assert_eq!((ran.code, ran.out.as_str()), (2, ""));
    let ran = run(&["diff", text(&short), text(&short), "--json"]);
    let error: Value = serde_json::from_str(&ran.err).unwrap();
    assert_eq!(
        (ran.code, &error["error"]["code"]),
        (3, &json!("FILE_TOO_SMALL"))
    );
    assert_eq!(error["error"]["clause"], json!("2.1"));
    assert_eq!(error["error"]["found"], json!("4 bytes"));
}

#[test]
fn every_verb_has_help_with_examples() {
    let all = expect(0, &["--help"]);
    assert!(
        all.contains("Exit codes: 0") && all.contains("binary units"),
        "{all}"
    );
    for verb in VERBS {
        assert!(all.contains(verb), "{verb}");
        let args: &[&str] = match verb {
            "metadata" => &["metadata", "set", "--help"],
            "checksum" => &["checksum", "add", "--help"],
            _ => &[verb, "--help"],
        };
        let help = expect(0, args);
        assert!(help.contains("Examples:\n  tonnage "), "{verb}: {help}");
        assert!(help.contains("--json"), "{verb}: {help}");
    }
    assert!(expect(0, &["--version"]).starts_with("tonnage "));
}

#[test]
fn completions_are_generated() {
    for (shell, sign) in [
        ("bash", "complete -F _tonnage"),
        ("zsh", "#compdef tonnage"),
        ("fish", "complete -c tonnage"),
        ("elvish", "edit:completion"),
        ("powershell", "Register-ArgumentCompleter"),
    ] {
        let script = expect(0, &["completions", shell]);
        assert!(
            script.contains(sign) && script.contains("max-size"),
            "{shell}"
        );
    }
    let folder = tempfile::tempdir().unwrap();
    let script = folder.path().join("tonnage.bash");
    std::fs::write(&script, expect(0, &["completions", "bash"])).unwrap();
    assert!(
        Command::new("bash")
            .arg("-n")
            .arg(script)
            .status()
            .unwrap()
            .success()
    );
}

#[test]
fn hostile_names_reach_no_terminal() {
    let folder = tempfile::tempdir().unwrap();
    let name = r"a\u001b[2J\u202eb\u0000\n\u009b1m\u200b\r";
    let entry = |dtype: &str, shape: &str, end: u8| {
        format!(r#"{{"dtype":"{dtype}","shape":[{shape}],"data_offsets":[0,{end}]}}"#)
    };
    let metadata = format!(r#""__metadata__":{{"{name}":"{name}"}}"#);
    let header = format!(r#"{{{metadata},"{name}":{}}}"#, entry("U8", "2", 2));
    let path = raw(folder.path(), "\u{1b}]0;x\u{7}.safetensors", &header, 2);
    let other = raw(
        folder.path(),
        "other.safetensors",
        &format!(r#"{{"{name}":{}}}"#, entry("F9", "2", 2)),
        2,
    );
    let bad = raw(
        folder.path(),
        "bad\n.safetensors",
        &format!(r#"{{"{name}":{}}}"#, entry("U8", "3", 2)),
        2,
    );
    let (path, other, bad) = (text(&path), text(&other), text(&bad));
    let target = folder.path().join("t\u{202e}.safetensors");
    let runs: &[&[&str]] = &[
        &["inspect", path],
        &["inspect", path, "--flat"],
        &["inspect", path, "--stats"],
        &["inspect", other],
        &["inspect", bad],
        &["inspect", path, "--select", "\u{1b}[2Jzzz"],
        &["verify", path, other, bad],
        &["diff", path, other],
        &["diff", path, other, "--metadata", "--no-values"],
        &["diff", path, path],
        &["metadata", "get", path],
        &["metadata", "get", path, "\u{1b}"],
        &["rename", path, "a*", "\u{1b}*", "--dry-run"],
        &["rename", path, "zzz\u{1b}", "b"],
        &["merge", other, text(&target)],
        &["merge", path, text(&target)],
        &["metadata", "set", path, "k\u{1b}=\u{1b}"],
        &["cast", path, "x", "--to", "\u{1b}[2J"],
        &["shard", path, text(&target), "--max-size", "\u{1b}"],
        &["inspect", "--\u{1b}[2J"],
        &[
            "bench",
            path,
            "--no-reference",
            "--device",
            "cpu",
            "--rounds",
            "1",
        ],
        &["bench", path, "--python", "\u{1b}[2J"],
    ];
    for args in runs {
        for json in [&[][..], &["--json"]] {
            let ran = run(&[args, json].concat());
            assert!(!acts_on_terminals(&ran.out), "{args:?} {:?}", ran.out);
            assert!(!acts_on_terminals(&ran.err), "{args:?} {:?}", ran.err);
            assert!(
                !ran.out.is_empty() || !ran.err.is_empty() || ran.code == 0,
                "{args:?}"
            );
        }
    }
    // And what was escaped says the same to a program.
    let report = expect_json(0, &["inspect", path]);
    assert_eq!(
        report["tensors"][0]["name"],
        json!("a\u{1b}[2J\u{202e}b\0\n\u{9b}1m\u{200b}\r")
    );
}

#[test]
fn a_closed_pipe_is_quiet_and_a_full_disk_is_not() {
    let folder = tempfile::tempdir().unwrap();
    let path = model(folder.path(), "m.safetensors", 3000);
    for args in [
        &["inspect", text(&path), "--flat"][..],
        &["inspect", text(&path), "--json"],
    ] {
        let mut child = command(args)
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        drop(child.stdout.take());
        let mut err = String::new();
        child
            .stderr
            .take()
            .unwrap()
            .read_to_string(&mut err)
            .unwrap();
        assert_eq!((child.wait().unwrap().code(), err.as_str()), (Some(0), ""));
    }
    let full = std::fs::OpenOptions::new()
        .write(true)
        .open("/dev/full")
        .unwrap();
    let ran = ended(command(&["inspect", text(&path)]).stdout(full));
    assert_eq!((ran.code, ran.err.lines().count()), (6, 1), "{ran:?}");
    assert!(ran.err.contains("No space left on device"), "{ran:?}");
}

/// Runs in a terminal of its own, and gives everything that was shown.
fn in_terminal(args: &[&str], environment: &[(&str, &str)]) -> String {
    let mut line = env!("CARGO_BIN_EXE_tonnage").to_owned();
    for arg in args {
        line.push_str(&format!(" '{arg}'"));
    }
    let mut script = Command::new("script");
    script
        .args(["-qec", &line, "/dev/null"])
        .env_remove("NO_COLOR")
        .env("TERM", "xterm");
    let ran = ended(
        script
            .envs(environment.iter().copied())
            .stdin(Stdio::null()),
    );
    assert_eq!(ran.code, 0, "{ran:?}");
    ran.out
}

#[test]
fn colours_and_bars_are_for_terminals() {
    let folder = tempfile::tempdir().unwrap();
    let path = model(folder.path(), "m.safetensors", 2);
    let shown = in_terminal(&["inspect", text(&path)], &[]);
    assert!(shown.contains("\u{1b}[1m"), "{shown:?}");
    for environment in [("NO_COLOR", "1"), ("TERM", "dumb")] {
        let shown = in_terminal(&["inspect", text(&path)], &[environment]);
        assert!(
            shown.contains("model") && !shown.contains('\u{1b}'),
            "{shown:?}"
        );
    }
    let copy = folder.path().join("copy.safetensors");
    let shown = in_terminal(&["merge", text(&path), text(&copy)], &[]);
    assert!(
        shown.contains("writing") && shown.contains('%'),
        "{shown:?}"
    );
    let ran = run(&["merge", text(&path), text(&copy), "--force"]);
    assert_eq!((ran.code, ran.err.as_str()), (0, ""), "no bar in a pipe");
    assert!(!acts_on_terminals(&ran.out));
}

/// Waits until a child catches SIGINT and SIGTERM: before that, they end it as they end anything.
fn until_it_listens(child: u32) {
    let both = 1_u64 << (2 - 1) | 1 << (15 - 1);
    let start = Instant::now();
    loop {
        let status = std::fs::read_to_string(format!("/proc/{child}/status")).unwrap();
        let caught = status.lines().find_map(|line| line.strip_prefix("SigCgt:"));
        let caught = u64::from_str_radix(caught.unwrap().trim(), 16).unwrap();
        if caught & both == both {
            return;
        }
        assert!(
            start.elapsed() < Duration::from_secs(60),
            "it never listens"
        );
        std::thread::sleep(Duration::from_millis(1));
    }
}

#[test]
fn an_interrupted_copy_leaves_nothing() {
    let folder = tempfile::tempdir().unwrap();
    // 64 GiB that take no room on the disk; a copy of them would.
    let length = 64_u64 << 30;
    let header =
        format!(r#"{{"a":{{"dtype":"U8","shape":[{length}],"data_offsets":[0,{length}]}}}}"#);
    let path = raw(folder.path(), "huge.safetensors", &header, 0);
    let file = std::fs::OpenOptions::new().write(true).open(&path).unwrap();
    file.set_len(8 + header.len() as u64 + length).unwrap();
    let copy = folder.path().join("copy");
    std::fs::create_dir(&copy).unwrap();
    let target = copy.join("copy.safetensors");
    let cases: [(&str, &[&str]); 2] = [
        ("INT", &["inspect", text(&path), "--stats"]),
        ("TERM", &["diff", text(&path), text(&path)]),
    ];
    for (signal, args) in cases {
        let child = command(args)
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        until_it_listens(child.id());
        std::thread::sleep(Duration::from_millis(100));
        let sent = Command::new("kill")
            .args([&format!("-{signal}"), &child.id().to_string()])
            .status();
        assert!(sent.unwrap().success());
        let output = child.wait_with_output().unwrap();
        assert_eq!(output.status.code(), Some(130), "{args:?} {output:?}");
        assert_eq!(
            String::from_utf8_lossy(&output.stderr),
            "error[CANCELLED]: interrupted\n"
        );
    }
    // A copy: wait until it has begun to write, then interrupt it.
    let length = 2_u64 << 30;
    let header =
        format!(r#"{{"a":{{"dtype":"U8","shape":[{length}],"data_offsets":[0,{length}]}}}}"#);
    let path = raw(folder.path(), "large.safetensors", &header, 0);
    let file = std::fs::OpenOptions::new().write(true).open(&path).unwrap();
    file.set_len(8 + header.len() as u64 + length).unwrap();
    let args = ["merge", text(&path), text(&target), "--no-sync"];
    let child = command(&args)
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let start = Instant::now();
    while listing(&copy).is_empty() {
        assert!(
            start.elapsed() < Duration::from_secs(30),
            "the copy never began"
        );
        std::thread::sleep(Duration::from_millis(1));
    }
    let sent = Command::new("kill")
        .args(["-INT", &child.id().to_string()])
        .status();
    assert!(sent.unwrap().success());
    let output = child.wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(130), "{output:?}");
    assert!(listing(&copy).is_empty(), "{:?}", listing(&copy));
}

/// Every key of a value, with the place of arrays marked once.
fn keys(value: &Value, prefix: &str, found: &mut Vec<String>) {
    match value {
        Value::Object(pairs) => {
            for (key, value) in pairs {
                let path = format!("{prefix}.{key}");
                if key != "metadata" || value.is_array() {
                    keys(value, &path, found);
                }
                found.push(path);
            }
        }
        Value::Array(values) => values
            .iter()
            .for_each(|value| keys(value, &format!("{prefix}[]"), found)),
        _ => {}
    }
    found.sort();
    found.dedup();
}

#[track_caller]
fn has_keys(value: &Value, expected: &str) {
    let mut found = Vec::new();
    keys(value, "", &mut found);
    let expected: Vec<&str> = expected.split_whitespace().collect();
    assert_eq!(found, expected);
}

#[test]
fn json_has_the_fields_that_were_promised() {
    let folder = tempfile::tempdir().unwrap();
    let a = model(folder.path(), "a.safetensors", 1);
    let b = model(folder.path(), "b.safetensors", 2);
    has_keys(
        &expect_json(0, &["inspect", text(&a), "--stats"]),
        ".bytes .dtypes .dtypes[].bytes .dtypes[].dtype .dtypes[].parameters .dtypes[].tensors .files \
         .files[].bytes .files[].data_start .files[].header_padding .files[].metadata .files[].path \
         .files[].tensors .index .layout .metadata .notes .parameters .path .schema .tensor_count .tensors \
         .tensors[].bytes .tensors[].dtype .tensors[].file .tensors[].name .tensors[].offset \
         .tensors[].parameters .tensors[].shape .tensors[].stats .tensors[].stats.count .tensors[].stats.inf \
         .tensors[].stats.max .tensors[].stats.mean .tensors[].stats.min .tensors[].stats.nan \
         .tensors[].stats.std .tensors[].stats.zeros",
    );
    has_keys(
        &expect_json(1, &["diff", text(&a), text(&b)]),
        ".a .b .compared .equal .metadata .schema .tensors .tensors[].b .tensors[].b.dtype \
         .tensors[].b.shape .tensors[].kind .tensors[].name .values",
    );
    let broken = folder.path().join("broken.safetensors");
    std::fs::write(&broken, b"12345678").unwrap();
    has_keys(
        &expect_json(1, &["verify", text(&a), text(&broken)]),
        ".checked .checked[].files .checked[].files[].bytes .checked[].files[].chunks \
         .checked[].files[].hashed .checked[].files[].path .checked[].files[].tensors .checked[].findings .checked[].findings[].clause \
         .checked[].findings[].code .checked[].findings[].file .checked[].findings[].severity \
         .checked[].findings[].tensor .checked[].findings[].text .checked[].ok .checked[].path .ok .schema",
    );
    has_keys(
        &expect_json(0, &["shard", text(&a), text(&folder.path().join("s"))]),
        ".bytes .files .index .notes .output .schema .seconds .tensors",
    );
    has_keys(
        &expect_json(0, &["metadata", "set", text(&a), "k=v"]),
        ".bytes_written .deleted .file .notes .renamed .schema .way",
    );
    has_keys(
        &expect_json(0, &["metadata", "get", text(&a)]),
        ".metadata .schema",
    );
    has_keys(
        &expect_json(0, &["rename", text(&a), "steps", "x", "--dry-run"]),
        ".dry_run .renamed .renamed[].new .renamed[].old .schema",
    );
    has_keys(
        &expect_json(
            0,
            &[
                "bench",
                text(&a),
                "--no-reference",
                "--device",
                "cpu",
                "--rounds",
                "1",
            ],
        ),
        ".bytes .limits .limits[].gb_per_s .limits[].group .limits[].name .loads .loads[].bytes \
         .loads[].failed .loads[].from .loads[].gb_per_s .loads[].median .loads[].of_limit \
         .loads[].reason .loads[].seconds .loads[].strategy .loads[].to .loads[].who .machine \
         .machine.file_system .machine.memory .machine.processor .machine.storage .machine.system \
         .machine.threads .notes .path .reference .schema .seconds .tensor_count .tensors .total_bytes \
         .version",
    );
    let schemas = expect_json(0, &["inspect", text(&a)]);
    assert_eq!(schemas["schema"], json!("tonnage.inspect/1"));
}
