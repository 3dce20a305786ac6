//! The load: seven kinds of clients, each over and over.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use anyhow::Context;
use bytes::Bytes;
use http::{Method, Request, Response};
use http_body_util::{BodyExt, Full};
use hyper::body::Incoming;
use hyper::client::conn::{TrySendError, http1, http2};
use hyper_util::rt::{TokioExecutor, TokioIo};
use rustls::pki_types::ServerName;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;

use crate::arrangement::PATIENCE;

#[derive(Default)]
pub(crate) struct Counts {
    /// Answered whole with 200.
    pub(crate) answered: AtomicU64,
    /// Broken off by the moody endpoint, or answered 503 for it.
    pub(crate) broken: AtomicU64,
    /// Asked for a cluster that is there half of the time, and was not.
    absent: AtomicU64,
    /// Left by the client.
    left: AtomicU64,
    /// Not sent, since the proxy had said goodbye on the connection: asked again on another one.
    unsent: AtomicU64,
    /// Neither.
    pub(crate) unexpected: AtomicU64,
}

fn add(to: &AtomicU64) {
    to.fetch_add(1, Ordering::Relaxed);
}

/// Why there is no answer.
enum Failed {
    /// The request has not left this client.
    Unsent,
    /// Anything else.
    Broken(hyper::Error),
}

/// The status of an answer that came whole.
async fn whole(
    sent: impl Future<Output = Result<Response<Incoming>, TrySendError<Request<Full<Bytes>>>>>,
) -> Result<u16, Failed> {
    let response = sent.await.map_err(|mut error| {
        if error.take_message().is_some() {
            Failed::Unsent
        } else {
            Failed::Broken(error.into_error())
        }
    })?;
    let status = response.status().as_u16();
    response.into_body().collect().await.map_err(Failed::Broken)?;
    Ok(status)
}

impl Counts {
    pub(crate) fn told(&self) -> String {
        let of = |count: &AtomicU64| count.load(Ordering::Relaxed);
        format!(
            "{} requests answered, {} broken off by their endpoint, {} for an absent cluster, {} left by their client, {} \
             not sent where the proxy had said goodbye",
            of(&self.answered),
            of(&self.broken),
            of(&self.absent),
            of(&self.left),
            of(&self.unsent),
        )
    }

    /// Takes note of an answer; whether the connection may be used again.
    fn note(&self, path: &str, before: &str, answer: Result<u16, Failed>) -> bool {
        // The moody endpoint is behind `/1` and `/3`.
        let moody = !path.starts_with("/2") && !path.starts_with("/t");
        match &answer {
            Ok(200) => add(&self.answered),
            Ok(503) if path.starts_with("/t") => add(&self.absent),
            Ok(503) | Err(Failed::Broken(_)) if moody => add(&self.broken),
            Err(Failed::Unsent) => add(&self.unsent),
            other => {
                if self.unexpected.load(Ordering::Relaxed) < 10 {
                    let told = match other {
                        Ok(status) => status.to_string(),
                        Err(Failed::Broken(error)) => format!("{error:?}"),
                        Err(Failed::Unsent) => "nothing".to_owned(),
                    };
                    eprintln!("soak: {path}{before} was answered {told}");
                }
                add(&self.unexpected);
            }
        }
        answer.is_ok()
    }
}

pub(crate) struct Target {
    pub(crate) plain: SocketAddr,
    pub(crate) secure: SocketAddr,
    pub(crate) tls: Arc<rustls::ClientConfig>,
    pub(crate) until: Instant,
    pub(crate) counts: Arc<Counts>,
}

impl Target {
    async fn handshake(&self) -> anyhow::Result<TlsStream<TcpStream>> {
        let stream = TcpStream::connect(self.secure).await?;
        let name = ServerName::try_from("gate.example")?;
        let connected = TlsConnector::from(self.tls.clone()).connect(name, stream);
        tokio::time::timeout(PATIENCE, connected)
            .await
            .context("a handshake that does not end")?
            .context("a handshake")
    }
}

const PATHS: [&str; 8] = ["/1", "/2", "/1/large", "/3", "/2/large", "/1/x", "/t", "/2/x"];

fn request(path: &str, round: u32, authority: &str) -> anyhow::Result<Request<Full<Bytes>>> {
    let body = if round.is_multiple_of(5) {
        Bytes::from(vec![b'b'; 20_000])
    } else {
        Bytes::new()
    };
    let method = if body.is_empty() { Method::GET } else { Method::PUT };
    let mut request = Request::builder().method(method);
    request = if authority.is_empty() {
        request.uri(path).header("host", "a")
    } else {
        request.uri(format!("{authority}{path}"))
    };
    Ok(request.body(Full::new(body))?)
}

/// Runs to the end of the time.
pub(crate) async fn client(number: u32, target: Target) -> anyhow::Result<()> {
    let mut round = number;
    while Instant::now() < target.until {
        round = round.wrapping_add(101);
        let once = async {
            match number % 7 {
                0 => kept(&target, round, 40).await,
                1 => kept(&target, round, 1).await,
                2 => {
                    let stream = TcpStream::connect(target.plain).await?;
                    streams(&target, round, TokioIo::new(stream), "http://a").await
                }
                3 => {
                    streams(
                        &target,
                        round,
                        TokioIo::new(target.handshake().await?),
                        "https://a",
                    )
                    .await
                }
                4 => gone(&target, round).await,
                5 => gone_over_tls(&target, round).await,
                _ => slow(&target, round).await,
            }
        };
        tokio::time::timeout(PATIENCE * 2, once)
            .await
            .with_context(|| format!("client {number} hangs"))??;
    }
    Ok(())
}

/// HTTP/1 in one connection.
async fn kept(target: &Target, round: u32, requests: u32) -> anyhow::Result<()> {
    let stream = TcpStream::connect(target.plain).await?;
    let (mut sender, connection) = http1::handshake(TokioIo::new(stream)).await?;
    let task = tokio::spawn(connection);
    let mut before = String::from(", the first of its connection,");
    for index in 0..requests {
        let round = round.wrapping_add(index);
        let path = PATHS[round as usize % PATHS.len()];
        // A connection that the proxy ends after an answer that broke off.
        if sender.ready().await.is_err() {
            break;
        }
        let sent = whole(sender.try_send_request(request(path, round, "")?)).await;
        let next = match &sent {
            Ok(status) => format!(", after {index} others, the last of them {path} with {status},"),
            Err(_) => String::new(),
        };
        if !target.counts.note(path, &before, sent) {
            break;
        }
        before = next;
    }
    task.abort();
    Ok(())
}

/// HTTP/2 in one connection, eight streams at a time, every ninth of which is cancelled.
async fn streams<S>(target: &Target, round: u32, io: TokioIo<S>, authority: &str) -> anyhow::Result<()>
where
    S: tokio::io::AsyncRead + tokio::io::AsyncWrite + Unpin + Send + 'static,
{
    let (sender, connection) = http2::handshake(TokioExecutor::new(), io).await?;
    let task = tokio::spawn(connection);
    for batch in 0..6 {
        let asked = (0..8).map(|index| {
            let round = round.wrapping_add(batch * 8 + index);
            let mut sender = sender.clone();
            async move {
                let path = PATHS[round as usize % PATHS.len()];
                let sent = sender.try_send_request(request(path, round, authority)?);
                if round.is_multiple_of(9) {
                    tokio::select! {
                        biased;
                        _ = sent => {}
                        () = tokio::task::yield_now() => {}
                    }
                    add(&target.counts.left);
                    return anyhow::Ok(true);
                }
                Ok(target.counts.note(path, " over HTTP/2", whole(sent).await))
            }
        });
        let mut good = true;
        for done in futures::future::join_all(asked).await {
            good &= done?;
        }
        if !good {
            break;
        }
    }
    drop(sender);
    task.abort();
    Ok(())
}

/// Gone at some point of a request over HTTP/1 or HTTP/2, with or without a word.
async fn gone(target: &Target, round: u32) -> anyhow::Result<()> {
    const HTTP1: &[u8] =
        b"PUT /1 HTTP/1.1\r\nhost: a\r\ncontent-length: 30\r\n\r\nthis is not the whole body";
    const HTTP2: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0\0\0\x08\x01\x05\0\0\0\x01\x82\x84\x86\x41\x81\x1f\0\0";
    let bytes = if round.is_multiple_of(2) { HTTP1 } else { HTTP2 };
    let mut stream = TcpStream::connect(target.plain).await?;
    let cut = round as usize / 2 % (bytes.len() + 1);
    stream.write_all(&bytes[..cut]).await?;
    if round.is_multiple_of(3) {
        // So that it is seen before it is gone.
        tokio::time::sleep(std::time::Duration::from_millis(2)).await;
        socket2::SockRef::from(&stream).set_linger(Some(std::time::Duration::ZERO))?;
    }
    add(&target.counts.left);
    Ok(())
}

/// Gone in the middle of a handshake, or after it.
async fn gone_over_tls(target: &Target, round: u32) -> anyhow::Result<()> {
    if round.is_multiple_of(2) {
        let name = ServerName::try_from("gate.example")?;
        let mut hello = Vec::new();
        rustls::ClientConnection::new(target.tls.clone(), name)?.write_tls(&mut hello)?;
        let cut = round as usize % (hello.len() + 1);
        let mut stream = TcpStream::connect(target.secure).await?;
        stream.write_all(&hello[..cut]).await?;
    } else {
        let mut stream = target.handshake().await?;
        stream.write_all(b"PRI * HTTP/2.0\r\n").await?;
    }
    add(&target.counts.left);
    Ok(())
}

/// Reads a large answer slowly, and not to its end.
async fn slow(target: &Target, round: u32) -> anyhow::Result<()> {
    let mut stream = TcpStream::connect(target.plain).await?;
    stream
        .write_all(b"GET /2/large HTTP/1.1\r\nhost: a\r\n\r\n")
        .await?;
    let mut chunk = [0; 1024];
    for _ in 0..round % 30 {
        if stream.read(&mut chunk).await? == 0 {
            break;
        }
        tokio::time::sleep(std::time::Duration::from_millis(2)).await;
    }
    add(&target.counts.left);
    Ok(())
}
