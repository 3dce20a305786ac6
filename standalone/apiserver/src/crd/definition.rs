//! From a CustomResourceDefinition object to a served kind; its defaults, checks and conditions.

use std::sync::Arc;

use serde_json::{Map, Value, json};

use super::rules;
use crate::error::FieldError;
use crate::kinds::{Column, Kind, Origin, Registry, ScalePaths, Version};
use crate::meta::{self, list_at, str_at};
use crate::names;

/// What Kubernetes fills in: singular, listKind, the conversion strategy, column priorities stay absent.
pub(crate) fn default(crd: &mut Value) {
    let spec = meta::member_object(crd, "spec");
    let names = spec.entry("names").or_insert_with(|| json!({}));
    let names = meta::as_object_mut(names);
    let kind = names
        .get("kind")
        .and_then(Value::as_str)
        .unwrap_or_default()
        .to_owned();
    if !kind.is_empty() {
        if names
            .get("singular")
            .and_then(Value::as_str)
            .unwrap_or_default()
            .is_empty()
        {
            names.insert("singular".into(), json!(kind.to_lowercase()));
        }
        if names
            .get("listKind")
            .and_then(Value::as_str)
            .unwrap_or_default()
            .is_empty()
        {
            names.insert("listKind".into(), json!(format!("{kind}List")));
        }
    }
    spec.entry("conversion")
        .or_insert_with(|| json!({"strategy": "None"}));
}

/// The status of a CRD that was just created.
pub(crate) fn initial_status(crd: &mut Value) {
    let stored: Vec<Value> = list_at(crd, "spec.versions")
        .iter()
        .filter(|v| v.get("storage") == Some(&Value::Bool(true)))
        .filter_map(|v| v.get("name").cloned())
        .take(1)
        .collect();
    meta::as_object_mut(crd).insert(
        "status".into(),
        json!({"conditions": null, "acceptedNames": {"plural": "", "kind": ""}, "storedVersions": stored}),
    );
}

/// Check a CRD before it is stored.
pub(crate) fn validate(crd: &Value, old: Option<&Value>) -> Vec<FieldError> {
    let mut errors = Vec::new();
    let (group, plural) = (str_at(crd, "spec.group"), str_at(crd, "spec.names.plural"));
    let name = meta::name(crd);
    // One of the two that may not change: what follows from it is not said as well.
    let renamed = old.is_some_and(|old| {
        ["spec.group", "spec.names.plural"]
            .iter()
            .any(|field| meta::at(crd, field) != meta::at(old, field))
    });
    if name != format!("{plural}.{group}") && !renamed {
        errors.push(FieldError::invalid(
            "metadata.name",
            &json!(name),
            "must be spec.names.plural+\".\"+spec.group".to_string(),
        ));
    }
    if group.is_empty() {
        errors.push(FieldError::required("spec.group", ""));
    } else if !group.contains('.') {
        errors.push(FieldError::invalid(
            "spec.group",
            &json!(group),
            "should be a domain with at least one dot",
        ));
    } else {
        for e in names::subdomain_errors(group) {
            errors.push(FieldError::invalid("spec.group", &json!(group), e));
        }
    }
    let protected = ["k8s.io", "kubernetes.io"]
        .iter()
        .any(|g| group == *g || group.ends_with(&format!(".{g}")));
    if protected && meta::annotation(crd, "api-approved.kubernetes.io").is_none_or(str::is_empty) {
        errors.push(FieldError::required(
            "metadata.annotations[api-approved.kubernetes.io]",
            "protected groups must have approval annotation \"api-approved.kubernetes.io\", see https://github.com/kubernetes/enhancements/pull/1111",
        ));
    }
    if meta::at(crd, "spec.preserveUnknownFields") == Some(&Value::Bool(true)) {
        errors.push(FieldError::invalid(
            "spec.preserveUnknownFields",
            &Value::Bool(true),
            "cannot set to true, set x-kubernetes-preserve-unknown-fields to true in spec.versions[*].schema instead",
        ));
    }
    let scope = meta::at(crd, "spec.scope").cloned().unwrap_or_else(|| json!(""));
    if scope == json!("") {
        errors.push(FieldError::required("spec.scope", ""));
    } else if scope != json!("Cluster") && scope != json!("Namespaced") {
        errors.push(FieldError::not_supported(
            "spec.scope",
            &scope,
            &["Cluster", "Namespaced"],
        ));
    }
    let versions = list_at(crd, "spec.versions");
    check_versions(crd, versions, old.is_none(), &mut errors);
    check_names(crd, &mut errors);
    let kind = str_at(crd, "spec.names.kind");
    if !kind.is_empty() && kind == str_at(crd, "spec.names.listKind") {
        errors.push(FieldError::invalid(
            "spec.names.listKind",
            &json!(kind),
            "kind and listKind may not be the same",
        ));
    }
    match str_at(crd, "spec.conversion.strategy") {
        "" | "None" => {}
        "Webhook" => {
            let before = errors.len();
            if meta::at(crd, "spec.conversion.webhook.clientConfig").is_none() {
                errors.push(FieldError::required(
                    "spec.conversion.webhookClientConfig",
                    "required when strategy is set to Webhook",
                ));
            }
            if list_at(crd, "spec.conversion.webhook.conversionReviewVersions").is_empty() {
                errors.push(FieldError::required(
                    "spec.conversion.conversionReviewVersions",
                    "",
                ));
            }
            if errors.len() == before {
                errors.push(FieldError::forbidden(
                    "spec.conversion.strategy",
                    "conversion webhooks are not supported by this server; use strategy None",
                ));
            }
        }
        other => errors.push(FieldError::not_supported(
            "spec.conversion.strategy",
            &json!(other),
            &["None", "Webhook"],
        )),
    }
    if let Some(old) = old {
        let established = condition_is_true(old, "Established");
        for field in ["spec.group", "spec.names.plural", "spec.names.kind", "spec.scope"] {
            let immutable = field == "spec.group" || field == "spec.names.plural" || established;
            if immutable && meta::at(crd, field) != meta::at(old, field) {
                errors.push(FieldError::invalid(
                    field,
                    meta::at(crd, field).unwrap_or(&Value::Null),
                    "field is immutable",
                ));
            }
        }
    }
    for (i, stored) in list_at(crd, "status.storedVersions").iter().enumerate() {
        let name = stored.as_str().unwrap_or_default();
        if old.is_some() && !versions.iter().any(|v| str_at(v, "name") == name) {
            errors.push(FieldError::invalid(
                format!("status.storedVersions[{i}]"),
                stored,
                format!("missing from spec.versions; {name} was previously a storage version, and must remain in spec.versions until a storage migration ensures no data remains persisted in {name} and removes {name} from status.storedVersions"),
            ));
        }
    }
    super::structural::check(crd, &mut errors);
    errors
}

fn check_versions(crd: &Value, versions: &[Value], is_new: bool, errors: &mut Vec<FieldError>) {
    for (i, version) in versions.iter().enumerate() {
        let name = str_at(version, "name");
        for e in names::dns_1035_errors(name) {
            errors.push(FieldError::invalid(
                format!("spec.versions[{i}].name"),
                &json!(name),
                e.clone(),
            ));
            if versions.len() == 1 {
                // The internal form has a single version's name a second time.
                errors.push(FieldError::invalid("spec.version", &json!(name), e));
            }
        }
        if meta::at(version, "schema.openAPIV3Schema").is_none() {
            errors.push(FieldError::required(
                format!("spec.versions[{i}].schema.openAPIV3Schema"),
                "",
            ));
        }
    }
    let invalid = |text: &str| FieldError {
        value: Some(go_versions(meta::at(crd, "spec.versions"))),
        ..FieldError::invalid("spec.versions", &Value::Null, text)
    };
    let names: Vec<&str> = versions.iter().map(|version| str_at(version, "name")).collect();
    if (1..names.len()).any(|i| names.iter().take(i).any(|before| Some(before) == names.get(i))) {
        errors.push(invalid("must contain unique version names"));
    }
    let storage: Vec<&str> = versions
        .iter()
        .filter(|version| version.get("storage") == Some(&Value::Bool(true)))
        .map(|version| str_at(version, "name"))
        .collect();
    if storage.len() != 1 {
        errors.push(invalid("must have exactly one version marked as storage version"));
    }
    let stored = list_at(crd, "status.storedVersions");
    if stored.is_empty() {
        errors.push(FieldError::invalid(
            "status.storedVersions",
            &Value::Null,
            "must have at least one stored version",
        ));
    }
    for missing in storage.iter().filter(|name| !stored.iter().any(|s| s == *name)) {
        if !stored.is_empty() && is_new {
            errors.push(FieldError::invalid(
                "status.storedVersions",
                &json!(stored),
                format!("must have the storage version {missing}"),
            ));
        }
    }
}

/// Versions as Go prints its internal form, in which what all versions have alike is kept elsewhere.
fn go_versions(versions: Option<&Value>) -> String {
    let Some(Value::Array(list)) = versions else {
        return "null".to_owned();
    };
    let own = |version: &Value| {
        [
            "schema",
            "subresources",
            "additionalPrinterColumns",
            "selectableFields",
        ]
        .map(|part| version.get(part).cloned())
    };
    let first = list.first().map(own);
    if list.iter().any(|version| Some(own(version)) != first) {
        return "null".to_owned();
    }
    let texts: Vec<String> = list
        .iter()
        .map(|version| {
            let flag = |name: &str| version.get(name) == Some(&Value::Bool(true));
            format!(
                "{{\"Name\":{},\"Served\":{},\"Storage\":{},\"Deprecated\":{},\"DeprecationWarning\":{},\"Schema\":null,\"Subresources\":null,\"AdditionalPrinterColumns\":null,\"SelectableFields\":null}}",
                json!(str_at(version, "name")),
                flag("served"),
                flag("storage"),
                flag("deprecated"),
                version.get("deprecationWarning").unwrap_or(&Value::Null),
            )
        })
        .collect();
    format!("[{}]", texts.join(","))
}

fn check_names(crd: &Value, errors: &mut Vec<FieldError>) {
    for field in ["plural", "singular", "kind", "listKind"] {
        let path = format!("spec.names.{field}");
        let text = str_at(crd, &path);
        let may_be_mixed = field == "kind" || field == "listKind";
        if text.is_empty() {
            if field == "plural" || field == "kind" {
                errors.push(FieldError::required(path, ""));
            }
        } else if may_be_mixed {
            for e in names::dns_1035_errors(&text.to_lowercase()) {
                let e = format!("may have mixed case, but should otherwise match: {e}");
                errors.push(FieldError::invalid(path.clone(), &json!(text), e));
            }
        } else {
            for e in names::dns_1035_errors(text) {
                errors.push(FieldError::invalid(path.clone(), &json!(text), e));
            }
        }
        if field == "singular" {
            for list in ["shortNames", "categories"] {
                for (i, name) in list_at(crd, &format!("spec.names.{list}")).iter().enumerate() {
                    for e in names::dns_1035_errors(name.as_str().unwrap_or_default()) {
                        let path = format!("spec.names.{list}[{i}]");
                        errors.push(FieldError::invalid(path, name, e));
                    }
                }
            }
        }
    }
}

pub(crate) fn condition_is_true(object: &Value, kind: &str) -> bool {
    list_at(object, "status.conditions").iter().any(|c| {
        c.get("type").and_then(Value::as_str) == Some(kind)
            && c.get("status").and_then(Value::as_str) == Some("True")
    })
}

/// Set a condition; the transition time changes only with the status.
fn set_condition(
    conditions: &mut Vec<Value>,
    kind: &str,
    status: bool,
    reason: &str,
    message: &str,
    now: &str,
) {
    let status = if status { "True" } else { "False" };
    let fresh = json!({"type": kind, "status": status, "lastTransitionTime": now, "reason": reason, "message": message});
    match conditions
        .iter_mut()
        .find(|c| c.get("type").and_then(Value::as_str) == Some(kind))
    {
        Some(old) => {
            let since = if old.get("status").and_then(Value::as_str) == Some(status) {
                old.get("lastTransitionTime").cloned()
            } else {
                None
            };
            *old = fresh;
            if let Some(since) = since {
                old["lastTransitionTime"] = since;
            }
        }
        None => conditions.push(fresh),
    }
}

/// The status that the naming controller and then the establishing controller give: accepted names, `NamesAccepted`, `Established`.
/// `others` are the CRDs of the same group.
pub(crate) fn reconcile(crd: &Value, registry: &Registry, others: &[&Value], now: &str) -> Value {
    let mut status = crd.get("status").cloned().unwrap_or_else(|| json!({}));
    let group = str_at(crd, "spec.group");
    let wanted = meta::at(crd, "spec.names").cloned().unwrap_or_else(|| json!({}));
    let mut taken_plurals: Vec<String> = Vec::new();
    let mut taken_kinds: Vec<String> = Vec::new();
    for other in others.iter().filter(|o| meta::uid(o) != meta::uid(crd)) {
        let accepted = meta::at(other, "status.acceptedNames")
            .cloned()
            .unwrap_or_default();
        for field in ["plural", "singular"] {
            taken_plurals.push(str_at(&accepted, field).to_owned());
        }
        taken_plurals.extend(
            list_at(&accepted, "shortNames")
                .iter()
                .filter_map(Value::as_str)
                .map(str::to_owned),
        );
        for field in ["kind", "listKind"] {
            taken_kinds.push(str_at(&accepted, field).to_owned());
        }
    }
    for kind in registry.all().filter(|k| &*k.group == group && !k.is_custom()) {
        taken_plurals.push(kind.plural.to_string());
        taken_kinds.push(kind.kind.to_string());
    }
    let mut accepted = meta::at(crd, "status.acceptedNames")
        .and_then(Value::as_object)
        .cloned()
        .unwrap_or_default();
    let mut conflict: Option<(&str, String)> = None;
    for (field, taken, reason) in [
        ("plural", &taken_plurals, "PluralConflict"),
        ("singular", &taken_plurals, "SingularConflict"),
        ("shortNames", &taken_plurals, "ShortNamesConflict"),
        ("kind", &taken_kinds, "KindConflict"),
        ("listKind", &taken_kinds, "ListKindConflict"),
    ] {
        let requested = wanted.get(field);
        let texts: Vec<&str> = match requested {
            Some(Value::String(s)) => vec![s.as_str()],
            Some(Value::Array(a)) => a.iter().filter_map(Value::as_str).collect(),
            _ => Vec::new(),
        };
        if let Some(clash) = texts
            .iter()
            .find(|t| !t.is_empty() && taken.iter().any(|x| x == *t))
        {
            conflict = Some((reason, format!("{clash:?} is already in use")));
            continue;
        }
        match requested {
            Some(value) => {
                accepted.insert(field.into(), value.clone());
            }
            None => {
                accepted.remove(field);
            }
        }
    }
    if let Some(categories) = wanted.get("categories") {
        accepted.insert("categories".into(), categories.clone());
    }
    let map = meta::as_object_mut(&mut status);
    let mut conditions = map
        .get("conditions")
        .and_then(Value::as_array)
        .cloned()
        .unwrap_or_default();
    let was_established = condition_is_true(crd, "Established");
    match &conflict {
        Some((reason, message)) => {
            set_condition(&mut conditions, "NamesAccepted", false, reason, message, now);
            if !was_established {
                set_condition(
                    &mut conditions,
                    "Established",
                    false,
                    "NotAccepted",
                    "not all names are accepted",
                    now,
                );
            }
        }
        None => {
            set_condition(
                &mut conditions,
                "NamesAccepted",
                true,
                "NoConflicts",
                "no conflicts found",
                now,
            );
            if was_established || accepted_before(crd) {
                set_condition(
                    &mut conditions,
                    "Established",
                    true,
                    "InitialNamesAccepted",
                    "the initial names have been accepted",
                    now,
                );
            } else {
                set_condition(
                    &mut conditions,
                    "Established",
                    false,
                    "Installing",
                    "the initial names have been accepted",
                    now,
                );
            }
        }
    }
    map.insert("conditions".into(), Value::Array(conditions));
    map.insert("acceptedNames".into(), Value::Object(accepted));
    let storage: Vec<Value> = list_at(crd, "spec.versions")
        .iter()
        .filter(|v| v.get("storage") == Some(&Value::Bool(true)))
        .filter_map(|v| v.get("name").cloned())
        .collect();
    let stored = map.entry("storedVersions").or_insert_with(|| json!([]));
    if let Value::Array(list) = stored {
        for version in storage {
            if !list.contains(&version) {
                list.push(version);
            }
        }
    }
    status
}

fn accepted_before(crd: &Value) -> bool {
    condition_is_true(crd, "NamesAccepted")
}

/// The kind that a CRD with accepted names defines.
pub(crate) fn to_kind(crd: &Value) -> Kind {
    let group = str_at(crd, "spec.group");
    let accepted = meta::at(crd, "status.acceptedNames").filter(|n| !str_at(n, "plural").is_empty());
    let names = accepted
        .or_else(|| meta::at(crd, "spec.names"))
        .unwrap_or(&Value::Null);
    let plural = str_at(crd, "spec.names.plural");
    let strings = |path: &str| {
        list_at(names, path)
            .iter()
            .filter_map(Value::as_str)
            .map(str::to_owned)
            .collect()
    };
    let kind = str_at(names, "kind");
    let mut versions: Vec<Version> = list_at(crd, "spec.versions")
        .iter()
        .map(|v| to_version(crd, v, kind))
        .collect();
    versions.sort_by_key(|v| std::cmp::Reverse(version_order(&v.name)));
    Kind {
        group: group.into(),
        plural: plural.into(),
        singular: str_at(names, "singular").to_owned(),
        kind: kind.into(),
        list_kind: match str_at(names, "listKind") {
            "" => format!("{kind}List"),
            list => list.to_owned(),
        },
        short_names: strings("shortNames"),
        categories: strings("categories"),
        namespaced: str_at(crd, "spec.scope") == "Namespaced",
        resource: format!("{group}/{plural}").into(),
        versions,
        origin: Origin::Custom,
    }
}

/// Kubernetes' order of version names: v2 > v1 > v1beta2 > v1alpha1 > anything else.
pub(crate) fn version_order(name: &str) -> (u8, u64, u64, std::cmp::Reverse<String>) {
    let other = || (0, 0, 0, std::cmp::Reverse(name.to_owned()));
    let Some(rest) = name.strip_prefix('v') else {
        return other();
    };
    let digits = rest.find(|c: char| !c.is_ascii_digit()).unwrap_or(rest.len());
    let (major, tail) = rest.split_at(digits);
    let Ok(major) = major.parse::<u64>() else {
        return other();
    };
    let (rank, minor) = if tail.is_empty() {
        (3, 0)
    } else if let Some(n) = tail.strip_prefix("beta").and_then(|n| n.parse().ok()) {
        (2, n)
    } else if let Some(n) = tail.strip_prefix("alpha").and_then(|n| n.parse().ok()) {
        (1, n)
    } else {
        return other();
    };
    (rank, major, minor, std::cmp::Reverse(String::new()))
}

fn to_version(crd: &Value, version: &Value, kind: &str) -> Version {
    let name = str_at(version, "name");
    let json = meta::at(version, "schema.openAPIV3Schema")
        .cloned()
        .unwrap_or_else(|| json!({"type": "object", "x-kubernetes-preserve-unknown-fields": true}));
    let flag = |key: &str| version.get(key).and_then(Value::as_bool).unwrap_or(false);
    let scale = meta::at(version, "subresources.scale").map(|s| ScalePaths {
        spec: str_at(s, "specReplicasPath").to_owned(),
        status: str_at(s, "statusReplicasPath").to_owned(),
        selector: Some(str_at(s, "labelSelectorPath").to_owned()).filter(|p| !p.is_empty()),
    });
    let columns = list_at(version, "additionalPrinterColumns")
        .iter()
        .map(|c| Column {
            name: str_at(c, "name").to_owned(),
            r#type: str_at(c, "type").to_owned(),
            format: str_at(c, "format").to_owned(),
            description: str_at(c, "description").to_owned(),
            priority: c.get("priority").and_then(Value::as_i64).unwrap_or(0),
            json_path: str_at(c, "jsonPath").to_owned(),
        })
        .collect();
    let group = str_at(crd, "spec.group");
    let deprecation = flag("deprecated").then(|| match str_at(version, "deprecationWarning") {
        "" => format!("{group}/{name} {kind} is deprecated"),
        text => text.to_owned(),
    });
    Version {
        name: name.into(),
        schema: Arc::new(rules::parse(&json, true)),
        zero: Value::Object(Map::new()),
        served: flag("served"),
        storage: flag("storage"),
        deprecation,
        status: meta::at(version, "subresources.status").is_some(),
        scale,
        columns,
        selectable: list_at(version, "selectableFields")
            .iter()
            .map(|f| str_at(f, "jsonPath").trim_start_matches('.').to_owned())
            .collect(),
        open_api: Some(json),
    }
}
