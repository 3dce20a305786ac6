//! What istiod sends, whole: every resource of the recordings in `../shared/data/istiod-recorded`, turned from protobuf's
//! JSON into bytes and compiled as a delivery would be. What is refused must be in the table, with the reason.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use serde_json::Value;
use serin_xds::ResourceType;

use super::json;
use super::schema::Schema;
use crate::config::store::{Store, Update};

/// Part of the refusal, and why this is right. Nothing of it is in what istiod sends without being asked for it.
const REFUSED: [(&str, &str); 4] = [
    (
        "envoy.extensions.clusters.dynamic_forward_proxy.v3.ClusterConfig",
        "ServiceEntry with resolution DYNAMIC_DNS: hosts that requests name are not resolved by this proxy",
    ),
    (
        "envoy.extensions.filters.network.sni_dynamic_forward_proxy.v3.FilterConfig",
        "the same for TLS by server name",
    ),
    (
        "envoy.extensions.filters.network.mongo_proxy.v3.MongoProxy",
        "a port that is called mongo: statistics of MongoDB's protocol",
    ),
    (
        "the HTTP filter \"envoy.filters.http.grpc_web\"",
        "a port that is called grpc-web: translation from gRPC-Web to gRPC",
    ),
];

const KINDS: [(&str, ResourceType, &str); 4] = [
    (
        "clusters",
        ResourceType::Cluster,
        "envoy.config.cluster.v3.Cluster",
    ),
    (
        "endpoints",
        ResourceType::Endpoints,
        "envoy.config.endpoint.v3.ClusterLoadAssignment",
    ),
    (
        "listeners",
        ResourceType::Listener,
        "envoy.config.listener.v3.Listener",
    ),
    (
        "routes",
        ResourceType::Route,
        "envoy.config.route.v3.RouteConfiguration",
    ),
];

fn recorded() -> Option<PathBuf> {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../../shared/data/istiod-recorded");
    if dir.exists() {
        return Some(dir);
    }
    eprintln!("SKIPPED: ../shared is not here (istiod-recorded)");
    None
}

/// What a file of a case (or, with `part` absent, of the baseline) brings.
fn resources<'a>(file: &'a Value, kind: &str, parts: &[&str]) -> Vec<(&'a String, &'a Value)> {
    let of = |value: &'a Value| value.as_object().into_iter().flatten();
    match parts {
        [] => of(&file[kind]).collect(),
        parts => parts.iter().flat_map(|part| of(&file[kind][*part])).collect(),
    }
}

/// Delivers the resources of a file; every refusal as `<kind> <name>: <why>`.
fn deliver(schema: &Schema, store: &mut Store, file: &Value, parts: &[&str]) -> (usize, Vec<String>) {
    let (mut count, mut refused) = (0, Vec::new());
    for (kind, resource_type, message) in KINDS {
        for (name, value) in resources(file, kind, parts) {
            count += 1;
            let body = match json::encode(schema, message, value) {
                Ok(body) => body,
                Err(refusal) => {
                    refused.push(format!("{kind} {name}: {refusal}"));
                    continue;
                }
            };
            let update = Update { name, body: &body };
            for (_, refusal) in store.apply(resource_type, &[update], &[]) {
                refused.push(format!("{kind} {name}: {refusal}"));
            }
            store.take_listener_changes();
        }
    }
    (count, refused)
}

fn read(path: &Path) -> Value {
    serde_json::from_str(&std::fs::read_to_string(path).unwrap()).unwrap()
}

#[test]
fn everything_that_istiod_sends_by_default_is_taken_and_the_rest_is_refused_for_a_listed_reason() {
    let Some(root) = recorded() else { return };
    let schema = Schema::load();
    let mut seen: BTreeMap<&str, usize> = BTreeMap::new();
    let mut unlisted = Vec::new();
    let mut total = 0;
    let mut cases: Vec<_> = std::fs::read_dir(&root)
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .filter(|path| path.is_dir() && !path.ends_with("baseline"))
        .collect();
    cases.sort();
    for proxy in ["client", "server", "ingress"] {
        let (count, refused) = deliver(
            &schema,
            &mut Store::new(1),
            &read(&root.join(format!("baseline/{proxy}.json"))),
            &[],
        );
        unlisted.extend(
            refused
                .iter()
                .map(|refusal| format!("baseline {proxy} {refusal}")),
        );
        assert!(count > 20, "{count} resources for {proxy}");
        total += count;
        for case in &cases {
            let path = case.join(format!("{proxy}.json"));
            if !path.exists() {
                continue;
            }
            let (count, refused) = deliver(&schema, &mut Store::new(1), &read(&path), &["added", "changed"]);
            total += count;
            for refusal in refused {
                match REFUSED.iter().find(|(part, _)| refusal.contains(part)) {
                    Some((part, _)) => *seen.entry(part).or_default() += 1,
                    None => unlisted.push(format!("{} {proxy} {refusal}", case.display())),
                }
            }
        }
    }
    assert!(unlisted.is_empty(), "{}", unlisted.join("\n"));
    // A reason that no longer applies leaves the table.
    for (part, _) in REFUSED {
        assert!(seen.contains_key(part), "{part} is not refused any more");
    }
    assert!(total > 1_000, "{total} resources were read");
}
