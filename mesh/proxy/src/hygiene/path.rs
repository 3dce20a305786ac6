//! Path normalisation before routing, so that a policy and an application see the same path.

use std::borrow::Cow;

use crate::config::hcm::EscapedSlashes;

/// What becomes of a path.
#[derive(Debug, PartialEq, Eq)]
pub enum Normalized<'a> {
    /// Use this path.
    Path(Cow<'a, str>),
    /// Tell the client to use this path.
    Redirect(String),
    /// Refuse the request; its slashes are as they were understood.
    Refused(Cow<'a, str>),
}

/// Normalises `path` (without query) as the connection manager is configured.
pub fn normalize(path: &str, dots: bool, merge_slashes: bool, escaped: EscapedSlashes) -> Normalized<'_> {
    let bytes = path.as_bytes();
    let mut out: Cow<'_, str> = path.into();
    if escaped != EscapedSlashes::Keep && has_escaped_slash(bytes) {
        match escaped {
            EscapedSlashes::Reject => return Normalized::Refused(unescape_slashes(path).into()),
            _ => out = unescape_slashes(path).into(),
        }
    }
    let unescaped = matches!(out, Cow::Owned(_));
    if dots && out.contains('%') {
        // An application in C ends there, a policy does not.
        if out.contains("%00") {
            return Normalized::Refused(out);
        }
        if let Some((decoded, count)) = decode_unreserved(&out) {
            // `%2%65`, `%2%66` and `%0%30` would have become other escapes, for somebody else to decode.
            if escapes(&decoded) + count > escapes(&out) {
                return Normalized::Refused(out);
            }
            out = decoded.into();
        }
    }
    if dots && needs_dots(out.as_bytes()) {
        match resolve_dots(&out) {
            Some(resolved) => out = resolved.into(),
            None => return Normalized::Refused(out),
        }
    }
    if merge_slashes && out.contains("//") {
        let mut merged = String::with_capacity(out.len());
        for char in out.chars() {
            if char != '/' || !merged.ends_with('/') {
                merged.push(char);
            }
        }
        out = merged.into();
    }
    if unescaped && escaped == EscapedSlashes::Redirect {
        return Normalized::Redirect(out.into_owned());
    }
    Normalized::Path(out)
}

fn has_escaped_slash(bytes: &[u8]) -> bool {
    bytes
        .windows(3)
        .any(|w| w[0] == b'%' && matches!((w[1], w[2] | 0x20), (b'2', b'f') | (b'5', b'c')))
}

fn unescape_slashes(path: &str) -> String {
    path.replace("%2F", "/")
        .replace("%2f", "/")
        .replace("%5C", "\\")
        .replace("%5c", "\\")
}

/// The path with escapes of unreserved characters decoded (RFC 3986 section 6.2.2.2), if it has any: `/%61dmin` is
/// `/admin` to every application, so it is to every policy. Also how many they were.
fn decode_unreserved(path: &str) -> Option<(String, usize)> {
    let digit = |byte: u8| (byte as char).to_digit(16);
    let mut out: Option<String> = None;
    let mut count = 0;
    let mut rest = path;
    while let Some(at) = rest.find('%') {
        let (before, escape) = rest.split_at(at);
        let bytes = escape.as_bytes();
        let decoded = match (bytes.get(1), bytes.get(2)) {
            (Some(high), Some(low)) => digit(*high)
                .zip(digit(*low))
                .map(|(high, low)| (high * 16 + low) as u8 as char),
            _ => None,
        };
        match decoded.filter(|char| char.is_ascii_alphanumeric() || "-._~".contains(*char)) {
            Some(char) => {
                let out = out.get_or_insert_with(|| path[..path.len() - rest.len()].to_owned());
                out.push_str(before);
                out.push(char);
                count += 1;
                rest = &escape[3..];
            }
            None => {
                if let Some(out) = &mut out {
                    out.push_str(before);
                    out.push('%');
                }
                rest = &escape[1..];
            }
        }
    }
    let mut out = out?;
    out.push_str(rest);
    Some((out, count))
}

/// How many escapes there are.
fn escapes(path: &str) -> usize {
    path.as_bytes()
        .windows(3)
        .filter(|w| w[0] == b'%' && w[1].is_ascii_hexdigit() && w[2].is_ascii_hexdigit())
        .count()
}

/// Cheap test that lets ordinary paths through untouched.
fn needs_dots(bytes: &[u8]) -> bool {
    bytes.contains(&b'\\')
        || bytes.windows(2).any(|w| w == b"/.")
        || bytes
            .windows(3)
            .any(|w| w[0] == b'%' && w[1] == b'2' && w[2] | 0x20 == b'e')
}

/// RFC 3986 section 5.2.4, with `%2e` read as a dot and a backslash as a slash, as browsers do. `None` when the path
/// climbs above its root.
fn resolve_dots(path: &str) -> Option<String> {
    let path = path.replace("%2e", ".").replace("%2E", ".").replace('\\', "/");
    let mut segments: Vec<&str> = Vec::new();
    let mut parts = path.strip_prefix('/')?.split('/').peekable();
    while let Some(part) = parts.next() {
        let last = parts.peek().is_none();
        match part {
            "." | ".." => {
                if part == ".." {
                    segments.pop()?;
                }
                if last {
                    segments.push("");
                }
            }
            other => segments.push(other),
        }
    }
    Some(format!("/{}", segments.join("/")))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn dots(path: &str) -> Normalized<'_> {
        normalize(path, true, false, EscapedSlashes::Keep)
    }

    #[test]
    fn dot_segments_are_resolved_also_when_escaped_and_never_above_the_root() {
        for (path, expected) in [
            ("/a/b", "/a/b"),
            ("/a/./b", "/a/b"),
            ("/a/../b", "/b"),
            ("/a/%2e%2E/b", "/b"),
            ("/a\\..\\b", "/b"),
            ("/a/..", "/"),
            ("/a/.", "/a/"),
            ("/.well-known/x", "/.well-known/x"),
            ("/a//b", "/a//b"),
        ] {
            assert_eq!(dots(path), Normalized::Path(expected.into()), "{path}");
        }
        for (path, expected) in [
            ("/%61dm%69n%7e", "/admin~"),
            ("/a%2Fb%20c%zz%4", "/a%2Fb%20c%zz%4"),
            ("/x%25%41", "/x%25A"),
        ] {
            assert_eq!(dots(path), Normalized::Path(expected.into()), "{path}");
        }
        // Escapes made of escapes: a dot, a slash, NUL, a percent sign that begins one.
        for path in [
            "/%2%65%2%65/etc",
            "/a%2%66b",
            "/a%%32fb",
            "/a%0%30b",
            "/a%5%63b",
            "/a%%32%35b",
        ] {
            assert_eq!(dots(path), Normalized::Refused(path.into()), "{path}");
        }
        assert_eq!(dots("/a%00b"), Normalized::Refused("/a%00b".into()));
        assert_eq!(dots("/../etc"), Normalized::Refused("/../etc".into()));
        assert_eq!(dots("/a/../../etc"), Normalized::Refused("/a/../../etc".into()));
    }

    #[test]
    fn slashes_are_merged_and_escaped_ones_handled_as_configured() {
        let merged = normalize("/a//b///c", true, true, EscapedSlashes::Keep);
        assert_eq!(merged, Normalized::Path("/a/b/c".into()));
        let path = "/a%2Fb";
        assert_eq!(
            normalize(path, true, true, EscapedSlashes::Keep),
            Normalized::Path(path.into())
        );
        assert_eq!(
            normalize(path, true, true, EscapedSlashes::Reject),
            Normalized::Refused("/a/b".into())
        );
        assert_eq!(
            normalize(path, true, true, EscapedSlashes::Forward),
            Normalized::Path("/a/b".into())
        );
        assert_eq!(
            normalize(path, true, true, EscapedSlashes::Redirect),
            Normalized::Redirect("/a/b".into())
        );
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(128))]
        #[test]
        fn normalising_twice_changes_nothing(path in "/[a-b./%26e\\\\]{0,20}") {
            if let Normalized::Path(once) = normalize(&path, true, true, EscapedSlashes::Keep) {
                let twice = normalize(&once, true, true, EscapedSlashes::Keep);
                prop_assert_eq!(&twice, &Normalized::Path(once.clone()));
            }
        }
    }
}
