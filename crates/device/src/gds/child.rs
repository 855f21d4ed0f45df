//! The first start of cuFile, in a process of its own: it may never return, or end its process.

use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use super::Settings;

/// How often it is looked whether the child has ended.
const LOOK: Duration = Duration::from_millis(5);

/// Runs the child that the settings name, which is to call [`attempt`](super::attempt).
pub(super) fn run(settings: &Settings) -> Result<(), String> {
    let Some((program, arguments)) = settings.child.split_first() else {
        return Err(
            "no program is named that could start cuFile apart from this process".to_owned(),
        );
    };
    let mut command = Command::new(program);
    command
        .args(arguments)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::piped());
    if let Some(log) = &settings.log {
        command.env("CUFILE_LOGFILE_PATH", log);
    }
    let child = command.spawn();
    let child = child.map_err(|error| format!("{}: {error}", program.display()))?;
    wait(child, settings.limit)
}

fn wait(mut child: Child, limit: Duration) -> Result<(), String> {
    let begun = Instant::now();
    loop {
        match child.try_wait() {
            Ok(Some(status)) if status.success() => return Ok(()),
            Ok(Some(status)) => return Err(said(child, &status.to_string())),
            Ok(None) if begun.elapsed() < limit => thread::sleep(LOOK),
            ended => {
                let _ = child.kill();
                let _ = child.wait();
                return Err(match ended {
                    Err(error) => {
                        format!("the process that tries cuFile could not be waited for: {error}")
                    }
                    _ => format!(
                        "cuFile did not start within {:.0} s, in a process of its own",
                        limit.as_secs_f64()
                    ),
                });
            }
        }
    }
}

/// The last line that it wrote, or how it ended.
fn said(mut child: Child, status: &str) -> String {
    use std::io::Read;
    let mut text = Vec::new();
    if let Some(errors) = child.stderr.take() {
        // What a child says is one line; a limit all the same.
        let _ = errors.take(64 << 10).read_to_end(&mut text);
    }
    let text = String::from_utf8_lossy(&text);
    match text.lines().map(str::trim).rfind(|line| !line.is_empty()) {
        Some(line) => line.to_owned(),
        None => format!("the process that tries cuFile ended with {status}"),
    }
}
