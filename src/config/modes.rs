//! Modes that the configuration, the central database and the command line spell alike.

use tokio_postgres::config::SslMode;

/// Declares an enum of modes with the words that stand for them, so that each word is written once.
macro_rules! modes {
    ($(#[$about:meta])* $name:ident { $($(#[$each:meta])* $mode:ident = $word:literal,)+ }) => {
        $(#[$about])*
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
        pub enum $name {
            $($(#[$each])* $mode,)+
        }

        impl $name {
            /// Every mode with its word.
            pub const ALL: &[(&str, Self)] = &[$(($word, Self::$mode),)+];
            /// The words alone.
            pub const WORDS: &[&str] = &[$($word,)+];

            /// The word that stands for it.
            pub const fn word(self) -> &'static str {
                match self {
                    $(Self::$mode => $word,)+
                }
            }
        }

        impl std::str::FromStr for $name {
            type Err = String;

            fn from_str(text: &str) -> Result<Self, String> {
                let known = Self::ALL.iter().find(|(word, _)| *word == text);
                known.map(|(_, mode)| *mode).ok_or_else(|| format!("{text:?} is none of {}", Self::WORDS.join(", ")))
            }
        }
    };
}

modes! {
    /// libpq's `sslmode`: of a host towards servers, of `client_tls_mode` towards clients.
    TlsMode {
        /// Never TLS.
        Disable = "disable",
        /// Servers: TLS only if the server refuses a plain connection. Clients: as they like.
        Allow = "allow",
        /// Servers: TLS if the server offers it. Clients: as they like.
        Prefer = "prefer",
        /// TLS, with any certificate; a client without TLS is refused.
        Require = "require",
        /// TLS with a certificate signed by a known authority.
        VerifyCa = "verify-ca",
        /// The same, and the certificate names the host.
        VerifyFull = "verify-full",
    }
}

modes! {
    /// How long a session keeps a server.
    PoolMode {
        /// For a transaction; settings of the session follow it from server to server.
        Transaction = "transaction",
        /// For the session's life.
        Session = "session",
    }
}

impl TlsMode {
    /// Whether the peer's certificate must be signed by a known authority.
    pub fn verifies(self) -> bool {
        matches!(self, Self::VerifyCa | Self::VerifyFull)
    }

    /// Whether clients must encrypt their connections, except over a Unix socket.
    pub fn requires_tls(self) -> bool {
        !matches!(self, Self::Disable | Self::Allow | Self::Prefer)
    }

    /// What tokio-postgres does for it. Certificates are checked by the connector, and `allow` is treated as
    /// `prefer`.
    pub fn for_tokio_postgres(self) -> SslMode {
        match self {
            Self::Disable => SslMode::Disable,
            Self::Allow | Self::Prefer => SslMode::Prefer,
            Self::Require | Self::VerifyCa | Self::VerifyFull => SslMode::Require,
        }
    }
}
