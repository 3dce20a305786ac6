//! The built-in kinds, one row each.

/// Whether objects live in a namespace.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Scope {
    Namespaced,
    Cluster,
}

use Scope::{Cluster, Namespaced};

/// A built-in kind.
#[derive(Debug)]
pub(crate) struct Row {
    pub(crate) group: &'static str,
    pub(crate) version: &'static str,
    pub(crate) kind: &'static str,
    pub(crate) plural: &'static str,
    pub(crate) singular: &'static str,
    pub(crate) short_names: &'static [&'static str],
    pub(crate) categories: &'static [&'static str],
    pub(crate) scope: Scope,
    /// Type in the table of [`crate::schema`].
    pub(crate) schema: &'static str,
    pub(crate) subresources: &'static [&'static str],
}

impl Row {
    /// PUT to a name that does not exist creates it.
    pub(crate) fn creates_on_update(&self) -> bool {
        matches!(
            self.plural,
            "services"
                | "leases"
                | "events"
                | "endpoints"
                | "endpointslices"
                | "limitranges"
                | "roles"
                | "rolebindings"
                | "clusterroles"
                | "clusterrolebindings"
                | "priorityclasses"
        )
    }

    /// A PUT without a resourceVersion is taken as unconditional.
    pub(crate) fn unconditional_update(&self) -> bool {
        !matches!(
            self.plural,
            "leases" | "customresourcedefinitions" | "priorityclasses_"
        )
    }

    /// A DELETE answers the object, not a Status.
    pub(crate) fn delete_answers_object(&self) -> bool {
        matches!(
            self.plural,
            "pods"
                | "services"
                | "serviceaccounts"
                | "persistentvolumeclaims"
                | "persistentvolumes"
                | "resourcequotas"
                | "podtemplates"
                | "namespaces"
                | "storageclasses"
        )
    }

    /// `metadata.generation` is kept: 1 at creation, one more with each change of the specification.
    pub(crate) fn has_generation(&self) -> bool {
        matches!(
            self.plural,
            "deployments"
                | "replicasets"
                | "statefulsets"
                | "daemonsets"
                | "cronjobs"
                | "jobs"
                | "poddisruptionbudgets"
                | "ingresses"
                | "ingressclasses"
                | "networkpolicies"
                | "customresourcedefinitions"
                | "replicationcontrollers"
                | "endpointslices"
                | "priorityclasses"
                | "pods"
                | "podtemplates"
        )
    }

    /// Stored, but nothing in this server acts on it; requests get a warning that says so.
    pub(crate) fn warning(&self) -> Option<&'static str> {
        match self.plural {
            "endpoints" => {
                Some("v1 Endpoints is deprecated in v1.33+; use discovery.k8s.io/v1 EndpointSlice")
            }
            "componentstatuses" => Some("v1 ComponentStatus is deprecated in v1.19+"),
            _ => None,
        }
    }
}

const fn row(
    group: &'static str,
    version: &'static str,
    kind: &'static str,
    plural: &'static str,
    singular: &'static str,
    short_names: &'static [&'static str],
    categories: &'static [&'static str],
    scope: Scope,
    schema: &'static str,
    subresources: &'static [&'static str],
) -> Row {
    Row {
        group,
        version,
        kind,
        plural,
        singular,
        short_names,
        categories,
        scope,
        schema,
        subresources,
    }
}

/// All built-in kinds; the order is that of discovery.
pub(crate) fn rows() -> &'static [Row] {
    &ROWS
}

#[rustfmt::skip]
static ROWS: [Row; 37] = [
    row("", "v1", "ConfigMap", "configmaps", "configmap", &["cm"], &[], Namespaced, "core.v1.ConfigMap", &[]),
    row("", "v1", "Endpoints", "endpoints", "endpoints", &["ep"], &[], Namespaced, "core.v1.Endpoints", &[]),
    row("", "v1", "Event", "events", "event", &["ev"], &[], Namespaced, "core.v1.Event", &[]),
    row("", "v1", "LimitRange", "limitranges", "limitrange", &["limits"], &[], Namespaced, "core.v1.LimitRange", &[]),
    row("", "v1", "Namespace", "namespaces", "namespace", &["ns"], &[], Cluster, "core.v1.Namespace", &["finalize", "status"]),
    row("", "v1", "Node", "nodes", "node", &["no"], &[], Cluster, "core.v1.Node", &["status"]),
    row("", "v1", "PersistentVolumeClaim", "persistentvolumeclaims", "persistentvolumeclaim", &["pvc"], &[], Namespaced, "core.v1.PersistentVolumeClaim", &["status"]),
    row("", "v1", "PersistentVolume", "persistentvolumes", "persistentvolume", &["pv"], &[], Cluster, "core.v1.PersistentVolume", &["status"]),
    row("", "v1", "Pod", "pods", "pod", &["po"], &["all"], Namespaced, "core.v1.Pod", &["binding", "log", "status"]),
    row("", "v1", "PodTemplate", "podtemplates", "podtemplate", &[], &[], Namespaced, "core.v1.PodTemplate", &[]),
    row("", "v1", "ReplicationController", "replicationcontrollers", "replicationcontroller", &["rc"], &["all"], Namespaced, "core.v1.ReplicationController", &["scale", "status"]),
    row("", "v1", "ResourceQuota", "resourcequotas", "resourcequota", &["quota"], &[], Namespaced, "core.v1.ResourceQuota", &["status"]),
    row("", "v1", "Secret", "secrets", "secret", &[], &[], Namespaced, "core.v1.Secret", &[]),
    row("", "v1", "ServiceAccount", "serviceaccounts", "serviceaccount", &["sa"], &[], Namespaced, "core.v1.ServiceAccount", &[]),
    row("", "v1", "Service", "services", "service", &["svc"], &["all"], Namespaced, "core.v1.Service", &["status"]),
    row("apps", "v1", "ControllerRevision", "controllerrevisions", "controllerrevision", &[], &[], Namespaced, "apps.v1.ControllerRevision", &[]),
    row("apps", "v1", "DaemonSet", "daemonsets", "daemonset", &["ds"], &["all"], Namespaced, "apps.v1.DaemonSet", &["status"]),
    row("apps", "v1", "Deployment", "deployments", "deployment", &["deploy"], &["all"], Namespaced, "apps.v1.Deployment", &["scale", "status"]),
    row("apps", "v1", "ReplicaSet", "replicasets", "replicaset", &["rs"], &["all"], Namespaced, "apps.v1.ReplicaSet", &["scale", "status"]),
    row("apps", "v1", "StatefulSet", "statefulsets", "statefulset", &["sts"], &["all"], Namespaced, "apps.v1.StatefulSet", &["scale", "status"]),
    row("events.k8s.io", "v1", "Event", "events", "event", &["ev"], &[], Namespaced, "events.v1.Event", &[]),
    row("autoscaling", "v2", "HorizontalPodAutoscaler", "horizontalpodautoscalers", "horizontalpodautoscaler", &["hpa"], &["all"], Namespaced, "autoscaling.v2.HorizontalPodAutoscaler", &["status"]),
    row("batch", "v1", "CronJob", "cronjobs", "cronjob", &["cj"], &["all"], Namespaced, "batch.v1.CronJob", &["status"]),
    row("batch", "v1", "Job", "jobs", "job", &[], &["all"], Namespaced, "batch.v1.Job", &["status"]),
    row("networking.k8s.io", "v1", "IngressClass", "ingressclasses", "ingressclass", &[], &[], Cluster, "networking.v1.IngressClass", &[]),
    row("networking.k8s.io", "v1", "Ingress", "ingresses", "ingress", &["ing"], &[], Namespaced, "networking.v1.Ingress", &["status"]),
    row("networking.k8s.io", "v1", "NetworkPolicy", "networkpolicies", "networkpolicy", &["netpol"], &[], Namespaced, "networking.v1.NetworkPolicy", &[]),
    row("policy", "v1", "PodDisruptionBudget", "poddisruptionbudgets", "poddisruptionbudget", &["pdb"], &[], Namespaced, "policy.v1.PodDisruptionBudget", &["status"]),
    row("rbac.authorization.k8s.io", "v1", "ClusterRoleBinding", "clusterrolebindings", "clusterrolebinding", &[], &[], Cluster, "rbac.v1.ClusterRoleBinding", &[]),
    row("rbac.authorization.k8s.io", "v1", "ClusterRole", "clusterroles", "clusterrole", &[], &[], Cluster, "rbac.v1.ClusterRole", &[]),
    row("rbac.authorization.k8s.io", "v1", "RoleBinding", "rolebindings", "rolebinding", &[], &[], Namespaced, "rbac.v1.RoleBinding", &[]),
    row("rbac.authorization.k8s.io", "v1", "Role", "roles", "role", &[], &[], Namespaced, "rbac.v1.Role", &[]),
    row("storage.k8s.io", "v1", "StorageClass", "storageclasses", "storageclass", &["sc"], &[], Cluster, "storage.v1.StorageClass", &[]),
    row("apiextensions.k8s.io", "v1", "CustomResourceDefinition", "customresourcedefinitions", "customresourcedefinition", &["crd", "crds"], &["api-extensions"], Cluster, "apiextensions.v1.CustomResourceDefinition", &["status"]),
    row("scheduling.k8s.io", "v1", "PriorityClass", "priorityclasses", "priorityclass", &["pc"], &[], Cluster, "scheduling.v1.PriorityClass", &[]),
    row("coordination.k8s.io", "v1", "Lease", "leases", "lease", &[], &[], Namespaced, "coordination.v1.Lease", &[]),
    row("discovery.k8s.io", "v1", "EndpointSlice", "endpointslices", "endpointslice", &[], &[], Namespaced, "discovery.v1.EndpointSlice", &[]),
];
