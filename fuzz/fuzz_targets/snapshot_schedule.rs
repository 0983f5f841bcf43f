//! libFuzzer's entrance; see `weft_fuzz::TARGETS`.
#![no_main]

libfuzzer_sys::fuzz_target!(|input: &[u8]| weft_fuzz::run("snapshot_schedule", input));
