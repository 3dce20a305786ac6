//! Access rules as a matcher tree (`matcher`, `shadow_matcher`): inputs, predicates and the action of the first match.
//!
//! A match whose nested matcher matches nothing is none, and neither is one that says `keep_matching`: what follows is asked,
//! and the shorter prefixes and wider ranges.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::ops::Bound;
use std::sync::Arc;

use http::HeaderName;
use prost::Message as _;
use serin_xds::pb::envoy::config::core::v3 as core;
use serin_xds::pb::envoy::config::rbac::v3 as rbac;
use serin_xds::pb::envoy::extensions::matching::common_inputs::network::v3 as inputs;
use serin_xds::pb::envoy::extensions::matching::input_matchers;
use serin_xds::pb::envoy::r#type::matcher::v3 as matcher;
use serin_xds::pb::google::api::expr::v1alpha1;
use serin_xds::pb::xds::core::v3::TypedExtensionConfig;
use serin_xds::pb::xds::r#type::matcher::v3 as tree;
use serin_xds::pb::xds::r#type::v3::CelExpression;

use super::{Action, Decision};
use crate::config::convert::{self, each, required};
use crate::config::listener::Cidr;
use crate::config::matchers::{StringMatch, percent_decoded};
use crate::error::{Refusal, Within};
use crate::policy::cel::Expression;
use crate::policy::facts::Facts;
use crate::policy::metadata::{Key, ValueMatch};

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
    /// `:path` and its like, by the names that HTTP/2 gives them.
    Pseudo(Pseudo),
    Query(Box<str>),
    State(Box<str>, Box<str>),
    /// Metadata, for matchers of values.
    Metadata(Key),
    /// Everything that CEL knows, for its matcher.
    Attributes,
}

/// A pseudo header field.
#[derive(Clone, Copy, Debug)]
enum Pseudo {
    /// With the query.
    Path,
    Method,
    Authority,
    Scheme,
}

/// `xds.type.matcher.v3.CelMatcher`.
#[derive(Clone, PartialEq, prost::Message)]
struct CelMatcher {
    #[prost(message, optional, tag = "1")]
    expr_match: Option<CelExpression>,
}

/// `xds.type.matcher.v3.IPMatcher`.
#[derive(Clone, PartialEq, prost::Message)]
struct IpMatcher {
    #[prost(message, repeated, tag = "1")]
    range_matchers: Vec<IpRangeMatcher>,
}

/// `xds.type.matcher.v3.IPMatcher.IPRangeMatcher`.
#[derive(Clone, PartialEq, prost::Message)]
struct IpRangeMatcher {
    #[prost(message, repeated, tag = "1")]
    ranges: Vec<serin_xds::pb::xds::core::v3::CidrRange>,
    #[prost(message, optional, tag = "2")]
    on_match: Option<tree::matcher::OnMatch>,
    #[prost(bool, tag = "3")]
    exclusive: bool,
}

#[derive(Debug)]
enum Predicate {
    Single(Input, StringMatch),
    Range(Input, Box<[Cidr]>),
    Value(Key, ValueMatch, bool),
    Expression(Box<Expression>),
    Or(Box<[Predicate]>),
    And(Box<[Predicate]>),
    Not(Box<Predicate>),
}

/// What a match leads to.
#[derive(Debug)]
struct Found {
    goal: Goal,
    /// It is taken for none.
    keep_matching: bool,
}

#[derive(Debug)]
enum Goal {
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
    /// The narrowest range decides; after one that is exclusive no other is asked. What they lead to is apart, since several
    /// may lead to the same.
    Ranges(Input, Box<[(Cidr, usize)]>, Box<[(Found, bool)]>),
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
            (Some("FilterStateInput"), _) => {
                let message: inputs::FilterStateInput = convert::unpack(any, type_name).within("input")?;
                Self::State(message.key.into(), message.field.into())
            }
            (Some("DynamicMetadataInput"), _) => {
                use inputs::dynamic_metadata_input::path_segment::Segment;
                let message: inputs::DynamicMetadataInput =
                    convert::unpack(any, type_name).within("input")?;
                let path = message.path.into_iter().map(|segment| match segment.segment {
                    Some(Segment::Key(key)) => Ok(key.into()),
                    None => Err(Refusal::new("input.path", "a segment has no key")),
                });
                Self::Metadata(Key {
                    path: path.collect::<Result<_, _>>()?,
                    namespace: message.filter.into(),
                })
            }
            _ if type_name == "xds.type.matcher.v3.HttpAttributesCelMatchInput" => Self::Attributes,
            _ if type_name == "envoy.type.matcher.v3.HttpRequestQueryParamMatchInput" => {
                let message: matcher::HttpRequestQueryParamMatchInput =
                    convert::unpack(any, type_name).within("input")?;
                Self::Query(message.query_param.into())
            }
            _ if type_name == "envoy.type.matcher.v3.HttpRequestHeaderMatchInput" => {
                let message: matcher::HttpRequestHeaderMatchInput =
                    convert::unpack(any, type_name).within("input")?;
                Self::field(&message.header_name.to_ascii_lowercase()).within("input.header_name")?
            }
            _ => {
                return Err(Refusal::new(
                    "input",
                    format!("the input {type_name} is not supported"),
                ));
            }
        })
    }

    fn field(name: &str) -> Result<Self, Refusal> {
        Ok(match name {
            ":path" => Self::Pseudo(Pseudo::Path),
            ":method" => Self::Pseudo(Pseudo::Method),
            ":authority" | "host" => Self::Pseudo(Pseudo::Authority),
            ":scheme" => Self::Pseudo(Pseudo::Scheme),
            name => Self::Header(
                HeaderName::from_bytes(name.as_bytes())
                    .map_err(|_| Refusal::new("", format!("{name:?} is not a header name")))?,
            ),
        })
    }

    /// Refuses what only matchers of their own can look at.
    fn is_text(&self) -> Result<(), Refusal> {
        match self {
            Self::Metadata(_) | Self::Attributes => Err(Refusal::new(
                "input",
                "this input is for custom matchers of its kind only",
            )),
            _ => Ok(()),
        }
    }

    fn value<'a>(&self, facts: &Facts<'a>) -> Option<Cow<'a, str>> {
        // Several names are one list.
        let name = |names: Option<&'a [Box<str>]>| match names? {
            [] => None,
            [one] => Some(Cow::from(&**one)),
            several => Some(several.join(",").into()),
        };
        match self {
            Self::DestinationIp => Some(facts.local.ip().to_string().into()),
            Self::DestinationPort => Some(facts.local.port().to_string().into()),
            Self::SourceIp => Some(facts.remote.ip().to_string().into()),
            Self::SourcePort => Some(facts.source.port().to_string().into()),
            Self::DirectSourceIp => Some(facts.direct_remote.ip().to_string().into()),
            Self::ServerName => facts.server_name.map(Cow::from),
            Self::UriSan => name(facts.peer.map(|peer| peer.uri_sans)),
            Self::DnsSan => name(facts.peer.map(|peer| peer.dns_sans)),
            // An empty one is none, which no matcher fits (Envoy).
            Self::Subject => {
                let subject = facts.peer.map(|peer| peer.subject);
                subject.filter(|subject| !subject.is_empty()).map(Cow::from)
            }
            Self::Query(name) => facts.request.as_ref()?.query?.split('&').find_map(|pair| {
                let (key, value) = pair.split_once('=').unwrap_or((pair, ""));
                (percent_decoded(key) == **name).then(|| percent_decoded(value))
            }),
            Self::State(key, field) => {
                let state = &facts.metadata.state;
                match &**field {
                    "" => state.get(key),
                    field => state.field(key, field),
                }
                .map(Cow::from)
            }
            // For matchers of their own.
            Self::Metadata(_) | Self::Attributes => None,
            Self::Pseudo(which) => {
                let request = facts.request.as_ref()?;
                Some(match which {
                    Pseudo::Path => match request.query {
                        Some(query) => format!("{}?{query}", request.path).into(),
                        None => request.path.into(),
                    },
                    Pseudo::Method => request.method.into(),
                    Pseudo::Authority => request.authority().into(),
                    Pseudo::Scheme => request.scheme().into(),
                })
            }
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

/// The ranges of a list.
fn ranges(from: &[core::CidrRange], field: &str) -> Result<Box<[Cidr]>, Refusal> {
    if from.is_empty() {
        return Err(Refusal::new(field, "is empty"));
    }
    each(from, field, Cidr::compile)
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

/// A map by ranges of addresses (`IPMatcher`).
fn by_range(input: Input, from: &TypedExtensionConfig, depth: usize) -> Result<Kind, Refusal> {
    const NAME: &str = "xds.type.matcher.v3.IPMatcher";
    let any = from
        .typed_config
        .as_ref()
        .filter(|any| any.type_url.rsplit('/').next() == Some(NAME))
        .ok_or_else(|| Refusal::new("", format!("the matcher {:?} is not supported", from.name)))?;
    let message: IpMatcher = convert::unpack(any, NAME)?;
    let (mut all, mut goals) = (Vec::new(), Vec::new());
    for (index, matcher) in message.range_matchers.iter().enumerate() {
        let path = format!("range_matchers[{index}]");
        let given: Vec<_> = matcher
            .ranges
            .iter()
            .map(|range| core::CidrRange {
                address_prefix: range.address_prefix.clone(),
                prefix_len: range.prefix_len,
            })
            .collect();
        let given = ranges(&given, "ranges").within(&path)?;
        all.extend(given.iter().map(|range| (*range, index)));
        let found = Found::compile(matcher.on_match.as_ref(), depth).within(&path)?;
        goals.push((found, matcher.exclusive));
    }
    // Narrow ones first; of equals the first.
    all.sort_by_key(|(range, _)| std::cmp::Reverse(range.length()));
    Ok(Kind::Ranges(input, all.into(), goals.into()))
}

fn in_ranges<'a>(
    ranges: &[(Cidr, usize)],
    goals: &'a [(Found, bool)],
    address: std::net::IpAddr,
    facts: &Facts<'_>,
) -> Option<(&'a Arc<str>, Action)> {
    for (_, goal) in ranges.iter().filter(|(range, _)| range.contains(address)) {
        let (found, exclusive) = goals.get(*goal)?;
        let found = found.find(facts);
        if found.is_some() || *exclusive {
            return found;
        }
    }
    None
}

impl Predicate {
    fn compile(from: &tree::matcher::matcher_list::Predicate, depth: usize) -> Result<Self, Refusal> {
        use tree::matcher::matcher_list::predicate::{MatchType, single_predicate::Matcher};
        if depth > MAX_DEPTH {
            return Err(Refusal::new("", "is nested too deeply"));
        }
        let list = |list: &tree::matcher::matcher_list::predicate::PredicateList, field: &str| {
            each(&list.predicate, &format!("{field}.predicate"), |inner| {
                Self::compile(inner, depth + 1)
            })
        };
        match &from.match_type {
            Some(MatchType::SinglePredicate(single)) => {
                let input = Input::compile(single.input.as_ref()).within("single_predicate")?;
                match &single.matcher {
                    Some(Matcher::ValueMatch(value)) => {
                        let test = string_match(value).within("single_predicate")?;
                        input.is_text().within("single_predicate")?;
                        Ok(Self::Single(input, test))
                    }
                    Some(Matcher::CustomMatch(custom)) => {
                        Self::custom(input, custom).within("single_predicate.custom_match")
                    }
                    None => Err(Refusal::new("single_predicate.matcher", "is missing")),
                }
            }
            Some(MatchType::OrMatcher(any)) => Ok(Self::Or(list(any, "or_matcher")?)),
            Some(MatchType::AndMatcher(all)) => Ok(Self::And(list(all, "and_matcher")?)),
            Some(MatchType::NotMatcher(inner)) => Self::compile(inner, depth + 1)
                .within("not_matcher")
                .map(|inner| Self::Not(Box::new(inner))),
            None => Err(Refusal::new("match_type", "is missing")),
        }
    }

    /// A matcher of a kind of its own.
    fn custom(input: Input, from: &TypedExtensionConfig) -> Result<Self, Refusal> {
        let unknown = || Refusal::new("", format!("the matcher {:?} is not supported", from.name));
        let any = from.typed_config.as_ref().ok_or_else(unknown)?;
        let type_name = any.type_url.rsplit('/').next().unwrap_or_default();
        match (type_name, input) {
            ("envoy.extensions.matching.input_matchers.ip.v3.Ip", input) => {
                input.is_text()?;
                let message: input_matchers::ip::v3::Ip = convert::unpack(any, type_name)?;
                Ok(Self::Range(input, ranges(&message.cidr_ranges, "cidr_ranges")?))
            }
            ("envoy.extensions.matching.input_matchers.metadata.v3.Metadata", Input::Metadata(key)) => {
                let message: input_matchers::metadata::v3::Metadata = convert::unpack(any, type_name)?;
                let value = required(message.value.as_ref(), "value")?;
                let value = ValueMatch::compile(value).within("value")?;
                Ok(Self::Value(key, value, message.invert))
            }
            ("xds.type.matcher.v3.CelMatcher", Input::Attributes) => {
                use serin_xds::pb::xds::r#type::v3::cel_expression::ExprSpecifier;
                let message: CelMatcher = convert::unpack(any, type_name)?;
                let given = message.expr_match.unwrap_or_default();
                if !given.cel_expr_string.is_empty() {
                    let parsed = Expression::parse(&given.cel_expr_string, None);
                    return Ok(Self::Expression(Box::new(
                        parsed.within("expr_match.cel_expr_string")?,
                    )));
                }
                let checked = given.cel_expr_checked.and_then(|checked| checked.expr);
                let parsed = given.cel_expr_parsed.and_then(|parsed| parsed.expr);
                // The newer form is in another package of the same shape, which is read by its bytes.
                let newer = checked
                    .or(parsed)
                    .map(|expr| expr.encode_to_vec())
                    .map(|bytes| v1alpha1::Expr::decode(&*bytes))
                    .transpose()
                    .map_err(|error| Refusal::new("expr_match", error.to_string()))?;
                let older = match given.expr_specifier {
                    Some(ExprSpecifier::ParsedExpr(parsed)) => parsed.expr,
                    Some(ExprSpecifier::CheckedExpr(checked)) => checked.expr,
                    None => None,
                };
                let expression = match newer.or(older) {
                    Some(expr) => Expression::of_message(&expr, None),
                    None => Err(Refusal::new("", "is missing")),
                };
                Ok(Self::Expression(Box::new(expression.within("expr_match")?)))
            }
            _ => Err(unknown()),
        }
    }

    fn holds(&self, facts: &Facts<'_>) -> bool {
        match self {
            Self::Range(input, ranges) => input
                .value(facts)
                .and_then(|value| value.parse().ok())
                .is_some_and(|address| ranges.iter().any(|range| range.contains(address))),
            Self::Value(key, value, invert) => value.matches(key.find(facts.metadata)) != *invert,
            Self::Expression(expression) => expression.holds(facts),
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
        let goal = match &from.on_match {
            Some(OnMatch::Matcher(inner)) => Goal::Tree(Box::new(
                Tree::build(inner, depth + 1).within("on_match.matcher")?,
            )),
            Some(OnMatch::Action(action)) => {
                let any = required(action.typed_config.as_ref(), "on_match.action.typed_config")?;
                let message: rbac::Action =
                    convert::unpack(any, "envoy.config.rbac.v3.Action").within("on_match.action")?;
                let what = match rbac::rbac::Action::try_from(message.action) {
                    Ok(rbac::rbac::Action::Allow) => Action::Allow,
                    Ok(rbac::rbac::Action::Deny) => Action::Deny,
                    Ok(rbac::rbac::Action::Log) => Action::Log,
                    Err(_) => return Err(Refusal::new("on_match.action.action", "is unknown")),
                };
                Goal::Action(message.name.as_str().into(), what)
            }
            None => return Err(Refusal::new("on_match", "is missing")),
        };
        Ok(Self {
            goal,
            keep_matching: from.keep_matching,
        })
    }

    fn find(&self, facts: &Facts<'_>) -> Option<(&Arc<str>, Action)> {
        if self.keep_matching {
            return None;
        }
        match &self.goal {
            Goal::Action(name, action) => Some((name, *action)),
            Goal::Tree(tree) => tree.find(facts),
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
                input.is_text().within("matcher_tree")?;
                match &inner.tree_type {
                    Some(TreeType::ExactMatchMap(inner)) => {
                        Kind::Exact(input, map(inner, "matcher_tree.exact_match_map")?)
                    }
                    Some(TreeType::PrefixMatchMap(inner)) => {
                        Kind::Prefix(input, map(inner, "matcher_tree.prefix_match_map")?)
                    }
                    Some(TreeType::CustomMatch(custom)) => {
                        by_range(input, custom, depth).within("matcher_tree.custom_match")?
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
                .filter(|(predicate, _)| predicate.holds(facts))
                .find_map(|(_, found)| found.find(facts)),
            Kind::Exact(input, map) => input
                .value(facts)
                .and_then(|value| map.get(&*value))
                .and_then(|found| found.find(facts)),
            Kind::Prefix(input, map) => input.value(facts).and_then(|value| {
                // A longer prefix sorts after a shorter one of the same text.
                map.range::<str, _>((Bound::Unbounded, Bound::Included(&*value)))
                    .rev()
                    .filter(|(prefix, _)| value.starts_with(&***prefix))
                    .find_map(|(_, found)| found.find(facts))
            }),
            Kind::Ranges(input, ranges, goals) => {
                let address = input.value(facts).and_then(|value| value.parse().ok());
                address.and_then(|address| in_ranges(ranges, goals, address, facts))
            }
        };
        found.or_else(|| self.otherwise.as_ref()?.find(facts))
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
