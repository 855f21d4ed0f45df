//! `_verify`: everything that is wrong with a checkpoint, as rows.

use std::path::PathBuf;

use pyo3::prelude::*;
use tonnage::{OpenOptions, Severity, Verify};

use super::run::{Request, run};

/// Label, tensors, bytes, whether the header could be read, chunks that were compared with their checksums,
/// whether all of it was compared with the hash beside it.
type FileRow = (String, usize, u64, bool, u64, bool);
/// Severity, code, clause, file, tensor, text.
type FindingRow = (
    &'static str,
    &'static str,
    Option<&'static str>,
    Option<String>,
    Option<String>,
    String,
);

/// Looks at every file of a checkpoint. Raises only where there is nothing to look at.
#[pyfunction]
#[pyo3(name = "_verify")]
pub fn verify(
    py: Python<'_>,
    path: PathBuf,
    allow_symlinks: bool,
    headers_only: bool,
) -> PyResult<(Vec<FileRow>, Vec<FindingRow>)> {
    let open = OpenOptions {
        allow_symlinks,
        ..OpenOptions::default()
    };
    let request = Request {
        total: 0,
        threads: None,
        progress: None,
        cancel: None,
        python: false,
        // Ctrl-C ends it: there may be much to read.
        slow: true,
    };
    let found = run(py, request, |options| {
        let verify = Verify {
            open,
            headers_only,
            cancel: options.cancel,
            ..Verify::default()
        };
        tonnage::verify_with(path, &verify)
    })?;
    let files = found.files.into_iter();
    let files = files
        .map(|f| (f.label, f.tensors, f.bytes, f.readable, f.chunks, f.hashed))
        .collect();
    let findings = found.findings.into_iter();
    let findings = findings
        .map(|f| {
            let severity = match f.severity {
                Severity::Error => "error",
                Severity::Warning => "warning",
                Severity::Note => "note",
            };
            (severity, f.code, f.clause, f.file, f.tensor, f.text)
        })
        .collect();
    Ok((files, findings))
}
