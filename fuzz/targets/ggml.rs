#![no_main]

#[path = "../ggml_checks.rs"]
mod checks;

libfuzzer_sys::fuzz_target!(|data: &[u8]| checks::ggml(data));
