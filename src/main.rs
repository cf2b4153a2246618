//! The thin binary: see [`pglobby::cli`].

/// Gives memory back to the system within seconds after it is freed, by threads of its own. glibc's allocator keeps what a few
/// large clients have had, for good, and others give it back only where somebody allocates.
#[global_allocator]
static ALLOCATOR: tikv_jemallocator::Jemalloc = tikv_jemallocator::Jemalloc;

fn main() -> std::process::ExitCode {
    pglobby::cli::main()
}
