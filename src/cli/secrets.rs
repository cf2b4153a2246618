//! Passwords on their way in: from a prompt, from standard input, or made here. Never from `argv`.

use std::io::{self, BufRead as _, IsTerminal as _};

use secrecy::{ExposeSecret as _, SecretString};
use zeroize::Zeroizing;

use crate::control_path::secrets::scram_verifier::LoginPassword;

/// Where a login's password comes from.
#[derive(Debug, Clone, clap::Args)]
pub struct PasswordSource {
    /// Read the password from standard input, its first line
    #[arg(long, conflicts_with = "generate")]
    pub password_stdin: bool,
    /// Make a password and print it once (without a terminal that is the default)
    #[arg(long)]
    pub generate: bool,
}

impl PasswordSource {
    /// Reads, asks for, or makes it.
    ///
    /// # Errors
    /// Standard input or the terminal cannot be read, or the repetition differs.
    pub fn obtain(&self, whose: &str) -> io::Result<LoginPassword> {
        if self.password_stdin {
            return Ok(LoginPassword::given_or_generated(Some(first_line()?)));
        }
        if self.generate || !io::stdin().is_terminal() {
            return Ok(LoginPassword::given_or_generated(None));
        }
        let password = prompt(&format!("Password for {whose} (empty: make one): "))?;
        if password.expose_secret().is_empty() {
            return Ok(LoginPassword::given_or_generated(None));
        }
        let again = prompt("The same again: ")?;
        if again.expose_secret() != password.expose_secret() {
            return Err(io::Error::new(
                io::ErrorKind::InvalidInput,
                "the passwords differ; nothing was changed",
            ));
        }
        Ok(LoginPassword::given_or_generated(Some(password)))
    }
}

/// Asks on the terminal, without echo.
///
/// # Errors
/// There is no terminal.
pub fn prompt(question: &str) -> io::Result<SecretString> {
    rpassword::prompt_password(question).map(SecretString::from)
}

/// The first line of standard input, without its end.
///
/// # Errors
/// It cannot be read.
pub fn first_line() -> io::Result<SecretString> {
    let mut line = Zeroizing::new(String::new());
    io::stdin().lock().read_line(&mut line)?;
    Ok(SecretString::from(line.trim_end_matches(['\r', '\n'])))
}
