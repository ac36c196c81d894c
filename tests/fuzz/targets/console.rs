//! A hostile driver of the console device, at whose other end somebody has typed and does not read.
#![no_main]

libfuzzer_sys::fuzz_target!(|input: &[u8]| fuzz::drive(fuzz::device("console"), input));
