//! Reads passwords: from a prompt or from standard input. Passwords never come from `argv`, where `ps` shows
//! them.

use std::io::{self, BufRead as _, IsTerminal as _};

use secrecy::{ExposeSecret as _, SecretString};
use zeroize::Zeroizing;

use crate::control_path::secrets::scram_verifier::LoginPassword;

/// Where the password of a login comes from.
#[derive(Debug, Clone, clap::Args)]
pub struct PasswordSource {
    /// Read the password from the first line of standard input
    #[arg(long, conflicts_with = "generate")]
    pub password_stdin: bool,
    /// Generate a password and print it once (the default without a terminal)
    #[arg(long)]
    pub generate: bool,
}

impl PasswordSource {
    /// Reads the password, or generates one.
    ///
    /// # Errors
    /// Standard input or the terminal cannot be read, or the repeated password differs.
    pub fn obtain(&self, login: &str) -> io::Result<LoginPassword> {
        if self.password_stdin {
            return Ok(LoginPassword::given_or_generated(Some(first_line()?)));
        }
        if self.generate || !io::stdin().is_terminal() {
            return Ok(LoginPassword::given_or_generated(None));
        }
        let password = prompt(&format!("Password for {login} (empty to generate one): "))?;
        if password.expose_secret().is_empty() {
            return Ok(LoginPassword::given_or_generated(None));
        }
        let again = prompt("Repeat the password: ")?;
        if again.expose_secret() != password.expose_secret() {
            return Err(io::Error::new(
                io::ErrorKind::InvalidInput,
                "the passwords differ, so nothing was changed; run the command again",
            ));
        }
        Ok(LoginPassword::given_or_generated(Some(password)))
    }
}

/// Asks on the terminal, without echo.
pub fn prompt(question: &str) -> io::Result<SecretString> {
    rpassword::prompt_password(question).map(SecretString::from)
}

/// Returns the first line of standard input, without its line end.
pub fn first_line() -> io::Result<SecretString> {
    let mut line = Zeroizing::new(String::new());
    io::stdin().lock().read_line(&mut line)?;
    Ok(SecretString::from(line.trim_end_matches(['\r', '\n'])))
}
