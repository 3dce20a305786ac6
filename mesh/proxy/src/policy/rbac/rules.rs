//! The filter: enforced and shadow rules, what they count, and what they leave for later filters and logs.

use std::sync::Arc;

use serin_xds::pb::envoy::config::rbac::v3 as rbac;
use serin_xds::pb::envoy::extensions::filters::http::rbac::v3 as http_rbac;
use serin_xds::pb::envoy::extensions::filters::network::rbac::v3 as network_rbac;
use serin_xds::pb::google::protobuf as google;
use serin_xds::pb::xds::r#type::matcher::v3 as xds;

use super::tree::Tree;
use super::{Decision, Engine};
use crate::error::{Refusal, Within};
use crate::policy::facts::Facts;
use crate::policy::metadata::{Metadata, text};
use crate::policy::stats::{Counter, Registry};

/// Policies, or a matcher tree.
#[derive(Debug)]
enum Judge {
    Policies(Engine),
    Tree(Tree),
}

impl Judge {
    /// Compiles what is given; both would contradict each other.
    fn compile(
        rules: Option<&rbac::Rbac>,
        matcher: Option<&xds::Matcher>,
        names: [&str; 2],
    ) -> Result<Option<Self>, Refusal> {
        match (rules, matcher) {
            (None, None) => Ok(None),
            (Some(rules), None) => Engine::compile(rules)
                .within(names[0])
                .map(|engine| Some(Self::Policies(engine))),
            (None, Some(matcher)) => Tree::compile(matcher)
                .within(names[1])
                .map(|tree| Some(Self::Tree(tree))),
            (Some(_), Some(_)) => Err(Refusal::new(
                names[1],
                format!("cannot be combined with {}", names[0]),
            )),
        }
    }

    fn judge(&self, facts: &Facts<'_>) -> Decision {
        match self {
            Self::Policies(engine) => engine.judge(facts),
            Self::Tree(tree) => tree.judge(facts),
        }
    }
}

/// Enforced and shadow rules of a filter, with their counters.
#[derive(Debug)]
pub struct Rules {
    rules: Option<Judge>,
    shadow: Option<Judge>,
    /// Field of the metadata in which shadow rules name their policy.
    shadow_policy: Box<str>,
    /// Field in which they say their result.
    shadow_result: Box<str>,
    counters: Counters,
    per_policy: Option<PerPolicy>,
}

#[derive(Debug)]
struct Counters {
    allowed: Arc<Counter>,
    denied: Arc<Counter>,
    shadow_allowed: Arc<Counter>,
    shadow_denied: Arc<Counter>,
    logged: Arc<Counter>,
    not_logged: Arc<Counter>,
}

/// `track_per_rule_stats`: policy name to how often it decided.
type PerPolicy = Box<[(Arc<str>, Arc<Counter>)]>;

impl Rules {
    /// Compiles the HTTP filter's message; `prefix` is the connection manager's `stat_prefix`.
    pub(crate) fn compile(
        from: &http_rbac::Rbac,
        prefix: &str,
        workers: usize,
        registry: &mut Registry,
    ) -> Result<Self, Refusal> {
        let names = [
            "envoy_http_rbac_allowed",
            "envoy_http_rbac_denied",
            "envoy_http_rbac_shadow_allowed",
            "envoy_http_rbac_shadow_denied",
            "envoy_http_rbac_logged",
            "envoy_http_rbac_not_logged",
        ];
        let label = ("envoy_http_conn_manager_prefix", prefix);
        Self::build(from, &names, label, workers, registry)
    }

    /// Compiles the network filter's message, which says the same of connections.
    pub(crate) fn compile_network(
        from: network_rbac::Rbac,
        workers: usize,
        registry: &mut Registry,
    ) -> Result<Self, Refusal> {
        let names = [
            "envoy_rbac_allowed",
            "envoy_rbac_denied",
            "envoy_rbac_shadow_allowed",
            "envoy_rbac_shadow_denied",
            "envoy_rbac_logged",
            "envoy_rbac_not_logged",
        ];
        let label = ("envoy_tcp_prefix", &*from.stat_prefix);
        let message = http_rbac::Rbac {
            rules: from.rules,
            shadow_rules: from.shadow_rules,
            matcher: from.matcher,
            shadow_matcher: from.shadow_matcher,
            shadow_rules_stat_prefix: from.shadow_rules_stat_prefix,
            ..Default::default()
        };
        Self::build(&message, &names, label, workers, registry)
    }

    /// `names` are those of the counters, in the order of [`Counters`].
    fn build(
        from: &http_rbac::Rbac,
        names: &[&'static str; 6],
        label: (&'static str, &str),
        workers: usize,
        registry: &mut Registry,
    ) -> Result<Self, Refusal> {
        let rules = Judge::compile(from.rules.as_ref(), from.matcher.as_ref(), ["rules", "matcher"])?;
        let shadow = Judge::compile(
            from.shadow_rules.as_ref(),
            from.shadow_matcher.as_ref(),
            ["shadow_rules", "shadow_matcher"],
        )?;
        let own = [label, ("prefix", &*from.rules_stat_prefix)];
        let of_shadow = [label, ("prefix", &*from.shadow_rules_stat_prefix)];
        let per_policy = from.track_per_rule_stats.then(|| {
            let engines = rules.iter().chain(&shadow);
            engines
                .filter_map(|judge| match judge {
                    Judge::Policies(engine) => Some(engine),
                    Judge::Tree(_) => None,
                })
                .flat_map(|engine| &engine.policies)
                .map(|policy| {
                    let labels = [label, ("policy", &*policy.name)];
                    (
                        policy.name.clone(),
                        registry.counter(workers, "envoy_rbac_policy_decided", &labels),
                    )
                })
                .collect()
        });
        let mut counter = |index: usize, labels: &[_]| registry.counter(workers, names[index], labels);
        let counters = Counters {
            allowed: counter(0, &own),
            denied: counter(1, &own),
            shadow_allowed: counter(2, &of_shadow),
            shadow_denied: counter(3, &of_shadow),
            logged: counter(4, &own),
            not_logged: counter(5, &own),
        };
        Ok(Self {
            rules,
            shadow,
            shadow_policy: format!("{}shadow_effective_policy_id", from.shadow_rules_stat_prefix).into(),
            shadow_result: format!("{}shadow_engine_result", from.shadow_rules_stat_prefix).into(),
            counters,
            per_policy,
        })
    }

    /// Judges a request or connection: the denial's details, if it is denied, and what is to be remembered.
    pub fn judge(&self, facts: &Facts<'_>, worker: usize) -> (Option<String>, Notes<'_>) {
        let mut notes = Notes::default();
        if let Some(shadow) = &self.shadow {
            let decision = shadow.judge(facts);
            let counter = if decision.allowed {
                &self.counters.shadow_allowed
            } else {
                &self.counters.shadow_denied
            };
            counter.add(worker);
            self.count_policy(&decision, worker);
            notes.shadow = Some((self, decision));
        }
        let Some(rules) = &self.rules else {
            return (None, notes);
        };
        let decision = rules.judge(facts);
        self.count_policy(&decision, worker);
        if let Some(logged) = decision.logged {
            let counter = if logged {
                &self.counters.logged
            } else {
                &self.counters.not_logged
            };
            counter.add(worker);
            notes.log_hint = Some(logged);
        }
        if decision.allowed {
            self.counters.allowed.add(worker);
            return (None, notes);
        }
        self.counters.denied.add(worker);
        (Some(denial_details(decision.policy.as_deref())), notes)
    }

    fn count_policy(&self, decision: &Decision, worker: usize) {
        if let (Some(counters), Some(policy)) = (&self.per_policy, &decision.policy)
            && let Some((_, counter)) = counters.iter().find(|(name, _)| name == policy)
        {
            counter.add(worker);
        }
    }
}

/// What judging leaves for later filters and logs.
#[derive(Default)]
pub struct Notes<'a> {
    shadow: Option<(&'a Rules, Decision)>,
    log_hint: Option<bool>,
}

impl Notes<'_> {
    /// Whether there is nothing to remember.
    pub fn is_empty(&self) -> bool {
        self.shadow.is_none() && self.log_hint.is_none()
    }

    /// Writes it down.
    pub fn write(self, namespace: &str, metadata: &mut Metadata) {
        if let Some((rules, decision)) = self.shadow {
            if let Some(policy) = &decision.policy {
                metadata.set(namespace, &rules.shadow_policy, text(&**policy));
            }
            let result = if decision.allowed { "allowed" } else { "denied" };
            metadata.set(namespace, &rules.shadow_result, text(result));
        }
        if let Some(hint) = self.log_hint {
            metadata.set(
                "envoy.common",
                "access_log_hint",
                google::Value {
                    kind: Some(google::value::Kind::BoolValue(hint)),
                },
            );
        }
    }
}

/// `rbac_access_denied_matched_policy[...]`; details hold no white space.
pub(super) fn denial_details(policy: Option<&str>) -> String {
    let name = policy.unwrap_or("none").replace(char::is_whitespace, "_");
    format!("rbac_access_denied_matched_policy[{name}]")
}
