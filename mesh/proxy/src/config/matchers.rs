//! Compiled matchers: strings, headers, query parameters. Everything is prepared at configuration time, so that a
//! request pays for comparisons only.

use std::borrow::Cow;

use http::{HeaderMap, HeaderName, HeaderValue, header};
use regex::Regex;
use serin_xds::pb::envoy::config::route::v3 as route;
use serin_xds::pb::envoy::r#type::matcher::v3 as matcher;

use crate::error::{Refusal, Within};

/// What a matcher may look at.
#[derive(Clone, Copy, Debug)]
pub struct RequestView<'a> {
    /// `:method`.
    pub method: &'a str,
    /// Path without the query.
    pub path: &'a str,
    /// Query without `?`, if there is one.
    pub query: Option<&'a str>,
    /// Host and port as the client named them; where absent they are looked up in the fields, if they are wanted.
    pub authority: Option<&'a str>,
    /// `http` or `https`; the same.
    pub scheme: Option<&'a str>,
    /// Header fields.
    pub headers: &'a HeaderMap,
}

static X_FORWARDED_PROTO: HeaderName = HeaderName::from_static("x-forwarded-proto");

impl<'a> RequestView<'a> {
    /// Host and port as the client named them; empty if it did not.
    pub fn authority(&self) -> &'a str {
        self.authority
            .or_else(|| self.headers.get(header::HOST)?.to_str().ok())
            .unwrap_or("")
    }

    /// `http` or `https`; what is neither of them is `http`.
    pub fn scheme(&self) -> &'a str {
        self.scheme.unwrap_or_else(|| {
            let forwarded = self.headers.get(&X_FORWARDED_PROTO);
            let is_https = forwarded.is_some_and(|value| value.as_bytes().eq_ignore_ascii_case(b"https"));
            if is_https { "https" } else { "http" }
        })
    }
}

/// Compiles a regular expression that must match the whole subject, as Envoy's `safe_regex` does.
pub(crate) fn full_regex(pattern: &str) -> Result<Regex, Refusal> {
    Regex::new(&format!("^(?:{pattern})$")).map_err(|error| Refusal::new("regex", error.to_string()))
}

/// A part of a query as it was meant; what is no escape stays.
pub(crate) fn percent_decoded(text: &str) -> Cow<'_, str> {
    if !text.contains('%') {
        return text.into();
    }
    let bytes = text.as_bytes();
    let mut out = Vec::with_capacity(bytes.len());
    let mut index = 0;
    while index < bytes.len() {
        let escape = text
            .get(index + 1..index + 3)
            .filter(|digits| bytes[index] == b'%' && digits.bytes().all(|byte| byte.is_ascii_hexdigit()));
        match escape.and_then(|digits| u8::from_str_radix(digits, 16).ok()) {
            Some(byte) => {
                out.push(byte);
                index += 3;
            }
            None => {
                out.push(bytes[index]);
                index += 1;
            }
        }
    }
    String::from_utf8_lossy(&out).into_owned().into()
}

/// A `StringMatcher`.
#[derive(Clone, Debug)]
pub enum StringMatch {
    /// Equal.
    Exact(Box<str>),
    /// Equal, ASCII case ignored.
    ExactIgnoreCase(Box<str>),
    /// Starts with.
    Prefix(Box<str>, bool),
    /// Ends with.
    Suffix(Box<str>, bool),
    /// Contains (the needle is lower case when case is ignored).
    Contains(Box<str>, bool),
    /// Full match.
    Regex(Regex),
}

impl StringMatch {
    /// Compiles the message.
    pub fn compile(from: &matcher::StringMatcher) -> Result<Self, Refusal> {
        use matcher::string_matcher::MatchPattern;
        let ignore = from.ignore_case;
        match &from.match_pattern {
            Some(MatchPattern::Exact(value)) if ignore => Ok(Self::ExactIgnoreCase(value.as_str().into())),
            Some(MatchPattern::Exact(value)) => Ok(Self::Exact(value.as_str().into())),
            Some(MatchPattern::Prefix(value)) => Ok(Self::Prefix(value.as_str().into(), ignore)),
            Some(MatchPattern::Suffix(value)) => Ok(Self::Suffix(value.as_str().into(), ignore)),
            Some(MatchPattern::Contains(value)) if ignore => {
                Ok(Self::Contains(value.to_ascii_lowercase().into(), true))
            }
            Some(MatchPattern::Contains(value)) => Ok(Self::Contains(value.as_str().into(), false)),
            Some(MatchPattern::SafeRegex(value)) => {
                Ok(Self::Regex(full_regex(&value.regex).within("safe_regex")?))
            }
            Some(MatchPattern::Custom(_)) => {
                Err(Refusal::new("custom", "custom string matchers are not supported"))
            }
            None => Err(Refusal::new("match_pattern", "is missing")),
        }
    }

    /// Whether `subject` matches.
    pub fn matches(&self, subject: &str) -> bool {
        match self {
            Self::Exact(value) => &**value == subject,
            Self::ExactIgnoreCase(value) => value.eq_ignore_ascii_case(subject),
            Self::Prefix(value, ignore) => has_prefix(subject, value, *ignore),
            Self::Suffix(value, ignore) => has_suffix(subject, value, *ignore),
            Self::Contains(value, false) => subject.contains(&**value),
            Self::Contains(value, true) => subject.to_ascii_lowercase().contains(&**value),
            Self::Regex(regex) => regex.is_match(subject),
        }
    }
}

/// Whether `subject` starts with `prefix`.
pub(crate) fn has_prefix(subject: &str, prefix: &str, ignore_case: bool) -> bool {
    if !ignore_case {
        return subject.starts_with(prefix);
    }
    let (subject, prefix) = (subject.as_bytes(), prefix.as_bytes());
    subject.len() >= prefix.len() && subject[..prefix.len()].eq_ignore_ascii_case(prefix)
}

fn has_suffix(subject: &str, suffix: &str, ignore_case: bool) -> bool {
    if !ignore_case {
        return subject.ends_with(suffix);
    }
    let (subject, suffix) = (subject.as_bytes(), suffix.as_bytes());
    subject.len() >= suffix.len() && subject[subject.len() - suffix.len()..].eq_ignore_ascii_case(suffix)
}

#[derive(Clone, Debug)]
enum HeaderKey {
    Method,
    Path,
    Authority,
    Scheme,
    Field(HeaderName),
}

#[derive(Clone, Debug)]
enum HeaderTest {
    Present(bool),
    Range(i64, i64),
    String(StringMatch),
}

/// A `HeaderMatcher`.
#[derive(Clone, Debug)]
pub struct HeaderMatch {
    key: HeaderKey,
    test: HeaderTest,
    invert: bool,
    missing_is_empty: bool,
}

impl HeaderMatch {
    /// Whether there is such a field.
    pub fn present(name: HeaderName) -> Self {
        Self {
            key: HeaderKey::Field(name),
            test: HeaderTest::Present(true),
            invert: false,
            missing_is_empty: false,
        }
    }

    /// Compiles the message.
    pub fn compile(from: &route::HeaderMatcher) -> Result<Self, Refusal> {
        use route::header_matcher::HeaderMatchSpecifier as Spec;
        let key = match from.name.as_str() {
            ":method" => HeaderKey::Method,
            ":path" => HeaderKey::Path,
            ":authority" => HeaderKey::Authority,
            ":scheme" => HeaderKey::Scheme,
            name if name.eq_ignore_ascii_case("host") => HeaderKey::Authority,
            name => HeaderKey::Field(
                HeaderName::from_bytes(name.as_bytes())
                    .map_err(|_| Refusal::new("name", format!("{name:?} is not a header name")))?,
            ),
        };
        let test = match &from.header_match_specifier {
            None => HeaderTest::Present(true),
            Some(Spec::PresentMatch(present)) => HeaderTest::Present(*present),
            Some(Spec::RangeMatch(range)) => HeaderTest::Range(range.start, range.end),
            Some(Spec::ExactMatch(value)) => HeaderTest::String(StringMatch::Exact(value.as_str().into())),
            Some(Spec::PrefixMatch(value)) => {
                HeaderTest::String(StringMatch::Prefix(value.as_str().into(), false))
            }
            Some(Spec::SuffixMatch(value)) => {
                HeaderTest::String(StringMatch::Suffix(value.as_str().into(), false))
            }
            Some(Spec::ContainsMatch(value)) => {
                HeaderTest::String(StringMatch::Contains(value.as_str().into(), false))
            }
            Some(Spec::SafeRegexMatch(value)) => HeaderTest::String(StringMatch::Regex(
                full_regex(&value.regex).within("safe_regex_match")?,
            )),
            Some(Spec::StringMatch(value)) => {
                HeaderTest::String(StringMatch::compile(value).within("string_match")?)
            }
        };
        Ok(Self {
            key,
            test,
            invert: from.invert_match,
            missing_is_empty: from.treat_missing_header_as_empty,
        })
    }

    /// Whether the request has the header as asked. A header that is absent never matches a value test, inverted or
    /// not, unless `treat_missing_header_as_empty` is set (Envoy's rule).
    pub fn matches(&self, request: &RequestView<'_>) -> bool {
        match &self.key {
            HeaderKey::Method => self.test_value(Some(request.method)),
            HeaderKey::Scheme => self.test_value(Some(request.scheme())),
            HeaderKey::Authority => self.test_value(Some(request.authority())),
            HeaderKey::Path => match request.query {
                None => self.test_value(Some(request.path)),
                Some(query) => self.test_value(Some(&format!("{}?{query}", request.path))),
            },
            HeaderKey::Field(name) => {
                let mut values = request.headers.get_all(name).iter().peekable();
                if values.peek().is_none() {
                    return self.test_value(None);
                }
                // Of several values one must be as asked, or none where that is inverted.
                let holds = |value: &HeaderValue| match value.to_str() {
                    Ok(text) => self.holds(text),
                    Err(_) => self.holds(&String::from_utf8_lossy(value.as_bytes())),
                };
                values.any(holds) != self.invert
            }
        }
    }

    fn test_value(&self, value: Option<&str>) -> bool {
        let outcome = match (&self.test, value) {
            (_, Some(value)) => self.holds(value),
            (HeaderTest::Present(wanted), None) => self.missing_is_empty == *wanted,
            (_, None) if !self.missing_is_empty => return false,
            (_, None) => self.holds(""),
        };
        outcome != self.invert
    }

    /// Whether a value that is there is as asked, before that is inverted.
    fn holds(&self, value: &str) -> bool {
        match &self.test {
            HeaderTest::Present(wanted) => *wanted,
            HeaderTest::Range(start, end) => value
                .parse::<i64>()
                .is_ok_and(|number| (*start..*end).contains(&number)),
            HeaderTest::String(test) => test.matches(value),
        }
    }
}

/// A `QueryParameterMatcher`.
#[derive(Clone, Debug)]
pub struct QueryMatch {
    name: Box<str>,
    test: Option<StringMatch>,
    present: bool,
}

impl QueryMatch {
    /// Compiles the message.
    pub fn compile(from: &route::QueryParameterMatcher) -> Result<Self, Refusal> {
        use route::query_parameter_matcher::QueryParameterMatchSpecifier as Spec;
        let (test, present) = match &from.query_parameter_match_specifier {
            None => (None, true),
            Some(Spec::PresentMatch(present)) => (None, *present),
            Some(Spec::StringMatch(value)) => {
                (Some(StringMatch::compile(value).within("string_match")?), true)
            }
        };
        Ok(Self {
            name: from.name.as_str().into(),
            test,
            present,
        })
    }

    /// Whether the first parameter of that name is as asked.
    pub fn matches(&self, query: Option<&str>) -> bool {
        let found = query.and_then(|query| {
            query.split('&').find_map(|pair| {
                let (name, value) = pair.split_once('=').unwrap_or((pair, ""));
                (name == &*self.name).then_some(value)
            })
        });
        match (&self.test, found) {
            (None, found) => found.is_some() == self.present,
            (Some(_), None) => false,
            (Some(test), Some(value)) => test.matches(value),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn view(headers: &HeaderMap) -> RequestView<'_> {
        RequestView {
            method: "GET",
            path: "/a",
            query: Some("x=1"),
            authority: Some("a.b"),
            scheme: Some("http"),
            headers,
        }
    }

    fn header(name: &str, spec: Option<route::header_matcher::HeaderMatchSpecifier>) -> route::HeaderMatcher {
        route::HeaderMatcher {
            name: name.into(),
            header_match_specifier: spec,
            ..Default::default()
        }
    }

    #[test]
    fn a_missing_header_matches_no_value_test_even_when_inverted() {
        use route::header_matcher::HeaderMatchSpecifier as Spec;
        let headers = HeaderMap::new();
        let mut message = header("x-user", Some(Spec::ExactMatch("bob".into())));
        message.invert_match = true;
        assert!(!HeaderMatch::compile(&message).unwrap().matches(&view(&headers)));
        message.treat_missing_header_as_empty = true;
        assert!(HeaderMatch::compile(&message).unwrap().matches(&view(&headers)));
    }

    #[test]
    fn header_matchers_decide_as_envoy_does() {
        use route::header_matcher::HeaderMatchSpecifier as Spec;
        let mut headers = HeaderMap::new();
        headers.insert("x-n", "17".parse().unwrap());
        headers.append("x-l", "a".parse().unwrap());
        headers.append("x-l", "b".parse().unwrap());
        let range = |start, end| {
            Some(Spec::RangeMatch(serin_xds::pb::envoy::r#type::v3::Int64Range {
                start,
                end,
            }))
        };
        let cases = [
            ("x-n", range(10, 18), true),
            ("x-n", range(10, 17), false),
            ("x-n", Some(Spec::PresentMatch(true)), true),
            ("x-n", Some(Spec::PresentMatch(false)), false),
            ("x-none", Some(Spec::PresentMatch(false)), true),
            ("x-l", Some(Spec::ExactMatch("b".into())), true),
            ("x-l", Some(Spec::ExactMatch("a,b".into())), false),
            (":method", Some(Spec::ExactMatch("GET".into())), true),
            (":path", Some(Spec::ExactMatch("/a?x=1".into())), true),
            (":authority", Some(Spec::SuffixMatch(".b".into())), true),
            ("host", Some(Spec::PrefixMatch("a.".into())), true),
            ("x-n", Some(Spec::ContainsMatch("7".into())), true),
        ];
        for (name, spec, expected) in cases {
            let compiled = HeaderMatch::compile(&header(name, spec.clone())).unwrap();
            assert_eq!(compiled.matches(&view(&headers)), expected, "{name} {spec:?}");
        }
    }

    #[test]
    fn a_regular_expression_must_match_the_whole_value() {
        let matcher = StringMatch::compile(&matcher::StringMatcher {
            ignore_case: false,
            match_pattern: Some(matcher::string_matcher::MatchPattern::SafeRegex(
                matcher::RegexMatcher {
                    regex: "a|ab".into(),
                    ..Default::default()
                },
            )),
        })
        .unwrap();
        assert!(matcher.matches("ab"));
        assert!(!matcher.matches("abc"));
        assert!(!matcher.matches("xa"));
    }
}
