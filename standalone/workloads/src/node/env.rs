//! A container's environment: every source that Kubernetes has, and `$(VAR)` expansion. Pure.

use std::collections::BTreeMap;

use k8s_openapi::api::core::v1::{
    ConfigMap, Container, EnvVar, ObjectFieldSelector, Pod, ResourceFieldSelector, Secret, Service,
};

/// Why a container cannot be configured; the text of its `CreateContainerConfigError`.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub(crate) struct ConfigError(pub(crate) String);

/// What variables may refer to, in the pod's namespace.
pub(crate) trait References {
    fn config_map(&self, name: &str) -> Option<std::sync::Arc<ConfigMap>>;
    fn secret(&self, name: &str) -> Option<std::sync::Arc<Secret>>;
    /// Services whose addresses the pod is told by environment.
    fn services(&self) -> Vec<std::sync::Arc<Service>>;
}

/// Facts of the pod that are not in its manifest.
#[derive(Debug, Clone, Default)]
pub(crate) struct PodFacts {
    pub(crate) pod_ip: String,
    pub(crate) host_ip: String,
    pub(crate) node_name: String,
}

type Variables = Vec<(String, String)>;

/// The environment of a container; later names win over earlier ones.
pub(crate) fn resolve(
    pod: &Pod,
    container: &Container,
    image_env: &[(String, String)],
    facts: &PodFacts,
    references: &impl References,
) -> Result<Variables, ConfigError> {
    let mut known: BTreeMap<String, String> = BTreeMap::new();
    let mut order: Vec<String> = Vec::new();
    let mut set = |known: &mut BTreeMap<String, String>, name: &str, value: String| {
        if known.insert(name.to_owned(), value).is_none() {
            order.push(name.to_owned());
        }
    };
    for (name, value) in image_env {
        set(&mut known, name, value.clone());
    }
    set(&mut known, "HOSTNAME", hostname(pod));
    let links = pod
        .spec
        .as_ref()
        .and_then(|spec| spec.enable_service_links)
        .unwrap_or(true);
    let mut from_outside = BTreeMap::new();
    for service in references.services() {
        service_variables(&service, links, &mut from_outside);
    }
    for (name, value) in &from_outside {
        set(&mut known, name, value.clone());
    }
    for source in container.env_from.iter().flatten() {
        let prefix = source.prefix.as_deref().unwrap_or_default();
        if let Some(wanted) = &source.config_map_ref {
            match references.config_map(&wanted.name) {
                Some(map) => {
                    for (key, value) in map.data.iter().flatten() {
                        set(&mut known, &format!("{prefix}{key}"), value.clone());
                    }
                }
                None if wanted.optional == Some(true) => {}
                None => return Err(ConfigError(format!("configmap \"{}\" not found", wanted.name))),
            }
        }
        if let Some(wanted) = &source.secret_ref {
            match references.secret(&wanted.name) {
                Some(secret) => {
                    for (key, value) in secret.data.iter().flatten() {
                        set(
                            &mut known,
                            &format!("{prefix}{key}"),
                            String::from_utf8_lossy(&value.0).into_owned(),
                        );
                    }
                }
                None if wanted.optional == Some(true) => {}
                None => return Err(ConfigError(format!("secret \"{}\" not found", wanted.name))),
            }
        }
    }
    for variable in container.env.iter().flatten() {
        if let Some(value) = variable_value(pod, container, variable, &known, facts, references)? {
            set(&mut known, &variable.name, value);
        }
    }
    Ok(order
        .into_iter()
        .filter_map(|name| known.remove(&name).map(|value| (name, value)))
        .collect())
}

fn variable_value(
    pod: &Pod,
    container: &Container,
    variable: &EnvVar,
    known: &BTreeMap<String, String>,
    facts: &PodFacts,
    references: &impl References,
) -> Result<Option<String>, ConfigError> {
    let Some(source) = &variable.value_from else {
        return Ok(Some(expand(variable.value.as_deref().unwrap_or_default(), known)));
    };
    if let Some(field) = &source.field_ref {
        return field_value(pod, field, facts).map(Some);
    }
    if let Some(field) = &source.resource_field_ref {
        return resource_value(pod, container, field).map(Some);
    }
    if let Some(wanted) = &source.config_map_key_ref {
        let found = references.config_map(&wanted.name);
        let missing_map = found.is_none();
        let value = found.and_then(|map| map.data.as_ref()?.get(&wanted.key).cloned());
        return match value {
            Some(value) => Ok(Some(value)),
            None if wanted.optional == Some(true) => Ok(None),
            None if missing_map => Err(ConfigError(format!("configmap \"{}\" not found", wanted.name))),
            None => Err(ConfigError(format!(
                "couldn't find key {} in ConfigMap {}/{}",
                wanted.key,
                pod.metadata.namespace.as_deref().unwrap_or_default(),
                wanted.name
            ))),
        };
    }
    if let Some(wanted) = &source.secret_key_ref {
        let found = references.secret(&wanted.name);
        let missing_secret = found.is_none();
        let value = found.and_then(|secret| {
            Some(String::from_utf8_lossy(&secret.data.as_ref()?.get(&wanted.key)?.0).into_owned())
        });
        return match value {
            Some(value) => Ok(Some(value)),
            None if wanted.optional == Some(true) => Ok(None),
            None if missing_secret => Err(ConfigError(format!("secret \"{}\" not found", wanted.name))),
            None => Err(ConfigError(format!(
                "couldn't find key {} in Secret {}/{}",
                wanted.key,
                pod.metadata.namespace.as_deref().unwrap_or_default(),
                wanted.name
            ))),
        };
    }
    Err(ConfigError(format!(
        "the source of variable {} is not supported",
        variable.name
    )))
}

/// The host name of a pod.
pub(crate) fn hostname(pod: &Pod) -> String {
    let name = pod
        .spec
        .as_ref()
        .and_then(|spec| spec.hostname.clone())
        .or_else(|| pod.metadata.name.clone())
        .unwrap_or_default();
    // HOST_NAME_MAX; kubelet cuts there too.
    let mut name: String = name.chars().take(63).collect();
    name.truncate(name.trim_end_matches(['-', '.']).len());
    name
}

/// The value of a downward API field.
pub(crate) fn field_value(
    pod: &Pod,
    field: &ObjectFieldSelector,
    facts: &PodFacts,
) -> Result<String, ConfigError> {
    let path = field.field_path.as_str();
    let metadata = &pod.metadata;
    let spec = pod.spec.as_ref();
    let keyed = |prefix: &str| -> Option<String> {
        path.strip_prefix(prefix)?
            .strip_prefix("['")?
            .strip_suffix("']")
            .map(str::to_owned)
    };
    if let Some(key) = keyed("metadata.labels") {
        return Ok(metadata
            .labels
            .as_ref()
            .and_then(|labels| labels.get(&key))
            .cloned()
            .unwrap_or_default());
    }
    if let Some(key) = keyed("metadata.annotations") {
        return Ok(metadata
            .annotations
            .as_ref()
            .and_then(|annotations| annotations.get(&key))
            .cloned()
            .unwrap_or_default());
    }
    Ok(match path {
        "metadata.name" => metadata.name.clone().unwrap_or_default(),
        "metadata.namespace" => metadata.namespace.clone().unwrap_or_default(),
        "metadata.uid" => metadata.uid.clone().unwrap_or_default(),
        "metadata.labels" => key_values(metadata.labels.as_ref()),
        "metadata.annotations" => key_values(metadata.annotations.as_ref()),
        "spec.nodeName" => facts.node_name.clone(),
        "spec.serviceAccountName" => spec
            .and_then(|spec| spec.service_account_name.clone())
            .unwrap_or_else(|| "default".to_owned()),
        "status.podIP" | "status.podIPs" => facts.pod_ip.clone(),
        "status.hostIP" | "status.hostIPs" => facts.host_ip.clone(),
        other => return Err(ConfigError(format!("unsupported fieldPath: {other}"))),
    })
}

/// `key="value"` lines, as the downward API writes whole maps.
fn key_values(map: Option<&BTreeMap<String, String>>) -> String {
    map.into_iter()
        .flatten()
        .map(|(key, value)| format!("{key}={value:?}"))
        .collect::<Vec<_>>()
        .join("\n")
}

/// The value of `resourceFieldRef`; without a limit, that of the whole machine is 0 here.
pub(crate) fn resource_value(
    pod: &Pod,
    container: &Container,
    field: &ResourceFieldSelector,
) -> Result<String, ConfigError> {
    let container = match &field.container_name {
        None => container,
        Some(name) => pod
            .spec
            .iter()
            .flat_map(|spec| {
                spec.containers
                    .iter()
                    .chain(spec.init_containers.iter().flatten())
            })
            .find(|other| &other.name == name)
            .ok_or_else(|| ConfigError(format!("container {name} not found")))?,
    };
    let resources = container.resources.as_ref();
    let (which, resource) = field
        .resource
        .split_once('.')
        .ok_or_else(|| ConfigError(format!("unsupported container resource: {}", field.resource)))?;
    let quantities = match which {
        "limits" => resources.and_then(|resources| resources.limits.as_ref()),
        "requests" => resources.and_then(|resources| resources.requests.as_ref()),
        _ => {
            return Err(ConfigError(format!(
                "unsupported container resource: {}",
                field.resource
            )));
        }
    };
    let value = quantities
        .and_then(|quantities| quantities.get(resource))
        .and_then(|quantity| parse_quantity(&quantity.0));
    let value = match (value, resource) {
        (Some(value), _) => value,
        // As kubelet: without a limit the node's allocatable counts.
        (None, "cpu") => std::thread::available_parallelism().map_or(1.0, |count| count.get() as f64),
        (None, _) => 0.0,
    };
    let divisor = field
        .divisor
        .as_ref()
        .and_then(|divisor| parse_quantity(&divisor.0))
        .filter(|divisor| *divisor > 0.0);
    Ok(format!("{}", (value / divisor.unwrap_or(1.0)).ceil() as i64))
}

/// A Kubernetes quantity as a number: `500m`, `1Gi`, `2e3`.
pub(crate) fn parse_quantity(text: &str) -> Option<f64> {
    let suffixes: [(&str, f64); 15] = [
        ("Ki", 1024.0),
        ("Mi", 1024.0 * 1024.0),
        ("Gi", 1024.0 * 1024.0 * 1024.0),
        ("Ti", 1024.0_f64.powi(4)),
        ("Pi", 1024.0_f64.powi(5)),
        ("Ei", 1024.0_f64.powi(6)),
        ("n", 1e-9),
        ("u", 1e-6),
        ("m", 1e-3),
        ("k", 1e3),
        ("M", 1e6),
        ("G", 1e9),
        ("T", 1e12),
        ("P", 1e15),
        ("E", 1e18),
    ];
    for (suffix, factor) in suffixes {
        if let Some(number) = text
            .strip_suffix(suffix)
            .and_then(|number| number.parse::<f64>().ok())
        {
            return Some(number * factor);
        }
    }
    text.parse().ok()
}

/// `$(NAME)` becomes the value of NAME if it is known and stays as written if not; `$$` is a literal `$`.
pub(crate) fn expand(text: &str, known: &BTreeMap<String, String>) -> String {
    let mut result = String::with_capacity(text.len());
    let mut rest = text;
    while let Some(at) = rest.find('$') {
        result.push_str(&rest[..at]);
        let after = &rest[at + 1..];
        if let Some(after) = after.strip_prefix('$') {
            result.push('$');
            rest = after;
        } else if let Some((name, after)) = after.strip_prefix('(').and_then(|inner| inner.split_once(')')) {
            match known.get(name) {
                Some(value) => result.push_str(value),
                None => result.push_str(&format!("$({name})")),
            }
            rest = after;
        } else {
            result.push('$');
            rest = after;
        }
    }
    result.push_str(rest);
    result
}

/// `NAME_SERVICE_HOST` and friends. `KUBERNETES_*` are given even without service links.
fn service_variables(service: &Service, links: bool, variables: &mut BTreeMap<String, String>) {
    let name = service.metadata.name.as_deref().unwrap_or_default();
    let kubernetes = name == "kubernetes" && service.metadata.namespace.as_deref() == Some("default");
    let Some(spec) = &service.spec else { return };
    let address = match spec.cluster_ip.as_deref() {
        Some("" | "None") | None => return,
        Some(address) => address,
    };
    if !links && !kubernetes {
        return;
    }
    let prefix = name.to_uppercase().replace(['-', '.'], "_");
    let mut put = |suffix: String, value: String| variables.insert(format!("{prefix}_{suffix}"), value);
    put("SERVICE_HOST".into(), address.to_owned());
    for (position, port) in spec.ports.iter().flatten().enumerate() {
        let protocol = port.protocol.as_deref().unwrap_or("TCP");
        let (lower, number) = (protocol.to_lowercase(), port.port);
        if position == 0 {
            put("SERVICE_PORT".into(), number.to_string());
            put("PORT".into(), format!("{lower}://{address}:{number}"));
        }
        if let Some(port_name) = &port.name {
            put(
                format!("SERVICE_PORT_{}", port_name.to_uppercase().replace('-', "_")),
                number.to_string(),
            );
        }
        let base = format!("PORT_{number}_{}", protocol.to_uppercase());
        put(base.clone(), format!("{lower}://{address}:{number}"));
        put(format!("{base}_PROTO"), lower);
        put(format!("{base}_PORT"), number.to_string());
        put(format!("{base}_ADDR"), address.to_owned());
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use serde_json::json;

    use super::*;

    struct Fixture;

    impl References for Fixture {
        fn config_map(&self, name: &str) -> Option<Arc<ConfigMap>> {
            (name == "cm").then(|| {
                Arc::new(serde_json::from_value(json!({"data": {"COLOR": "blue", "SIZE": "7"}})).unwrap())
            })
        }
        fn secret(&self, name: &str) -> Option<Arc<Secret>> {
            (name == "s").then(|| {
                Arc::new(serde_json::from_value(json!({"data": {"TOKEN": "aHVudGVyMg=="}})).unwrap())
            })
        }
        fn services(&self) -> Vec<Arc<Service>> {
            vec![Arc::new(
                serde_json::from_value(json!({"metadata": {"name": "my-db", "namespace": "a"},
                    "spec": {"clusterIP": "10.96.0.7", "ports": [{"name": "sql", "port": 5432}]}}))
                .unwrap(),
            )]
        }
    }

    fn pod() -> Pod {
        serde_json::from_value(json!({
            "metadata": {"name": "p", "namespace": "a", "uid": "u", "labels": {"app": "x", "version": "v1"}},
            "spec": {"containers": [{"name": "c"}], "serviceAccountName": "robot"},
        }))
        .unwrap()
    }

    fn environment(container: serde_json::Value) -> Result<BTreeMap<String, String>, ConfigError> {
        let container: Container = serde_json::from_value(container).unwrap();
        let facts = PodFacts {
            pod_ip: "10.244.0.9".into(),
            host_ip: "10.244.0.1".into(),
            node_name: "serin".into(),
        };
        let image = [
            ("PATH".to_owned(), "/bin".to_owned()),
            ("MODE".to_owned(), "image".to_owned()),
        ];
        resolve(&pod(), &container, &image, &facts, &Fixture).map(|all| all.into_iter().collect())
    }

    #[test]
    fn every_source_of_a_variable_is_resolved() {
        let env = environment(json!({"name": "c",
            "envFrom": [{"configMapRef": {"name": "cm"}, "prefix": "CM_"}, {"secretRef": {"name": "s"}},
                        {"configMapRef": {"name": "gone", "optional": true}}],
            "resources": {"limits": {"cpu": "1500m", "memory": "64Mi"}},
            "env": [
                {"name": "MODE", "value": "mine"},
                {"name": "IP", "valueFrom": {"fieldRef": {"fieldPath": "status.podIP"}}},
                {"name": "VERSION", "valueFrom": {"fieldRef": {"fieldPath": "metadata.labels['version']"}}},
                {"name": "ACCOUNT", "valueFrom": {"fieldRef": {"fieldPath": "spec.serviceAccountName"}}},
                {"name": "CPU", "valueFrom": {"resourceFieldRef": {"resource": "limits.cpu"}}},
                {"name": "MEMORY", "valueFrom": {"resourceFieldRef": {"resource": "limits.memory", "divisor": "1Mi"}}},
                {"name": "COLOR", "valueFrom": {"configMapKeyRef": {"name": "cm", "key": "COLOR"}}},
                {"name": "NONE", "valueFrom": {"configMapKeyRef": {"name": "cm", "key": "X", "optional": true}}},
                {"name": "KEY", "valueFrom": {"secretKeyRef": {"name": "s", "key": "TOKEN"}}},
                {"name": "URL", "value": "http://$(IP):80/$(VERSION)/$(UNKNOWN)/$$(IP)"},
            ]}))
        .unwrap();
        for (name, value) in [
            ("MODE", "mine"),
            ("PATH", "/bin"),
            ("HOSTNAME", "p"),
            ("CM_COLOR", "blue"),
            ("TOKEN", "hunter2"),
            ("IP", "10.244.0.9"),
            ("VERSION", "v1"),
            ("ACCOUNT", "robot"),
            ("CPU", "2"),
            ("MEMORY", "64"),
            ("COLOR", "blue"),
            ("KEY", "hunter2"),
            ("URL", "http://10.244.0.9:80/v1/$(UNKNOWN)/$(IP)"),
            ("MY_DB_SERVICE_HOST", "10.96.0.7"),
            ("MY_DB_SERVICE_PORT", "5432"),
            ("MY_DB_SERVICE_PORT_SQL", "5432"),
            ("MY_DB_PORT_5432_TCP_ADDR", "10.96.0.7"),
        ] {
            assert_eq!(env.get(name).map(String::as_str), Some(value), "{name}");
        }
        assert!(!env.contains_key("NONE"));
    }

    #[test]
    fn a_missing_reference_is_named_as_kubelet_names_it() {
        let error = |env: serde_json::Value| environment(json!({"name": "c", "env": [env]})).unwrap_err().0;
        assert_eq!(
            error(json!({"name": "A", "valueFrom": {"configMapKeyRef": {"name": "nope", "key": "k"}}})),
            "configmap \"nope\" not found"
        );
        assert_eq!(
            error(json!({"name": "A", "valueFrom": {"secretKeyRef": {"name": "s", "key": "k"}}})),
            "couldn't find key k in Secret a/s"
        );
        assert_eq!(
            environment(json!({"name": "c", "envFrom": [{"secretRef": {"name": "nope"}}]}))
                .unwrap_err()
                .0,
            "secret \"nope\" not found"
        );
    }

    #[test]
    fn quantities_are_read_with_every_suffix() {
        for (text, value) in [
            ("500m", 0.5),
            ("2", 2.0),
            ("1Gi", 1_073_741_824.0),
            ("3k", 3000.0),
            ("1e3", 1000.0),
        ] {
            assert_eq!(parse_quantity(text), Some(value), "{text}");
        }
        assert_eq!(parse_quantity("lots"), None);
    }

    #[test]
    fn expansion_leaves_what_it_does_not_know() {
        let known = BTreeMap::from([("A".to_owned(), "1".to_owned())]);
        for (text, expected) in [
            ("$(A)", "1"),
            ("$A $(B) $", "$A $(B) $"),
            ("$$(A)", "$(A)"),
            ("$(A", "$(A"),
            ("x$(A)y$(A)", "x1y1"),
        ] {
            assert_eq!(expand(text, &known), expected);
        }
    }
}
