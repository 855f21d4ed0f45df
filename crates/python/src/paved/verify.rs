//! `_verify`: everything that is wrong with a checkpoint, as rows.

use std::path::PathBuf;

use pyo3::prelude::*;
use tonnage::{OpenOptions, Severity};

use super::failure;

/// Label, tensors, bytes, whether the header could be read.
type FileRow = (String, usize, u64, bool);
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
) -> PyResult<(Vec<FileRow>, Vec<FindingRow>)> {
    let options = OpenOptions {
        allow_symlinks,
        ..OpenOptions::default()
    };
    let found = py
        .detach(|| tonnage::verify(path, &options))
        .map_err(|e| failure::raise(&e))?;
    let files = found.files.into_iter();
    let files = files
        .map(|f| (f.label, f.tensors, f.bytes, f.readable))
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
