//! External processing: how services are called, and the time that they have.

use std::pin::Pin;
use std::sync::Arc;

use futures::Stream;
use parking_lot::Mutex;
use serin_xds::pb::envoy::extensions::filters::http::ext_proc::v3 as ext_proc;
use serin_xds::pb::envoy::extensions::filters::http::set_metadata::v3 as set_metadata;
use serin_xds::pb::envoy::service::ext_proc::v3 as service;
use service::external_processor_server::{ExternalProcessor, ExternalProcessorServer};
use service::processing_request;
use tonic::transport::Server;
use tonic::{Request as Call, Response as Reply, Status, Streaming};

use super::ext_proc::{filter, over_grpc, pass};
use super::services::{Served, serve, service_cluster};
use super::*;

/// Asks for time, and answers when it is told to.
struct Patient {
    asks: google::Duration,
    release: Arc<tokio::sync::Notify>,
    fields: Arc<Mutex<Vec<tonic::metadata::MetadataMap>>>,
    seen: Arc<Mutex<Vec<service::ProcessingRequest>>>,
}

#[tonic::async_trait]
impl ExternalProcessor for Patient {
    type ProcessStream = Pin<Box<dyn Stream<Item = Result<service::ProcessingResponse, Status>> + Send>>;

    async fn process(
        &self,
        call: Call<Streaming<service::ProcessingRequest>>,
    ) -> Result<Reply<Self::ProcessStream>, Status> {
        self.fields.lock().push(call.metadata().clone());
        let (sender, receiver) = tokio::sync::mpsc::channel(4);
        let (asks, release, seen) = (self.asks, self.release.clone(), self.seen.clone());
        let mut questions = call.into_inner();
        tokio::spawn(async move {
            while let Ok(Some(question)) = questions.message().await {
                let path = match &question.request {
                    Some(processing_request::Request::RequestHeaders(head)) => {
                        let fields = &head.headers.as_ref().unwrap().headers;
                        let found = fields.iter().find(|field| field.key == ":path");
                        found.map(|field| field.raw_value.clone())
                    }
                    _ => None,
                };
                seen.lock().push(question.clone());
                match path.as_deref() {
                    Some(b"/never") => continue,
                    Some(b"/long") => {
                        let more = service::ProcessingResponse {
                            override_message_timeout: Some(asks),
                            ..Default::default()
                        };
                        let _ = sender.send(more).await;
                        release.notified().await;
                    }
                    _ => {}
                }
                let _ = sender.send(pass(&question).unwrap()).await;
            }
        });
        let answers = futures::stream::unfold(receiver, |mut receiver| async move {
            receiver.recv().await.map(|answered| (Ok(answered), receiver))
        });
        Ok(Reply::new(Box::pin(answers)))
    }
}

async fn patient(
    asks: Option<google::Duration>,
    message: &ext_proc::ExternalProcessor,
    filters: Vec<hcm::HttpFilter>,
    hosts: Vec<route::VirtualHost>,
) -> (Harness, Backend, SocketAddr, Patient, Served) {
    let processor = || Patient {
        asks: asks.unwrap_or_default(),
        release: Arc::default(),
        fields: Arc::default(),
        seen: Arc::default(),
    };
    let ours = processor();
    let theirs = Patient {
        asks: ours.asks,
        release: ours.release.clone(),
        fields: ours.fields.clone(),
        seen: ours.seen.clone(),
    };
    let (at_service, server) =
        serve(Server::builder().add_service(ExternalProcessorServer::new(theirs))).await;
    let chain = filters.into_iter().chain([filter(message)]).collect();
    let (harness, backend, at) = served(chain, hosts).await;
    service_cluster(&harness, at_service).await;
    (harness, backend, at, ours, server)
}

#[tokio::test]
async fn a_processor_gets_the_time_that_it_asks_for_once_and_up_to_the_limit() {
    let filter = ext_proc::ExternalProcessor {
        message_timeout: millis(400),
        max_message_timeout: millis(60_000),
        ..over_grpc()
    };
    let (harness, _backend, at, service, _server) = patient(millis(60_000), &filter, vec![], to_c()).await;
    let long = tokio::spawn(async move { get(at, "/long").await.0 });
    soon("the extension", async {
        while harness.counter("envoy_http_ext_proc_override_message_timeout_received", &[]) < 1.0 {
            tokio::task::yield_now().await;
        }
    })
    .await;
    // One that began later and asks for nothing is over: so the first one's own time is over, too.
    assert_eq!(get(at, "/never").await.0, 504);
    service.release.notify_one();
    assert_eq!(long.await.unwrap(), 200);
    // Asking for more than the limit changes nothing.
    let (harness, _backend, at, service, _server) = patient(
        millis(60_001),
        &ext_proc::ExternalProcessor {
            message_timeout: millis(5000),
            ..filter
        },
        vec![],
        to_c(),
    )
    .await;
    service.release.notify_one();
    assert_eq!(get(at, "/long").await.0, 200);
    let ignored = harness.counter("envoy_http_ext_proc_override_message_timeout_ignored", &[]);
    assert_eq!(ignored, 1.0);
}

#[tokio::test]
async fn a_route_adds_fields_to_the_call_and_says_what_metadata_the_processor_is_told() {
    let mut own = prefix_route("/own", to_cluster("c"));
    let untyped = |name: &str| {
        Some(ext_proc::metadata_options::MetadataNamespaces {
            untyped: vec![name.into()],
            ..Default::default()
        })
    };
    let field = |key: &str, value: &str| core::HeaderValue {
        key: key.into(),
        value: value.into(),
        ..Default::default()
    };
    own.typed_per_filter_config = [(
        "envoy.filters.http.ext_proc".to_owned(),
        any(&ext_proc::ExtProcPerRoute {
            r#override: Some(ext_proc::ext_proc_per_route::Override::Overrides(
                ext_proc::ExtProcOverrides {
                    grpc_initial_metadata: vec![field("x-tenant", "blue"), field("x-more", "1")],
                    metadata_options: Some(ext_proc::MetadataOptions {
                        forwarding_namespaces: untyped("noted"),
                        ..Default::default()
                    }),
                    ..Default::default()
                },
            )),
        }),
    )]
    .into();
    let hosts = vec![host("all", "*", vec![own, prefix_route("/", to_cluster("c"))])];
    let mut message = over_grpc();
    message.grpc_service.as_mut().unwrap().initial_metadata =
        vec![field("x-tenant", "red"), field("x-kept", "2")];
    let notes = set_metadata::Config {
        metadata: vec![set_metadata::Metadata {
            metadata_namespace: "noted".into(),
            value: Some(google::Struct {
                fields: [("a".to_owned(), google::Value::default())].into(),
            }),
            ..Default::default()
        }],
        ..Default::default()
    };
    let notes = http_filter("envoy.filters.http.set_metadata", Some(any(&notes)));
    let (_harness, _backend, at, service, _server) = patient(None, &message, vec![notes], hosts).await;
    assert_eq!(get(at, "/own").await.0, 200);
    assert_eq!(get(at, "/").await.0, 200);
    let calls = service.fields.lock();
    let value = |call: usize, name: &str| {
        calls[call]
            .get(name)
            .map(|value| value.to_str().unwrap().to_owned())
    };
    let values = |call| ["x-tenant", "x-more", "x-kept"].map(|name| value(call, name).unwrap_or_default());
    assert_eq!(values(0), ["blue", "1", "2"]);
    assert_eq!(values(1), ["red", "", "2"]);
    let seen = service.seen.lock();
    let told = |index: usize| {
        seen[index]
            .metadata_context
            .clone()
            .unwrap_or_default()
            .filter_metadata
    };
    assert!(told(0).contains_key("noted") && told(1).contains_key("noted"));
    assert!(told(2).is_empty());
}
