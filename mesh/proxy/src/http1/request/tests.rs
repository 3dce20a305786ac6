use proptest::prelude::*;

use super::*;
use crate::http1::decode::{Decoded, Decoder};
use crate::http1::head::Finder;
use crate::http1::input::Input;

const LIMITS: HeadLimits = HeadLimits {
    bytes: 60 * 1024,
    fields: 100,
};

/// How many bytes are understood of a stream that comes in pieces, up to a request to upgrade.
fn read(pieces: impl IntoIterator<Item = impl AsRef<[u8]>>) -> Result<usize, Violation> {
    let (mut finder, mut input) = (Finder::strict(LIMITS), Input::default());
    let mut decoder = Decoder::new(Framing::Empty);
    let (mut came, mut undecided) = (0, false);
    for piece in pieces {
        came += piece.as_ref().len();
        input.buf.extend_from_slice(piece.as_ref());
        while !undecided {
            match decoder.decode(&mut input)? {
                Decoded::Data(_) | Decoded::Trailers(_) => continue,
                Decoded::More => break,
                Decoded::End => {}
            }
            let Some(found) = finder.find(&input.buf)? else {
                break;
            };
            let head = parse(&input.take(found.length), found, LIMITS, false)?;
            decoder = Decoder::new(head.framing);
            undecided = head.undecided;
        }
    }
    Ok(came - input.buf.len())
}

fn scan(bytes: &[u8]) -> Result<usize, Violation> {
    read([bytes])
}

fn verdict(request: &str) -> Result<(), Violation> {
    scan(request.replace('\n', "\r\n").as_bytes())
        .map(|taken| assert_eq!(taken, request.replace('\n', "\r\n").len()))
}

#[test]
fn ordinary_requests_pass_one_after_the_other() {
    verdict(
        "GET / HTTP/1.1\nHost: a\n\nPOST / HTTP/1.1\nHost: a\nContent-Length: 3\n\nabcGET / HTTP/1.0\n\n",
    )
    .unwrap();
    verdict(
        "POST / HTTP/1.1\nHost: a\nTransfer-Encoding: chunked\n\n5;x=1\nhello\n0\nT: v\n\nGET / HTTP/1.1\nHost: a\n\n",
    )
    .unwrap();
}

#[test]
fn smuggling_by_length_and_coding_is_refused_in_either_order() {
    for head in [
        "POST / HTTP/1.1\nHost: a\nContent-Length: 3\nTransfer-Encoding: chunked\n\n",
        "POST / HTTP/1.1\nHost: a\nTransfer-Encoding: chunked\nContent-Length: 3\n\n",
    ] {
        assert_eq!(verdict(head), Err(Violation::LengthAndCoding));
    }
}

#[test]
fn each_attack_on_the_head_is_refused_by_name() {
    let cases = [
        (
            "Host: a\nContent-Length: 3\nContent-Length: 3\n",
            Violation::SeveralLengths,
        ),
        ("Host: a\nContent-Length: 3, 3\n", Violation::BadLength),
        ("Host: a\nContent-Length: +3\n", Violation::BadLength),
        ("Host: a\nContent-Length: 0x3\n", Violation::BadLength),
        (
            "Host: a\nContent-Length: 99999999999999999999\n",
            Violation::BadLength,
        ),
        ("Host: a\nTransfer-Encoding: xchunked\n", Violation::UnknownCoding),
        (
            "Host: a\nTransfer-Encoding: gzip, chunked\n",
            Violation::UnknownCoding,
        ),
        (
            "Host: a\nTransfer-Encoding: chunked, identity\n",
            Violation::UnknownCoding,
        ),
        (
            "Host: a\nTransfer-Encoding: chunked, chunked\n",
            Violation::BadCoding,
        ),
        (
            "Host: a\nTransfer-Encoding: chunked\nTransfer-Encoding: chunked\n",
            Violation::BadCoding,
        ),
        ("Host : a\n", Violation::BadField),
        (" Host: a\n", Violation::FoldedLine),
        ("Host: a\nX: 1\n 2\n", Violation::FoldedLine),
        ("Host: a\nHost: a\n", Violation::SeveralHosts),
        ("X: 1\n", Violation::NoHost),
        ("Host: a b\n", Violation::BadHost),
        ("Host: a/b\n", Violation::BadHost),
        ("Host: a@b\n", Violation::BadHost),
        ("Host: a\nno colon\n", Violation::BadField),
    ];
    for (fields, expected) in cases {
        assert_eq!(
            verdict(&format!("POST / HTTP/1.1\n{fields}\n")),
            Err(expected),
            "{fields:?}"
        );
    }
    assert_eq!(
        verdict("POST / HTTP/1.0\nTransfer-Encoding: chunked\n\n"),
        Err(Violation::BadCoding)
    );
    assert_eq!(verdict("GET / HTTP/1.2\nHost: a\n\n"), Err(Violation::BadVersion));
    assert_eq!(
        verdict("CONNECT a:1 HTTP/1.1\nHost: a:1\n\n"),
        Err(Violation::Connect)
    );
    assert_eq!(scan(b"GET / HTTP/1.1\nHost: a\n\n"), Err(Violation::BareLineFeed));
    assert_eq!(
        scan(b"GET / HTTP/1.1\r\nHost: a\n\r\n"),
        Err(Violation::BareLineFeed)
    );
    assert_eq!(
        scan(b"GET / HTTP/1.1\r\nHost: a\r\nX: a\rb\r\n\r\n"),
        Err(Violation::BadField)
    );
    let many = "X: 1\n".repeat(101);
    assert_eq!(
        verdict(&format!("GET / HTTP/1.1\n{many}\n")),
        Err(Violation::HeadTooLarge)
    );
    let long = "x".repeat(70_000);
    assert_eq!(
        verdict(&format!("GET / HTTP/1.1\nHost: a\nX: {long}\n\n")),
        Err(Violation::HeadTooLarge)
    );
}

#[test]
fn loose_chunk_framing_is_refused() {
    let head = "POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n";
    for body in [
        "5\nhello\r\n",
        "5\r\nhello\n",
        "5\r\nhelloX\r\n",
        "\r\n",
        "x\r\n",
        " 5\r\n",
        "0x5\r\n",
        "-1\r\n",
        "5;a\nb\r\n",
    ] {
        assert_eq!(
            scan(format!("{head}{body}").as_bytes()),
            Err(Violation::BadChunk),
            "{body:?}"
        );
    }
}

#[test]
fn after_an_upgrade_request_nothing_is_read_until_it_is_decided() {
    let head = b"GET / HTTP/1.1\r\nHost: a\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n";
    let stream = [&head[..], b"\x81\x05hello"].concat();
    assert_eq!(scan(&stream), Ok(head.len()));
    // One with content is an ordinary request.
    let head = "POST / HTTP/1.1\nHost: a\nConnection: Upgrade\nUpgrade: websocket\nContent-Length: 2\n\nab";
    verdict(head).unwrap();
}

#[test]
fn what_a_head_says_of_its_connection_is_read() {
    let read = |text: &str| {
        let text = text.replace('\n', "\r\n");
        let found = Finder::strict(LIMITS).find(text.as_bytes()).unwrap().unwrap();
        parse(&text.into(), found, LIMITS, true).unwrap()
    };
    for (text, keep_alive, expects, undecided) in [
        ("GET / HTTP/1.1\nHost: a\n\n", true, false, false),
        (
            "GET / HTTP/1.1\nHost: a\nConnection: te, Close\n\n",
            false,
            false,
            false,
        ),
        (
            "GET / HTTP/1.1\nHost: a\nConnection: close\nConnection: keep-alive\n\n",
            false,
            false,
            false,
        ),
        ("GET / HTTP/1.0\n\n", false, false, false),
        ("GET / HTTP/1.0\nConnection: Keep-Alive\n\n", true, false, false),
        (
            "POST / HTTP/1.1\nHost: a\nExpect: 100-Continue\nContent-Length: 1\n\n",
            true,
            true,
            false,
        ),
        (
            "POST / HTTP/1.0\nExpect: 100-continue\nContent-Length: 1\n\n",
            false,
            false,
            false,
        ),
        (
            "GET / HTTP/1.1\nHost: a\nExpect: 100-continue\n\n",
            true,
            false,
            false,
        ),
        ("CONNECT a:1 HTTP/1.1\nHost: a:1\n\n", true, false, true),
    ] {
        let head = read(text);
        assert_eq!(
            (head.keep_alive, head.expects, head.undecided),
            (keep_alive, expects, undecided),
            "{text}"
        );
    }
    let head = read("GET http://a/b?c HTTP/1.1\nHost: a\nX-One:  1 \nx-one: 2\n\n").parts;
    assert_eq!(
        (head.method.as_str(), head.uri.to_string()),
        ("GET", "http://a/b?c".to_owned())
    );
    let ones: Vec<_> = head.headers.get_all("x-one").iter().collect();
    assert_eq!(ones, ["1", "2"]);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]
    #[test]
    fn the_verdict_does_not_depend_on_how_the_bytes_are_cut(
        cuts in proptest::collection::vec(1usize..40, 1..30),
        body in proptest::collection::vec(any::<u8>(), 0..50),
    ) {
        let mut stream = b"POST /x HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n".to_vec();
        if !body.is_empty() {
            stream.extend(format!("{:x}\r\n", body.len()).bytes());
            stream.extend(&body);
            stream.extend(b"\r\n");
        }
        stream.extend(b"0\r\n\r\nGET / HTTP/1.1\r\nHost: b\r\nContent-Length: 0\r\n\r\n");
        let mut rest = &stream[..];
        let mut cuts = cuts.into_iter().cycle();
        let pieces = std::iter::from_fn(|| {
            let (now, later) = rest.split_at(cuts.next().unwrap_or(1).min(rest.len()));
            rest = later;
            (!now.is_empty()).then_some(now)
        });
        prop_assert_eq!(read(pieces), Ok(stream.len()));
    }

    #[test]
    fn any_bytes_are_scanned_without_panic(bytes in proptest::collection::vec(any::<u8>(), 0..300)) {
        let _ = scan(&bytes);
    }
}
