//! Carrying a TCP connection on within a CONNECT over HTTP/1.1 or HTTP/2 (`tunneling_config`): over the same pools as
//! requests, so that tunnels share HTTP/2 connections.

use std::rc::Rc;
use std::time::{SystemTime, UNIX_EPOCH};

use http::{HeaderMap, Method, Request, Uri, Version, header};

use super::Worker;
use super::body::UpstreamBody;
use super::failure::full_text;
use super::tcp::Client;
use super::tunnel::{Inside, inside};
use crate::config::headers::Scene;
use crate::config::tunneling::Tunneling;
use crate::observe::record::{Kept, Record, Wants};
use crate::policy::metadata::Metadata;
use crate::upstream::cluster::{Host, WorkerCluster};
use crate::upstream::outlier::Event;
use crate::upstream::pool::Lease;

/// Connections found closed while idle, at most, before the tunnel is given up.
const MAX_STALE: u32 = 5;

/// A tunnel that an endpoint has granted.
pub(super) struct Granted {
    /// What is inside of it.
    pub stream: Box<Inside>,
    /// Its place on the connection, held for as long as it lasts.
    pub lease: Lease,
}

/// Asks an endpoint for a tunnel, or says why there is none. What an endpoint answers counts for outlier detection.
pub(super) async fn open(
    worker: &Worker,
    cluster: &WorkerCluster,
    host: &Rc<Host>,
    tunneling: &Tunneling,
    client: &Client<'_>,
) -> Result<Granted, String> {
    // For the connection, and for the answer.
    let limit = cluster.config.connect_timeout.saturating_mul(2);
    let outcome = tokio::time::timeout(limit, ask(worker, cluster, host, tunneling, client)).await;
    let (event, outcome) = match outcome {
        Ok(Ok(granted)) => (Event::Status(200), Ok(granted)),
        Ok(Err(Refused::Status(status))) => (
            Event::Status(status),
            Err(format!("the tunnel was refused with status {status}")),
        ),
        Ok(Err(Refused::Failed(reason))) => (Event::LocalFailure, Err(reason)),
        Err(_) => (Event::LocalFailure, Err("connection timeout".to_owned())),
    };
    if cluster.record(host, event) {
        worker.recorder.counters().ejections.add(1);
    }
    outcome
}

/// Why there is no tunnel.
enum Refused {
    Status(u16),
    Failed(String),
}

/// What is known of a connection that asks for a tunnel.
struct ConnectionScene<'a> {
    client: &'a Client<'a>,
    cluster: &'a WorkerCluster,
    host: &'a Host,
    metadata: &'a Metadata,
}

impl Scene for ConnectionScene<'_> {
    fn show(&self, _: &Wants, _: &HeaderMap, to: &mut dyn FnMut(&Record<'_>)) {
        let (kept, client) = (Kept::default(), self.client);
        to(&Record {
            start: SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default(),
            server_name: client.server_name,
            upstream_cluster: Some(&self.cluster.slot.name),
            upstream_host: Some(&self.host.endpoint.text),
            upstream_name: Some(self.host.endpoint.hostname()),
            upstream_metadata: self.host.endpoint.metadata.as_ref(),
            cluster_metadata: self.cluster.config.metadata.as_ref(),
            ..Record::of_connection(&kept, self.metadata, client.source, client.destination)
        });
    }
}

async fn ask(
    worker: &Worker,
    cluster: &WorkerCluster,
    host: &Rc<Host>,
    tunneling: &Tunneling,
    client: &Client<'_>,
) -> Result<Granted, Refused> {
    let failed = |reason: &dyn std::fmt::Display| Refused::Failed(reason.to_string());
    let config = &cluster.config;
    let metadata = Metadata::of_connection(client.state.clone());
    let scene = ConnectionScene {
        client,
        cluster,
        host,
        metadata: &metadata,
    };
    let (authority, headers) = tunneling
        .head(&scene)
        .ok_or_else(|| failed(&"tunneling_config.hostname is empty for this connection"))?;
    let uri = authority
        .to_str()
        .ok()
        .and_then(|authority| Uri::builder().authority(authority).build().ok())
        .ok_or_else(|| {
            failed(&format!(
                "tunneling_config.hostname: {authority:?} is no authority"
            ))
        })?;
    let speaking = config.http.for_own_requests();
    let options = config.connect_options(None, client.state, client.source, client.destination);
    let mut stale = 0;
    loop {
        let lease = cluster.lease(worker, host, speaking, &options).await;
        let mut lease = lease.map_err(|error| failed(&error))?;
        let mut request = Request::new(UpstreamBody::Empty);
        *request.method_mut() = Method::CONNECT;
        *request.uri_mut() = uri.clone();
        *request.headers_mut() = headers.clone();
        if lease.is_http2() {
            *request.version_mut() = Version::HTTP_2;
        } else {
            request.headers_mut().insert(header::HOST, authority.clone());
        }
        let reused = lease.reused();
        let response = match lease.send(request, None).await {
            Ok(response) => response,
            // Closed while idle: the next connection, at the latest a new one, tells more.
            Err(_) if reused && stale < MAX_STALE => {
                stale += 1;
                continue;
            }
            Err(unanswered) => return Err(Refused::Failed(full_text(&unanswered.error))),
        };
        if !response.status().is_success() {
            return Err(Refused::Status(response.status().as_u16()));
        }
        let stream = inside(response).ok_or_else(|| failed(&"the answer to CONNECT has content"))?;
        return Ok(Granted {
            stream: Box::new(stream),
            lease,
        });
    }
}
