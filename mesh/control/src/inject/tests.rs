use std::collections::BTreeMap;

use k8s_openapi::api::core::v1::{Container, Pod};
use serde_json::json;

use super::*;

fn config() -> InjectConfig {
    InjectConfig::new("unix:/run/serin/xds.sock")
}

fn map(entries: &[(&str, &str)]) -> BTreeMap<String, String> {
    entries
        .iter()
        .map(|(name, value)| ((*name).to_string(), (*value).to_string()))
        .collect()
}

/// A pod of a Deployment `reviews-v1`, as its ReplicaSet creates it.
fn pod(labels: &[(&str, &str)], annotations: &[(&str, &str)]) -> Pod {
    let mut all = map(&[
        ("app", "reviews"),
        ("version", "v1"),
        ("pod-template-hash", "6d8f"),
    ]);
    all.extend(map(labels));
    serde_json::from_value(json!({
        "metadata": {
            "generateName": "reviews-v1-6d8f-", "namespace": "prod", "labels": all, "annotations": map(annotations),
            "ownerReferences": [{"apiVersion": "apps/v1", "kind": "ReplicaSet", "name": "reviews-v1-6d8f", "uid": "u", "controller": true}],
        },
        "spec": {
            "initContainers": [{"name": "migrate", "image": "m"}],
            "containers": [{"name": "reviews", "image": "r", "ports": [{"containerPort": 9080}]}],
        },
    }))
    .unwrap()
}

fn inject(namespace_labels: &[(&str, &str)], pod: &Pod) -> Option<Pod> {
    admit(&config(), "prod", &map(namespace_labels), pod).unwrap()
}

fn init_container<'a>(pod: &'a Pod, name: &str) -> &'a Container {
    let spec = pod.spec.as_ref().unwrap();
    spec.init_containers
        .iter()
        .flatten()
        .find(|container| container.name == name)
        .unwrap()
}

fn env(container: &Container, name: &str) -> String {
    let variable = container
        .env
        .iter()
        .flatten()
        .find(|variable| variable.name == name)
        .unwrap();
    match &variable.value_from {
        Some(source) => source.field_ref.as_ref().unwrap().field_path.clone(),
        None => variable.value.clone().unwrap(),
    }
}

#[test]
fn label_beats_annotation_beats_namespace() {
    const INJECT: &str = "sidecar.istio.io/inject";
    let enabled: &[(&str, &str)] = &[("istio-injection", "enabled")];
    let disabled: &[(&str, &str)] = &[("istio-injection", "disabled")];
    let revision: &[(&str, &str)] = &[("istio.io/rev", "default")];
    let none: &[(&str, &str)] = &[];
    // namespace labels, pod label, pod annotation, injected
    let table: &[(&[(&str, &str)], Option<&str>, Option<&str>, bool)] = &[
        (none, None, None, false),
        (enabled, None, None, true),
        (revision, None, None, true),
        (&[("istio.io/rev", "canary")], None, None, false),
        (disabled, None, None, false),
        (disabled, Some("true"), None, false),
        (enabled, Some("false"), None, false),
        (enabled, None, Some("false"), false),
        (enabled, Some("true"), Some("false"), true),
        (enabled, Some("false"), Some("true"), false),
        (none, Some("true"), None, true),
        (none, None, Some("true"), false),
        (enabled, None, Some("true"), true),
        (enabled, Some("nonsense"), None, false),
    ];
    for (index, (namespace, label, annotation, expected)) in table.iter().enumerate() {
        let labels: Vec<_> = label.iter().map(|value| (INJECT, *value)).collect();
        let annotations: Vec<_> = annotation.iter().map(|value| (INJECT, *value)).collect();
        let injected = inject(namespace, &pod(&labels, &annotations)).is_some();
        assert_eq!(injected, *expected, "row {index}");
    }
    assert!(inject(none, &pod(&[("istio.io/rev", "default")], &[])).is_some());
}

#[test]
fn host_network_system_namespaces_and_injected_pods_stay_as_they_are() {
    let enabled = map(&[("istio-injection", "enabled")]);
    let mut on_host = pod(&[], &[]);
    on_host.spec.as_mut().unwrap().host_network = Some(true);
    assert_eq!(admit(&config(), "prod", &enabled, &on_host), Ok(None));
    for namespace in [
        "kube-system",
        "kube-public",
        "kube-node-lease",
        "local-path-storage",
    ] {
        assert_eq!(admit(&config(), namespace, &enabled, &pod(&[], &[])), Ok(None));
    }
    let once = admit(&config(), "prod", &enabled, &pod(&[], &[]))
        .unwrap()
        .unwrap();
    assert_eq!(
        admit(&config(), "prod", &enabled, &once),
        Ok(None),
        "injecting twice"
    );
}

#[test]
fn interception_then_proxy_then_the_users_own_init_containers() {
    let injected = inject(&[("istio-injection", "enabled")], &pod(&[], &[])).unwrap();
    let spec = injected.spec.as_ref().unwrap();
    let names: Vec<_> = spec
        .init_containers
        .iter()
        .flatten()
        .map(|one| one.name.as_str())
        .collect();
    assert_eq!(names, ["istio-init", "istio-proxy", "migrate"]);
    assert_eq!(spec.containers.len(), 1);

    let proxy = init_container(&injected, "istio-proxy");
    assert_eq!(
        proxy.restart_policy.as_deref(),
        Some("Always"),
        "a native sidecar"
    );
    assert_eq!(
        (proxy.image.as_deref(), proxy.args.as_deref().unwrap()),
        (
            Some("serin.dev/proxy"),
            ["proxy".to_string(), "sidecar".to_string()].as_slice()
        )
    );
    assert!(proxy.command.is_none(), "the image's program is the proxy");
    for probe in [&proxy.startup_probe, &proxy.readiness_probe] {
        let get = probe.as_ref().unwrap().http_get.as_ref().unwrap();
        assert_eq!(get.path.as_deref(), Some("/healthz/ready"));
        assert_eq!(serde_json::to_value(&get.port).unwrap(), json!(15021));
    }
    let init = init_container(&injected, "istio-init");
    assert_eq!(
        init.args.as_ref().unwrap().join(" "),
        "intercept --outbound-port=15001 --inbound-port=15006 --exclude-inbound-ports=15090,15021,15020"
    );
    assert_eq!(init.security_context.as_ref().unwrap().run_as_user, Some(0));
}

#[test]
fn the_proxy_knows_who_it_serves() {
    let injected = inject(&[("istio-injection", "enabled")], &pod(&[], &[])).unwrap();
    let proxy = init_container(&injected, "istio-proxy");
    let table = [
        ("POD_NAME", "metadata.name"),
        ("POD_NAMESPACE", "metadata.namespace"),
        ("INSTANCE_IP", "status.podIP"),
        ("SERVICE_ACCOUNT", "spec.serviceAccountName"),
        ("SERIN_DISCOVERY_ADDRESS", "unix:/run/serin/xds.sock"),
        ("ISTIO_META_WORKLOAD_NAME", "reviews-v1"),
        (
            "ISTIO_META_OWNER",
            "kubernetes://apis/apps/v1/namespaces/prod/deployments/reviews-v1",
        ),
        ("ISTIO_META_APP_CONTAINERS", "reviews"),
        ("ISTIO_META_POD_PORTS", r#"[{"containerPort":9080}]"#),
        ("ISTIO_META_INTERCEPTION_MODE", "REDIRECT"),
        ("DNS_DOMAIN", "prod.svc.cluster.local"),
    ];
    for (name, value) in table {
        assert_eq!(env(proxy, name), value, "{name}");
    }
    let labels: BTreeMap<String, String> =
        serde_json::from_str(&env(proxy, "ISTIO_METAJSON_LABELS")).unwrap();
    assert_eq!(labels["service.istio.io/canonical-name"], "reviews");
    assert_eq!(labels["service.istio.io/canonical-revision"], "v1");
    assert_eq!(Some(&labels), injected.metadata.labels.as_ref());
    let annotations = injected.metadata.annotations.unwrap();
    assert_eq!(annotations["kubectl.kubernetes.io/default-container"], "reviews");
    assert_eq!(annotations["prometheus.io/port"], "15090");
    let status: serde_json::Value = serde_json::from_str(&annotations[STATUS_ANNOTATION]).unwrap();
    assert_eq!(status["initContainers"], json!(["istio-init", "istio-proxy"]));
}

#[test]
fn traffic_annotations_become_options_of_the_interception() {
    let table: &[(&str, &str, &str)] = &[
        (
            "includeOutboundIPRanges",
            "10.0.0.0/8, 192.168.0.0/16",
            "--include-outbound-ranges=10.0.0.0/8,192.168.0.0/16",
        ),
        (
            "includeOutboundIPRanges",
            "*",
            "15006 --exclude-inbound-ports=15090,15021,15020",
        ),
        (
            "excludeOutboundIPRanges",
            "169.254.169.254/32",
            "--exclude-outbound-ranges=169.254.169.254/32",
        ),
        (
            "includeOutboundPorts",
            "8080",
            "15006 --exclude-inbound-ports=15090,15021,15020",
        ),
        (
            "excludeOutboundPorts",
            "3306,5432",
            "--exclude-outbound-ports=3306,5432",
        ),
        ("includeInboundPorts", "9080", "--include-inbound-ports=9080"),
        (
            "excludeInboundPorts",
            "9090",
            "--exclude-inbound-ports=15090,15021,15020,9090",
        ),
    ];
    for (name, value, option) in table {
        let name = format!("traffic.sidecar.istio.io/{name}");
        let injected = inject(&[("istio-injection", "enabled")], &pod(&[], &[(&name, value)])).unwrap();
        let args = init_container(&injected, "istio-init")
            .args
            .as_ref()
            .unwrap()
            .join(" ");
        assert!(args.contains(option), "{name}={value:?}: {args}");
    }
}

#[test]
fn ports_beside_limited_ranges_are_refused() {
    let annotations = [
        ("traffic.sidecar.istio.io/includeOutboundIPRanges", "10.0.0.0/8"),
        ("traffic.sidecar.istio.io/includeOutboundPorts", "8080"),
    ];
    let enabled = map(&[("istio-injection", "enabled")]);
    let error = admit(&config(), "prod", &enabled, &pod(&[], &annotations)).unwrap_err();
    assert!(error.to_string().contains("includeOutboundPorts"), "{error}");
}

#[test]
fn what_cannot_be_done_refuses_the_pod_and_says_what_to_do() {
    let table: &[(&str, &str)] = &[
        ("traffic.sidecar.istio.io/excludeOutboundPorts", "http"),
        ("traffic.sidecar.istio.io/excludeInboundPorts", "70000"),
        ("traffic.sidecar.istio.io/includeOutboundIPRanges", "10.0.0.0/33"),
        ("traffic.sidecar.istio.io/excludeInterfaces", "eth1"),
        ("traffic.sidecar.istio.io/includeInboundPorts", ""),
        ("traffic.sidecar.istio.io/includeOutboundIPRanges", ""),
        ("sidecar.istio.io/logLevel", "loud"),
        ("traffic.sidecar.istio.io/kubevirtInterfaces", "k6t-eth0"),
        ("sidecar.istio.io/interceptionMode", "TPROXY"),
        ("sidecar.istio.io/nativeSidecar", "false"),
        ("sidecar.istio.io/bootstrapOverride", "mine"),
        ("inject.istio.io/templates", "sidecar,custom"),
        ("inject.istio.io/templates", "grpc-agent"),
    ];
    let enabled = map(&[("istio-injection", "enabled")]);
    for (name, value) in table {
        let error = admit(&config(), "prod", &enabled, &pod(&[], &[(name, value)]))
            .unwrap_err()
            .to_string();
        assert!(error.contains(name), "{name}={value:?}: {error}");
    }
}

#[test]
fn annotations_that_tune_what_is_not_there_are_listed_on_the_pod() {
    let injected = inject(
        &[("istio-injection", "enabled")],
        &pod(
            &[],
            &[
                ("sidecar.istio.io/statsFlushInterval", "1s"),
                ("proxy.istio.io/config", "tracing: {}"),
            ],
        ),
    )
    .unwrap();
    let annotations = injected.metadata.annotations.unwrap();
    assert_eq!(
        annotations[UNHONOURED_ANNOTATION],
        "proxy.istio.io/config,sidecar.istio.io/statsFlushInterval"
    );
}

#[test]
fn resources_image_log_level_and_mode_follow_their_annotations() {
    let injected = inject(
        &[("istio-injection", "enabled")],
        &pod(
            &[],
            &[
                ("sidecar.istio.io/proxyCPU", "10m"),
                ("sidecar.istio.io/proxyMemoryLimit", "64Mi"),
                ("sidecar.istio.io/proxyImage", "local/proxy:dev"),
                ("sidecar.istio.io/logLevel", "debug"),
                ("sidecar.istio.io/interceptionMode", "NONE"),
                ("prometheus.io/scrape", "false"),
            ],
        ),
    )
    .unwrap();
    let spec = injected.spec.as_ref().unwrap();
    assert!(
        !spec
            .init_containers
            .iter()
            .flatten()
            .any(|one| one.name == "istio-init"),
        "mode NONE"
    );
    let proxy = init_container(&injected, "istio-proxy");
    assert_eq!(
        serde_json::to_value(&proxy.resources).unwrap(),
        json!({"requests": {"cpu": "10m"}, "limits": {"memory": "64Mi"}})
    );
    assert_eq!(proxy.image.as_deref(), Some("local/proxy:dev"));
    assert_eq!(env(proxy, "RUST_LOG"), "debug");
    assert!(
        !injected
            .metadata
            .annotations
            .unwrap()
            .contains_key("prometheus.io/port")
    );
}

#[test]
fn a_gateway_pod_has_its_own_container_filled_in() {
    let gateway = |containers: serde_json::Value| -> Pod {
        serde_json::from_value(json!({
            "metadata": {
                "name": "istio-ingressgateway-0", "namespace": "istio-system",
                "labels": {"istio": "ingressgateway", "sidecar.istio.io/inject": "true"},
                "annotations": {"inject.istio.io/templates": "gateway"},
            },
            "spec": {"containers": containers},
        }))
        .unwrap()
    };
    let written = gateway(
        json!([{"name": "istio-proxy", "image": "auto", "ports": [{"containerPort": 8080}],
        "env": [{"name": "ISTIO_META_CLUSTER_ID", "value": "mine"}]}]),
    );
    let injected = admit(&config(), "istio-system", &BTreeMap::new(), &written)
        .unwrap()
        .unwrap();
    let spec = injected.spec.unwrap();
    assert!(
        spec.init_containers.is_none(),
        "nothing is intercepted in a gateway"
    );
    let container = &spec.containers[0];
    assert_eq!(container.image.as_deref(), Some("serin.dev/proxy"));
    assert_eq!(container.args.as_deref().unwrap(), ["proxy", "router"]);
    assert_eq!(
        env(container, "ISTIO_META_CLUSTER_ID"),
        "mine",
        "what the user set stays"
    );
    assert_eq!(container.ports.as_ref().unwrap().len(), 2);
    assert!(container.readiness_probe.is_some());

    let bare = gateway(json!([{"name": "envoy", "image": "auto"}]));
    let error = admit(&config(), "istio-system", &BTreeMap::new(), &bare).unwrap_err();
    assert_eq!(error, InjectError::NoGatewayContainer);
}
