//! See the harness: the suite runs it as well.
#![no_main]
#![allow(dead_code, deprecated)]

#[path = "../../tests/it/fixture.rs"]
mod fixture;
#[path = "../../tests/it/harness.rs"]
mod harness;

libfuzzer_sys::fuzz_target!(|data: &[u8]| harness::formats(data));
