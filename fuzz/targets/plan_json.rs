#![no_main]

#[path = "../plan_checks.rs"]
mod checks;

libfuzzer_sys::fuzz_target!(|data: &[u8]| checks::plan_json(data));
