//! A route table: which virtual host answers for an authority.

use std::collections::HashMap;
use std::sync::Arc;

use super::headers::HeaderOps;
use super::slot::VirtualHostSlot;
use crate::error::Refusal;
use crate::policy::per_route::PerRoute;

type Map<V> = HashMap<Box<str>, V, foldhash::fast::RandomState>;

/// Domains of a route configuration, searched in Envoy's order: exact, longest `*suffix`, longest `prefix*`, `*`.
#[derive(Clone, Debug, Default)]
pub struct DomainIndex {
    exact: Map<Arc<VirtualHostSlot>>,
    /// By length of the fixed part, longest first.
    suffixes: Vec<(usize, Map<Arc<VirtualHostSlot>>)>,
    prefixes: Vec<(usize, Map<Arc<VirtualHostSlot>>)>,
    any: Option<Arc<VirtualHostSlot>>,
}

impl DomainIndex {
    /// Refuses a domain that another virtual host has.
    pub fn check(&self, domain: &str, host: &Arc<VirtualHostSlot>) -> Result<(), Refusal> {
        let domain = domain.to_ascii_lowercase();
        let level = |levels: &[(usize, Map<Arc<VirtualHostSlot>>)], fixed: &str| {
            levels
                .iter()
                .find(|(length, _)| *length == fixed.len())
                .and_then(|(_, map)| map.get(fixed).cloned())
        };
        let holder = if domain == "*" {
            self.any.clone()
        } else if let Some(suffix) = domain.strip_prefix('*') {
            level(&self.suffixes, suffix)
        } else if let Some(prefix) = domain.strip_suffix('*') {
            level(&self.prefixes, prefix)
        } else {
            self.exact.get(domain.as_str()).cloned()
        };
        match holder {
            Some(holder) if !Arc::ptr_eq(&holder, host) => Err(Refusal::new(
                "domains",
                format!(
                    "{domain:?} already belongs to virtual host {:?}",
                    holder.load().name
                ),
            )),
            _ => Ok(()),
        }
    }

    /// Adds a domain.
    pub fn insert(&mut self, domain: &str, host: &Arc<VirtualHostSlot>) {
        let domain = domain.to_ascii_lowercase();
        if domain == "*" {
            self.any = Some(host.clone());
        } else if let Some(suffix) = domain.strip_prefix('*') {
            by_length(&mut self.suffixes, suffix.len()).insert(suffix.into(), host.clone());
        } else if let Some(prefix) = domain.strip_suffix('*') {
            by_length(&mut self.prefixes, prefix.len()).insert(prefix.into(), host.clone());
        } else {
            self.exact.insert(domain.into(), host.clone());
        }
    }

    /// The virtual host for a lower-case authority.
    pub fn find(&self, authority: &str) -> Option<&Arc<VirtualHostSlot>> {
        if let Some(host) = self.exact.get(authority) {
            return Some(host);
        }
        for (length, map) in &self.suffixes {
            // The star stands for at least one character.
            if authority.len() > *length
                && let Some(suffix) = authority.get(authority.len() - length..)
                && let Some(host) = map.get(suffix)
            {
                return Some(host);
            }
        }
        for (length, map) in &self.prefixes {
            if authority.len() > *length
                && let Some(prefix) = authority.get(..*length)
                && let Some(host) = map.get(prefix)
            {
                return Some(host);
            }
        }
        self.any.as_ref()
    }
}

fn by_length(
    levels: &mut Vec<(usize, Map<Arc<VirtualHostSlot>>)>,
    length: usize,
) -> &mut Map<Arc<VirtualHostSlot>> {
    let index = match levels.binary_search_by(|(have, _)| length.cmp(have)) {
        Ok(index) => index,
        Err(index) => {
            levels.insert(index, (length, Map::default()));
            index
        }
    };
    &mut levels[index].1
}

/// A route configuration, compiled.
#[derive(Debug)]
pub struct RouteTable {
    /// Its name.
    pub name: Arc<str>,
    /// Its virtual hosts.
    pub domains: DomainIndex,
    /// Whether virtual hosts come as resources of their own (VHDS).
    pub discovers_hosts: bool,
    /// Whether the port of the authority is ignored.
    pub ignore_port: bool,
    /// Mutations for every request.
    pub request_headers: HeaderOps,
    /// Mutations for every response.
    pub response_headers: HeaderOps,
    /// Filter configuration for virtual hosts that have none of their own.
    pub per_filter: Arc<PerRoute>,
}

impl RouteTable {
    /// The virtual host that answers for `authority` as the client sent it.
    pub fn find(&self, authority: &str) -> Option<&Arc<VirtualHostSlot>> {
        let host = if self.ignore_port {
            strip_port(authority)
        } else {
            authority
        };
        if host.bytes().any(|byte| byte.is_ascii_uppercase()) {
            self.domains.find(&host.to_ascii_lowercase())
        } else {
            self.domains.find(host)
        }
    }
}

/// The host without `:port`; an IPv6 address keeps its brackets.
pub(crate) fn strip_port(authority: &str) -> &str {
    match authority.rfind(':') {
        Some(colon)
            if authority[colon + 1..].bytes().all(|byte| byte.is_ascii_digit())
                && !authority[..colon].ends_with(':') =>
        {
            let host = &authority[..colon];
            // A bare IPv6 address has more colons and no brackets; its last group is not a port.
            if host.contains(':') && !host.starts_with('[') {
                authority
            } else {
                host
            }
        }
        _ => authority,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::route::VirtualHost;

    fn host(name: &str) -> Arc<VirtualHostSlot> {
        Arc::new(VirtualHostSlot::new(VirtualHost::empty(name)))
    }

    #[test]
    fn domains_are_searched_exact_then_longest_suffix_then_longest_prefix_then_star() {
        let mut index = DomainIndex::default();
        for domain in [
            "a.example.com",
            "*.example.com",
            "*.com",
            "a.*",
            "a.example.*",
            "*",
        ] {
            index.insert(domain, &host(domain));
        }
        let cases = [
            ("a.example.com", "a.example.com"),
            ("b.example.com", "*.example.com"),
            ("example.com", "*.com"),
            ("a.example.org", "a.example.*"),
            ("a.net", "a.*"),
            ("z.net", "*"),
            (".example.com", "*.com"),
        ];
        for (authority, expected) in cases {
            assert_eq!(
                &*index.find(authority).unwrap().load().name,
                expected,
                "{authority}"
            );
        }
    }

    #[test]
    fn a_domain_of_two_virtual_hosts_is_refused() {
        let mut index = DomainIndex::default();
        index.insert("a", &host("one"));
        let error = index.check("A", &host("two")).unwrap_err();
        assert!(error.reason.contains("\"one\""), "{error}");
    }

    #[test]
    fn ports_are_stripped_from_names_and_bracketed_addresses_only() {
        for (authority, expected) in [
            ("a:80", "a"),
            ("a", "a"),
            ("[::1]:80", "[::1]"),
            ("[::1]", "[::1]"),
            ("::1", "::1"),
            ("1.2.3.4:5", "1.2.3.4"),
            ("a:b", "a:b"),
        ] {
            assert_eq!(strip_port(authority), expected, "{authority}");
        }
    }
}
