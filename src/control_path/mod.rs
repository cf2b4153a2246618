//! Everything a running query never waits for.
