//! The reference package in a Python beside us: found, started, asked to load.

use std::ffi::OsString;
use std::io::{BufRead, BufReader, Write};
use std::path::PathBuf;
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};

use serde_json::{Value, json};

const SCRIPT: &str = include_str!("reference.py");

/// A Python that has the reference package, waiting for work.
#[derive(Debug)]
pub struct Reference {
    child: Child,
    to: Option<ChildStdin>,
    from: BufReader<ChildStdout>,
    /// Its versions, in words.
    pub words: String,
    /// Whether it loads to CUDA devices.
    pub cuda: bool,
}

/// Tensors of files: path and names.
pub type Files = Vec<(String, Vec<String>)>;

/// The Python that a shell would start: of the active environment, or `python3`.
pub fn usual() -> PathBuf {
    let environment = std::env::var_os("VIRTUAL_ENV").filter(|folder| !folder.is_empty());
    let inside = environment.map(|folder: OsString| PathBuf::from(folder).join("bin/python3"));
    inside
        .filter(|python| python.exists())
        .unwrap_or_else(|| "python3".into())
}

impl Reference {
    /// Starts it.
    ///
    /// # Errors
    /// Why not, in a sentence.
    pub fn start(python: &PathBuf) -> Result<Reference, String> {
        let refused = |why: String| {
            format!(
                "no reference package beside it: {}: {why}",
                python.display()
            )
        };
        let mut child = Command::new(python)
            .args(["-c", SCRIPT])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .map_err(|error| refused(error.to_string()))?;
        let (to, from) = (child.stdin.take(), child.stdout.take());
        let Some(from) = from else {
            return Err(refused("it has no output".to_owned()));
        };
        let from = BufReader::new(from);
        let mut reference = Reference {
            child,
            to,
            from,
            words: String::new(),
            cuda: false,
        };
        let hello = reference.hear().map_err(refused)?;
        let Some(words) = hello.get("reference").and_then(Value::as_str) else {
            let why = hello
                .get("failed")
                .and_then(Value::as_str)
                .unwrap_or("an odd answer");
            return Err(refused(why.to_owned()));
        };
        reference.words = words.to_owned();
        reference.cuda = hello.get("cuda").and_then(Value::as_bool).unwrap_or(false);
        Ok(reference)
    }

    /// Loads these tensors, and gives the seconds: to the host, until every byte has been read once.
    ///
    /// # Errors
    /// What Python said.
    pub fn load(&mut self, files: &Files, device: &str) -> Result<f64, String> {
        let line = format!("{}\n", json!({"files": files, "device": device}));
        let written = self
            .to
            .as_mut()
            .map(|to| to.write_all(line.as_bytes()).and_then(|()| to.flush()));
        if !matches!(written, Some(Ok(()))) {
            return Err("Python has ended".to_owned());
        }
        let answer = self.hear()?;
        match answer.get("seconds").and_then(Value::as_f64) {
            Some(seconds) => Ok(seconds),
            None => Err(answer
                .get("failed")
                .and_then(Value::as_str)
                .unwrap_or("an odd answer")
                .to_owned()),
        }
    }

    fn hear(&mut self) -> Result<Value, String> {
        let mut line = String::new();
        match self.from.read_line(&mut line) {
            Ok(0) => Err("Python has ended".to_owned()),
            Ok(_) => serde_json::from_str(&line).map_err(|error| error.to_string()),
            Err(error) => Err(error.to_string()),
        }
    }
}

impl Drop for Reference {
    fn drop(&mut self) {
        // At the end of its input it ends by itself; whether it obeys is no matter, it is killed too.
        self.to.take();
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
