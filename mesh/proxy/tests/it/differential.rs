//! What we forward is understood alike by whoever is behind us: nginx, HAProxy and lighttpd, each between us and a
//! reference server that writes down what reaches it, must pass on exactly the requests that the reference server reads
//! from our own bytes: the same method, target, fields and body, and never one request more.
//!
//! Every input goes over connections that stay open between proxy and peer, and is followed by a request of another
//! client over the same ones: bytes left over from an attack would be its beginning.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::Stdio;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::process::{Child, Command};

use crate::fixture::*;
use crate::fuzz::Random;
use crate::matrix1;
use crate::reference::{Message, Reference};

/// Fields that belong to a hop, or that hops add about themselves.
const OF_THE_HOP: [&str; 16] = [
    "connection",
    "keep-alive",
    "proxy-connection",
    "transfer-encoding",
    "content-length",
    "upgrade",
    "te",
    "x-forwarded-for",
    "x-forwarded-host",
    "x-forwarded-proto",
    "x-forwarded-server",
    "x-host",
    // Made anew by each of our two proxies here.
    "x-request-id",
    "x-envoy-peer-metadata",
    "x-envoy-peer-metadata-id",
    "via",
];

fn program(name: &str) -> Option<PathBuf> {
    let found = std::env::split_paths(&std::env::var_os("PATH")?)
        .chain(["/usr/sbin", "/usr/local/sbin"].map(PathBuf::from))
        .map(|folder| folder.join(name))
        .find(|path| path.is_file());
    if found.is_none() {
        eprintln!("SKIPPED: {name} is not installed: what it makes of our requests is not compared");
    }
    found
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Peer {
    /// Nobody: our bytes reach the reference server.
    None,
    Nginx,
    HaProxy,
    Lighttpd,
}

impl Peer {
    fn command(self, config: &Path) -> Option<Command> {
        let (name, args): (_, &[&str]) = match self {
            Self::None => return None,
            Self::Nginx => ("nginx", &["-c"]),
            Self::HaProxy => ("haproxy", &["-db", "-f"]),
            Self::Lighttpd => ("lighttpd", &["-D", "-f"]),
        };
        let mut command = Command::new(program(name)?);
        command
            .args(args)
            .arg(config)
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .kill_on_drop(true);
        Some(command)
    }

    /// Listening on `listen`, in front of `to`. As little of their own tidying as they allow: it is their reading that
    /// counts.
    fn config(self, folder: &str, listen: SocketAddr, to: SocketAddr) -> String {
        let (listen, to, port) = (listen.port(), to.port(), to.port());
        match self {
            Self::None => String::new(),
            Self::Nginx => format!(
                "daemon off; master_process off; worker_processes 1; pid {folder}/pid; error_log {folder}/err;\n\
                 events {{ worker_connections 512; }}\n\
                 http {{ access_log off; underscores_in_headers on; ignore_invalid_headers off; merge_slashes off;\n\
                 client_header_buffer_size 128k; large_client_header_buffers 8 128k; client_max_body_size 0;\n\
                 client_body_temp_path {folder}/b; proxy_temp_path {folder}/p;\n\
                 fastcgi_temp_path {folder}/f; uwsgi_temp_path {folder}/u; scgi_temp_path {folder}/s;\n\
                 upstream u {{ server 127.0.0.1:{to}; keepalive 8; }}\n\
                 server {{ listen 127.0.0.1:{listen}; location / {{ proxy_pass http://u; proxy_http_version 1.1;\n\
                 proxy_set_header Host $http_host; proxy_set_header Connection \"\"; }} }} }}\n"
            ),
            Self::HaProxy => format!(
                "global\n  nbthread 1\n  tune.bufsize 131072\n  tune.http.maxhdr 512\n\
                 defaults\n  mode http\n  timeout connect 5s\n  timeout client 30s\n  timeout server 30s\n  http-reuse always\n\
                 frontend f\n  bind 127.0.0.1:{listen}\n  default_backend b\nbackend b\n  server s 127.0.0.1:{to}\n"
            ),
            Self::Lighttpd => format!(
                "server.document-root = \"{folder}\"\nserver.bind = \"127.0.0.1\"\nserver.port = {listen}\n\
                 server.modules = ( \"mod_proxy\" )\nserver.errorlog = \"{folder}/err\"\nserver.max-request-field-size = 131072\n\
                 server.http-parseopts = ( \"url-normalize\" => \"disable\", \"host-normalize\" => \"disable\" )\n\
                 proxy.server = ( \"\" => (( \"host\" => \"127.0.0.1\", \"port\" => {port} )) )\n"
            ),
        }
    }

    /// Why this peer refuses or changes what is no error, if it does.
    fn differs(self, message: &Message) -> Option<&'static str> {
        let host = message.values("host").concat();
        match self {
            Self::None => None,
            Self::Nginx if message.method == "TRACE" => Some("nginx refuses TRACE"),
            Self::Nginx
                if !message
                    .method
                    .bytes()
                    .all(|byte| byte.is_ascii_uppercase() || b"_-".contains(&byte)) =>
            {
                Some("nginx knows methods of upper case letters only")
            }
            Self::Nginx if message.target == "*" => Some("nginx refuses OPTIONS *"),
            Self::Nginx if false_escape(&message.target) => Some("nginx refuses a % without two digits"),
            Self::Lighttpd if !KNOWN_METHODS.contains(&&*message.method) => {
                Some("lighttpd refuses methods that it does not know")
            }
            Self::Lighttpd if message.target == "*" => Some("lighttpd sends OPTIONS * nowhere"),
            Self::Lighttpd if !strict_host(&host) => Some("lighttpd takes names and addresses only in Host"),
            Self::Lighttpd
                if matches!(&*message.method, "GET" | "HEAD")
                    && !(message.body.is_empty() && message.values("transfer-encoding").is_empty()) =>
            {
                Some("lighttpd refuses a body of GET or HEAD")
            }
            Self::Lighttpd
                if message.method == "POST"
                    && message.values("transfer-encoding").is_empty()
                    && message.values("content-length").is_empty() =>
            {
                Some("lighttpd wants the length of a POST, also of an empty one")
            }
            Self::Nginx | Self::HaProxy | Self::Lighttpd => None,
        }
    }
}

/// Of RFC 9110 and WebDAV: what lighttpd 1.4 proxies.
const KNOWN_METHODS: [&str; 10] = [
    "GET", "HEAD", "POST", "PUT", "DELETE", "OPTIONS", "PATCH", "PROPFIND", "REPORT", "TRACE",
];

/// A name or an address: what consists of digits and dots must be a whole IPv4 address.
fn strict_host(host: &[u8]) -> bool {
    let name = String::from_utf8_lossy(host);
    let numeric = name.bytes().all(|byte| byte.is_ascii_digit() || byte == b'.');
    (!numeric || name.parse::<std::net::Ipv4Addr>().is_ok())
        && host
            .iter()
            .all(|byte| byte.is_ascii_alphanumeric() || b".-:[]".contains(byte))
}

fn false_escape(target: &str) -> bool {
    let path = target.split('?').next().unwrap_or_default();
    path.split('%').skip(1).any(|rest| {
        let digits = rest.bytes().take(2).filter(u8::is_ascii_hexdigit).count();
        digits < 2
    })
}

/// A proxy of ours, perhaps a peer, and the reference server.
struct Chain {
    peer: Peer,
    at: SocketAddr,
    reference: Reference,
    _harness: Harness,
    _child: Option<Child>,
    _folder: tempfile::TempDir,
}

impl Chain {
    /// Nothing where the peer is not installed.
    async fn start(peer: Peer) -> Option<Self> {
        let folder = tempfile::tempdir().unwrap();
        let reference = Reference::start().await;
        let mut next = reference.address;
        let mut child = None;
        if peer != Peer::None {
            let config = folder.path().join("peer.conf");
            let listen = free_port().await;
            let text = peer.config(&folder.path().to_string_lossy(), listen, reference.address);
            std::fs::write(&config, text).unwrap();
            child = Some(peer.command(&config)?.spawn().unwrap());
            crate::interop::wait_for(listen).await;
            next = listen;
        }
        let harness = Harness::start();
        harness.cluster("c", &[next]).await;
        let at = harness.serve(vec![prefix_route("/", to_cluster("c"))]).await;
        Some(Self {
            peer,
            at,
            reference,
            _harness: harness,
            _child: child,
            _folder: folder,
        })
    }

    /// What reaches the reference server of one input.
    async fn understood(&mut self, number: usize, bytes: &[u8]) -> Vec<Result<Message, String>> {
        let answer = exchange(self.at, bytes).await;
        let mark = format!("/mark-{number}");
        let (status, ..) = get(self.at, &mark).await;
        assert_eq!(
            status,
            200,
            "{:?}: the request after {:?} must not suffer (it was answered {answer:?})",
            self.peer,
            String::from_utf8_lossy(bytes)
        );
        soon("the mark", self.reference.until(&mark)).await
    }
}

/// Sends bytes and reads to the end, however it comes: who refuses does not read the rest.
async fn exchange(at: SocketAddr, bytes: &[u8]) -> String {
    let mut stream = TcpStream::connect(at).await.unwrap();
    let _ = stream.write_all(bytes).await;
    let mut answer = Vec::new();
    let _ = soon("the end of the connection", stream.read_to_end(&mut answer)).await;
    String::from_utf8_lossy(&answer).into_owned()
}

/// What must be the same: no fields of a hop, and of the others the value of each name as RFC 9110 section 5.3 combines it
/// (cookies: RFC 9113 section 8.2.3). A field without a value says nothing, and hosts are the same in upper and lower
/// case, with or without the port that is understood (lighttpd tidies all that).
fn end_to_end(message: &Message) -> BTreeMap<String, Vec<u8>> {
    let mut fields: BTreeMap<String, Vec<u8>> = BTreeMap::new();
    for (name, value) in &message.fields {
        if OF_THE_HOP.contains(&name.as_str()) || value.is_empty() {
            continue;
        }
        let separator: &[u8] = if name == "cookie" { b"; " } else { b", " };
        let value = if name == "host" {
            let lower = value.to_ascii_lowercase();
            let bare = lower
                .strip_suffix(b":80")
                .or(lower.strip_suffix(b":"))
                .unwrap_or(&lower);
            bare.strip_suffix(b".").unwrap_or(bare).to_vec()
        } else {
            value.clone()
        };
        match fields.get_mut(name) {
            Some(before) => {
                before.extend_from_slice(separator);
                before.extend(value);
            }
            None => drop(fields.insert(name.clone(), value)),
        }
    }
    fields
}

/// A request on one line.
fn told(message: &Message) -> String {
    let text = |bytes: &[u8]| bytes[..bytes.len().min(60)].escape_ascii().to_string();
    let fields: Vec<_> = end_to_end(message)
        .iter()
        .take(12)
        .map(|(name, value)| format!("{name}: {}", text(value)))
        .collect();
    format!(
        "{} {} {fields:?} {} bytes {}",
        message.method,
        text(message.target.as_bytes()),
        message.body.len(),
        text(&message.body)
    )
}

const CLOSE: &str = "Connection: close\r\n";

/// Requests that are odd but right.
fn odd() -> Vec<Vec<u8>> {
    let mut out: Vec<Vec<u8>> = Vec::new();
    let targets = [
        "/",
        "//",
        "/a//b",
        "/a/./b",
        "/a/../b",
        "/a;x=1/b;y",
        "/~u",
        "/:80",
        "/a:b@c",
        "/%7Eu",
        "/%41",
        "/a%2Fb",
        "/a%5Cb",
        "/a%25b",
        "/a%20b",
        "/a+b",
        "/a,b",
        "/a'b",
        "/a(b)",
        "/a!b$c&d*e",
        "/?",
        "/??",
        "/?a=b?c",
        "/?%00",
        "/a?b=/../c",
        "/?q=http://x/",
        "/a=b",
        "/|",
        "/[a]",
        "/{a}",
        "/\"",
        "/<a>",
        "/^",
        "/`",
        "/a\\b",
        "http://other/abs?x",
        "http://other:81/",
        "http://other",
        "HTTP://OTHER/",
    ];
    for target in targets {
        out.push(format!("GET {target} HTTP/1.1\r\nHost: a\r\n{CLOSE}\r\n").into_bytes());
    }
    for method in [
        "GET", "HEAD", "POST", "PUT", "DELETE", "OPTIONS", "PATCH", "TRACE", "PROPFIND", "REPORT", "PURGE",
        "get", "M-SEARCH", "X!",
    ] {
        out.push(format!("{method} /m HTTP/1.1\r\nHost: a\r\n{CLOSE}\r\n").into_bytes());
    }
    for host in [
        "a",
        "A.Example",
        "a:80",
        "a:",
        "127.0.0.1",
        "[::1]",
        "[::1]:80",
        "a_b",
        "a.",
        "xn--nxasmq6b",
        "1.2.3",
        "a~b",
        "a%20b",
    ] {
        out.push(format!("GET /h HTTP/1.1\r\nHost: {host}\r\n{CLOSE}\r\n").into_bytes());
    }
    for field in [
        "X-Empty:",
        "X-Spaces:   a  b  ",
        "X-Tab:\ta\tb",
        "X_Under: 1",
        "X.Dot: 1",
        "!#$%&'*+-.^`|~: odd",
        "x-lower: 1",
        "1: digit",
        "Content-Type: text/plain; charset=\"a;b\"",
        "Content_Length: 5",
        "Content-Length-X: 5",
        "Transfer_Encoding: chunked",
        "Transfer-Encoding-X: chunked",
        "X-Content-Length: 5",
        "Range: bytes=0-1,2-3",
        "Expect: 100-continue",
        "Cookie: a=1; b=2",
        "Cookie: a=1\r\nCookie: b=2",
        "Accept: a\r\nAccept: b\r\nAccept: c",
        "X-A: 1\r\nX-B: 2\r\nX-A: 3",
        "Authorization: Basic x==",
        "If-None-Match: \"a\", W/\"b\"",
        "Forwarded: for=1.2.3.4;host=x",
        "X-Forwarded-Host: evil",
        "X-Original-URL: /admin",
        "X-Rewrite-URL: /admin",
        "X-HTTP-Method-Override: DELETE",
        "Max-Forwards: 0",
        "Via: 1.1 x",
        "Trailer: X-T",
        "Upgrade: h2c",
        "Connection: X-Named\r\nX-Named: 1",
        "Keep-Alive: timeout=1",
        "TE: trailers",
        "Proxy-Authorization: x",
        "HTTP2-Settings: AAMAAABk",
    ] {
        out.push(format!("GET /f HTTP/1.1\r\nHost: a\r\n{field}\r\n{CLOSE}\r\n").into_bytes());
    }
    out.push(
        b"GET /latin HTTP/1.1\r\nHost: a\r\nX-Latin: caf\xe9 \xff\r\nConnection: close\r\n\r\n".to_vec(),
    );
    out.push(
        format!(
            "GET /long HTTP/1.1\r\nHost: a\r\nX-Long: {}\r\n{CLOSE}\r\n",
            "x".repeat(30_000)
        )
        .into_bytes(),
    );
    out.push(
        format!(
            "GET /many HTTP/1.1\r\nHost: a\r\n{}{CLOSE}\r\n",
            "x: 1\r\n".repeat(90)
        )
        .into_bytes(),
    );
    out.push(format!("GET /{} HTTP/1.1\r\nHost: a\r\n{CLOSE}\r\n", "y".repeat(7_000)).into_bytes());
    out.push(b"OPTIONS * HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n".to_vec());
    out.push(b"GET / HTTP/1.0\r\nHost: a\r\n\r\n".to_vec());
    out.push(b"\r\n\r\nGET /lines HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n".to_vec());
    for method in ["POST", "PUT", "DELETE", "OPTIONS", "GET", "PATCH"] {
        for framed in [
            "Content-Length: 0\r\n\r\n".to_owned(),
            "Content-Length: 5\r\n\r\nhello".to_owned(),
            "Content-Length: 005\r\n\r\nhello".to_owned(),
            "Content-Length: 27\r\n\r\nGET /in-the-body HTTP/1.1\r\n".to_owned(),
            "Transfer-Encoding: chunked\r\n\r\n0\r\n\r\n".to_owned(),
            "Transfer-Encoding: CHUNKED\r\n\r\n5\r\nhello\r\n0\r\n\r\n".to_owned(),
            "Transfer-Encoding: chunked\r\n\r\n00005;a=\"b\";c\r\nhello\r\n1\r\n!\r\n000\r\n\r\n".to_owned(),
            "Transfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\nX-Trailer: 1\r\nContent-Length: 9\r\n\r\n"
                .to_owned(),
            "Transfer-Encoding: chunked\r\n\r\n1c\r\nGET /in-a-chunk HTTP/1.1\r\n\r\n\r\n0\r\n\r\n"
                .to_owned(),
            format!("Content-Length: 100000\r\n\r\n{}", "z".repeat(100_000)),
        ] {
            out.push(format!("{method} /b HTTP/1.1\r\nHost: a\r\n{CLOSE}{framed}").into_bytes());
        }
    }
    let pipelined = "POST /p1 HTTP/1.1\r\nHost: a\r\nContent-Length: 3\r\n\r\nabcGET /p2 HTTP/1.1\r\nHost: a\r\n\r\n\
                     POST /p3 HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\n\r\n";
    out.push(format!("{pipelined}GET /p4 HTTP/1.1\r\nHost: a\r\n{CLOSE}\r\n").into_bytes());
    out
}

/// Requests with pieces that no one would send, from a seeded generator.
fn random() -> Vec<Vec<u8>> {
    const PIECES: [&[u8]; 30] = [
        b"a", b"b", b"c", b"d1", b"-", b"_", b".", b"x", b"y", b"Z9", b"/", b"//", b"..", b"%2e", b"%2F",
        b"%zz", b"\\", b";", b"?", b":", b"@", b"&", b"\"", b"\x80", b"\xff", b"\t", b"\x01", b"|", b"^",
        b"~",
    ];
    let mut random = Random::new(7);
    let mut text = |most: usize| -> Vec<u8> {
        let count = 1 + random.below(most);
        (0..count)
            .flat_map(|_| PIECES[random.below(PIECES.len())].to_vec())
            .collect()
    };
    (0..300)
        .map(|_| {
            let mut out = b"POST /".to_vec();
            out.extend(text(6));
            out.extend_from_slice(b" HTTP/1.1\r\nHost: a\r\nX-Odd: ");
            out.extend(text(6));
            out.extend_from_slice(b"\r\nX-");
            out.extend(text(2));
            out.extend_from_slice(b": v\r\nConnection: close\r\nContent-Length: 3\r\n\r\nabc");
            out
        })
        .collect()
}

async fn read_alike(peer: Peer) {
    let Some(mut behind) = Chain::start(peer).await else {
        return;
    };
    let mut direct = Chain::start(Peer::None).await.unwrap();
    let attacks = matrix1::attacks().into_iter().chain(matrix1::chunk_attacks());
    let inputs: Vec<Vec<u8>> = odd()
        .into_iter()
        .chain(attacks.map(|(_, bytes)| bytes))
        .chain(random())
        .collect();
    let (mut compared, mut pardoned) = (0, BTreeMap::new());
    let mut differences = Vec::new();
    for (number, bytes) in inputs.iter().enumerate() {
        let ours = direct.understood(number, bytes).await;
        let mut theirs = behind.understood(number, bytes).await.into_iter().peekable();
        for one in &ours {
            let one = one.as_ref().unwrap_or_else(|why| {
                panic!("we forwarded {why} for {:?}", String::from_utf8_lossy(bytes));
            });
            let alike = matches!(theirs.peek(), Some(Ok(other))
                if other.method == one.method && other.target == one.target && other.body == one.body
                    && end_to_end(other) == end_to_end(one));
            if alike {
                theirs.next();
                compared += 1;
            } else if let Some(why) = peer.differs(one) {
                *pardoned.entry(why).or_insert(0) += 1;
            } else {
                differences.push(format!(
                    "{}\n  became {}",
                    told(one),
                    match theirs.next() {
                        Some(Ok(other)) => told(&other),
                        other => format!("{other:?}"),
                    }
                ));
            }
        }
        for more in theirs {
            differences.push(format!(
                "a request more: {more:?} of {:?}",
                String::from_utf8_lossy(bytes)
            ));
        }
    }
    assert!(
        differences.is_empty(),
        "{peer:?}: {} of {compared} differ:\n{}",
        differences.len(),
        differences.join("\n")
    );
    assert!(compared > 200, "{compared} requests were forwarded");
    eprintln!("{peer:?}: {compared} requests read alike, {pardoned:?}");
}

#[tokio::test]
async fn nginx_reads_exactly_what_we_forward_and_never_one_request_more() {
    read_alike(Peer::Nginx).await;
}

#[tokio::test]
async fn haproxy_reads_exactly_what_we_forward_and_never_one_request_more() {
    read_alike(Peer::HaProxy).await;
}

#[tokio::test]
async fn lighttpd_reads_exactly_what_we_forward_and_never_one_request_more() {
    read_alike(Peer::Lighttpd).await;
}
