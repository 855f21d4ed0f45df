//! The scanner against a slow reader over `serde_json` (`proof/oracle.rs`), on generated headers:
//! the same verdict, a reason that the header gives, the same content.
//!
//! `TONNAGE_CASES` and `TONNAGE_SEED` choose how many and which; a failure names its case.

#![allow(
    clippy::disallowed_macros,
    reason = "a test may say what it counted; the crate prints nothing"
)]

mod proof;

use std::collections::BTreeMap;

use proof::mutate::{Case, case};
use proof::oracle::{Content, judge};
use tonnage_format::{Class, Error, Header, ReadOptions, Reason, Step, probe};

/// The file's first bytes.
fn framed(json: &[u8]) -> Vec<u8> {
    let mut file = (json.len() as u64).to_le_bytes().to_vec();
    file.extend_from_slice(json);
    file
}

fn content(header: &Header<&[u8]>) -> Content {
    let tensors = header.iter().map(|tensor| {
        let row = (
            tensor.dtype.name().to_owned(),
            tensor.shape.to_vec(),
            tensor.begin,
            tensor.end,
        );
        (tensor.name.to_owned(), row)
    });
    let metadata = header.metadata().map(|metadata| {
        let pairs = metadata
            .iter()
            .map(|(key, value)| (key.to_owned(), value.to_owned()));
        pairs.collect()
    });
    Content {
        tensors: tensors.collect(),
        metadata,
    }
}

/// Judges a case both ways. The reason of a refusal comes back, for the count.
fn compare(Case { json, data_len }: &Case) -> Result<Option<Reason>, String> {
    let file = framed(json);
    let file_len = file.len() as u64 + data_len;
    let options = ReadOptions::strict();
    let parsed = Header::parse(&file[..], Some(file_len), &options);
    let judged = judge(json, *data_len);
    match &parsed {
        Ok(header) => {
            if !judged.accepts() {
                return Err(format!("accepted, but {:?}", judged.broken));
            }
            let found = content(header);
            if found != judged.content {
                return Err(format!("read {found:?}, needed {:?}", judged.content));
            }
            if probe(&file, Some(file_len), &options) != Ok(Step::Done(file.len() as u64)) {
                return Err("probing disagrees".to_owned());
            }
            Ok(None)
        }
        Err(error) => refusal(error, &judged).map(Some),
    }
}

fn refusal(error: &Error, judged: &proof::oracle::Judgement) -> Result<Reason, String> {
    let reason = error.reason();
    if judged.accepts() {
        return Err(format!("refused: {error:?}"));
    }
    if error.class() != Class::Malformed {
        return Err(format!("of class {:?}: {error:?}", error.class()));
    }
    // Text that is JSON is refused for a rule that it breaks.
    if !judged.not_json && !judged.broken.contains(&reason) {
        return Err(format!("{error:?}, but it breaks {:?}", judged.broken));
    }
    Ok(reason)
}

fn run(count: u64) {
    let seed = proof::seed();
    let mut reasons: BTreeMap<&str, u64> = BTreeMap::new();
    let mut accepted = 0_u64;
    for number in 0..count {
        let case = case(seed, number);
        match compare(&case) {
            Ok(None) => accepted += 1,
            Ok(Some(reason)) => *reasons.entry(reason.code()).or_default() += 1,
            Err(problem) => panic!(
                "case {number} of seed {seed}: {problem}\n{} bytes of data after {}",
                case.data_len,
                proof::shown(&case.json)
            ),
        }
    }
    println!("{count} headers of seed {seed}: {accepted} accepted, refused {reasons:?}");
    not_vacuous(count, accepted, &reasons);
}

/// The generator reaches every rule, and neither verdict is rare.
fn not_vacuous(count: u64, accepted: u64, reasons: &BTreeMap<&str, u64>) {
    if count < 100_000 {
        return;
    }
    let share = accepted as f64 / count as f64;
    assert!((0.3..0.8).contains(&share), "{share} accepted");
    let chapters = ["3.", "4.", "6.", "7."];
    let reachable = Reason::ALL.iter().filter(|reason| {
        let clause = reason.clause();
        chapters.iter().any(|chapter| clause.starts_with(chapter))
    });
    for reason in reachable {
        assert!(
            reasons.contains_key(reason.code()),
            "no header met {}",
            reason.code()
        );
    }
}

#[test]
fn the_scanner_judges_as_the_slow_reader_does() {
    run(proof::cases(200_000));
}

/// `make test-slow`.
#[test]
#[ignore = "minutes: ten million headers"]
fn ten_million_headers_are_judged_alike() {
    run(proof::cases(10_000_000));
}
