//! Secrets of TLS towards clients: how they rotate, what is refused, who waits for them, which sessions outlive them.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use serin_xds::ResourceType;
use serin_xds::pb::envoy::config::core::v3 as core;
use serin_xds::pb::envoy::config::listener::v3 as listener;
use serin_xds::pb::envoy::extensions::transport_sockets::tls::v3 as tls;
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use super::certificates::{
    Authority, Issued, client_socket, common, common_by_sds, provider, server_socket, validation_secret,
};
use super::failure::{counted_cluster, nothing_is_left};
use super::fixture::{
    Backend, Harness, get, http_chain, listener_of, manager, prefix_route, soon, to_cluster,
};
use super::tls::{handshake, request_on, serve_tls, stat, tls_get};

const CLIENT: &str = "spiffe://cluster.local/ns/edge/sa/client";

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
    harness.route_all_to("c").await;
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

/// A handshake by hand: what the client has to say is sent up to `until` bytes, or whole.
struct Slow {
    stream: tokio::net::TcpStream,
    client: rustls::ClientConnection,
    said: Vec<u8>,
}

impl Slow {
    async fn connect(at: std::net::SocketAddr, config: Arc<rustls::ClientConfig>) -> Self {
        let name = rustls::pki_types::ServerName::try_from("shop.example").unwrap();
        let mut client = rustls::ClientConnection::new(config, name).unwrap();
        let mut said = Vec::new();
        while client.wants_write() {
            client.write_tls(&mut said).unwrap();
        }
        Self {
            stream: soon("a connection", tokio::net::TcpStream::connect(at))
                .await
                .unwrap(),
            client,
            said,
        }
    }

    /// Sends so much of what is to be said.
    async fn say(&mut self, count: usize) {
        let count = count.min(self.said.len());
        let now: Vec<u8> = self.said.drain(..count).collect();
        self.stream.write_all(&now).await.unwrap();
    }

    /// Reads until the server has shown its certificate.
    async fn hear(&mut self) {
        while self.client.peer_certificates().is_none() {
            let mut bytes = Vec::new();
            let count = soon("the server's words", self.stream.read_buf(&mut bytes))
                .await
                .unwrap();
            assert!(count > 0, "the server has hung up");
            let mut rest = &bytes[..];
            while !rest.is_empty() {
                self.client.read_tls(&mut rest).unwrap();
                self.client.process_new_packets().unwrap();
            }
        }
        while self.client.wants_write() {
            self.client.write_tls(&mut self.said).unwrap();
        }
    }

    fn shown(&self) -> rustls::pki_types::CertificateDer<'static> {
        self.client.peer_certificates().unwrap()[0].clone()
    }

    /// Ends the handshake and asks.
    async fn ask(mut self) -> String {
        use std::io::{Read as _, Write as _};
        self.client
            .writer()
            .write_all(b"GET / HTTP/1.1\r\nhost: shop.example\r\n\r\n")
            .unwrap();
        while self.client.wants_write() {
            self.client.write_tls(&mut self.said).unwrap();
        }
        self.say(usize::MAX).await;
        let mut answer = Vec::new();
        while !answer.ends_with(b"hello") {
            let mut bytes = Vec::new();
            let count = soon("an answer", self.stream.read_buf(&mut bytes)).await.unwrap();
            assert!(count > 0, "the server has hung up");
            let mut rest = &bytes[..];
            while !rest.is_empty() {
                self.client.read_tls(&mut rest).unwrap();
                let state = self.client.process_new_packets().unwrap();
                let mut plain = vec![0; state.plaintext_bytes_to_read()];
                self.client.reader().read_exact(&mut plain).unwrap();
                answer.extend(plain);
            }
            // Of TLS 1.2 the client has more to say before it may ask.
            while self.client.wants_write() {
                self.client.write_tls(&mut self.said).unwrap();
            }
            self.say(usize::MAX).await;
        }
        String::from_utf8(answer).unwrap()
    }
}

#[tokio::test]
async fn a_secret_that_rotates_in_the_middle_of_handshakes_breaks_none_of_them() {
    let authority = Authority::new("ca");
    let backend = Backend::named("hello").await;
    let harness = Harness::start();
    let mut present = authority.issue(&["shop.example"]);
    harness.put(ResourceType::Secret, "s", &present.secret("s")).await;
    let at = serve_tls(
        &harness,
        &backend,
        server_socket(common_by_sds("s", None, &["http/1.1"]), false),
        core::TrafficDirection::Outbound,
    )
    .await;
    for version in [&rustls::version::TLS13, &rustls::version::TLS12] {
        let config = authority.client().alpn(&["http/1.1"]).only(version).build();
        for cut in [1, 5, 6, 50, usize::MAX] {
            let next = authority.issue(&["shop.example"]);
            // One that has said a part of its hello, and one that has been shown the certificate.
            let mut early = Slow::connect(at, config.clone()).await;
            early.say(cut).await;
            let mut late = Slow::connect(at, config.clone()).await;
            late.say(usize::MAX).await;
            late.hear().await;
            assert_eq!(late.shown(), present.der().0[0]);
            harness.put(ResourceType::Secret, "s", &next.secret("s")).await;
            early.say(usize::MAX).await;
            early.hear().await;
            assert!(
                [present.der().0[0].clone(), next.der().0[0].clone()].contains(&early.shown()),
                "one or the other, whole"
            );
            assert!(early.ask().await.starts_with("HTTP/1.1 200 "));
            assert!(late.ask().await.starts_with("HTTP/1.1 200 "));
            present = next;
        }
    }
    assert_eq!(stat(&harness, "connection_error"), 0);
    drop(backend);
    nothing_is_left(&harness).await;
}

#[tokio::test]
async fn secrets_of_a_cluster_that_rotate_in_the_middle_of_its_handshakes_break_none_of_them() {
    let (authority, stranger) = (Authority::new("ca"), Authority::new("stranger"));
    let server = authority.issue(&["backend"]);
    let clients = ["one", "two", "three"].map(|name| authority.issue(&[&format!("spiffe://mesh/sa/{name}")]));
    let mut roots = rustls::RootCertStore::empty();
    use rustls::pki_types::pem::PemObject as _;
    roots
        .add(rustls::pki_types::CertificateDer::from_pem_slice(authority.pem.as_bytes()).unwrap())
        .unwrap();
    let (chain, key) = server.der();
    let verifier = rustls::server::WebPkiClientVerifier::builder_with_provider(Arc::new(roots), provider())
        .build()
        .unwrap();
    let config = rustls::ServerConfig::builder_with_provider(provider())
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_client_cert_verifier(verifier)
        .with_single_cert(chain, key)
        .unwrap();
    let config = Arc::new(config);
    // An endpoint that waits to be told to go on between the client's hello and its own; it says whom it has met.
    let socket = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let at = socket.local_addr().unwrap();
    let (greeted, mut greetings) = tokio::sync::mpsc::unbounded_channel();
    let task = tokio::spawn(async move {
        while let Ok((stream, _)) = socket.accept().await {
            let hello = tokio_rustls::LazyConfigAcceptor::new(rustls::server::Acceptor::default(), stream);
            let Ok(hello) = hello.await else { continue };
            let (go, gone_on) = tokio::sync::oneshot::channel::<()>();
            let (met, whom) = tokio::sync::oneshot::channel();
            let _ = greeted.send((go, whom));
            let _ = gone_on.await;
            // A client that does not believe the server goes away.
            let Ok(mut stream) = hello.into_stream(config.clone()).await else {
                continue;
            };
            let mut head = Vec::new();
            while !head.ends_with(b"\r\n\r\n")
                && stream.read_buf(&mut head).await.is_ok_and(|count| count > 0)
            {}
            let peer = stream
                .get_ref()
                .1
                .peer_certificates()
                .map(|chain| chain[0].to_vec());
            let _ = met.send(peer.unwrap());
            let answer = b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\nconnection: close\r\n\r\nok";
            let _ = stream.write_all(answer).await;
            let _ = stream.shutdown().await;
        }
    });
    let mut harness = Harness::start();
    let trust = |authority: &Authority| validation_secret("trust", authority.context());
    harness
        .put(ResourceType::Secret, "client", &clients[0].secret("client"))
        .await;
    harness
        .put(ResourceType::Secret, "trust", &trust(&authority))
        .await;
    let mut cluster = counted_cluster("c");
    cluster.transport_socket =
        client_socket(common_by_sds("client", Some("trust"), &["http/1.1"]), "backend");
    harness.put(ResourceType::Cluster, "c", &cluster).await;
    harness.endpoints("c", &[at]).await;
    let gate = harness.serve(vec![prefix_route("/", to_cluster("c"))]).await;
    // What is held as the handshake begins, what comes meanwhile, and whether the answer arrives.
    for (round, (next, believed, good)) in [
        (1, &stranger, true),
        (2, &authority, false),
        (2, &authority, true),
    ]
    .into_iter()
    .enumerate()
    {
        let asked = tokio::spawn(async move { get(gate, "/").await });
        let (go, whom) = soon("a hello", greetings.recv()).await.unwrap();
        harness
            .put(ResourceType::Secret, "client", &clients[next].secret("client"))
            .await;
        harness.put(ResourceType::Secret, "trust", &trust(believed)).await;
        go.send(()).unwrap();
        let (status, headers, _) = soon("an answer", asked).await.unwrap();
        if good {
            assert_eq!(status, 200, "round {round}");
            assert_eq!(
                soon("whom it met", whom).await.unwrap(),
                clients[round].der().0[0].to_vec(),
                "round {round}: the one that the handshake began with"
            );
        } else {
            assert_eq!(
                (status, headers["x-serin-response-flags"].to_str().unwrap()),
                (503, "UF")
            );
            let line = harness.line().await;
            let told = line["upstream_transport_failure_reason"].as_str().unwrap();
            assert!(told.contains("issuer"), "{line}");
        }
    }
    task.abort();
    nothing_is_left(&harness).await;
}
