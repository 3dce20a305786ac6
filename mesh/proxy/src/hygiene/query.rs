//! Changes of the query of a request: parameters by name, of which there may be several.

use std::borrow::Cow;
use std::collections::BTreeMap;

use http::Uri;

use crate::config::matchers::percent_decoded;

/// How the names of parameters that came are compared.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Names {
    /// As they were sent.
    AsSent,
    /// As they were meant, without escapes.
    Decoded,
}

/// The parameters of a query by name, as Envoy has them; what is not changed stays as it was sent.
#[derive(Debug, Default)]
pub(crate) struct Query<'a>(BTreeMap<Cow<'a, str>, Vec<Parameter<'a>>>);

/// As it is written.
#[derive(Debug)]
struct Parameter<'a> {
    name: Cow<'a, str>,
    value: Cow<'a, str>,
}

impl<'a> Query<'a> {
    /// The parameters of a request.
    pub(crate) fn of(uri: &'a Uri, names: Names) -> Self {
        let mut all: BTreeMap<Cow<'a, str>, Vec<Parameter<'a>>> = BTreeMap::new();
        let query = uri.query().unwrap_or("");
        for pair in query.split('&').filter(|pair| !pair.is_empty()) {
            let (name, value) = pair.split_once('=').unwrap_or((pair, ""));
            let key = match names {
                Names::AsSent => name.into(),
                Names::Decoded => percent_decoded(name),
            };
            all.entry(key).or_default().push(Parameter {
                name: name.into(),
                value: value.into(),
            });
        }
        Self(all)
    }

    /// Whether there is one of that name.
    pub(crate) fn has(&self, name: &str) -> bool {
        self.0.contains_key(name)
    }

    /// Adds one, which is written as `written` and `value`.
    pub(crate) fn add(&mut self, name: &'a str, written: &'a str, value: impl Into<Cow<'a, str>>) {
        self.0.entry(name.into()).or_default().push(Parameter {
            name: written.into(),
            value: value.into(),
        });
    }

    /// The same in the place of all that have the name.
    pub(crate) fn set(&mut self, name: &'a str, written: &'a str, value: impl Into<Cow<'a, str>>) {
        self.remove(name);
        self.add(name, written, value);
    }

    /// Takes all off that have the name.
    pub(crate) fn remove(&mut self, name: &str) {
        self.0.remove(name);
    }

    /// Path and query with these parameters; `None` where they make none.
    pub(crate) fn target(&self, path: &str) -> Option<Uri> {
        let mut target = path.to_owned();
        let mut between = '?';
        for Parameter { name, value } in self.0.values().flatten() {
            target.push(std::mem::replace(&mut between, '&'));
            target.push_str(name);
            target.push('=');
            target.push_str(value);
        }
        target.parse().ok()
    }
}

/// A name or a value in which nothing has a meaning of its own: all but letters, digits, `*`, `-`, `.` and `_` is escaped.
pub(crate) fn encoded(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for byte in text.bytes() {
        if byte.is_ascii_alphanumeric() || matches!(byte, b'*' | b'-' | b'.' | b'_') {
            out.push(char::from(byte));
        } else {
            out.push_str(&format!("%{byte:02X}"));
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parameters_are_sorted_by_name_and_what_is_not_changed_stays_as_it_was_sent() {
        let uri: Uri = "/q?z=%26b&%61=1&&a=2&gone&flag".parse().unwrap();
        let mut query = Query::of(&uri, Names::Decoded);
        assert!(query.has("a") && !query.has("%61"));
        query.add("a", "a", encoded("3 &=%"));
        query.set("new", "new", "x");
        query.remove("gone");
        let target = query.target(uri.path()).unwrap();
        assert_eq!(target, "/q?%61=1&a=2&a=3%20%26%3D%25&flag=&new=x&z=%26b");
    }

    #[test]
    fn a_query_of_which_nothing_is_left_leaves_the_path_alone() {
        let uri: Uri = "/q?%61=1&a=2".parse().unwrap();
        let mut query = Query::of(&uri, Names::AsSent);
        query.remove("a");
        assert_eq!(query.target("/p").unwrap(), "/p?%61=1");
        query.remove("%61");
        assert_eq!(query.target("/p").unwrap(), "/p");
    }
}
