//! A process of this test that saves one generation after the other, and is killed meanwhile.

use std::ffi::OsStr;
use std::io::{BufRead, BufReader};
use std::process::{Command, Stdio};
use std::time::Duration;

/// Starts the ignored test `child` of this file with `argument` in the variable `name`, kills it (SIGKILL) `delay` after it
/// said that its first generation starts, and gives what it said last: started and done. `said` is what holds before.
pub fn killed(
    name: &str,
    argument: impl AsRef<OsStr>,
    mut said: (u64, u64),
    delay: Duration,
) -> (u64, u64) {
    let mut child = Command::new(std::env::current_exe().unwrap())
        .args([
            "--ignored",
            "--exact",
            "child",
            "--nocapture",
            "--test-threads=1",
        ])
        .env(name, argument)
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
    let mut hear = |line: String| {
        let mut words = line.split_whitespace();
        match (words.next(), words.next().and_then(|n| n.parse().ok())) {
            (Some("start"), Some(n)) => said.0 = n,
            (Some("done"), Some(n)) => said.1 = n,
            _ => return false,
        }
        true
    };
    // From the first start on, so that the kill falls into saving.
    while !hear(lines.next().expect("the child started").unwrap()) {}
    std::thread::sleep(delay);
    child.kill().unwrap();
    child.wait().unwrap();
    for line in lines {
        hear(line.unwrap_or_default());
    }
    said
}
