//! A hostile driver of the entropy device.
#![no_main]

libfuzzer_sys::fuzz_target!(|input: &[u8]| fuzz::drive(fuzz::device("rng"), input));
