//! Everything put together: watches in, proxies and statuses out.

#[cfg(test)]
mod tests;

use std::io;
use std::net::SocketAddr;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use futures::StreamExt;
use serin_model::MeshConfig;
use serin_xds::client::MAX_UNIX_WAIT;
use serin_xds::server::AdsServer;
use tokio::net::{TcpListener, UnixListener};
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio_stream::wrappers::{TcpListenerStream, UnixListenerStream};
use tokio_util::sync::CancellationToken;
use tracing::info;

use crate::ads::Pump;
use crate::index::{self, WatchError};
use crate::ledger::Ledger;
use crate::telemetry::Telemetry;
use crate::world::MeshWorld;

/// How long proxies of a former process have to return before anything counts as live: over a Unix socket they try at
/// least every two seconds.
const RETURN_GRACE: Duration = MAX_UNIX_WAIT.saturating_add(Duration::from_millis(500));

/// How long connections may take to end once everything is cancelled.
const STOP_TIMEOUT: Duration = Duration::from_secs(3);

/// A TCP peer that is silent for this long is asked for a sign of life (a Unix peer's death is noticed at once).
const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(30);

/// How long a sign of life may take.
const KEEPALIVE_TIMEOUT: Duration = Duration::from_secs(10);

/// Streams that one connection may carry: configuration and metrics, with room for tools.
const MAX_STREAMS_PER_CONNECTION: u32 = 64;

/// How the control plane is run.
#[derive(Clone, Debug, Default)]
pub struct ControlOptions {
    /// Unix socket on which proxies are served; one left by a former process is replaced.
    pub socket: Option<PathBuf>,
    /// Address on which proxies are served without TLS.
    pub listen: Option<SocketAddr>,
    /// What holds for the whole mesh.
    pub mesh: MeshConfig,
    /// Whether this process writes statuses; without it, it always does.
    pub leader: Option<watch::Receiver<bool>>,
}

/// The control plane could not start or go on.
#[derive(Debug, thiserror::Error)]
pub enum ControlError {
    /// Nothing to listen on.
    #[error("the control plane has nothing to listen on: give it a socket path or an address")]
    NoListener,
    /// A listener could not be opened.
    #[error("cannot listen for proxies on {address}: {source}")]
    Listen {
        /// The path or address.
        address: String,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// A listener failed while serving.
    #[error("serving proxies on {address}: {source}")]
    Serve {
        /// The path or address.
        address: String,
        /// What the transport said.
        #[source]
        source: tonic::transport::Error,
    },
    /// A kind cannot be watched.
    #[error(transparent)]
    Watch(#[from] WatchError),
}

/// The control plane: its handles are there before it runs.
#[derive(Debug)]
pub struct Control {
    options: ControlOptions,
    ledger: Ledger,
    telemetry: Telemetry,
}

impl Control {
    /// A control plane that does not run yet.
    pub fn new(options: ControlOptions) -> Self {
        Self {
            options,
            ledger: Ledger::new(),
            telemetry: Telemetry::new(),
        }
    }

    /// Which proxies run with what.
    pub fn ledger(&self) -> &Ledger {
        &self.ledger
    }

    /// What the proxies measure.
    pub fn telemetry(&self) -> &Telemetry {
        &self.telemetry
    }

    /// Opens the listeners, so that proxies may connect from now on, and runs until `cancel` is cancelled.
    pub async fn run(self, client: kube::Client, cancel: CancellationToken) -> Result<(), ControlError> {
        let Self {
            options,
            ledger,
            telemetry,
        } = self;
        // A part that fails takes the others with it, not the caller's other work.
        let cancel = cancel.child_token();
        let _stop = cancel.clone().drop_guard();
        let world = MeshWorld::new(options.mesh);
        let (pump, ads) = Pump::new(world, ledger.clone(), cancel.clone());
        // A socket that is still there was left by a process that was killed; over TCP nobody can tell.
        let is_successor =
            options.listen.is_some() || options.socket.as_ref().is_some_and(|path| path.exists());
        let pump = pump.with_return_grace(if is_successor {
            RETURN_GRACE
        } else {
            Duration::ZERO
        });
        let mut tasks: JoinSet<Result<(), ControlError>> = JoinSet::new();

        if options.socket.is_none() && options.listen.is_none() {
            return Err(ControlError::NoListener);
        }
        if let Some(path) = &options.socket {
            let incoming = UnixListenerStream::new(bind(path)?);
            tasks.spawn(serve(
                path.display().to_string(),
                incoming,
                None,
                ads.clone(),
                telemetry.clone(),
                cancel.clone(),
            ));
        }
        if let Some(address) = options.listen {
            let listener = TcpListener::bind(address)
                .await
                .map_err(|source| ControlError::Listen {
                    address: address.to_string(),
                    source,
                })?;
            let incoming = TcpListenerStream::new(listener).map(|stream| {
                // A push is one small message: waiting for more would only delay it.
                stream.and_then(|stream| stream.set_nodelay(true).map(|()| stream))
            });
            tasks.spawn(serve(
                address.to_string(),
                incoming,
                Some(KEEPALIVE_INTERVAL),
                ads.clone(),
                telemetry.clone(),
                cancel.clone(),
            ));
        }

        let mut watches = JoinSet::new();
        let events = index::watch(&client, &cancel, &mut watches);
        let status = crate::status::Writer::new(client, ledger, pump.asking(), options.leader);
        let run = (pump, cancel.clone());
        tasks.spawn(async move {
            run.0.run(events, run.1).await;
            Ok(())
        });
        let run = (telemetry, cancel.clone());
        tasks.spawn(async move {
            run.0.run(run.1).await;
            Ok(())
        });
        let run = cancel.clone();
        tasks.spawn(async move {
            status.run(run).await;
            Ok(())
        });
        tasks.spawn(async move {
            while let Some(ended) = watches.join_next().await {
                if let Ok(ended) = ended {
                    ended?;
                }
            }
            Ok(())
        });

        let mut first_error = None;
        let mut stopping = Box::pin(stop_timeout(cancel.clone()));
        loop {
            let ended = tokio::select! {
                // A connection that does not end is dropped with the tasks.
                () = &mut stopping => break,
                ended = tasks.join_next() => match ended {
                    Some(ended) => ended,
                    None => break,
                },
            };
            if let Ok(Err(error)) = ended {
                cancel.cancel();
                first_error.get_or_insert(error);
            }
        }
        tasks.shutdown().await;
        ads.drained().await;
        if let Some(path) = options.socket {
            // Gone already if a successor has replaced it.
            let _ = std::fs::remove_file(path);
        }
        first_error.map_or(Ok(()), Err)
    }
}

async fn stop_timeout(cancel: CancellationToken) {
    cancel.cancelled().await;
    tokio::time::sleep(STOP_TIMEOUT).await;
}

/// Listens on a Unix socket, in place of one that a former process left.
fn bind(path: &Path) -> Result<UnixListener, ControlError> {
    let failed = |source| ControlError::Listen {
        address: path.display().to_string(),
        source,
    };
    match std::fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(failed(error)),
        Ok(()) | Err(_) => {}
    }
    let listener = UnixListener::bind(path).map_err(failed)?;
    // Proxies run as users of their own; who may come this far is decided by the directory.
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o666)).map_err(failed)?;
    Ok(listener)
}

async fn serve<S, I>(
    address: String,
    incoming: S,
    keepalive: Option<Duration>,
    ads: AdsServer,
    telemetry: Telemetry,
    cancel: CancellationToken,
) -> Result<(), ControlError>
where
    S: futures::Stream<Item = io::Result<I>>,
    I: tonic::transport::server::Connected
        + tokio::io::AsyncRead
        + tokio::io::AsyncWrite
        + Send
        + Unpin
        + 'static,
{
    info!(address, "serving proxies");
    tonic::transport::Server::builder()
        .max_concurrent_streams(MAX_STREAMS_PER_CONNECTION)
        .http2_keepalive_interval(keepalive)
        .http2_keepalive_timeout(Some(KEEPALIVE_TIMEOUT))
        .add_service(ads.service())
        .add_service(telemetry.service(cancel.clone()))
        .serve_with_incoming_shutdown(incoming, cancel.cancelled_owned())
        .await
        .map_err(|source| ControlError::Serve { address, source })
}
