//! Who is at the other end: workloads and services as Istio's metrics name them, and the headers by which mesh proxies
//! tell each other (`x-envoy-peer-metadata`).
//!
//! Identities are interned: equal ones are the same `Arc`, so that a metric series is found by comparing pointers.

use std::collections::HashMap;
use std::sync::{Arc, LazyLock, Weak};

use base64::Engine;
use parking_lot::Mutex;
use prost::Message;
use serin_xds::pb::envoy::config::core::v3 as core;
use serin_xds::pb::google::protobuf as google;

/// What stands for what is not known.
pub const UNKNOWN: &str = "unknown";
/// Header with the sender's metadata, a base64 protobuf struct.
pub const METADATA_HEADER: &str = "x-envoy-peer-metadata";
/// Header with the sender's node id.
pub const METADATA_ID_HEADER: &str = "x-envoy-peer-metadata-id";
/// Metadata headers longer than this are not read.
const MAX_HEADER: usize = 8 * 1024;

/// A workload.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Workload {
    /// Deployment or other owner.
    pub name: Box<str>,
    /// Namespace.
    pub namespace: Box<str>,
    /// `service.istio.io/canonical-name`.
    pub canonical_service: Box<str>,
    /// `service.istio.io/canonical-revision`.
    pub canonical_revision: Box<str>,
    /// Cluster id.
    pub cluster: Box<str>,
    /// `app` label.
    pub app: Box<str>,
    /// `version` label.
    pub version: Box<str>,
}

/// A service.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ServiceIdentity {
    /// Fully qualified host.
    pub host: Box<str>,
    /// Short name.
    pub name: Box<str>,
    /// Namespace.
    pub namespace: Box<str>,
}

/// Who both sides of a connection with mutual TLS proved to be.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Principals {
    /// The client.
    pub source: Box<str>,
    /// The server.
    pub destination: Box<str>,
}

impl Principals {
    /// Equal pairs are the same.
    pub fn new(source: &str, destination: &str) -> Arc<Self> {
        PRINCIPALS.get(Self {
            source: source.into(),
            destination: destination.into(),
        })
    }
}

struct Interner<T>(Mutex<HashMap<T, Weak<T>, foldhash::fast::RandomState>>);

impl<T: std::hash::Hash + Eq + Clone> Interner<T> {
    fn get(&self, value: T) -> Arc<T> {
        let mut table = self.0.lock();
        if let Some(existing) = table.get(&value).and_then(Weak::upgrade) {
            return existing;
        }
        // Entries of dead identities are dropped whenever the table has doubled since the last time.
        if table.len() >= 64 && table.len().is_power_of_two() {
            table.retain(|_, weak| weak.strong_count() > 0);
        }
        let value = Arc::new(value);
        table.insert((*value).clone(), Arc::downgrade(&value));
        value
    }
}

static WORKLOADS: LazyLock<Interner<Workload>> = LazyLock::new(|| Interner(Mutex::default()));
static PRINCIPALS: LazyLock<Interner<Principals>> = LazyLock::new(|| Interner(Mutex::default()));
static SERVICES: LazyLock<Interner<ServiceIdentity>> = LazyLock::new(|| Interner(Mutex::default()));

fn or_unknown(text: &str) -> Box<str> {
    if text.is_empty() {
        UNKNOWN.into()
    } else {
        text.into()
    }
}

impl Workload {
    /// From endpoint metadata: `name;namespace;canonical service;canonical revision;cluster`.
    pub fn parse(text: &str) -> Arc<Self> {
        let mut parts = text.split(';');
        let mut next = || or_unknown(parts.next().unwrap_or_default());
        let (name, namespace, canonical_service, canonical_revision, cluster) =
            (next(), next(), next(), next(), next());
        let canonical_revision = if &*canonical_revision == UNKNOWN {
            "latest".into()
        } else {
            canonical_revision
        };
        WORKLOADS.get(Self {
            app: canonical_service.clone(),
            version: canonical_revision.clone(),
            name,
            namespace,
            canonical_service,
            canonical_revision,
            cluster,
        })
    }

    /// A workload of which nothing is known.
    pub fn unknown() -> Arc<Self> {
        static VALUE: LazyLock<Arc<Workload>> = LazyLock::new(|| {
            let unknown = || UNKNOWN.into();
            WORKLOADS.get(Workload {
                name: unknown(),
                namespace: unknown(),
                canonical_service: unknown(),
                canonical_revision: unknown(),
                cluster: unknown(),
                app: unknown(),
                version: unknown(),
            })
        });
        VALUE.clone()
    }

    /// From a proxy's node metadata.
    pub fn of_node(metadata: &google::Struct) -> Arc<Self> {
        let text = |key: &str| string(metadata, key).unwrap_or_default();
        let labels = match metadata
            .fields
            .get("LABELS")
            .and_then(|value| value.kind.as_ref())
        {
            Some(google::value::Kind::StructValue(labels)) => Some(labels),
            _ => None,
        };
        let label = |key: &str| labels.and_then(|labels| string(labels, key)).unwrap_or_default();
        let first = |candidates: &[&str]| {
            candidates
                .iter()
                .find(|candidate| !candidate.is_empty())
                .copied()
                .unwrap_or(UNKNOWN)
                .into()
        };
        let name = first(&[text("WORKLOAD_NAME")]);
        let app = label("app");
        let version = label("version");
        WORKLOADS.get(Self {
            canonical_service: first(&[
                label("service.istio.io/canonical-name"),
                label("app.kubernetes.io/name"),
                app,
                text("WORKLOAD_NAME"),
            ]),
            canonical_revision: first(&[
                label("service.istio.io/canonical-revision"),
                label("app.kubernetes.io/version"),
                version,
                "latest",
            ]),
            name,
            namespace: first(&[text("NAMESPACE")]),
            cluster: first(&[text("CLUSTER_ID")]),
            app: first(&[app]),
            version: first(&[version]),
        })
    }

    /// From the metadata header of a peer; `None` if it cannot be read.
    pub fn of_header(value: &[u8]) -> Option<Arc<Self>> {
        if value.len() > MAX_HEADER {
            return None;
        }
        let bytes = base64::engine::general_purpose::STANDARD.decode(value).ok()?;
        Some(Self::of_node(&google::Struct::decode(bytes.as_slice()).ok()?))
    }
}

fn string<'a>(from: &'a google::Struct, key: &str) -> Option<&'a str> {
    match from.fields.get(key)?.kind.as_ref()? {
        google::value::Kind::StringValue(value) => Some(value),
        _ => None,
    }
}

/// The header value that tells peers who a node is: the parts of its metadata that [`Workload::of_node`] reads.
pub fn header_of_node(metadata: &google::Struct) -> String {
    const KEYS: [&str; 4] = ["NAMESPACE", "CLUSTER_ID", "WORKLOAD_NAME", "NAME"];
    const LABELS: [&str; 6] = [
        "app",
        "version",
        "service.istio.io/canonical-name",
        "service.istio.io/canonical-revision",
        "app.kubernetes.io/name",
        "app.kubernetes.io/version",
    ];
    let mut out = google::Struct::default();
    for key in KEYS {
        if let Some(value) = metadata.fields.get(key) {
            out.fields.insert(key.into(), value.clone());
        }
    }
    if let Some(google::value::Kind::StructValue(labels)) = metadata
        .fields
        .get("LABELS")
        .and_then(|value| value.kind.as_ref())
    {
        let fields = labels
            .fields
            .iter()
            .filter(|(key, _)| LABELS.contains(&key.as_str()))
            .map(|(key, value)| (key.clone(), value.clone()))
            .collect();
        let kind = google::value::Kind::StructValue(google::Struct { fields });
        out.fields
            .insert("LABELS".into(), google::Value { kind: Some(kind) });
    }
    base64::engine::general_purpose::STANDARD.encode(out.encode_to_vec())
}

impl ServiceIdentity {
    /// A service by its parts.
    pub fn new(host: &str, name: &str, namespace: &str) -> Arc<Self> {
        SERVICES.get(Self {
            host: or_unknown(host),
            name: or_unknown(name),
            namespace: or_unknown(namespace),
        })
    }

    /// A service of which nothing is known.
    pub fn unknown() -> Arc<Self> {
        static VALUE: LazyLock<Arc<ServiceIdentity>> = LazyLock::new(|| ServiceIdentity::new("", "", ""));
        VALUE.clone()
    }

    /// The first of `istio.services` in a cluster's metadata.
    pub(crate) fn of_cluster(metadata: Option<&core::Metadata>) -> Option<Arc<Self>> {
        let services = metadata?.filter_metadata.get("istio")?.fields.get("services")?;
        let Some(google::value::Kind::ListValue(list)) = &services.kind else {
            return None;
        };
        let Some(google::value::Kind::StructValue(first)) = list.values.first()?.kind.as_ref() else {
            return None;
        };
        let text = |key| string(first, key).unwrap_or_default();
        Some(Self::new(text("host"), text("name"), text("namespace")))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_peer_reads_from_the_header_what_the_node_says_of_itself() {
        let text = |value: &str| google::Value {
            kind: Some(google::value::Kind::StringValue(value.into())),
        };
        let mut labels = google::Struct::default();
        labels.fields.insert("app".into(), text("reviews"));
        labels.fields.insert("version".into(), text("v2"));
        labels.fields.insert("secret".into(), text("not for peers"));
        let mut node = google::Struct::default();
        node.fields.insert("WORKLOAD_NAME".into(), text("reviews-v2"));
        node.fields.insert("NAMESPACE".into(), text("prod"));
        node.fields.insert(
            "LABELS".into(),
            google::Value {
                kind: Some(google::value::Kind::StructValue(labels)),
            },
        );
        let own = Workload::of_node(&node);
        let header = header_of_node(&node);
        let read = Workload::of_header(header.as_bytes()).unwrap();
        assert!(Arc::ptr_eq(&own, &read), "{own:?} {read:?}");
        assert_eq!(
            (&*read.canonical_service, &*read.canonical_revision),
            ("reviews", "v2")
        );
        assert_eq!(&*read.cluster, UNKNOWN);
        let sent = base64::engine::general_purpose::STANDARD.decode(&header).unwrap();
        assert!(!String::from_utf8_lossy(&sent).contains("not for peers"));
    }

    #[test]
    fn endpoint_metadata_names_the_workload_and_garbage_headers_name_nobody() {
        let workload = Workload::parse("reviews-v1;prod;reviews;;Kubernetes");
        assert_eq!(
            (&*workload.name, &*workload.canonical_revision),
            ("reviews-v1", "latest")
        );
        assert!(Workload::of_header(b"%%%").is_none());
        assert!(Workload::of_header(&[b'A'; 9000]).is_none());
    }
}
