//! Role-based access control: who may do what, as Envoy's `RBAC` message says it.
//!
//! A policy matches if any of its permissions and any of its principals do, and its condition holds. Policies are asked in the order of their
//! names. ALLOW lets through what a policy matches, DENY what none does, LOG everything and tells the access log. Shadow
//! rules are judged and counted, never enforced. A denial names its policy, which in a mesh names the rule
//! (`ns[a]-policy[b]-rule[0]`). Instead of policies there may be a matcher `tree`, whose actions have names.

mod tree;

use std::sync::Arc;

use serin_xds::pb::envoy::config::core::v3 as core;
use serin_xds::pb::envoy::config::rbac::v3 as rbac;
use serin_xds::pb::envoy::extensions::filters::http::rbac::v3 as http_rbac;
use serin_xds::pb::envoy::extensions::path::r#match::uri_template::v3 as template;
use serin_xds::pb::envoy::extensions::rbac::principals::mtls_authenticated::v3 as mtls_authenticated;
use serin_xds::pb::envoy::extensions::transport_sockets::tls::v3 as tls;
use serin_xds::pb::xds::r#type::matcher::v3 as xds;

use super::cel::Expression;
use super::facts::{Facts, PeerIdentity};
use super::filter_state::StateMatch;
use super::metadata::{Metadata, MetadataMatch, text};
use super::stats::{Counter, Registry};
use super::uri_template::UriTemplate;
use crate::config::convert;
use crate::config::listener::Cidr;
use crate::config::matchers::{HeaderMatch, StringMatch};
use crate::error::{Refusal, Within};

/// Namespace of what shadow rules say.
pub const NAMESPACE: &str = "envoy.filters.http.rbac";
/// The same for network filters.
pub const NETWORK_NAMESPACE: &str = "envoy.filters.network.rbac";
/// Filter state under which a mesh keeps the peer's identity.
const PEER_PRINCIPAL: &str = "io.istio.peer_principal";

/// What a match means.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Action {
    /// What matches passes.
    Allow,
    /// What matches is denied.
    Deny,
    /// Everything passes; what matches is to be logged.
    Log,
}

/// A compiled `RBAC` message.
#[derive(Debug)]
pub struct Engine {
    action: Action,
    policies: Box<[Policy]>,
}

#[derive(Debug)]
struct Policy {
    name: Arc<str>,
    permissions: Box<[Permission]>,
    principals: Box<[Principal]>,
    condition: Option<Expression>,
}

/// What an engine says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Decision {
    /// Whether the request passes.
    pub allowed: bool,
    /// The policy that matched, or the action of a matcher tree.
    pub policy: Option<Arc<str>>,
    /// Whether the request is to be logged, where that was asked.
    pub logged: Option<bool>,
}

/// Policies, or a matcher tree.
#[derive(Debug)]
enum Judge {
    Policies(Engine),
    Tree(tree::Tree),
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
            (None, Some(matcher)) => tree::Tree::compile(matcher)
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

#[derive(Debug)]
enum Permission {
    Any,
    And(Box<[Permission]>),
    Or(Box<[Permission]>),
    Not(Box<Permission>),
    Header(HeaderMatch),
    Path(StringMatch),
    DestinationIp(Cidr),
    Ports(std::ops::Range<u32>),
    Metadata(MetadataMatch),
    ServerName(StringMatch),
    Template(UriTemplate),
}

#[derive(Debug)]
enum Principal {
    Any,
    And(Box<[Principal]>),
    Or(Box<[Principal]>),
    Not(Box<Principal>),
    /// A verified certificate, with such a name if one is asked for.
    Authenticated(Option<StringMatch>),
    /// The same as an extension says it.
    MutualTls(MutualTls),
    DirectRemote(Cidr),
    Source(Cidr),
    Remote(Cidr),
    Header(HeaderMatch),
    Path(StringMatch),
    Metadata(MetadataMatch),
    /// Filter state; the peer's identity, which Istio keeps there, if nothing else has been set under its key.
    State(StateMatch, bool),
}

impl Engine {
    /// Compiles the message.
    pub(crate) fn compile(from: &rbac::Rbac) -> Result<Self, Refusal> {
        let action = match rbac::rbac::Action::try_from(from.action) {
            Ok(rbac::rbac::Action::Allow) => Action::Allow,
            Ok(rbac::rbac::Action::Deny) => Action::Deny,
            Ok(rbac::rbac::Action::Log) => Action::Log,
            Err(_) => return Err(Refusal::new("action", format!("{} is unknown", from.action))),
        };
        // Loggers that may be left out are.
        if from.audit_logging_options.as_ref().is_some_and(|options| {
            options.audit_condition != 0 && options.logger_configs.iter().any(|one| !one.is_optional)
        }) {
            return Err(Refusal::new(
                "audit_logging_options",
                "audit loggers are not supported",
            ));
        }
        let mut names: Vec<_> = from.policies.keys().collect();
        names.sort_unstable();
        let policies = names
            .into_iter()
            .map(|name| Policy::compile(name, &from.policies[name]).within(format!("policies[{name:?}]")))
            .collect::<Result<_, _>>()?;
        Ok(Self { action, policies })
    }

    /// What a match means here.
    pub fn action(&self) -> Action {
        self.action
    }

    /// Judges.
    pub fn judge(&self, facts: &Facts<'_>) -> Decision {
        let policy = self.policies.iter().find(|policy| policy.matches(facts));
        let matched = policy.is_some();
        Decision {
            allowed: match self.action {
                Action::Allow => matched,
                Action::Deny => !matched,
                Action::Log => true,
            },
            policy: policy.map(|policy| policy.name.clone()),
            logged: (self.action == Action::Log).then_some(matched),
        }
    }
}

impl Policy {
    fn compile(name: &str, from: &rbac::Policy) -> Result<Self, Refusal> {
        // Conversions and joined texts are always there.
        if from
            .cel_config
            .as_ref()
            .is_some_and(|config| config.enable_string_functions)
        {
            return Err(Refusal::new(
                "cel_config.enable_string_functions",
                "not supported",
            ));
        }
        let checked = from.checked_condition.as_ref();
        let condition = match (&from.condition, checked) {
            (Some(expression), _) => Some(("condition", expression)),
            (None, Some(checked)) => match &checked.expr {
                Some(expression) => Some(("checked_condition", expression)),
                None => return Err(Refusal::new("checked_condition.expr", "is missing")),
            },
            (None, None) => None,
        };
        Ok(Self {
            name: name.into(),
            permissions: each(&from.permissions, "permissions", Permission::compile)?,
            principals: each(&from.principals, "principals", Principal::compile)?,
            condition: condition
                .map(|(field, expression)| Expression::of_message(expression, None).within(field))
                .transpose()?,
        })
    }

    fn matches(&self, facts: &Facts<'_>) -> bool {
        self.permissions
            .iter()
            .any(|permission| permission.matches(facts))
            && self.principals.iter().any(|principal| principal.matches(facts))
            && self
                .condition
                .as_ref()
                .is_none_or(|condition| condition.holds(facts))
    }
}

fn each<M, T>(
    from: &[M],
    field: &str,
    compile: impl Fn(&M) -> Result<T, Refusal>,
) -> Result<Box<[T]>, Refusal> {
    from.iter()
        .enumerate()
        .map(|(index, message)| compile(message).within(format!("{field}[{index}]")))
        .collect()
}

fn path_match(from: &serin_xds::pb::envoy::r#type::matcher::v3::PathMatcher) -> Result<StringMatch, Refusal> {
    use serin_xds::pb::envoy::r#type::matcher::v3::path_matcher::Rule;
    match &from.rule {
        Some(Rule::Path(path)) => StringMatch::compile(path).within("url_path.path"),
        None => Err(Refusal::new("url_path.path", "is missing")),
    }
}

fn sourced(from: &rbac::SourcedMetadata) -> Result<MetadataMatch, Refusal> {
    if from.metadata_source != rbac::MetadataSource::Dynamic as i32 {
        return Err(Refusal::new(
            "sourced_metadata.metadata_source",
            "only dynamic metadata is supported",
        ));
    }
    let message = from
        .metadata_matcher
        .as_ref()
        .ok_or_else(|| Refusal::new("sourced_metadata.metadata_matcher", "is missing"))?;
    MetadataMatch::compile(message).within("sourced_metadata.metadata_matcher")
}

impl Permission {
    fn compile(from: &rbac::Permission) -> Result<Self, Refusal> {
        use rbac::permission::Rule;
        let rule = from
            .rule
            .as_ref()
            .ok_or_else(|| Refusal::new("rule", "is missing"))?;
        Ok(match rule {
            Rule::Any(true) => Self::Any,
            Rule::Any(false) => return Err(Refusal::new("any", "must be true")),
            Rule::AndRules(set) => Self::And(each(&set.rules, "and_rules.rules", Self::compile)?),
            Rule::OrRules(set) => Self::Or(each(&set.rules, "or_rules.rules", Self::compile)?),
            Rule::NotRule(inner) => Self::Not(Box::new(Self::compile(inner).within("not_rule")?)),
            Rule::Header(header) => Self::Header(HeaderMatch::compile(header).within("header")?),
            Rule::UrlPath(path) => Self::Path(path_match(path)?),
            Rule::DestinationIp(range) => Self::DestinationIp(Cidr::compile(range).within("destination_ip")?),
            Rule::DestinationPort(port) => Self::Ports(*port..port.saturating_add(1)),
            Rule::DestinationPortRange(range) => {
                let bound = |value: i32| {
                    u32::try_from(value)
                        .map_err(|_| Refusal::new("destination_port_range", format!("{value} is not a port")))
                };
                Self::Ports(bound(range.start)?..bound(range.end)?)
            }
            Rule::Metadata(matcher) => Self::Metadata(MetadataMatch::compile(matcher).within("metadata")?),
            Rule::SourcedMetadata(matcher) => Self::Metadata(sourced(matcher)?),
            Rule::RequestedServerName(name) => {
                Self::ServerName(StringMatch::compile(name).within("requested_server_name")?)
            }
            Rule::UriTemplate(extension) => {
                let any = extension
                    .typed_config
                    .as_ref()
                    .ok_or_else(|| Refusal::new("uri_template.typed_config", "is missing"))?;
                let message: template::UriTemplateMatchConfig = convert::unpack(
                    any,
                    "envoy.extensions.path.match.uri_template.v3.UriTemplateMatchConfig",
                )
                .within("uri_template")?;
                Self::Template(UriTemplate::compile(&message.path_template).within("uri_template")?)
            }
            Rule::Matcher(extension) => {
                return Err(Refusal::new(
                    "matcher",
                    format!("the matcher {:?} is not supported", extension.name),
                ));
            }
        })
    }

    fn matches(&self, facts: &Facts<'_>) -> bool {
        match self {
            Self::Any => true,
            Self::And(all) => all.iter().all(|inner| inner.matches(facts)),
            Self::Or(any) => any.iter().any(|inner| inner.matches(facts)),
            Self::Not(inner) => !inner.matches(facts),
            Self::Header(header) => facts
                .request
                .as_ref()
                .is_some_and(|request| header.matches(request)),
            Self::Path(test) => facts
                .request
                .as_ref()
                .is_some_and(|request| test.matches(request.path)),
            Self::Template(test) => facts
                .request
                .as_ref()
                .is_some_and(|request| test.matches(request.path)),
            Self::DestinationIp(range) => range.contains(facts.local.ip()),
            Self::Ports(range) => range.contains(&u32::from(facts.local.port())),
            Self::Metadata(test) => test.matches(facts.metadata),
            Self::ServerName(test) => test.matches(facts.server_name.unwrap_or("")),
        }
    }
}

impl Principal {
    fn compile(from: &rbac::Principal) -> Result<Self, Refusal> {
        use rbac::principal::Identifier;
        let identifier = from
            .identifier
            .as_ref()
            .ok_or_else(|| Refusal::new("identifier", "is missing"))?;
        Ok(match identifier {
            Identifier::Any(true) => Self::Any,
            Identifier::Any(false) => return Err(Refusal::new("any", "must be true")),
            Identifier::AndIds(set) => Self::And(each(&set.ids, "and_ids.ids", Self::compile)?),
            Identifier::OrIds(set) => Self::Or(each(&set.ids, "or_ids.ids", Self::compile)?),
            Identifier::NotId(inner) => Self::Not(Box::new(Self::compile(inner).within("not_id")?)),
            Identifier::Authenticated(authenticated) => Self::Authenticated(
                authenticated
                    .principal_name
                    .as_ref()
                    .map(|name| StringMatch::compile(name).within("authenticated.principal_name"))
                    .transpose()?,
            ),
            Identifier::SourceIp(range) => Self::Source(Cidr::compile(range).within("source_ip")?),
            Identifier::DirectRemoteIp(range) => {
                Self::DirectRemote(Cidr::compile(range).within("direct_remote_ip")?)
            }
            Identifier::RemoteIp(range) => Self::Remote(Cidr::compile(range).within("remote_ip")?),
            Identifier::Header(header) => Self::Header(HeaderMatch::compile(header).within("header")?),
            Identifier::UrlPath(path) => Self::Path(path_match(path)?),
            Identifier::Metadata(matcher) => {
                Self::Metadata(MetadataMatch::compile(matcher).within("metadata")?)
            }
            Identifier::SourcedMetadata(matcher) => Self::Metadata(sourced(matcher)?),
            Identifier::FilterState(state) => {
                let test = StateMatch::compile(state).within("filter_state")?;
                Self::State(test, state.key == PEER_PRINCIPAL)
            }
            Identifier::Custom(extension) => Self::MutualTls(MutualTls::compile(extension).within("custom")?),
        })
    }

    fn matches(&self, facts: &Facts<'_>) -> bool {
        match self {
            Self::Any => true,
            Self::And(all) => all.iter().all(|inner| inner.matches(facts)),
            Self::Or(any) => any.iter().any(|inner| inner.matches(facts)),
            Self::Not(inner) => !inner.matches(facts),
            Self::Authenticated(test) => match (facts.peer, test) {
                (None, _) => false,
                (Some(_), None) => true,
                (Some(peer), Some(test)) => authenticated_as(peer, test),
            },
            Self::MutualTls(test) => facts.peer.is_some_and(|peer| test.matches(peer)),
            Self::DirectRemote(range) => range.contains(facts.direct_remote.ip()),
            Self::Source(range) => range.contains(facts.source.ip()),
            Self::Remote(range) => range.contains(facts.remote()),
            Self::Header(header) => facts
                .request
                .as_ref()
                .is_some_and(|request| header.matches(request)),
            Self::Path(test) => facts
                .request
                .as_ref()
                .is_some_and(|request| test.matches(request.path)),
            Self::Metadata(test) => test.matches(facts.metadata),
            Self::State(test, is_peer) => {
                let state = &facts.metadata.state;
                if *is_peer && state.get(PEER_PRINCIPAL).is_none() {
                    let name = facts.peer.and_then(|peer| peer.uri_sans.first());
                    return name.is_some_and(|name| test.test_of(name));
                }
                test.matches(state)
            }
        }
    }
}

/// `mtls_authenticated`: a verified certificate, with a name of that kind if one is asked for.
#[derive(Debug)]
struct MutualTls(Option<NameTest>);

#[derive(Debug)]
enum NameTest {
    Uri(StringMatch),
    Dns(StringMatch),
}

impl MutualTls {
    fn compile(from: &core::TypedExtensionConfig) -> Result<Self, Refusal> {
        use tls::subject_alt_name_matcher::SanType;
        const NAME: &str = "envoy.extensions.rbac.principals.mtls_authenticated.v3.Config";
        let any = from
            .typed_config
            .as_ref()
            .filter(|any| any.type_url.rsplit('/').next() == Some(NAME))
            .ok_or_else(|| Refusal::new("", format!("the principal {:?} is not supported", from.name)))?;
        let message: mtls_authenticated::Config = convert::unpack(any, NAME)?;
        let Some(san) = &message.san_matcher else {
            return if message.any_validated_client_certificate {
                Ok(Self(None))
            } else {
                Err(Refusal::new(
                    "",
                    "needs san_matcher or any_validated_client_certificate",
                ))
            };
        };
        let matcher = san
            .matcher
            .as_ref()
            .ok_or_else(|| Refusal::new("san_matcher.matcher", "is missing"))?;
        let test = StringMatch::compile(matcher).within("san_matcher.matcher")?;
        match SanType::try_from(san.san_type) {
            Ok(SanType::Uri) => Ok(Self(Some(NameTest::Uri(test)))),
            Ok(SanType::Dns) => Ok(Self(Some(NameTest::Dns(test)))),
            _ => Err(Refusal::new(
                "san_matcher.san_type",
                "only DNS and URI are supported",
            )),
        }
    }

    fn matches(&self, peer: PeerIdentity<'_>) -> bool {
        match &self.0 {
            None => true,
            Some(NameTest::Uri(test)) => peer.uri_sans.iter().any(|name| test.matches(name)),
            Some(NameTest::Dns(test)) => peer.dns_sans.iter().any(|name| test.matches(name)),
        }
    }
}

/// URI names first, then DNS names, then the subject, each only where the kind before is absent (Envoy's order).
fn authenticated_as(peer: PeerIdentity<'_>, test: &StringMatch) -> bool {
    if !peer.uri_sans.is_empty() {
        peer.uri_sans.iter().any(|name| test.matches(name))
    } else if !peer.dns_sans.is_empty() {
        peer.dns_sans.iter().any(|name| test.matches(name))
    } else {
        test.matches(peer.subject)
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

/// The parts of the HTTP and the network filter's messages that mean the same.
pub(crate) struct Parts<'a> {
    pub rules: Option<&'a rbac::Rbac>,
    pub shadow_rules: Option<&'a rbac::Rbac>,
    pub matcher: Option<&'a xds::Matcher>,
    pub shadow_matcher: Option<&'a xds::Matcher>,
    pub shadow_rules_stat_prefix: &'a str,
    pub rules_stat_prefix: &'a str,
    pub track_per_rule_stats: bool,
}

impl Rules {
    /// Compiles the HTTP filter's message; `prefix` is the connection manager's `stat_prefix`.
    pub(crate) fn compile(
        from: &http_rbac::Rbac,
        prefix: &str,
        workers: usize,
        registry: &mut Registry,
    ) -> Result<Self, Refusal> {
        Self::build(
            &Parts {
                rules: from.rules.as_ref(),
                shadow_rules: from.shadow_rules.as_ref(),
                matcher: from.matcher.as_ref(),
                shadow_matcher: from.shadow_matcher.as_ref(),
                shadow_rules_stat_prefix: &from.shadow_rules_stat_prefix,
                rules_stat_prefix: &from.rules_stat_prefix,
                track_per_rule_stats: from.track_per_rule_stats,
            },
            &[
                "envoy_http_rbac_allowed",
                "envoy_http_rbac_denied",
                "envoy_http_rbac_shadow_allowed",
                "envoy_http_rbac_shadow_denied",
                "envoy_http_rbac_logged",
                "envoy_http_rbac_not_logged",
            ],
            ("envoy_http_conn_manager_prefix", prefix),
            workers,
            registry,
        )
    }

    pub(crate) fn build(
        from: &Parts<'_>,
        names: &[&'static str; 6],
        label: (&'static str, &str),
        workers: usize,
        registry: &mut Registry,
    ) -> Result<Self, Refusal> {
        let rules = Judge::compile(from.rules, from.matcher, ["rules", "matcher"])?;
        let shadow = Judge::compile(
            from.shadow_rules,
            from.shadow_matcher,
            ["shadow_rules", "shadow_matcher"],
        )?;
        let own = [label, ("prefix", from.rules_stat_prefix)];
        let of_shadow = [label, ("prefix", from.shadow_rules_stat_prefix)];
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
                serin_xds::pb::google::protobuf::Value {
                    kind: Some(serin_xds::pb::google::protobuf::value::Kind::BoolValue(hint)),
                },
            );
        }
    }
}

/// `rbac_access_denied_matched_policy[...]`; details hold no white space.
fn denial_details(policy: Option<&str>) -> String {
    let name = policy.unwrap_or("none").replace(char::is_whitespace, "_");
    format!("rbac_access_denied_matched_policy[{name}]")
}

#[cfg(test)]
mod tests;
