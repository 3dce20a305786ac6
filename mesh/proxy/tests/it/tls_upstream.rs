//! TLS towards endpoints.

use std::net::SocketAddr;
use std::sync::Arc;

use serin_xds::ResourceType;
use serin_xds::pb::envoy::config::cluster::v3 as cluster;
use serin_xds::pb::envoy::config::core::v3 as core;
use serin_xds::pb::envoy::extensions::transport_sockets::tls::v3 as tls;
use serin_xds::pb::envoy::extensions::upstreams::http::v3 as upstream_http;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::mpsc;
use tokio_rustls::TlsAcceptor;

use super::certificates::{
    Authority, Issued, client_socket, common, common_by_sds, inline, only_uri, provider, socket,
    validation_secret,
};
use super::failure::{counted_cluster, nothing_is_left};
use super::fixture::{
    Backend, Harness, any, assignment, eds_cluster, get, prefix_route, send, soon, string_struct, to_cluster,
};

const CLIENT: &str = "spiffe://cluster.local/ns/edge/sa/gate";
const SERVER: &str = "spiffe://cluster.local/ns/prod/sa/reviews";

/// What a client showed.
#[derive(Debug)]
pub(crate) struct Met {
    pub(crate) server_name: Option<String>,
    alpn: Option<String>,
    pub(crate) peer: Option<Vec<u8>>,
    resumed: bool,
}

/// Ends TLS in front of a plain server.
pub(crate) struct Front {
    pub(crate) address: SocketAddr,
    met: mpsc::UnboundedReceiver<Met>,
    task: tokio::task::JoinHandle<()>,
}

impl Drop for Front {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl Front {
    pub(crate) async fn start(
        identity: &Issued,
        clients: Option<&Authority>,
        alpn: &[&str],
        behind: SocketAddr,
    ) -> Self {
        let (chain, key) = identity.der();
        let builder = rustls::ServerConfig::builder_with_provider(provider())
            .with_safe_default_protocol_versions()
            .unwrap();
        let builder = match clients {
            None => builder.with_no_client_auth(),
            Some(authority) => {
                use rustls::pki_types::pem::PemObject as _;
                let mut roots = rustls::RootCertStore::empty();
                roots
                    .add(rustls::pki_types::CertificateDer::from_pem_slice(authority.pem.as_bytes()).unwrap())
                    .unwrap();
                builder.with_client_cert_verifier(
                    rustls::server::WebPkiClientVerifier::builder_with_provider(Arc::new(roots), provider())
                        .build()
                        .unwrap(),
                )
            }
        };
        let mut config = builder.with_single_cert(chain, key).unwrap();
        config.alpn_protocols = alpn.iter().map(|name| name.as_bytes().to_vec()).collect();
        config.ticketer = rustls::crypto::aws_lc_rs::Ticketer::new().unwrap();
        let acceptor = TlsAcceptor::from(Arc::new(config));
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let (sender, met) = mpsc::unbounded_channel();
        let task = tokio::spawn(async move {
            let mut connections = tokio::task::JoinSet::new();
            while let Ok((stream, _)) = listener.accept().await {
                let (acceptor, sender) = (acceptor.clone(), sender.clone());
                connections.spawn(async move {
                    let Ok(mut stream) = acceptor.accept(stream).await else {
                        return;
                    };
                    let connection = stream.get_ref().1;
                    let _ = sender.send(Met {
                        server_name: connection.server_name().map(str::to_owned),
                        alpn: connection
                            .alpn_protocol()
                            .map(|name| String::from_utf8_lossy(name).into_owned()),
                        peer: connection.peer_certificates().map(|chain| chain[0].to_vec()),
                        resumed: connection.handshake_kind() == Some(rustls::HandshakeKind::Resumed),
                    });
                    if let Ok(mut behind) = TcpStream::connect(behind).await {
                        let _ = tokio::io::copy_bidirectional(&mut stream, &mut behind).await;
                    }
                });
            }
        });
        Self { address, met, task }
    }

    pub(crate) async fn next(&mut self) -> Met {
        soon("a handshake", self.met.recv()).await.unwrap()
    }
}

fn secured(name: &str, socket: Option<core::TransportSocket>) -> cluster::Cluster {
    cluster::Cluster {
        transport_socket: socket,
        ..eds_cluster(name)
    }
}

fn with_options(
    mut cluster: cluster::Cluster,
    options: &upstream_http::HttpProtocolOptions,
) -> cluster::Cluster {
    cluster.typed_extension_protocol_options.insert(
        "envoy.extensions.upstreams.http.v3.HttpProtocolOptions".into(),
        any(options),
    );
    cluster
}

fn auto_config() -> upstream_http::HttpProtocolOptions {
    use upstream_http::http_protocol_options::{AutoHttpConfig, UpstreamProtocolOptions};
    upstream_http::HttpProtocolOptions {
        upstream_protocol_options: Some(UpstreamProtocolOptions::AutoConfig(AutoHttpConfig::default())),
        ..Default::default()
    }
}

#[tokio::test]
async fn endpoints_are_reached_with_mutual_tls_and_both_are_named_in_the_metrics() {
    let authority = Authority::new("ca");
    let backend = Backend::named("hello").await;
    let mut front = Front::start(
        &authority.issue(&[SERVER]),
        Some(&authority),
        &["http/1.1"],
        backend.address,
    )
    .await;
    let harness = Harness::start();
    let identity = authority.issue(&[CLIENT]);
    let context = common(Some(&identity), Some(only_uri(authority.context(), SERVER)), &[]);
    let name = "outbound_.80_._.reviews.prod.svc.cluster.local";
    harness
        .put(
            ResourceType::Cluster,
            "c",
            &secured("c", client_socket(context, name)),
        )
        .await;
    harness.endpoints("c", &[front.address]).await;
    let at = harness.serve(vec![prefix_route("/", to_cluster("c"))]).await;
    for _ in 0..3 {
        assert_eq!(get(at, "/").await.0, 200);
    }
    let met = front.next().await;
    assert_eq!(met.server_name.as_deref(), Some(name));
    assert_eq!(met.alpn.as_deref(), Some("http/1.1"));
    assert_eq!(met.peer.unwrap(), identity.der().0[0].to_vec());
    assert!(front.met.try_recv().is_err(), "the connection is used again");
    let labels = [
        ("reporter", "source"),
        ("source_principal", CLIENT),
        ("destination_principal", SERVER),
    ];
    soon("the metrics", async {
        while harness.counter("istio_requests_total", &labels) < 3.0 {
            tokio::task::yield_now().await;
        }
    })
    .await;
}

#[tokio::test]
async fn endpoints_that_are_not_who_they_should_be_get_no_request_and_the_log_says_why() {
    let authority = Authority::new("ca");
    let stranger = Authority::new("another ca");
    let backend = Backend::named("hello").await;
    let revoked = authority.issue(&[SERVER]);
    let crl = authority.revoke(&[&revoked]);
    for (identity, reason) in [
        (authority.issue_expired(&[SERVER]), "certificate has expired"),
        (
            stranger.issue(&[SERVER]),
            "unable to get local issuer certificate",
        ),
        (
            authority.issue(&["spiffe://cluster.local/ns/prod/sa/other"]),
            "verify SAN list",
        ),
        (revoked, "certificate revoked"),
    ] {
        let front = Front::start(&identity, None, &[], backend.address).await;
        let mut harness = Harness::start();
        let mut context = only_uri(authority.context(), SERVER);
        context.crl = inline(&crl);
        harness
            .put(
                ResourceType::Cluster,
                "c",
                &cluster::Cluster {
                    transport_socket: client_socket(common(None, Some(context), &[]), "reviews"),
                    ..counted_cluster("c")
                },
            )
            .await;
        harness.endpoints("c", &[front.address]).await;
        let at = harness.serve(vec![prefix_route("/", to_cluster("c"))]).await;
        let (status, headers, _) = get(at, "/").await;
        assert_eq!(status, 503, "{reason}");
        assert_eq!(headers["x-serin-response-flags"], "UF", "{reason}");
        let line = harness.line().await;
        let text = line["upstream_transport_failure_reason"]
            .as_str()
            .unwrap_or_default();
        assert!(text.contains(reason), "{line}");
        assert_eq!(
            line["response_code_details"], "upstream_reset_before_response_started{connection_failure}",
            "{line}"
        );
        nothing_is_left(&harness).await;
    }
    assert_eq!(backend.hits(), 0);
}

#[tokio::test]
async fn alpn_decides_the_http_version_and_more_requests_share_what_was_agreed() {
    let authority = Authority::new("ca");
    let backend = Backend::named("hello").await;
    let identity = authority.issue(&["reviews"]);
    for (offered, agreed, connections) in [(&["h2", "http/1.1"][..], Some("h2"), 1), (&[], None, 1)] {
        let mut front = Front::start(&identity, None, offered, backend.address).await;
        let harness = Harness::start();
        let socket = client_socket(common(None, Some(authority.context()), &[]), "reviews");
        harness
            .put(
                ResourceType::Cluster,
                "c",
                &with_options(secured("c", socket), &auto_config()),
            )
            .await;
        harness.endpoints("c", &[front.address]).await;
        let at = harness.serve(vec![prefix_route("/", to_cluster("c"))]).await;
        for _ in 0..4 {
            assert_eq!(get(at, "/").await.0, 200);
        }
        assert_eq!(front.next().await.alpn.as_deref(), agreed);
        let mut more = 1;
        while front.met.try_recv().is_ok() {
            more += 1;
        }
        assert_eq!(more, connections, "{offered:?}");
    }
}

#[tokio::test]
async fn logs_tell_of_the_certificates_of_the_upstream_connection() {
    use crate::policies::filter_state::{lines, log_to};
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("access.log");
    let authority = Authority::new("ca");
    let backend = Backend::named("hello").await;
    let server = authority.issue(&[SERVER, "db.example"]);
    let front = Front::start(&server, Some(&authority), &["http/1.1"], backend.address).await;
    let harness = Harness::start();
    let identity = authority.issue(&[CLIENT]);
    let context = common(Some(&identity), Some(only_uri(authority.context(), SERVER)), &[]);
    let socket = client_socket(context, "db.example");
    harness
        .put(ResourceType::Cluster, "c", &secured("c", socket))
        .await;
    harness.endpoints("c", &[front.address]).await;
    harness.routes(crate::policies::to_c()).await;
    let mut manager = crate::policies::manager_with(vec![]);
    manager.access_log = vec![log_to(
        &path,
        "%UPSTREAM_PEER_URI_SAN% %UPSTREAM_PEER_DNS_SAN% %UPSTREAM_LOCAL_URI_SAN% %UPSTREAM_TLS_VERSION% \
         %UPSTREAM_PEER_FINGERPRINT_256% %UPSTREAM_PEER_CERT%\n",
    )];
    let at = harness.listen(&manager, core::TrafficDirection::Outbound).await;
    assert_eq!(get(at, "/").await.0, 200);
    let line = lines(&path, 1).await.remove(0);
    let parts: Vec<&str> = line.split(' ').collect();
    assert_eq!(parts[..4], [SERVER, "db.example", CLIENT, "TLSv1.3"]);
    let der = &server.der().0[0];
    let hash = aws_lc_rs::digest::digest(&aws_lc_rs::digest::SHA256, der);
    let digits = hash
        .as_ref()
        .iter()
        .fold(String::new(), |text, byte| text + &format!("{byte:02x}"));
    assert_eq!(parts[4], digits);
    assert!(parts[5].starts_with("-----BEGIN%20CERTIFICATE-----%0A"), "{line}");
}

#[tokio::test]
async fn the_filter_state_may_name_the_server_of_upstream_tls() {
    let authority = Authority::new("ca");
    let backend = Backend::named("hello").await;
    let mut front = Front::start(
        &authority.issue(&["a.example", "b.example"]),
        None,
        &[],
        backend.address,
    )
    .await;
    let harness = Harness::start();
    let socket = client_socket(common(None, Some(authority.context()), &[]), "a.example");
    harness
        .put(ResourceType::Cluster, "c", &secured("c", socket))
        .await;
    harness.endpoints("c", &[front.address]).await;
    harness.routes(crate::policies::to_c()).await;
    let name =
        crate::policies::filter_state::object("envoy.network.upstream_server_name", "", "%REQ(x-server)%");
    let manager = crate::policies::manager_with(vec![crate::policies::filter_state::on_requests(vec![name])]);
    let at = harness.listen(&manager, core::TrafficDirection::Outbound).await;
    let ask = async |fields: &[(&str, &str)]| crate::policies::get_with(at, "/", fields).await.0;
    assert_eq!(ask(&[]).await, 200);
    assert_eq!(front.next().await.server_name.as_deref(), Some("a.example"));
    assert_eq!(ask(&[("x-server", "b.example")]).await, 200);
    assert_eq!(front.next().await.server_name.as_deref(), Some("b.example"));
}

#[tokio::test]
async fn the_server_name_follows_the_host_and_the_certificate_must_be_valid_for_it() {
    let authority = Authority::new("ca");
    let backend = Backend::named("hello").await;
    let mut front = Front::start(
        &authority.issue(&["a.example", "*.wild.example"]),
        None,
        &[],
        backend.address,
    )
    .await;
    let harness = Harness::start();
    let mut options = auto_config();
    options.upstream_http_protocol_options = Some(core::UpstreamHttpProtocolOptions {
        auto_sni: true,
        auto_san_validation: true,
        ..Default::default()
    });
    let socket = client_socket(common(None, Some(authority.context()), &[]), "");
    harness
        .put(
            ResourceType::Cluster,
            "c",
            &with_options(secured("c", socket), &options),
        )
        .await;
    harness.endpoints("c", &[front.address]).await;
    let at = harness.serve(vec![prefix_route("/", to_cluster("c"))]).await;
    let ask = async |host: &str| {
        let request = http::Request::get("/")
            .header("host", host)
            .body(http_body_util::Full::from(""))
            .unwrap();
        send(at, request).await.0
    };
    assert_eq!(ask("a.example").await, 200);
    assert_eq!(front.next().await.server_name.as_deref(), Some("a.example"));
    assert_eq!(ask("x.wild.example:8443").await, 200);
    assert_eq!(front.next().await.server_name.as_deref(), Some("x.wild.example"));
    assert_eq!(ask("b.example").await, 503);
    assert_eq!(ask("a.example").await, 200);
}

#[tokio::test]
async fn endpoints_get_the_socket_that_their_metadata_asks_for() {
    let authority = Authority::new("ca");
    let (plain, meshed) = (Backend::named("plain").await, Backend::named("meshed").await);
    let front = Front::start(&authority.issue(&[SERVER]), None, &[], meshed.address).await;
    let harness = Harness::start();
    let context = common(None, Some(authority.context()), &[]);
    let mut message = eds_cluster("c");
    message.lb_policy = cluster::cluster::LbPolicy::RoundRobin as i32;
    message.transport_socket_matches = vec![
        cluster::cluster::TransportSocketMatch {
            name: "tlsMode-istio".into(),
            r#match: Some(string_struct(&[("tlsMode", "istio")])),
            transport_socket: client_socket(context, "reviews"),
        },
        cluster::cluster::TransportSocketMatch {
            name: "tlsMode-disabled".into(),
            r#match: Some(Default::default()),
            transport_socket: Some(core::TransportSocket {
                name: "envoy.transport_sockets.raw_buffer".into(),
                config_type: None,
            }),
        },
    ];
    harness.put(ResourceType::Cluster, "c", &message).await;
    let mut endpoints = assignment("c", &[(plain.address, ""), (front.address, "")]);
    endpoints.endpoints[0].lb_endpoints[1].metadata = Some(core::Metadata {
        filter_metadata: [(
            "envoy.transport_socket_match".to_owned(),
            string_struct(&[("tlsMode", "istio")]),
        )]
        .into(),
        ..Default::default()
    });
    harness.put(ResourceType::Endpoints, "c", &endpoints).await;
    let at = harness.serve(vec![prefix_route("/", to_cluster("c"))]).await;
    let mut seen = std::collections::BTreeSet::new();
    for _ in 0..2 {
        let (status, _, body) = get(at, "/").await;
        assert_eq!(status, 200);
        seen.insert(body);
    }
    assert_eq!(seen.into_iter().collect::<Vec<_>>(), ["meshed", "plain"]);
}

#[tokio::test]
async fn a_cluster_waits_for_its_secrets_rotates_them_and_resumes_sessions_in_between() {
    let authority = Authority::new("ca");
    let backend = Backend::named("hello").await;
    let mut front = Front::start(
        &authority.issue(&[SERVER]),
        Some(&authority),
        &[],
        backend.address,
    )
    .await;
    let harness = Harness::start();
    let mut message = secured(
        "c",
        client_socket(common_by_sds("default", Some("ROOTCA"), &[]), "reviews"),
    );
    // A connection for each request.
    message.max_requests_per_connection = super::fixture::number(1);
    let at = harness
        .serve_cluster(&message, &[front.address], to_cluster("c"))
        .await;
    let (status, headers, _) = get(at, "/").await;
    assert_eq!(
        (status, headers["x-serin-response-flags"].to_str().unwrap()),
        (503, "NC")
    );
    assert_eq!(
        harness.proxy.store(|store| store.cold()),
        ["secret ROOTCA", "secret default"]
    );
    harness
        .put(
            ResourceType::Secret,
            "ROOTCA",
            &validation_secret("ROOTCA", authority.context()),
        )
        .await;
    assert_eq!(get(at, "/").await.0, 503);
    for round in 0..2 {
        let identity = authority.issue(&[CLIENT]);
        harness
            .put(ResourceType::Secret, "default", &identity.secret("default"))
            .await;
        for again in [false, true] {
            assert_eq!(get(at, "/").await.0, 200);
            let met = front.next().await;
            assert_eq!(met.peer.unwrap(), identity.der().0[0].to_vec(), "round {round}");
            assert_eq!(met.resumed, again, "round {round}");
        }
    }
}

#[tokio::test]
async fn connections_made_before_tls_was_asked_for_are_not_used_after() {
    let authority = Authority::new("ca");
    let backend = Backend::named("hello").await;
    let mut front = Front::start(&authority.issue(&[SERVER]), None, &[], backend.address).await;
    let harness = Harness::start();
    let socket = |sni| client_socket(common(None, Some(authority.context()), &[]), sni);
    let at = harness
        .serve_cluster(&secured("c", socket("one")), &[front.address], to_cluster("c"))
        .await;
    assert_eq!(get(at, "/").await.0, 200);
    assert_eq!(front.next().await.server_name.as_deref(), Some("one"));
    // The same again changes nothing.
    harness
        .put(ResourceType::Cluster, "c", &secured("c", socket("one")))
        .await;
    assert_eq!(get(at, "/").await.0, 200);
    assert!(front.met.try_recv().is_err());
    harness
        .put(ResourceType::Cluster, "c", &secured("c", socket("two")))
        .await;
    assert_eq!(get(at, "/").await.0, 200);
    assert_eq!(front.next().await.server_name.as_deref(), Some("two"));
}

#[tokio::test]
async fn upstream_contexts_that_cannot_be_honoured_are_refused() {
    let harness = Harness::start();
    let unsafe_context = tls::UpstreamTlsContext {
        allow_renegotiation: true,
        ..Default::default()
    };
    let refusal = harness
        .try_put(ResourceType::Cluster, "c", &secured("c", socket(&unsafe_context)))
        .await
        .expect("refused");
    assert!(
        refusal.starts_with("transport_socket.allow_renegotiation"),
        "{refusal}"
    );
}

/// `istio.envoy.config.filter.http.alpn.v2alpha1.FilterConfig`.
#[derive(Clone, PartialEq, prost::Message)]
struct AlpnConfig {
    #[prost(message, repeated, tag = "1")]
    alpn_override: Vec<AlpnOverride>,
}

#[derive(Clone, PartialEq, prost::Message)]
struct AlpnOverride {
    #[prost(int32, tag = "1")]
    upstream_protocol: i32,
    #[prost(string, repeated, tag = "2")]
    alpn_override: Vec<String>,
}

#[tokio::test]
async fn istio_alpn_says_what_tls_offers_unless_the_clusters_metadata_forbids_it() {
    use prost::Message as _;
    let authority = Authority::new("ca");
    let backend = Backend::named("hello").await;
    let mut front = Front::start(
        &authority.issue(&[SERVER]),
        None,
        &["istio-http/1.1", "istio-h2", "http/1.1"],
        backend.address,
    )
    .await;
    let harness = Harness::start();
    let context = || {
        common(
            None,
            Some(authority.context()),
            &["istio-peer-exchange", "http/1.1"],
        )
    };
    let overridden = secured("over", client_socket(context(), "reviews"));
    let mut forbidden = secured("plain", client_socket(context(), "reviews"));
    if let Some(metadata) = &mut forbidden.metadata {
        let istio = metadata.filter_metadata.get_mut("istio").unwrap();
        istio
            .fields
            .extend(string_struct(&[("alpn_override", "false")]).fields);
    }
    for (name, cluster) in [("over", &overridden), ("plain", &forbidden)] {
        harness.put(ResourceType::Cluster, name, cluster).await;
        harness.endpoints(name, &[front.address]).await;
    }
    let config = AlpnConfig {
        alpn_override: [(0, "istio-http/1.0"), (1, "istio-http/1.1"), (2, "istio-h2")]
            .into_iter()
            .map(|(upstream_protocol, name)| AlpnOverride {
                upstream_protocol,
                alpn_override: vec![name.to_owned(), "istio".to_owned()],
            })
            .collect(),
    };
    let mut manager = super::fixture::manager("80");
    manager.http_filters.insert(
        0,
        super::fixture::http_filter(
            "istio.alpn",
            Some(serin_xds::pb::google::protobuf::Any {
                type_url: "type.googleapis.com/istio.envoy.config.filter.http.alpn.v2alpha1.FilterConfig"
                    .into(),
                value: config.encode_to_vec(),
            }),
        ),
    );
    harness
        .routes(vec![super::fixture::host(
            "all",
            "*",
            vec![
                prefix_route("/over", to_cluster("over")),
                prefix_route("/plain", to_cluster("plain")),
            ],
        )])
        .await;
    let at = harness.listen(&manager, core::TrafficDirection::Outbound).await;
    for (path, expected) in [("/over", "istio-http/1.1"), ("/plain", "http/1.1")] {
        for _ in 0..2 {
            assert_eq!(get(at, path).await.0, 200, "{path}");
        }
        assert_eq!(front.next().await.alpn.as_deref(), Some(expected));
        assert!(front.met.try_recv().is_err(), "the connection is used again");
    }
}
