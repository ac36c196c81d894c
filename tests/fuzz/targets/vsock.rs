//! A hostile driver of the socket device, which is its own host program.
#![no_main]

libfuzzer_sys::fuzz_target!(|input: &[u8]| fuzz::drive(fuzz::device("vsock"), input));
