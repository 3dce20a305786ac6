//! What a request or connection wants: the permissions of a policy.

use serin_xds::pb::envoy::config::rbac::v3 as rbac;
use serin_xds::pb::envoy::extensions::path::r#match::uri_template::v3 as template;

use super::{path_match, sourced};
use crate::config::convert::{self, each, required};
use crate::config::listener::Cidr;
use crate::config::matchers::{HeaderMatch, StringMatch};
use crate::error::{Refusal, Within};
use crate::policy::facts::Facts;
use crate::policy::metadata::MetadataMatch;
use crate::policy::uri_template::UriTemplate;

/// A compiled `Permission`.
#[derive(Debug)]
pub(super) enum Permission {
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

impl Permission {
    pub(super) fn compile(from: &rbac::Permission) -> Result<Self, Refusal> {
        use rbac::permission::Rule;
        let rule = required(from.rule.as_ref(), "rule")?;
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
                let any = required(extension.typed_config.as_ref(), "uri_template.typed_config")?;
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

    pub(super) fn matches(&self, facts: &Facts<'_>) -> bool {
        match self {
            Self::Any => true,
            Self::And(all) => all.iter().all(|inner| inner.matches(facts)),
            Self::Or(any) => any.iter().any(|inner| inner.matches(facts)),
            Self::Not(inner) => !inner.matches(facts),
            Self::Header(header) => facts.has(header),
            Self::Path(test) => facts.path().is_some_and(|path| test.matches(path)),
            Self::Template(test) => facts.path().is_some_and(|path| test.matches(path)),
            Self::DestinationIp(range) => range.contains(facts.local.ip()),
            Self::Ports(range) => range.contains(&u32::from(facts.local.port())),
            Self::Metadata(test) => test.matches(facts.metadata),
            Self::ServerName(test) => test.matches(facts.server_name.unwrap_or("")),
        }
    }
}
