//! TLS towards the central database and hosts: adapts `wire::tls` to tokio-postgres.

use std::{
    convert::Infallible,
    future::Future,
    io,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
};

use rustls::ClientConfig;
use rustls_pki_types::{InvalidDnsNameError, ServerName};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio_postgres::tls::{ChannelBinding, MakeTlsConnect, TlsConnect, TlsStream};

use crate::{
    config::{CentralTls, TlsMode},
    wire::tls::{
        TlsError, server_end_point,
        towards_servers::{ServerTlsConfigs, Trust},
    },
};

/// Makes TLS connections; cheap to clone.
#[derive(Clone)]
pub struct CentralTlsConnector {
    config: Arc<ClientConfig>,
}

impl CentralTlsConnector {
    /// Reads the certificate authorities and decides how much of a certificate is verified, as `sslmode`
    /// means in libpq.
    pub fn new(tls: &CentralTls) -> Result<Self, TlsError> {
        let trust = match (tls.mode, &tls.root_ca) {
            (TlsMode::VerifyFull, _) => Trust::AuthorityAndName,
            // As in libpq: `require` with a file of authorities means `verify-ca`.
            (TlsMode::VerifyCa, _) | (TlsMode::Require, Some(_)) => Trust::Authority,
            _ => Trust::AnyCertificate,
        };
        let config = ServerTlsConfigs::new(None, None)?.get(trust, tls.root_ca.as_deref())?;
        Ok(Self { config })
    }
}

impl<S: AsyncRead + AsyncWrite + Unpin + Send + 'static> MakeTlsConnect<S> for CentralTlsConnector {
    type Stream = CentralTlsStream<S>;
    type TlsConnect = NamedConnector;
    type Error = Infallible;

    fn make_tls_connect(&mut self, domain: &str) -> Result<NamedConnector, Infallible> {
        // Called for every connection, with an empty name for a Unix socket. An invalid name is an error
        // only if TLS is used.
        let name = ServerName::try_from(domain).map(|name| name.to_owned());
        Ok(NamedConnector { config: self.config.clone(), name })
    }
}

/// A connector for one server name.
pub struct NamedConnector {
    config: Arc<ClientConfig>,
    name: Result<ServerName<'static>, InvalidDnsNameError>,
}

impl<S: AsyncRead + AsyncWrite + Unpin + Send + 'static> TlsConnect<S> for NamedConnector {
    type Stream = CentralTlsStream<S>;
    type Error = io::Error;
    type Future = Pin<Box<dyn Future<Output = io::Result<CentralTlsStream<S>>> + Send>>;

    fn connect(self, stream: S) -> Self::Future {
        let connector = tokio_rustls::TlsConnector::from(self.config);
        Box::pin(async move {
            let name = self.name.map_err(|error| io::Error::new(io::ErrorKind::InvalidInput, error))?;
            connector.connect(name, stream).await.map(CentralTlsStream)
        })
    }
}

/// A TLS connection to the central database.
pub struct CentralTlsStream<S>(tokio_rustls::client::TlsStream<S>);

impl<S: AsyncRead + AsyncWrite + Unpin> TlsStream for CentralTlsStream<S> {
    fn channel_binding(&self) -> ChannelBinding {
        let certificate = self.0.get_ref().1.peer_certificates().and_then(|chain| chain.first());
        match certificate.and_then(|certificate| server_end_point(certificate)) {
            Some(end_point) => ChannelBinding::tls_server_end_point(end_point),
            None => ChannelBinding::none(),
        }
    }
}

impl<S: AsyncRead + AsyncWrite + Unpin> AsyncRead for CentralTlsStream<S> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.0).poll_read(cx, buf)
    }
}

impl<S: AsyncRead + AsyncWrite + Unpin> AsyncWrite for CentralTlsStream<S> {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.0).poll_write(cx, buf)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.0).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.0).poll_shutdown(cx)
    }
}
