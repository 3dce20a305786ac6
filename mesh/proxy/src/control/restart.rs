//! Hot restart: a process hands its listening sockets to its successor, which serves on the same queues of the kernel, so
//! that no connection is refused.
//!
//! ```text
//! new: connects to the Unix socket, TAKE ──▶ old: sends every listening socket (SCM_RIGHTS)
//! new: starts, takes the sockets by address, is live, READY ──▶ old: accepts no more, closes its admin port, drains, ends
//! new: listens at the Unix socket for its own successor                old: tells its counters each second, and at its end
//! ```
//! What the old process has counted is shown by the new one on top of its own, so that counters go on where they were:
//! also those of the processes before the old one, which it had taken over itself.
//!
//! A successor that ends before it is ready changes nothing. Who asks must run as the same user. Sockets of addresses
//! that the successor does not listen on are closed once it is ready.

use std::collections::HashMap;
use std::io::{IoSlice, IoSliceMut, Read, Write};
use std::net::{SocketAddr, TcpListener};
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use nix::sys::socket::{self, ControlMessage, ControlMessageOwned, MsgFlags, UnixAddr, sockopt};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio_util::sync::CancellationToken;

use super::Proxy;
use crate::error::Error;
use crate::metrics::baseline;
use crate::sys;

/// Limit of each step of the exchange.
const STEP: Duration = Duration::from_secs(10);
/// Descriptors of one message; the kernel takes 253.
const BATCH: usize = 64;
/// Sockets that a predecessor may hand over.
const MAX_SOCKETS: usize = 16 * 1024;
/// How often a successor hears of the counters of the process before it.
const REPORT: Duration = Duration::from_secs(1);
/// Bytes of one report.
const MAX_REPORT: u32 = 64 << 20;
const TAKE: &[u8] = b"TAKE\n";
const READY: &[u8] = b"READY\n";

/// Listening sockets by the address that they are bound to.
pub type Sockets = HashMap<SocketAddr, Vec<TcpListener>>;

/// The process before this one, which waits to hear that this one is ready.
#[derive(Debug)]
pub struct Predecessor {
    stream: UnixStream,
}

fn failed(path: &Path, what: &'static str) -> impl FnOnce(std::io::Error) -> Error {
    let path = path.to_owned();
    move |source| Error::Restart { path, what, source }
}

/// Asks the process at `path` for its sockets. `None` if there is no such process.
pub fn take(path: &Path) -> Result<Option<(Predecessor, Sockets)>, Error> {
    let mut stream = match UnixStream::connect(path) {
        Ok(stream) => stream,
        Err(error)
            if matches!(
                error.kind(),
                std::io::ErrorKind::NotFound | std::io::ErrorKind::ConnectionRefused
            ) =>
        {
            return Ok(None);
        }
        Err(error) => return Err(failed(path, "reaching the running process")(error)),
    };
    let sockets = receive_all(&mut stream).map_err(failed(path, "taking its sockets over"))?;
    Ok(Some((Predecessor { stream }, sockets)))
}

fn receive_all(stream: &mut UnixStream) -> std::io::Result<Sockets> {
    stream.set_read_timeout(Some(STEP))?;
    stream.set_write_timeout(Some(STEP))?;
    stream.write_all(TAKE)?;
    let mut count = [0; 4];
    stream.read_exact(&mut count)?;
    let count = u32::from_be_bytes(count) as usize;
    if count > MAX_SOCKETS {
        return Err(std::io::Error::other("too many sockets"));
    }
    let mut out = Sockets::new();
    let mut received = 0;
    while received < count {
        let batch = receive(stream)?;
        received += batch.len();
        for descriptor in batch {
            // What is no listening TCP socket is closed again.
            if socket::getsockopt(&descriptor, sockopt::AcceptConn) != Ok(true) {
                continue;
            }
            let listener = TcpListener::from(descriptor);
            listener.set_nonblocking(true)?;
            out.entry(listener.local_addr()?).or_default().push(listener);
        }
    }
    Ok(out)
}

/// One batch: a byte that carries descriptors.
fn receive(stream: &UnixStream) -> std::io::Result<Vec<OwnedFd>> {
    let mut byte = [0];
    let mut space = nix::cmsg_space!([RawFd; BATCH]);
    let mut descriptors = Vec::new();
    let bytes = {
        let mut buffers = [IoSliceMut::new(&mut byte)];
        let message = socket::recvmsg::<UnixAddr>(
            stream.as_raw_fd(),
            &mut buffers,
            Some(&mut space),
            MsgFlags::MSG_CMSG_CLOEXEC,
        )?;
        for control in message.cmsgs()? {
            if let ControlMessageOwned::ScmRights(received) = control {
                descriptors.extend(sys::own_received(received));
            }
        }
        message.bytes
    };
    if bytes == 0 || descriptors.is_empty() {
        return Err(std::io::ErrorKind::UnexpectedEof.into());
    }
    Ok(descriptors)
}

fn send_all(stream: &mut UnixStream, sockets: &[TcpListener]) -> std::io::Result<()> {
    stream.write_all(&(sockets.len() as u32).to_be_bytes())?;
    for batch in sockets.chunks(BATCH) {
        let descriptors: Vec<RawFd> = batch.iter().map(AsRawFd::as_raw_fd).collect();
        socket::sendmsg::<UnixAddr>(
            stream.as_raw_fd(),
            &[IoSlice::new(b"S")],
            &[ControlMessage::ScmRights(&descriptors)],
            MsgFlags::MSG_NOSIGNAL,
            None,
        )?;
    }
    Ok(())
}

impl Predecessor {
    /// Says that this process serves, and takes over what the one before counts until its end.
    pub async fn ready(mut self, proxy: Arc<Proxy>, cancel: CancellationToken) {
        // A predecessor that has gone meanwhile need not be told.
        let told = self.stream.write_all(READY);
        let stream = self.stream.set_nonblocking(true).and(told);
        let Ok(mut stream) = stream.and_then(|()| tokio::net::UnixStream::from_std(self.stream)) else {
            return;
        };
        loop {
            let report = tokio::select! {
                () = cancel.cancelled() => return,
                report = read_report(&mut stream) => report,
            };
            match report {
                Ok(report) => proxy.take_counters(&report),
                Err(error) => return tracing::debug!(%error, "the process before this one has ended"),
            }
        }
    }
}

async fn read_report(stream: &mut tokio::net::UnixStream) -> std::io::Result<serde_json::Value> {
    let length = stream.read_u32().await?;
    if length > MAX_REPORT {
        return Err(std::io::Error::other("the report is too long"));
    }
    let mut report = vec![0; length as usize];
    tokio::time::timeout(STEP, stream.read_exact(&mut report))
        .await
        .map_err(|_| std::io::ErrorKind::TimedOut)??;
    Ok(serde_json::from_slice(&report)?)
}

/// Tells a successor what this process has counted, each second until `ended`, and then once more.
pub async fn report(proxy: Arc<Proxy>, mut heir: tokio::net::UnixStream, ended: CancellationToken) {
    loop {
        let last = tokio::select! {
            () = ended.cancelled() => true,
            () = tokio::time::sleep(REPORT) => false,
        };
        let report = baseline::tell(&proxy.metrics()).to_string();
        let work = async {
            heir.write_u32(report.len() as u32).await?;
            heir.write_all(report.as_bytes()).await
        };
        // One of an older version is not interested, and one that does not read cannot hold up our end.
        if !matches!(tokio::time::timeout(STEP, work).await, Ok(Ok(()))) || last {
            return;
        }
    }
}

/// Where a process waits for its successor. The socket is removed with it.
#[derive(Debug)]
pub struct Station {
    listener: tokio::net::UnixListener,
    path: PathBuf,
}

impl Station {
    /// Listens at `path`, in place of whoever did before; must be called within a runtime.
    pub fn open(path: &Path) -> Result<Self, Error> {
        match std::fs::remove_file(path) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                return Err(failed(path, "replacing the socket")(error));
            }
            _ => {}
        }
        let listener = tokio::net::UnixListener::bind(path).map_err(failed(path, "listening"))?;
        std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o600))
            .map_err(failed(path, "restricting the socket"))?;
        Ok(Self {
            listener,
            path: path.to_owned(),
        })
    }

    /// Serves until a successor is ready, to which there is a connection then, or cancelled.
    pub async fn serve(self, proxy: Arc<Proxy>, cancel: CancellationToken) -> Option<tokio::net::UnixStream> {
        loop {
            let accepted = tokio::select! {
                () = cancel.cancelled() => {
                    let _ = std::fs::remove_file(&self.path);
                    return None;
                }
                accepted = self.listener.accept() => accepted,
            };
            let Ok((stream, _)) = accepted else {
                tokio::time::sleep(Duration::from_millis(50)).await;
                continue;
            };
            let work = hand_over(stream, &proxy);
            tokio::select! {
                // Cancelled next time round.
                () = cancel.cancelled() => {}
                result = work => match result {
                    // The path is the successor's now.
                    Ok(Some(heir)) => return Some(heir),
                    Ok(None) => tracing::info!("a successor took the sockets and ended before it was ready"),
                    Err(error) => tracing::warn!(%error, "the sockets could not be handed over"),
                }
            }
        }
    }
}

/// Hands the sockets over and waits until the successor is ready (the connection to it) or has ended.
async fn hand_over(
    stream: tokio::net::UnixStream,
    proxy: &Arc<Proxy>,
) -> std::io::Result<Option<tokio::net::UnixStream>> {
    if stream.peer_cred()?.uid() != nix::unistd::geteuid().as_raw() {
        return Err(std::io::Error::other("another user asked for them"));
    }
    let mut stream = stream.into_std()?;
    let proxy = proxy.clone();
    let sent = tokio::task::spawn_blocking(move || {
        stream.set_nonblocking(false)?;
        stream.set_read_timeout(Some(STEP))?;
        stream.set_write_timeout(Some(STEP))?;
        let mut question = [0; TAKE.len()];
        stream.read_exact(&mut question)?;
        if question != TAKE {
            return Err(std::io::Error::other("it does not speak our protocol"));
        }
        let sockets = proxy.sockets.copies()?;
        send_all(&mut stream, &sockets)?;
        tracing::info!(sockets = sockets.len(), "handed to a successor");
        stream.set_nonblocking(true)?;
        Ok(stream)
    });
    let mut stream = tokio::net::UnixStream::from_std(sent.await.map_err(std::io::Error::other)??)?;
    let mut answer = [0; READY.len()];
    // How long a successor takes to be ready is its control plane's matter; its end is the end of the stream.
    match stream.read_exact(&mut answer).await {
        Ok(_) => Ok((answer == READY).then_some(stream)),
        Err(error) if error.kind() == std::io::ErrorKind::UnexpectedEof => Ok(None),
        Err(error) => Err(error),
    }
}

/// Sockets of one address for that many workers: each has at least one, none is left over.
pub(super) fn distribute(
    sockets: Vec<TcpListener>,
    workers: usize,
) -> std::io::Result<Vec<Vec<TcpListener>>> {
    let mut out: Vec<Vec<TcpListener>> = (0..workers).map(|_| Vec::new()).collect();
    let count = sockets.len();
    for (index, own) in out.iter_mut().enumerate().skip(count) {
        if let Some(socket) = sockets.get(index % count.max(1)) {
            own.push(socket.try_clone()?);
        }
    }
    for (index, socket) in sockets.into_iter().enumerate() {
        out[index % workers.max(1)].push(socket);
    }
    Ok(out)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_worker_gets_a_socket_and_no_socket_is_left_without_a_worker() {
        for (count, workers) in [(1, 1), (1, 3), (2, 2), (4, 2), (3, 2), (2, 5)] {
            let sockets: Vec<_> = (0..count)
                .map(|_| TcpListener::bind("127.0.0.1:0").unwrap())
                .collect();
            let addresses: std::collections::HashSet<_> = sockets
                .iter()
                .map(|socket| socket.local_addr().unwrap())
                .collect();
            let out = distribute(sockets, workers).unwrap();
            assert_eq!(out.len(), workers);
            assert!(out.iter().all(|sockets| !sockets.is_empty()), "{count} {workers}");
            let served: std::collections::HashSet<_> = out
                .iter()
                .flatten()
                .map(|socket| socket.local_addr().unwrap())
                .collect();
            assert_eq!(served, addresses);
        }
    }

    #[test]
    fn more_sockets_than_one_message_holds_arrive_with_what_waits_in_their_queues() {
        let (mut here, mut there) = UnixStream::pair().unwrap();
        let sockets: Vec<_> = (0..2 * BATCH + 3)
            .map(|_| TcpListener::bind("127.0.0.1:0").unwrap())
            .collect();
        let first = sockets[0].local_addr().unwrap();
        let _waiting = std::net::TcpStream::connect(first).unwrap();
        let sender = std::thread::spawn(move || {
            let mut question = [0; TAKE.len()];
            there.read_exact(&mut question).unwrap();
            send_all(&mut there, &sockets).unwrap();
        });
        let received = receive_all(&mut here).unwrap();
        sender.join().unwrap();
        assert_eq!(received.len(), 2 * BATCH + 3);
        received[&first][0].set_nonblocking(false).unwrap();
        received[&first][0].accept().unwrap();
    }

    #[test]
    fn without_a_running_process_there_is_nothing_to_take() {
        let directory = tempfile::tempdir().unwrap();
        assert!(take(&directory.path().join("none")).unwrap().is_none());
        let path = directory.path().join("file");
        std::fs::write(&path, "").unwrap();
        assert!(take(&path).unwrap().is_none());
    }
}
