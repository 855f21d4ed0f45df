//! `verify`: every finding, with its code and clause.

use std::io::Write;

use serde_json::{Value, json};
use tonnage::{Finding, Severity, Verification};

use crate::args::{Common, Verify};
use crate::exit::{FOUND, Failure, IO, OK};
use crate::terminal::{Out, cancel};
use crate::{json, text};

/// Runs the verb.
pub fn run(args: &Verify, common: &Common, out: &mut Out) -> Result<u8, Failure> {
    let options = tonnage::Verify {
        open: super::options(common),
        headers_only: args.headers_only,
        cancel: Some(cancel()),
        ..tonnage::Verify::default()
    };
    let (mut bad, mut only_io, mut reports) = (false, true, Vec::new());
    for path in &args.paths {
        let verification = match tonnage::verify_with(path, &options) {
            Ok(verification) => verification,
            // One path of many must not hide what is found about the others.
            Err(error) if args.paths.len() > 1 => unreachable_path(&error),
            Err(error) => return Err(error.into()),
        };
        let fails = |finding: &Finding| match finding.severity {
            Severity::Error => true,
            Severity::Warning => args.warnings_fail,
            Severity::Note => false,
        };
        let failed = verification.findings.iter().any(fails);
        bad |= failed;
        only_io &= verification
            .findings
            .iter()
            .filter(|finding| fails(finding))
            .all(|finding| finding.code == "IO");
        let path = path.to_string_lossy();
        if common.json {
            reports.push(report(&path, !failed, &verification));
        } else {
            show(args, &path, &verification, out)?;
        }
    }
    if common.json {
        json::write(
            out,
            &json!({"schema": "tonnage.verify/1", "ok": !bad, "checked": reports}),
        )?;
    }
    Ok(match (bad, only_io) {
        (false, _) => OK,
        // Nothing is known to be wrong with the files: the system did not let them be read.
        (true, true) => IO,
        (true, false) => FOUND,
    })
}

/// The failure to look at a path, as a finding.
fn unreachable_path(error: &tonnage::Error) -> Verification {
    let finding = Finding {
        severity: Severity::Error,
        code: error.code(),
        clause: error.clause(),
        file: error.file().map(str::to_owned),
        tensor: error.tensor().map(str::to_owned),
        text: error.to_string(),
    };
    Verification {
        findings: vec![finding],
        ..Verification::default()
    }
}

fn severity(severity: Severity) -> &'static str {
    match severity {
        Severity::Error => "error",
        Severity::Warning => "warning",
        Severity::Note => "note",
    }
}

fn show(
    args: &Verify,
    path: &str,
    verification: &Verification,
    out: &mut Out,
) -> Result<(), Failure> {
    for finding in &verification.findings {
        let sentence = text::line(&finding.text);
        // An error's sentence names its file and its clause itself.
        let file = match text::name(finding.file.as_deref().unwrap_or(path)) {
            file if sentence.contains(&*file) => String::new(),
            file => format!("{file}: "),
        };
        let clause = match finding.clause.map(|clause| format!("(spec {clause})")) {
            Some(clause) if !sentence.contains(&clause) => format!(" {clause}"),
            _ => String::new(),
        };
        let kind = severity(finding.severity);
        writeln!(out, "{kind}[{}]: {file}{sentence}{clause}", finding.code)?;
    }
    if args.quiet {
        return Ok(());
    }
    let count = |wanted: Severity| {
        verification
            .findings
            .iter()
            .filter(|f| f.severity == wanted)
            .count() as u64
    };
    let (errors, warnings) = (count(Severity::Error), count(Severity::Warning));
    let verdict = match (errors, warnings) {
        (0, 0) => "ok".to_owned(),
        (0, n) => format!("ok, {}", text::plural(n, "warning")),
        (n, 0) => text::plural(n, "error"),
        (n, m) => format!(
            "{}, {}",
            text::plural(n, "error"),
            text::plural(m, "warning")
        ),
    };
    let tensors: u64 = verification
        .files
        .iter()
        .map(|file| file.tensors as u64)
        .sum();
    let bytes: u64 = verification.files.iter().map(|file| file.bytes).sum();
    writeln!(
        out,
        "{}: {verdict} · {}, {}, {}",
        text::name(path),
        text::plural(verification.files.len() as u64, "file"),
        text::plural(tensors, "tensor"),
        text::size(bytes),
    )?;
    Ok(())
}

fn report(path: &str, ok: bool, verification: &Verification) -> Value {
    let findings: Vec<Value> = verification
        .findings
        .iter()
        .map(|finding| {
            json!({
                "severity": severity(finding.severity), "code": finding.code, "clause": finding.clause,
                "file": finding.file, "tensor": finding.tensor, "text": finding.text,
            })
        })
        .collect();
    let files: Vec<Value> = verification
        .files
        .iter()
        .map(|file| {
            json!({
                "path": file.label, "tensors": file.tensors, "bytes": file.bytes,
                "chunks": file.chunks, "hashed": file.hashed,
            })
        })
        .collect();
    json!({"path": path, "ok": ok, "files": files, "findings": findings})
}
