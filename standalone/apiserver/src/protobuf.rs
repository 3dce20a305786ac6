//! The kinds that kubectl creates with protobuf bodies: `k8s\0`, then `runtime.Unknown`, whose `raw` is the message of the kind.
//!
//! A message is described by its fields (number, JSON name, type). A field that the description lacks is refused, never dropped.

use serde_json::{Map, Value, json};

/// Kinds that can be decoded.
pub(crate) const KINDS: [&str; 6] = [
    "Namespace",
    "ConfigMap",
    "Secret",
    "ServiceAccount",
    "Deployment",
    "Service",
];

const MAGIC: &[u8] = b"k8s\0";
/// Messages nested deeper are not ours.
const MAX_DEPTH: usize = 32;

#[derive(Clone, Copy)]
enum Type {
    Text,
    Int,
    Bool,
    Message(&'static [Field]),
    TextMap,
    BytesMap,
    QuantityMap,
    IntOrString,
    /// Seconds and nanoseconds since the epoch.
    Time,
}

struct Field {
    number: u32,
    name: &'static str,
    kind: Type,
    repeated: bool,
}

const fn one(number: u32, name: &'static str, kind: Type) -> Field {
    Field {
        number,
        name,
        kind,
        repeated: false,
    }
}

const fn many(number: u32, name: &'static str, kind: Type) -> Field {
    Field {
        number,
        name,
        kind,
        repeated: true,
    }
}

static META: &[Field] = &[
    one(1, "name", Type::Text),
    one(2, "generateName", Type::Text),
    one(3, "namespace", Type::Text),
    one(4, "selfLink", Type::Text),
    one(5, "uid", Type::Text),
    one(6, "resourceVersion", Type::Text),
    one(7, "generation", Type::Int),
    one(8, "creationTimestamp", Type::Time),
    one(11, "labels", Type::TextMap),
    one(12, "annotations", Type::TextMap),
    many(14, "finalizers", Type::Text),
];
static EMPTY: &[Field] = &[];
static NAMESPACE: &[Field] = &[
    one(1, "metadata", Type::Message(META)),
    one(2, "spec", Type::Message(&[many(1, "finalizers", Type::Text)])),
    one(3, "status", Type::Message(&[one(1, "phase", Type::Text)])),
];
static CONFIG_MAP: &[Field] = &[
    one(1, "metadata", Type::Message(META)),
    one(2, "data", Type::TextMap),
    one(3, "binaryData", Type::BytesMap),
    one(4, "immutable", Type::Bool),
];
static SECRET: &[Field] = &[
    one(1, "metadata", Type::Message(META)),
    one(2, "data", Type::BytesMap),
    one(3, "type", Type::Text),
    one(4, "stringData", Type::TextMap),
    one(5, "immutable", Type::Bool),
];
static SERVICE_ACCOUNT: &[Field] = &[
    one(1, "metadata", Type::Message(META)),
    one(4, "automountServiceAccountToken", Type::Bool),
];
static LABEL_SELECTOR: &[Field] = &[one(1, "matchLabels", Type::TextMap)];
static RESOURCES: &[Field] = &[
    one(1, "limits", Type::QuantityMap),
    one(2, "requests", Type::QuantityMap),
];
static CONTAINER_PORT: &[Field] = &[
    one(1, "name", Type::Text),
    one(2, "hostPort", Type::Int),
    one(3, "containerPort", Type::Int),
    one(4, "protocol", Type::Text),
    one(5, "hostIP", Type::Text),
];
static ENV: &[Field] = &[one(1, "name", Type::Text), one(2, "value", Type::Text)];
static CONTAINER: &[Field] = &[
    one(1, "name", Type::Text),
    one(2, "image", Type::Text),
    many(3, "command", Type::Text),
    many(4, "args", Type::Text),
    one(5, "workingDir", Type::Text),
    many(6, "ports", Type::Message(CONTAINER_PORT)),
    many(7, "env", Type::Message(ENV)),
    one(8, "resources", Type::Message(RESOURCES)),
    one(13, "terminationMessagePath", Type::Text),
    one(14, "imagePullPolicy", Type::Text),
    one(16, "stdin", Type::Bool),
    one(17, "stdinOnce", Type::Bool),
    one(18, "tty", Type::Bool),
    one(20, "terminationMessagePolicy", Type::Text),
];
static POD_SPEC: &[Field] = &[
    many(2, "containers", Type::Message(CONTAINER)),
    one(3, "restartPolicy", Type::Text),
    one(4, "terminationGracePeriodSeconds", Type::Int),
    one(6, "dnsPolicy", Type::Text),
    one(7, "nodeSelector", Type::TextMap),
    one(8, "serviceAccountName", Type::Text),
    one(9, "serviceAccount", Type::Text),
    one(10, "nodeName", Type::Text),
    one(11, "hostNetwork", Type::Bool),
    one(12, "hostPID", Type::Bool),
    one(13, "hostIPC", Type::Bool),
    one(14, "securityContext", Type::Message(EMPTY)),
    one(16, "hostname", Type::Text),
    one(17, "subdomain", Type::Text),
    one(19, "schedulerName", Type::Text),
];
static TEMPLATE: &[Field] = &[
    one(1, "metadata", Type::Message(META)),
    one(2, "spec", Type::Message(POD_SPEC)),
];
static ROLLING: &[Field] = &[
    one(1, "maxUnavailable", Type::IntOrString),
    one(2, "maxSurge", Type::IntOrString),
];
static STRATEGY: &[Field] = &[
    one(1, "type", Type::Text),
    one(2, "rollingUpdate", Type::Message(ROLLING)),
];
static DEPLOYMENT_SPEC: &[Field] = &[
    one(1, "replicas", Type::Int),
    one(2, "selector", Type::Message(LABEL_SELECTOR)),
    one(3, "template", Type::Message(TEMPLATE)),
    one(4, "strategy", Type::Message(STRATEGY)),
    one(5, "minReadySeconds", Type::Int),
    one(6, "revisionHistoryLimit", Type::Int),
    one(7, "paused", Type::Bool),
    one(9, "progressDeadlineSeconds", Type::Int),
];
static COUNTS: &[Field] = &[
    one(1, "observedGeneration", Type::Int),
    one(2, "replicas", Type::Int),
    one(3, "updatedReplicas", Type::Int),
    one(4, "availableReplicas", Type::Int),
    one(5, "unavailableReplicas", Type::Int),
    one(7, "readyReplicas", Type::Int),
];
static DEPLOYMENT: &[Field] = &[
    one(1, "metadata", Type::Message(META)),
    one(2, "spec", Type::Message(DEPLOYMENT_SPEC)),
    one(3, "status", Type::Message(COUNTS)),
];
static SERVICE_PORT: &[Field] = &[
    one(1, "name", Type::Text),
    one(2, "protocol", Type::Text),
    one(3, "port", Type::Int),
    one(4, "targetPort", Type::IntOrString),
    one(5, "nodePort", Type::Int),
    one(6, "appProtocol", Type::Text),
];
static SERVICE_SPEC: &[Field] = &[
    many(1, "ports", Type::Message(SERVICE_PORT)),
    one(2, "selector", Type::TextMap),
    one(3, "clusterIP", Type::Text),
    one(4, "type", Type::Text),
    many(5, "externalIPs", Type::Text),
    one(7, "sessionAffinity", Type::Text),
    one(8, "loadBalancerIP", Type::Text),
    many(9, "loadBalancerSourceRanges", Type::Text),
    one(10, "externalName", Type::Text),
    one(11, "externalTrafficPolicy", Type::Text),
    one(12, "healthCheckNodePort", Type::Int),
    one(13, "publishNotReadyAddresses", Type::Bool),
];
static SERVICE: &[Field] = &[
    one(1, "metadata", Type::Message(META)),
    one(2, "spec", Type::Message(SERVICE_SPEC)),
    one(
        3,
        "status",
        Type::Message(&[one(1, "loadBalancer", Type::Message(EMPTY))]),
    ),
];
static DELETE_OPTIONS: &[Field] = &[
    one(1, "gracePeriodSeconds", Type::Int),
    one(
        2,
        "preconditions",
        Type::Message(&[one(1, "uid", Type::Text), one(2, "resourceVersion", Type::Text)]),
    ),
    one(3, "orphanDependents", Type::Bool),
    one(4, "propagationPolicy", Type::Text),
    many(5, "dryRun", Type::Text),
];

/// Decode `k8s\0` + `runtime.Unknown`; the error names what cannot be read.
pub(crate) fn decode(bytes: &[u8], kind: &str) -> Result<Value, String> {
    let unknown = bytes
        .strip_prefix(MAGIC)
        .ok_or_else(|| "the body does not appear to be a protobuf message of Kubernetes".to_owned())?;
    let fields = match kind {
        "Namespace" => NAMESPACE,
        "ConfigMap" => CONFIG_MAP,
        "Secret" => SECRET,
        "ServiceAccount" => SERVICE_ACCOUNT,
        "Deployment" => DEPLOYMENT,
        "Service" => SERVICE,
        "DeleteOptions" => DELETE_OPTIONS,
        other => return Err(format!("{other} is not among them")),
    };
    let (mut api_version, mut found_kind, mut raw) = (String::new(), String::new(), &[][..]);
    for entry in Wire(unknown) {
        match entry? {
            (1, Content::Bytes(meta)) => {
                for entry in Wire(meta) {
                    match entry? {
                        (1, Content::Bytes(text)) => api_version = String::from_utf8_lossy(text).into_owned(),
                        (2, Content::Bytes(text)) => found_kind = String::from_utf8_lossy(text).into_owned(),
                        _ => {}
                    }
                }
            }
            (2, Content::Bytes(body)) => raw = body,
            _ => {}
        }
    }
    let mut out = message(fields, raw, 0)?;
    out.insert("apiVersion".into(), json!(api_version));
    out.insert("kind".into(), json!(found_kind));
    Ok(Value::Object(out))
}

enum Content<'a> {
    Varint(u64),
    Bytes(&'a [u8]),
}

/// Iterates over the fields of a message.
struct Wire<'a>(&'a [u8]);

impl<'a> Wire<'a> {
    fn varint(&mut self) -> Result<u64, String> {
        let mut value = 0u64;
        for shift in (0..64).step_by(7) {
            let (byte, rest) = self.0.split_first().ok_or("a number ends too early")?;
            self.0 = rest;
            value |= u64::from(byte & 0x7F) << shift;
            if byte & 0x80 == 0 {
                return Ok(value);
            }
        }
        Err("a number is too long".to_owned())
    }

    fn field(&mut self) -> Result<(u32, Content<'a>), String> {
        let tag = self.varint()?;
        let number = u32::try_from(tag >> 3).map_err(|_| "a field number is too large".to_owned())?;
        match tag & 7 {
            0 => Ok((number, Content::Varint(self.varint()?))),
            2 => {
                let length =
                    usize::try_from(self.varint()?).map_err(|_| "a length is too large".to_owned())?;
                let (content, rest) = self.0.split_at_checked(length).ok_or("a field ends too early")?;
                self.0 = rest;
                Ok((number, Content::Bytes(content)))
            }
            other => Err(format!(
                "wire type {other} of field {number} is not used by Kubernetes"
            )),
        }
    }
}

impl<'a> Iterator for Wire<'a> {
    type Item = Result<(u32, Content<'a>), String>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.0.is_empty() {
            return None;
        }
        let item = self.field();
        if item.is_err() {
            self.0 = &[];
        }
        Some(item)
    }
}

fn message(fields: &[Field], bytes: &[u8], depth: usize) -> Result<Map<String, Value>, String> {
    if depth > MAX_DEPTH {
        return Err("the message is nested too deeply".to_owned());
    }
    let mut out = Map::new();
    for entry in Wire(bytes) {
        let (number, content) = entry?;
        let Some(field) = fields.iter().find(|f| f.number == number) else {
            // What Go writes for an empty struct carries nothing.
            if matches!(content, Content::Bytes([])) || matches!(content, Content::Varint(0)) {
                continue;
            }
            return Err(format!("field {number} is set, which this server does not read"));
        };
        match field.kind {
            Type::TextMap | Type::BytesMap | Type::QuantityMap => {
                let Content::Bytes(pair) = content else {
                    return Err(mismatch(field));
                };
                let (mut key, mut value) = (String::new(), Value::String(String::new()));
                for entry in Wire(pair) {
                    match entry? {
                        (1, Content::Bytes(text)) => key = String::from_utf8_lossy(text).into_owned(),
                        (2, Content::Bytes(body)) => {
                            value = match field.kind {
                                Type::BytesMap => base64(body),
                                Type::QuantityMap => {
                                    message(&[one(1, "string", Type::Text)], body, depth + 1)?
                                        .remove("string")
                                        .unwrap_or_default()
                                }
                                _ => json!(String::from_utf8_lossy(body)),
                            }
                        }
                        _ => {}
                    }
                }
                let map = out.entry(field.name).or_insert_with(|| json!({}));
                crate::meta::as_object_mut(map).insert(key, value);
            }
            _ => {
                let value = single(field, &content, depth)?;
                // Go writes plain strings even when they are empty; in JSON they are absent.
                if !field.repeated && value == json!("") {
                    continue;
                }
                if field.repeated {
                    let list = out.entry(field.name).or_insert_with(|| json!([]));
                    if let Value::Array(list) = list {
                        list.push(value);
                    }
                } else {
                    out.insert(field.name.into(), value);
                }
            }
        }
    }
    Ok(out)
}

fn mismatch(field: &Field) -> String {
    format!("field {} has an unexpected wire type", field.name)
}

fn base64(bytes: &[u8]) -> Value {
    use base64::Engine as _;
    json!(base64::engine::general_purpose::STANDARD.encode(bytes))
}

fn single(field: &Field, content: &Content<'_>, depth: usize) -> Result<Value, String> {
    match (field.kind, content) {
        (Type::Text, Content::Bytes(text)) => Ok(json!(String::from_utf8_lossy(text))),
        (Type::Int, Content::Varint(n)) => Ok(json!(i64::from_le_bytes(n.to_le_bytes()))),
        (Type::Bool, Content::Varint(n)) => Ok(json!(*n != 0)),
        (Type::Message(fields), Content::Bytes(bytes)) => {
            message(fields, bytes, depth + 1).map(Value::Object)
        }
        (Type::IntOrString, Content::Bytes(bytes)) => {
            let (mut is_text, mut number, mut text) = (false, 0, String::new());
            for entry in Wire(bytes) {
                match entry? {
                    (1, Content::Varint(n)) => is_text = n == 1,
                    (2, Content::Varint(n)) => number = i64::from_le_bytes(n.to_le_bytes()),
                    (3, Content::Bytes(t)) => text = String::from_utf8_lossy(t).into_owned(),
                    _ => {}
                }
            }
            Ok(if is_text { json!(text) } else { json!(number) })
        }
        (Type::Time, Content::Bytes(bytes)) => {
            let mut seconds = None;
            for entry in Wire(bytes) {
                if let (1, Content::Varint(n)) = entry? {
                    seconds = Some(i64::from_le_bytes(n.to_le_bytes()));
                }
            }
            Ok(seconds
                .and_then(|s| jiff::Timestamp::from_second(s).ok())
                .map_or(Value::Null, |t| json!(crate::time::seconds(t))))
        }
        _ => Err(mismatch(field)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn field(number: u8, body: &[u8]) -> Vec<u8> {
        let mut out = vec![number << 3 | 2, body.len() as u8];
        out.extend_from_slice(body);
        out
    }

    fn wrap(kind: &str, raw: &[u8]) -> Vec<u8> {
        let mut out = MAGIC.to_vec();
        out.extend(field(1, &[field(1, b"v1"), field(2, kind.as_bytes())].concat()));
        out.extend(field(2, raw));
        out
    }

    #[test]
    fn a_config_map_of_kubectl_is_read() {
        let raw = [
            field(1, &field(1, b"c")),
            field(2, &[field(1, b"k"), field(2, b"v")].concat()),
        ]
        .concat();
        let value = decode(&wrap("ConfigMap", &raw), "ConfigMap").expect("decodes");
        assert_eq!(
            value,
            json!({"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "c"}, "data": {"k": "v"}})
        );
    }

    #[test]
    fn what_is_not_described_is_refused_and_hostile_bytes_never_panic() {
        assert!(decode(&wrap("ConfigMap", &field(9, b"x")), "ConfigMap").is_err());
        assert!(decode(b"{}", "ConfigMap").is_err());
        let whole = wrap("ConfigMap", &field(1, &field(1, b"c")));
        for cut in 0..whole.len() {
            let _ = decode(&whole[..cut], "ConfigMap");
        }
    }
}
