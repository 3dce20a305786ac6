//! Which fields a service may change (`HeaderMutationRules`).

use http::HeaderName;
use regex::Regex;
use serin_xds::pb::envoy::config::common::mutation_rules::v3 as pb;
use serin_xds::pb::google::protobuf::BoolValue;

use crate::config::matchers::full_regex;
use crate::error::{Refusal, Within};

/// See the module.
#[derive(Debug, Default)]
pub struct MutationRules {
    routing: bool,
    envoy: bool,
    no_system: bool,
    none: bool,
    allowed: Option<Regex>,
    disallowed: Option<Regex>,
    /// What is not allowed fails the request instead of being left out.
    pub is_error: bool,
}

impl MutationRules {
    /// Compiles the message; without one Envoy's defaults hold.
    pub(crate) fn compile(from: Option<&pb::HeaderMutationRules>) -> Result<Self, Refusal> {
        let Some(from) = from else {
            return Ok(Self::default());
        };
        let flag = |value: &Option<BoolValue>| value.as_ref().is_some_and(|value| value.value);
        let regex = |value: &Option<serin_xds::pb::envoy::r#type::matcher::v3::RegexMatcher>, field: &str| {
            value
                .as_ref()
                .map(|value| full_regex(&value.regex))
                .transpose()
                .within(field)
        };
        Ok(Self {
            routing: flag(&from.allow_all_routing),
            envoy: flag(&from.allow_envoy),
            no_system: flag(&from.disallow_system),
            none: flag(&from.disallow_all),
            allowed: regex(&from.allow_expression, "allow_expression")?,
            disallowed: regex(&from.disallow_expression, "disallow_expression")?,
            is_error: flag(&from.disallow_is_error),
        })
    }

    /// Whether the field may be set.
    pub fn allows(&self, name: &str) -> bool {
        if self.no_system && name.starts_with(':') {
            return false;
        }
        if self.disallowed.as_ref().is_some_and(|regex| regex.is_match(name)) {
            return false;
        }
        if self.allowed.as_ref().is_some_and(|regex| regex.is_match(name)) {
            return true;
        }
        if self.none {
            return false;
        }
        let routes = matches!(name, "host" | ":authority" | ":scheme" | ":method");
        (self.routing || !routes) && (self.envoy || !name.starts_with("x-envoy"))
    }

    /// Whether the field may be taken off. What a message cannot be without never may.
    pub fn allows_removal(&self, name: &HeaderName) -> bool {
        *name != http::header::HOST && self.allows(name.as_str())
    }
}

#[cfg(test)]
mod tests {
    use serin_xds::pb::envoy::r#type::matcher::v3::RegexMatcher;

    use super::*;

    #[test]
    fn rules_allow_what_envoys_rules_allow() {
        let on = Some(BoolValue { value: true });
        let regex = |text: &str| {
            Some(RegexMatcher {
                regex: text.into(),
                ..Default::default()
            })
        };
        let defaults = MutationRules::default();
        let cases = [
            ("x-a", true),
            (":path", true),
            ("host", false),
            (":method", false),
            ("x-envoy-a", false),
        ];
        for (name, allowed) in cases {
            assert_eq!(defaults.allows(name), allowed, "{name}");
        }
        let compile = |from: pb::HeaderMutationRules| MutationRules::compile(Some(&from)).unwrap();
        let wide = compile(pb::HeaderMutationRules {
            allow_all_routing: on,
            allow_envoy: on,
            disallow_system: on,
            disallow_expression: regex("x-secret.*"),
            ..Default::default()
        });
        assert!(wide.allows("host") && wide.allows("x-envoy-a"));
        assert!(!wide.allows(":path") && !wide.allows("x-secret-a"));
        assert!(!wide.allows_removal(&http::header::HOST));
        let narrow = compile(pb::HeaderMutationRules {
            disallow_all: on,
            allow_expression: regex("x-a"),
            ..Default::default()
        });
        assert!(narrow.allows("x-a") && !narrow.allows("x-ab"));
    }
}
