//! Reading the first bytes of a connection: as few as say what it is, each within its time.

use std::io;
use std::net::SocketAddr;
use std::time::Duration;

use tokio::io::AsyncReadExt as _;
use tokio::net::TcpStream;
use tokio::time::Instant;

use crate::config::listener_filters::ProxyProtocol;
use crate::policy::metadata::Metadata;
use crate::upstream::proxy_header::{self, Header};
use crate::worker::Worker;
use crate::worker::io::Io;
use crate::worker::sniff::{self, Detected};

/// Bytes read at a time.
const CHUNK: usize = 2048;

/// Reads until the bytes say what they are; `Ok(None)` when the time is over, an error when the client is gone.
pub(super) async fn read_until_detected(
    stream: &TcpStream,
    prefix: &mut Vec<u8>,
    deadline: Instant,
) -> io::Result<Option<Detected>> {
    loop {
        if let Some(detected) = sniff::detect(prefix) {
            return Ok(Some(detected));
        }
        if prefix.len() >= sniff::MAX_BYTES {
            return Ok(Some(Detected::default()));
        }
        match tokio::time::timeout_at(deadline, read_more(stream, prefix)).await {
            Ok(result) => result?,
            Err(_) => return Ok(None),
        }
    }
}

/// Reads a PROXY protocol header and leaves what follows it; the addresses in it, if it has any. What its rules say of its
/// values by type is noted.
pub(super) async fn read_proxy_header(
    stream: &TcpStream,
    prefix: &mut Vec<u8>,
    rules: &ProxyProtocol,
    noted: &mut Metadata,
    deadline: Instant,
) -> io::Result<Option<(SocketAddr, SocketAddr)>> {
    let bad = |reason| io::Error::new(io::ErrorKind::InvalidData, reason);
    loop {
        match proxy_header::read(prefix) {
            Header::Present {
                version,
                length,
                tlvs,
                between,
            } => {
                if !rules.allows(version) {
                    return Err(bad("PROXY protocol: this version is not allowed"));
                }
                let tlvs = proxy_header::read_tlvs(&prefix[tlvs..length])
                    .ok_or_else(|| bad("PROXY protocol: malformed TLVs"))?;
                rules.keep(&tlvs, noted);
                prefix.drain(..length);
                return Ok(between);
            }
            Header::Absent if rules.optional => return Ok(None),
            Header::Absent | Header::Malformed => return Err(bad("PROXY protocol: no header")),
            Header::Incomplete => {}
        }
        match tokio::time::timeout_at(deadline, read_more(stream, prefix)).await {
            Ok(result) => result?,
            // Whoever need not send a header may also be waiting for the server to speak.
            Err(_) if rules.optional => return Ok(None),
            Err(_) => return Err(io::Error::new(io::ErrorKind::TimedOut, "PROXY protocol: timeout")),
        }
    }
}

/// Reads until the bytes are an HTTP/2 preface or cannot become one, or have been neither for as long as the head of a
/// request may take. Ends with an error at the end of the stream or when the worker closes its idle connections.
pub(super) async fn read_preface(
    io: &mut Io,
    prefix: &mut Vec<u8>,
    worker: &Worker,
    limit: Option<Duration>,
) -> io::Result<()> {
    const START: &[u8] = b"PRI * HTTP/2";
    let mut deadline = None;
    while prefix.len() < START.len() && START.starts_with(prefix) {
        let more = async {
            match &mut *io {
                Io::Plain(stream) => read_more(stream.below(), prefix).await,
                Io::Tls(stream) => {
                    prefix.reserve(CHUNK);
                    match stream.read_buf(prefix).await? {
                        0 => Err(io::ErrorKind::UnexpectedEof.into()),
                        _ => Ok(()),
                    }
                }
            }
        };
        let late = async {
            match deadline {
                Some(deadline) => tokio::time::sleep_until(deadline).await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            result = more => result?,
            () = worker.closing() => return Err(io::ErrorKind::ConnectionAborted.into()),
            () = late => return Ok(()),
        }
        deadline = deadline.or_else(|| Some(Instant::now() + limit?));
    }
    Ok(())
}

/// Reads what there is, once. The buffer is only as large as what came, for the sake of idle connections.
async fn read_more(stream: &TcpStream, prefix: &mut Vec<u8>) -> io::Result<()> {
    loop {
        stream.readable().await?;
        let mut chunk = [0u8; CHUNK];
        match stream.try_read(&mut chunk) {
            Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
            Ok(count) => {
                prefix.extend_from_slice(&chunk[..count]);
                return Ok(());
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            Err(error) => return Err(error),
        }
    }
}
