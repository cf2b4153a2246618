//! The thin binary: see `pglobby::cli`.

fn main() {}
