//! What was answered is there after a restart.

use k8s_openapi::api::core::v1::ConfigMap;
use kube::api::{Api, DeleteParams, PostParams, WatchParams};
use kube::{Client, ResourceExt as _};
use serde_json::json;
use serin_apiserver::ApiServer;

fn config_map(name: &str) -> ConfigMap {
    serde_json::from_value(json!({"metadata": {"name": name}, "data": {"a": "b"}})).expect("a ConfigMap")
}

#[tokio::test]
async fn objects_survive_a_restart_and_old_versions_are_told_to_list_again() {
    let dir = tempfile::tempdir().expect("a directory");
    let server = ApiServer::builder()
        .directory(dir.path())
        .build()
        .await
        .expect("the server starts");
    let api: Api<ConfigMap> = Api::default_namespaced(Client::new(server.service(), "default"));
    let kept = api
        .create(&PostParams::default(), &config_map("kept"))
        .await
        .expect("created");
    api.create(&PostParams::default(), &config_map("gone"))
        .await
        .expect("created");
    api.delete("gone", &DeleteParams::default())
        .await
        .expect("deleted");
    server.shutdown().await;
    drop(server);
    let server = ApiServer::builder()
        .directory(dir.path())
        .build()
        .await
        .expect("the server starts again");
    let api: Api<ConfigMap> = Api::default_namespaced(Client::new(server.service(), "default"));
    let found = api.get("kept").await.expect("there");
    assert_eq!(
        (found.uid(), found.resource_version()),
        (kept.uid(), kept.resource_version())
    );
    assert!(api.get_opt("gone").await.expect("answered").is_none());
    let old = kept.resource_version().expect("a version");
    let mut watch = Box::pin(
        api.watch(&WatchParams::default().timeout(5), &old)
            .await
            .expect("watching"),
    );
    let first = futures::TryStreamExt::try_next(&mut watch)
        .await
        .expect("an event")
        .expect("an event");
    assert!(
        matches!(first, kube::api::WatchEvent::Error(ref e) if e.code == 410),
        "{first:?}"
    );
    server.shutdown().await;
}

#[tokio::test]
async fn a_unix_socket_serves_the_same_api() {
    let dir = tempfile::tempdir().expect("a directory");
    let server = ApiServer::builder().build().await.expect("the server starts");
    let path = dir.path().join("api.sock");
    server.serve_unix(&path).await.expect("listening");
    let mut stream = tokio::net::UnixStream::connect(&path).await.expect("connected");
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
    stream
        .write_all(b"GET /api/v1/namespaces/default HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
        .await
        .expect("written");
    let mut answer = String::new();
    stream.read_to_string(&mut answer).await.expect("read");
    assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
    server.shutdown().await;
}
