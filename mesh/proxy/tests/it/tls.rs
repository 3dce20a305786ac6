//! TLS towards clients: what is ended here, who is let in, and how secrets rotate.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use bytes::Bytes;
use http::{HeaderMap, Request};
use http_body_util::{BodyExt, Full};
use hyper_util::rt::{TokioExecutor, TokioIo};
use rustls::pki_types::ServerName;
use serin_xds::ResourceType;
use serin_xds::pb::envoy::config::core::v3 as core;
use serin_xds::pb::envoy::config::listener::v3 as listener;
use serin_xds::pb::envoy::extensions::transport_sockets::tls::v3 as tls;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;

use super::certificates::{
    Authority, Issued, by_sds, common, common_by_sds, inline, only_uri, server_socket, validation_secret,
};
use super::fixture::{
    Backend, Harness, get, host, http_chain, listener_of, manager, millis, prefix_route, soon, to_cluster,
};

const CLIENT: &str = "spiffe://cluster.local/ns/edge/sa/client";
const SERVER: &str = "spiffe://cluster.local/ns/prod/sa/reviews";

/// A handshake with the listener at `at`.
pub(crate) async fn handshake(
    at: SocketAddr,
    config: &Arc<rustls::ClientConfig>,
    name: &str,
) -> std::io::Result<TlsStream<TcpStream>> {
    let stream = soon("a connection", TcpStream::connect(at)).await?;
    let name = ServerName::try_from(name.to_owned()).unwrap();
    soon(
        "a handshake",
        TlsConnector::from(config.clone()).connect(name, stream),
    )
    .await
}

/// A request over TLS, by the HTTP version that ALPN chose.
pub(crate) async fn tls_get(
    at: SocketAddr,
    config: &Arc<rustls::ClientConfig>,
    name: &str,
    path: &str,
) -> Result<(u16, HeaderMap, String), String> {
    let stream = handshake(at, config, name)
        .await
        .map_err(|error| error.to_string())?;
    request_on(stream, name, path).await
}

pub(crate) async fn request_on(
    stream: TlsStream<TcpStream>,
    authority: &str,
    path: &str,
) -> Result<(u16, HeaderMap, String), String> {
    let http2 = stream.get_ref().1.alpn_protocol() == Some(b"h2");
    let io = TokioIo::new(stream);
    let text = |error: hyper::Error| error.to_string();
    let response = if http2 {
        let (mut sender, connection) = hyper::client::conn::http2::handshake(TokioExecutor::new(), io)
            .await
            .map_err(text)?;
        tokio::spawn(connection);
        let request = Request::get(format!("https://{authority}{path}"))
            .body(Full::<Bytes>::default())
            .unwrap();
        soon("a response", sender.send_request(request))
            .await
            .map_err(text)?
    } else {
        let (mut sender, connection) = hyper::client::conn::http1::handshake(io).await.map_err(text)?;
        tokio::spawn(connection);
        let request = Request::get(path)
            .header("host", authority)
            .body(Full::<Bytes>::default())
            .unwrap();
        soon("a response", sender.send_request(request))
            .await
            .map_err(text)?
    };
    let (parts, body) = response.into_parts();
    let body = soon("a body", body.collect()).await.map_err(text)?.to_bytes();
    Ok((
        parts.status.as_u16(),
        parts.headers,
        String::from_utf8_lossy(&body).into_owned(),
    ))
}

/// A listener `l` with one HTTP chain behind this transport socket, routes `80` and a cluster `c`.
async fn serve_tls(
    harness: &Harness,
    backend: &Backend,
    socket: Option<core::TransportSocket>,
    direction: core::TrafficDirection,
) -> SocketAddr {
    harness.cluster("c", &[backend.address]).await;
    harness
        .routes(vec![host("all", "*", vec![prefix_route("/", to_cluster("c"))])])
        .await;
    let mut chain = http_chain(&manager("80"));
    chain.transport_socket = socket;
    harness
        .put(
            ResourceType::Listener,
            "l",
            &listener_of("l", direction, vec![chain]),
        )
        .await;
    harness.proxy.listener_address("l").expect("bound")
}

fn stat(harness: &Harness, name: &str) -> u64 {
    harness.proxy.store(|store| {
        store
            .secrets()
            .all_stats()
            .flat_map(|(_, _, stats)| stats.read())
            .filter(|(known, _)| known == name)
            .map(|(_, value)| value)
            .sum()
    })
}

#[tokio::test]
async fn tls_is_ended_and_the_http_version_is_what_alpn_agrees_on() {
    let authority = Authority::new("ca");
    let backend = Backend::named("hello").await;
    let harness = Harness::start();
    let server = authority.issue(&["shop.example"]);
    let at = serve_tls(
        &harness,
        &backend,
        server_socket(common(Some(&server), None, &["h2", "http/1.1"]), false),
        core::TrafficDirection::Outbound,
    )
    .await;
    for (alpn, version, agreed) in [
        (&["h2"][..], &rustls::version::TLS13, Some("h2")),
        (&["http/1.1"], &rustls::version::TLS12, Some("http/1.1")),
        (&["h2", "http/1.1"], &rustls::version::TLS12, Some("h2")),
        (&[], &rustls::version::TLS13, None),
        // Nothing in common: the handshake goes on without, as with Envoy.
        (&["acme-tls/1"], &rustls::version::TLS13, None),
    ] {
        let client = authority.client().alpn(alpn).only(version).build();
        let stream = handshake(at, &client, "shop.example").await.unwrap();
        let connection = stream.get_ref().1;
        assert_eq!(connection.alpn_protocol(), agreed.map(str::as_bytes), "{alpn:?}");
        if version == &rustls::version::TLS13 {
            assert_eq!(
                connection.negotiated_key_exchange_group().unwrap().name(),
                rustls::NamedGroup::X25519MLKEM768
            );
        }
        let (status, _, body) = request_on(stream, "shop.example", "/").await.unwrap();
        assert_eq!((status, body.as_str()), (200, "hello"));
    }
    assert_eq!(stat(&harness, "handshake"), 5);
    assert_eq!(stat(&harness, "versions.TLSv1.2"), 2);
    assert_eq!(stat(&harness, "curves.X25519MLKEM768"), 3);
    assert_eq!(stat(&harness, "no_certificate"), 5);
}

#[tokio::test]
async fn bytes_that_are_no_tls_are_turned_away_and_counted() {
    let authority = Authority::new("ca");
    let backend = Backend::named("hello").await;
    let mut harness = Harness::start();
    let server = authority.issue(&["shop.example"]);
    let at = serve_tls(
        &harness,
        &backend,
        server_socket(common(Some(&server), None, &[]), false),
        core::TrafficDirection::Outbound,
    )
    .await;
    let mut stream = TcpStream::connect(at).await.unwrap();
    stream
        .write_all(b"GET / HTTP/1.1\r\nhost: a\r\n\r\n")
        .await
        .unwrap();
    let mut answer = Vec::new();
    let _ = soon("the end", stream.read_to_end(&mut answer)).await;
    assert!(!answer.starts_with(b"HTTP"), "{answer:?}");
    let line = harness.line().await;
    assert!(line["downstream_transport_failure_reason"].is_string(), "{line}");
    assert_eq!(stat(&harness, "connection_error"), 1);
    assert_eq!(backend.hits(), 0);
}

#[tokio::test]
async fn a_client_that_says_nothing_is_let_go_when_the_handshake_takes_too_long() {
    let authority = Authority::new("ca");
    let backend = Backend::named("hello").await;
    let mut harness = Harness::start();
    let server = authority.issue(&["shop.example"]);
    harness.cluster("c", &[backend.address]).await;
    let mut chain = http_chain(&manager("80"));
    chain.transport_socket = server_socket(common(Some(&server), None, &[]), false);
    chain.transport_socket_connect_timeout = millis(50);
    harness
        .put(
            ResourceType::Listener,
            "l",
            &listener_of("l", core::TrafficDirection::Outbound, vec![chain]),
        )
        .await;
    let at = harness.proxy.listener_address("l").unwrap();
    let mut stream = TcpStream::connect(at).await.unwrap();
    let mut answer = Vec::new();
    let _ = soon("the end", stream.read_to_end(&mut answer)).await;
    let line = harness.line().await;
    assert_eq!(
        line["downstream_transport_failure_reason"],
        "TLS_error: handshake timeout"
    );
}

#[tokio::test]
async fn clients_without_a_good_certificate_are_refused_and_counted_by_reason() {
    let authority = Authority::new("ca");
    let other = Authority::new("another ca");
    let backend = Backend::named("hello").await;
    let harness = Harness::start();
    let server = authority.issue(&["reviews", SERVER]);
    let good = authority.issue(&[CLIENT]);
    let revoked = authority.issue(&[CLIENT]);
    let mut context = only_uri(authority.context(), CLIENT);
    context.crl = inline(&authority.revoke(&[&revoked]));
    let at = serve_tls(
        &harness,
        &backend,
        server_socket(common(Some(&server), Some(context), &["http/1.1"]), true),
        core::TrafficDirection::Inbound,
    )
    .await;
    let client = |issued: Option<&Issued>| {
        let builder = authority.client();
        issued
            .map_or(builder.clone(), |issued| builder.identity(issued))
            .build()
    };
    assert_eq!(
        tls_get(at, &client(Some(&good)), "reviews", "/").await.unwrap().0,
        200
    );
    let bad = [
        (None, "fail_verify_no_cert"),
        (Some(authority.issue_expired(&[CLIENT])), "fail_verify_error"),
        (Some(other.issue(&[CLIENT])), "fail_verify_error"),
        (Some(revoked), "fail_verify_error"),
        (
            Some(authority.issue(&["spiffe://cluster.local/ns/edge/sa/other"])),
            "fail_verify_san",
        ),
    ];
    for (issued, counter) in bad {
        let before = stat(&harness, counter);
        let result = tls_get(at, &client(issued.as_ref()), "reviews", "/").await;
        assert!(result.is_err(), "{counter}: {result:?}");
        assert_eq!(stat(&harness, counter), before + 1, "{counter}");
    }
    assert_eq!(backend.hits(), 1);
    assert_eq!(stat(&harness, "handshake"), 1);
    let mutual = [
        ("connection_security_policy", "mutual_tls"),
        ("source_principal", CLIENT),
        ("destination_principal", SERVER),
    ];
    // Recorded when the response is over, which the client may see first.
    soon("the request's metrics", async {
        while harness.counter("istio_requests_total", &mutual) < 1.0 {
            tokio::task::yield_now().await;
        }
    })
    .await;
}

#[tokio::test]
async fn one_port_takes_mutual_tls_and_plain_clients() {
    let authority = Authority::new("ca");
    let backend = Backend::named("hello").await;
    let harness = Harness::start();
    let server = authority.issue(&["reviews", SERVER]);
    harness.cluster("c", &[backend.address]).await;
    harness
        .routes(vec![host("all", "*", vec![prefix_route("/", to_cluster("c"))])])
        .await;
    // As Istio lays PERMISSIVE out.
    let mut mutual = http_chain(&manager("80"));
    mutual.transport_socket = server_socket(
        common(Some(&server), Some(authority.context()), &["h2", "http/1.1"]),
        true,
    );
    mutual.filter_chain_match = Some(listener::FilterChainMatch {
        transport_protocol: "tls".into(),
        application_protocols: vec!["istio".into(), "istio-h2".into(), "istio-http/1.1".into()],
        ..Default::default()
    });
    let mut plain = http_chain(&manager("80"));
    plain.filter_chain_match = Some(listener::FilterChainMatch {
        transport_protocol: "raw_buffer".into(),
        ..Default::default()
    });
    harness
        .put(
            ResourceType::Listener,
            "l",
            &listener_of("l", core::TrafficDirection::Inbound, vec![mutual, plain]),
        )
        .await;
    let at = harness.proxy.listener_address("l").unwrap();
    let client = authority.issue(&[CLIENT]);
    let meshed = authority
        .client()
        .identity(&client)
        .alpn(&["istio-http/1.1", "istio", "http/1.1"])
        .build();
    assert_eq!(tls_get(at, &meshed, "reviews", "/").await.unwrap().0, 200);
    assert_eq!(get(at, "/").await.0, 200);
    // TLS that is not the mesh's has no chain here.
    let stranger = authority.client().alpn(&["http/1.1"]).build();
    assert!(handshake(at, &stranger, "reviews").await.is_err());
    let count = |policy: &'static str| {
        harness.counter("istio_requests_total", &[("connection_security_policy", policy)])
    };
    soon("both requests' metrics", async {
        while count("mutual_tls") < 1.0 || count("none") < 1.0 {
            tokio::task::yield_now().await;
        }
    })
    .await;
}

#[tokio::test]
async fn peers_of_several_trust_domains_are_verified_by_their_own_authorities() {
    let (one, two) = (Authority::new("one"), Authority::new("two"));
    let backend = Backend::named("hello").await;
    let harness = Harness::start();
    let server = one.issue(&["reviews", "spiffe://one/server"]);
    let domain = |name: &str, pem: &str| tls::spiffe_cert_validator_config::TrustDomain {
        name: name.into(),
        trust_bundle: inline(pem),
        ..Default::default()
    };
    let old_and_new = Authority::new("one, renewed");
    let config = tls::SpiffeCertValidatorConfig {
        trust_domains: vec![
            domain("one", &format!("{}{}", one.pem, old_and_new.pem)),
            domain("two", &two.pem),
        ],
        ..Default::default()
    };
    let context = tls::CertificateValidationContext {
        custom_validator_config: Some(core::TypedExtensionConfig {
            name: "envoy.tls.cert_validator.spiffe".into(),
            typed_config: Some(super::fixture::any(&config)),
        }),
        ..Default::default()
    };
    let at = serve_tls(
        &harness,
        &backend,
        server_socket(common(Some(&server), Some(context), &["http/1.1"]), true),
        core::TrafficDirection::Inbound,
    )
    .await;
    for (authority, names, fine) in [
        (&one, &["spiffe://one/a"][..], true),
        (&old_and_new, &["spiffe://one/a"], true),
        (&two, &["spiffe://two/b"], true),
        // Signed by the other domain's authority.
        (&two, &["spiffe://one/a"], false),
        (&one, &["spiffe://three/a"], false),
        (&one, &["spiffe://one/a", "spiffe://one/b"], false),
        (&one, &["a.example"], false),
    ] {
        let client = one.client().identity(&authority.issue(names)).build();
        let result = tls_get(at, &client, "reviews", "/").await;
        assert_eq!(result.is_ok(), fine, "{names:?}: {result:?}");
    }
}

#[tokio::test]
async fn a_rotated_secret_serves_new_handshakes_and_no_request_fails() {
    let authority = Authority::new("ca");
    let backend = Backend::named("hello").await;
    let harness = Harness::start_with(2);
    let put = async |issued: &Issued| {
        harness
            .put(
                ResourceType::Secret,
                "kubernetes://shop",
                &issued.secret("kubernetes://shop"),
            )
            .await;
    };
    put(&authority.issue(&["shop.example"])).await;
    let at = serve_tls(
        &harness,
        &backend,
        server_socket(common_by_sds("kubernetes://shop", None, &["http/1.1"]), false),
        core::TrafficDirection::Outbound,
    )
    .await;
    let client = authority.client().build();
    let old = handshake(at, &client, "shop.example").await.unwrap();
    let (stop, served) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicUsize::new(0)));
    let traffic: Vec<_> = (0..2)
        .map(|_| {
            let (stop, served, client) = (stop.clone(), served.clone(), client.clone());
            tokio::spawn(async move {
                while !stop.load(Ordering::Relaxed) {
                    let result = tls_get(at, &client, "shop.example", "/").await;
                    assert_eq!(result.expect("no request fails").0, 200);
                    served.fetch_add(1, Ordering::Relaxed);
                }
            })
        })
        .collect();
    let mut certificates = std::collections::BTreeSet::new();
    for _ in 0..8 {
        let issued = authority.issue(&["shop.example"]);
        put(&issued).await;
        let fresh = handshake(at, &authority.client().build(), "shop.example")
            .await
            .unwrap();
        let shown = fresh.get_ref().1.peer_certificates().unwrap()[0].clone();
        assert_eq!(
            shown,
            issued.der().0[0],
            "a new handshake shows the new certificate"
        );
        certificates.insert(shown.to_vec());
        let before = served.load(Ordering::Relaxed);
        soon("some requests", async {
            while served.load(Ordering::Relaxed) < before + 3 {
                tokio::task::yield_now().await;
            }
        })
        .await;
    }
    stop.store(true, Ordering::Relaxed);
    for task in traffic {
        task.await.unwrap();
    }
    assert_eq!(certificates.len(), 8);
    assert_eq!(stat(&harness, "context_config_update_by_sds"), 8);
    // The connection from before all this still works.
    assert_eq!(request_on(old, "shop.example", "/").await.unwrap().0, 200);
}

#[tokio::test]
async fn a_bad_secret_is_refused_with_the_reason_and_the_last_good_one_stays() {
    let authority = Authority::new("ca");
    let backend = Backend::named("hello").await;
    let harness = Harness::start();
    let good = authority.issue(&["shop.example"]);
    harness.put(ResourceType::Secret, "s", &good.secret("s")).await;
    let at = serve_tls(
        &harness,
        &backend,
        server_socket(common_by_sds("s", None, &[]), false),
        core::TrafficDirection::Outbound,
    )
    .await;
    let mut mismatched = authority.issue(&["shop.example"]);
    mismatched.key = good.key.clone();
    let mut garbage = good.clone();
    garbage.chain = "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n".into();
    let mut empty = good.clone();
    empty.key = String::new();
    for (secret, reason) in [
        (
            authority.issue_expired(&["shop.example"]).secret("s"),
            "expired at 2020-02-01",
        ),
        (
            mismatched.secret("s"),
            "tls_certificate.private_key: does not belong to the certificate",
        ),
        (garbage.secret("s"), "tls_certificate.certificate_chain"),
        (empty.secret("s"), "tls_certificate.private_key"),
        (
            validation_secret("s", authority.context()),
            "validation_context: s is in use as a tls_certificate",
        ),
    ] {
        let refusal = harness
            .try_put(ResourceType::Secret, "s", &secret)
            .await
            .expect("refused");
        assert!(refusal.contains(reason), "{refusal}");
        let stream = handshake(at, &authority.client().build(), "shop.example")
            .await
            .unwrap();
        assert_eq!(
            stream.get_ref().1.peer_certificates().unwrap()[0],
            good.der().0[0]
        );
    }
}

#[tokio::test]
async fn a_listener_waits_for_its_secrets_and_the_old_one_serves_meanwhile() {
    let authority = Authority::new("ca");
    let backend = Backend::named("hello").await;
    let harness = Harness::start();
    let at = serve_tls(&harness, &backend, None, core::TrafficDirection::Outbound).await;
    assert_eq!(get(at, "/").await.0, 200);
    let mut chain = http_chain(&manager("80"));
    chain.transport_socket = server_socket(common_by_sds("late", None, &[]), false);
    let mut message = listener_of("l", core::TrafficDirection::Outbound, vec![chain.clone()]);
    message.address = super::fixture::address("127.0.0.1:0".parse().unwrap());
    harness.put(ResourceType::Listener, "l", &message).await;
    assert_eq!(harness.proxy.store(|store| store.cold()), ["secret late"]);
    assert_eq!(
        harness
            .proxy
            .store(|store| store.secrets().wanted().into_iter().collect::<Vec<_>>()),
        [Arc::from("late")]
    );
    // Plain still, and a new listener has no socket yet.
    assert_eq!(get(at, "/").await.0, 200);
    harness
        .put(
            ResourceType::Listener,
            "new",
            &listener_of("new", core::TrafficDirection::Outbound, vec![chain]),
        )
        .await;
    assert_eq!(harness.proxy.listener_address("new"), None);
    harness
        .put(
            ResourceType::Secret,
            "late",
            &authority.issue(&["shop.example"]).secret("late"),
        )
        .await;
    assert!(harness.proxy.store(|store| store.cold()).is_empty());
    let client = authority.client().build();
    for name in ["l", "new"] {
        let at = harness.proxy.listener_address(name).expect("bound");
        assert_eq!(tls_get(at, &client, "shop.example", "/").await.unwrap().0, 200);
    }
}

#[tokio::test]
async fn a_listener_whose_secrets_do_not_come_opens_after_a_while_and_refuses_tls_only() {
    let backend = Backend::named("hello").await;
    let harness = Harness::start();
    harness.cluster("c", &[backend.address]).await;
    harness
        .routes(vec![host("all", "*", vec![prefix_route("/", to_cluster("c"))])])
        .await;
    let mut secured = http_chain(&manager("80"));
    secured.transport_socket = server_socket(common_by_sds("never", None, &[]), false);
    secured.filter_chain_match = Some(listener::FilterChainMatch {
        transport_protocol: "tls".into(),
        ..Default::default()
    });
    let plain = http_chain(&manager("80"));
    harness
        .put(
            ResourceType::Listener,
            "l",
            &listener_of("l", core::TrafficDirection::Inbound, vec![secured, plain]),
        )
        .await;
    harness.proxy.tend_secrets(1).await;
    assert_eq!(harness.proxy.listener_address("l"), None);
    harness.proxy.tend_secrets(u64::MAX).await;
    let at = harness.proxy.listener_address("l").expect("bound");
    assert_eq!(get(at, "/").await.0, 200);
    let client = Authority::new("any").client().build();
    assert!(handshake(at, &client, "a.example").await.is_err());
    assert_eq!(stat(&harness, "context_secrets_not_ready"), 1);
}

#[tokio::test]
async fn sessions_are_resumed_until_the_secrets_change() {
    let authority = Authority::new("ca");
    let backend = Backend::named("hello").await;
    let harness = Harness::start_with(2);
    harness
        .put(
            ResourceType::Secret,
            "s",
            &authority.issue(&["shop.example"]).secret("s"),
        )
        .await;
    let trust = |harness: &Harness, context| {
        let secret = validation_secret("trust", context);
        let harness = &harness.proxy;
        let harness = harness.clone();
        async move {
            use prost::Message as _;
            let body = secret.encode_to_vec();
            let update = serin_proxy::config::store::Update {
                name: "trust",
                body: &body,
            };
            assert!(
                harness
                    .apply(ResourceType::Secret, &[update], &[])
                    .await
                    .is_empty()
            );
        }
    };
    trust(&harness, authority.context()).await;
    let at = serve_tls(
        &harness,
        &backend,
        server_socket(common_by_sds("s", Some("trust"), &["http/1.1"]), true),
        core::TrafficDirection::Inbound,
    )
    .await;
    let identity = authority.issue(&[CLIENT]);
    for version in [&rustls::version::TLS13, &rustls::version::TLS12] {
        let client = authority.client().identity(&identity).only(version).build();
        let kind = async || {
            let mut stream = handshake(at, &client, "shop.example").await.unwrap();
            // Tickets of TLS 1.3 come after the handshake, before the answer.
            stream
                .write_all(b"GET / HTTP/1.1\r\nhost: a\r\nconnection: close\r\n\r\n")
                .await
                .unwrap();
            let mut answer = Vec::new();
            soon("the answer", stream.read_to_end(&mut answer)).await.unwrap();
            assert!(answer.starts_with(b"HTTP/1.1 200"), "{answer:?}");
            stream.get_ref().1.handshake_kind().unwrap()
        };
        assert_ne!(kind().await, rustls::HandshakeKind::Resumed);
        assert_eq!(kind().await, rustls::HandshakeKind::Resumed);
        // Other trust: a session from before must not get in unverified.
        trust(&harness, authority.context()).await;
        assert_ne!(kind().await, rustls::HandshakeKind::Resumed);
    }
    assert_eq!(stat(&harness, "session_reused"), 2);
}

#[tokio::test]
async fn certificates_from_files_are_read_again_when_they_change() {
    let authority = Authority::new("ca");
    let backend = Backend::named("hello").await;
    let harness = Harness::start();
    let directory = tempfile::tempdir().unwrap();
    let (chain, key) = (directory.path().join("tls.crt"), directory.path().join("tls.key"));
    let write = |issued: &Issued| {
        std::fs::write(&chain, &issued.chain).unwrap();
        std::fs::write(&key, &issued.key).unwrap();
    };
    write(&authority.issue(&["shop.example"]));
    let file = |path: &std::path::Path| {
        Some(core::DataSource {
            specifier: Some(core::data_source::Specifier::Filename(
                path.to_str().unwrap().into(),
            )),
            ..Default::default()
        })
    };
    let mut context = common(None, None, &[]);
    context.tls_certificates = vec![tls::TlsCertificate {
        certificate_chain: file(&chain),
        private_key: file(&key),
        ..Default::default()
    }];
    let at = serve_tls(
        &harness,
        &backend,
        server_socket(context, false),
        core::TrafficDirection::Outbound,
    )
    .await;
    let shown = async || {
        let stream = handshake(at, &authority.client().build(), "shop.example")
            .await
            .unwrap();
        stream.get_ref().1.peer_certificates().unwrap()[0].clone()
    };
    let first = shown().await;
    std::fs::write(&chain, "rubbish").unwrap();
    harness.proxy.tend_secrets(1).await;
    assert_eq!(shown().await, first, "what cannot be used is not taken");
    let next = authority.issue(&["shop.example", "another.example"]);
    write(&next);
    harness.proxy.tend_secrets(1).await;
    assert_eq!(shown().await, next.der().0[0]);
}

#[tokio::test]
async fn contexts_that_cannot_be_honoured_are_refused_with_their_path() {
    let authority = Authority::new("ca");
    let harness = Harness::start();
    let server = authority.issue(&["a.example"]);
    let mut no_certificate = common(None, None, &[]);
    no_certificate.tls_certificates.clear();
    let mut old = common(Some(&server), None, &[]);
    old.tls_params = Some(tls::TlsParameters {
        tls_minimum_protocol_version: tls::tls_parameters::TlsProtocol::TlSv10 as i32,
        ..Default::default()
    });
    let mut names_only = common(Some(&server), None, &[]);
    names_only.validation_context_type =
        Some(tls::common_tls_context::ValidationContextType::ValidationContext(
            only_uri(Default::default(), CLIENT),
        ));
    let mut elsewhere = common(None, None, &[]);
    let mut config = by_sds("x");
    config.sds_config = None;
    elsewhere.tls_certificate_sds_secret_configs = vec![config];
    for (context, path) in [
        (no_certificate, "common_tls_context.tls_certificates"),
        (old, "common_tls_context.tls_params.tls_minimum_protocol_version"),
        (
            names_only,
            "common_tls_context.validation_context.validation_context.match_typed_subject_alt_names",
        ),
        (
            elsewhere,
            "common_tls_context.tls_certificate_sds_secret_configs[0].name",
        ),
    ] {
        let mut chain = http_chain(&manager("80"));
        chain.transport_socket = server_socket(context, false);
        let refusal = harness
            .try_put(
                ResourceType::Listener,
                "l",
                &listener_of("l", core::TrafficDirection::Outbound, vec![chain]),
            )
            .await
            .expect("refused");
        let wanted = format!("filter_chains[0].transport_socket.{path}: ");
        assert!(refusal.starts_with(&wanted), "{refusal}");
    }
}
