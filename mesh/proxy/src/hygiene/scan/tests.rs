use proptest::prelude::*;

use super::*;

const LIMITS: HeadLimits = HeadLimits {
    bytes: 60 * 1024,
    fields: 100,
};

fn scan(bytes: &[u8]) -> Result<usize, Violation> {
    Scanner::new(LIMITS)
        .advance(bytes)
        .map_err(|(_, violation)| violation)
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
    let mut scanner = Scanner::new(LIMITS);
    let head = b"GET / HTTP/1.1\r\nHost: a\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n";
    let stream = [&head[..], b"\x81\x05hello"].concat();
    assert_eq!(scanner.advance(&stream), Ok(head.len()));
    assert!(scanner.undecided());
    scanner.decide(true);
    assert_eq!(scanner.advance(b"\x81\x05hello"), Ok(7));
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
        let mut scanner = Scanner::new(LIMITS);
        let mut held: Vec<u8> = Vec::new();
        let mut passed = 0;
        let mut rest = &stream[..];
        let mut cuts = cuts.into_iter().cycle();
        while !rest.is_empty() {
            let (now, later) = rest.split_at(cuts.next().unwrap_or(1).min(rest.len()));
            rest = later;
            held.extend(now);
            let taken = scanner.advance(&held).unwrap();
            held.drain(..taken);
            passed += taken;
        }
        prop_assert_eq!(passed, stream.len());
        prop_assert!(held.is_empty());
    }

    #[test]
    fn any_bytes_are_scanned_without_panic(bytes in proptest::collection::vec(any::<u8>(), 0..300)) {
        let _ = Scanner::new(LIMITS).advance(&bytes);
    }
}
