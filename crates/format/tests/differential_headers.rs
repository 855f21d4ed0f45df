//! The reference's profile against the reference crate itself, on generated headers: the same
//! verdict and the same content. And where the strict profile differs from the reference, named
//! quirks, each of them needed, account for the difference.

// The reference crate wants a file system that wasm32 has not.
#![cfg(not(target_family = "wasm"))]
#![allow(
    clippy::disallowed_macros,
    reason = "a test may say what it counted; the crate prints nothing"
)]

mod proof;

use std::collections::BTreeMap;

use proof::mutate::{Case, case};
use proof::oracle::Content;
use safetensors::SafeTensors;
use safetensors::tensor::Metadata;
use tonnage_format::{Error, Header, Quirks, ReadOptions, Reason};

/// A data section up to this long is built in full and read by the reference's own entry point.
const WHOLE: u64 = 1 << 12;

fn parse<'a>(file: &'a [u8], len: u64, options: &ReadOptions) -> Result<Header<&'a [u8]>, Error> {
    Header::parse(file, Some(len), options)
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

/// What the reference makes of a file: its content, or why not.
fn reference(file: &[u8], data_len: u64) -> Result<Content, String> {
    let read = if data_len <= WHOLE {
        let mut whole = file.to_vec();
        whole.resize(file.len() + data_len as usize, 0);
        let read = SafeTensors::read_metadata(&whole);
        // The two entry points are one reader.
        assert_eq!(read.is_ok(), SafeTensors::deserialize(&whole).is_ok());
        read.map_err(|error| error.to_string())?.1
    } else {
        // Too long to build: its checks of the header, then its check of the length.
        let json = std::str::from_utf8(&file[8..]).map_err(|error| error.to_string())?;
        let read: Metadata = serde_json::from_str(json).map_err(|error| error.to_string())?;
        if read.data_len() as u64 != data_len {
            return Err("incomplete metadata, file not fully covered".to_owned());
        }
        read
    };
    let tensors = read.tensors().into_iter().map(|(name, info)| {
        let shape = info.shape.iter().map(|&extent| extent as u64).collect();
        let (begin, end) = info.data_offsets;
        (
            name,
            (info.dtype.to_string(), shape, begin as u64, end as u64),
        )
    });
    let metadata = read
        .metadata()
        .as_ref()
        .map(|map| map.clone().into_iter().collect());
    Ok(Content {
        tensors: tensors.collect(),
        metadata,
    })
}

/// The quirk that answers for a refusal of the strict profile.
fn quirk_of(reason: Reason) -> Option<Quirks> {
    Some(match reason {
        Reason::DuplicateTensor => Quirks::DUPLICATE_TENSOR_LAST_WINS,
        Reason::DuplicateMetadataKey => Quirks::DUPLICATE_METADATA_KEY_LAST_WINS,
        Reason::EntryNotObject => Quirks::ENTRY_AS_ARRAY,
        Reason::DtypeNotString => Quirks::DTYPE_AS_ENUM_MAP,
        Reason::MetadataNotObject => Quirks::METADATA_NULL,
        Reason::SizeOverflow => Quirks::ORDERED_ZERO_OVERFLOW,
        Reason::IntegerRange => Quirks::FULL_U64,
        Reason::NestingTooDeep => Quirks::DEPTH_127,
        Reason::DuplicateField => Quirks::UNKNOWN_FIELD_REPEATS,
        _ => return None,
    })
}

/// The two quirks that refuse what the strict profile accepts.
const REFUSING: [Quirks; 2] = [
    Quirks::UNKNOWN_DTYPE_REFUSED,
    Quirks::NUMBER_RANGE_IN_SKIPPED,
];

/// Names the quirks between the strict verdict and the reference's.
fn explain(file: &[u8], len: u64, wanted: &Result<Content, String>) -> Result<Quirks, String> {
    let mut options = ReadOptions::strict();
    loop {
        let parsed = parse(file, len, &options);
        let add = match (&parsed, wanted) {
            (Ok(header), Ok(wanted)) if content(header) == *wanted => return Ok(options.quirks),
            (Err(_), Err(_)) => return Ok(options.quirks),
            (Ok(_), Err(_)) => {
                let missing = REFUSING.into_iter().find(|&quirk| {
                    let with = ReadOptions {
                        quirks: options.quirks.with(quirk),
                        ..options
                    };
                    !options.quirks.has(quirk) && parse(file, len, &with).is_err()
                });
                missing.ok_or("accepted with no quirk left")?
            }
            (Err(error), Ok(_)) => {
                let quirk = quirk_of(error.reason()).filter(|&quirk| !options.quirks.has(quirk));
                quirk.ok_or_else(|| format!("no quirk answers for {error:?}"))?
            }
            (Ok(header), Ok(_)) => return Err(format!("other content: {:?}", content(header))),
        };
        options.quirks = options.quirks.with(add);
    }
}

#[derive(Default)]
struct Tally {
    accepted: u64,
    refused: u64,
    quirks: BTreeMap<&'static str, u64>,
}

fn compare(Case { json, data_len }: &Case, tally: &mut Tally) -> Result<(), String> {
    let mut file = (json.len() as u64).to_le_bytes().to_vec();
    file.extend_from_slice(json);
    // Past the end of a file's length in 64 bits the reference's sum overflows (spec, disagreements).
    let Some(len) = data_len.checked_add(file.len() as u64) else {
        return Ok(());
    };
    let wanted = reference(&file, *data_len);
    match (&wanted, parse(&file, len, &ReadOptions::compat())) {
        (Ok(wanted), Ok(header)) if content(&header) == *wanted => tally.accepted += 1,
        (Err(_), Err(_)) => tally.refused += 1,
        (wanted, found) => {
            let found = found.map(|header| content(&header));
            return Err(format!("the reference: {wanted:?}\n  compat: {found:?}"));
        }
    }
    let used = explain(&file, len, &wanted)?;
    for &(name, quirk) in Quirks::NAMES {
        *tally.quirks.entry(name).or_default() += used.has(quirk) as u64;
    }
    Ok(())
}

fn run(count: u64) {
    let seed = proof::seed();
    let mut tally = Tally::default();
    for number in 0..count {
        let case = case(seed, number);
        if let Err(problem) = compare(&case, &mut tally) {
            panic!(
                "case {number} of seed {seed}: {problem}\n{} bytes of data after {}",
                case.data_len,
                proof::shown(&case.json)
            );
        }
    }
    let Tally {
        accepted,
        refused,
        quirks,
    } = tally;
    println!("{count} headers of seed {seed}: {accepted} accepted, {refused} refused; {quirks:?}");
    if count >= 100_000 {
        assert!(accepted > count / 4 && refused > count / 10);
        for (name, used) in quirks {
            assert!(used > 0, "no header met {name}");
        }
    }
}

#[test]
fn the_compat_profile_judges_as_the_reference_does() {
    run(proof::cases(100_000));
}

/// `make test-slow`.
#[test]
#[ignore = "minutes: a million headers"]
fn a_million_headers_are_judged_as_the_reference_judges() {
    run(proof::cases(1_000_000));
}
