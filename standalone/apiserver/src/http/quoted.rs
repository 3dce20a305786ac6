//! How a failed patch is quoted: the patch itself, or the object that came of it, as Kubernetes writes them.
//!
//! Kubernetes patches the text of an object: what a patch goes through is sorted by name, the rest stays in the order of Go's structs.
//! Only made once a patch has failed.

use std::collections::BTreeMap;

use serde_json::Value;

use super::write::Change;
use crate::patch;
use crate::schema::Schema;

/// Members of structs in Go's order; types that are not listed are written by name.
const ORDER: [(&str, &str); 19] = [
    (
        "ObjectMeta",
        "name generateName namespace selfLink uid resourceVersion generation creationTimestamp deletionTimestamp deletionGracePeriodSeconds labels annotations ownerReferences finalizers managedFields",
    ),
    (
        "ManagedFieldsEntry",
        "manager operation apiVersion time fieldsType fieldsV1 subresource",
    ),
    (
        "OwnerReference",
        "apiVersion kind name uid controller blockOwnerDeletion",
    ),
    ("LabelSelector", "matchLabels matchExpressions"),
    (
        "DeploymentSpec",
        "replicas selector template strategy minReadySeconds revisionHistoryLimit paused progressDeadlineSeconds",
    ),
    (
        "DeploymentStatus",
        "observedGeneration replicas updatedReplicas readyReplicas availableReplicas unavailableReplicas terminatingReplicas conditions collisionCount",
    ),
    (
        "DeploymentCondition",
        "type status lastUpdateTime lastTransitionTime reason message",
    ),
    ("DeploymentStrategy", "type rollingUpdate"),
    ("RollingUpdateDeployment", "maxUnavailable maxSurge"),
    ("ReplicaSetSpec", "replicas minReadySeconds selector template"),
    ("PodTemplateSpec", "metadata spec"),
    (
        "PodSpec",
        "volumes initContainers containers ephemeralContainers restartPolicy terminationGracePeriodSeconds activeDeadlineSeconds dnsPolicy nodeSelector serviceAccountName serviceAccount automountServiceAccountToken nodeName hostNetwork hostPID hostIPC shareProcessNamespace securityContext imagePullSecrets hostname subdomain affinity schedulerName tolerations hostAliases priorityClassName priority dnsConfig readinessGates runtimeClassName enableServiceLinks preemptionPolicy",
    ),
    (
        "Container",
        "name image command args workingDir ports envFrom env resources resizePolicy restartPolicy volumeMounts volumeDevices livenessProbe readinessProbe startupProbe lifecycle terminationMessagePath terminationMessagePolicy imagePullPolicy securityContext stdin stdinOnce tty",
    ),
    ("ContainerPort", "name hostPort containerPort protocol hostIP"),
    ("EnvVar", "name value valueFrom"),
    ("ResourceRequirements", "limits requests claims"),
    (
        "ServiceSpec",
        "ports selector clusterIP clusterIPs type externalIPs sessionAffinity loadBalancerIP loadBalancerSourceRanges externalName externalTrafficPolicy healthCheckNodePort publishNotReadyAddresses sessionAffinityConfig ipFamilies ipFamilyPolicy allocateLoadBalancerNodePorts loadBalancerClass internalTrafficPolicy trafficDistribution",
    ),
    (
        "ServicePort",
        "name protocol appProtocol port targetPort nodePort",
    ),
    ("ServiceStatus", "loadBalancer conditions"),
];

/// What a patch goes through.
#[derive(Default)]
struct Touched(BTreeMap<String, Touched>);

impl Touched {
    fn by_merge(patch: &Value) -> Self {
        let members = patch.as_object().into_iter().flatten();
        Self(
            members
                .filter(|(_, value)| value.is_object())
                .map(|(name, value)| (name.clone(), Self::by_merge(value)))
                .collect(),
        )
    }

    fn by_operations(patch: &Value) -> Self {
        let mut all = Self::default();
        for operation in patch.as_array().into_iter().flatten() {
            for pointer in ["path", "from"]
                .iter()
                .filter_map(|p| operation.get(p).and_then(Value::as_str))
            {
                let mut at = &mut all;
                let mut steps: Vec<String> = pointer
                    .split('/')
                    .skip(1)
                    .map(|s| s.replace("~1", "/").replace("~0", "~"))
                    .collect();
                // The last step is the member itself, which is not looked into.
                steps.pop();
                for step in steps {
                    at = at.0.entry(step).or_default();
                }
            }
        }
        all
    }
}

/// The quotation of a patch that came to nothing.
pub(crate) fn of(change: &Change, live: Option<&Value>, schema: &Schema, custom: bool) -> String {
    let mut value = live.cloned().unwrap_or_default();
    let touched = match change {
        Change::Json(document) => {
            if patch::json::apply(&mut value, &document.value).is_err() {
                return String::new();
            }
            Touched::by_operations(&document.value)
        }
        Change::Merge(document) => {
            patch::merge::apply(&mut value, &document.value);
            Touched::by_merge(&document.value)
        }
        Change::Strategic(document) => return go_text(&document.value),
        Change::Create(_) | Change::Replace(_) | Change::Apply { .. } => return String::new(),
    };
    if custom {
        return value.to_string();
    }
    let mut out = String::new();
    write(&value, schema, Some(&touched), &mut out);
    out
}

fn write(value: &Value, schema: &Schema, touched: Option<&Touched>, out: &mut String) {
    match value {
        Value::Object(members) => {
            let mut names: Vec<&String> = members.keys().collect();
            names.sort();
            if touched.is_none() {
                let order = ORDER
                    .iter()
                    .find(|(name, _)| *name == schema.go_name())
                    .map_or("", |(_, order)| *order);
                let place = |name: &str| order.split(' ').position(|o| o == name).unwrap_or(usize::MAX);
                names.sort_by_key(|name| place(name));
            }
            out.push('{');
            for (i, name) in names.into_iter().enumerate() {
                if i > 0 {
                    out.push(',');
                }
                out.push_str(&Value::String(name.clone()).to_string());
                out.push(':');
                if let Some(member) = members.get(name) {
                    let inner = touched.and_then(|t| t.0.get(name));
                    write(member, schema.member(name).0, inner, out);
                }
            }
            out.push('}');
        }
        Value::Array(items) => {
            out.push('[');
            for (i, item) in items.iter().enumerate() {
                if i > 0 {
                    out.push(',');
                }
                let inner = touched.and_then(|t| t.0.get(&i.to_string()));
                write(item, schema.item(), inner, out);
            }
            out.push(']');
        }
        scalar => out.push_str(&scalar.to_string()),
    }
}

/// A value as Go's `%v` prints it.
fn go_text(value: &Value) -> String {
    match value {
        Value::Null => "<nil>".to_owned(),
        Value::String(text) => text.clone(),
        Value::Array(items) => {
            let items: Vec<String> = items.iter().map(go_text).collect();
            format!("[{}]", items.join(" "))
        }
        Value::Object(members) => {
            let members: Vec<String> = members
                .iter()
                .map(|(k, v)| format!("{k}:{}", go_text(v)))
                .collect();
            format!("map[{}]", members.join(" "))
        }
        other => other.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::http::body::Document;
    use crate::schema::builtin;

    #[test]
    fn a_patched_object_is_quoted_in_gos_order_but_for_what_the_patch_went_through() {
        let live = json!({"kind": "ConfigMap", "apiVersion": "v1", "metadata": {"uid": "u", "name": "c", "labels": {"b": "1", "a": "2"}}, "data": {}});
        let schema = builtin("core.v1.ConfigMap");
        let patch = Change::Merge(Document::of(json!({"data": "x"})));
        assert_eq!(
            of(&patch, Some(&live), &schema, false),
            r#"{"apiVersion":"v1","data":"x","kind":"ConfigMap","metadata":{"name":"c","uid":"u","labels":{"a":"2","b":"1"}}}"#
        );
        let patch = Change::Json(Document::of(
            json!([{"op": "add", "path": "/metadata/labels/c", "value": 5}]),
        ));
        assert_eq!(
            of(&patch, Some(&live), &schema, false),
            r#"{"apiVersion":"v1","data":{},"kind":"ConfigMap","metadata":{"labels":{"a":"2","b":"1","c":5},"name":"c","uid":"u"}}"#
        );
    }
}
