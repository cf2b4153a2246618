#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| pglobby::fuzzing::server_frames(bytes));
