//! Lists in pages, and watches that fall behind: what the server keeps of the past, and what it says once that is gone.

use futures::{StreamExt as _, TryStreamExt as _};
use k8s_openapi::api::core::v1::ConfigMap;
use kube::api::{Api, DeleteParams, ListParams, Patch, PatchParams, PostParams, WatchEvent, WatchParams};
use kube::{Client, ResourceExt as _};
use serde_json::json;
use serin_apiserver::ApiServer;

use crate::client::{DEADLINE, config_map, server};

#[tokio::test]
async fn a_watcher_that_falls_behind_the_history_is_told_to_list_again() {
    let server = ApiServer::builder()
        .history_events(4)
        .build()
        .await
        .expect("the server starts");
    let api: Api<ConfigMap> = Api::default_namespaced(Client::new(server.service(), "default"));
    let rv = api
        .list(&ListParams::default())
        .await
        .expect("listed")
        .metadata
        .resource_version
        .expect("a version");
    for i in 0..10 {
        api.create(&PostParams::default(), &config_map(&format!("n{i}"), json!({})))
            .await
            .expect("created");
    }
    let mut watch = api
        .watch(&WatchParams::default().timeout(5), &rv)
        .await
        .expect("watching")
        .boxed();
    let first = tokio::time::timeout(DEADLINE, watch.try_next())
        .await
        .expect("in time")
        .expect("no error");
    assert!(
        matches!(&first, Some(WatchEvent::Error(e)) if e.code == 410),
        "{first:?}"
    );
    server.shutdown().await;
}

#[tokio::test]
async fn pages_of_one_list_show_one_moment_and_after_a_compaction_the_next_one_is_offered_from_now() {
    let (server, client) = server().await;
    let api: Api<ConfigMap> = Api::default_namespaced(client);
    for name in ["a", "b", "c", "d"] {
        api.create(&PostParams::default(), &config_map(name, json!({"v": "old"})))
            .await
            .expect("created");
    }
    let names = |list: &kube::core::ObjectList<ConfigMap>| -> Vec<String> {
        list.items
            .iter()
            .map(|c| format!("{}={}", c.name_any(), c.data.as_ref().expect("data")["v"]))
            .collect()
    };
    let first = api.list(&ListParams::default().limit(1)).await.expect("listed");
    assert_eq!(names(&first), ["a=old"]);
    let token = first.metadata.continue_.clone().expect("more");
    let then = first.metadata.resource_version.clone().expect("a version");
    // Meanwhile: one changes, one goes, one comes.
    let change = Patch::Merge(json!({"data": {"v": "new"}}));
    api.patch("b", &PatchParams::default(), &change)
        .await
        .expect("patched");
    api.delete("c", &DeleteParams::default()).await.expect("deleted");
    api.create(&PostParams::default(), &config_map("bb", json!({"v": "new"})))
        .await
        .expect("created");
    let rest = api
        .list(&ListParams::default().limit(10).continue_token(&token))
        .await
        .expect("the second page");
    assert_eq!(
        names(&rest),
        ["b=old", "c=old", "d=old"],
        "as it was at the first page"
    );
    assert_eq!(rest.metadata.resource_version, Some(then.clone()));
    let exact = ListParams::default()
        .at(&then)
        .matching(kube::api::VersionMatch::Exact);
    assert_eq!(
        names(&api.list(&exact).await.expect("that moment")),
        ["a=old", "b=old", "c=old", "d=old"]
    );

    server.compact_history();
    let gone = |error: kube::Error| match error {
        kube::Error::Api(status) if status.code == 410 => status,
        other => panic!("{other:?}"),
    };
    gone(api.list(&exact).await.expect_err("that moment is forgotten"));
    let status = gone(
        api.list(&ListParams::default().limit(10).continue_token(&token))
            .await
            .expect_err("so is the rest of that list"),
    );
    assert_eq!(status.reason, "Expired");
    let offered = status
        .metadata
        .and_then(|metadata| metadata.continue_)
        .expect("a token that goes on from now");
    let rest = api
        .list(&ListParams::default().limit(10).continue_token(&offered))
        .await
        .expect("inconsistent, and said so");
    assert_eq!(names(&rest), ["b=new", "bb=new", "d=old"]);
    let watch = api
        .watch(&WatchParams::default().timeout(5), &then)
        .await
        .expect("watching");
    let first = watch.boxed().try_next().await.expect("an event");
    assert!(
        matches!(&first, Some(WatchEvent::Error(e)) if e.code == 410),
        "{first:?}"
    );
    server.shutdown().await;
}
