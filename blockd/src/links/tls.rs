//! TLS between hosts: who may speak, as certificates say. The record layer is the plane's (`plane/links/seal.rs`).
//!
//! Both ends show a certificate that the pool's authority has signed and that names the host (DNS name = host name). The
//! end that dials checks the name in the handshake; the end that is called checks it when the caller has said which
//! host it is, against the name that the pool's records give that host. TLS 1.3 only, no resumption.

use std::io::ErrorKind;
use std::sync::Arc;
use std::time::Duration;

use rustls::client::{Resumption, verify_server_name};
use rustls::crypto::ring;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use rustls::server::{NoServerSessionStorage, ParsedCertificate, WebPkiClientVerifier};
use rustls::{ClientConfig, RootCertStore, ServerConfig};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio_rustls::{TlsAcceptor, TlsConnector, TlsStream};

use crate::cluster_config::TlsFiles;

/// What a TLS handshake begins with.
pub const HANDSHAKE: u8 = 0x16;

/// How long a caller that is refused may take to hear why.
const LAST_WORDS: Duration = Duration::from_secs(1);

/// Why the files make no TLS.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("setting 'cluster.{setting}': {reason}")]
pub struct TlsError {
    setting: &'static str,
    reason: String,
}

/// Ready to shake hands.
pub struct Tls {
    connector: TlsConnector,
    acceptor: TlsAcceptor,
}

fn wrong<E: std::fmt::Display>(setting: &'static str) -> impl Fn(E) -> TlsError {
    move |error| TlsError {
        setting,
        reason: error.to_string(),
    }
}

fn certificates(setting: &'static str, pem: &[u8]) -> Result<Vec<CertificateDer<'static>>, TlsError> {
    let all: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(pem).collect();
    let all = all.map_err(wrong(setting))?;
    if all.is_empty() {
        return Err(wrong(setting)("no certificate in it (PEM)"));
    }
    Ok(all)
}

impl Tls {
    /// For this host, whose name its certificate must have.
    ///
    /// # Errors
    /// What is wrong with a file, by the setting that names it.
    pub fn new(files: &TlsFiles, host: &str) -> Result<Tls, TlsError> {
        let provider = Arc::new(ring::default_provider());
        let mut roots = RootCertStore::empty();
        for authority in certificates("tls_ca", &files.authority)? {
            roots.add(authority).map_err(wrong("tls_ca"))?;
        }
        let roots = Arc::new(roots);
        let chain = certificates("tls_certificate", &files.certificate)?;
        is_of(&chain[0], host).map_err(wrong("tls_certificate"))?;
        let key = PrivateKeyDer::from_pem_slice(&files.key).map_err(wrong("tls_key"))?;
        let versions = &[&rustls::version::TLS13];
        let mut dial = ClientConfig::builder_with_provider(Arc::clone(&provider))
            .with_protocol_versions(versions)
            .map_err(wrong("tls_ca"))?
            .with_root_certificates(Arc::clone(&roots))
            .with_client_auth_cert(chain.clone(), key.clone_key())
            .map_err(wrong("tls_key"))?;
        dial.resumption = Resumption::disabled();
        // It would say in clear whom we call.
        dial.enable_sni = false;
        let callers = WebPkiClientVerifier::builder_with_provider(roots, Arc::clone(&provider));
        let mut answer = ServerConfig::builder_with_provider(provider)
            .with_protocol_versions(versions)
            .map_err(wrong("tls_ca"))?
            .with_client_cert_verifier(callers.build().map_err(wrong("tls_ca"))?)
            .with_single_cert(chain, key)
            .map_err(wrong("tls_key"))?;
        answer.session_storage = Arc::new(NoServerSessionStorage {});
        answer.send_tls13_tickets = 0;
        Ok(Tls {
            connector: TlsConnector::from(Arc::new(dial)),
            acceptor: TlsAcceptor::from(Arc::new(answer)),
        })
    }

    /// Shakes hands with a host that was called by the name `host`.
    ///
    /// # Errors
    /// Why not, in words.
    pub async fn dial(&self, host: &str, stream: TcpStream) -> Result<TlsStream<TcpStream>, String> {
        let greeted = self.connector.connect(name_of(host)?, stream).await;
        let reason = |error: std::io::Error| match error.kind() {
            ErrorKind::UnexpectedEof | ErrorKind::ConnectionReset => {
                "the other end closed the connection; is TLS set there?".to_owned()
            }
            _ => error.to_string(),
        };
        greeted.map(TlsStream::Client).map_err(reason)
    }

    /// Shakes hands with a caller. Whose certificate it shows is not known yet.
    ///
    /// # Errors
    /// Why not, in words.
    pub async fn answer(&self, stream: TcpStream) -> Result<TlsStream<TcpStream>, String> {
        match self.acceptor.accept(stream).into_fallible().await {
            Ok(stream) => Ok(TlsStream::Server(stream)),
            Err((error, stream)) => {
                let _ = tokio::time::timeout(LAST_WORDS, hear_out(stream)).await;
                Err(error.to_string())
            }
        }
    }
}

/// Closes a stream on which the reason for that was just said. The kernel would take the reason back if it were closed
/// with something unread: by TLS 1.3 a caller goes on before it knows whether it is let in.
async fn hear_out(mut stream: TcpStream) {
    let mut sink = [0; 512];
    let _ = stream.shutdown().await;
    let mut most = 64;
    while most > 0 && matches!(stream.read(&mut sink).await, Ok(1..)) {
        most -= 1;
    }
}

fn name_of(host: &str) -> Result<ServerName<'static>, String> {
    let name = ServerName::try_from(host.to_owned());
    // To a certificate 'h1.' and 'h1' are one name; here they are two hosts.
    name.ok()
        .filter(|_| !host.ends_with('.'))
        .ok_or_else(|| format!("'{host}' cannot be a name in a certificate"))
}

/// Whether a certificate that was found to be good is that of `host`.
///
/// # Errors
/// Whose it is.
pub fn is_of(certificate: &CertificateDer<'_>, host: &str) -> Result<(), String> {
    let name = name_of(host)?;
    let certificate = ParsedCertificate::try_from(certificate).map_err(|error| error.to_string())?;
    verify_server_name(&certificate, &name).map_err(|error| error.to_string())
}
