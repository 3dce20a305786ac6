//! The start of a proxy whose runtime has layers by RTDS: what serves follows them from its first request on.

use serin_proxy::bootstrap::file;
use serin_proxy::config::store::Update;
use serin_proxy::control::xds::follow;
use serin_proxy::control::{Options, Proxy};
use serin_xds::ResourceType;
use serin_xds::client::Endpoint;
use serin_xds::pb::envoy::config::core::v3 as core;
use serin_xds::pb::envoy::service::runtime::v3 as runtime;
use serin_xds::pb::google::protobuf as google;
use std::sync::Arc;
use tokio_util::sync::CancellationToken;

use crate::fixture::*;
use crate::listener::tcp_chain;
use crate::scripted::{Link, Scripted, resource};

/// A proxy with a listener of its file and one layer, that follows a control plane.
struct Starting {
    control: Scripted,
    proxy: Arc<Proxy>,
    cancel: CancellationToken,
    following: tokio::task::JoinHandle<()>,
    _folder: tempfile::TempDir,
}

impl Starting {
    async fn with(patience: &str) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let control = Scripted::start(folder.path());
        let layers = format!(
            "layered_runtime: {{layers: [{{name: live, rtds_layer: {{name: mesh, rtds_config: {{ads: {{}}, \
             resource_api_version: V3{patience}}}}}}}]}}"
        );
        let plan = file::parse(&layers, 1).unwrap();
        let (proxy, _log) = Proxy::start(Options {
            concurrency: 1,
            ..plan.options
        })
        .unwrap();
        let listener = listener_of("own", core::TrafficDirection::Outbound, vec![tcp_chain("c")]);
        let body = prost::Message::encode_to_vec(&listener);
        let update = Update {
            name: "own",
            body: &body,
        };
        assert!(
            proxy
                .apply(ResourceType::Listener, &[update], &[])
                .await
                .is_empty()
        );
        assert_eq!(proxy.listener_address("own"), None, "it waits");
        let cancel = CancellationToken::new();
        let endpoint = Endpoint::Unix(control.socket.clone());
        let following = tokio::spawn(follow(proxy.clone(), endpoint, cancel.clone()));
        Self {
            control,
            proxy,
            cancel,
            following,
            _folder: folder,
        }
    }

    /// The stream, when the layer has been asked for, and nothing but it.
    async fn link(&mut self) -> Link {
        let mut link = self.control.link().await;
        link.subscribed(ResourceType::Runtime, "mesh").await;
        link
    }

    async fn goes_on(&self, link: &mut Link) {
        for resource_type in [ResourceType::Cluster, ResourceType::Listener] {
            link.request("a subscription", |request| {
                request.type_url == resource_type.type_url()
            })
            .await;
        }
        assert!(self.proxy.listener_address("own").is_some());
    }

    async fn end(self) {
        self.cancel.cancel();
        soon("the end", self.following).await.unwrap();
    }
}

fn layer(key: &str) -> runtime::Runtime {
    let value = google::Value {
        kind: Some(google::value::Kind::NumberValue(1.0)),
    };
    runtime::Runtime {
        name: "mesh".into(),
        layer: Some(google::Struct {
            fields: [(key.to_owned(), value)].into(),
        }),
    }
}

#[tokio::test]
async fn nothing_serves_and_nothing_else_is_asked_for_before_the_layers_of_the_runtime_are_here() {
    let mut starting = Starting::with("").await;
    let mut link = starting.link().await;
    // An answer that says nothing comes after whatever was asked for at the start.
    link.put(ResourceType::Runtime, Vec::new()).await;
    assert!(!link.has_asked_for(ResourceType::Cluster));
    assert!(!link.has_asked_for(ResourceType::Listener));
    assert_eq!(starting.proxy.listener_address("own"), None);
    let message = resource(ResourceType::Runtime, "mesh", "1", &layer("routes.new"));
    link.put(ResourceType::Runtime, vec![message]).await;
    starting.goes_on(&mut link).await;
    assert!(!starting.proxy.is_ready());
    for resource_type in [ResourceType::Cluster, ResourceType::Listener] {
        link.put(resource_type, Vec::new()).await;
    }
    assert!(starting.proxy.is_ready());
    starting.end().await;
}

#[tokio::test]
async fn a_layer_that_is_refused_or_does_not_exist_is_not_waited_for() {
    let mut starting = Starting::with("").await;
    let mut link = starting.link().await;
    let message = resource(ResourceType::Runtime, "mesh", "1", &layer("upstream.x"));
    let nonce = link.send(ResourceType::Runtime, vec![message], &[]);
    assert!(link.answer(&nonce).await.is_some());
    starting.goes_on(&mut link).await;
    starting.end().await;
    let mut starting = Starting::with("").await;
    let mut link = starting.link().await;
    let nonce = link.send(ResourceType::Runtime, Vec::new(), &["mesh"]);
    assert_eq!(link.answer(&nonce).await, None);
    starting.goes_on(&mut link).await;
    starting.end().await;
}

#[tokio::test]
async fn a_layer_that_does_not_come_in_its_time_is_not_waited_for_any_longer() {
    let mut starting = Starting::with(", initial_fetch_timeout: 0.05s").await;
    let mut link = starting.link().await;
    starting.goes_on(&mut link).await;
    // It is taken when it comes.
    let message = resource(ResourceType::Runtime, "mesh", "1", &layer("routes.new"));
    link.put(ResourceType::Runtime, vec![message]).await;
    starting.end().await;
}
