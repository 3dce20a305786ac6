//! Routing, rewriting, balancing, retries, timeouts, faults, upgrades.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use bytes::Bytes;
use http::{Request, Response};
use http_body_util::{BodyExt, Full};
use serin_xds::ResourceType;
use serin_xds::pb::envoy::config::core::v3 as core;
use serin_xds::pb::envoy::config::route::v3 as route;
use serin_xds::pb::envoy::extensions::filters::http::fault::v3 as fault;
use serin_xds::pb::envoy::r#type::v3::FractionalPercent;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};

use crate::fixture::*;

#[tokio::test]
async fn a_weighted_route_gives_each_cluster_exactly_its_share() {
    let harness = Harness::start();
    let (one, two) = (Backend::named("one").await, Backend::named("two").await);
    harness.cluster("one", &[one.address]).await;
    harness.cluster("two", &[two.address]).await;
    let at = harness
        .serve(vec![prefix_route("/", to_weighted(&[("one", 90), ("two", 10)]))])
        .await;
    for _ in 0..100 {
        assert_eq!(get(at, "/").await.0, 200);
    }
    assert_eq!((one.hits(), two.hits()), (90, 10));
    // A change of weights is live with the next request, on connections that are open already.
    harness
        .routes(vec![host(
            "all",
            "*",
            vec![prefix_route("/", to_weighted(&[("one", 0), ("two", 100)]))],
        )])
        .await;
    assert_eq!(get(at, "/").await.2, "two");
}

#[tokio::test]
async fn http_versions_are_translated_both_ways_with_bodies() {
    let harness = Harness::start();
    let echo = |seen: &Seen| Response::new(Full::from([b"echo ", &seen.body[..]].concat()));
    let (first, second) = (Backend::answering(echo).await, Backend::answering(echo).await);
    harness.cluster("h1", &[first.address]).await;
    harness
        .put(ResourceType::Cluster, "h2", &speaking_h2(eds_cluster("h2")))
        .await;
    harness.endpoints("h2", &[second.address]).await;
    let at = harness
        .serve(vec![
            prefix_route("/h2", to_cluster("h2")),
            prefix_route("/", to_cluster("h1")),
        ])
        .await;
    let body = "x".repeat(300_000);
    for path in ["/h1", "/h2"] {
        let request = Request::post(path)
            .header("host", "a")
            .body(Full::from(body.clone()))
            .unwrap();
        let (status, _, answer) = send(at, request).await;
        assert_eq!((status, answer.len()), (200, body.len() + 5), "HTTP/1 to {path}");
        let mut client = h2_client(at).await;
        let request = Request::post(format!("http://a{path}"))
            .body(Full::from(Bytes::from(body.clone())))
            .unwrap();
        let response = soon("a response", client.send_request(request)).await.unwrap();
        assert_eq!(response.version(), http::Version::HTTP_2);
        let answer = soon("a body", response.into_body().collect())
            .await
            .unwrap()
            .to_bytes();
        assert_eq!(answer.len(), body.len() + 5, "HTTP/2 to {path}");
    }
}

#[tokio::test]
async fn grpc_trailers_pass_and_their_status_is_counted() {
    let harness = Harness::start();
    let socket = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let backend = socket.local_addr().unwrap();
    let server = tokio::spawn(async move {
        let (stream, _) = socket.accept().await.unwrap();
        let service = hyper::service::service_fn(|_| async {
            let (mut sender, body) =
                http_body_util::channel::Channel::<Bytes, std::convert::Infallible>::new(4);
            tokio::spawn(async move {
                sender.send_data(Bytes::from_static(b"\0\0\0\0\0")).await.unwrap();
                let mut trailers = http::HeaderMap::new();
                trailers.insert("grpc-status", "5".parse().unwrap());
                sender.send_trailers(trailers).await.unwrap();
            });
            let mut response = Response::new(body);
            response
                .headers_mut()
                .insert("content-type", "application/grpc".parse().unwrap());
            Ok::<_, std::convert::Infallible>(response)
        });
        let io = hyper_util::rt::TokioIo::new(stream);
        let executor = hyper_util::rt::TokioExecutor::new();
        let _ = hyper::server::conn::http2::Builder::new(executor)
            .serve_connection(io, service)
            .await;
    });
    harness
        .put(ResourceType::Cluster, "g", &speaking_h2(eds_cluster("g")))
        .await;
    harness.endpoints("g", &[backend]).await;
    let at = harness.serve(vec![prefix_route("/", to_cluster("g"))]).await;
    let mut client = h2_client(at).await;
    let request = Request::post("http://a/s/M")
        .header("content-type", "application/grpc")
        .header("te", "trailers")
        .body(Full::from(""))
        .unwrap();
    let response = soon("a response", client.send_request(request)).await.unwrap();
    let collected = soon("a body", response.into_body().collect()).await.unwrap();
    assert_eq!(collected.trailers().unwrap()["grpc-status"], "5");
    let labels = [
        ("grpc_response_status", "5"),
        ("request_protocol", "grpc"),
        ("response_code", "200"),
    ];
    assert_eq!(harness.counter("istio_requests_total", &labels), 1.0);
    server.abort();
}

#[tokio::test]
async fn a_refused_connection_is_retried_on_another_host_whatever_the_method() {
    let harness = Harness::start();
    let good = Backend::answering(|seen| Response::new(Full::from(seen.body.clone()))).await;
    let mut action = to_cluster("c");
    action.retry_policy = istio_retries();
    harness.cluster("c", &[closed_port().await, good.address]).await;
    let at = harness.serve(vec![prefix_route("/", action)]).await;
    for _ in 0..20 {
        let request = Request::post("/")
            .header("host", "a")
            .body(Full::from("once"))
            .unwrap();
        let (status, _, body) = send(at, request).await;
        assert_eq!((status, body.as_str()), (200, "once"));
    }
    assert_eq!(good.hits(), 20);
}

#[tokio::test]
async fn when_every_try_fails_the_flags_say_so() {
    let mut harness = Harness::start();
    let mut action = to_cluster("c");
    action.retry_policy = istio_retries();
    harness.cluster("c", &[closed_port().await]).await;
    let at = harness.serve(vec![prefix_route("/", action)]).await;
    let (status, headers, body) = get(at, "/").await;
    assert_eq!(status, 503);
    assert!(body.contains("connection failure"), "{body}");
    assert!(
        !headers.contains_key("x-serin-unprocessed"),
        "only an application's own proxy may say that"
    );
    let line = harness.line().await;
    assert_eq!(line["response_flags"], "UF,URX");
    assert_eq!(line["attempts"], 3);
    assert_eq!(line["upstream_cluster"], "c");
}

#[tokio::test]
async fn missing_routes_clusters_and_endpoints_have_their_own_answers() {
    let mut harness = Harness::start();
    harness
        .put(ResourceType::Cluster, "empty", &eds_cluster("empty"))
        .await;
    harness.endpoints("empty", &[]).await;
    let at = harness
        .serve(vec![
            prefix_route("/gone", to_cluster("gone")),
            prefix_route("/empty", to_cluster("empty")),
        ])
        .await;
    for (path, code, flag) in [("/none", 404, "NR"), ("/gone", 503, "NC"), ("/empty", 503, "UH")] {
        let (status, headers, _) = get(at, path).await;
        assert_eq!(status, code, "{path}");
        assert_eq!(headers["x-serin-response-flags"], flag, "{path}");
        let line = harness.line().await;
        assert_eq!(
            (line["response_flags"].as_str(), line["response_code"].as_u64()),
            (Some(flag), Some(code.into()))
        );
    }
    // A cluster that appears is used by the route that was waiting for it.
    let backend = Backend::named("here").await;
    harness.cluster("gone", &[backend.address]).await;
    assert_eq!(get(at, "/gone").await.2, "here");
    harness.remove(ResourceType::Cluster, "gone").await;
    assert_eq!(get(at, "/gone").await.0, 503);
}

#[tokio::test]
async fn a_connection_closed_while_idle_costs_no_request() {
    let harness = Harness::start();
    let socket = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let backend = socket.local_addr().unwrap();
    // Answers one request per connection, then closes without having said so, at the moment of the next request.
    let server = tokio::spawn(async move {
        loop {
            let (mut stream, _) = socket.accept().await.unwrap();
            tokio::spawn(async move {
                let mut buffer = [0u8; 4096];
                let _ = stream.read(&mut buffer).await;
                let _ = stream
                    .write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok")
                    .await;
                let _ = stream.read(&mut buffer).await;
            });
        }
    });
    harness.cluster("c", &[backend]).await;
    let at = harness.serve(vec![prefix_route("/", to_cluster("c"))]).await;
    for _ in 0..10 {
        assert_eq!(get(at, "/").await.0, 200);
    }
    server.abort();
}

#[tokio::test]
async fn responses_are_retried_only_as_the_policy_says_and_bodies_are_sent_again_whole() {
    let harness = Harness::start();
    let calls = Arc::new(AtomicUsize::new(0));
    let counted = calls.clone();
    let backend = Backend::answering(move |seen| {
        assert_eq!(seen.body.len(), 200_000);
        if counted.fetch_add(1, Ordering::SeqCst).is_multiple_of(2) {
            status(503)
        } else {
            status(200)
        }
    })
    .await;
    harness.cluster("c", &[backend.address]).await;
    let mut action = to_cluster("c");
    action.retry_policy = Some(route::RetryPolicy {
        retry_on: "5xx".into(),
        ..Default::default()
    });
    let at = harness
        .serve(vec![
            prefix_route("/retry", action),
            prefix_route("/", to_cluster("c")),
        ])
        .await;
    let post = |path: &str| {
        Request::post(path)
            .header("host", "a")
            .body(Full::from("y".repeat(200_000)))
            .unwrap()
    };
    assert_eq!(send(at, post("/retry")).await.0, 200);
    assert_eq!(calls.load(Ordering::SeqCst), 2);
    assert_eq!(send(at, post("/plain")).await.0, 503);
}

#[tokio::test]
async fn an_unprocessed_answer_of_a_mesh_peer_is_retried_elsewhere() {
    let harness = Harness::start();
    let dying = Backend::answering(|_| {
        let mut response = status(503);
        response
            .headers_mut()
            .insert("x-serin-unprocessed", "1".parse().unwrap());
        response
    })
    .await;
    let good = Backend::named("good").await;
    let mut action = to_cluster("c");
    action.retry_policy = istio_retries();
    harness.cluster("c", &[dying.address, good.address]).await;
    let at = harness.serve(vec![prefix_route("/", action)]).await;
    for _ in 0..20 {
        let (status, headers, body) = send(
            at,
            Request::post("/")
                .header("host", "a")
                .body(Full::from("z"))
                .unwrap(),
        )
        .await;
        assert_eq!((status, body.as_str()), (200, "good"));
        assert!(!headers.contains_key("x-serin-unprocessed"));
    }
}

#[tokio::test]
async fn an_inbound_proxy_marks_what_its_application_never_saw() {
    let harness = Harness::start();
    harness.cluster("c", &[closed_port().await]).await;
    harness.route_all_to("c").await;
    let at = harness
        .listen(&manager("80"), core::TrafficDirection::Inbound)
        .await;
    let (status, headers, _) = get(at, "/").await;
    assert_eq!(status, 503);
    assert_eq!(headers["x-serin-unprocessed"], "1");
}

#[tokio::test]
async fn timeouts_of_route_and_try_end_in_504_with_their_details() {
    let mut harness = Harness::start();
    let silent = TcpListener::bind("127.0.0.1:0").await.unwrap();
    harness.cluster("c", &[silent.local_addr().unwrap()]).await;
    let mut whole = to_cluster("c");
    whole.timeout = millis(60);
    let mut per_try = to_cluster("c");
    per_try.retry_policy = Some(route::RetryPolicy {
        retry_on: "5xx".into(),
        per_try_timeout: millis(40),
        ..Default::default()
    });
    let at = harness
        .serve(vec![prefix_route("/whole", whole), prefix_route("/try", per_try)])
        .await;
    for (path, details, flags) in [
        ("/whole", "response_timeout", "UT"),
        ("/try", "upstream_per_try_timeout", "UT,URX"),
    ] {
        assert_eq!(get(at, path).await.0, 504);
        let line = harness.line().await;
        assert_eq!(
            (
                line["response_code_details"].as_str(),
                line["response_flags"].as_str()
            ),
            (Some(details), Some(flags))
        );
    }
}

#[tokio::test]
async fn a_response_that_breaks_off_breaks_off_for_the_client_too() {
    let mut harness = Harness::start();
    let socket = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let backend = socket.local_addr().unwrap();
    tokio::spawn(async move {
        let (mut stream, _) = socket.accept().await.unwrap();
        let mut buffer = [0u8; 4096];
        let _ = stream.read(&mut buffer).await;
        stream
            .write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 10\r\n\r\nhalf")
            .await
            .unwrap();
    });
    harness.cluster("c", &[backend]).await;
    let at = harness.serve(vec![prefix_route("/", to_cluster("c"))]).await;
    let answer = raw(at, b"GET / HTTP/1.1\r\nhost: a\r\n\r\n").await;
    assert!(
        answer.starts_with("HTTP/1.1 200") && answer.ends_with("half"),
        "{answer}"
    );
    assert_eq!(harness.line().await["response_flags"], "UC");
}

#[tokio::test]
async fn requests_are_rewritten_and_decorated_on_their_way() {
    let harness = Harness::start();
    let mut backend = Backend::named("b").await;
    harness.cluster("c", &[backend.address]).await;
    let mut action = to_cluster("c");
    action.prefix_rewrite = "/new".into();
    action.host_rewrite_specifier = Some(route::route_action::HostRewriteSpecifier::HostRewriteLiteral(
        "inner".into(),
    ));
    let mut route = prefix_route("/old", action);
    let add = |key: &str, value: &str| core::HeaderValueOption {
        header: Some(core::HeaderValue {
            key: key.into(),
            value: value.into(),
            ..Default::default()
        }),
        append_action: 2,
        ..Default::default()
    };
    route.request_headers_to_add = vec![add("x-route", "%ROUTE_NAME%")];
    route.request_headers_to_remove = vec!["x-drop".into()];
    route.response_headers_to_add = vec![add("x-from", "%UPSTREAM_CLUSTER%")];
    let mut all = host("all", "*", vec![route]);
    all.include_request_attempt_count = true;
    harness.routes(vec![all]).await;
    let at = harness
        .listen(&manager("80"), core::TrafficDirection::Outbound)
        .await;
    let request = Request::get("/old/a/../b?q=1")
        .header("host", "outer")
        .header("x-drop", "1")
        .header("connection", "x-hop")
        .header("x-hop", "1")
        .body(Full::from(""))
        .unwrap();
    let (status, headers, _) = send(at, request).await;
    assert_eq!(status, 200);
    assert_eq!(headers["x-from"], "c");
    assert_eq!(headers["server"], "serin");
    assert!(headers.contains_key("x-envoy-upstream-service-time"));
    let seen = backend.next().await;
    assert_eq!((seen.method.as_str(), seen.path.as_str()), ("GET", "/new/b?q=1"));
    assert_eq!(seen.headers["host"], "inner");
    assert_eq!(seen.headers["x-route"], "r");
    assert_eq!(seen.headers["x-envoy-attempt-count"], "1");
    assert_eq!(seen.headers["x-envoy-original-path"], "/old/b?q=1");
    assert_eq!(seen.headers["x-forwarded-proto"], "http");
    assert_eq!(seen.headers["x-request-id"].len(), 36);
    for gone in ["x-drop", "x-hop", "connection"] {
        assert!(!seen.headers.contains_key(gone), "{gone}");
    }
}

#[tokio::test]
async fn direct_responses_redirects_and_faults_are_answered_by_the_proxy() {
    let mut harness = Harness::start();
    let direct = route::Route {
        action: Some(route::route::Action::DirectResponse(
            route::DirectResponseAction {
                status: 418,
                body: Some(core::DataSource {
                    specifier: Some(core::data_source::Specifier::InlineString("teapot".into())),
                    ..Default::default()
                }),
                ..Default::default()
            },
        )),
        ..prefix_route("/direct", to_cluster("c"))
    };
    let redirect = route::Route {
        action: Some(route::route::Action::Redirect(route::RedirectAction {
            host_redirect: "other".into(),
            response_code: 1,
            ..Default::default()
        })),
        ..prefix_route("/redirect", to_cluster("c"))
    };
    let abort = fault::HttpFault {
        abort: Some(fault::FaultAbort {
            percentage: Some(FractionalPercent {
                numerator: 100,
                denominator: 0,
            }),
            error_type: Some(fault::fault_abort::ErrorType::HttpStatus(555)),
            ..Default::default()
        }),
        ..Default::default()
    };
    let mut faulty = prefix_route("/fault", to_cluster("c"));
    faulty
        .typed_per_filter_config
        .insert("envoy.filters.http.fault".into(), any(&abort));
    let at = harness.serve(vec![direct, redirect, faulty]).await;
    let (status, _, body) = get(at, "/direct").await;
    assert_eq!((status, body.as_str()), (418, "teapot"));
    let (status, headers, _) = get(at, "/redirect").await;
    assert_eq!(
        (status, headers["location"].to_str().unwrap()),
        (302, "http://other/redirect")
    );
    assert_eq!(get(at, "/fault").await.0, 555);
    assert_eq!(harness.line().await["response_flags"], "FI");
}

#[tokio::test]
async fn mirrored_requests_reach_the_shadow_and_its_answer_nobody() {
    let harness = Harness::start();
    let main = Backend::named("main").await;
    let mut shadow = Backend::answering(|_| status(500)).await;
    harness.cluster("main", &[main.address]).await;
    harness.cluster("shadow", &[shadow.address]).await;
    let mut action = to_cluster("main");
    action.request_mirror_policies = vec![route::route_action::RequestMirrorPolicy {
        cluster: "shadow".into(),
        ..Default::default()
    }];
    let at = harness.serve(vec![prefix_route("/", action)]).await;
    let request = Request::post("/m")
        .header("host", "a:80")
        .body(Full::from("copy"))
        .unwrap();
    let (status, _, body) = send(at, request).await;
    assert_eq!((status, body.as_str()), (200, "main"));
    let seen = shadow.next().await;
    assert_eq!(
        (seen.headers["host"].to_str().unwrap(), &seen.body[..]),
        ("a-shadow:80", &b"copy"[..])
    );
}

#[tokio::test]
async fn a_websocket_upgrade_joins_client_and_application() {
    let harness = Harness::start();
    let socket = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let backend = socket.local_addr().unwrap();
    let server = tokio::spawn(async move {
        let (mut stream, _) = socket.accept().await.unwrap();
        let mut head = Vec::new();
        while !head.ends_with(b"\r\n\r\n") {
            head.push(stream.read_u8().await.unwrap());
        }
        let answer = b"HTTP/1.1 101 Switching Protocols\r\nconnection: upgrade\r\nupgrade: websocket\r\n\r\n";
        stream.write_all(answer).await.unwrap();
        let mut frame = [0u8; 5];
        stream.read_exact(&mut frame).await.unwrap();
        stream.write_all(&frame).await.unwrap();
        String::from_utf8(head).unwrap()
    });
    harness.cluster("c", &[backend]).await;
    let at = harness.serve(vec![prefix_route("/", to_cluster("c"))]).await;
    let mut stream = TcpStream::connect(at).await.unwrap();
    // The first frame comes with the request: it must wait for the answer, not be taken for a request.
    stream
        .write_all(b"GET /ws HTTP/1.1\r\nhost: a\r\nconnection: Upgrade\r\nupgrade: websocket\r\n\r\nhello")
        .await
        .unwrap();
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        head.push(soon("the 101", stream.read_u8()).await.unwrap());
    }
    assert!(
        head.starts_with(b"HTTP/1.1 101"),
        "{}",
        String::from_utf8_lossy(&head)
    );
    let mut frame = [0u8; 5];
    soon("the echo", stream.read_exact(&mut frame)).await.unwrap();
    assert_eq!(&frame, b"hello");
    assert!(
        server
            .await
            .unwrap()
            .to_lowercase()
            .contains("upgrade: websocket")
    );
}

#[tokio::test]
async fn an_outlier_is_left_out_after_five_errors() {
    let harness = Harness::start();
    let (bad, good) = (
        Backend::answering(|_| status(500)).await,
        Backend::named("good").await,
    );
    let mut cluster = eds_cluster("c");
    cluster.outlier_detection = Some(serin_xds::pb::envoy::config::cluster::v3::OutlierDetection {
        max_ejection_percent: number(50),
        ..Default::default()
    });
    harness.put(ResourceType::Cluster, "c", &cluster).await;
    harness.endpoints("c", &[bad.address, good.address]).await;
    let at = harness.serve(vec![prefix_route("/", to_cluster("c"))]).await;
    for _ in 0..60 {
        get(at, "/").await;
    }
    assert_eq!(bad.hits(), 5, "one more request reached the ejected host");
    assert_eq!(harness.counter("serin_proxy_outlier_ejections_total", &[]), 1.0);
}

#[tokio::test]
async fn a_circuit_breaker_answers_503_uo() {
    let mut harness = Harness::start();
    let silent = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let mut cluster = eds_cluster("c");
    cluster.circuit_breakers = Some(serin_xds::pb::envoy::config::cluster::v3::CircuitBreakers {
        thresholds: vec![
            serin_xds::pb::envoy::config::cluster::v3::circuit_breakers::Thresholds {
                max_requests: number(1),
                ..Default::default()
            },
        ],
        ..Default::default()
    });
    harness.put(ResourceType::Cluster, "c", &cluster).await;
    harness.endpoints("c", &[silent.local_addr().unwrap()]).await;
    let at = harness.serve(vec![prefix_route("/", to_cluster("c"))]).await;
    let waiting = tokio::spawn(raw(at, b"GET /first HTTP/1.1\r\nhost: a\r\n\r\n"));
    let (_held, _) = soon("the first request's connection", silent.accept())
        .await
        .unwrap();
    let (status, headers, _) = get(at, "/second").await;
    assert_eq!(status, 503);
    assert_eq!(headers["x-envoy-overloaded"], "true");
    assert_eq!(harness.line().await["response_flags"], "UO");
    waiting.abort();
}

#[tokio::test]
async fn no_request_is_lost_while_endpoints_come_and_go() {
    let harness = Arc::new(Harness::start_with(2));
    let mut action = to_cluster("c");
    action.retry_policy = istio_retries();
    let first = Backend::named("x").await;
    harness.cluster("c", &[first.address]).await;
    let at = harness.serve(vec![prefix_route("/", action)]).await;
    let stop = tokio_util::sync::CancellationToken::new();
    let served: Arc<[AtomicUsize; 4]> = Arc::default();
    let load: Vec<_> = (0..served.len())
        .map(|client| {
            let (stop, served) = (stop.clone(), served.clone());
            tokio::spawn(async move {
                let stream = TcpStream::connect(at).await.unwrap();
                let io = hyper_util::rt::TokioIo::new(stream);
                let (mut sender, connection) = hyper::client::conn::http1::handshake(io).await.unwrap();
                tokio::spawn(connection);
                while !stop.is_cancelled() {
                    let request = Request::post("/")
                        .header("host", "a")
                        .body(Full::<Bytes>::from("b"))
                        .unwrap();
                    let response = soon("a response", sender.send_request(request)).await.unwrap();
                    assert_eq!(response.status(), 200);
                    response.into_body().collect().await.unwrap();
                    served[client].fetch_add(1, Ordering::SeqCst);
                }
            })
        })
        .collect();
    let mut current = first;
    for round in 0..30 {
        let next = Backend::named("x").await;
        harness.endpoints("c", &[current.address, next.address]).await;
        let before = next.hits();
        while next.hits() == before {
            tokio::task::yield_now().await;
        }
        harness.endpoints("c", &[next.address]).await;
        // Weights and other resources change as well.
        if round % 3 == 0 {
            harness.put(ResourceType::Cluster, "c", &eds_cluster("c")).await;
        }
        // Requests that the old backend has finish before it ends with its connections: each client has one at a time.
        let old = std::mem::replace(&mut current, next);
        let before: Vec<usize> = served.iter().map(|count| count.load(Ordering::SeqCst)).collect();
        soon("two answers for each client", async {
            while served
                .iter()
                .zip(&before)
                .any(|(count, before)| count.load(Ordering::SeqCst) < before + 2)
            {
                tokio::task::yield_now().await;
            }
        })
        .await;
        drop(old);
    }
    stop.cancel();
    for task in load {
        soon("the load's end", task).await.unwrap();
    }
    let served: usize = served.iter().map(|count| count.load(Ordering::SeqCst)).sum();
    assert!(served > 100, "{served}");
}

#[tokio::test]
async fn a_sidecar_whose_application_is_gone_costs_no_request() {
    // Two pods behind real sidecars; the application of one has closed its listener.
    let gone = Harness::start();
    gone.cluster("app", &[closed_port().await]).await;
    gone.route_all_to("app").await;
    let gone_at = gone.listen(&manager("80"), core::TrafficDirection::Inbound).await;
    let alive = Harness::start();
    let app = Backend::named("alive").await;
    alive.cluster("app", &[app.address]).await;
    alive.route_all_to("app").await;
    let alive_at = alive
        .listen(&manager("80"), core::TrafficDirection::Inbound)
        .await;
    let caller = Harness::start();
    let endpoints = [(gone_at, ""), (alive_at, "")];
    caller.put(ResourceType::Cluster, "c", &eds_cluster("c")).await;
    caller
        .put(ResourceType::Endpoints, "c", &assignment("c", &endpoints))
        .await;
    let mut action = to_cluster("c");
    action.retry_policy = istio_retries();
    let at = caller.serve(vec![prefix_route("/", action)]).await;
    for _ in 0..40 {
        let request = Request::post("/")
            .header("host", "a")
            .body(Full::from("body"))
            .unwrap();
        let (status, headers, body) = send(at, request).await;
        assert_eq!((status, body.as_str()), (200, "alive"));
        assert!(!headers.contains_key("x-serin-response-flags"), "{headers:?}");
    }
    assert!(
        gone.counter("istio_requests_total", &[("response_flags", "UF")]) > 0.0,
        "never tried"
    );
}
