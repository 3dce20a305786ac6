//! What a request is about: the path as a target, the query as options.

use std::sync::Arc;

use http::HeaderMap;
use http::request::Parts;

use crate::auth::User;
use crate::error::{ApiError, ApiResult};
use crate::kinds::{Kind, Registry, Version};

/// The resource that a path names.
#[derive(Debug, Clone)]
pub(crate) struct Target {
    pub(crate) kind: Arc<Kind>,
    pub(crate) version: Arc<str>,
    /// Empty for cluster-scoped kinds and for lists over all namespaces.
    pub(crate) namespace: String,
    /// Empty for a collection.
    pub(crate) name: String,
    pub(crate) subresource: String,
}

impl Target {
    /// Parse a path; the flag says whether it is of the old `/watch/` form.
    pub(crate) fn parse(path: &str, registry: &Registry) -> ApiResult<(Self, bool)> {
        let parts: Vec<String> = path.trim_matches('/').split('/').map(decode).collect();
        let parts: Vec<&str> = parts.iter().map(String::as_str).collect();
        let (group, version, mut rest) = match parts.as_slice() {
            ["api", version, rest @ ..] => ("", *version, rest),
            ["apis", group, version, rest @ ..] => (*group, *version, rest),
            _ => return Err(ApiError::page_not_found()),
        };
        let mut watch = false;
        if let ["watch", after @ ..] = rest {
            watch = true;
            rest = after;
        }
        let (namespace, plural, name, subresource) = match rest {
            // `namespaces/x/status` is the namespace's own subresource.
            ["namespaces", ns, sub @ ("status" | "finalize")] => ("", "namespaces", *ns, *sub),
            ["namespaces", ns, plural] => (*ns, *plural, "", ""),
            ["namespaces", ns, plural, name] => (*ns, *plural, *name, ""),
            ["namespaces", ns, plural, name, sub @ ..] if !sub.is_empty() => (*ns, *plural, *name, sub[0]),
            [plural] => ("", *plural, "", ""),
            [plural, name] => ("", *plural, *name, ""),
            [plural, name, sub] => ("", *plural, *name, *sub),
            _ => return Err(ApiError::no_such_path()),
        };
        if !registry.has_group_version(group, version) {
            return Err(ApiError::page_not_found());
        }
        let kind = registry.get(group, plural).ok_or_else(|| {
            // Groups of definitions end at the last of their kinds, as in Kubernetes.
            let custom = registry.all().any(|k| &*k.group == group && k.is_custom());
            if custom {
                ApiError::page_not_found()
            } else {
                ApiError::no_such_path()
            }
        })?;
        let v = kind.version(version).ok_or_else(ApiError::no_such_path)?;
        // A cluster-scoped kind has no path below a namespace; a namespaced object has none without.
        if (!kind.namespaced && !namespace.is_empty())
            || (kind.namespaced && namespace.is_empty() && !name.is_empty())
        {
            return Err(ApiError::no_such_path());
        }
        let known = subresource.is_empty()
            || kind.has_subresource(v, subresource)
            || (&*kind.plural == "pods" && super::subresources::refused(subresource).is_some());
        if !known && kind.is_custom() {
            return Err(ApiError::not_found(&kind.group, &kind.plural, name));
        }
        if !known {
            return Err(ApiError::no_such_path());
        }
        Ok((
            Self {
                kind: kind.clone(),
                version: v.name.clone(),
                namespace: namespace.to_owned(),
                name: name.to_owned(),
                subresource: subresource.to_owned(),
            },
            watch,
        ))
    }

    pub(crate) fn version(&self) -> &Version {
        // The version was found when the path was parsed, and a kind is immutable.
        self.kind.version(&self.version).unwrap_or(&self.kind.versions[0])
    }

    pub(crate) fn key(&self) -> String {
        crate::store::key(&self.namespace, &self.name)
    }

    pub(crate) fn api_version(&self) -> String {
        self.kind.api_version(&self.version)
    }

    pub(crate) fn not_found(&self) -> ApiError {
        ApiError::not_found(&self.kind.group, &self.kind.plural, &self.name)
    }
}

fn decode(part: &str) -> String {
    if !part.contains('%') {
        return part.to_owned();
    }
    let mut out = Vec::with_capacity(part.len());
    let bytes = part.as_bytes();
    let mut i = 0;
    while let Some(&b) = bytes.get(i) {
        let hex = part
            .get(i + 1..i + 3)
            .and_then(|h| u8::from_str_radix(h, 16).ok());
        match (b, hex) {
            (b'%', Some(value)) => {
                out.push(value);
                i += 3;
            }
            _ => {
                out.push(b);
                i += 1;
            }
        }
    }
    String::from_utf8_lossy(&out).into_owned()
}

/// Parsed query parameters, in order.
#[derive(Debug, Clone, Default)]
pub(crate) struct Query(Vec<(String, String)>);

impl Query {
    pub(crate) fn parse(text: &str) -> Self {
        Self(
            text.split('&')
                .filter(|p| !p.is_empty())
                .map(|pair| {
                    let (k, v) = pair.split_once('=').unwrap_or((pair, ""));
                    (decode(&k.replace('+', " ")), decode(&v.replace('+', " ")))
                })
                .collect(),
        )
    }

    pub(crate) fn get(&self, key: &str) -> Option<&str> {
        self.0.iter().find(|(k, _)| k == key).map(|(_, v)| v.as_str())
    }

    pub(crate) fn text(&self, key: &str) -> &str {
        self.get(key).unwrap_or_default()
    }

    pub(crate) fn all(&self, key: &str) -> Vec<&str> {
        self.0
            .iter()
            .filter(|(k, _)| k == key)
            .map(|(_, v)| v.as_str())
            .collect()
    }

    /// Kubernetes' idea of a boolean: anything but `false`, `0` and absence is true.
    pub(crate) fn flag(&self, key: &str) -> bool {
        self.get(key)
            .is_some_and(|v| !matches!(v.to_ascii_lowercase().as_str(), "false" | "0"))
    }
}

/// How strictly unknown and duplicate fields are taken.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum FieldValidation {
    Ignore,
    Warn,
    Strict,
}

/// One API call.
#[derive(Debug, Clone)]
pub(crate) struct Call {
    pub(crate) target: Target,
    pub(crate) query: Query,
    pub(crate) headers: HeaderMap,
    pub(crate) user: User,
    watch_prefix: bool,
}

impl Call {
    pub(crate) fn new(target: Target, parts: &Parts, user: User, watch_prefix: bool) -> ApiResult<Self> {
        Ok(Self {
            target,
            query: Query::parse(parts.uri.query().unwrap_or_default()),
            headers: parts.headers.clone(),
            user,
            watch_prefix,
        })
    }

    pub(crate) fn wants_watch(&self) -> bool {
        self.watch_prefix || self.query.flag("watch")
    }

    /// The old `/watch/` form of the path.
    pub(crate) fn is_watch_path(&self) -> bool {
        self.watch_prefix
    }

    pub(crate) fn header(&self, name: &str) -> &str {
        self.headers
            .get(name)
            .and_then(|v| v.to_str().ok())
            .unwrap_or_default()
    }

    /// `fieldManager`, else the user agent up to the first slash.
    pub(crate) fn manager(&self) -> String {
        let given = self.query.text("fieldManager");
        if !given.is_empty() {
            return given.to_owned();
        }
        let agent = self.header("user-agent");
        let agent = agent.split('/').next().unwrap_or_default();
        let printable: String = agent.chars().filter(|c| !c.is_control()).take(128).collect();
        if printable.is_empty() {
            "unknown".to_owned()
        } else {
            printable
        }
    }

    pub(crate) fn dry_run(&self) -> bool {
        !self.query.text("dryRun").is_empty()
    }

    pub(crate) fn field_validation(&self) -> FieldValidation {
        match self.query.text("fieldValidation") {
            "Ignore" => FieldValidation::Ignore,
            "Strict" => FieldValidation::Strict,
            _ => FieldValidation::Warn,
        }
    }

    /// Checks of the options of a write; `kind` is `CreateOptions`, `UpdateOptions` or `PatchOptions`.
    pub(crate) fn check_write_options(&self, kind: &str) -> ApiResult<()> {
        use crate::error::FieldError;
        use serde_json::json;
        let mut errors = Vec::new();
        let dry = self.query.all("dryRun");
        if dry.iter().any(|d| *d != "All") && !dry.is_empty() && dry != [""] {
            let mut error = FieldError::not_supported("dryRun", &json!(dry), &["All"]);
            error.value = Some(format!(
                "[{}]",
                dry.iter().map(|d| format!("{d:?}")).collect::<Vec<_>>().join(",")
            ));
            errors.push(error);
        }
        let manager = self.query.text("fieldManager");
        if manager.len() > 128 {
            errors.push(FieldError::plain(
                crate::error::FieldErrorKind::TooLong,
                "fieldManager",
                "may not be more than 128 bytes",
            ));
        }
        if let Some((at, c)) = manager.char_indices().find(|(_, c)| c.is_control()) {
            errors.push(FieldError::invalid(
                "fieldManager",
                &json!(manager),
                format!("invalid character U+{:04X} (at position {at})", u32::from(c)),
            ));
        }
        match self.query.text("fieldValidation") {
            "" | "Ignore" | "Warn" | "Strict" => {}
            other => errors.push(FieldError::not_supported(
                "fieldValidation",
                &json!(other),
                &["Ignore", "Strict", "Warn", ""],
            )),
        }
        if errors.is_empty() {
            Ok(())
        } else {
            Err(ApiError::invalid("meta.k8s.io", kind, "", &errors))
        }
    }
}
