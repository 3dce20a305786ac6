use std::convert::Infallible;

use bytes::Bytes;
use http::{Request, Response};
use http_body_util::{BodyExt, StreamBody, combinators::BoxBody};
use hyper::body::Frame;
use k8s_openapi::api::core::v1::ConfigMap;
use kube::client::Body;
use tokio::sync::mpsc;

use super::*;

/// An API server that knows one list and one watch, driven line by line by the test.
fn api(list: &'static str, lines: mpsc::Receiver<String>) -> Api<ConfigMap> {
    let lines = Arc::new(parking_lot::Mutex::new(Some(lines)));
    let service = tower::service_fn(move |request: Request<Body>| {
        let lines = lines.clone();
        async move {
            let is_watch = request
                .uri()
                .query()
                .is_some_and(|query| query.contains("watch=true"));
            let body: BoxBody<Bytes, Infallible> = if is_watch {
                let taken = lines.lock().take();
                let stream = futures::stream::unfold(taken, |lines| async move {
                    let mut lines = lines?;
                    let line = lines.recv().await?;
                    Some((Ok(Frame::data(Bytes::from(line + "\n"))), Some(lines)))
                });
                BodyExt::boxed(
                    StreamBody::new(stream.map(|frame: Result<_, Infallible>| frame))
                        .map_err(|never| match never {}),
                )
            } else {
                BodyExt::boxed(
                    http_body_util::Full::new(Bytes::from_static(list.as_bytes()))
                        .map_err(|never| match never {}),
                )
            };
            Ok::<_, Infallible>(Response::new(body))
        }
    });
    Api::all(kube::Client::new(service, "default"))
}

const LIST: &str = r#"{"kind":"ConfigMapList","apiVersion":"v1","metadata":{"resourceVersion":"5"},"items":[{"metadata":{"name":"a","namespace":"n","resourceVersion":"4"}}]}"#;

fn event(type_: &str, name: &str, version: u32) -> String {
    format!(
        r#"{{"type":"{type_}","object":{{"apiVersion":"v1","kind":"ConfigMap","metadata":{{"name":"{name}","namespace":"n","resourceVersion":"{version}"}}}}}}"#
    )
}

#[tokio::test]
async fn the_first_list_arrives_as_one_resync_and_later_changes_one_by_one() {
    let (lines, received) = mpsc::channel(8);
    let cancel = CancellationToken::new();
    let cache = Cache::start(api(LIST, received), cancel.clone());
    let mut changes = cache.changes();
    cache.ready(Duration::from_secs(5)).await.unwrap();
    assert!(matches!(changes.next().await, Some(Change::Resync)));
    assert!(cache.get(Some("n"), "a").is_some());

    lines.send(event("ADDED", "b", 6)).await.unwrap();
    let Some(Change::Applied(b)) = changes.next().await else {
        panic!("expected an applied object")
    };
    assert_eq!(b.metadata.name.as_deref(), Some("b"));
    assert!(
        cache.get(Some("n"), "b").is_some(),
        "the store is written before the change is announced"
    );

    lines.send(event("DELETED", "a", 7)).await.unwrap();
    assert!(
        matches!(changes.next().await, Some(Change::Deleted(a)) if a.metadata.name.as_deref() == Some("a"))
    );
    assert_eq!(cache.list().len(), 1);
    cancel.cancel();
}

#[tokio::test(start_paused = true)]
async fn a_kind_that_never_answers_is_reported_by_name() {
    let service = tower::service_fn(|_: Request<Body>| async {
        std::future::pending::<()>().await;
        Ok::<_, Infallible>(Response::new(Body::empty()))
    });
    let api: Api<ConfigMap> = Api::all(kube::Client::new(service, "default"));
    let cancel = CancellationToken::new();
    let cache = Cache::start(api, cancel.clone());
    let error = cache.ready(Duration::from_secs(3)).await.unwrap_err();
    assert_eq!(
        error.to_string(),
        "watch of ConfigMap did not deliver its first list within 3 s; is its CustomResourceDefinition installed?"
    );
    cancel.cancel();
}

#[tokio::test]
async fn a_listener_that_falls_behind_is_told_to_resync() {
    let (sender, receiver) = broadcast::channel(2);
    let mut changes: Changes<ConfigMap> = Changes { receiver };
    for _ in 0..3 {
        let _ = sender.send(Change::Applied(Arc::new(ConfigMap::default())));
    }
    assert!(matches!(changes.next().await, Some(Change::Resync)));
    assert!(matches!(changes.next().await, Some(Change::Applied(_))));
}
