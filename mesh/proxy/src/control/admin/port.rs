//! Bound ports: TCP, or a Unix socket.

use std::net::SocketAddr;
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::net::{TcpListener, UnixListener};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use super::counted::AdminCounts;
use super::{Proxy, answer};
use crate::error::Error;

/// Connections to one of these ports at a time.
const MAX_CONNECTIONS: usize = 64;
/// Limit for a request head.
const HEAD_TIMEOUT: Duration = Duration::from_secs(10);
/// Pause after an accept that failed.
const PAUSE: Duration = Duration::from_millis(50);

/// What a port shows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Port {
    /// Everything, and the switches.
    Admin,
    /// `/stats/prometheus` only.
    Prometheus,
    /// `/healthz/ready` only.
    Ready,
}

impl Port {
    /// Whether it shows anything under that path.
    pub(super) fn shows(self, path: &str) -> bool {
        match self {
            Self::Admin => true,
            Self::Prometheus => path == "/stats/prometheus",
            Self::Ready => path == "/healthz/ready",
        }
    }
}

#[derive(Debug)]
enum Socket {
    Tcp(TcpListener),
    /// The file is held for its end.
    Unix(UnixListener, #[allow(dead_code)] SocketFile),
}

/// The file of a Unix socket, removed when dropped, unless it is another's by then.
#[derive(Debug)]
struct SocketFile {
    path: PathBuf,
    /// Device and number.
    identity: (u64, u64),
}

impl SocketFile {
    /// Binds at `path` with these permissions, which nobody finds wider for a moment: the socket gets its name last.
    fn bind(path: &Path, mode: u32) -> std::io::Result<(UnixListener, Self)> {
        let mut name = path.file_name().unwrap_or_default().to_owned();
        name.push(format!(".{}", std::process::id()));
        let beside = path.with_file_name(name);
        match std::fs::remove_file(&beside) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
        let listener = UnixListener::bind(&beside)?;
        let named = (|| {
            std::fs::set_permissions(&beside, std::fs::Permissions::from_mode(mode))?;
            let metadata = std::fs::metadata(&beside)?;
            std::fs::rename(&beside, path)?;
            Ok((metadata.dev(), metadata.ino()))
        })();
        match named {
            Ok(identity) => Ok((
                listener,
                Self {
                    path: path.to_owned(),
                    identity,
                },
            )),
            Err(error) => {
                let _ = std::fs::remove_file(&beside);
                Err(error)
            }
        }
    }
}

impl Drop for SocketFile {
    fn drop(&mut self) {
        let own = std::fs::symlink_metadata(&self.path)
            .is_ok_and(|metadata| (metadata.dev(), metadata.ino()) == self.identity);
        if own {
            let _ = std::fs::remove_file(&self.path);
        }
    }
}

/// A bound port.
#[derive(Debug)]
pub struct AdminPort {
    socket: Socket,
    port: Port,
}

impl AdminPort {
    /// Binds it, or takes the socket of the process before this one; must be called within a runtime.
    pub fn bind(proxy: &Proxy, address: SocketAddr, port: Port) -> Result<Self, Error> {
        let name = format!("{port:?}").to_lowercase();
        let listener = proxy
            .sockets
            .own(&format!("{name} port"), address)
            .and_then(TcpListener::from_std)
            .map_err(|source| Error::Bind {
                name,
                address,
                source,
            })?;
        Ok(Self {
            socket: Socket::Tcp(listener),
            port,
        })
    }

    /// Binds a Unix socket with these permissions; must be called within a runtime. What a process that has ended left
    /// there is replaced; one that still serves there is left alone, unless this process is its `successor`.
    pub fn bind_unix(path: &Path, mode: u32, port: Port, successor: bool) -> Result<Self, Error> {
        let failed = |what| {
            move |source| Error::AdminSocket {
                path: path.to_owned(),
                what,
                source,
            }
        };
        match std::fs::symlink_metadata(path) {
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
            Err(error) => return Err(failed("looking at the path")(error)),
            Ok(metadata) => {
                use std::os::unix::fs::FileTypeExt as _;
                let there = |text: &str| std::io::Error::new(std::io::ErrorKind::AddrInUse, text.to_owned());
                if !metadata.file_type().is_socket() {
                    return Err(failed("binding")(there("something else than a socket is there")));
                }
                if !successor && std::os::unix::net::UnixStream::connect(path).is_ok() {
                    return Err(failed("binding")(there("a running process serves there")));
                }
            }
        }
        let (listener, file) = SocketFile::bind(path, mode).map_err(failed("binding"))?;
        Ok(Self {
            socket: Socket::Unix(listener, file),
            port,
        })
    }

    /// Where it listens.
    pub fn address(&self) -> std::io::Result<SocketAddr> {
        match &self.socket {
            Socket::Tcp(listener) => listener.local_addr(),
            Socket::Unix(..) => Err(std::io::ErrorKind::AddrNotAvailable.into()),
        }
    }

    /// Serves until cancelled.
    pub async fn serve(self, proxy: Arc<Proxy>, quit: CancellationToken, cancel: CancellationToken) {
        let server = Server {
            port: self.port,
            proxy,
            quit,
            cancel,
            tasks: TaskTracker::new(),
        };
        let permits = Arc::new(Semaphore::new(MAX_CONNECTIONS));
        loop {
            let Ok(permit) = permits.clone().acquire_owned().await else {
                return;
            };
            let served = match &self.socket {
                Socket::Tcp(listener) => tokio::select! {
                    () = server.cancel.cancelled() => break,
                    accepted = listener.accept() => accepted.map(|(stream, _)| server.serve(stream, permit)),
                },
                Socket::Unix(listener, _) => tokio::select! {
                    () = server.cancel.cancelled() => break,
                    accepted = listener.accept() => accepted.map(|(stream, _)| server.serve(stream, permit)),
                },
            };
            if served.is_err() {
                // Nothing tells when there are descriptors again; at once it would spin.
                tokio::time::sleep(PAUSE).await;
            }
        }
        server.tasks.close();
        server.tasks.wait().await;
    }
}

struct Server {
    port: Port,
    proxy: Arc<Proxy>,
    quit: CancellationToken,
    cancel: CancellationToken,
    tasks: TaskTracker,
}

impl Server {
    fn serve<S>(&self, stream: S, permit: OwnedSemaphorePermit)
    where
        S: tokio::io::AsyncRead + tokio::io::AsyncWrite + Unpin + Send + 'static,
    {
        let (proxy, quit, cancel, port) = (
            self.proxy.clone(),
            self.quit.clone(),
            self.cancel.clone(),
            self.port,
        );
        // What others show is no admin port of Envoy's.
        let counts = (port == Port::Admin).then(|| proxy.admin_counts.clone());
        self.tasks.spawn(async move {
            let _open = counts.as_ref().map(AdminCounts::open);
            let service = service_fn(move |request| {
                let (proxy, quit, counts) = (proxy.clone(), quit.clone(), counts.clone());
                async move {
                    let serving = counts.as_ref().map(|counts| counts.serve());
                    let response = answer(&proxy, port, &quit, request).await;
                    if let Some(serving) = serving {
                        serving.answered(response.status());
                    }
                    Ok::<_, std::convert::Infallible>(response)
                }
            });
            let connection = hyper::server::conn::http1::Builder::new()
                .timer(TokioTimer::new())
                .header_read_timeout(HEAD_TIMEOUT)
                .serve_connection(TokioIo::new(stream), service);
            tokio::select! {
                // A client that breaks off concerns nobody.
                _ = connection => {}
                () = cancel.cancelled() => {}
            }
            drop(permit);
        });
    }
}
