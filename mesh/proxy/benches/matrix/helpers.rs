//! What the benchmark runs as processes of their own, pinned like the other tools: this very program with a first
//! argument that says what to be.
//!
//! - `new-connections PORT COUNT FOLDER`: a mutual TLS handshake and one request per connection, without resumption.
//! - `endpoint PLAIN GRPC SECURE SECURE2 FOLDER`: the backend, and an open loop when it is told to; see [`crate::openloop`].

use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::{Context, bail};
use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;

use crate::endpoint::Ports;
use crate::openloop;

/// Connections that are being made at a time.
const AT_A_TIME: usize = 4;

/// This program.
pub(crate) fn program() -> anyhow::Result<PathBuf> {
    std::env::current_exe().context("the benchmark's own path")
}

/// Does what the arguments say, if they say something.
pub(crate) async fn run(args: &[String]) -> Option<anyhow::Result<()>> {
    let text: Vec<&str> = args.iter().map(String::as_str).collect();
    match text.as_slice() {
        [_, "new-connections", port, count, folder] => {
            Some(new_connections(port, count, Path::new(folder)).await)
        }
        [_, "endpoint", ports @ .., folder] => {
            Some(Ports::parse(ports).and_then(|ports| openloop::Process::run(ports, Path::new(folder))))
        }
        _ => None,
    }
}

async fn new_connections(port: &str, count: &str, folder: &Path) -> anyhow::Result<()> {
    let (port, count): (u16, usize) = (port.parse()?, count.parse()?);
    let mut roots = rustls::RootCertStore::empty();
    for root in CertificateDer::pem_file_iter(folder.join("root.pem"))? {
        roots.add(root?)?;
    }
    let chain = CertificateDer::pem_file_iter(folder.join("client.pem"))?.collect::<Result<Vec<_>, _>>()?;
    let key = PrivateKeyDer::from_pem_file(folder.join("client.key"))?;
    let mut provider = rustls::crypto::aws_lc_rs::default_provider();
    // The one group that every proxy has, so that all do the same arithmetic.
    provider.kx_groups = vec![rustls::crypto::aws_lc_rs::kx_group::X25519];
    let mut config = rustls::ClientConfig::builder_with_provider(Arc::new(provider))
        .with_protocol_versions(&[&rustls::version::TLS13])?
        .with_root_certificates(roots)
        .with_client_auth_cert(chain, key)?;
    config.alpn_protocols = vec![b"http/1.1".to_vec()];
    config.resumption = rustls::client::Resumption::disabled();
    let connector = TlsConnector::from(Arc::new(config));
    let mut clients = tokio::task::JoinSet::new();
    for _ in 0..AT_A_TIME {
        let connector = connector.clone();
        clients.spawn(async move {
            for _ in 0..count / AT_A_TIME {
                let stream = TcpStream::connect(("127.0.0.1", port)).await?;
                let mut stream = connector
                    .connect(ServerName::try_from("localhost")?, stream)
                    .await?;
                stream
                    .write_all(b"GET / HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n")
                    .await?;
                let mut answer = Vec::new();
                // Proxies close without TLS's goodbye as well.
                let _ = stream.read_to_end(&mut answer).await;
                if !answer.starts_with(b"HTTP/1.1 200") {
                    bail!("answered {:?}", String::from_utf8_lossy(&answer));
                }
            }
            anyhow::Ok(())
        });
    }
    while let Some(ended) = clients.join_next().await {
        ended??;
    }
    Ok(())
}
