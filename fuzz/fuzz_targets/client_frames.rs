#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| pglobby::fuzzing::client_frames(bytes));
