//! A route table: which virtual host answers for an authority.

use std::sync::Arc;

use http::HeaderName;

use super::headers::HeaderOps;
use super::shared_map::SharedMap;
use super::slot::VirtualHostSlot;
use crate::error::Refusal;
use crate::policy::per_route::PerRoute;

type Map = SharedMap<Arc<VirtualHostSlot>>;

/// Domains of a route configuration, searched in Envoy's order: exact, longest `*suffix`, longest `prefix*`, `*`. A copy
/// shares what it has in common with the original.
#[derive(Clone, Debug, Default)]
pub struct DomainIndex {
    exact: Map,
    /// By length of the fixed part, longest first.
    suffixes: Vec<(usize, Map)>,
    prefixes: Vec<(usize, Map)>,
    any: Option<Arc<VirtualHostSlot>>,
}

/// Where a domain is kept, and the part of it that is compared.
enum Place<'d> {
    Any,
    Suffix(&'d str),
    Prefix(&'d str),
    Exact(&'d str),
}

impl<'d> Place<'d> {
    /// Of a domain in lower case.
    fn of(domain: &'d str) -> Self {
        if domain == "*" {
            Self::Any
        } else if let Some(suffix) = domain.strip_prefix('*') {
            Self::Suffix(suffix)
        } else if let Some(prefix) = domain.strip_suffix('*') {
            Self::Prefix(prefix)
        } else {
            Self::Exact(domain)
        }
    }
}

impl DomainIndex {
    /// The virtual host that has exactly this domain, which is in lower case.
    fn holder(&self, domain: &str) -> Option<&Arc<VirtualHostSlot>> {
        let level = |levels: &'_ [(usize, Map)], fixed: &str| {
            levels.iter().position(|(length, _)| *length == fixed.len())
        };
        match Place::of(domain) {
            Place::Any => self.any.as_ref(),
            Place::Suffix(fixed) => self.suffixes[level(&self.suffixes, fixed)?].1.get(fixed),
            Place::Prefix(fixed) => self.prefixes[level(&self.prefixes, fixed)?].1.get(fixed),
            Place::Exact(domain) => self.exact.get(domain),
        }
    }

    /// Another virtual host that has one of these domains, and which.
    pub fn conflict<'d>(
        &self,
        domains: impl IntoIterator<Item = &'d str>,
        host: &Arc<VirtualHostSlot>,
    ) -> Option<(Arc<VirtualHostSlot>, Refusal)> {
        domains.into_iter().find_map(|domain| {
            let domain = domain.to_ascii_lowercase();
            let holder = self.holder(&domain).filter(|holder| !Arc::ptr_eq(holder, host))?;
            let reason = format!(
                "{domain:?} already belongs to virtual host {:?}",
                holder.load().name
            );
            Some((holder.clone(), Refusal::new("domains", reason)))
        })
    }

    /// Adds a domain.
    pub fn insert(&mut self, domain: &str, host: &Arc<VirtualHostSlot>) {
        let domain = domain.to_ascii_lowercase();
        match Place::of(&domain) {
            Place::Any => self.any = Some(host.clone()),
            Place::Suffix(fixed) => {
                by_length(&mut self.suffixes, fixed.len()).insert(fixed, host.clone());
            }
            Place::Prefix(fixed) => {
                by_length(&mut self.prefixes, fixed.len()).insert(fixed, host.clone());
            }
            Place::Exact(domain) => {
                self.exact.insert(domain, host.clone());
            }
        }
    }

    /// Takes a domain of a virtual host out; what another one has stays.
    pub fn remove(&mut self, domain: &str, host: &Arc<VirtualHostSlot>) {
        let domain = domain.to_ascii_lowercase();
        if !self
            .holder(&domain)
            .is_some_and(|holder| Arc::ptr_eq(holder, host))
        {
            return;
        }
        match Place::of(&domain) {
            Place::Any => self.any = None,
            Place::Suffix(fixed) => leave(&mut self.suffixes, fixed),
            Place::Prefix(fixed) => leave(&mut self.prefixes, fixed),
            Place::Exact(domain) => {
                self.exact.remove(domain);
            }
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

fn by_length(levels: &mut Vec<(usize, Map)>, length: usize) -> &mut Map {
    let index = match levels.binary_search_by(|(have, _)| length.cmp(have)) {
        Ok(index) => index,
        Err(index) => {
            levels.insert(index, (length, Map::default()));
            index
        }
    };
    &mut levels[index].1
}

fn leave(levels: &mut Vec<(usize, Map)>, fixed: &str) {
    by_length(levels, fixed.len()).remove(fixed);
    levels.retain(|(_, map)| !map.is_empty());
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
    /// Whether routes have the last word about fields, and not the route configuration.
    pub most_specific_wins: bool,
    /// Fields that only internal clients may send.
    pub internal_only: Box<[HeaderName]>,
    /// Mutations for every request.
    pub request_headers: HeaderOps,
    /// Mutations for every response.
    pub response_headers: HeaderOps,
    /// Filter configuration for virtual hosts that have none of their own.
    pub per_filter: Arc<PerRoute>,
}

impl RouteTable {
    /// One without virtual hosts that says nothing.
    pub(crate) fn empty() -> Self {
        Self {
            name: "".into(),
            domains: DomainIndex::default(),
            discovers_hosts: false,
            ignore_port: false,
            most_specific_wins: false,
            internal_only: Box::default(),
            request_headers: HeaderOps::default(),
            response_headers: HeaderOps::default(),
            per_filter: Arc::default(),
        }
    }

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
        let one = host("one");
        index.insert("a", &one);
        let (holder, refusal) = index.conflict(["b", "A"], &host("two")).unwrap();
        assert!(Arc::ptr_eq(&holder, &one));
        assert!(refusal.reason.contains("\"one\""), "{refusal}");
        assert!(index.conflict(["a"], &one).is_none(), "it is its own");
    }

    #[test]
    fn a_domain_that_is_taken_out_leaves_those_of_others() {
        let mut index = DomainIndex::default();
        let (one, two) = (host("one"), host("two"));
        for domain in ["a.example.com", "*.example.com", "a.*", "*"] {
            index.insert(domain, &one);
        }
        index.insert("*.com", &two);
        let before = index.clone();
        for domain in ["A.example.com", "*.example.com", "a.*", "*", "*.com"] {
            index.remove(domain, &one);
        }
        assert!(Arc::ptr_eq(index.find("a.example.com").unwrap(), &two));
        assert!(index.find("a.org").is_none());
        assert!(
            Arc::ptr_eq(before.find("a.example.com").unwrap(), &one),
            "the copy stays"
        );
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
