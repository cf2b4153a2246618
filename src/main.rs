//! The thin binary: see [`pglobby::cli`].

/// Returns freed memory to the system within seconds, by threads of its own. glibc's allocator never returns
/// what a few large clients have used; others return it only during the next allocation.
#[global_allocator]
static ALLOCATOR: tikv_jemallocator::Jemalloc = tikv_jemallocator::Jemalloc;

fn main() -> std::process::ExitCode {
    pglobby::cli::main()
}
