//! What is wrong with an object, in words for its status: rules broken (the object is refused), references to nothing.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::Arc;

use serin_crds::istio::validate;

use crate::object::{Kind, Object, ObjectKey};
use crate::route::{Backend, MESH, RuleSet};
use crate::unhonoured::unhonoured;
use crate::virtual_service::compile;
use crate::{Model, Visibility};

/// How a problem is treated.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Severity {
    /// The object is not used; the last valid version of it stays in effect.
    Refused,
    /// The object is used, but points at something that is not there: requests are answered with 503.
    Unresolved,
}

/// One problem of an object.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Problem {
    /// How it is treated.
    pub severity: Severity,
    /// Path of the field.
    pub field: String,
    /// The rule that is broken, in words.
    pub rule: String,
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.field, self.rule)
    }
}

/// Objects that were refused, with the rules that they break.
#[derive(Debug, Default)]
pub(crate) struct ProblemIndex {
    refused: BTreeMap<ObjectKey, Vec<Problem>>,
}

impl ProblemIndex {
    /// Checks an object (or forgets a deleted one) and says whether it must not be used.
    pub(crate) fn refuses(&mut self, key: &ObjectKey, object: Option<&Object>) -> bool {
        let mut found: Vec<Problem> = object
            .map(violations)
            .unwrap_or_default()
            .into_iter()
            .map(|violation| Problem {
                severity: Severity::Refused,
                field: violation.field,
                rule: violation.rule,
            })
            .collect();
        if let Some(Object::VirtualService(object)) = object {
            found.extend(bad_expressions(&object.spec));
        }
        let missing = object
            .map(unhonoured)
            .unwrap_or_default()
            .into_iter()
            .filter(|field| field.refused);
        found.extend(missing.map(|field| Problem {
            severity: Severity::Refused,
            field: field.path,
            rule: field.reason,
        }));
        if found.is_empty() {
            self.refused.remove(key);
            return false;
        }
        self.refused.insert(key.clone(), found);
        true
    }
}

fn violations(object: &Object) -> Vec<validate::Violation> {
    match object {
        Object::VirtualService(object) => validate::virtual_service(&object.spec),
        Object::DestinationRule(object) => validate::destination_rule(&object.spec),
        Object::Gateway(object) => validate::gateway(&object.spec),
        Object::ServiceEntry(object) => validate::service_entry(&object.spec),
        Object::Sidecar(object) => validate::sidecar(&object.spec),
        Object::Service(_) | Object::EndpointSlice(_) | Object::Pod(_) | Object::Node(_) => Vec::new(),
    }
}

/// Expressions that RE2 would refuse; one of them would make proxies refuse the whole virtual host.
fn bad_expressions(spec: &serin_crds::istio::VirtualServiceSpec) -> Vec<Problem> {
    let mut found = Vec::new();
    let mut check = |field: String, expression: Option<&String>| {
        if let Some(expression) = expression
            && let Err(error) = regex::Regex::new(expression)
        {
            let reason = error.to_string();
            let reason = reason
                .lines()
                .last()
                .unwrap_or_default()
                .trim_start_matches("error: ")
                .to_owned();
            found.push(Problem {
                severity: Severity::Refused,
                field,
                rule: format!("{expression:?} is not a valid regular expression: {reason}"),
            });
        }
    };
    for (index, route) in spec.http.iter().enumerate() {
        let rule = format!("spec.http[{index}]");
        for (position, block) in route.matches.iter().enumerate() {
            let field = format!("{rule}.match[{position}]");
            let plain = [
                ("uri", &block.uri),
                ("scheme", &block.scheme),
                ("method", &block.method),
                ("authority", &block.authority),
            ];
            for (name, value) in plain {
                check(
                    format!("{field}.{name}.regex"),
                    value.as_ref().and_then(|value| value.regex.as_ref()),
                );
            }
            let maps = [
                ("headers", &block.headers),
                ("withoutHeaders", &block.without_headers),
                ("queryParams", &block.query_params),
            ];
            for (name, values) in maps {
                for (key, value) in values {
                    check(format!("{field}.{name}[{key}].regex"), value.regex.as_ref());
                }
            }
        }
        let substitution = route
            .rewrite
            .as_ref()
            .and_then(|rewrite| rewrite.uri_regex_rewrite.as_ref());
        check(
            format!("{rule}.rewrite.uriRegexRewrite.match"),
            substitution.and_then(|rewrite| rewrite.regex.as_ref()),
        );
        for (position, origin) in route
            .cors_policy
            .iter()
            .flat_map(|cors| &cors.allow_origins)
            .enumerate()
        {
            check(
                format!("{rule}.corsPolicy.allowOrigins[{position}].regex"),
                origin.regex.as_ref(),
            );
        }
    }
    found
}

impl Model {
    /// What is wrong with an object, as things stand. Empty for an object that is unknown or in order.
    pub fn problems(&self, key: &ObjectKey) -> Vec<Problem> {
        let mut found = self.problems.refused.get(key).cloned().unwrap_or_default();
        if key.kind == Kind::VirtualService {
            self.unresolved(key, &mut found);
        }
        found.sort();
        found.dedup();
        found
    }

    /// Whether the object was refused.
    pub fn is_refused(&self, key: &ObjectKey) -> bool {
        self.problems.refused.contains_key(key)
    }

    /// Hosts and subsets that a VirtualService would send requests to and that are not there, as things stand: with it, proxies
    /// would answer 503 until they are. Empty for every other kind, and for one that is refused anyway.
    pub fn dangling(&self, object: &Object) -> Vec<Problem> {
        let Object::VirtualService(object) = object else {
            return Vec::new();
        };
        let namespace: Arc<str> = object.metadata.namespace.as_deref().unwrap_or("default").into();
        let rules = compile(object, &self.config.domain, |_| None);
        let mut found = Vec::new();
        self.missing_destinations(&namespace, &rules, &mut found);
        found.sort();
        found.dedup();
        found
    }

    fn unresolved(&self, key: &ObjectKey, found: &mut Vec<Problem>) {
        let Some(rules) = self.rules_of(key) else { return };
        for gateway in rules
            .gateways
            .iter()
            .filter(|gateway| &***gateway != MESH && !self.has_gateway(gateway))
        {
            found.push(Problem {
                severity: Severity::Unresolved,
                field: "spec.gateways".to_owned(),
                rule: format!("referenced gateway {gateway} does not exist"),
            });
        }
        self.missing_destinations(&key.namespace, rules, found);
        for (field, backend) in backends(rules) {
            let Some(service) = self.service(&backend.host) else {
                continue;
            };
            if let Visibility::Namespaces(_) = &service.visibility
                && !service.visibility.includes(&key.namespace)
            {
                found.push(Problem {
                    severity: Severity::Unresolved,
                    field: field.clone(),
                    rule: format!(
                        "referenced host {} is not exported to namespace {}",
                        backend.host, key.namespace
                    ),
                });
            }
            if let Some(port) = backend.port.filter(|port| service.port(*port).is_none()) {
                found.push(Problem {
                    severity: Severity::Unresolved,
                    field,
                    rule: format!("referenced host {} has no port {port}", backend.host),
                });
            }
        }
    }

    fn missing_destinations(&self, namespace: &Arc<str>, rules: &RuleSet, found: &mut Vec<Problem>) {
        let client = crate::Client {
            namespace: namespace.clone(),
            labels: BTreeMap::new(),
            scope: None,
        };
        for (field, backend) in backends(rules) {
            let Some(service) = self.service(&backend.host) else {
                found.push(Problem {
                    severity: Severity::Unresolved,
                    field,
                    rule: format!("referenced host {} does not exist", backend.host),
                });
                continue;
            };
            let Some(subset) = &backend.subset else { continue };
            let policy = self.policy(&backend.host, &service.namespace, &client);
            if !policy.is_some_and(|policy| policy.subsets.iter().any(|known| known.name == **subset)) {
                found.push(Problem {
                    severity: Severity::Unresolved,
                    field,
                    rule: format!(
                        "referenced subset {subset} of host {} is not defined by a DestinationRule",
                        backend.host
                    ),
                });
            }
        }
    }
}

/// Whom the rules send requests and connections to, with the field that says so.
fn backends(rules: &RuleSet) -> impl Iterator<Item = (String, &Backend)> {
    let http = rules.http.iter().flat_map(|route| {
        let field = format!("spec.http[{}]", route.provenance.rule.unwrap_or(0));
        route.hosts().map(move |backend| (field.clone(), backend))
    });
    let connections = [("tls", &rules.tls), ("tcp", &rules.tcp)];
    let connections = connections.into_iter().flat_map(|(kind, routes)| {
        routes.iter().flat_map(move |route| {
            let field = format!("spec.{kind}[{}]", route.provenance.rule.unwrap_or(0));
            route.backends.iter().map(move |backend| (field.clone(), backend))
        })
    });
    http.chain(connections)
}
