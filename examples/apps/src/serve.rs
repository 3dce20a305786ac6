//! Serving a router until the process is asked to stop, then letting what is in flight finish.

use std::net::{Ipv6Addr, SocketAddr};
use std::time::Duration;

use anyhow::Context as _;
use axum::Router;
use tokio::net::TcpListener;
use tokio::signal::unix::{SignalKind, signal};

/// How long requests in flight may take after SIGTERM; Kubernetes' own grace period is 30 s.
const DRAIN_TIMEOUT: Duration = Duration::from_secs(25);

/// Serves on all addresses until SIGTERM or SIGINT.
pub(crate) async fn run(port: u16, router: Router) -> anyhow::Result<()> {
    let listener = listen(port).await?;
    eprintln!("listening on port {port}");
    let mut terminate = signal(SignalKind::terminate()).context("watch for SIGTERM")?;
    let mut interrupt = signal(SignalKind::interrupt()).context("watch for SIGINT")?;
    let (stopping, stopped) = tokio::sync::oneshot::channel::<()>();
    let server = axum::serve(listener, router).with_graceful_shutdown(async move {
        tokio::select! {
            _ = terminate.recv() => {}
            _ = interrupt.recv() => {}
        }
        let _ = stopping.send(());
    });
    tokio::select! {
        served = server => served.context("serve"),
        () = async {
            let _ = stopped.await;
            tokio::time::sleep(DRAIN_TIMEOUT).await;
        } => Ok(()),
    }
}

/// Binds the port on IPv6 with IPv4 mapped in, or on IPv4 alone where there is no IPv6.
async fn listen(port: u16) -> anyhow::Result<TcpListener> {
    let dual = SocketAddr::from((Ipv6Addr::UNSPECIFIED, port));
    match TcpListener::bind(dual).await {
        Ok(listener) => Ok(listener),
        Err(_) => TcpListener::bind(("0.0.0.0", port))
            .await
            .with_context(|| format!("listen on port {port}: is another program using it?")),
    }
}
