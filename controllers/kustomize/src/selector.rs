//! Which resources a patch or a replacement means: patterns for names, selectors for labels.

use regex::{Regex, RegexBuilder};
use serin_manifests::Map;
use serin_manifests::Value;

use crate::error::{Cause, Error, Result};
use crate::id::Gvk;

/// A selector as written.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Selector {
    /// Group, version, kind.
    pub gvk: Gvk,
    /// Name.
    pub name: String,
    /// Namespace.
    pub namespace: String,
    /// Label selector in the notation of the API.
    pub label_selector: String,
    /// The same for annotations.
    pub annotation_selector: String,
}

/// A pattern that must match the whole text. Plain words are compared without a regular expression.
#[derive(Debug)]
pub(crate) enum Pattern {
    Any,
    Word(String),
    Regex(Box<Regex>),
}

impl Pattern {
    fn new(text: &str, max_bytes: usize) -> Result<Pattern> {
        if text.is_empty() {
            return Ok(Pattern::Any);
        }
        if text
            .bytes()
            .all(|b| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_' | b'/'))
        {
            return Ok(Pattern::Word(text.to_owned()));
        }
        Ok(Pattern::Regex(Box::new(compile(
            &format!("^(?:{text})$"),
            max_bytes,
        )?)))
    }

    pub(crate) fn matches(&self, text: &str) -> bool {
        match self {
            Pattern::Any => true,
            Pattern::Word(word) => word == text,
            Pattern::Regex(regex) => regex.is_match(text),
        }
    }
}

/// Compiles a regular expression within the budget.
pub(crate) fn compile(pattern: &str, max_bytes: usize) -> Result<Regex> {
    RegexBuilder::new(pattern)
        .size_limit(max_bytes)
        .dfa_size_limit(max_bytes.max(64 << 10))
        .build()
        .map_err(|e| match e {
            regex::Error::CompiledTooBig(limit) => Error::new(Cause::Budget {
                budget: "regex",
                what: format!("the pattern '{pattern}' is too large"),
                limit,
            }),
            other => Error::new(Cause::Selector(format!(
                "error parsing regexp: '{pattern}': {other}"
            ))),
        })
}

/// A selector ready to be used.
#[derive(Debug)]
pub(crate) struct Matcher {
    group: Pattern,
    version: Pattern,
    pub(crate) kind: Pattern,
    name: Pattern,
    namespace: Pattern,
    labels: Vec<Requirement>,
    annotations: Vec<Requirement>,
}

impl Matcher {
    pub(crate) fn new(s: &Selector, max_bytes: usize) -> Result<Matcher> {
        Ok(Matcher {
            group: Pattern::new(&s.gvk.group, max_bytes)?,
            version: Pattern::new(&s.gvk.version, max_bytes)?,
            kind: Pattern::new(&s.gvk.kind, max_bytes)?,
            name: Pattern::new(&s.name, max_bytes)?,
            namespace: Pattern::new(&s.namespace, max_bytes)?,
            labels: parse_label_selector(&s.label_selector)?,
            annotations: parse_label_selector(&s.annotation_selector)?,
        })
    }

    pub(crate) fn gvk(&self, group: &str, version: &str, kind: &str) -> bool {
        self.kind.matches(kind) && self.group.matches(group) && self.version.matches(version)
    }

    pub(crate) fn name(&self, name: &str) -> bool {
        self.name.matches(name)
    }

    pub(crate) fn namespace(&self, namespace: &str) -> bool {
        self.namespace.matches(namespace)
    }

    /// Labels and annotations of an object.
    pub(crate) fn metadata(&self, root: &Map) -> bool {
        if self.labels.is_empty() && self.annotations.is_empty() {
            return true;
        }
        let metadata = root.get("metadata");
        let map = |key: &str| metadata.and_then(|m| m.get(key)).and_then(Value::as_map);
        matches_all(&self.labels, map("labels")) && matches_all(&self.annotations, map("annotations"))
    }
}

/// Whether all requirements hold for a map of labels or annotations.
pub(crate) fn matches_all(requirements: &[Requirement], map: Option<&Map>) -> bool {
    requirements
        .iter()
        .all(|r| r.matches(map.and_then(|m| m.get(&r.key)).map(|v| v.text().unwrap_or(""))))
}

/// One requirement of a label selector.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Requirement {
    key: String,
    test: Test,
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum Test {
    In(Vec<String>),
    NotIn(Vec<String>),
    Exists,
    NotExists,
    Greater(i64),
    Less(i64),
}

impl Requirement {
    fn matches(&self, value: Option<&str>) -> bool {
        match &self.test {
            Test::In(values) => value.is_some_and(|v| values.iter().any(|x| x == v)),
            Test::NotIn(values) => value.is_none_or(|v| !values.iter().any(|x| x == v)),
            Test::Exists => value.is_some(),
            Test::NotExists => value.is_none(),
            Test::Greater(n) => value.and_then(|v| v.parse::<i64>().ok()).is_some_and(|v| v > *n),
            Test::Less(n) => value.and_then(|v| v.parse::<i64>().ok()).is_some_and(|v| v < *n),
        }
    }
}

/// Reads a label selector: `a=b`, `a!=b`, `a in (x,y)`, `a notin (x)`, `a`, `!a`, `a>1`, `a<1`, joined by commas.
pub(crate) fn parse_label_selector(text: &str) -> Result<Vec<Requirement>> {
    let tokens = tokenize(text);
    let mut at = 0;
    let mut requirements = Vec::new();
    if tokens.is_empty() {
        return Ok(requirements);
    }
    loop {
        requirements.push(requirement(&tokens, &mut at)?);
        match tokens.get(at) {
            None => return Ok(requirements),
            Some(t) if t == "," => {
                at += 1;
                if tokens.get(at).is_none_or(|t| t == ",") {
                    return Err(unexpected(tokens.get(at), "identifier after ','"));
                }
            }
            other => return Err(unexpected(other, "',' or 'end of string'")),
        }
    }
}

fn unexpected(found: Option<&String>, expected: &str) -> Error {
    let found = found.map_or("", String::as_str);
    Error::new(Cause::Selector(format!(
        "unable to parse requirement: found '{found}', expected: {expected}"
    )))
}

fn tokenize(text: &str) -> Vec<String> {
    let mut tokens = Vec::new();
    let mut chars = text.chars().peekable();
    while let Some(&c) = chars.peek() {
        if c.is_whitespace() {
            chars.next();
        } else if "(),=!<>".contains(c) {
            chars.next();
            let mut token = c.to_string();
            if matches!(c, '=' | '!')
                && let Some('=') = chars.peek()
            {
                token.push('=');
                chars.next();
            }
            tokens.push(token);
        } else {
            let mut word = String::new();
            while let Some(&c) = chars.peek() {
                if c.is_whitespace() || "(),=!<>".contains(c) {
                    break;
                }
                word.push(c);
                chars.next();
            }
            tokens.push(word);
        }
    }
    tokens
}

fn is_word(token: Option<&String>) -> bool {
    token.is_some_and(|t| !t.is_empty() && !t.starts_with(['(', ')', ',', '=', '!', '<', '>']))
}

fn requirement(tokens: &[String], at: &mut usize) -> Result<Requirement> {
    let absent = tokens.get(*at).is_some_and(|t| t == "!");
    if absent {
        *at += 1;
    }
    if !is_word(tokens.get(*at)) {
        return Err(unexpected(tokens.get(*at), "identifier"));
    }
    let key = tokens[*at].clone();
    *at += 1;
    if !valid_key(&key) {
        return Err(Error::new(Cause::Selector(format!(
            "unable to parse requirement: '{key}' is not a valid label key"
        ))));
    }
    if absent {
        return Ok(Requirement {
            key,
            test: Test::NotExists,
        });
    }
    let operator = match tokens.get(*at) {
        None => {
            return Ok(Requirement {
                key,
                test: Test::Exists,
            });
        }
        Some(t) if t == "," => {
            return Ok(Requirement {
                key,
                test: Test::Exists,
            });
        }
        Some(t) => t.clone(),
    };
    *at += 1;
    let test = match operator.as_str() {
        "in" => Test::In(values(tokens, at)?),
        "notin" => Test::NotIn(values(tokens, at)?),
        "=" | "==" => Test::In(vec![value(tokens, at)]),
        "!=" => Test::NotIn(vec![value(tokens, at)]),
        ">" | "<" => {
            let word = value(tokens, at);
            let number = word.parse::<i64>().map_err(|_| {
                Error::new(Cause::Selector(format!(
                    "for 'Gt', 'Lt' operators, the value must be an integer: '{word}'"
                )))
            })?;
            if operator == ">" {
                Test::Greater(number)
            } else {
                Test::Less(number)
            }
        }
        _ => {
            return Err(unexpected(Some(&operator), "in, notin, =, ==, !=, gt, lt"));
        }
    };
    let check = |values: &[String]| match values.iter().find(|v| !valid_value(v)) {
        Some(bad) => Err(Error::new(Cause::Selector(format!(
            "unable to parse requirement: '{bad}' is not a valid label value"
        )))),
        None => Ok(()),
    };
    if let Test::In(v) | Test::NotIn(v) = &test {
        check(v)?;
    }
    Ok(Requirement { key, test })
}

fn value(tokens: &[String], at: &mut usize) -> String {
    match tokens.get(*at) {
        Some(word) if is_word(Some(word)) => {
            *at += 1;
            word.clone()
        }
        _ => String::new(),
    }
}

fn values(tokens: &[String], at: &mut usize) -> Result<Vec<String>> {
    if tokens.get(*at).is_none_or(|t| t != "(") {
        return Err(unexpected(tokens.get(*at), "'('"));
    }
    *at += 1;
    let mut out = Vec::new();
    loop {
        match tokens.get(*at).map(String::as_str) {
            Some(")") => {
                *at += 1;
                if out.is_empty() {
                    out.push(String::new());
                }
                return Ok(out);
            }
            Some(",") => {
                *at += 1;
                if tokens.get(*at).is_none_or(|t| t == "," || t == ")") {
                    out.push(String::new());
                }
            }
            Some(_) if is_word(tokens.get(*at)) => {
                out.push(tokens[*at].clone());
                *at += 1;
                if tokens.get(*at).is_none_or(|t| t != "," && t != ")") {
                    return Err(unexpected(tokens.get(*at), "',' or ')'"));
                }
            }
            _ => return Err(unexpected(tokens.get(*at), "',', ')' or identifier")),
        }
    }
}

fn valid_value(v: &str) -> bool {
    v.is_empty() || (v.len() <= 63 && valid_name(v))
}

fn valid_name(v: &str) -> bool {
    let edge = |c: Option<char>| c.is_some_and(|c| c.is_ascii_alphanumeric());
    edge(v.chars().next())
        && edge(v.chars().last())
        && v.chars()
            .all(|c| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.'))
}

fn valid_key(key: &str) -> bool {
    let (prefix, name) = key.rsplit_once('/').map_or((None, key), |(p, n)| (Some(p), n));
    let prefix_ok = prefix.is_none_or(|p| {
        !p.is_empty()
            && p.len() <= 253
            && p.split('.').all(|part| {
                !part.is_empty()
                    && !part.starts_with('-')
                    && !part.ends_with('-')
                    && part
                        .chars()
                        .all(|c| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-')
            })
    });
    prefix_ok && name.len() <= 63 && valid_name(name)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn label_selectors_are_read_as_the_api_reads_them() {
        let labels = Value::string_map([("app", "web"), ("tier", "front"), ("rank", "3")]);
        let cases: &[(&str, bool)] = &[
            ("", true),
            ("app=web", true),
            ("app==web,tier!=back", true),
            ("app in (api, web)", true),
            ("app notin (web)", false),
            ("!missing", true),
            ("missing", false),
            ("rank>2", true),
            ("rank<3", false),
            ("missing!=x", true),
        ];
        for (text, want) in cases {
            let requirements = parse_label_selector(text).unwrap();
            assert_eq!(matches_all(&requirements, labels.as_map()), *want, "{text}");
        }
        for bad in ["a in (", "a in", "=b", "a,,b", "a=b c", "a>x", "a in (b"] {
            assert!(parse_label_selector(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn a_pattern_matches_the_whole_name() {
        let matcher = Matcher::new(
            &Selector {
                name: "web.*|api".into(),
                ..Selector::default()
            },
            1 << 18,
        )
        .unwrap();
        assert!(matcher.name("web-1") && matcher.name("api"));
        assert!(!matcher.name("my-web") && !matcher.name("api2"));
    }

    #[test]
    fn an_oversized_pattern_names_the_budget() {
        let selector = Selector {
            name: "(a{1000}){1000}".into(),
            ..Selector::default()
        };
        let error = Matcher::new(&selector, 1 << 18).unwrap_err().to_string();
        assert!(error.contains("regex budget exceeded"), "{error}");
    }
}
