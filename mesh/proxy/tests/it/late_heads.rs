//! Requests whose head does not come to its end in time: what the client is told, what the log tells, and the same of Envoy.

use std::net::SocketAddr;
use std::path::Path;
use std::time::Duration;

use serin_xds::ResourceType;
use serin_xds::pb::envoy::config::accesslog::v3 as accesslog;
use serin_xds::pb::envoy::config::core::v3 as core;
use serin_xds::pb::envoy::config::route::v3 as route;
use serin_xds::pb::envoy::extensions::filters::network::http_connection_manager::v3 as hcm;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use crate::failure::{counted_cluster, nothing_is_left};
use crate::fixture::*;
use crate::interop_ads::{Pair, resource, router};

/// What is never a whole head. The second could still become an HTTP/2 preface.
const BEGUN: [&str; 7] = [
    "GET / HTTP/1.1\r\nhost: a\r\nx: ",
    "P",
    "PUT / HT",
    "POST / HTTP/1.1\r\nhost: a\r\ncontent-length: 5\r\n",
    "HEAD / HTTP/1.1\r\nhost: a\r\n",
    "GET / HTTP/1.0\r\n",
    "GET /whole HTTP/1.1\r\nhost: a\r\n\r\nGET /second HTTP/1.1\r\nhost: a\r\n",
];

/// What the log tells of each of them.
pub(crate) const LATE: &str = "- - - HTTP/1.1 408 - request_header_timeout 0 22 -";

/// A listener with a short time for heads, and the file of its log.
pub(crate) async fn hurried(backend: &Backend, log: &Path) -> (Harness, SocketAddr) {
    let harness = Harness::start();
    harness
        .put(ResourceType::Cluster, "c", &counted_cluster("c"))
        .await;
    harness.endpoints("c", &[backend.address]).await;
    harness
        .routes(vec![host("all", "*", vec![prefix_route("/", to_cluster("c"))])])
        .await;
    let mut manager = manager("80");
    manager.request_headers_timeout = millis(200);
    manager.access_log = vec![logged_to(log)];
    let at = harness.listen(&manager, core::TrafficDirection::Outbound).await;
    (harness, at)
}

/// The lines of a log, once there are as many.
pub(crate) async fn lines(log: &Path, count: usize) -> Vec<String> {
    soon("the access log", async {
        loop {
            let text = std::fs::read_to_string(log).unwrap_or_default();
            if text.matches('\n').count() >= count {
                return text.lines().map(str::to_owned).collect();
            }
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    })
    .await
}

fn is_too_late(answer: &str) -> bool {
    answer.starts_with("HTTP/1.1 408 ")
        && answer.contains("\r\nconnection: close\r\n")
        && answer.ends_with("\r\n\r\nrequest header timeout")
}

#[tokio::test]
async fn a_head_that_never_ends_is_given_up_after_the_headers_timeout() {
    let backend = Backend::named("b").await;
    let folder = tempfile::tempdir().unwrap();
    let log = folder.path().join("log");
    let (harness, at) = hurried(&backend, &log).await;
    let mut stream = TcpStream::connect(at).await.unwrap();
    stream
        .write_all(b"GET / HTTP/1.1\r\nhost: a\r\nx: ")
        .await
        .unwrap();
    let mut answer = Vec::new();
    // One byte at a time, for ever: slowloris.
    let slow = async {
        loop {
            tokio::select! {
                read = stream.read_buf(&mut answer) => if !matches!(read, Ok(count) if count > 0) { return },
                () = tokio::time::sleep(Duration::from_millis(20)) => {}
            }
            if stream.write_all(b"y").await.is_err() {
                return;
            }
        }
    };
    soon("the end of a slow head", slow).await;
    let answer = String::from_utf8_lossy(&answer);
    assert!(is_too_late(&answer), "{answer}");
    assert_eq!(lines(&log, 1).await, [LATE]);
    assert_eq!(backend.hits(), 0);
    drop(stream);
    nothing_is_left(&harness).await;
}

#[tokio::test]
async fn a_head_that_stops_anywhere_is_answered_408_and_a_request_before_it_as_ever() {
    let backend = Backend::named("b").await;
    let folder = tempfile::tempdir().unwrap();
    let log = folder.path().join("log");
    let (harness, at) = hurried(&backend, &log).await;
    for begun in BEGUN {
        let mut answer = raw(at, begun.as_bytes()).await;
        if begun.contains("/whole") {
            let (first, second) = answer.split_at(answer.rfind("HTTP/1.1 ").unwrap());
            assert!(first.starts_with("HTTP/1.1 200 "), "{answer}");
            answer = second.to_owned();
        }
        assert!(is_too_late(&answer), "{begun:?}: {answer}");
    }
    let told = lines(&log, BEGUN.len() + 1).await;
    let late = told.iter().filter(|line| *line == LATE).count();
    assert_eq!((late, told.len()), (BEGUN.len(), BEGUN.len() + 1), "{told:?}");
    assert_eq!(
        told[BEGUN.len() - 1],
        "GET /whole a HTTP/1.1 200 - via_upstream 0 1 r"
    );
    assert_eq!(backend.hits(), 1);
    // And with it the connection that was kept for the next request.
    drop(backend);
    nothing_is_left(&harness).await;
}

#[tokio::test]
async fn a_connection_on_which_no_head_has_begun_is_not_hurried() {
    let backend = Backend::named("b").await;
    let folder = tempfile::tempdir().unwrap();
    let (_harness, at) = hurried(&backend, &folder.path().join("log")).await;
    let ask = async |stream: &mut TcpStream| {
        stream
            .write_all(b"GET / HTTP/1.1\r\nhost: a\r\n\r\n")
            .await
            .unwrap();
        let mut answer = Vec::new();
        while !answer.ends_with(b"\r\n\r\nb") {
            let count = soon("an answer", stream.read_buf(&mut answer)).await.unwrap();
            assert!(count > 0, "{}", String::from_utf8_lossy(&answer));
        }
    };
    let mut silent = TcpStream::connect(at).await.unwrap();
    let mut idle = TcpStream::connect(at).await.unwrap();
    ask(&mut idle).await;
    // Whose time began later is over now.
    let late = raw(at, b"GET / HT").await;
    assert!(is_too_late(&late), "{late}");
    ask(&mut idle).await;
    ask(&mut silent).await;
}

pub(crate) fn logged_to(path: &Path) -> accesslog::AccessLog {
    let line = "%REQ(:METHOD)% %REQ(:PATH)% %REQ(:AUTHORITY)% %PROTOCOL% %RESPONSE_CODE% %RESPONSE_FLAGS% %RESPONSE_CODE_DETAILS% \
                %BYTES_RECEIVED% %BYTES_SENT% %ROUTE_NAME%\n";
    file_log(path.to_str().unwrap(), line)
}

/// An answer without what each proxy says in its own way: who it is, when it is, and the order of its fields.
fn plain(answer: &str) -> Vec<Vec<String>> {
    let own = ["server:", "date:", "x-serin-response-flags:"];
    answer
        .split("HTTP/1.1 ")
        .map(|message| {
            let mut lines: Vec<_> = message
                .split("\r\n")
                .filter(|line| !own.iter().any(|own| line.starts_with(own)))
                .map(str::to_owned)
                .collect();
            lines.sort();
            lines
        })
        .collect()
}

#[tokio::test]
async fn a_late_head_is_answered_and_logged_alike_by_envoy_and_serin_proxy() {
    let folder = tempfile::tempdir().unwrap();
    let log = folder.path().join("access.log");
    let mut manager = manager("80");
    manager.request_headers_timeout = millis(200);
    manager.access_log = vec![logged_to(&log)];
    manager.http_filters = vec![router()];
    let direct = route::Route {
        name: "direct".into(),
        action: Some(route::route::Action::DirectResponse(
            route::DirectResponseAction {
                status: 200,
                ..Default::default()
            },
        )),
        ..prefix_route("/", to_cluster("nowhere"))
    };
    manager.route_specifier = Some(hcm::http_connection_manager::RouteSpecifier::RouteConfig(
        route::RouteConfiguration {
            name: "80".into(),
            virtual_hosts: vec![host("all", "*", vec![direct])],
            ..Default::default()
        },
    ));
    let listener = listener_of("l", core::TrafficDirection::Outbound, vec![http_chain(&manager)]);
    let Some(pair) = Pair::start(vec![resource(ResourceType::Listener, "l", &listener)]).await else {
        return;
    };
    let mut seen = Vec::new();
    let mut read = 0;
    for at in pair.listener("l").await {
        let mut told = Vec::new();
        for begun in BEGUN {
            let answer = plain(&raw(at, begun.as_bytes()).await);
            let expected = read + answer.len() - 1;
            let lines = lines(&log, expected).await.split_off(read);
            read = expected;
            told.push((begun, answer, lines));
        }
        seen.push(told);
    }
    for (ours, theirs) in seen[0].iter().zip(&seen[1]) {
        assert_eq!(ours, theirs);
    }
    pair.stop().await;
}
