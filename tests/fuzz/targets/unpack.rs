//! Packed snapshots that somebody has changed: a sentence, or a snapshot.
#![no_main]

libfuzzer_sys::fuzz_target!(|input: &[u8]| fuzz::unpack::unpack(input));
