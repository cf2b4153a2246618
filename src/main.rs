//! The thin binary: see [`pglobby::cli`].

/// Gives memory back to the system soon after it is freed. glibc's allocator keeps what a few large clients have had, for good.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

fn main() -> std::process::ExitCode {
    pglobby::cli::main()
}
