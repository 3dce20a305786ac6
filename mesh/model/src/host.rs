//! Host names: short names, wildcards, and which of several patterns is the most specific for a host.

use std::sync::Arc;

/// Expands a short name (`reviews`) in the namespace of the rule that names it; a name with a dot, a wildcard or an address is
/// taken as it is. `web.b` and `web.b.svc` are *not* expanded, as in Istio.
pub fn resolve(host: &str, namespace: &str, domain: &str) -> Arc<str> {
    if host.contains('.') || host.contains('*') || host.contains(':') || host.is_empty() {
        host.into()
    } else {
        format!("{host}.{namespace}.svc.{domain}").into()
    }
}

/// Whether a host or leading-wildcard pattern (`*`, `*.example.com`) includes a host or pattern.
pub fn covers(pattern: &str, host: &str) -> bool {
    match pattern.strip_prefix('*') {
        None => pattern == host,
        Some(suffix) => match host.strip_prefix('*') {
            Some(inner) => inner.ends_with(suffix),
            // `*.a` does not include `a` itself, and a wildcard stands for at least one character.
            None => host.len() > suffix.len() && host.ends_with(suffix) || suffix.is_empty(),
        },
    }
}

/// What two patterns have in common: the narrower one, if one includes the other.
pub fn intersection<'a>(first: &'a str, second: &'a str) -> Option<&'a str> {
    if covers(first, second) {
        Some(second)
    } else if covers(second, first) {
        Some(first)
    } else {
        None
    }
}

/// Whether the host is a pattern.
pub fn is_wildcard(host: &str) -> bool {
    host.starts_with('*')
}

/// The patterns that include `host`, most specific first: the host itself, then ever shorter suffixes, then `*`.
///
/// Istio allows a wildcard to stand for a part of a label (`*-test.example.com`), so every suffix counts, not only those at dots.
pub fn patterns(host: &str) -> impl Iterator<Item = String> + '_ {
    let body = host.strip_prefix('*').unwrap_or(host);
    let first = usize::from(!host.starts_with('*'));
    std::iter::once(host.to_owned())
        .chain(
            body.char_indices()
                .skip(first)
                .map(move |(index, _)| format!("*{}", &body[index..]))
                .filter(move |p| p != host),
        )
        .chain((host != "*").then(|| "*".to_owned()))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn short_names_expand_in_the_namespace_of_the_rule() {
        for (host, full) in [
            ("web", "web.b.svc.cluster.local"),
            ("web.b", "web.b"),
            ("web.b.svc.cluster.local", "web.b.svc.cluster.local"),
            ("*", "*"),
            ("*.example.com", "*.example.com"),
        ] {
            assert_eq!(&*resolve(host, "b", "cluster.local"), full);
        }
    }

    #[test]
    fn a_wildcard_includes_longer_names_but_not_its_own_suffix() {
        assert!(covers("*.example.com", "a.example.com"));
        assert!(covers("*.example.com", "a.b.example.com"));
        assert!(!covers("*.example.com", "example.com"));
        assert!(covers("*", "example.com"));
        assert!(covers("*.com", "*.example.com"));
        assert!(!covers("*.example.com", "*.com"));
        assert_eq!(intersection("*.com", "a.com"), Some("a.com"));
        assert_eq!(intersection("a.com", "b.com"), None);
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(128))]
        #[test]
        fn every_pattern_listed_covers_the_host_and_the_host_comes_first(host in "[a-c]{1,3}(\\.[a-c]{1,3}){0,3}") {
            let all: Vec<String> = patterns(&host).collect();
            prop_assert_eq!(&all[0], &host);
            prop_assert_eq!(all.last().map(String::as_str), Some("*"));
            for pattern in &all {
                prop_assert!(covers(pattern, &host), "{} does not cover {}", pattern, host);
            }
            for pair in all.windows(2) {
                prop_assert!(pair[0].len() >= pair[1].len() || !is_wildcard(&pair[0]));
            }
        }
    }
}
