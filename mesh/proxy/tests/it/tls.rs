//! TLS towards clients: what is ended here, who is let in, and how secrets rotate.

use std::net::SocketAddr;
use std::sync::Arc;

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

use super::certificates::{Authority, Issued, by_sds, common, inline, only_uri, server_socket};
use super::fixture::{Backend, Harness, get, http_chain, listener_of, manager, millis, soon};

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
pub(crate) async fn serve_tls(
    harness: &Harness,
    backend: &Backend,
    socket: Option<core::TransportSocket>,
    direction: core::TrafficDirection,
) -> SocketAddr {
    harness.cluster("c", &[backend.address]).await;
    harness.route_all_to("c").await;
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

pub(crate) fn stat(harness: &Harness, name: &str) -> u64 {
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
    harness.route_all_to("c").await;
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
async fn an_authorisation_service_is_told_the_clients_certificate_and_server_name() {
    use crate::policies::services::{Asked, serve, service_cluster};
    use serin_xds::pb::envoy::extensions::filters::http::ext_authz::v3 as authz;
    use serin_xds::pb::envoy::service::auth::v3 as auth;
    let service = Asked::new(|_: &auth::CheckRequest| Ok(auth::CheckResponse::default()));
    let seen = service.seen.clone();
    let (at_service, _server) = serve(
        tonic::transport::Server::builder()
            .add_service(auth::authorization_server::AuthorizationServer::new(service)),
    )
    .await;
    let backend = Backend::named("hello").await;
    let harness = Harness::start();
    service_cluster(&harness, at_service).await;
    harness.cluster("c", &[backend.address]).await;
    harness.routes(crate::policies::to_c()).await;
    let message = authz::ExtAuthz {
        services: Some(authz::ext_authz::Services::GrpcService(core::GrpcService {
            target_specifier: Some(core::grpc_service::TargetSpecifier::EnvoyGrpc(
                core::grpc_service::EnvoyGrpc {
                    cluster_name: "svc".into(),
                    ..Default::default()
                },
            )),
            ..Default::default()
        })),
        include_peer_certificate: true,
        include_tls_session: true,
        ..Default::default()
    };
    let manager = crate::policies::manager_with(vec![crate::fixture::http_filter(
        "envoy.filters.http.ext_authz",
        Some(crate::fixture::any(&message)),
    )]);
    let authority = Authority::new("ca");
    let server = authority.issue(&["reviews"]);
    let mut chain = http_chain(&manager);
    chain.transport_socket = server_socket(
        common(Some(&server), Some(authority.context()), &["http/1.1"]),
        true,
    );
    let listener = listener_of("tls", core::TrafficDirection::Inbound, vec![chain]);
    harness
        .put(serin_xds::ResourceType::Listener, "tls", &listener)
        .await;
    let at = harness.proxy.listener_address("tls").unwrap();
    let identity = authority.issue(&[CLIENT]);
    let client = authority.client().identity(&identity).build();
    assert_eq!(tls_get(at, &client, "reviews", "/").await.unwrap().0, 200);
    let attributes = seen.lock()[0].attributes.clone().unwrap();
    assert_eq!(attributes.tls_session.unwrap().sni, "reviews");
    let source = attributes.source.unwrap();
    assert_eq!(source.principal, CLIENT);
    assert!(
        source.certificate.starts_with("-----BEGIN%20CERTIFICATE-----%0A"),
        "{}",
        source.certificate
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
        // The client may have its alert before the failure is counted.
        soon(counter, async {
            while stat(&harness, counter) < before + 1 {
                tokio::task::yield_now().await;
            }
        })
        .await;
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
    harness.route_all_to("c").await;
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
