//! A header costs at most four times its size in memory, its own bytes included, whatever the verdict
//! (spec 10.1): 99 MB each of the worst that a header can be made of.
//!
//! Invariants of the counting allocator:
//! 1. Every call goes to `System` with the caller's own arguments, so the caller's promises to us are our
//!    promises to `System`.
//! 2. What is counted beside it never touches the memory.
#![allow(unsafe_code)]

use std::alloc::{GlobalAlloc, Layout, System};
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};

use tonnage_format::{Header, ReadOptions, Reason};

struct Counting;

static LIVE: AtomicUsize = AtomicUsize::new(0);
static PEAK: AtomicUsize = AtomicUsize::new(0);

fn grown(bytes: usize) {
    PEAK.fetch_max(LIVE.fetch_add(bytes, Relaxed) + bytes, Relaxed);
}

fn shrunk(bytes: usize) {
    LIVE.fetch_sub(bytes, Relaxed);
}

// SAFETY: invariants 1 and 2: `System` keeps the contract.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        grown(layout.size());
        // SAFETY: invariant 1.
        unsafe { System.alloc(layout) }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        grown(layout.size());
        // SAFETY: invariant 1.
        unsafe { System.alloc_zeroed(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        shrunk(layout.size());
        // SAFETY: invariant 1.
        unsafe { System.dealloc(pointer, layout) }
    }

    unsafe fn realloc(&self, pointer: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        // While the bytes move, old and new are there: what a peak has to hold.
        grown(size);
        shrunk(layout.size());
        // SAFETY: invariant 1.
        unsafe { System.realloc(pointer, layout, size) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

const SIZE: usize = 99_000_000;

/// `open`, then pieces until the header has `SIZE` bytes, then `close`, then spaces. A piece is told its
/// number; pieces are joined by commas.
fn header(open: &str, close: &str, mut piece: impl FnMut(usize, &mut Vec<u8>)) -> Vec<u8> {
    // Room for the last piece, which may reach past the size.
    let mut bytes = Vec::with_capacity(8 + SIZE + 4096);
    bytes.extend_from_slice(&[0; 8]);
    bytes.extend_from_slice(open.as_bytes());
    for number in 0.. {
        let before = bytes.len();
        if number > 0 {
            bytes.push(b',');
        }
        piece(number, &mut bytes);
        if bytes.len() + close.len() > 8 + SIZE {
            bytes.truncate(before);
            break;
        }
    }
    bytes.extend_from_slice(close.as_bytes());
    bytes.resize(8 + SIZE, b' ');
    bytes[..8].copy_from_slice(&(SIZE as u64).to_le_bytes());
    bytes
}

/// Appends a key and its colon: `prefix` and a short name, the number in base 36.
fn key(prefix: &str, mut number: usize, out: &mut Vec<u8>) {
    out.push(b'"');
    out.extend_from_slice(prefix.as_bytes());
    loop {
        out.push(b"0123456789abcdefghijklmnopqrstuvwxyz"[number % 36]);
        number /= 36;
        if number == 0 {
            break;
        }
    }
    out.extend_from_slice(b"\":");
}

const ENTRY: &str = r#"{"dtype":"U8","shape":[0],"data_offsets":[0,0]}"#;

/// Parses, and checks the verdict and the bill. Gives how many bytes parsing took beyond the header.
fn bill(what: &str, file: Vec<u8>, options: &ReadOptions, verdict: Result<usize, Reason>) -> usize {
    let before = LIVE.load(Relaxed);
    assert!(before >= SIZE, "the header itself is counted");
    PEAK.store(before, Relaxed);
    let parsed = Header::parse(&file[..], Some(file.len() as u64), options);
    let peak = PEAK.load(Relaxed);
    match (&parsed, verdict) {
        (Ok(header), Ok(tensors)) => assert_eq!(header.len(), tensors, "{what}"),
        (Err(error), Err(reason)) => assert_eq!(error.reason(), reason, "{what}: {error}"),
        (parsed, expected) => panic!("{what}: {:?}, not {expected:?}", parsed.as_ref().err()),
    }
    assert!(
        peak <= 4 * SIZE,
        "{what}: {peak} bytes for a header of {SIZE}"
    );
    peak - before
}

/// One test, since what other threads allocate would be counted too.
#[test]
fn a_hostile_header_costs_at_most_four_times_its_size() {
    let (strict, compat) = (ReadOptions::strict(), ReadOptions::compat());

    let mut tensors = 0;
    let file = header("{", "}", |number, out| {
        tensors = number;
        key("", number, out);
        out.extend_from_slice(ENTRY.as_bytes());
    });
    assert!(tensors > 1_750_000, "{tensors}");
    let cost = bill("many tensors", file, &strict, Ok(tensors));
    // Guards against a test that counts nothing: a tensor takes at least its row.
    assert!(cost > tensors * 32, "{cost} bytes for {tensors} tensors");

    // The same out of order, so that the order by offset is stored, spelt with spaces, every name with an
    // escape; and each name twice, which is found only at the end.
    let mut file = header(
        r#"{"z":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},"#,
        "}",
        |number, out| {
            tensors = number;
            key("\\u0041", number, out);
            out.extend_from_slice(br#"{ "dtype":"U8","shape":[0],"data_offsets":[0,0]}"#);
        },
    );
    file.push(0);
    bill("escaped names", file, &strict, Ok(tensors + 1));

    for (options, verdict) in [(&strict, Err(Reason::DuplicateTensor)), (&compat, Ok(1))] {
        let file = header("{", "}", |_, out| {
            out.extend_from_slice(b"\"a\":");
            out.extend_from_slice(ENTRY.as_bytes());
        });
        bill("one name, two million times", file, options, verdict);
    }

    let file = header(
        r#"{"a":{"dtype":"U8","data_offsets":[0,0],"shape":["#,
        "]}}",
        |_, out| out.push(b'0'),
    );
    bill(
        "one tensor of 49 million dimensions",
        file,
        &strict,
        Err(Reason::LimitRank),
    );

    let many = "[".to_owned() + &["1"; 60_000].join(",") + "]";
    let file = header("{", "}", |number, out| {
        key("", number, out);
        out.extend_from_slice(br#"{"dtype":"U8","data_offsets":[0,0],"shape":"#);
        out.extend_from_slice(many.as_bytes());
        out.push(b'}');
    });
    bill(
        "many tensors of many dimensions",
        file,
        &strict,
        Err(Reason::LimitDims),
    );

    for (options, verdict) in [(&strict, Ok(1)), (&compat, Ok(1))] {
        let open = r#"{"a":{"dtype":"U8","shape":[0],"data_offsets":[0,0],"x":["#;
        let file = header(open, "]}}", |_, out| out.push(b'7'));
        bill("an unknown array of 49 million", file, options, verdict);
    }

    let file = header(r#"{"__metadata__":{"#, "}}", |number, out| {
        key("", number, out);
        out.extend_from_slice(b"\"\"");
    });
    bill(
        "millions of metadata keys",
        file,
        &strict,
        Err(Reason::LimitMetadata),
    );
    let mut generous = strict;
    generous.limits.metadata_entries = u64::MAX;
    let file = header(r#"{"__metadata__":{"#, "}}", |number, out| {
        key("", number, out);
        out.extend_from_slice(b"\"\"");
    });
    bill("millions of metadata keys, allowed", file, &generous, Ok(0));

    let mut file = vec![b' '; 8 + SIZE];
    file[..8].copy_from_slice(&(SIZE as u64).to_le_bytes());
    bill("only spaces", file, &strict, Err(Reason::JsonSyntax));

    for options in [&strict, &compat] {
        let open = r#"{"a":{"dtype":"U8","shape":[0],"data_offsets":[0,0],"x":{"#;
        let file = header(open, "}}}", |number, out| {
            key("", number, out);
            out.extend_from_slice(b"{}");
        });
        bill(
            "an unknown object of millions of keys",
            file,
            options,
            Ok(1),
        );
    }

    let open = r#"{"a":{"dtype":"U8","shape":[0],"data_offsets":[0,0],"x":{"#;
    let file = header(open, "}}}", |number, out| {
        key("\\n", number, out);
        out.push(b'0');
    });
    bill(
        "an unknown object of millions of escaped keys",
        file,
        &strict,
        Ok(1),
    );

    let open = r#"{"a":{"dtype":"U8","shape":[0],"data_offsets":[0,0]},""#;
    let file = header(open, &format!("\":{ENTRY}}}"), |number, out| {
        if number > 0 {
            out.pop();
        }
        out.extend_from_slice(b"\\n");
    });
    bill("one name of nothing but escapes", file, &strict, Ok(2));

    let file = header(
        r#"{"a":{"dtype":""#,
        r#"","shape":[0],"data_offsets":[0,0]}}"#,
        |number, out| {
            if number > 0 {
                out.pop();
            }
            out.extend_from_slice(b"\\\\");
        },
    );
    bill("a dtype of nothing but escapes", file, &strict, Ok(1));
}
