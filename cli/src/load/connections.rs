//! Connections to one server: HTTP/1.1 ones are used by one request at a time and kept, one HTTP/2 connection carries
//! many.

use std::time::Duration;

use anyhow::Context as _;
use bytes::Bytes;
use http::header::HOST;
use http::{HeaderValue, Request, Uri, Version};
use http_body_util::{BodyExt, Empty};
use hyper::client::conn::{http1, http2};
use hyper_util::rt::{TokioExecutor, TokioIo};
use parking_lot::Mutex;
use tokio::net::TcpStream;
use tokio::sync::Semaphore;

use super::outcome::Outcome;
use super::{Plan, Protocol};

/// How long a TCP connection may take to open; loopback needs microseconds.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(3);

type Body = Empty<Bytes>;

pub(super) struct Connections {
    host: String,
    port: u16,
    protocol: Protocol,
    /// Idle HTTP/1.1 connections, last used first.
    idle: Mutex<Vec<http1::SendRequest<Body>>>,
    /// The HTTP/2 connection, once open.
    shared: tokio::sync::Mutex<Option<http2::SendRequest<Body>>>,
    /// Bounds the HTTP/1.1 connections, or the HTTP/2 streams.
    permits: Semaphore,
}

/// HTTP/2 servers usually allow 100 streams; more wait here rather than there.
const STREAMS_PER_CONNECTION: usize = 100;

impl Connections {
    pub(super) fn new(host: String, port: u16, protocol: Protocol, limit: usize) -> Self {
        let permits = match protocol {
            Protocol::Http1 => limit.max(1),
            Protocol::Http2 => STREAMS_PER_CONNECTION,
        };
        Self {
            host,
            port,
            protocol,
            idle: Mutex::default(),
            shared: tokio::sync::Mutex::default(),
            permits: Semaphore::new(permits),
        }
    }

    /// Sends one request and reads its whole answer.
    pub(super) async fn send(&self, plan: &Plan) -> Outcome {
        let Ok(_permit) = self.permits.acquire().await else {
            return Outcome::no_answer("closed");
        };
        match self.protocol {
            Protocol::Http1 => self.send_http1(plan).await,
            Protocol::Http2 => self.send_http2(plan).await,
        }
    }

    async fn open(&self) -> anyhow::Result<TokioIo<TcpStream>> {
        let connect = TcpStream::connect((self.host.as_str(), self.port));
        let stream = tokio::time::timeout(CONNECT_TIMEOUT, connect)
            .await
            .context("timeout")??;
        stream.set_nodelay(true)?;
        Ok(TokioIo::new(stream))
    }

    async fn send_http1(&self, plan: &Plan) -> Outcome {
        loop {
            let kept = self.idle.lock().pop();
            let fresh = kept.is_none();
            let mut sender = match kept {
                Some(sender) if sender.is_closed() => continue,
                Some(sender) => sender,
                None => match self.connect_http1().await {
                    Ok(sender) => sender,
                    Err(_) => return Outcome::no_answer("connect"),
                },
            };
            if sender.ready().await.is_err() {
                if fresh {
                    return Outcome::no_answer("reset");
                }
                continue;
            }
            let Ok(request) = request(plan, Version::HTTP_11) else {
                return Outcome::no_answer("request");
            };
            match sender.try_send_request(request).await {
                Ok(response) => {
                    let (parts, body) = response.into_parts();
                    if body.collect().await.is_err() {
                        return Outcome::no_answer("truncated");
                    }
                    self.idle.lock().push(sender);
                    return Outcome::of_answer(parts.status, &parts.headers, plan.group_by.as_ref());
                }
                // The server closed a kept connection before it saw a byte of this request.
                Err(mut error) => {
                    // Sent again only if the server closed a kept connection before it saw a byte of this request.
                    if fresh || error.take_message().is_none() {
                        return Outcome::no_answer("reset");
                    }
                }
            }
        }
    }

    async fn connect_http1(&self) -> anyhow::Result<http1::SendRequest<Body>> {
        let (sender, connection) = http1::handshake(self.open().await?).await?;
        tokio::spawn(connection);
        Ok(sender)
    }

    async fn send_http2(&self, plan: &Plan) -> Outcome {
        let mut sender = {
            let mut shared = self.shared.lock().await;
            match &*shared {
                Some(sender) if !sender.is_closed() => sender.clone(),
                Some(_) | None => match self.connect_http2().await {
                    Ok(sender) => shared.insert(sender).clone(),
                    Err(_) => return Outcome::no_answer("connect"),
                },
            }
        };
        if sender.ready().await.is_err() {
            return Outcome::no_answer("reset");
        }
        let Ok(request) = request(plan, Version::HTTP_2) else {
            return Outcome::no_answer("request");
        };
        let Ok(response) = sender.send_request(request).await else {
            return Outcome::no_answer("reset");
        };
        let (parts, body) = response.into_parts();
        if body.collect().await.is_err() {
            return Outcome::no_answer("truncated");
        }
        Outcome::of_answer(parts.status, &parts.headers, plan.group_by.as_ref())
    }

    async fn connect_http2(&self) -> anyhow::Result<http2::SendRequest<Body>> {
        let (sender, connection) = http2::Builder::new(TokioExecutor::new())
            .handshake(self.open().await?)
            .await?;
        tokio::spawn(connection);
        Ok(sender)
    }
}

fn request(plan: &Plan, version: Version) -> anyhow::Result<Request<Body>> {
    let mut request = Request::new(Empty::new());
    *request.method_mut() = plan.method.clone();
    *request.version_mut() = version;
    let host = plan
        .headers
        .iter()
        .find(|(name, _)| *name == HOST)
        .map(|(_, value)| value);
    let authority = match host {
        Some(value) => value.to_str()?.to_owned(),
        None => plan
            .url
            .authority()
            .context("the URL names no host")?
            .as_str()
            .to_owned(),
    };
    if version == Version::HTTP_2 {
        let path = plan.url.path_and_query().map_or("/", |path| path.as_str());
        *request.uri_mut() = Uri::builder()
            .scheme("http")
            .authority(authority)
            .path_and_query(path)
            .build()?;
    } else {
        *request.uri_mut() = plan
            .url
            .path_and_query()
            .map_or("/", |path| path.as_str())
            .parse()?;
        request
            .headers_mut()
            .insert(HOST, HeaderValue::from_str(&authority)?);
    }
    for (name, value) in plan.headers.iter().filter(|(name, _)| *name != HOST) {
        request.headers_mut().append(name.clone(), value.clone());
    }
    Ok(request)
}
