//! Snapshots of any content: a sentence, or a machine that works.
#![no_main]

libfuzzer_sys::fuzz_target!(|input: &[u8]| fuzz::snapshot::load(input));
