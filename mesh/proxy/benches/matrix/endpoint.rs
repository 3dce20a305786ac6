//! The backend of every row: HTTP/1.1 and HTTP/2 by prior knowledge, in the clear and over mutual TLS, and unary gRPC calls.
//!
//! It answers what the benchmark asks and nothing else, since what an endpoint costs is taken from the processor that it shares
//! with the load: with a whole web server there the proxies that are faster than it idle, find fewer requests each time that
//! they wake, and seem dearer for each than they are. Requests are not looked into beyond their path (HTTP/1.1) and their end.

use std::collections::VecDeque;
use std::io;
use std::path::Path;
use std::sync::{Arc, LazyLock};

use mio::net::TcpListener;
use mio::{Interest, Registry, Token};
use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::server::WebPkiClientVerifier;
use rustls::{RootCertStore, ServerConfig, ServerConnection};

use crate::socket::{
    ACK, DATA, END_HEADERS, END_STREAM, Frame, HEADERS, PING, PREFACE, SETTINGS, Socket, WINDOW_UPDATE, frame,
};

/// The first token of connections; before it are those of the listening sockets.
const CONNECTIONS: usize = 1_000;
/// The body of most answers.
const BODY: usize = 100;
/// The largest body.
const LARGE: usize = 1 << 20;
static LARGEST: LazyLock<Vec<u8>> = LazyLock::new(|| b"0123456789".repeat(LARGE / 10 + 1));
/// What an HTTP/2 peer may be sent before it says anything about it (RFC 9113 section 6.9.2).
const WINDOW: i64 = 65_535;
/// Body bytes after which the window of a connection is given back.
const GIVE_BACK: u32 = 16 << 10;

/// Ports of a backend.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Ports {
    /// HTTP/1.1 and HTTP/2 in the clear.
    pub(crate) plain: u16,
    pub(crate) grpc: u16,
    /// HTTP/1.1 and HTTP/2 over mutual TLS.
    pub(crate) secure: u16,
    pub(crate) secure2: u16,
}

impl Ports {
    /// As arguments of a program.
    pub(crate) fn arguments(&self) -> [String; 4] {
        [self.plain, self.grpc, self.secure, self.secure2].map(|port| port.to_string())
    }

    pub(crate) fn parse(arguments: &[&str]) -> anyhow::Result<Self> {
        let [plain, grpc, secure, secure2] = arguments else {
            anyhow::bail!("endpoint PLAIN GRPC SECURE SECURE2 FOLDER");
        };
        Ok(Self {
            plain: plain.parse()?,
            grpc: grpc.parse()?,
            secure: secure.parse()?,
            secure2: secure2.parse()?,
        })
    }
}

struct Listening {
    socket: TcpListener,
    tls: Option<Arc<ServerConfig>>,
    grpc: bool,
}

/// See the module.
pub(crate) struct Endpoint {
    listening: Vec<Listening>,
    connections: Vec<Option<Served>>,
    free: Vec<usize>,
}

impl Endpoint {
    /// `folder` has the certificates.
    pub(crate) fn open(ports: Ports, folder: &Path, registry: &Registry) -> anyhow::Result<Self> {
        let http1 = Arc::new(tls(folder, b"http/1.1")?);
        let http2 = Arc::new(tls(folder, b"h2")?);
        let mut listening = Vec::new();
        for (port, tls, grpc) in [
            (ports.plain, None, false),
            (ports.grpc, None, true),
            (ports.secure, Some(http1), false),
            (ports.secure2, Some(http2), false),
        ] {
            let mut socket = TcpListener::bind(([127, 0, 0, 1], port).into())?;
            registry.register(&mut socket, Token(listening.len()), Interest::READABLE)?;
            listening.push(Listening { socket, tls, grpc });
        }
        Ok(Self {
            listening,
            connections: Vec::new(),
            free: Vec::new(),
        })
    }

    /// Does what there is to do for `token`, if it is one of its own.
    pub(crate) fn ready(&mut self, token: Token, registry: &Registry) -> anyhow::Result<()> {
        match token.0.checked_sub(CONNECTIONS) {
            None => self.accept(token.0, registry),
            Some(index) => {
                let Some(served) = self.connections.get_mut(index) else {
                    return Ok(());
                };
                // Who breaks off is gone; whether that was right is for whoever counts the answers.
                if served.as_mut().is_some_and(|served| served.serve().is_err()) {
                    *served = None;
                    self.free.push(index);
                }
                Ok(())
            }
        }
    }

    fn accept(&mut self, index: usize, registry: &Registry) -> anyhow::Result<()> {
        let Some(listening) = self.listening.get(index) else {
            return Ok(());
        };
        loop {
            let stream = match listening.socket.accept() {
                Ok((stream, _)) => stream,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(()),
                Err(error) => return Err(error.into()),
            };
            let mut tls = listening.tls.clone().map(ServerConnection::new).transpose()?;
            if let Some(tls) = &mut tls {
                // It takes the largest answer whole.
                tls.set_buffer_limit(None);
            }
            let slot = self.free.pop().unwrap_or_else(|| {
                self.connections.push(None);
                self.connections.len() - 1
            });
            let socket = Socket::new(stream, registry, Token(CONNECTIONS + slot), tls)?;
            self.connections[slot] = Some(Served::new(socket, listening.grpc));
        }
    }
}

fn tls(folder: &Path, protocol: &[u8]) -> anyhow::Result<ServerConfig> {
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let mut roots = RootCertStore::empty();
    for root in CertificateDer::pem_file_iter(folder.join("root.pem"))? {
        roots.add(root?)?;
    }
    let verifier = WebPkiClientVerifier::builder_with_provider(Arc::new(roots), provider.clone()).build()?;
    let chain = CertificateDer::pem_file_iter(folder.join("server.pem"))?.collect::<Result<Vec<_>, _>>()?;
    let key = PrivateKeyDer::from_pem_file(folder.join("server.key"))?;
    let mut config = ServerConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&rustls::version::TLS13])?
        .with_client_cert_verifier(verifier)
        .with_single_cert(chain, key)?;
    config.alpn_protocols = vec![protocol.to_vec()];
    Ok(config)
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Speaks {
    Unknown,
    Http1,
    Http2,
}

/// A connection that is served.
struct Served {
    socket: Socket,
    grpc: bool,
    speaks: Speaks,
    /// Body bytes that the HTTP/2 peer takes now.
    window: i64,
    /// Streams whose answers wait for the window.
    owed: VecDeque<u32>,
    /// Body bytes since the peer's window was given back.
    consumed: u32,
}

impl Served {
    fn new(socket: Socket, grpc: bool) -> Self {
        Self {
            socket,
            grpc,
            speaks: Speaks::Unknown,
            window: WINDOW,
            owed: VecDeque::new(),
            consumed: 0,
        }
    }

    fn serve(&mut self) -> io::Result<()> {
        let filled = self.socket.fill();
        if self.speaks == Speaks::Unknown {
            self.recognise();
        }
        match self.speaks {
            Speaks::Unknown => {}
            Speaks::Http1 => self.messages(),
            Speaks::Http2 => self.frames(),
        }
        self.socket.flush()?;
        filled.map(drop)
    }

    fn recognise(&mut self) {
        let read = &mut self.socket.read;
        if read.starts_with(PREFACE) {
            read.drain(..PREFACE.len());
            self.speaks = Speaks::Http2;
            // MAX_CONCURRENT_STREAMS.
            frame(&mut self.socket.write, SETTINGS, 0, 0, &[0, 3, 0, 0, 3, 232]);
        } else if !PREFACE.starts_with(read) {
            self.speaks = Speaks::Http1;
        }
    }

    fn messages(&mut self) {
        let Socket { read, write, .. } = &mut self.socket;
        let mut at = 0;
        while let Some(end) = read[at..].windows(4).position(|four| four == b"\r\n\r\n") {
            let head = &read[at..at + end];
            let length = match head {
                [b'G', b'E', b'T', b' ', b'/', b'1', b'0', b'k', b' ', ..] => 10 << 10,
                [b'G', b'E', b'T', b' ', b'/', b'1', b'm', b' ', ..] => LARGE,
                _ => BODY,
            };
            write.extend_from_slice(
                b"HTTP/1.1 200 OK\r\nserver: endpoint\r\ndate: Sun, 22 Nov 2026 07:00:00 GMT\r\ncontent-type: text/plain\r\ncontent-length: ",
            );
            write.extend_from_slice(length.to_string().as_bytes());
            write.extend_from_slice(b"\r\n\r\n");
            write.extend_from_slice(&LARGEST[..length]);
            at += end + 4;
        }
        read.drain(..at);
    }

    fn frames(&mut self) {
        let Socket { read, write, .. } = &mut self.socket;
        let mut at = 0;
        while let Some((got, length)) = Frame::first(&read[at..]) {
            match got.kind {
                SETTINGS if !got.acknowledges() => frame(write, SETTINGS, ACK, 0, &[]),
                PING if !got.acknowledges() => frame(write, PING, ACK, 0, got.payload),
                WINDOW_UPDATE if got.stream == 0 => {
                    let more = got.payload.try_into().map_or(0, u32::from_be_bytes);
                    self.window += i64::from(more);
                }
                DATA => self.consumed += got.payload.len() as u32,
                _ => {}
            }
            if got.ends() {
                self.owed.push_back(got.stream);
            }
            at += length;
        }
        read.drain(..at);
        if self.consumed > GIVE_BACK {
            frame(write, WINDOW_UPDATE, 0, 0, &self.consumed.to_be_bytes());
            self.consumed = 0;
        }
        while self.window >= (BODY + 5) as i64 {
            let Some(stream) = self.owed.pop_front() else {
                return;
            };
            self.window -= answer(write, stream, self.grpc) as i64;
        }
    }
}

/// Fields of HTTP/2 answers, none of them for the dynamic table: `:status: 200` as the static table has it (8), then names of
/// the static table with their values.
fn block(fields: &[(u8, &str)]) -> Vec<u8> {
    let mut out = vec![0x88];
    for (name, value) in fields {
        // A literal without indexing, its name by number (RFC 7541 section 6.2.2).
        out.extend_from_slice(&[0x0f, name - 15, value.len() as u8]);
        out.extend_from_slice(value.as_bytes());
    }
    out
}

/// Adds an answer; how long its body is.
fn answer(out: &mut Vec<u8>, stream: u32, grpc: bool) -> usize {
    // `content-type` is the static table's 31st name, `content-length` its 28th, `date` its 33rd, `server` its 54th.
    const DATE: (u8, &str) = (33, "Sun, 22 Nov 2026 07:00:00 GMT");
    const SERVER: (u8, &str) = (54, "endpoint");
    if grpc {
        let head = block(&[SERVER, DATE, (31, "application/grpc")]);
        frame(out, HEADERS, END_HEADERS, stream, &head);
        let mut message = [b'x'; 5 + BODY];
        message[..5].copy_from_slice(&[0, 0, 0, 0, BODY as u8]);
        frame(out, DATA, 0, stream, &message);
        // `grpc-status: 0`, its name in full.
        frame(
            out,
            HEADERS,
            END_HEADERS | END_STREAM,
            stream,
            b"\x00\x0bgrpc-status\x010",
        );
        return message.len();
    }
    let head = block(&[SERVER, DATE, (31, "text/plain"), (28, "100")]);
    frame(out, HEADERS, END_HEADERS, stream, &head);
    frame(out, DATA, END_STREAM, stream, &[b'x'; BODY]);
    BODY
}
