//! Makes the active health checks of clusters. One task per host and cluster, woken by its timers; who joins and who
//! leaves is learnt from the store when it changes, not by looking again and again.
//!
//! A result reaches the workers like any other change: the host's record is written and, when its state has changed,
//! the cluster's slot gets a new version, by which each worker makes its balancer anew.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use bytes::{BufMut, Bytes, BytesMut};
use http::{HeaderValue, Method, Request, Response, Uri, Version, header};
use http_body_util::{BodyExt, Full, Limited};
use hyper::body::Incoming;
use hyper::client::conn::{http1, http2};
use hyper_util::rt::{TokioExecutor, TokioIo};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::task::AbortHandle;
use tokio_util::sync::CancellationToken;

use super::Proxy;
use crate::config::cluster::Cluster;
use crate::config::convert::Address;
use crate::config::endpoint::Endpoint;
use crate::config::health_check::{HealthCheck, HttpProbe, Probe};
use crate::config::slot::ClusterSlot;
use crate::metrics::events::ClusterEvent;
use crate::random;
use crate::upstream::connect::{ConnectOptions, Speaking, Stream, connect};
use crate::upstream::health::{Finding, Tally, jitter};

/// Bytes that are read while looking for what a TCP check expects.
const MAX_TCP_ANSWER: usize = 64 * 1024;
/// What Envoy calls itself when it checks.
const USER_AGENT: &str = "Envoy/HC";

/// A host under the checks of a cluster: aborted when either changes or goes.
struct Watched {
    config: Arc<Cluster>,
    endpoint: Arc<Endpoint>,
    tasks: Vec<AbortHandle>,
}

impl Drop for Watched {
    fn drop(&mut self) {
        for task in &self.tasks {
            task.abort();
        }
    }
}

/// Checks until cancelled.
pub async fn run(proxy: Arc<Proxy>, cancel: CancellationToken) {
    let mut changes = proxy.changes();
    let mut watched: HashMap<(Arc<str>, Address), Watched> = HashMap::new();
    let mut version = 0;
    loop {
        changes.borrow_and_update();
        let changed = proxy.store(|store| {
            let before = std::mem::replace(&mut version, store.checked_version());
            (before != version).then(|| store.checked_clusters().cloned().collect())
        });
        if let Some(clusters) = changed {
            follow(&mut watched, clusters);
        }
        tokio::select! {
            () = cancel.cancelled() => return,
            changed = changes.changed() => if changed.is_err() { return },
        }
    }
}

/// Starts and ends checks, so that they are those of `clusters`.
fn follow(watched: &mut HashMap<(Arc<str>, Address), Watched>, clusters: Vec<Arc<ClusterSlot>>) {
    let mut next = HashMap::new();
    for slot in clusters {
        let (Some(config), Some(set)) = (slot.config(), slot.endpoints()) else {
            continue;
        };
        for endpoint in set.all.iter().filter(|endpoint| !endpoint.check().disabled) {
            let key = (slot.name.clone(), endpoint.address.clone());
            let entry = match watched.remove(&key) {
                Some(old)
                    if Arc::ptr_eq(&old.config, &config)
                        && Arc::ptr_eq(&old.endpoint.state, &endpoint.state)
                        && old.endpoint.check() == endpoint.check() =>
                {
                    old
                }
                _ => {
                    let tasks = (0..config.health_checks.len())
                        .map(|index| {
                            let host = CheckedHost {
                                slot: slot.clone(),
                                config: config.clone(),
                                endpoint: endpoint.clone(),
                                index,
                            };
                            tokio::spawn(host.check_forever()).abort_handle()
                        })
                        .collect();
                    Watched {
                        config: config.clone(),
                        endpoint: endpoint.clone(),
                        tasks,
                    }
                }
            };
            next.insert(key, entry);
        }
    }
    // What is left in the old map has gone, and ends by being dropped.
    *watched = next;
}

/// One host under one check.
struct CheckedHost {
    slot: Arc<ClusterSlot>,
    config: Arc<Cluster>,
    endpoint: Arc<Endpoint>,
    index: usize,
}

/// A connection kept for the next check.
enum Kept {
    Http1(http1::SendRequest<Full<Bytes>>),
    Http2(http2::SendRequest<Full<Bytes>>),
}

impl CheckedHost {
    fn check(&self) -> &HealthCheck {
        &self.config.health_checks[self.index]
    }

    async fn check_forever(self) {
        let schedule = &self.check().schedule;
        let bit = 1_u32 << self.index;
        let state = &self.endpoint.state;
        // A host that stays in the cluster through a change of configuration keeps what is known of it.
        let mut tally = Tally::starting(state.failed_checks.load(Ordering::Relaxed) & bit == 0);
        let mut kept = None;
        tokio::time::sleep(
            schedule
                .initial_jitter
                .mul_f64(random::next() as f64 / u64::MAX as f64),
        )
        .await;
        loop {
            let mut network = false;
            let finding = match tokio::time::timeout(schedule.timeout, self.probe(&mut kept)).await {
                Ok(Ok(finding)) => finding,
                Ok(Err(error)) => {
                    network = true;
                    tracing::debug!(cluster = %self.slot.name, host = %self.endpoint.text, %error, "health check");
                    kept = None;
                    Finding::Failed
                }
                Err(_) => {
                    network = true;
                    kept = None;
                    Finding::Failed
                }
            };
            let counted = &self.slot.counted;
            counted.note(ClusterEvent::CheckAttempt);
            if let Probe::Http(probe) = &self.check().probe
                && probe.service.is_some()
            {
                counted.note(ClusterEvent::CheckVerifyCluster);
            }
            counted.note(if finding == Finding::Passed {
                ClusterEvent::CheckSuccess
            } else {
                ClusterEvent::CheckFailure
            });
            if network {
                counted.note(ClusterEvent::CheckNetworkFailure);
            }
            if !self.check().reuse {
                kept = None;
            }
            let traffic = self.slot.usage.used.load(Ordering::Relaxed);
            let (changed, wait) = tally.record(finding, schedule, traffic);
            if tally.healthy {
                state.failed_checks.fetch_and(!bit, Ordering::Relaxed);
            } else {
                state.failed_checks.fetch_or(bit, Ordering::Relaxed);
            }
            if changed {
                if tally.healthy {
                    state.recovered();
                }
                tracing::info!(
                    cluster = %self.slot.name, host = %self.endpoint.text, healthy = tally.healthy,
                    "active health check changed the host's state"
                );
                self.slot.touch();
            } else if tally.healthy && self.config.unejects_on_check() {
                state.uneject();
            }
            tokio::time::sleep(wait + jitter(schedule, wait, random::next())).await;
        }
    }

    /// A connection as requests have it, TLS included, to where the host wants to be checked.
    async fn connect(&self, speaking: Speaking) -> std::io::Result<Stream> {
        let target = Endpoint {
            special: self.endpoint.special.clone(),
            ..Endpoint::at(self.target())
        };
        let connected = connect(&self.config, &target, speaking, &ConnectOptions::default()).await?;
        Ok(connected.stream)
    }

    fn target(&self) -> Address {
        let check = self.endpoint.check();
        let address = check.address.as_ref().unwrap_or(&self.endpoint.address);
        match (address, check.port.or(self.check().port)) {
            (Address::Tcp(address), Some(port)) => Address::Tcp(SocketAddr::new(address.ip(), port)),
            (address, _) => address.clone(),
        }
    }

    async fn probe(&self, kept: &mut Option<Kept>) -> Result<Finding, Error> {
        match &self.check().probe {
            Probe::Tcp { send, receive } => {
                let stream = self.connect(Speaking::Bytes).await?;
                tcp(stream, send, receive).await
            }
            Probe::Http(probe) => self.http(probe, kept).await,
            Probe::Grpc {
                service,
                authority,
                metadata,
            } => self.grpc(service, authority.as_deref(), metadata, kept).await,
        }
    }

    async fn sender<'k>(&self, http2: bool, kept: &'k mut Option<Kept>) -> Result<&'k mut Kept, Error> {
        let usable = match kept {
            Some(Kept::Http1(sender)) => !http2 && sender.ready().await.is_ok(),
            Some(Kept::Http2(sender)) => http2 && sender.ready().await.is_ok(),
            None => false,
        };
        if !usable {
            *kept = None;
        }
        if kept.is_none() {
            let speaking = if http2 { Speaking::Http2 } else { Speaking::Http1 };
            let io = TokioIo::new(self.connect(speaking).await?);
            // The connections end when their sender is dropped.
            *kept = Some(if http2 {
                let (sender, connection) = http2::handshake(TokioExecutor::new(), io).await?;
                tokio::spawn(connection);
                Kept::Http2(sender)
            } else {
                let (sender, connection) = http1::handshake(io).await?;
                tokio::spawn(connection);
                Kept::Http1(sender)
            });
        }
        kept.as_mut().ok_or(Error::Protocol("no connection"))
    }

    async fn send(
        &self,
        http2: bool,
        kept: &mut Option<Kept>,
        mut request: Request<Full<Bytes>>,
    ) -> Result<Response<Incoming>, Error> {
        Ok(match self.sender(http2, kept).await? {
            Kept::Http1(sender) => {
                let host = request
                    .uri()
                    .authority()
                    .map(|name| HeaderValue::from_str(name.as_str()));
                if let Some(Ok(host)) = host {
                    request.headers_mut().insert(header::HOST, host);
                }
                let path = request.uri().path_and_query().cloned();
                *request.uri_mut() = path.map(Uri::from).unwrap_or_default();
                sender.send_request(request).await?
            }
            Kept::Http2(sender) => {
                *request.version_mut() = Version::HTTP_2;
                sender.send_request(request).await?
            }
        })
    }

    fn uri(&self, host: Option<&str>, path: &http::uri::PathAndQuery) -> Result<Uri, Error> {
        let named = [
            host,
            self.endpoint.check().hostname.as_deref(),
            Some(&*self.slot.name),
        ];
        // The cluster's name, Envoy's default, is often no authority (`outbound|80||x`).
        named
            .into_iter()
            .flatten()
            .chain([&*self.endpoint.text])
            .find_map(|name| {
                Uri::builder()
                    .scheme("http")
                    .authority(name)
                    .path_and_query(path.clone())
                    .build()
                    .ok()
            })
            .ok_or(Error::Protocol("no authority"))
    }

    async fn http(&self, probe: &HttpProbe, kept: &mut Option<Kept>) -> Result<Finding, Error> {
        let mut request = Request::new(Full::default());
        *request.method_mut() = probe.method.clone();
        *request.uri_mut() = self.uri(probe.host.as_deref(), &probe.path)?;
        let headers = request.headers_mut();
        headers.insert(header::USER_AGENT, HeaderValue::from_static(USER_AGENT));
        for (name, value) in &probe.headers {
            headers.append(name, value.clone());
        }
        let response = self.send(probe.http2, kept, request).await?;
        let status = response.status().as_u16();
        let within =
            |ranges: &[std::ops::RangeInclusive<u16>]| ranges.iter().any(|range| range.contains(&status));
        let service = response
            .headers()
            .get("x-envoy-upstream-healthchecked-cluster")
            .and_then(|value| value.to_str().ok())
            .unwrap_or_default()
            .to_owned();
        let closes = response
            .headers()
            .get(header::CONNECTION)
            .is_some_and(|value| value.as_bytes().eq_ignore_ascii_case(b"close"));
        let body = Limited::new(response.into_body(), probe.buffer.max(MAX_TCP_ANSWER))
            .collect()
            .await
            .map_err(|_| Error::Protocol("the body is too long or broke off"))?
            .to_bytes();
        if closes {
            *kept = None;
        }
        if !within(&probe.expected) {
            let counts = within(&probe.retriable);
            return Ok(if counts { Finding::Failed } else { Finding::Refused });
        }
        if probe
            .service
            .as_ref()
            .is_some_and(|wanted| !wanted.matches(&service))
        {
            return Ok(Finding::Refused);
        }
        let seen = &body[..body.len().min(probe.buffer)];
        Ok(if contains_in_order(seen, &probe.receive) {
            Finding::Passed
        } else {
            Finding::Refused
        })
    }

    /// The protocol of grpc.health.v1: one length-prefixed message each way.
    async fn grpc(
        &self,
        service: &str,
        authority: Option<&str>,
        metadata: &[(http::HeaderName, HeaderValue)],
        kept: &mut Option<Kept>,
    ) -> Result<Finding, Error> {
        let mut message = BytesMut::new();
        if !service.is_empty() {
            // HealthCheckRequest.service, field 1.
            prost::encoding::string::encode(1, &service.to_owned(), &mut message);
        }
        let mut frame = BytesMut::with_capacity(5 + message.len());
        frame.put_u8(0);
        frame.put_u32(message.len() as u32);
        frame.put(message);
        let path = http::uri::PathAndQuery::from_static("/grpc.health.v1.Health/Check");
        let mut request = Request::new(Full::new(frame.freeze()));
        *request.method_mut() = Method::POST;
        *request.uri_mut() = self.uri(authority, &path)?;
        let headers = request.headers_mut();
        headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("application/grpc"));
        headers.insert(header::TE, HeaderValue::from_static("trailers"));
        headers.insert(header::USER_AGENT, HeaderValue::from_static(USER_AGENT));
        for (name, value) in metadata {
            headers.append(name, value.clone());
        }
        let response = self.send(true, kept, request).await?;
        if response.status() != http::StatusCode::OK {
            return Ok(Finding::Failed);
        }
        let status = |headers: &http::HeaderMap| {
            headers
                .get("grpc-status")
                .and_then(|value| value.to_str().ok()?.parse::<u32>().ok())
        };
        let early = status(response.headers());
        let collected = Limited::new(response.into_body(), MAX_TCP_ANSWER)
            .collect()
            .await
            .map_err(|_| Error::Protocol("the body is too long or broke off"))?;
        let late = collected.trailers().and_then(status);
        if early.or(late) != Some(0) {
            // UNIMPLEMENTED, NOT_FOUND and so on: as much a failure as no answer.
            return Ok(Finding::Failed);
        }
        let body = collected.to_bytes();
        Ok(match body.get(5..).map(serving_status) {
            // HealthCheckResponse.ServingStatus.SERVING
            Some(Some(1)) => Finding::Passed,
            _ => Finding::Refused,
        })
    }
}

/// HealthCheckResponse.status, field 1.
fn serving_status(mut message: &[u8]) -> Option<i32> {
    use prost::encoding::{DecodeContext, decode_key, int32, skip_field};
    let mut status = 0;
    while !message.is_empty() {
        let (field, wire) = decode_key(&mut message).ok()?;
        if field == 1 {
            int32::merge(wire, &mut status, &mut message, DecodeContext::default()).ok()?;
        } else {
            skip_field(wire, field, &mut message, DecodeContext::default()).ok()?;
        }
    }
    Some(status)
}

async fn tcp(mut stream: Stream, send: &[u8], receive: &[Box<[u8]>]) -> Result<Finding, Error> {
    if !send.is_empty() {
        stream.write_all(send).await?;
    }
    let mut answer = BytesMut::new();
    while !contains_in_order(&answer, receive) {
        if answer.len() >= MAX_TCP_ANSWER {
            return Err(Error::Protocol("the answer is too long"));
        }
        if stream.read_buf(&mut answer).await? == 0 {
            return Err(Error::Protocol("closed before the expected answer"));
        }
    }
    Ok(Finding::Passed)
}

/// Whether all of `parts` are in `bytes`, one behind the other.
fn contains_in_order(mut bytes: &[u8], parts: &[Box<[u8]>]) -> bool {
    parts.iter().all(|part| {
        let found = if part.is_empty() {
            Some(0)
        } else {
            bytes.windows(part.len()).position(|window| window == &**part)
        };
        found.is_some_and(|at| {
            bytes = &bytes[at + part.len()..];
            true
        })
    })
}

/// Why a check could not be made.
#[derive(Debug, thiserror::Error)]
enum Error {
    #[error("connect: {0}")]
    Io(#[from] std::io::Error),
    #[error("{0}")]
    Http(#[from] hyper::Error),
    #[error("{0}")]
    Protocol(&'static str),
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn expected_bytes_are_found_in_order_and_not_twice() {
        let parts =
            |parts: &[&str]| -> Vec<Box<[u8]>> { parts.iter().map(|part| part.as_bytes().into()).collect() };
        assert!(contains_in_order(b"xxPONGyyOK", &parts(&["PONG", "OK"])));
        assert!(!contains_in_order(b"OKPONG", &parts(&["PONG", "OK"])));
        assert!(!contains_in_order(b"PONG", &parts(&["PONG", "PONG"])));
        assert!(contains_in_order(b"", &[]));
    }

    #[test]
    fn a_grpc_health_response_is_read_by_its_status_field() {
        assert_eq!(serving_status(&[0x08, 0x01]), Some(1));
        assert_eq!(serving_status(&[]), Some(0));
        assert_eq!(serving_status(&[0x12, 0x01, b'x', 0x08, 0x02]), Some(2));
        assert_eq!(serving_status(&[0x08]), None);
    }
}
