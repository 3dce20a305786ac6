//! Building, serving and stopping.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use axum::Router;
use axum::body::Body;
use axum::extract::State;
use http::{Request, Response};
use hyper_util::rt::{TokioExecutor, TokioIo};
use hyper_util::service::TowerToHyperService;
use tokio::net::{TcpListener, UnixListener};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::admission::{Admission, PodLogs};
use crate::auth::{Tokens, Trust, User};
use crate::certificates::Certificates;
use crate::clock::{Clock, SystemClock};
use crate::controllers;
use crate::error::Error;
use crate::http::handle;
use crate::hub::{BehindLog, Hub};
use crate::log::Log;
use crate::store::Store;

/// How long connections get to end by themselves at shutdown.
const SHUTDOWN_GRACE: std::time::Duration = std::time::Duration::from_secs(2);
/// Connections served at one time over sockets.
const MAX_CONNECTIONS: usize = 4096;

/// Options of a server; see [`ApiServer::builder`].
pub struct Builder {
    dir: Option<PathBuf>,
    clock: Arc<dyn Clock>,
    admission: Option<Arc<dyn Admission>>,
    pod_logs: Option<Arc<dyn PodLogs>>,
    garbage_collector: bool,
    history_events: Option<usize>,
    kubernetes_admission: bool,
}

impl Builder {
    /// Keep objects in this directory. Without it they live in memory only.
    #[must_use]
    pub fn directory(mut self, dir: impl Into<PathBuf>) -> Self {
        self.dir = Some(dir.into());
        self
    }

    /// Mutating and validating admission.
    #[must_use]
    pub fn admission(mut self, admission: Arc<dyn Admission>) -> Self {
        self.admission = Some(admission);
        self
    }

    /// Where `pods/log` comes from; without it that subresource answers 501.
    #[must_use]
    pub fn pod_logs(mut self, logs: Arc<dyn PodLogs>) -> Self {
        self.pod_logs = Some(logs);
        self
    }

    /// Another source of time, uids and generated names, for tests.
    #[must_use]
    pub fn clock(mut self, clock: Arc<dyn Clock>) -> Self {
        self.clock = clock;
        self
    }

    /// Whether dependents are collected; on by default.
    #[must_use]
    pub fn garbage_collector(mut self, on: bool) -> Self {
        self.garbage_collector = on;
        self
    }

    /// Add what Kubernetes' admission adds for the sake of components that a small cluster lacks: the volume with the API token in pods
    /// (no token is issued for it here) and the `not-ready` taint of new nodes (no node controller takes it off). Off by default.
    #[must_use]
    pub fn kubernetes_admission(mut self, on: bool) -> Self {
        self.kubernetes_admission = on;
        self
    }

    /// Events kept per kind for watchers that come back (4096 by default).
    #[must_use]
    pub fn history_events(mut self, events: usize) -> Self {
        self.history_events = Some(events);
        self
    }

    /// Read what is stored and start.
    pub async fn build(self) -> Result<ApiServer, Error> {
        let mut store = Store::new(1);
        if let Some(events) = self.history_events {
            store.set_history_limit(events);
        }
        let behind = Arc::new(BehindLog::default());
        let log = match &self.dir {
            None => None,
            Some(dir) => {
                let dir = dir.clone();
                // Reading a large log takes a while; nothing else of the runtime should wait for it.
                let (recovered, read) = tokio::task::spawn_blocking(move || {
                    let result = Log::open(&dir, &mut store);
                    result.map(|r| (r, store))
                })
                .await
                .map_err(|error| Error::Certificate {
                    action: "reading the stored objects",
                    reason: error.to_string(),
                })??;
                store = read;
                Some(Log::start(recovered, behind.clone())?)
            }
        };
        let hub = Arc::new(Hub::new(
            store,
            log,
            self.clock,
            self.admission,
            self.pod_logs,
            self.kubernetes_admission,
        ));
        behind.attach(&hub);
        controllers::crds::restore(&hub);
        {
            let services = hub.store.lock().list("/services", "", None, None, |_| true).items;
            let mut addresses = hub.addresses.lock();
            for service in services {
                addresses.restore(&service.value);
            }
        }
        controllers::namespaces::bootstrap(&hub)
            .await
            .map_err(|error| Error::Storage {
                action: "writing the standard namespaces to",
                path: self.dir.unwrap_or_default(),
                source: std::io::Error::other(error.message),
            })?;
        let tasks = TaskTracker::new();
        controllers::spawn(&hub, &tasks, self.garbage_collector);
        Ok(ApiServer { hub, tasks })
    }
}

/// A running API server.
pub struct ApiServer {
    hub: Arc<Hub>,
    tasks: TaskTracker,
}

#[derive(Clone)]
struct Front {
    hub: Arc<Hub>,
    trust: Trust,
}

async fn serve(State(front): State<Front>, request: Request<Body>) -> Response<Body> {
    handle(front.hub, front.trust, request).await
}

impl ApiServer {
    /// Options with their defaults: in memory, system clock, no admission, no logs, garbage collector on.
    pub fn builder() -> Builder {
        Builder {
            dir: None,
            clock: Arc::new(SystemClock),
            admission: None,
            pod_logs: None,
            garbage_collector: true,
            history_events: None,
            kubernetes_admission: false,
        }
    }

    fn router(&self, trust: Trust) -> Router {
        let front = Front {
            hub: self.hub.clone(),
            trust,
        };
        Router::new().fallback(serve).with_state(front)
    }

    /// The server as a `tower::Service` for `kube::Client::new(service, "default")`, without a socket. The caller is an administrator
    /// named `serin`.
    pub fn service(&self) -> Router {
        self.service_as(User::admin("serin"))
    }

    /// The same for another user, as admission shall see it.
    pub fn service_as(&self, user: User) -> Router {
        self.router(Trust::Caller(Arc::new(user)))
    }

    /// Serve HTTPS on `address`; returns the address in use (port 0 picks a free one).
    pub async fn serve_tls(
        &self,
        address: SocketAddr,
        certificates: &Certificates,
        tokens: Tokens,
    ) -> Result<SocketAddr, Error> {
        let listen = |source| Error::Listen {
            address: address.to_string(),
            source,
        };
        let listener = TcpListener::bind(address).await.map_err(listen)?;
        let local = listener.local_addr().map_err(listen)?;
        let acceptor = tokio_rustls::TlsAcceptor::from(certificates.server_config()?);
        let router = self.router(Trust::Tokens(Arc::new(tokens)));
        self.accept(listener, move |stream, shutdown| {
            let (acceptor, router) = (acceptor.clone(), router.clone());
            async move {
                let _ = stream.set_nodelay(true);
                match tokio::time::timeout(HANDSHAKE_DEADLINE, acceptor.accept(stream)).await {
                    Ok(Ok(stream)) => connection(TokioIo::new(stream), router, shutdown).await,
                    Ok(Err(error)) => tracing::debug!(%error, "TLS handshake"),
                    Err(_) => tracing::debug!("TLS handshake took too long"),
                }
            }
        });
        Ok(local)
    }

    /// Serve plain HTTP on a Unix socket, readable by its owner only; whoever can open it is an administrator.
    pub async fn serve_unix(&self, path: &Path) -> Result<(), Error> {
        let listen = |source| Error::Listen {
            address: path.display().to_string(),
            source,
        };
        match std::fs::remove_file(path) {
            Ok(()) => {}
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
            Err(error) => return Err(listen(error)),
        }
        let listener = UnixListener::bind(path).map_err(listen)?;
        {
            use std::os::unix::fs::PermissionsExt as _;
            std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o600)).map_err(listen)?;
        }
        let router = self.router(Trust::Caller(Arc::new(User::admin("serin"))));
        self.accept(listener, move |stream, shutdown| {
            connection(TokioIo::new(stream), router.clone(), shutdown)
        });
        Ok(())
    }

    /// Serves each connection in a task of its own, as many at a time as are allowed, until the shutdown.
    fn accept<L, F>(
        &self,
        mut listener: L,
        mut serve: impl FnMut(L::Io, CancellationToken) -> F + Send + 'static,
    ) where
        L: axum::serve::Listener,
        F: Future<Output = ()> + Send + 'static,
    {
        let (shutdown, tasks) = (self.hub.shutdown.clone(), self.tasks.clone());
        let limit = Arc::new(tokio::sync::Semaphore::new(MAX_CONNECTIONS));
        self.tasks.spawn(async move {
            loop {
                let Ok(permit) = limit.clone().acquire_owned().await else {
                    return;
                };
                let (stream, _) = tokio::select! {
                    accepted = listener.accept() => accepted,
                    () = shutdown.cancelled() => return,
                };
                let served = serve(stream, shutdown.clone());
                tasks.spawn(async move {
                    let _permit = permit;
                    served.await;
                });
            }
        });
    }

    /// The newest resource version.
    pub fn resource_version(&self) -> u64 {
        self.hub.store.lock().rv()
    }

    /// Forget the history that watchers resume from, as a compaction of etcd does: older versions answer 410.
    pub fn compact_history(&self) {
        self.hub.store.lock().compact();
    }

    /// End watches and connections, stop the controllers, write what is pending.
    pub async fn shutdown(&self) {
        self.hub.shutdown.cancel();
        self.tasks.close();
        if tokio::time::timeout(SHUTDOWN_GRACE * 2, self.tasks.wait())
            .await
            .is_err()
        {
            tracing::warn!("some connections of the API server did not end in time");
        }
        if self.hub.log.is_some() {
            let hub = self.hub.clone();
            let closed = tokio::task::spawn_blocking(move || {
                if let Some(log) = &hub.log {
                    log.close();
                }
            });
            if closed.await.is_err() {
                tracing::warn!("the log writer of the API server ended abnormally");
            }
        }
    }
}

impl Drop for ApiServer {
    fn drop(&mut self) {
        self.hub.shutdown.cancel();
    }
}

const HANDSHAKE_DEADLINE: std::time::Duration = std::time::Duration::from_secs(10);

async fn connection<I>(io: TokioIo<I>, router: Router, shutdown: CancellationToken)
where
    I: tokio::io::AsyncRead + tokio::io::AsyncWrite + Unpin + Send + 'static,
{
    let builder = hyper_util::server::conn::auto::Builder::new(TokioExecutor::new());
    let connection = builder.serve_connection_with_upgrades(io, TowerToHyperService::new(router));
    tokio::pin!(connection);
    tokio::select! {
        result = connection.as_mut() => {
            if let Err(error) = result {
                tracing::debug!(%error, "connection");
            }
            return;
        }
        () = shutdown.cancelled() => {}
    }
    connection.as_mut().graceful_shutdown();
    if tokio::time::timeout(SHUTDOWN_GRACE, connection).await.is_err() {
        tracing::debug!("a connection was cut at shutdown");
    }
}
