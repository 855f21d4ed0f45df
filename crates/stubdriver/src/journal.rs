//! What happened, in order: one JSON object a line, in a file.
//!
//! Every line has `t`, microseconds since the driver started, and `op`. Numbers are decimal.

use std::fmt::Arguments;
use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::Path;
use std::time::Instant;

/// The journal; silent where no file was asked for.
#[derive(Debug)]
pub struct Journal {
    start: Instant,
    file: Option<BufWriter<File>>,
}

impl Journal {
    pub fn open(path: Option<&Path>) -> Result<Self, String> {
        let create = |path: &Path| {
            let file = File::create(path);
            file.map_err(|error| format!("{}: {error}", path.display()))
        };
        let file = path.map(create).transpose()?.map(BufWriter::new);
        Ok(Journal {
            start: Instant::now(),
            file,
        })
    }

    /// One line: the operation, and the rest of a JSON object's members.
    pub fn line(&mut self, op: &str, rest: Arguments<'_>) {
        let t = self.start.elapsed().as_micros();
        if let Some(file) = &mut self.file {
            // Whoever reads the journal finds it incomplete then.
            let _ = writeln!(file, "{{\"t\":{t},\"op\":\"{op}\",{rest}}}");
        }
    }

    pub fn flush(&mut self) {
        if let Some(file) = &mut self.file {
            let _ = file.flush();
        }
    }
}
