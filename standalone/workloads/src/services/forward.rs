//! A small forwarder in user space: from a listener on the host to the endpoints of a Service, for Services whose
//! pods did not take the listening socket itself.

use std::collections::BTreeSet;
use std::net::{Ipv4Addr, SocketAddr};
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::Duration;

use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{Semaphore, watch};
use tokio::task::JoinSet;
use tokio_util::task::AbortOnDropHandle;
use tracing::{debug, warn};

/// Connections forwarded at a time, per listener; more wait in the socket's backlog.
const MAX_CONNECTIONS: usize = 4096;
/// How long an endpoint may take to accept; endpoints are on this machine.
const CONNECT_DEADLINE: Duration = Duration::from_secs(2);
/// Pause after a failed accept (out of descriptors), so that it does not spin.
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);

/// Where to forward to.
pub(crate) type Endpoints = Arc<BTreeSet<(Ipv4Addr, u16)>>;

/// A running forwarder; stops accepting when dropped, and cuts what it forwards.
pub(crate) struct Forwarder {
    endpoints: watch::Sender<Endpoints>,
    _task: AbortOnDropHandle<()>,
}

impl Forwarder {
    pub(crate) fn start(listener: OwnedFd, endpoints: Endpoints) -> std::io::Result<Self> {
        let listener = std::net::TcpListener::from(listener);
        listener.set_nonblocking(true)?;
        let listener = TcpListener::from_std(listener)?;
        let (endpoints, receiver) = watch::channel(endpoints);
        Ok(Self {
            endpoints,
            _task: AbortOnDropHandle::new(tokio::spawn(accept(listener, receiver))),
        })
    }

    pub(crate) fn set(&self, endpoints: Endpoints) {
        self.endpoints.send_if_modified(|known| {
            let changed = *known != endpoints;
            *known = endpoints;
            changed
        });
    }
}

async fn accept(listener: TcpListener, endpoints: watch::Receiver<Endpoints>) {
    let permits = Arc::new(Semaphore::new(MAX_CONNECTIONS));
    let mut connections = JoinSet::new();
    let mut turn = 0_usize;
    loop {
        while connections.try_join_next().is_some() {}
        let Ok(permit) = permits.clone().acquire_owned().await else {
            return;
        };
        match listener.accept().await {
            Ok((client, _)) => {
                turn = turn.wrapping_add(1);
                let endpoints = endpoints.borrow().clone();
                connections.spawn(async move {
                    forward(client, &endpoints, turn).await;
                    drop(permit);
                });
            }
            Err(error) => {
                warn!(%error, "accept on a host listener");
                tokio::time::sleep(ACCEPT_PAUSE).await;
            }
        }
    }
}

/// Tries each endpoint once, beginning with the one whose turn it is.
async fn forward(mut client: TcpStream, endpoints: &Endpoints, turn: usize) {
    let count = endpoints.len();
    for step in 0..count {
        let Some((address, port)) = endpoints.iter().nth((turn + step) % count) else {
            break;
        };
        let target = SocketAddr::from((*address, *port));
        match tokio::time::timeout(CONNECT_DEADLINE, TcpStream::connect(target)).await {
            Ok(Ok(mut server)) => {
                let _ = client.set_nodelay(true);
                let _ = server.set_nodelay(true);
                // Either side may end it in any way; that is theirs to say.
                let _ = tokio::io::copy_bidirectional(&mut client, &mut server).await;
                return;
            }
            Ok(Err(error)) => debug!(%target, %error, "forward"),
            Err(_) => debug!(%target, "forward: no answer"),
        }
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    use super::*;

    #[tokio::test]
    async fn connections_reach_a_living_endpoint_even_if_another_refuses() {
        let server = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = server.local_addr().unwrap().port();
        let closed = TcpListener::bind("127.0.0.1:0")
            .await
            .unwrap()
            .local_addr()
            .unwrap()
            .port();
        let echo = tokio::spawn(async move {
            loop {
                let (mut stream, _) = server.accept().await.unwrap();
                let mut byte = [0];
                stream.read_exact(&mut byte).await.unwrap();
                stream.write_all(&byte).await.unwrap();
            }
        });
        let host = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let address = host.local_addr().unwrap();
        let local = Ipv4Addr::LOCALHOST;
        let forwarder = Forwarder::start(
            host.into(),
            Arc::new(BTreeSet::from([(local, closed), (local, port)])),
        )
        .unwrap();
        for byte in 0..4_u8 {
            let mut client = TcpStream::connect(address).await.unwrap();
            client.write_all(&[byte]).await.unwrap();
            let mut answer = [9];
            client.read_exact(&mut answer).await.unwrap();
            assert_eq!(answer, [byte]);
        }
        forwarder.set(Arc::new(BTreeSet::new()));
        let mut client = TcpStream::connect(address).await.unwrap();
        assert_eq!(
            client.read(&mut [0]).await.unwrap_or(0),
            0,
            "without endpoints a connection is closed"
        );
        echo.abort();
    }
}
