//! A client that writes bytes and reads what comes back, exactly.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::TcpStream;

use crate::tls::handshake;

/// A request.
#[derive(Clone, Debug)]
pub(crate) struct Ask {
    /// Unique, in the field `x-case`.
    pub(crate) case: String,
    pub(crate) method: &'static str,
    pub(crate) target: String,
    /// Fields in their order, with `host` and `x-case`.
    pub(crate) fields: Vec<(String, String)>,
    pub(crate) body: String,
    /// Which of the setup's clients asks, where there are several.
    pub(crate) who: usize,
}

impl Ask {
    pub(crate) fn bytes(&self) -> Vec<u8> {
        let mut out = format!("{} {} HTTP/1.1\r\n", self.method, self.target);
        for (name, value) in &self.fields {
            out.push_str(&format!("{name}: {value}\r\n"));
        }
        if !self.body.is_empty() {
            out.push_str(&format!("content-length: {}\r\n", self.body.len()));
        }
        out.push_str("\r\n");
        out.push_str(&self.body);
        out.into_bytes()
    }
}

/// An answer.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Answer {
    /// 0 where the connection ended instead.
    pub(crate) status: u16,
    pub(crate) headers: BTreeMap<String, Vec<String>>,
    pub(crate) body: String,
    /// Bytes of the body as they came.
    pub(crate) length: usize,
}

/// Who asks over TLS.
#[derive(Clone)]
pub(crate) struct Who {
    pub(crate) config: Arc<rustls::ClientConfig>,
    pub(crate) server_name: &'static str,
}

trait Both: AsyncRead + AsyncWrite + Unpin + Send {}

impl<T: AsyncRead + AsyncWrite + Unpin + Send> Both for T {}

type Stream = Box<dyn Both>;

/// One connection after another to one proxy.
pub(crate) struct Client {
    at: SocketAddr,
    /// Nobody where there is no TLS.
    people: Vec<Who>,
    /// A connection, and whose it is.
    stream: Option<(Stream, usize)>,
}

impl Client {
    pub(crate) fn new(at: SocketAddr) -> Self {
        Self::of(at, &[])
    }

    pub(crate) fn of(at: SocketAddr, people: &[Who]) -> Self {
        Self {
            at,
            people: people.to_vec(),
            stream: None,
        }
    }

    async fn connect(&self, who: usize) -> Option<Stream> {
        let Some(who) = self.people.get(who) else {
            return Some(Box::new(TcpStream::connect(self.at).await.ok()?));
        };
        let stream = handshake(self.at, &who.config, who.server_name).await.ok()?;
        Some(Box::new(stream))
    }

    pub(crate) async fn ask(&mut self, ask: &Ask) -> Answer {
        self.stream = self.stream.take().filter(|(_, whose)| *whose == ask.who);
        let again = self.stream.is_some();
        match tokio::time::timeout(Duration::from_secs(10), self.once(ask)).await {
            Ok(Some(answer)) => answer,
            // The connection had ended since the last answer.
            Ok(None) if again => {
                self.stream = None;
                self.once(ask).await.unwrap_or_default()
            }
            _ => {
                self.stream = None;
                Answer::default()
            }
        }
    }

    async fn once(&mut self, ask: &Ask) -> Option<Answer> {
        let mut stream = match self.stream.take() {
            Some((stream, _)) => stream,
            None => self.connect(ask.who).await?,
        };
        stream.write_all(&ask.bytes()).await.ok()?;
        let mut raw = Vec::new();
        let end = loop {
            if let Some(at) = raw.windows(4).position(|bytes| bytes == b"\r\n\r\n") {
                if raw.starts_with(b"HTTP/1.1 100") {
                    raw.drain(..at + 4);
                    continue;
                }
                break at;
            }
            more(&mut stream, &mut raw).await?;
        };
        let head = String::from_utf8_lossy(&raw[..end]).into_owned();
        let status: u16 = head.get(9..12)?.parse().ok()?;
        let mut headers: BTreeMap<String, Vec<String>> = BTreeMap::new();
        for line in head.split("\r\n").skip(1) {
            let (name, value) = line.split_once(':')?;
            headers
                .entry(name.to_ascii_lowercase())
                .or_default()
                .push(value.trim().to_owned());
        }
        let first = |name: &str| headers.get(name).map(|values| values[0].clone());
        let mut rest = raw.split_off(end + 4);
        let mut keep = first("connection").as_deref() != Some("close");
        let body = if ask.method == "HEAD" || status == 204 || status == 304 {
            Vec::new()
        } else if first("transfer-encoding").as_deref() == Some("chunked") {
            chunked(&mut stream, &mut rest).await?
        } else if let Some(length) = first("content-length").and_then(|text| text.parse::<usize>().ok()) {
            while rest.len() < length {
                more(&mut stream, &mut rest).await?;
            }
            rest.truncate(length);
            rest
        } else {
            keep = false;
            while more(&mut stream, &mut rest).await.is_some() {}
            rest
        };
        if keep {
            self.stream = Some((stream, ask.who));
        }
        Some(Answer {
            status,
            headers,
            length: body.len(),
            body: String::from_utf8_lossy(&body).into_owned(),
        })
    }
}

async fn more(stream: &mut Stream, raw: &mut Vec<u8>) -> Option<()> {
    match stream.read_buf(raw).await {
        Ok(count) if count > 0 => Some(()),
        _ => None,
    }
}

async fn chunked(stream: &mut Stream, rest: &mut Vec<u8>) -> Option<Vec<u8>> {
    let mut out = Vec::new();
    loop {
        let end = loop {
            match rest.windows(2).position(|bytes| bytes == b"\r\n") {
                Some(at) => break at,
                None => more(stream, rest).await?,
            }
        };
        let size = usize::from_str_radix(std::str::from_utf8(&rest[..end]).ok()?, 16).ok()?;
        while rest.len() < end + 2 + size + 2 {
            more(stream, rest).await?;
        }
        out.extend_from_slice(&rest[end + 2..end + 2 + size]);
        rest.drain(..end + 4 + size);
        if size == 0 {
            return Some(out);
        }
    }
}
