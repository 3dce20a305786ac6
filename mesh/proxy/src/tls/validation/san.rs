//! Matchers of a peer's subject alternative names.

use std::net::IpAddr;

use serin_xds::pb::envoy::extensions::transport_sockets::tls::v3 as tls;
use serin_xds::pb::envoy::r#type::matcher::v3::StringMatcher;
use serin_xds::pb::envoy::r#type::matcher::v3::string_matcher::MatchPattern;

use crate::config::convert::required;
use crate::config::matchers::StringMatch;
use crate::error::{Refusal, Within};
use crate::tls::certificate::Certificate;

/// Which kind of name a matcher looks at.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum SanKind {
    Email,
    Dns,
    Uri,
    Ip,
    Any,
}

#[derive(Debug)]
pub(super) struct SanMatch {
    kind: SanKind,
    matcher: StringMatch,
    /// For exact DNS names: a certificate's wildcard matches as well.
    dns: Option<Box<str>>,
}

impl SanMatch {
    pub(super) fn compile(from: &tls::SubjectAltNameMatcher) -> Result<Self, Refusal> {
        use tls::subject_alt_name_matcher::SanType;
        let kind = match SanType::try_from(from.san_type) {
            Ok(SanType::Email) => SanKind::Email,
            Ok(SanType::Dns) => SanKind::Dns,
            Ok(SanType::Uri) => SanKind::Uri,
            Ok(SanType::IpAddress) => SanKind::Ip,
            Ok(SanType::OtherName | SanType::Unspecified) | Err(_) => {
                return Err(Refusal::new(
                    "san_type",
                    "only EMAIL, DNS, URI and IP_ADDRESS are supported",
                ));
            }
        };
        let matcher = required(from.matcher.as_ref(), "matcher")?;
        Ok(Self {
            kind,
            matcher: StringMatch::compile(matcher).within("matcher")?,
            dns: exact(matcher).filter(|_| kind == SanKind::Dns),
        })
    }

    /// The older form of matchers, which does not say what kind of name it means.
    pub(super) fn of_any_kind(from: &StringMatcher) -> Result<Self, Refusal> {
        Ok(Self {
            kind: SanKind::Any,
            matcher: StringMatch::compile(from)?,
            dns: exact(from),
        })
    }

    pub(super) fn matches(&self, certificate: &Certificate) -> bool {
        let kind = |kind| self.kind == kind || self.kind == SanKind::Any;
        let any = |names: &[Box<str>]| names.iter().any(|name| self.matcher.matches(name));
        (kind(SanKind::Uri) && any(&certificate.uri_sans))
            || (kind(SanKind::Email) && any(&certificate.email_sans))
            || (kind(SanKind::Dns)
                && match &self.dns {
                    Some(name) => certificate.dns_sans.iter().any(|san| dns_matches(san, name)),
                    None => any(&certificate.dns_sans),
                })
            || (kind(SanKind::Ip)
                && certificate
                    .ip_sans
                    .iter()
                    .any(|address: &IpAddr| self.matcher.matches(&address.to_string())))
    }
}

/// Whether the certificate's DNS name, perhaps with `*` as its first label, covers `name`.
pub fn dns_matches(san: &str, name: &str) -> bool {
    match san.strip_prefix("*.") {
        None => san.eq_ignore_ascii_case(name),
        Some(suffix) => name
            .split_once('.')
            .is_some_and(|(label, rest)| !label.is_empty() && rest.eq_ignore_ascii_case(suffix)),
    }
}

fn exact(from: &StringMatcher) -> Option<Box<str>> {
    match &from.match_pattern {
        Some(MatchPattern::Exact(name)) => Some(name.as_str().into()),
        _ => None,
    }
}
