//! Where a control plane listens, and the gRPC channel to it.

use std::fmt;
use std::io;
use std::path::PathBuf;
use std::pin::Pin;
use std::str::FromStr;
use std::sync::Arc;
use std::time::Duration;

use hyper_util::rt::TokioIo;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::UnixStream;
use tonic::transport::{Channel, Uri};
use tower::service_fn;

/// Address of a control plane.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Endpoint {
    /// A Unix socket, written `unix:/path` or `/path`. It crosses network namespaces.
    Unix(PathBuf),
    /// HTTP/2 without TLS, written `host:port`.
    Tcp(String),
    /// Connections that somebody else makes: with TLS, to one of several addresses.
    Dialed(Dialer),
}

/// Bytes both ways.
pub trait Io: AsyncRead + AsyncWrite + Unpin + Send {}

impl<T: AsyncRead + AsyncWrite + Unpin + Send> Io for T {}

/// A connection on its way.
pub type Dialing = Pin<Box<dyn Future<Output = io::Result<Box<dyn Io>>> + Send>>;

/// Makes connections; bounded by [`Endpoint`]'s own limit of time.
#[derive(Clone)]
pub struct Dialer {
    name: Arc<str>,
    dial: Arc<dyn Fn() -> Dialing + Send + Sync>,
}

impl Dialer {
    /// A dialer by the name that people know its target by.
    pub fn new(name: impl Into<Arc<str>>, dial: impl Fn() -> Dialing + Send + Sync + 'static) -> Self {
        Self {
            name: name.into(),
            dial: Arc::new(dial),
        }
    }
}

impl fmt::Debug for Dialer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Dialer").field(&self.name).finish()
    }
}

impl PartialEq for Dialer {
    fn eq(&self, other: &Self) -> bool {
        self.name == other.name && Arc::ptr_eq(&self.dial, &other.dial)
    }
}

impl Eq for Dialer {}

/// An address that cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum EndpointError {
    /// Neither a path nor `host:port`.
    #[error("{0:?} is no control plane address: write unix:/path/to/socket or host:port")]
    Malformed(String),
    /// Nobody answers there.
    #[error("cannot reach the control plane at {endpoint}")]
    Unreachable {
        /// The address.
        endpoint: Endpoint,
        /// What the transport said.
        #[source]
        source: tonic::transport::Error,
    },
}

/// Longest time for a connection to come about.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);

/// A TCP peer that is silent for this long is asked for a sign of life (a Unix peer's death is noticed at once).
const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(30);

/// How long a sign of life may take.
const KEEPALIVE_TIMEOUT: Duration = Duration::from_secs(10);

impl FromStr for Endpoint {
    type Err = EndpointError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let path = text
            .strip_prefix("unix://")
            .or_else(|| text.strip_prefix("unix:"));
        if let Some(path) = path.or_else(|| text.starts_with('/').then_some(text)) {
            return Ok(Self::Unix(path.into()));
        }
        match text.rsplit_once(':') {
            Some((host, port)) if !host.is_empty() && port.parse::<u16>().is_ok() => {
                Ok(Self::Tcp(text.to_owned()))
            }
            _ => Err(EndpointError::Malformed(text.to_owned())),
        }
    }
}

impl fmt::Display for Endpoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Unix(path) => write!(f, "unix:{}", path.display()),
            Self::Tcp(address) => f.write_str(address),
            Self::Dialed(dialer) => f.write_str(&dialer.name),
        }
    }
}

/// Connects; the channel serves every gRPC service that listens there (ADS, metrics).
pub async fn channel(endpoint: &Endpoint) -> Result<Channel, EndpointError> {
    let unreachable = |source| EndpointError::Unreachable {
        endpoint: endpoint.clone(),
        source,
    };
    match endpoint {
        Endpoint::Unix(path) => {
            let path = path.clone();
            let connect = service_fn(move |_: Uri| {
                let path = path.clone();
                async move { UnixStream::connect(path).await.map(TokioIo::new) }
            });
            // The authority is not used for anything on a Unix socket.
            tonic::transport::Endpoint::from_static("http://localhost")
                .connect_timeout(CONNECT_TIMEOUT)
                .connect_with_connector(connect)
                .await
                .map_err(unreachable)
        }
        Endpoint::Dialed(dialer) => {
            let dial = dialer.dial.clone();
            let connect = service_fn(move |_: Uri| {
                let dialing = dial();
                async move { dialing.await.map(TokioIo::new) }
            });
            tonic::transport::Endpoint::from_static("http://localhost")
                .connect_timeout(CONNECT_TIMEOUT)
                .http2_keep_alive_interval(KEEPALIVE_INTERVAL)
                .keep_alive_timeout(KEEPALIVE_TIMEOUT)
                .keep_alive_while_idle(true)
                .connect_with_connector(connect)
                .await
                .map_err(unreachable)
        }
        Endpoint::Tcp(address) => tonic::transport::Endpoint::from_shared(format!("http://{address}"))
            .map_err(unreachable)?
            .connect_timeout(CONNECT_TIMEOUT)
            .tcp_nodelay(true)
            .http2_keep_alive_interval(KEEPALIVE_INTERVAL)
            .keep_alive_timeout(KEEPALIVE_TIMEOUT)
            .keep_alive_while_idle(true)
            .connect()
            .await
            .map_err(unreachable),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_read_as_people_write_them() {
        let read = |text: &str| text.parse::<Endpoint>().ok();
        assert_eq!(
            read("unix:/run/xds.sock"),
            Some(Endpoint::Unix("/run/xds.sock".into()))
        );
        assert_eq!(
            read("unix:///run/xds.sock"),
            Some(Endpoint::Unix("/run/xds.sock".into()))
        );
        assert_eq!(read("./XDS"), None);
        assert_eq!(
            read("/run/xds.sock"),
            Some(Endpoint::Unix("/run/xds.sock".into()))
        );
        assert_eq!(
            read("istiod.istio-system:15010"),
            Some(Endpoint::Tcp("istiod.istio-system:15010".into()))
        );
        assert_eq!(read("[::1]:15010"), Some(Endpoint::Tcp("[::1]:15010".into())));
        assert_eq!(read("istiod"), None);
    }
}
