//! Secrets from services of their own (`api_config_source`), as a stock Istio agent serves them, and TLS towards the control
//! plane.

use std::collections::BTreeMap;
use std::path::Path;
use std::pin::Pin;

use futures::Stream;
use prost::Message;
use serin_proxy::bootstrap::file;
use serin_proxy::control::run::{ControlPlane, apply_static};
use serin_proxy::control::xds::follow;
use serin_proxy::control::{Proxy, dial, sds};
use serin_xds::ResourceType;
use serin_xds::pb::envoy::config::core::v3 as core;
use serin_xds::pb::envoy::extensions::transport_sockets::tls::v3 as tls;
use serin_xds::pb::envoy::service::discovery::v3::{
    DeltaDiscoveryRequest, DeltaDiscoveryResponse, DiscoveryRequest, DiscoveryResponse, Resource,
};
use serin_xds::pb::envoy::service::secret::v3::secret_discovery_service_server::{
    SecretDiscoveryService, SecretDiscoveryServiceServer,
};
use serin_xds::pb::google::protobuf as google;
use tokio::net::UnixListener;
use tokio::sync::{mpsc, watch};
use tokio_util::sync::CancellationToken;
use tonic::{Request, Response, Status, Streaming};

use crate::certificates::{Authority, Issued, server_socket, validation_secret};
use crate::fixture::*;
use crate::scripted::{Scripted, resource};
use crate::tls::tls_get;
use crate::tls_upstream::Front;

type Secrets = BTreeMap<String, tls::Secret>;
type Reply<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

fn packed(secret: &tls::Secret) -> google::Any {
    google::Any {
        type_url: ResourceType::Secret.type_url().into(),
        value: secret.encode_to_vec(),
    }
}

/// Answers each request and each change with the secrets that were asked for, in both variants of the protocol.
#[derive(Clone)]
struct Service {
    secrets: watch::Receiver<Secrets>,
    /// What was refused, and names that were asked for.
    refused: mpsc::UnboundedSender<String>,
}

#[tonic::async_trait]
impl SecretDiscoveryService for Service {
    type StreamSecretsStream = Reply<DiscoveryResponse>;
    type DeltaSecretsStream = Reply<DeltaDiscoveryResponse>;

    async fn stream_secrets(
        &self,
        request: Request<Streaming<DiscoveryRequest>>,
    ) -> Result<Response<Self::StreamSecretsStream>, Status> {
        let (mut requests, mut secrets) = (request.into_inner(), self.secrets.clone());
        let refused = self.refused.clone();
        let (sender, mut responses) = mpsc::unbounded_channel();
        tokio::spawn(async move {
            let (mut names, mut nonce) = (Vec::new(), 0);
            loop {
                tokio::select! {
                    request = requests.message() => {
                        let Ok(Some(request)) = request else { return };
                        if let Some(error) = request.error_detail {
                            let _ = refused.send(error.message);
                        }
                        if names == request.resource_names {
                            continue;
                        }
                        names = request.resource_names;
                    }
                    changed = secrets.changed() => if changed.is_err() { return },
                }
                nonce += 1;
                let held = secrets.borrow_and_update().clone();
                let _ = sender.send(Ok(DiscoveryResponse {
                    version_info: nonce.to_string(),
                    nonce: nonce.to_string(),
                    type_url: ResourceType::Secret.type_url().into(),
                    resources: names
                        .iter()
                        .filter_map(|name| held.get(name))
                        .map(packed)
                        .collect(),
                    ..Default::default()
                }));
            }
        });
        Ok(Response::new(Box::pin(futures::stream::poll_fn(move |cx| {
            responses.poll_recv(cx)
        }))))
    }

    async fn delta_secrets(
        &self,
        request: Request<Streaming<DeltaDiscoveryRequest>>,
    ) -> Result<Response<Self::DeltaSecretsStream>, Status> {
        let (mut requests, mut secrets) = (request.into_inner(), self.secrets.clone());
        let (sender, mut responses) = mpsc::unbounded_channel();
        tokio::spawn(async move {
            let (mut names, mut version) = (Vec::new(), 0);
            loop {
                tokio::select! {
                    request = requests.message() => {
                        let Ok(Some(request)) = request else { return };
                        if request.resource_names_subscribe.is_empty() {
                            continue;
                        }
                        names.extend(request.resource_names_subscribe);
                    }
                    changed = secrets.changed() => if changed.is_err() { return },
                }
                version += 1;
                let held = secrets.borrow_and_update().clone();
                let of = |name: &String| {
                    held.get(name).map(|secret| Resource {
                        name: name.clone(),
                        version: version.to_string(),
                        resource: Some(packed(secret)),
                        ..Default::default()
                    })
                };
                let _ = sender.send(Ok(DeltaDiscoveryResponse {
                    nonce: version.to_string(),
                    type_url: ResourceType::Secret.type_url().into(),
                    resources: names.iter().filter_map(of).collect(),
                    ..Default::default()
                }));
            }
        });
        Ok(Response::new(Box::pin(futures::stream::poll_fn(move |cx| {
            responses.poll_recv(cx)
        }))))
    }

    async fn fetch_secrets(
        &self,
        _: Request<DiscoveryRequest>,
    ) -> Result<Response<DiscoveryResponse>, Status> {
        Err(Status::unimplemented("streams only"))
    }
}

/// An agent that serves secrets on a Unix socket.
struct Agent {
    secrets: watch::Sender<Secrets>,
    refused: mpsc::UnboundedReceiver<String>,
    task: tokio::task::JoinHandle<()>,
}

impl Drop for Agent {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl Agent {
    fn start(socket: &Path) -> Self {
        let (secrets, receiver) = watch::channel(Secrets::new());
        let (sender, refused) = mpsc::unbounded_channel();
        let listener = UnixListener::bind(socket).unwrap();
        let incoming = futures::stream::poll_fn(move |cx| {
            listener
                .poll_accept(cx)
                .map(|accepted| Some(accepted.map(|(stream, _)| stream)))
        });
        let service = Service {
            secrets: receiver,
            refused: sender,
        };
        let router =
            tonic::transport::Server::builder().add_service(SecretDiscoveryServiceServer::new(service));
        let task = tokio::spawn(async move {
            let _ = router.serve_with_incoming(incoming).await;
        });
        Self {
            secrets,
            refused,
            task,
        }
    }

    fn put(&self, secret: tls::Secret) {
        self.secrets.send_modify(|secrets| {
            secrets.insert(secret.name.clone(), secret);
        });
    }
}

/// As istiod has it in every cluster of a mesh with mutual TLS.
fn by_agent(name: &str, delta: bool) -> tls::SdsSecretConfig {
    use core::api_config_source::ApiType;
    let kind = if delta { ApiType::DeltaGrpc } else { ApiType::Grpc };
    let source = core::ApiConfigSource {
        api_type: kind as i32,
        transport_api_version: core::ApiVersion::V3 as i32,
        grpc_services: vec![core::GrpcService {
            target_specifier: Some(core::grpc_service::TargetSpecifier::EnvoyGrpc(
                core::grpc_service::EnvoyGrpc {
                    cluster_name: "sds-grpc".into(),
                    ..Default::default()
                },
            )),
            ..Default::default()
        }],
        ..Default::default()
    };
    tls::SdsSecretConfig {
        name: name.into(),
        sds_config: Some(core::ConfigSource {
            config_source_specifier: Some(core::config_source::ConfigSourceSpecifier::ApiConfigSource(
                source,
            )),
            ..Default::default()
        }),
    }
}

fn context_by_agent(delta: bool) -> tls::CommonTlsContext {
    use tls::common_tls_context::ValidationContextType;
    tls::CommonTlsContext {
        tls_certificate_sds_secret_configs: vec![by_agent("default", delta)],
        validation_context_type: Some(ValidationContextType::ValidationContextSdsSecretConfig(by_agent(
            "ROOTCA", delta,
        ))),
        ..Default::default()
    }
}

async fn agent_cluster(harness: &Harness, socket: &Path) {
    let mut cluster = speaking_h2(eds_cluster("sds-grpc"));
    cluster.cluster_discovery_type = None;
    let mut endpoints = assignment("sds-grpc", &[("127.0.0.1:1".parse().unwrap(), "")]);
    let pipe = core::Address {
        address: Some(core::address::Address::Pipe(core::Pipe {
            path: socket.display().to_string(),
            mode: 0,
        })),
    };
    let endpoint = &mut endpoints.endpoints[0].lb_endpoints[0];
    if let Some(serin_xds::pb::envoy::config::endpoint::v3::lb_endpoint::HostIdentifier::Endpoint(inner)) =
        &mut endpoint.host_identifier
    {
        inner.address = Some(pipe);
    }
    cluster.load_assignment = Some(endpoints);
    harness.put(ResourceType::Cluster, "sds-grpc", &cluster).await;
}

#[tokio::test]
async fn certificates_and_roots_come_from_the_agents_service_and_rotate_in_both_variants() {
    for delta in [false, true] {
        let directory = tempfile::tempdir().unwrap();
        let socket = directory.path().join("agent.sock");
        let authority = Authority::new("ca");
        let mut agent = Agent::start(&socket);
        let harness = Harness::start();
        agent_cluster(&harness, &socket).await;
        let cancel = CancellationToken::new();
        let following = tokio::spawn(sds::run(harness.proxy.clone(), cancel.clone()));
        let backend = Backend::named("b").await;
        harness.cluster("c", &[backend.address]).await;
        harness.route_all_to("c").await;
        let mut chain = http_chain(&manager("80"));
        chain.transport_socket = server_socket(context_by_agent(delta), true);
        let listener = listener_of("l", core::TrafficDirection::Inbound, vec![chain]);
        harness.put(ResourceType::Listener, "l", &listener).await;
        assert_eq!(
            harness.proxy.listener_address("l"),
            None,
            "it waits for its secrets"
        );
        agent.put(authority.issue(&["shop.example"]).secret("default"));
        agent.put(validation_secret("ROOTCA", authority.context()));
        let at = soon("the listener", async {
            loop {
                if let Some(at) = harness.proxy.listener_address("l") {
                    return at;
                }
                tokio::task::yield_now().await;
            }
        })
        .await;
        let peer = authority.issue(&["spiffe://cluster.local/ns/edge/sa/client"]);
        let client = authority.client().identity(&peer).build();
        assert_eq!(tls_get(at, &client, "shop.example", "/").await.unwrap().0, 200);
        let counted = |what: &str| {
            let name = format!("envoy_sds_update_{what}");
            harness.counter(&name, &[("envoy_xds_resource_name", "default")])
        };
        // A bad one is refused, and the last good one stays.
        let other = Authority::new("other");
        let mut mixed = other.issue(&["shop.example"]);
        mixed.key = authority.issue(&["x"]).key;
        agent.put(mixed.secret("default"));
        if !delta {
            let reason = soon("the refusal", agent.refused.recv()).await.unwrap();
            assert!(reason.contains("private_key"), "{reason}");
            let shown = ["attempt", "success", "rejected"].map(counted);
            assert_eq!(shown, [4.0, 1.0, 1.0], "asked once, answered twice, refused once");
        }
        assert_eq!(tls_get(at, &client, "shop.example", "/").await.unwrap().0, 200);
        // Rotation to another authority on both sides.
        agent.put(other.issue(&["shop.example"]).secret("default"));
        agent.put(validation_secret("ROOTCA", other.context()));
        let peer = other.issue(&["spiffe://cluster.local/ns/edge/sa/client"]);
        let client = other.client().identity(&peer).build();
        let rotated = async {
            while tls_get(at, &client, "shop.example", "/").await.is_err() {
                tokio::task::yield_now().await;
            }
        };
        soon("the new certificate", Box::pin(rotated)).await;
        // Nobody refers to it any more: the service is left.
        harness.remove(ResourceType::Listener, "l").await;
        soon("the end of its use", async {
            while !harness.proxy.store(|store| store.secrets().services()).is_empty() {
                tokio::task::yield_now().await;
            }
        })
        .await;
        cancel.cancel();
        soon("the end", following).await.unwrap();
    }
}

#[tokio::test]
async fn a_service_of_secrets_that_is_away_is_tried_again_and_sources_by_rest_are_refused() {
    let directory = tempfile::tempdir().unwrap();
    let socket = directory.path().join("agent.sock");
    let authority = Authority::new("ca");
    let harness = Harness::start();
    agent_cluster(&harness, &socket).await;
    let cancel = CancellationToken::new();
    let following = tokio::spawn(sds::run(harness.proxy.clone(), cancel.clone()));
    let backend = Backend::named("b").await;
    let serving = serve_by_agent(&harness, &backend);
    serving.await;
    let agent = Agent::start(&socket);
    agent.put(authority.issue(&["shop.example"]).secret("default"));
    agent.put(validation_secret("ROOTCA", authority.context()));
    soon("the listener", async {
        while harness.proxy.listener_address("l").is_none() {
            tokio::task::yield_now().await;
        }
    })
    .await;
    let mut rest = by_agent("default", false);
    if let Some(core::ConfigSource {
        config_source_specifier: Some(core::config_source::ConfigSourceSpecifier::ApiConfigSource(source)),
        ..
    }) = &mut rest.sds_config
    {
        source.api_type = core::api_config_source::ApiType::Rest as i32;
    }
    let context = tls::CommonTlsContext {
        tls_certificate_sds_secret_configs: vec![rest],
        ..Default::default()
    };
    let mut chain = http_chain(&manager("80"));
    chain.transport_socket = server_socket(context, false);
    let listener = listener_of("m", core::TrafficDirection::Inbound, vec![chain]);
    let refused = harness
        .try_put(ResourceType::Listener, "m", &listener)
        .await
        .unwrap();
    assert!(
        refused.contains("api_config_source.api_type: only GRPC and DELTA_GRPC"),
        "{refused}"
    );
    cancel.cancel();
    soon("the end", following).await.unwrap();
}

async fn serve_by_agent(harness: &Harness, backend: &Backend) {
    harness.cluster("c", &[backend.address]).await;
    harness.route_all_to("c").await;
    let mut chain = http_chain(&manager("80"));
    chain.transport_socket = server_socket(context_by_agent(false), true);
    let listener = listener_of("l", core::TrafficDirection::Inbound, vec![chain]);
    harness.put(ResourceType::Listener, "l", &listener).await;
}

fn bootstrap(control: std::net::SocketAddr, client: &Issued, root: &Authority, name: &str) -> String {
    format!(
        "node: {{id: n, cluster: c}}
dynamic_resources:
  ads_config: {{api_type: DELTA_GRPC, grpc_services: [{{envoy_grpc: {{cluster_name: xds}}}}]}}
  cds_config: {{ads: {{}}}}
  lds_config: {{ads: {{}}}}
static_resources:
  clusters:
  - name: xds
    type: STATIC
    connect_timeout: 5s
    http2_protocol_options: {{}}
    transport_socket:
      name: envoy.transport_sockets.tls
      typed_config:
        \"@type\": type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.UpstreamTlsContext
        sni: control.example
        common_tls_context:
          tls_certificates: [{{certificate_chain: {{inline_string: {:?}}}, private_key: {{inline_string: {:?}}}}}]
          validation_context:
            trusted_ca: {{inline_string: {:?}}}
            match_typed_subject_alt_names: [{{san_type: URI, matcher: {{exact: \"{name}\"}}}}]
    load_assignment:
      cluster_name: xds
      endpoints: [{{lb_endpoints: [{{endpoint: {{address: {{socket_address: {{address: 127.0.0.1, port_value: {}}}}}}}}}]}}]
",
        client.chain,
        client.key,
        root.pem,
        control.port()
    )
}

#[tokio::test]
async fn the_control_plane_is_reached_with_mutual_tls_and_must_be_who_the_bootstrap_says() {
    const CONTROL: &str = "spiffe://cluster.local/ns/istio-system/sa/istiod";
    let authority = Authority::new("ca");
    let (mut control, behind) = Scripted::start_tcp().await;
    let mut front = Front::start(
        &authority.issue(&["control.example", CONTROL]),
        Some(&authority),
        &["h2"],
        behind,
    )
    .await;
    let client = authority.issue(&["spiffe://cluster.local/ns/edge/sa/gate"]);
    for (expected, right) in [("spiffe://cluster.local/ns/x/sa/other", false), (CONTROL, true)] {
        let plan = file::parse(&bootstrap(front.address, &client, &authority, expected), 1).unwrap();
        let Some(ControlPlane::Cluster(name)) = plan.control_plane else {
            panic!("an address without its TLS");
        };
        let (proxy, _log) = Proxy::start(plan.options).unwrap();
        apply_static(&proxy, &plan.static_resources).await.unwrap();
        let cancel = CancellationToken::new();
        let endpoint = dial::cluster(&proxy, &name);
        let following = tokio::spawn(follow(proxy.clone(), endpoint, cancel.clone()));
        if right {
            let mut link = control.link().await;
            let backend = Backend::named("b").await;
            let cluster = resource(ResourceType::Cluster, "c", "1", &eds_cluster("c"));
            link.put(ResourceType::Cluster, vec![cluster]).await;
            link.subscribed(ResourceType::Endpoints, "c").await;
            let endpoints = assignment("c", &[(backend.address, "")]);
            let endpoints = resource(ResourceType::Endpoints, "c", "1", &endpoints);
            link.put(ResourceType::Endpoints, vec![endpoints]).await;
            let mut met = front.next().await;
            // The attempt that did not like the server's name came first.
            while met.peer.is_none() {
                met = front.next().await;
            }
            assert_eq!(met.server_name.as_deref(), Some("control.example"));
        } else {
            let failed = || {
                proxy.store(|store| {
                    store
                        .secrets()
                        .all_stats()
                        .flat_map(|(_, _, stats)| stats.read())
                        .any(|(name, value)| name.ends_with("fail_verify_san") && value > 0)
                })
            };
            soon("the refusal of the server", async {
                while !failed() {
                    tokio::task::yield_now().await;
                }
            })
            .await;
            assert!(!proxy.is_ready());
        }
        cancel.cancel();
        soon("the end", following).await.unwrap();
        proxy.stop().await;
    }
}

#[tokio::test]
async fn another_endpoint_of_the_control_plane_is_tried_when_one_is_away() {
    let (mut control, address) = Scripted::start_tcp().await;
    let closed = closed_port().await;
    let text = format!(
        "dynamic_resources:
  ads_config: {{api_type: DELTA_GRPC, grpc_services: [{{envoy_grpc: {{cluster_name: xds}}}}]}}
static_resources:
  clusters:
  - name: xds
    type: STATIC
    load_assignment:
      cluster_name: xds
      endpoints:
      - lb_endpoints:
        - endpoint: {{address: {{socket_address: {{address: {}, port_value: {}}}}}}}
        - endpoint: {{address: {{socket_address: {{address: 127.0.0.1, port_value: {}}}}}}}
",
        closed.ip(),
        closed.port(),
        address.port()
    );
    let plan = file::parse(&text, 1).unwrap();
    let Some(ControlPlane::Cluster(name)) = plan.control_plane else {
        panic!("one of two addresses");
    };
    let (proxy, _log) = Proxy::start(plan.options).unwrap();
    apply_static(&proxy, &plan.static_resources).await.unwrap();
    let cancel = CancellationToken::new();
    let following = tokio::spawn(follow(
        proxy.clone(),
        dial::cluster(&proxy, &name),
        cancel.clone(),
    ));
    let mut link = control.link().await;
    link.subscribed(ResourceType::Cluster, "*").await;
    cancel.cancel();
    soon("the end", following).await.unwrap();
}
