//! Access rules as a matcher tree (`matcher`, `shadow_matcher`): inputs, predicates and the action of the first match.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::ops::Bound;
use std::sync::Arc;

use http::HeaderName;
use serin_xds::pb::envoy::config::rbac::v3 as rbac;
use serin_xds::pb::envoy::r#type::matcher::v3 as matcher;
use serin_xds::pb::xds::core::v3::TypedExtensionConfig;
use serin_xds::pb::xds::r#type::matcher::v3 as tree;

use super::{Action, Decision};
use crate::config::convert;
use crate::config::matchers::StringMatch;
use crate::error::{Refusal, Within};
use crate::policy::facts::Facts;

/// Nesting at most.
const MAX_DEPTH: usize = 32;

/// What is looked at.
#[derive(Debug)]
enum Input {
    DestinationIp,
    DestinationPort,
    SourceIp,
    SourcePort,
    DirectSourceIp,
    ServerName,
    UriSan,
    DnsSan,
    Subject,
    Header(HeaderName),
}

#[derive(Debug)]
enum Predicate {
    Single(Input, StringMatch),
    Or(Box<[Predicate]>),
    And(Box<[Predicate]>),
    Not(Box<Predicate>),
}

/// What a match leads to.
#[derive(Debug)]
enum Found {
    Action(Arc<str>, Action),
    Tree(Box<Tree>),
}

/// See the module.
#[derive(Debug)]
pub(super) struct Tree {
    kind: Kind,
    otherwise: Option<Found>,
}

#[derive(Debug)]
enum Kind {
    Nothing,
    List(Box<[(Predicate, Found)]>),
    Exact(Input, BTreeMap<Box<str>, Found>),
    /// The longest prefix decides.
    Prefix(Input, BTreeMap<Box<str>, Found>),
}

impl Input {
    fn compile(from: Option<&TypedExtensionConfig>) -> Result<Self, Refusal> {
        let any = from
            .and_then(|from| from.typed_config.as_ref())
            .ok_or_else(|| Refusal::new("input", "is missing"))?;
        let type_name = any.type_url.rsplit('/').next().unwrap_or_default();
        let network = type_name.strip_prefix("envoy.extensions.matching.common_inputs.network.v3.");
        let ssl = type_name.strip_prefix("envoy.extensions.matching.common_inputs.ssl.v3.");
        Ok(match (network, ssl) {
            (Some("DestinationIPInput"), _) => Self::DestinationIp,
            (Some("DestinationPortInput"), _) => Self::DestinationPort,
            (Some("SourceIPInput"), _) => Self::SourceIp,
            (Some("SourcePortInput"), _) => Self::SourcePort,
            (Some("DirectSourceIPInput"), _) => Self::DirectSourceIp,
            (Some("ServerNameInput"), _) => Self::ServerName,
            (_, Some("UriSanInput")) => Self::UriSan,
            (_, Some("DnsSanInput")) => Self::DnsSan,
            (_, Some("SubjectInput")) => Self::Subject,
            _ if type_name == "envoy.type.matcher.v3.HttpRequestHeaderMatchInput" => {
                let message: matcher::HttpRequestHeaderMatchInput =
                    convert::unpack(any, type_name).within("input")?;
                let name = message.header_name.to_ascii_lowercase();
                // `:path` and its like are found by the names that HTTP/2 gives them; a header name has no colon.
                match HeaderName::from_bytes(name.as_bytes()) {
                    Ok(name) => Self::Header(name),
                    Err(_) => {
                        return Err(Refusal::new(
                            "input.header_name",
                            format!("{name:?} is not a header name"),
                        ));
                    }
                }
            }
            _ => {
                return Err(Refusal::new(
                    "input",
                    format!("the input {type_name} is not supported"),
                ));
            }
        })
    }

    fn value<'a>(&self, facts: &Facts<'a>) -> Option<Cow<'a, str>> {
        let name = |names: Option<&'a [Box<str>]>| Some(Cow::from(&**names?.first()?));
        match self {
            Self::DestinationIp => Some(facts.local.ip().to_string().into()),
            Self::DestinationPort => Some(facts.local.port().to_string().into()),
            Self::SourceIp => Some(facts.remote().to_string().into()),
            Self::SourcePort => Some(facts.source.port().to_string().into()),
            Self::DirectSourceIp => Some(facts.direct_remote.ip().to_string().into()),
            Self::ServerName => facts.server_name.map(Cow::from),
            Self::UriSan => name(facts.peer.map(|peer| peer.uri_sans)),
            Self::DnsSan => name(facts.peer.map(|peer| peer.dns_sans)),
            Self::Subject => facts.peer.map(|peer| Cow::from(peer.subject)),
            Self::Header(name) => {
                let request = facts.request.as_ref()?;
                let mut values = request.headers.get_all(name).iter();
                let first = String::from_utf8_lossy(values.next()?.as_bytes());
                // A field that comes several times is one list.
                Some(values.fold(first, |mut all, value| {
                    let text = all.to_mut();
                    text.push(',');
                    text.push_str(&String::from_utf8_lossy(value.as_bytes()));
                    all
                }))
            }
        }
    }
}

fn string_match(from: &tree::StringMatcher) -> Result<StringMatch, Refusal> {
    use matcher::string_matcher::MatchPattern as To;
    use tree::string_matcher::MatchPattern as From;
    let pattern = match &from.match_pattern {
        Some(From::Exact(text)) => To::Exact(text.clone()),
        Some(From::Prefix(text)) => To::Prefix(text.clone()),
        Some(From::Suffix(text)) => To::Suffix(text.clone()),
        Some(From::Contains(text)) => To::Contains(text.clone()),
        Some(From::SafeRegex(regex)) => To::SafeRegex(matcher::RegexMatcher {
            regex: regex.regex.clone(),
            ..Default::default()
        }),
        Some(_) => return Err(Refusal::new("value_match.custom", "not supported")),
        None => return Err(Refusal::new("value_match", "is missing")),
    };
    let message = matcher::StringMatcher {
        match_pattern: Some(pattern),
        ignore_case: from.ignore_case,
    };
    StringMatch::compile(&message).within("value_match")
}

impl Predicate {
    fn compile(from: &tree::matcher::matcher_list::Predicate, depth: usize) -> Result<Self, Refusal> {
        use tree::matcher::matcher_list::predicate::{MatchType, single_predicate::Matcher};
        if depth > MAX_DEPTH {
            return Err(Refusal::new("", "is nested too deeply"));
        }
        let list = |list: &tree::matcher::matcher_list::predicate::PredicateList, field: &str| {
            list.predicate
                .iter()
                .enumerate()
                .map(|(index, inner)| {
                    Self::compile(inner, depth + 1).within(format!("{field}.predicate[{index}]"))
                })
                .collect::<Result<Box<[_]>, _>>()
        };
        match &from.match_type {
            Some(MatchType::SinglePredicate(single)) => match &single.matcher {
                Some(Matcher::ValueMatch(value)) => Ok(Self::Single(
                    Input::compile(single.input.as_ref()).within("single_predicate")?,
                    string_match(value).within("single_predicate")?,
                )),
                Some(Matcher::CustomMatch(custom)) => Err(Refusal::new(
                    "single_predicate.custom_match",
                    format!("the matcher {:?} is not supported", custom.name),
                )),
                None => Err(Refusal::new("single_predicate.matcher", "is missing")),
            },
            Some(MatchType::OrMatcher(any)) => Ok(Self::Or(list(any, "or_matcher")?)),
            Some(MatchType::AndMatcher(all)) => Ok(Self::And(list(all, "and_matcher")?)),
            Some(MatchType::NotMatcher(inner)) => Self::compile(inner, depth + 1)
                .within("not_matcher")
                .map(|inner| Self::Not(Box::new(inner))),
            None => Err(Refusal::new("match_type", "is missing")),
        }
    }

    fn holds(&self, facts: &Facts<'_>) -> bool {
        match self {
            Self::Single(input, test) => input.value(facts).is_some_and(|value| test.matches(&value)),
            Self::Or(any) => any.iter().any(|inner| inner.holds(facts)),
            Self::And(all) => all.iter().all(|inner| inner.holds(facts)),
            Self::Not(inner) => !inner.holds(facts),
        }
    }
}

impl Found {
    fn compile(from: Option<&tree::matcher::OnMatch>, depth: usize) -> Result<Self, Refusal> {
        use tree::matcher::on_match::OnMatch;
        let from = from.ok_or_else(|| Refusal::new("on_match", "is missing"))?;
        if from.keep_matching {
            return Err(Refusal::new("on_match.keep_matching", "not supported"));
        }
        match &from.on_match {
            Some(OnMatch::Matcher(inner)) => Tree::build(inner, depth + 1)
                .within("on_match.matcher")
                .map(|tree| Self::Tree(Box::new(tree))),
            Some(OnMatch::Action(action)) => {
                let any = action
                    .typed_config
                    .as_ref()
                    .ok_or_else(|| Refusal::new("on_match.action.typed_config", "is missing"))?;
                let message: rbac::Action =
                    convert::unpack(any, "envoy.config.rbac.v3.Action").within("on_match.action")?;
                let what = match rbac::rbac::Action::try_from(message.action) {
                    Ok(rbac::rbac::Action::Allow) => Action::Allow,
                    Ok(rbac::rbac::Action::Deny) => Action::Deny,
                    Ok(rbac::rbac::Action::Log) => Action::Log,
                    Err(_) => return Err(Refusal::new("on_match.action.action", "is unknown")),
                };
                Ok(Self::Action(message.name.as_str().into(), what))
            }
            None => Err(Refusal::new("on_match", "is missing")),
        }
    }

    fn find(&self, facts: &Facts<'_>) -> Option<(&Arc<str>, Action)> {
        match self {
            Self::Action(name, action) => Some((name, *action)),
            Self::Tree(tree) => tree.find(facts),
        }
    }
}

impl Tree {
    /// Compiles the message.
    pub(super) fn compile(from: &tree::Matcher) -> Result<Self, Refusal> {
        Self::build(from, 0)
    }

    fn build(from: &tree::Matcher, depth: usize) -> Result<Self, Refusal> {
        use tree::matcher::{MatcherType, matcher_tree::TreeType};
        if depth > MAX_DEPTH {
            return Err(Refusal::new("", "is nested too deeply"));
        }
        let map = |map: &tree::matcher::matcher_tree::MatchMap, field: &str| {
            map.map
                .iter()
                .map(|(key, found)| {
                    let found = Found::compile(Some(found), depth).within(format!("{field}.map[{key:?}]"))?;
                    Ok((key.as_str().into(), found))
                })
                .collect::<Result<BTreeMap<Box<str>, Found>, Refusal>>()
        };
        let kind = match &from.matcher_type {
            None => Kind::Nothing,
            Some(MatcherType::MatcherList(list)) => Kind::List(
                list.matchers
                    .iter()
                    .enumerate()
                    .map(|(index, field)| {
                        let path = format!("matcher_list.matchers[{index}]");
                        let predicate = field
                            .predicate
                            .as_ref()
                            .ok_or_else(|| Refusal::new("predicate", "is missing"))
                            .and_then(|predicate| Predicate::compile(predicate, depth).within("predicate"))
                            .within(&path)?;
                        let found = Found::compile(field.on_match.as_ref(), depth).within(&path)?;
                        Ok((predicate, found))
                    })
                    .collect::<Result<_, Refusal>>()?,
            ),
            Some(MatcherType::MatcherTree(inner)) => {
                let input = Input::compile(inner.input.as_ref()).within("matcher_tree")?;
                match &inner.tree_type {
                    Some(TreeType::ExactMatchMap(inner)) => {
                        Kind::Exact(input, map(inner, "matcher_tree.exact_match_map")?)
                    }
                    Some(TreeType::PrefixMatchMap(inner)) => {
                        Kind::Prefix(input, map(inner, "matcher_tree.prefix_match_map")?)
                    }
                    Some(TreeType::CustomMatch(custom)) => {
                        return Err(Refusal::new(
                            "matcher_tree.custom_match",
                            format!("the matcher {:?} is not supported", custom.name),
                        ));
                    }
                    None => return Err(Refusal::new("matcher_tree.tree_type", "is missing")),
                }
            }
        };
        Ok(Self {
            kind,
            otherwise: from
                .on_no_match
                .as_deref()
                .map(|found| Found::compile(Some(found), depth).within("on_no_match"))
                .transpose()?,
        })
    }

    fn find(&self, facts: &Facts<'_>) -> Option<(&Arc<str>, Action)> {
        let found = match &self.kind {
            Kind::Nothing => None,
            Kind::List(list) => list
                .iter()
                .find(|(predicate, _)| predicate.holds(facts))
                .map(|(_, found)| found),
            Kind::Exact(input, map) => input.value(facts).and_then(|value| map.get(&*value)),
            Kind::Prefix(input, map) => input.value(facts).and_then(|value| {
                // A longer prefix sorts after a shorter one of the same text.
                map.range::<str, _>((Bound::Unbounded, Bound::Included(&*value)))
                    .rev()
                    .find(|(prefix, _)| value.starts_with(&***prefix))
                    .map(|(_, found)| found)
            }),
        };
        match found {
            Some(found) => found.find(facts),
            None => self.otherwise.as_ref()?.find(facts),
        }
    }

    /// Judges: what nothing matches is denied.
    pub(super) fn judge(&self, facts: &Facts<'_>) -> Decision {
        match self.find(facts) {
            None => Decision {
                allowed: false,
                policy: None,
                logged: None,
            },
            Some((name, action)) => Decision {
                allowed: action != Action::Deny,
                policy: Some(name.clone()),
                logged: (action == Action::Log).then_some(true),
            },
        }
    }
}
