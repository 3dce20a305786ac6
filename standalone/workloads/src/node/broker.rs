//! The process that stays on the host's side. The node and its pods live in a network namespace of their own; what
//! must be reachable from the host (listeners of LoadBalancer Services) or must reach out (DNS upstream) are sockets
//! that this process creates and hands over. It is forked before the node leaves the host's namespaces, so it needs
//! no privilege to come back, and ends with the node.

use std::io;
use std::net::{SocketAddr, UdpSocket};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::sync::Arc;
use std::time::Duration;

use nix::sys::prctl::set_pdeathsig;
use nix::sys::signal::Signal;
use serde::{Deserialize, Serialize};
use socket2::{Domain, Protocol, Socket, Type};
use tokio::io::unix::AsyncFd;
use tokio::sync::Mutex;

use crate::sys::fdpass;

/// Connections that may wait to be accepted.
const BACKLOG: i32 = 1024;
/// How long the broker may take.
const DEADLINE: Duration = Duration::from_secs(5);

#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
enum Request {
    /// A TCP socket listening on the host.
    Listen(SocketAddr),
    /// A UDP socket of the host connected to an address.
    ConnectUdp(SocketAddr),
}

#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
enum Answer {
    Socket,
    Failed { os_error: Option<i32>, reason: String },
}

/// The broker's loop; returns when the node's end is closed.
pub(crate) fn serve(connection: &OwnedFd) {
    let _ = set_pdeathsig(Signal::SIGTERM);
    loop {
        let Ok((message, _)) = fdpass::receive(connection) else {
            return;
        };
        if message.is_empty() {
            return;
        }
        let Ok(request) = serde_json::from_slice::<Request>(&message) else {
            return;
        };
        let result = match request {
            Request::Listen(address) => listen(address),
            Request::ConnectUdp(address) => connect_udp(address),
        };
        let sent = match result {
            Ok(socket) => answer(connection, &Answer::Socket, &[socket.as_raw_fd()]),
            Err(error) => answer(
                connection,
                &Answer::Failed {
                    os_error: error.raw_os_error(),
                    reason: error.to_string(),
                },
                &[],
            ),
        };
        if sent.is_err() {
            return;
        }
    }
}

fn answer(connection: &OwnedFd, answer: &Answer, fds: &[i32]) -> io::Result<()> {
    fdpass::send(connection.as_fd(), &serde_json::to_vec(answer)?, fds)
}

fn listen(address: SocketAddr) -> io::Result<OwnedFd> {
    let socket = Socket::new(Domain::for_address(address), Type::STREAM, Some(Protocol::TCP))?;
    socket.set_reuse_address(true)?;
    socket.bind(&address.into())?;
    socket.listen(BACKLOG)?;
    socket.set_nonblocking(true)?;
    Ok(socket.into())
}

fn connect_udp(address: SocketAddr) -> io::Result<OwnedFd> {
    let any: SocketAddr = if address.is_ipv4() {
        ([0, 0, 0, 0], 0).into()
    } else {
        ([0_u16; 8], 0).into()
    };
    let socket = UdpSocket::bind(any)?;
    socket.connect(address)?;
    socket.set_nonblocking(true)?;
    Ok(socket.into())
}

/// The node's end of the broker.
#[derive(Clone)]
pub(crate) struct Broker {
    /// One request at a time: answers come in the order of requests.
    connection: Arc<Mutex<AsyncFd<OwnedFd>>>,
}

impl Broker {
    pub(crate) fn new(connection: OwnedFd) -> io::Result<Self> {
        nix::fcntl::fcntl(
            &connection,
            nix::fcntl::FcntlArg::F_SETFL(nix::fcntl::OFlag::O_NONBLOCK),
        )?;
        Ok(Self {
            connection: Arc::new(Mutex::new(fdpass::watched(connection)?)),
        })
    }

    async fn ask(&self, request: &Request) -> io::Result<OwnedFd> {
        let text = serde_json::to_vec(request)?;
        let connection = self.connection.lock().await;
        let exchange = async {
            connection
                .async_io(tokio::io::Interest::WRITABLE, |socket| {
                    fdpass::send(socket, &text, &[])
                })
                .await?;
            connection
                .async_io(tokio::io::Interest::READABLE, |socket| fdpass::receive(socket))
                .await
        };
        let (message, mut fds) = tokio::time::timeout(DEADLINE, exchange)
            .await
            .map_err(|_| io::Error::new(io::ErrorKind::TimedOut, "the node's host side does not answer"))??;
        match serde_json::from_slice(&message)? {
            Answer::Socket => fds
                .pop()
                .ok_or_else(|| io::Error::other("the node's host side sent no socket")),
            Answer::Failed {
                os_error: Some(code), ..
            } => Err(io::Error::from_raw_os_error(code)),
            Answer::Failed { reason, .. } => Err(io::Error::other(reason)),
        }
    }

    /// A listening socket on the host.
    pub(crate) async fn listen(&self, address: SocketAddr) -> io::Result<OwnedFd> {
        self.ask(&Request::Listen(address)).await
    }

    /// A UDP socket of the host, connected.
    pub(crate) async fn connect_udp(&self, address: SocketAddr) -> io::Result<OwnedFd> {
        self.ask(&Request::ConnectUdp(address)).await
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_socket_is_made_on_the_other_side_and_an_occupied_port_is_an_error() {
        let (ours, theirs) = fdpass::pair().unwrap();
        let thread = std::thread::spawn(move || {
            // The parent-death signal is for a process; a thread of a test needs none.
            loop_once(&theirs, 2);
        });
        let broker = Broker::new(ours).unwrap();
        let socket = broker.listen("127.0.0.1:0".parse().unwrap()).await.unwrap();
        let listener = std::net::TcpListener::from(socket);
        let address = listener.local_addr().unwrap();
        let error = broker.listen(address).await.unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::AddrInUse);
        thread.join().unwrap();
    }

    fn loop_once(connection: &OwnedFd, times: usize) {
        for _ in 0..times {
            let (message, _) = fdpass::receive(connection).unwrap();
            let Request::Listen(address) = serde_json::from_slice(&message).unwrap() else {
                panic!("unexpected")
            };
            match listen(address) {
                Ok(socket) => answer(connection, &Answer::Socket, &[socket.as_raw_fd()]).unwrap(),
                Err(error) => answer(
                    connection,
                    &Answer::Failed {
                        os_error: error.raw_os_error(),
                        reason: String::new(),
                    },
                    &[],
                )
                .unwrap(),
            }
        }
    }
}
