//! Protocol detection from the first bytes, bounded in bytes and time.

/// Bytes that are looked at, at most: a TLS ClientHello with its server name.
pub const MAX_BYTES: usize = 16 * 1024;
/// The HTTP/2 connection preface.
const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";
/// Longest method of a request line that is taken for HTTP.
const MAX_METHOD: usize = 24;

/// What the first bytes say.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Detected {
    /// A TLS ClientHello.
    pub tls: bool,
    /// The server name in it, lower case.
    pub server_name: Option<String>,
    /// ALPN in it.
    pub alpn: Vec<String>,
    /// HTTP/1 or the HTTP/2 preface.
    pub http: Option<Http>,
}

/// Which HTTP.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Http {
    /// A request line.
    One,
    /// The preface.
    Two,
}

/// Looks at the bytes read so far; `None` when more are needed.
pub fn detect(bytes: &[u8]) -> Option<Detected> {
    match bytes {
        [] => None,
        [0x16, ..] => detect_tls(bytes),
        _ if bytes.starts_with(PREFACE) => Some(Detected {
            http: Some(Http::Two),
            ..Default::default()
        }),
        _ if PREFACE.starts_with(bytes) => None,
        _ => detect_http1(bytes),
    }
}

fn detect_http1(bytes: &[u8]) -> Option<Detected> {
    // Empty lines before the request line are allowed.
    let start = bytes
        .iter()
        .take(4)
        .take_while(|byte| matches!(byte, b'\r' | b'\n'))
        .count();
    let bytes = &bytes[start..];
    let none = Some(Detected::default());
    let token = |byte: &u8| byte.is_ascii_alphanumeric() || b"!#$%&'*+-.^_`|~".contains(byte);
    let Some(space) = bytes.iter().take(MAX_METHOD + 1).position(|byte| *byte == b' ') else {
        let plausible = bytes.len() <= MAX_METHOD && bytes.iter().all(token);
        return if plausible { None } else { none };
    };
    if space == 0
        || !bytes[..space]
            .iter()
            .all(|byte| byte.is_ascii_uppercase() || *byte == b'-')
    {
        return none;
    }
    // "QUIT foo" of some text protocol is not HTTP: the line must end in an HTTP version.
    match bytes.iter().position(|byte| *byte == b'\n') {
        None => (bytes.len() >= MAX_BYTES).then(Detected::default),
        Some(end) => {
            let line = bytes[..end].trim_ascii_end();
            let version = line.rsplit(|byte| *byte == b' ').next().unwrap_or_default();
            let http = version.starts_with(b"HTTP/").then_some(Http::One);
            Some(Detected {
                http,
                ..Default::default()
            })
        }
    }
}

/// Reads big-endian lengths and slices off the front; `None` past the end.
struct Cursor<'a>(&'a [u8]);

impl<'a> Cursor<'a> {
    fn take(&mut self, count: usize) -> Option<&'a [u8]> {
        let (taken, rest) = self.0.split_at_checked(count)?;
        self.0 = rest;
        Some(taken)
    }

    fn number(&mut self, bytes: usize) -> Option<usize> {
        Some(
            self.take(bytes)?
                .iter()
                .fold(0, |number, byte| number << 8 | usize::from(*byte)),
        )
    }

    fn vector(&mut self, length_bytes: usize) -> Option<Cursor<'a>> {
        let length = self.number(length_bytes)?;
        self.take(length).map(Cursor)
    }
}

fn detect_tls(bytes: &[u8]) -> Option<Detected> {
    let none = Some(Detected::default());
    if bytes.len() < 6 {
        return None;
    }
    // A handshake record of version 3.x with a ClientHello in it.
    if bytes[1] != 3 || bytes[5] != 1 {
        return none;
    }
    let record = usize::from(bytes[3]) << 8 | usize::from(bytes[4]);
    if bytes.len() < 5 + record && bytes.len() < MAX_BYTES {
        return None;
    }
    let mut out = Detected {
        tls: true,
        ..Default::default()
    };
    // An unreadable hello is still TLS; it just names nobody.
    let _ = read_hello(&bytes[5..bytes.len().min(5 + record)], &mut out);
    Some(out)
}

fn read_hello(bytes: &[u8], out: &mut Detected) -> Option<()> {
    let mut hello = Cursor(bytes);
    hello.take(4 + 2 + 32)?;
    hello.vector(1)?;
    hello.vector(2)?;
    hello.vector(1)?;
    let mut extensions = hello.vector(2)?;
    while !extensions.0.is_empty() {
        let kind = extensions.number(2)?;
        let mut content = extensions.vector(2)?;
        match kind {
            0 => {
                let mut list = content.vector(2)?;
                let kind = list.number(1)?;
                let name = list.vector(2)?.0;
                // RFC 6066 section 3: a DNS name, and no other kind is defined. What is none names nobody.
                let named = kind == 0 && !name.is_empty() && name.iter().all(u8::is_ascii_graphic);
                out.server_name = std::str::from_utf8(name)
                    .ok()
                    .filter(|_| named)
                    .map(str::to_ascii_lowercase);
            }
            16 => {
                let mut list = content.vector(2)?;
                while !list.0.is_empty() {
                    out.alpn
                        .push(String::from_utf8_lossy(list.vector(1)?.0).into_owned());
                }
            }
            _ => {}
        }
    }
    Some(())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn http_is_told_by_a_whole_request_line_or_the_preface() {
        let detected = |http| {
            Some(Detected {
                http,
                ..Default::default()
            })
        };
        assert_eq!(detect(b"GET / HTTP/1.1\r\n"), detected(Some(Http::One)));
        assert_eq!(detect(PREFACE), detected(Some(Http::Two)));
        for more in [&b"GET / HT"[..], b"PRI * HTTP/2", b"PO"] {
            assert_eq!(detect(more), None);
        }
        for other in [&b"QUIT now\r\n"[..], b"\x00\x01\x02", b"*3\r\n$3\r\nSET\r\n"] {
            assert_eq!(detect(other), detected(None));
        }
    }

    #[test]
    fn a_client_hello_gives_its_server_name_and_alpn() {
        let name = b"Shop.Example";
        let mut sni = vec![0, 0];
        let entry_len = name.len() + 3;
        sni.extend(((entry_len + 2) as u16).to_be_bytes());
        sni.extend((entry_len as u16).to_be_bytes());
        sni.push(0);
        sni.extend((name.len() as u16).to_be_bytes());
        sni.extend(name);
        let alpn = [0, 16, 0, 5, 0, 3, 2, b'h', b'2'];
        let extensions = [sni, alpn.to_vec()].concat();
        let mut body = vec![3, 3];
        body.extend([0; 32]);
        body.push(0);
        body.extend([0, 2, 0x13, 1, 1, 0]);
        body.extend((extensions.len() as u16).to_be_bytes());
        body.extend(&extensions);
        let mut hello = vec![1, 0, 0, body.len() as u8];
        hello.extend(&body);
        let mut record = vec![0x16, 3, 1];
        record.extend((hello.len() as u16).to_be_bytes());
        record.extend(&hello);
        let detected = detect(&record).unwrap();
        assert!(detected.tls);
        assert_eq!(detected.server_name.as_deref(), Some("shop.example"));
        assert_eq!(detected.alpn, ["h2"]);
        assert_eq!(detect(&record[..record.len() - 1]), None);
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(128))]
        #[test]
        fn any_bytes_are_looked_at_without_panic(mut bytes in proptest::collection::vec(any::<u8>(), 0..200), tls in any::<bool>()) {
            if tls && bytes.len() > 6 {
                bytes[..6].copy_from_slice(&[0x16, 3, 1, 0, 60, 1]);
            }
            let _ = detect(&bytes);
        }
    }
}
