//! The difference between what is desired, what was applied and what is live. Pure: values in, values out.

pub(crate) mod fields;
pub(crate) mod inventory;

use std::borrow::Cow;
use std::sync::Arc;

use serde_json::{Map, Value, json};
use sha2::{Digest, Sha256};

use crate::key::{Key, ObjectId};

/// Server-side apply's field manager, as Flux.
pub(crate) const FIELD_MANAGER: &str = "kustomize-controller";
/// Labels that say to which Kustomization an object belongs.
pub(crate) const OWNER_NAME: &str = "kustomize.toolkit.fluxcd.io/name";
pub(crate) const OWNER_NAMESPACE: &str = "kustomize.toolkit.fluxcd.io/namespace";
/// How many objects a revision may delete, as an annotation on the Kustomization. Ours; Flux has no bound.
pub(crate) const PRUNE_MAX: &str = "serin.dev/prune-max";

const RECONCILE: &str = "kustomize.toolkit.fluxcd.io/reconcile";
const SSA: &str = "kustomize.toolkit.fluxcd.io/ssa";
const PRUNE: &str = "kustomize.toolkit.fluxcd.io/prune";
const FORCE: &str = "kustomize.toolkit.fluxcd.io/force";
const LAST_APPLIED: &str = "kubectl.kubernetes.io/last-applied-configuration";

/// One object that should be.
#[derive(Debug)]
pub(crate) struct Desired {
    pub(crate) id: ObjectId,
    pub(crate) api_version: String,
    pub(crate) value: Value,
    pub(crate) digest: [u8; 32],
    /// File (and line) that it comes from, where the build knows.
    pub(crate) origin: Option<String>,
}

/// What the cluster has, as the shared watch or a GET gave it.
#[derive(Debug)]
pub(crate) struct LiveObject {
    /// Without `metadata.managedFields`.
    pub(crate) value: Value,
    /// Our field set, if we ever applied the object.
    pub(crate) owned: Option<Value>,
    /// Managers whose fields an apply of ours takes over, or the last-applied annotation, are still there.
    pub(crate) foreign: bool,
    /// Another controller decides `spec.replicas`.
    pub(crate) scaled_by_others: bool,
    pub(crate) resource_version: u64,
}

/// That the server once answered "no change" to applying a desired object over live fields of ours.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Accepted {
    pub(crate) desired: [u8; 32],
    pub(crate) projection: [u8; 32],
}

/// What to do with a desired object.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Action {
    Create,
    Configure,
    Unchanged,
    /// An annotation keeps our hands off; the reason.
    Skip(&'static str),
}

/// What to do with an object that is in the inventory and not desired any more.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Prune {
    Delete,
    /// It stays, and leaves the inventory; the reason.
    Keep(&'static str),
    Gone,
}

impl Desired {
    /// Takes a built object in: owner labels, common metadata, and the clean-up that an apply needs. The error is a
    /// sentence.
    pub(crate) fn new(
        mut value: Value,
        owner: &Key,
        labels: &[(String, String)],
        annotations: &[(String, String)],
        origin: Option<String>,
    ) -> Result<Arc<Self>, String> {
        let Some(id) = ObjectId::of(&value) else {
            return Err("an object without apiVersion, kind or metadata.name".to_string());
        };
        clean(&mut value, &id);
        let Some(root) = value.as_object_mut() else {
            return Err(format!("{id} is not an object"));
        };
        let metadata = root.entry("metadata").or_insert_with(|| json!({}));
        set_all(metadata, "annotations", annotations);
        set_all(metadata, "labels", labels);
        set_all(
            metadata,
            "labels",
            &[
                (OWNER_NAME.to_string(), owner.name.clone()),
                (OWNER_NAMESPACE.to_string(), owner.namespace.clone()),
            ],
        );
        let api_version = root
            .get("apiVersion")
            .and_then(Value::as_str)
            .unwrap_or_default()
            .to_string();
        let digest = Sha256::digest(serde_json::to_vec(&value).unwrap_or_default()).into();
        Ok(Arc::new(Self {
            id,
            api_version,
            value,
            digest,
            origin,
        }))
    }

    fn annotation(&self, name: &str) -> Option<&str> {
        annotation(&self.value, name)
    }

    /// Whether this object alone asks to be recreated on an immutable change.
    pub(crate) fn forced(&self) -> bool {
        self.annotation(FORCE)
            .is_some_and(|v| v.eq_ignore_ascii_case("enabled"))
    }

    /// Whether fields of other managers are left with them.
    pub(crate) fn merges(&self) -> bool {
        self.annotation(SSA)
            .is_some_and(|v| v.eq_ignore_ascii_case("Merge"))
    }
}

fn set_all(metadata: &mut Value, field: &str, pairs: &[(String, String)]) {
    if pairs.is_empty() {
        return;
    }
    let Some(metadata) = metadata.as_object_mut() else {
        return;
    };
    let map = metadata.entry(field).or_insert_with(|| Value::Object(Map::new()));
    if map.is_null() {
        *map = Value::Object(Map::new());
    }
    if let Some(map) = map.as_object_mut() {
        for (key, value) in pairs {
            map.insert(key.clone(), Value::from(value.as_str()));
        }
    }
}

/// Removes what an API server fills in itself, and moves a Secret's `stringData` where the server would.
fn clean(value: &mut Value, id: &ObjectId) {
    let Some(root) = value.as_object_mut() else { return };
    if id.kind != "CustomResourceDefinition" {
        root.remove("status");
    }
    if let Some(metadata) = root.get_mut("metadata").and_then(Value::as_object_mut) {
        for field in [
            "creationTimestamp",
            "resourceVersion",
            "uid",
            "generation",
            "managedFields",
            "selfLink",
            "deletionTimestamp",
        ] {
            metadata.remove(field);
        }
        for field in ["labels", "annotations"] {
            if metadata.get(field).is_some_and(Value::is_null) {
                metadata.remove(field);
            }
        }
    }
    if id.group.is_empty() && id.kind == "Secret" {
        use base64::Engine as _;
        if let Some(Value::Object(plain)) = root.remove("stringData") {
            let data = root.entry("data").or_insert_with(|| json!({}));
            if data.is_null() {
                *data = json!({});
            }
            if let Some(data) = data.as_object_mut() {
                for (key, text) in plain {
                    let text = text.as_str().map_or_else(|| text.to_string(), str::to_string);
                    data.insert(
                        key,
                        Value::from(base64::engine::general_purpose::STANDARD.encode(text)),
                    );
                }
            }
        }
    }
}

fn annotation<'a>(object: &'a Value, name: &str) -> Option<&'a str> {
    object.pointer("/metadata/annotations")?.get(name)?.as_str()
}

fn is(object: &Value, name: &str, value: &str) -> bool {
    annotation(object, name).is_some_and(|v| v.eq_ignore_ascii_case(value))
}

impl LiveObject {
    /// Splits an object as the API server gave it into what we keep.
    pub(crate) fn new(mut value: Value) -> Self {
        let owned = fields::applied_by(&value, FIELD_MANAGER).cloned();
        let foreign =
            annotation(&value, LAST_APPLIED).is_some() || managed_fields(&value).iter().any(is_foreign);
        let scaled_by_others = managed_fields(&value).iter().any(scales);
        let resource_version = value
            .pointer("/metadata/resourceVersion")
            .and_then(Value::as_str)
            .and_then(|v| v.parse().ok())
            .unwrap_or(0);
        if let Some(metadata) = value.get_mut("metadata").and_then(Value::as_object_mut) {
            metadata.remove("managedFields");
        }
        Self {
            value,
            owned,
            foreign,
            scaled_by_others,
            resource_version,
        }
    }

    /// To which Kustomization the object belongs.
    pub(crate) fn owner(&self) -> Option<Key> {
        let label = |name: &str| self.value.pointer("/metadata/labels")?.get(name)?.as_str();
        Some(Key::new(label(OWNER_NAMESPACE)?, label(OWNER_NAME)?))
    }
}

/// Whether an entry of managedFields holds on to fields which git should decide: kubectl's, and our own non-apply
/// ones. Flux takes over from the same.
fn is_foreign(entry: &Value) -> bool {
    let manager = entry["manager"].as_str().unwrap_or_default();
    let of_object = entry
        .get("subresource")
        .and_then(Value::as_str)
        .unwrap_or("")
        .is_empty();
    of_object
        && match entry["operation"].as_str() {
            Some("Update") => {
                manager.starts_with("kubectl") || manager == "before-first-apply" || manager == FIELD_MANAGER
            }
            Some("Apply") => manager == "kubectl",
            _ => false,
        }
}

/// Whether an entry of managedFields is a controller (a canary, an autoscaler) that decides `spec.replicas`. kubectl is a
/// person, whom git overrules.
fn scales(entry: &Value) -> bool {
    let manager = entry["manager"].as_str().unwrap_or_default();
    let person = manager.starts_with("kubectl") || manager == "before-first-apply";
    !person && manager != FIELD_MANAGER && entry.pointer("/fieldsV1/f:spec/f:replicas").is_some()
}

/// What is compared and applied of a desired object. While another controller decides the number of replicas, git's
/// number is left out: putting it back at once would be a war, and giving it back at the next interval an outage.
pub(crate) fn effective<'a>(desired: &'a Value, live: Option<&LiveObject>) -> Cow<'a, Value> {
    if live.is_some_and(|l| l.scaled_by_others) && desired.pointer("/spec/replicas").is_some() {
        let mut without = desired.clone();
        if let Some(spec) = without.get_mut("spec").and_then(Value::as_object_mut) {
            spec.remove("replicas");
        }
        return Cow::Owned(without);
    }
    Cow::Borrowed(desired)
}

fn managed_fields(object: &Value) -> &[Value] {
    object
        .pointer("/metadata/managedFields")
        .and_then(Value::as_array)
        .map(Vec::as_slice)
        .unwrap_or_default()
}

/// The managedFields of an object after git took over: what was kubectl's is ours, so that the next apply also removes
/// what kubectl had set and git does not.
pub(crate) fn taken_over(object: &Value) -> Vec<Value> {
    fn merge(into: &mut Value, from: &Value) {
        if let (Some(into), Some(from)) = (into.as_object_mut(), from.as_object()) {
            for (key, value) in from {
                merge(into.entry(key.clone()).or_insert_with(|| json!({})), value);
            }
        }
    }
    let is_ours = |e: &Value| {
        e["manager"] == FIELD_MANAGER
            && e["operation"] == "Apply"
            && e.get("subresource")
                .and_then(Value::as_str)
                .unwrap_or("")
                .is_empty()
    };
    let (mut taken, mut rest): (Vec<Value>, Vec<Value>) = managed_fields(object)
        .iter()
        .cloned()
        .partition(|e| is_ours(e) || is_foreign(e));
    taken.sort_by_key(|e| !is_ours(e));
    let mut taken = taken.into_iter();
    if let Some(mut ours) = taken.next() {
        ours["manager"] = json!(FIELD_MANAGER);
        ours["operation"] = json!("Apply");
        for other in taken {
            merge(&mut ours["fieldsV1"], &other["fieldsV1"]);
        }
        rest.push(ours);
    }
    rest
}

/// What to do with a desired object, given what is live.
pub(crate) fn decide(desired: &Desired, live: Option<&LiveObject>, accepted: Option<&Accepted>) -> Action {
    if is(&desired.value, RECONCILE, "disabled") || live.is_some_and(|l| is(&l.value, RECONCILE, "disabled"))
    {
        return Action::Skip("reconcile: disabled");
    }
    if is(&desired.value, SSA, "Ignore") || live.is_some_and(|l| is(&l.value, SSA, "Ignore")) {
        return Action::Skip("ssa: Ignore");
    }
    let Some(live) = live else { return Action::Create };
    if is(&desired.value, SSA, "IfNotPresent") || is(&live.value, SSA, "IfNotPresent") {
        return Action::Skip("ssa: IfNotPresent");
    }
    if live.foreign && !desired.merges() {
        return Action::Configure;
    }
    let Some(owned) = &live.owned else {
        return Action::Configure;
    };
    if fields::unchanged(&effective(&desired.value, Some(live)), &live.value, owned) {
        return Action::Unchanged;
    }
    let here = Accepted {
        desired: desired.digest,
        projection: fields::projection(&live.value, owned),
    };
    if accepted == Some(&here) {
        Action::Unchanged
    } else {
        Action::Configure
    }
}

/// What to do with an object that left the desired set. `owner` is the Kustomization that prunes.
pub(crate) fn prune(live: Option<&LiveObject>, owner: &Key) -> Prune {
    let Some(live) = live else { return Prune::Gone };
    if live.owner().as_ref() != Some(owner) {
        return Prune::Keep("belongs to another owner");
    }
    if is(&live.value, PRUNE, "disabled") {
        return Prune::Keep("prune: disabled");
    }
    if is(&live.value, RECONCILE, "disabled") {
        return Prune::Keep("reconcile: disabled");
    }
    if is(&live.value, SSA, "Ignore") {
        return Prune::Keep("ssa: Ignore");
    }
    Prune::Delete
}

/// Steps of an apply; each waits until the one before is usable.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) enum Stage {
    /// What other objects need in order to exist: definitions, namespaces, cluster roles.
    Definitions,
    /// Kinds that end in `Class`: others refer to them.
    Classes,
    Rest,
}

/// The stages in order.
pub(crate) const STAGES: [Stage; 3] = [Stage::Definitions, Stage::Classes, Stage::Rest];

/// In which stage an object is applied.
pub(crate) fn stage(id: &ObjectId) -> Stage {
    match id.kind.as_str() {
        "CustomResourceDefinition" | "Namespace" | "ClusterRole" => Stage::Definitions,
        kind if kind.ends_with("Class") => Stage::Classes,
        _ => Stage::Rest,
    }
}

/// Order inside a stage: what others need first, what intercepts others last. Kinds in neither list stand between.
pub(crate) fn rank(id: &ObjectId) -> usize {
    const FIRST: [&str; 21] = [
        "CustomResourceDefinition",
        "Namespace",
        "ClusterRole",
        "StorageClass",
        "IngressClass",
        "RuntimeClass",
        "PriorityClass",
        "GatewayClass",
        "ClusterRoleBinding",
        "ResourceQuota",
        "ServiceAccount",
        "Role",
        "RoleBinding",
        "ConfigMap",
        "Secret",
        "Service",
        "LimitRange",
        "Deployment",
        "StatefulSet",
        "CronJob",
        "PodDisruptionBudget",
    ];
    const LAST: [&str; 2] = ["MutatingWebhookConfiguration", "ValidatingWebhookConfiguration"];
    if let Some(at) = FIRST.iter().position(|k| *k == id.kind) {
        return at;
    }
    LAST.iter()
        .position(|k| *k == id.kind)
        .map_or(FIRST.len(), |at| FIRST.len() + 1 + at)
}

/// Whether a revision may delete as many objects as it would.
pub(crate) fn over_budget(annotation: Option<&str>, deletions: usize) -> Option<String> {
    let max: usize = match annotation?.trim().parse() {
        Ok(max) => max,
        Err(_) => {
            return Some(format!(
                "annotation {PRUNE_MAX} is not a number; nothing is deleted until it is"
            ));
        }
    };
    (deletions > max).then(|| {
        format!("the revision would delete {deletions} objects and {PRUNE_MAX} allows {max}; raise it or restore the objects in git")
    })
}

#[cfg(test)]
#[path = "tests.rs"]
mod tests;
