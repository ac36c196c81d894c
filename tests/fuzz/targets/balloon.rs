//! A hostile driver of the balloon.
#![no_main]

libfuzzer_sys::fuzz_target!(|input: &[u8]| fuzz::drive(fuzz::device("balloon"), input));
