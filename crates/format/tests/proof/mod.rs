//! What the generated tests share: a generator of headers, right and wrong, and a reader that is
//! slow and obviously right to judge them by.

#![allow(
    dead_code,
    unreachable_pub,
    reason = "each test program uses a part of it"
)]

pub mod generate;
pub mod mutate;
pub mod oracle;
pub mod random;

pub use random::Random;

/// How many cases a test runs: `TONNAGE_CASES`, or what it says itself.
pub fn cases(usual: u64) -> u64 {
    #[allow(
        clippy::disallowed_methods,
        reason = "a knob of the tests, not of the crate"
    )]
    let given = std::env::var("TONNAGE_CASES");
    given.map_or(usual, |text| {
        text.parse().expect("TONNAGE_CASES is a number")
    })
}

/// Which cases they are: `TONNAGE_SEED`, or always the same.
pub fn seed() -> u64 {
    #[allow(
        clippy::disallowed_methods,
        reason = "a knob of the tests, not of the crate"
    )]
    let given = std::env::var("TONNAGE_SEED");
    given.map_or(1, |text| text.parse().expect("TONNAGE_SEED is a number"))
}

/// Bytes as a failing test shows them: text where it is text.
pub fn shown(bytes: &[u8]) -> String {
    format!("{}\n  as bytes {bytes:?}", String::from_utf8_lossy(bytes))
}
