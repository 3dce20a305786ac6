//! A control server that misbehaves on the transport, after one that did not: whatever it does, requests are served as
//! before, nothing piles up, and the next good server is followed.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use bytes::Bytes;
use http::Response;
use prost::Message as _;
use serin_proxy::control::xds::follow;
use serin_xds::ResourceType;
use serin_xds::client::Endpoint;
use serin_xds::pb::envoy::config::core::v3 as core;
use serin_xds::pb::envoy::config::route::v3 as route;
use serin_xds::pb::envoy::service::discovery::v3::{DeltaDiscoveryResponse, Resource};
use serin_xds::pb::google::protobuf as google;
use tokio::io::AsyncWriteExt;
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;
use tonic::Status;

use crate::fixture::*;
use crate::scripted::{Link, Scripted, resource};

/// What is done to each connection.
#[derive(Clone, Copy, Debug)]
enum Misdeed {
    /// Bytes that are no HTTP/2.
    Garbage,
    /// HTTP/2, and then bytes that are none.
    GarbageAfterAWhile,
    /// The stream is opened with an HTTP status and no gRPC.
    NoGrpc,
    /// Half a message, then the connection is gone.
    HalfAMessage,
    /// Half a message, then the stream is reset.
    Reset,
    /// A message of which a length of 200 MB is announced.
    Enormous,
    /// A message that says that it is compressed and is not.
    FalselyCompressed,
    /// A whole message that is no response.
    NoResponse,
    /// The stream is opened, and nothing is ever said.
    Silent,
}

/// gRPC's frame around a message.
fn framed(compressed: u8, length: u32, bytes: &[u8]) -> Bytes {
    let mut out = vec![compressed];
    out.extend(length.to_be_bytes());
    out.extend(bytes);
    out.into()
}

async fn commit(misdeed: Misdeed, mut stream: UnixStream) {
    if matches!(misdeed, Misdeed::Garbage) {
        // The client may have gone already.
        let _ = stream.write_all(&[0xff; 4096]).await;
        return;
    }
    let (near, far) = tokio::io::duplex(1 << 16);
    // Between the two ends, so that bytes can be put into the connection that no library would write.
    let (inject, mut injected) = mpsc::channel::<Vec<u8>>(1);
    // Ends with this function, whatever it does.
    let mut pipe = tokio::task::JoinSet::new();
    pipe.spawn(async move {
        let (mut far, mut stream) = (far, stream);
        tokio::select! {
            _ = tokio::io::copy_bidirectional(&mut far, &mut stream) => return,
            bytes = injected.recv() => if let Some(bytes) = bytes {
                let _ = stream.write_all(&bytes).await;
            },
        }
        // Read to the client's end: closing with bytes unread would be a reset, and hide what was written.
        let _ = tokio::io::copy(&mut stream, &mut tokio::io::sink()).await;
    });
    let Ok(mut connection) = h2::server::handshake(near).await else {
        return;
    };
    let mut open = Vec::new();
    while let Some(Ok((request, mut respond))) = connection.accept().await {
        let status = if matches!(misdeed, Misdeed::NoGrpc) {
            404
        } else {
            200
        };
        let mut head = Response::builder().status(status);
        if !matches!(misdeed, Misdeed::NoGrpc) {
            head = head.header("content-type", "application/grpc");
        }
        let end = matches!(misdeed, Misdeed::NoGrpc);
        let Ok(mut body) = respond.send_response(head.body(()).unwrap(), end) else {
            return;
        };
        let good = DeltaDiscoveryResponse {
            type_url: ResourceType::Cluster.type_url().into(),
            nonce: "1".into(),
            removed_resources: vec!["c".into()],
            ..Default::default()
        }
        .encode_to_vec();
        let half = framed(0, good.len() as u32, &good[..good.len() / 2]);
        let sent = match misdeed {
            Misdeed::Garbage | Misdeed::NoGrpc | Misdeed::Silent => Ok(()),
            Misdeed::GarbageAfterAWhile => {
                let _ = inject.send(vec![0xff; 4096]).await;
                Ok(())
            }
            Misdeed::HalfAMessage => body.send_data(half, false),
            Misdeed::Reset => body
                .send_data(half, false)
                .map(|()| body.send_reset(h2::Reason::INTERNAL_ERROR)),
            Misdeed::Enormous => body.send_data(framed(0, 200 << 20, &good), false),
            Misdeed::FalselyCompressed => body.send_data(framed(1, good.len() as u32, &good), false),
            Misdeed::NoResponse => body.send_data(framed(0, 64, &[0xff; 64]), false),
        };
        if sent.is_err() {
            return;
        }
        if matches!(misdeed, Misdeed::HalfAMessage) {
            // Written, and the connection is gone.
            connection.graceful_shutdown();
            let flushed = std::future::poll_fn(|cx| {
                let _ = connection.poll_accept(cx);
                std::task::Poll::Ready(())
            });
            flushed.await;
            tokio::task::yield_now().await;
            pipe.abort_all();
            return;
        }
        open.push((request, respond, body));
    }
}

/// The server; it says when it has done it again.
struct Rogue {
    done: mpsc::UnboundedReceiver<()>,
    task: tokio::task::JoinHandle<()>,
}

impl Drop for Rogue {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl Rogue {
    fn start(socket: &Path, misdeed: Misdeed) -> Self {
        let listener = UnixListener::bind(socket).unwrap();
        let (sender, done) = mpsc::unbounded_channel();
        let task = tokio::spawn(async move {
            let mut running = tokio::task::JoinSet::new();
            while let Ok((stream, _)) = listener.accept().await {
                let _ = sender.send(());
                running.spawn(commit(misdeed, stream));
            }
        });
        Self { done, task }
    }
}

/// A proxy with one route to a backend, told by a good server.
struct Told {
    harness: Harness,
    backend: Backend,
    at: std::net::SocketAddr,
    socket: PathBuf,
    cancel: CancellationToken,
    following: tokio::task::JoinHandle<()>,
    directory: tempfile::TempDir,
}

fn listener() -> serin_xds::pb::envoy::config::listener::v3::Listener {
    listener_of(
        "l",
        core::TrafficDirection::Outbound,
        vec![http_chain(&manager("80"))],
    )
}

fn routes(cluster: &str) -> route::RouteConfiguration {
    route::RouteConfiguration {
        name: "80".into(),
        virtual_hosts: vec![host("all", "*", vec![prefix_route("/", to_cluster(cluster))])],
        ..Default::default()
    }
}

/// A cluster with its endpoint in it.
fn whole(name: &str, version: &str, backend: std::net::SocketAddr) -> Resource {
    let mut cluster = eds_cluster(name);
    cluster.cluster_discovery_type = None;
    cluster.load_assignment = Some(assignment(name, &[(backend, "")]));
    resource(ResourceType::Cluster, name, version, &cluster)
}

impl Told {
    async fn start() -> (Self, Scripted, Link) {
        let directory = tempfile::tempdir().unwrap();
        let mut control = Scripted::start(directory.path());
        let harness = Harness::start();
        let cancel = CancellationToken::new();
        let socket = control.socket.clone();
        let following = tokio::spawn(follow(
            harness.proxy.clone(),
            Endpoint::Unix(socket.clone()),
            cancel.clone(),
        ));
        let backend = Backend::named("b").await;
        let mut link = control.link().await;
        link.put(ResourceType::Cluster, vec![whole("c", "1", backend.address)])
            .await;
        let message = resource(ResourceType::Listener, "l", "1", &listener());
        link.put(ResourceType::Listener, vec![message]).await;
        link.subscribed(ResourceType::Route, "80").await;
        let message = resource(ResourceType::Route, "80", "1", &routes("c"));
        link.put(ResourceType::Route, vec![message]).await;
        let at = harness.proxy.listener_address("l").unwrap();
        assert_eq!(get(at, "/").await.2, "b");
        let told = Self {
            harness,
            backend,
            at,
            socket,
            cancel,
            following,
            directory,
        };
        (told, control, link)
    }

    /// Requests are served as before.
    async fn serves(&self) {
        let (status, _, body) = get(self.at, "/").await;
        assert_eq!((status, &*body), (200, "b"));
        assert!(self.harness.proxy.is_ready());
    }

    /// The end of it: nothing is left running.
    async fn ends(self) {
        self.cancel.cancel();
        soon("the follower's end", self.following).await.unwrap();
        drop(self.backend);
        // The proxy is held by nobody else any more.
        assert_eq!(Arc::strong_count(&self.harness.proxy), 1);
        drop(self.directory);
    }
}

/// A good server, then one that commits the misdeed on two connections, then a good one again.
async fn survives(misdeed: Misdeed) {
    let (told, control, link) = Told::start().await;
    drop((control, link));
    std::fs::remove_file(&told.socket).unwrap();
    let mut rogue = Rogue::start(&told.socket, misdeed);
    let tasks = told.harness.proxy.tasks().await;
    // A silent server keeps the one stream that it has.
    let times = if matches!(misdeed, Misdeed::Silent) { 1 } else { 2 };
    for _ in 0..times {
        soon("the misdeed", rogue.done.recv()).await.unwrap();
        told.serves().await;
    }
    assert!(
        told.harness.proxy.tasks().await <= tasks + 1,
        "tasks of the workers pile up"
    );
    drop(rogue);
    std::fs::remove_file(&told.socket).unwrap();
    let mut control = Scripted::start(told.directory.path());
    let mut link = control.link().await;
    // What is held is stated: nothing was lost or taken from what the other one said.
    let request = link.subscribed(ResourceType::Cluster, "*").await;
    assert_eq!(
        request.initial_resource_versions.get("c").map(String::as_str),
        Some("1")
    );
    let other = Backend::named("other").await;
    link.put(ResourceType::Cluster, vec![whole("c", "2", other.address)])
        .await;
    assert_eq!(get(told.at, "/").await.2, "other");
    told.ends().await;
}

#[tokio::test]
async fn bytes_that_are_no_http2_change_nothing() {
    survives(Misdeed::Garbage).await;
    survives(Misdeed::GarbageAfterAWhile).await;
}

#[tokio::test]
async fn an_answer_that_is_no_grpc_changes_nothing() {
    survives(Misdeed::NoGrpc).await;
}

#[tokio::test]
async fn half_a_message_changes_nothing() {
    survives(Misdeed::HalfAMessage).await;
    survives(Misdeed::Reset).await;
}

#[tokio::test]
async fn an_enormous_message_is_not_read() {
    survives(Misdeed::Enormous).await;
}

#[tokio::test]
async fn messages_that_cannot_be_read_change_nothing() {
    survives(Misdeed::FalselyCompressed).await;
    survives(Misdeed::NoResponse).await;
}

#[tokio::test]
async fn a_server_that_says_nothing_changes_nothing() {
    survives(Misdeed::Silent).await;
}

#[tokio::test]
async fn a_stream_that_is_ended_midway_keeps_what_was_taken_and_states_it_to_the_next() {
    let (told, mut control, mut link) = Told::start().await;
    link.put(ResourceType::Cluster, vec![whole("d", "7", told.backend.address)])
        .await;
    link.fail(Status::unavailable("overloaded"));
    let mut link = control.link().await;
    let request = link.subscribed(ResourceType::Cluster, "*").await;
    assert_eq!(request.initial_resource_versions.len(), 2);
    told.serves().await;
    told.ends().await;
}

#[tokio::test]
async fn answers_echo_their_nonces_in_whatever_order_and_how_often_they_come() {
    let (told, _control, mut link) = Told::start().await;
    let response = |nonce: &str, version: &str| DeltaDiscoveryResponse {
        type_url: ResourceType::Cluster.type_url().into(),
        nonce: nonce.into(),
        resources: vec![whole("c", version, told.backend.address)],
        ..Default::default()
    };
    for (nonce, version) in [("9", "2"), ("3", "3"), ("3", "4"), ("", "5")] {
        link.raw(response(nonce, version));
        assert_eq!(link.answer(nonce).await, None, "nonce {nonce:?}");
    }
    told.serves().await;
    told.ends().await;
}

#[tokio::test]
async fn a_response_about_another_type_is_left_alone_and_the_stream_goes_on() {
    let (told, _control, mut link) = Told::start().await;
    for type_url in [
        "type.googleapis.com/envoy.config.nothing.v3.Nothing",
        "",
        // Known, and not asked for.
        ResourceType::VirtualHost.type_url(),
    ] {
        link.raw(DeltaDiscoveryResponse {
            type_url: type_url.into(),
            nonce: "foreign".into(),
            removed_resources: vec!["c".into()],
            ..Default::default()
        });
    }
    // A resource of another type within is refused by name.
    let wrong = Resource {
        name: "c".into(),
        version: "2".into(),
        resource: Some(google::Any {
            type_url: ResourceType::Listener.type_url().into(),
            value: listener().encode_to_vec(),
        }),
        ..Default::default()
    };
    let nonce = link.send(ResourceType::Cluster, vec![wrong], &[]);
    let reason = link.answer(&nonce).await.unwrap();
    assert!(reason.contains("- c: the resource is a"), "{reason}");
    told.serves().await;
    told.ends().await;
}

#[tokio::test]
async fn what_a_response_contradicts_itself_about_is_refused_by_name_and_the_rest_is_taken() {
    let (told, _control, mut link) = Told::start().await;
    let address = told.backend.address;
    let twice = vec![
        whole("c", "2", closed_port().await),
        whole("d", "1", address),
        whole("c", "3", closed_port().await),
    ];
    let nonce = link.send(ResourceType::Cluster, twice, &[]);
    let reason = link.answer(&nonce).await.unwrap();
    assert!(reason.starts_with("refused 1 of 3 resources\n- c: "), "{reason}");
    told.serves().await;
    let both = vec![whole("c", "4", closed_port().await)];
    let nonce = link.send(ResourceType::Cluster, both, &["c", "d"]);
    let reason = link.answer(&nonce).await.unwrap();
    assert!(
        reason.contains("- c: the response says several things"),
        "{reason}"
    );
    told.serves().await;
    let clusters = told.harness.proxy.store(|store| {
        store
            .clusters()
            .map(|slot| slot.name.to_string())
            .collect::<Vec<_>>()
    });
    assert_eq!(clusters, ["c"], "d was removed as told");
    // The same version with another content: what was taken under it stays.
    link.put(ResourceType::Cluster, vec![whole("c", "1", closed_port().await)])
        .await;
    told.serves().await;
    told.ends().await;
}

#[tokio::test]
async fn what_is_removed_and_added_again_at_once_serves_on_and_leaves_nothing_behind() {
    let (told, _control, mut link) = Told::start().await;
    let mut answers = Vec::new();
    for round in 2..40 {
        answers.push(link.send(ResourceType::Cluster, Vec::new(), &["c"]));
        let again = whole("c", &round.to_string(), told.backend.address);
        answers.push(link.send(ResourceType::Cluster, vec![again], &[]));
        answers.push(link.send(ResourceType::Listener, Vec::new(), &["l"]));
        let again = resource(ResourceType::Listener, "l", &round.to_string(), &listener());
        answers.push(link.send(ResourceType::Listener, vec![again], &[]));
    }
    for nonce in answers {
        assert_eq!(link.answer(&nonce).await, None);
    }
    let at = told.harness.proxy.listener_address("l").unwrap();
    assert_eq!(get(at, "/").await.2, "b");
    let listeners = told.harness.proxy.store(|store| store.listeners().count());
    assert_eq!(
        (listeners, told.harness.proxy.listener_addresses("l").len()),
        (1, 1)
    );
    told.ends().await;
}
