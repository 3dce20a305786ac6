//! The behaviour table of HTTP/1 proxies, row by row, as bytes: what is ambiguous is refused and reaches no backend.

use crate::fixture::*;

/// Sends `bytes` to a fresh proxy with one backend; the answer, the hits, and what the backend saw first.
struct Scene {
    harness: Harness,
    backend: Backend,
    at: std::net::SocketAddr,
}

impl Scene {
    async fn new() -> Self {
        let harness = Harness::start();
        let backend = Backend::named("b").await;
        harness.cluster("c", &[backend.address]).await;
        let at = harness.serve(vec![prefix_route("/", to_cluster("c"))]).await;
        Self { harness, backend, at }
    }
}

async fn refused(bytes: &[u8], status: u16, details: &str) {
    let mut scene = Scene::new().await;
    let answer = raw(scene.at, bytes).await;
    assert!(answer.starts_with(&format!("HTTP/1.1 {status} ")), "{answer}");
    assert!(
        answer.to_ascii_lowercase().contains("connection: close"),
        "the connection ends, since nobody knows where the next request begins: {answer}"
    );
    let line = scene.harness.line().await;
    assert_eq!(line["response_code_details"], details);
    // Paths are refused without a flag, as in Envoy.
    let flags = if details == "path_normalization_failed" {
        "-"
    } else {
        "DPE"
    };
    assert_eq!(line["response_flags"], flags);
    assert_eq!(scene.backend.hits(), 0, "nothing was forwarded");
}

async fn forwarded(bytes: &[u8]) -> (String, Seen) {
    let mut scene = Scene::new().await;
    let answer = raw(scene.at, bytes).await;
    let seen = scene.backend.next().await;
    (answer, seen)
}

macro_rules! refusals {
    ($(fn $name:ident() = $bytes:expr => $status:literal $details:literal;)*) => {
        $(
            #[tokio::test]
            async fn $name() {
                refused($bytes.as_ref(), $status, $details).await;
            }
        )*

        /// The same attacks, for those who look at what is behind us.
        pub(crate) fn attacks() -> Vec<(&'static str, Vec<u8>)> {
            let mut out: Vec<(&'static str, Vec<u8>)> = Vec::new();
            $(out.push((stringify!($name), AsRef::<[u8]>::as_ref(&$bytes).to_vec()));)*
            out
        }
    };
}

const POST: &str = "POST / HTTP/1.1\r\nHost: a\r\n";

refusals! {
    fn smuggling_cl_te() = format!("{POST}Content-Length: 6\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\nG")
        => 400 "http1.content_length_and_chunked_not_allowed";
    fn smuggling_te_cl() = format!("{POST}Transfer-Encoding: chunked\r\nContent-Length: 3\r\n\r\n8\r\nSMUGGLED\r\n0\r\n\r\n")
        => 400 "http1.content_length_and_chunked_not_allowed";
    fn smuggling_two_different_content_lengths() = format!("{POST}Content-Length: 3\r\nContent-Length: 4\r\n\r\nabcd")
        => 400 "http1.several_content_lengths";
    fn two_equal_content_lengths() = format!("{POST}Content-Length: 3\r\nContent-Length: 3\r\n\r\nabc")
        => 400 "http1.several_content_lengths";
    fn content_length_list() = format!("{POST}Content-Length: 3, 3\r\n\r\nabc") => 400 "http1.invalid_content_length";
    fn content_length_with_plus() = format!("{POST}Content-Length: +3\r\n\r\nabc") => 400 "http1.invalid_content_length";
    fn content_length_in_hex() = format!("{POST}Content-Length: 0x3\r\n\r\nabc") => 400 "http1.invalid_content_length";
    fn content_length_negative() = format!("{POST}Content-Length: -1\r\n\r\n") => 400 "http1.invalid_content_length";
    fn content_length_empty() = format!("{POST}Content-Length:\r\n\r\n") => 400 "http1.invalid_content_length";
    fn content_length_overflow() = format!("{POST}Content-Length: 18446744073709551616\r\n\r\n")
        => 400 "http1.invalid_content_length";
    fn transfer_encoding_xchunked() = format!("{POST}Transfer-Encoding: xchunked\r\n\r\n0\r\n\r\n")
        => 501 "http1.invalid_transfer_encoding";
    fn transfer_encoding_chunked_identity() = format!("{POST}Transfer-Encoding: chunked, identity\r\n\r\n0\r\n\r\n")
        => 501 "http1.invalid_transfer_encoding";
    fn transfer_encoding_gzip_chunked() = format!("{POST}Transfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n")
        => 501 "http1.invalid_transfer_encoding";
    fn transfer_encoding_quoted_chunked() = format!("{POST}Transfer-Encoding: \"chunked\"\r\n\r\n0\r\n\r\n")
        => 501 "http1.invalid_transfer_encoding";
    fn transfer_encoding_with_vertical_tab() = format!("{POST}Transfer-Encoding: \x0bchunked\r\n\r\n0\r\n\r\n")
        => 400 "http1.invalid_header_line";
    fn transfer_encoding_chunked_twice_in_one_field() = format!("{POST}Transfer-Encoding: chunked, chunked\r\n\r\n0\r\n\r\n")
        => 400 "http1.transfer_encoding_not_allowed";
    fn transfer_encoding_chunked_twice_in_two_fields() =
        format!("{POST}Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n")
        => 400 "http1.transfer_encoding_not_allowed";
    fn transfer_encoding_empty() = format!("{POST}Transfer-Encoding:\r\n\r\n") => 501 "http1.invalid_transfer_encoding";
    fn transfer_encoding_in_http_1_0() = "POST / HTTP/1.0\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n"
        => 400 "http1.transfer_encoding_not_allowed";
    fn space_before_the_colon_of_transfer_encoding() = format!("{POST}Transfer-Encoding : chunked\r\n\r\n0\r\n\r\n")
        => 400 "http1.invalid_header_line";
    fn tab_before_the_colon() = format!("{POST}X\t: 1\r\n\r\n") => 400 "http1.invalid_header_line";
    fn leading_space_before_the_first_field() = "GET / HTTP/1.1\r\n Host: a\r\n\r\n" => 400 "http1.obs_fold";
    fn obs_fold_of_transfer_encoding() = format!("{POST}Transfer-Encoding:\r\n chunked\r\n\r\n0\r\n\r\n")
        => 501 "http1.invalid_transfer_encoding";
    fn obs_fold_of_another_field() = format!("{POST}X: 1\r\n\t2\r\n\r\n") => 400 "http1.obs_fold";
    fn bare_lf_everywhere() = "GET / HTTP/1.1\nHost: a\n\n" => 400 "http1.bare_line_feed";
    fn bare_lf_after_one_field() = "GET / HTTP/1.1\r\nHost: a\nX: 1\r\n\r\n" => 400 "http1.bare_line_feed";
    fn bare_lf_ends_the_head() = "GET / HTTP/1.1\r\nHost: a\r\n\n" => 400 "http1.bare_line_feed";
    fn bare_cr_in_a_value() = format!("{POST}X: a\rb\r\n\r\n") => 400 "http1.invalid_header_line";
    fn bare_cr_in_the_request_line() = "GET /\r HTTP/1.1\r\nHost: a\r\n\r\n" => 400 "http1.invalid_request_line";
    fn nul_in_a_value() = format!("{POST}X: a\0b\r\n\r\n") => 400 "http1.invalid_header_line";
    fn control_character_in_a_value() = format!("{POST}X: a\x01b\r\n\r\n") => 400 "http1.invalid_header_line";
    fn delete_character_in_a_value() = format!("{POST}X: a\x7fb\r\n\r\n") => 400 "http1.invalid_header_line";
    fn nul_in_a_name() = format!("{POST}X\0Y: a\r\n\r\n") => 400 "http1.invalid_header_line";
    fn parenthesis_in_a_name() = format!("{POST}X(Y: a\r\n\r\n") => 400 "http1.invalid_header_line";
    fn byte_above_ascii_in_a_name() = format!("{POST}Xé: a\r\n\r\n") => 400 "http1.invalid_header_line";
    fn empty_name() = format!("{POST}: a\r\n\r\n") => 400 "http1.invalid_header_line";
    fn line_without_colon() = format!("{POST}nonsense\r\n\r\n") => 400 "http1.invalid_header_line";
    fn two_different_hosts() = "GET / HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n" => 400 "http1.several_hosts";
    fn two_equal_hosts() = "GET / HTTP/1.1\r\nHost: a\r\nHost: a\r\n\r\n" => 400 "http1.several_hosts";
    fn no_host_in_http_1_1() = "GET / HTTP/1.1\r\nX: 1\r\n\r\n" => 400 "missing_host_header";
    fn host_with_a_path() = "GET / HTTP/1.1\r\nHost: a/b\r\n\r\n" => 400 "http1.invalid_host";
    fn host_with_userinfo() = "GET / HTTP/1.1\r\nHost: a@b\r\n\r\n" => 400 "http1.invalid_host";
    fn host_with_a_space() = "GET / HTTP/1.1\r\nHost: a b\r\n\r\n" => 400 "http1.invalid_host";
    fn host_with_a_comma() = "GET / HTTP/1.1\r\nHost: a,b\r\n\r\n" => 400 "http1.invalid_host";
    fn version_1_2() = "GET / HTTP/1.2\r\nHost: a\r\n\r\n" => 505 "http1.unsupported_version";
    fn version_2_0_in_the_line() = "GET / HTTP/2.0\r\nHost: a\r\n\r\n" => 505 "http1.unsupported_version";
    fn version_0_9() = "GET / HTTP/0.9\r\nHost: a\r\n\r\n" => 505 "http1.unsupported_version";
    fn version_missing() = "GET /\r\nHost: a\r\n\r\n" => 400 "http1.invalid_request_line";
    fn version_in_lower_case() = "GET / http/1.1\r\nHost: a\r\n\r\n" => 400 "http1.invalid_request_line";
    fn two_spaces_in_the_request_line() = "GET  / HTTP/1.1\r\nHost: a\r\n\r\n" => 400 "http1.invalid_request_line";
    fn space_in_the_target() = "GET /a b HTTP/1.1\r\nHost: a\r\n\r\n" => 400 "http1.invalid_request_line";
    fn tab_in_the_request_line() = "GET\t/ HTTP/1.1\r\nHost: a\r\n\r\n" => 400 "http1.invalid_request_line";
    fn control_character_in_the_target() = "GET /\x01 HTTP/1.1\r\nHost: a\r\n\r\n" => 400 "http1.invalid_request_line";
    fn byte_above_ascii_in_the_target() = "GET /é HTTP/1.1\r\nHost: a\r\n\r\n" => 400 "http1.invalid_request_line";
    fn fragment_in_the_target() = "GET /a#b HTTP/1.1\r\nHost: a\r\n\r\n" => 400 "http1.invalid_request_line";
    fn method_that_is_no_token() = "G(T / HTTP/1.1\r\nHost: a\r\n\r\n" => 400 "http1.invalid_request_line";
    fn connect_with_authority() = "CONNECT a:1 HTTP/1.1\r\nHost: a:1\r\n\r\n" => 405 "http1.connect_not_allowed";
    fn host_of_two_joined_fields() = "GET / HTTP/1.1\r\nHost: a, b\r\n\r\n" => 400 "http1.invalid_host";
    fn http_2_preface_later_than_first() = "GET / HTTP/1.1\r\nHost\r\n\r\nPRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
        => 400 "http1.invalid_header_line";
    fn more_than_100_fields() = format!("{POST}{}\r\n", "x: 1\r\n".repeat(101)) => 431 "request_headers_too_large";
    fn one_field_of_70_kb() = format!("{POST}X: {}\r\n\r\n", "x".repeat(70_000)) => 431 "request_headers_too_large";
    fn a_head_without_end() = format!("{POST}X: {}", "x".repeat(70_000)) => 431 "request_headers_too_large";
    fn path_that_climbs_above_the_root() = "GET /a/../../etc HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n"
        => 400 "path_normalization_failed";
    fn path_that_climbs_by_escaped_dots() = "GET /%2e%2e/etc HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n"
        => 400 "path_normalization_failed";
    fn path_with_an_escaped_nul() = "GET /a%00b HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n"
        => 400 "path_normalization_failed";
    fn asterisk_with_another_method() = "GET * HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n" => 400 "invalid_path";
    fn userinfo_in_an_absolute_target() = "GET http://u@inner/ HTTP/1.1\r\nHost: inner\r\n\r\n" => 400 "invalid_authority";
}

/// Bodies whose framing is wrong, each followed by what it tries to smuggle.
pub(crate) fn chunk_attacks() -> Vec<(&'static str, Vec<u8>)> {
    let head = "POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n";
    let extension = "x".repeat(5_000);
    let long_extension = format!("5;{extension}\r\nhello\r\n0\r\n\r\n");
    [
        ("chunk size with bare LF", "5\nhello\r\n0\r\n\r\n"),
        ("chunk data ended by LF", "5\r\nhello\n0\r\n\r\n"),
        ("chunk longer than its size", "5\r\nhelloX\r\n0\r\n\r\n"),
        ("chunk size with prefix", "0x5\r\nhello\r\n0\r\n\r\n"),
        ("chunk size negative", "-5\r\nhello\r\n0\r\n\r\n"),
        ("chunk size with leading space", " 5\r\nhello\r\n0\r\n\r\n"),
        ("chunk size with trailing space", "5 \r\nhello\r\n0\r\n\r\n"),
        ("chunk size overflow", "10000000000000005\r\nhello\r\n0\r\n\r\n"),
        ("chunk size empty", "\r\nhello\r\n0\r\n\r\n"),
        ("chunk extension with LF", "5;a\nb\r\nhello\r\n0\r\n\r\n"),
        ("chunk extension without end", &long_extension),
        ("last chunk with bare LF", "5\r\nhello\r\n0\n\n"),
        ("trailer with bare LF", "5\r\nhello\r\n0\r\nX: 1\n\r\n"),
    ]
    .map(|(name, body)| {
        let attack = format!("{head}{body}GET /smuggled HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n");
        (name, attack.into_bytes())
    })
    .to_vec()
}

#[tokio::test]
async fn chunk_framing_attacks_break_the_request_off() {
    let scene = Scene::new().await;
    for (name, attack) in chunk_attacks() {
        let answer = raw(scene.at, &attack).await;
        assert!(!answer.contains(" 200 "), "{name}: {answer}");
    }
}

#[tokio::test]
async fn a_chunk_extension_is_dropped_and_the_body_forwarded() {
    let (answer, seen) = forwarded(
        b"POST / HTTP/1.1\r\nHost: a\r\nConnection: close\r\nTransfer-Encoding: chunked\r\n\r\n5;a=b\r\nhello\r\n0\r\n\r\n",
    )
    .await;
    assert!(answer.starts_with("HTTP/1.1 200 "), "{answer}");
    assert_eq!(&seen.body[..], b"hello");
}

#[tokio::test]
async fn the_chunked_body_of_a_get_is_not_lost() {
    let (answer, seen) = forwarded(
        b"GET / HTTP/1.1\r\nHost: a\r\nConnection: close\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\n\r\n",
    )
    .await;
    assert!(answer.starts_with("HTTP/1.1 200 "), "{answer}");
    assert_eq!((&*seen.method, &seen.body[..]), ("GET", &b"hello"[..]));
}

#[tokio::test]
async fn trailers_that_frame_route_or_authenticate_are_dropped() {
    let (answer, seen) = forwarded(
        b"POST / HTTP/1.1\r\nHost: a\r\nConnection: close\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\n\
          Content-Length: 99\r\nTransfer-Encoding: chunked\r\nHost: evil\r\nAuthorization: x\r\n\r\n",
    )
    .await;
    assert!(answer.starts_with("HTTP/1.1 200 "), "{answer}");
    assert_eq!(seen.headers["host"], "a");
    assert!(!seen.headers.contains_key("authorization"));
    assert_eq!(&seen.body[..], b"abc");
}

#[tokio::test]
async fn fields_that_connection_nominates_are_stripped_but_not_those_that_frame_or_route() {
    let (answer, seen) = forwarded(
        b"GET / HTTP/1.1\r\nHost: a\r\nConnection: close, X-Secret, Host, Cookie\r\nX-Secret: 1\r\nCookie: c=1\r\n\
          Keep-Alive: timeout=5\r\nProxy-Connection: keep-alive\r\nTE: gzip\r\n\r\n",
    )
    .await;
    assert!(answer.starts_with("HTTP/1.1 200 "), "{answer}");
    for name in ["x-secret", "keep-alive", "proxy-connection", "te", "connection"] {
        assert!(!seen.headers.contains_key(name), "{name}");
    }
    assert_eq!(seen.headers["host"], "a");
    assert_eq!(seen.headers["cookie"], "c=1");
}

#[tokio::test]
async fn an_absolute_target_with_another_host_is_rewritten_and_wins() {
    let (answer, seen) =
        forwarded(b"GET http://inner/x?y HTTP/1.1\r\nHost: outer\r\nConnection: close\r\n\r\n").await;
    assert!(answer.starts_with("HTTP/1.1 200 "), "{answer}");
    assert_eq!(
        (&*seen.path, seen.headers["host"].to_str().unwrap()),
        ("/x?y", "inner")
    );
}

#[tokio::test]
async fn empty_lines_before_a_request_line_are_let_pass_and_not_forwarded() {
    let (answer, seen) = forwarded(b"\r\n\r\nGET /x HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n").await;
    assert!(answer.starts_with("HTTP/1.1 200 "), "{answer}");
    assert_eq!(seen.path, "/x");
}

#[tokio::test]
async fn a_path_is_normalised_before_it_chooses_the_route() {
    let scene = Scene::new().await;
    let admin = route_direct("/admin", 403);
    scene
        .harness
        .routes(vec![host(
            "all",
            "*",
            vec![admin, prefix_route("/", to_cluster("c"))],
        )])
        .await;
    for path in [
        "/admin",
        "/x/../admin",
        "/./admin",
        "/x/%2e%2e/admin",
        "/x\\..\\admin",
    ] {
        let answer = raw(
            scene.at,
            format!("GET {path} HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n").as_bytes(),
        )
        .await;
        assert!(answer.starts_with("HTTP/1.1 403 "), "{path}: {answer}");
    }
    assert_eq!(scene.backend.hits(), 0);
}

fn route_direct(prefix: &str, status: u32) -> serin_xds::pb::envoy::config::route::v3::Route {
    use serin_xds::pb::envoy::config::route::v3 as route;
    route::Route {
        action: Some(route::route::Action::DirectResponse(
            route::DirectResponseAction {
                status,
                ..Default::default()
            },
        )),
        ..prefix_route(prefix, to_cluster("c"))
    }
}
