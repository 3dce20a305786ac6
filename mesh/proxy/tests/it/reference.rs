//! A server that reads HTTP/1.1 by the letter of RFC 9112 and nothing else, and remembers every request: what a test holds
//! other readings against. It shares no code with the proxy and panics nowhere: what it cannot read it says.

use std::net::SocketAddr;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::mpsc;

/// A request as it was understood.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Message {
    pub(crate) method: String,
    pub(crate) target: String,
    /// Names in lower case, in order.
    pub(crate) fields: Vec<(String, Vec<u8>)>,
    pub(crate) body: Vec<u8>,
}

impl Message {
    pub(crate) fn values(&self, name: &str) -> Vec<&[u8]> {
        self.fields
            .iter()
            .filter(|(known, _)| known == name)
            .map(|(_, value)| &**value)
            .collect()
    }
}

/// Why bytes are no request.
pub(crate) type Malformed = String;

/// The server.
pub(crate) struct Reference {
    pub(crate) address: SocketAddr,
    pub(crate) seen: mpsc::UnboundedReceiver<Result<Message, Malformed>>,
    task: tokio::task::JoinHandle<()>,
}

impl Drop for Reference {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl Reference {
    pub(crate) async fn start() -> Self {
        let socket = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = socket.local_addr().unwrap();
        let (sender, seen) = mpsc::unbounded_channel();
        let task = tokio::spawn(async move {
            let mut connections = tokio::task::JoinSet::new();
            while let Ok((stream, _)) = socket.accept().await {
                connections.spawn(serve(stream, sender.clone()));
            }
        });
        Self { address, seen, task }
    }

    /// Every request up to the one for `target`, which is not among them.
    pub(crate) async fn until(&mut self, target: &str) -> Vec<Result<Message, Malformed>> {
        let mut out = Vec::new();
        loop {
            match self.seen.recv().await {
                Some(Ok(message)) if message.target == target => return out,
                Some(other) => out.push(other),
                None => return out,
            }
        }
    }
}

async fn serve(mut stream: TcpStream, seen: mpsc::UnboundedSender<Result<Message, Malformed>>) {
    let mut bytes = Vec::new();
    loop {
        match read(&bytes) {
            Ok(Some((message, used))) => {
                bytes.drain(..used);
                let body = if message.method == "HEAD" { "" } else { "ok" };
                let close = message
                    .values("connection")
                    .iter()
                    .any(|value| value.eq_ignore_ascii_case(b"close"));
                let _ = seen.send(Ok(message));
                let answer = format!("HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\n{body}");
                if stream.write_all(answer.as_bytes()).await.is_err() || close {
                    return;
                }
            }
            // A request that is broken off has not been made.
            Ok(None) => match stream.read_buf(&mut bytes).await {
                Ok(count) if count > 0 => {}
                _ => return,
            },
            Err(why) => {
                let _ = seen.send(Err(why));
                return;
            }
        }
    }
}

/// The first request in `bytes` and its length; nothing if it is not whole yet.
pub(crate) fn read(bytes: &[u8]) -> Result<Option<(Message, usize)>, Malformed> {
    let Some(end) = find(bytes, b"\r\n\r\n") else {
        return Ok(None);
    };
    let bad = |what: &str| Err(format!("{what} in {:?}", String::from_utf8_lossy(&bytes[..end])));
    let mut lines = split(&bytes[..end + 2]);
    let Some(first) = lines.next() else {
        return bad("no request line");
    };
    let parts: Vec<&[u8]> = first.split(|byte| *byte == b' ').collect();
    let [method, target, version] = parts.as_slice() else {
        return bad("not three parts in the request line");
    };
    if !token(method) {
        return bad("a method that is no token");
    }
    if target.is_empty() || !target.iter().all(u8::is_ascii_graphic) {
        return bad("a target with other bytes than visible ones");
    }
    if *version != b"HTTP/1.1" && *version != b"HTTP/1.0" {
        return bad("a version");
    }
    let mut fields = Vec::new();
    for line in lines {
        let Some(colon) = line.iter().position(|byte| *byte == b':') else {
            return bad("a line without a colon");
        };
        let (name, value) = (&line[..colon], line[colon + 1..].trim_ascii());
        if !token(name) {
            return bad("a name that is no token");
        }
        if value
            .iter()
            .any(|byte| (*byte < b' ' && *byte != b'\t') || *byte == 0x7f)
        {
            return bad("a control character in a value");
        }
        fields.push((String::from_utf8_lossy(name).to_ascii_lowercase(), value.to_vec()));
    }
    let values = |wanted: &str| -> Vec<&[u8]> {
        fields
            .iter()
            .filter(|(name, _)| name == wanted)
            .map(|(_, value)| &**value)
            .collect()
    };
    let (lengths, codings) = (values("content-length"), values("transfer-encoding"));
    let (body, used) = match (lengths.as_slice(), codings.as_slice()) {
        ([], []) => (Vec::new(), 0),
        ([length], []) => {
            if length.is_empty() || !length.iter().all(u8::is_ascii_digit) {
                return bad("a content-length that is no number");
            }
            let Ok(length) = String::from_utf8_lossy(length).parse::<usize>() else {
                return bad("a content-length beyond numbers");
            };
            match bytes.get(end + 4..end + 4 + length) {
                Some(body) => (body.to_vec(), length),
                None => return Ok(None),
            }
        }
        ([], [coding]) if coding.eq_ignore_ascii_case(b"chunked") => match chunks(&bytes[end + 4..])? {
            Some(whole) => whole,
            None => return Ok(None),
        },
        _ => return bad("a framing that could be read in two ways"),
    };
    let message = Message {
        method: String::from_utf8_lossy(method).into_owned(),
        target: String::from_utf8_lossy(target).into_owned(),
        fields,
        body,
    };
    Ok(Some((message, end + 4 + used)))
}

fn chunks(bytes: &[u8]) -> Result<Option<(Vec<u8>, usize)>, Malformed> {
    let (mut body, mut at) = (Vec::new(), 0);
    loop {
        let Some(line) = find(&bytes[at..], b"\r\n") else {
            return Ok(None);
        };
        let size = &bytes[at..at + line];
        let digits = size.split(|byte| *byte == b';').next().unwrap_or_default();
        if digits.is_empty() || digits.len() > 8 || !digits.iter().all(u8::is_ascii_hexdigit) {
            return Err(format!("a chunk size {:?}", String::from_utf8_lossy(size)));
        }
        let size = usize::from_str_radix(&String::from_utf8_lossy(digits), 16).unwrap_or(usize::MAX);
        at += line + 2;
        if size == 0 {
            // Trailers, to the empty line.
            loop {
                let Some(line) = find(&bytes[at..], b"\r\n") else {
                    return Ok(None);
                };
                at += line + 2;
                if line == 0 {
                    return Ok(Some((body, at)));
                }
            }
        }
        let Some(data) = bytes.get(at..at + size + 2) else {
            return Ok(None);
        };
        if !data.ends_with(b"\r\n") {
            return Err("a chunk that does not end where it says".into());
        }
        body.extend_from_slice(&data[..size]);
        at += size + 2;
    }
}

fn token(bytes: &[u8]) -> bool {
    !bytes.is_empty()
        && bytes
            .iter()
            .all(|byte| byte.is_ascii_alphanumeric() || b"!#$%&'*+-.^_`|~".contains(byte))
}

fn find(bytes: &[u8], what: &[u8]) -> Option<usize> {
    bytes.windows(what.len()).position(|window| window == what)
}

/// Lines that end in CRLF, without it.
fn split(mut bytes: &[u8]) -> impl Iterator<Item = &[u8]> {
    std::iter::from_fn(move || {
        let end = find(bytes, b"\r\n")?;
        let line = &bytes[..end];
        bytes = &bytes[end + 2..];
        Some(line)
    })
}

#[test]
fn the_reference_reads_requests_by_the_letter() {
    let (message, used) = read(b"POST /x HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n3;e=1\r\nabc\r\n0\r\nT: v\r\n\r\nGET")
        .unwrap()
        .unwrap();
    assert_eq!(
        (&*message.method, &*message.target, &*message.body),
        ("POST", "/x", &b"abc"[..])
    );
    assert_eq!(used, 80);
    assert_eq!(read(b"GET / HTTP/1.1\r\nHost: a\r\n").unwrap(), None);
    assert_eq!(
        read(b"POST / HTTP/1.1\r\nContent-Length: 4\r\n\r\nabc").unwrap(),
        None
    );
    for bad in [
        &b"GET / HTTP/1.1\nHost: a\r\n\r\n"[..],
        b"GET / HTTP/2.0\r\n\r\n",
        b"GET  / HTTP/1.1\r\n\r\n",
        b"GET / HTTP/1.1\r\nA : b\r\n\r\n",
        b"GET / HTTP/1.1\r\nA: b\x01\r\n\r\n",
        b"POST / HTTP/1.1\r\nContent-Length: 1\r\nTransfer-Encoding: chunked\r\n\r\n",
        b"POST / HTTP/1.1\r\nContent-Length: +1\r\n\r\n",
        b"POST / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n0x1\r\na\r\n0\r\n\r\n",
    ] {
        assert!(read(bad).is_err(), "{:?}", String::from_utf8_lossy(bad));
    }
}
