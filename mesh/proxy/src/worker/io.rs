//! A downstream connection: plain, or with TLS that we end.

use tokio::net::TcpStream;
use tokio_rustls::server::TlsStream;

use crate::stream::{Layer, MaybeTls, Together};
use crate::tls::rewind::Rewind;

/// The socket of a client, from which nothing has been read.
pub type Socket = Layer<TcpStream, Together>;

/// See the module.
pub type Io = MaybeTls<Socket, Layer<TlsStream<Rewind<Socket>>, Together>>;
