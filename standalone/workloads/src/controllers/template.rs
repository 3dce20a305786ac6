//! Pod templates: equality, hash, and pods made from them. Pure.

use std::collections::BTreeMap;

use k8s_openapi::api::core::v1::{Pod, PodTemplateSpec};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{LabelSelector, ObjectMeta, OwnerReference};

/// The label by which a ReplicaSet of a Deployment tells its pods.
pub(crate) const HASH_LABEL: &str = "pod-template-hash";
/// Letters without vowels, so that no hash spells a word; Kubernetes' alphabet.
const ALPHABET: &[u8] = b"bcdfghjklmnpqrstvwxz2456789";

/// A template without the hash label, as JSON: what equality and hash are about.
fn canonical(template: &PodTemplateSpec) -> String {
    let mut template = template.clone();
    if let Some(metadata) = &mut template.metadata {
        if let Some(labels) = &mut metadata.labels {
            labels.remove(HASH_LABEL);
        }
        metadata.creation_timestamp = None;
    }
    // Struct fields come in a fixed order and maps are sorted, so equal templates are equal texts.
    serde_json::to_string(&template).unwrap_or_default()
}

/// Whether two templates differ in no more than the hash label.
pub(crate) fn equal(a: &PodTemplateSpec, b: &PodTemplateSpec) -> bool {
    canonical(a) == canonical(b)
}

/// The hash in names and labels: 32 bits of FNV-1a, like Kubernetes' in form but not in value.
pub(crate) fn hash(template: &PodTemplateSpec, collisions: Option<i32>) -> String {
    let mut hash: u32 = 0x811c_9dc5;
    let collisions = collisions.map(|count| count.to_le_bytes()).unwrap_or_default();
    let text = canonical(template);
    for byte in text.bytes().chain(collisions) {
        hash ^= u32::from(byte);
        hash = hash.wrapping_mul(0x0100_0193);
    }
    hash.to_string()
        .bytes()
        .map(|byte| char::from(ALPHABET[usize::from(byte) % ALPHABET.len()]))
        .collect()
}

/// A new pod of a template.
pub(crate) fn pod(template: &PodTemplateSpec, owner: OwnerReference, namespace: &str) -> Pod {
    let metadata = template.metadata.clone().unwrap_or_default();
    let prefix: String = owner.name.chars().take(57).collect();
    Pod {
        metadata: ObjectMeta {
            generate_name: Some(format!("{prefix}-")),
            namespace: Some(namespace.to_owned()),
            labels: metadata.labels,
            annotations: metadata.annotations,
            finalizers: metadata.finalizers,
            owner_references: Some(vec![owner]),
            ..ObjectMeta::default()
        },
        spec: template.spec.clone(),
        status: None,
    }
}

/// Whether a label selector matches; an empty one matches nothing here, since it would own every pod there is.
pub(crate) fn selects(selector: &LabelSelector, labels: &BTreeMap<String, String>) -> bool {
    let exact = selector.match_labels.iter().flatten();
    let expressions = selector.match_expressions.iter().flatten();
    if exact.clone().next().is_none() && expressions.clone().next().is_none() {
        return false;
    }
    exact
        .into_iter()
        .all(|(key, value)| labels.get(key) == Some(value))
        && expressions.into_iter().all(|expression| {
            let value = labels.get(&expression.key);
            let listed =
                value.is_some_and(|value| expression.values.iter().flatten().any(|listed| listed == value));
            match expression.operator.as_str() {
                "In" => listed,
                "NotIn" => !listed,
                "Exists" => value.is_some(),
                "DoesNotExist" => value.is_none(),
                _ => false,
            }
        })
}

/// Whether a condition of a pod is true, and since when.
pub(crate) fn ready_since(pod: &Pod) -> Option<jiff::Timestamp> {
    let conditions = pod.status.as_ref()?.conditions.as_ref()?;
    let ready = conditions
        .iter()
        .find(|condition| condition.type_ == "Ready" && condition.status == "True")?;
    Some(
        ready
            .last_transition_time
            .as_ref()
            .map_or(jiff::Timestamp::UNIX_EPOCH, |time| time.0),
    )
}

/// Neither completed nor being deleted.
pub(crate) fn is_active(pod: &Pod) -> bool {
    pod.metadata.deletion_timestamp.is_none() && !is_done(pod)
}

/// Completed, well or not.
pub(crate) fn is_done(pod: &Pod) -> bool {
    let phase = pod.status.as_ref().and_then(|status| status.phase.as_deref());
    matches!(phase, Some("Succeeded" | "Failed"))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn template(value: serde_json::Value) -> PodTemplateSpec {
        serde_json::from_value(value).unwrap()
    }

    #[test]
    fn templates_are_equal_up_to_the_hash_label_and_so_are_their_hashes() {
        let a = template(
            json!({"metadata": {"labels": {"app": "x"}}, "spec": {"containers": [{"name": "c", "image": "i:1"}]}}),
        );
        let b = template(
            json!({"metadata": {"labels": {"app": "x", "pod-template-hash": "abc"}, "creationTimestamp": null},
            "spec": {"containers": [{"image": "i:1", "name": "c"}]}}),
        );
        let c = template(
            json!({"metadata": {"labels": {"app": "x"}}, "spec": {"containers": [{"name": "c", "image": "i:2"}]}}),
        );
        assert!(equal(&a, &b) && !equal(&a, &c));
        assert_eq!(hash(&a, None), hash(&b, None));
        assert_ne!(hash(&a, None), hash(&c, None));
        assert_ne!(hash(&a, None), hash(&a, Some(1)));
        assert!(hash(&a, None).bytes().all(|byte| ALPHABET.contains(&byte)));
    }
}
