//! Access logs of connections: of the listener for every connection, of a TCP proxy for those that it joins.

use std::borrow::Cow;
use std::cell::Cell;
use std::net::SocketAddr;
use std::rc::Rc;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use super::http::Addresses;
use super::{Worker, logging};
use crate::config::listener::{Listener, TcpProxy};
use crate::metrics::flags::Flags;
use crate::observe::access_log::AccessLogs;
use crate::observe::record::{Kept, LogType, Record};
use crate::policy::facts::PeerIdentity;
use crate::policy::filter_state::Settings;
use crate::policy::metadata::Metadata;
use crate::random;
use crate::tls::info::ConnectionTls;
use crate::upstream::cluster::Host;

/// What is remembered of a connection; its lines are written when this is dropped, so also when the worker ends it.
pub(super) struct ConnectionLog {
    worker: Rc<Worker>,
    started: Instant,
    /// Who is connected with whom.
    pub addresses: Addresses,
    listener: Option<Arc<AccessLogs>>,
    proxy: Option<Arc<TcpProxy>>,
    /// Server name of the TLS handshake.
    pub server_name: Option<Box<str>>,
    /// TLS, where we end it.
    pub tls: Option<Arc<ConnectionTls>>,
    /// What policies said.
    pub metadata: Metadata,
    /// Flags.
    pub flags: Cell<Flags>,
    /// Bytes from the client.
    pub received: Cell<u64>,
    /// Bytes to the client.
    pub sent: Cell<u64>,
    /// Connection attempts.
    pub attempts: u32,
    /// The endpoint.
    pub host: Option<Rc<Host>>,
    /// Our own end of the connection to it.
    pub upstream_local: Option<SocketAddr>,
    /// TLS towards it.
    pub upstream_tls: Option<Arc<ConnectionTls>>,
    /// The cluster, also when it does not exist.
    pub cluster: Option<Arc<str>>,
    /// Why there is no upstream.
    pub failure: String,
    /// Why the client's part failed.
    pub downstream_failure: Option<String>,
    /// What policy ended the connection.
    pub termination: Cow<'static, str>,
    /// Why the proxy closed the connection.
    pub local_close: Cell<&'static str>,
}

impl ConnectionLog {
    /// Of a connection that was accepted a moment ago.
    pub(super) fn new(worker: Rc<Worker>, logs: Option<Arc<AccessLogs>>, addresses: Addresses) -> Box<Self> {
        Box::new(Self {
            worker,
            started: Instant::now(),
            addresses,
            listener: logs,
            proxy: None,
            server_name: None,
            tls: None,
            metadata: Metadata::default(),
            flags: Cell::default(),
            received: Cell::default(),
            sent: Cell::default(),
            attempts: 0,
            host: None,
            upstream_local: None,
            upstream_tls: None,
            cluster: None,
            failure: String::new(),
            downstream_failure: None,
            termination: Cow::Borrowed(""),
            local_close: Cell::new(""),
        })
    }

    /// The listener that serves the connection is another one than the one that accepted it.
    pub(super) fn follow(&mut self, logs: Option<Arc<AccessLogs>>) {
        self.listener = logs;
    }

    /// A TCP proxy serves the connection.
    pub(super) fn enter(&mut self, proxy: &Arc<TcpProxy>) {
        self.proxy = proxy.logs.is_some().then(|| proxy.clone());
    }

    /// Whether anybody wants lines; otherwise errors are told all the same.
    pub(super) fn is_wanted(&self) -> bool {
        self.listener.is_some() || self.proxy.is_some()
    }

    /// What the client did, or was to do, has failed.
    pub(super) fn client_failed(&mut self, listener: &Listener, error: &std::io::Error) {
        let reason = error.to_string();
        self.tell(listener, "downstream_transport_failure_reason", &reason);
        self.downstream_failure = Some(reason);
    }

    /// Writes a line about a connection that nobody serves, where nobody wants lines: errors are told all the same.
    pub(super) fn tell(&self, listener: &Listener, field: &str, reason: &str) {
        if self.is_wanted() {
            return;
        }
        let addresses = self.addresses;
        self.worker.log(
            serde_json::json!({
                "listener": &*listener.name,
                "response_flags": self.flags.get().to_string(),
                field: reason,
                "requested_server_name": self.server_name,
                "downstream_remote_address": addresses.remote.to_string(),
                "downstream_direct_remote_address": addresses.direct.to_string(),
                "downstream_local_address": addresses.local.to_string(),
            })
            .to_string(),
        );
    }

    /// Adds a flag.
    pub(super) fn flag(&self, flag: Flags) {
        self.flags.set(self.flags.get() | flag);
    }

    /// Writes the TCP proxy's lines while the connection goes on.
    pub(super) fn write_meanwhile(&self, kind: LogType) {
        if let Some(proxy) = &self.proxy
            && let Some(logs) = &proxy.logs
        {
            self.write(logs, kind);
        }
    }

    fn write(&self, logs: &AccessLogs, kind: LogType) {
        self.with_record(kind, |record| {
            logs.write(record, &random::next, self.worker.id, |batches| {
                logging::flush_later(&self.worker, batches);
            });
        });
    }

    /// Sets objects of the connection's filter state.
    pub(super) fn set_state(&mut self, settings: &Settings) {
        for index in 0..settings.len() {
            let made = self.with_record(LogType::TcpConnectionEnd, |record| settings.make(index, record));
            if let Some(made) = made {
                made.set(&mut self.metadata.state);
            }
        }
    }

    fn with_record<T>(&self, kind: LogType, show: impl FnOnce(&Record<'_>) -> T) -> T {
        let duration = self.started.elapsed();
        let kept = Kept::default();
        let record = Record {
            kind,
            start: SystemTime::now()
                .duration_since(UNIX_EPOCH)
                .unwrap_or_default()
                .saturating_sub(duration),
            duration,
            details: if self.flags.get().has(Flags::NO_ROUTE) {
                "filter_chain_not_found"
            } else {
                ""
            },
            termination: &self.termination,
            local_close: self.local_close.get(),
            downstream_failure: self.downstream_failure.as_deref(),
            flags: self.flags.get(),
            received: self.received.get(),
            sent: self.sent.get(),
            attempts: self.attempts,
            upstream_host: self.host.as_ref().map(|host| &*host.endpoint.text),
            upstream_local: self.upstream_local,
            upstream_cluster: self.cluster.as_deref(),
            upstream_failure: Some(&*self.failure).filter(|text| !text.is_empty()),
            direct_remote: self.addresses.direct,
            server_name: self.server_name.as_deref(),
            peer: self.tls.as_deref().and_then(PeerIdentity::of),
            downstream_tls: self.tls.as_deref(),
            upstream_tls: self.upstream_tls.as_deref(),
            upstream_name: self.host.as_ref().map(|host| host.endpoint.hostname()),
            upstream_metadata: self
                .host
                .as_ref()
                .and_then(|host| host.endpoint.metadata.as_ref()),
            tls: self.tls.as_ref().map(|tls| (tls.version, tls.cipher)),
            connection: self.addresses.connection,
            ..Record::of_connection(&kept, &self.metadata, self.addresses.remote, self.addresses.local)
        };
        show(&record)
    }
}

impl Drop for ConnectionLog {
    fn drop(&mut self) {
        self.write_meanwhile(LogType::TcpConnectionEnd);
        if let Some(logs) = &self.listener {
            self.write(logs, LogType::TcpConnectionEnd);
        }
    }
}

/// Writes lines of a connection at intervals, for ever.
pub(super) async fn periodically(log: &ConnectionLog, interval: Option<Duration>) {
    let Some(interval) = interval.filter(|_| log.proxy.is_some()) else {
        return std::future::pending().await;
    };
    loop {
        tokio::time::sleep(interval).await;
        log.write_meanwhile(LogType::TcpPeriodic);
    }
}
