//! The thin binary: see [`pglobby::cli`].

fn main() -> std::process::ExitCode {
    pglobby::cli::main()
}
