//! `${variable}` substitution with the operators and the errors of Flux's `envsubst`.
//!
//! The language is bash's parameter expansion as Flux understands it, oddities included, because
//! repositories rely on them: `$name` without braces is text, `$$` is a literal `$`, patterns are
//! Go's `path.Match` globs for `#` and `%` but literal text for `/`, offsets count bytes, `:+` and `:?`
//! behave like `:-`, and a nested expansion may stand where a whole operand stands (only defaults may
//! mix text and expansions).
//!
//! Works on bytes, since an offset can cut a character in two.

use std::collections::BTreeMap;

use super::glob;

/// How deep `${a:=${b:=...}}` may nest before the text is refused.
const MAX_DEPTH: usize = 64;
/// How large one substituted text may grow. A variable's value is bounded by what a ConfigMap holds
/// (1 MiB); 8 MiB of manifest is far beyond what an API server accepts.
const MAX_OUTPUT_BYTES: usize = 8 << 20;

/// Why a text could not be substituted. The wording of the first five is Flux's.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum TextError {
    /// An operator that is not complete or not known.
    #[error("bad substitution")]
    BadSubstitution,
    /// `${name` with something else than an operator or `}` behind it.
    #[error("missing closing brace")]
    MissingClosingBrace,
    /// Nothing that may be a name stands behind `${`.
    #[error("unable to parse variable name")]
    ParseVariableName,
    /// The operand of an operator is missing or malformed.
    #[error("unable to parse substitution within function")]
    ParseFuncSubstitution,
    /// Strict mode, and the variable has neither a value nor a default.
    #[error("variable not set (strict mode): {0:?}")]
    NotSet(String),
    /// A bound of ours, against texts made to exhaust memory.
    #[error("substitution exceeds its bound of {0}; use fewer or smaller variables")]
    TooLarge(&'static str),
}

/// Replaces every expansion in `text`. With `strict`, a variable that is not in `vars` is an error
/// unless the expansion carries a default.
pub(super) fn substitute(
    text: &[u8],
    vars: &BTreeMap<String, String>,
    strict: bool,
) -> Result<Vec<u8>, TextError> {
    let mut parser = Parser {
        rest: text,
        vars,
        strict,
        depth: 0,
    };
    let mut out = Vec::with_capacity(text.len());
    while let Some(&c) = parser.rest.first() {
        if parser.eat(b"${") {
            out.extend(parser.expansion()?);
        } else if parser.eat(b"$$") {
            out.push(b'$');
        } else {
            out.push(c);
            parser.rest = &parser.rest[1..];
        }
        if out.len() > MAX_OUTPUT_BYTES {
            return Err(TextError::TooLarge("8 MiB"));
        }
    }
    Ok(out)
}

struct Parser<'a> {
    rest: &'a [u8],
    vars: &'a BTreeMap<String, String>,
    strict: bool,
    depth: usize,
}

/// Which of the two escapes an operand understands.
#[derive(Clone, Copy, PartialEq)]
enum Escapes {
    None,
    /// `$$`, `\/` and `\\`: the operands of `/`.
    Replace,
}

#[derive(Clone, Copy, PartialEq)]
enum Edge {
    Prefix,
    Suffix,
}

impl Parser<'_> {
    fn eat(&mut self, token: &[u8]) -> bool {
        match self.rest.strip_prefix(token) {
            Some(rest) => {
                self.rest = rest;
                true
            }
            None => false,
        }
    }

    fn close(&mut self) -> Result<(), TextError> {
        if self.eat(b"}") {
            Ok(())
        } else {
            Err(TextError::BadSubstitution)
        }
    }

    /// Letters, digits and underscores, of any script; the text may be cut UTF-8, which ends the name.
    fn name(&mut self) -> String {
        let text = self.rest.utf8_chunks().next().map_or("", |chunk| chunk.valid());
        let end = text
            .find(|c: char| c != '_' && !c.is_alphabetic() && !c.is_numeric())
            .unwrap_or(text.len());
        let name = text[..end].to_string();
        self.rest = &self.rest[end..];
        name
    }

    /// What follows `${`, up to and with its `}`.
    fn expansion(&mut self) -> Result<Vec<u8>, TextError> {
        self.depth += 1;
        if self.depth > MAX_DEPTH {
            return Err(TextError::TooLarge("64 nested expansions"));
        }
        let value = self.expansion_inner();
        self.depth -= 1;
        value
    }

    fn expansion_inner(&mut self) -> Result<Vec<u8>, TextError> {
        if self.eat(b"#") {
            let name = self.name();
            if name.is_empty() {
                return Err(TextError::BadSubstitution);
            }
            self.close()?;
            return Ok(self.value(&name)?.len().to_string().into_bytes());
        }
        let name = self.name();
        if name.is_empty() {
            return Err(TextError::ParseVariableName);
        }
        match (self.rest.first(), self.rest.get(1)) {
            (Some(b'='), _) => {
                self.rest = &self.rest[1..];
                self.default_value(&name)
            }
            (Some(b':'), Some(b'=' | b'-' | b'?' | b'+')) => {
                self.rest = &self.rest[2..];
                self.default_value(&name)
            }
            (Some(b':'), _) => self.substring(&name),
            (Some(b',' | b'^'), _) => self.casing(&name),
            (Some(b'/'), _) => self.replace(&name),
            (Some(b'#'), _) => self.trim(&name, b'#', Edge::Prefix),
            (Some(b'%'), _) => self.trim(&name, b'%', Edge::Suffix),
            _ => {
                if !self.eat(b"}") {
                    return Err(TextError::MissingClosingBrace);
                }
                self.value(&name)
            }
        }
    }

    fn value(&self, name: &str) -> Result<Vec<u8>, TextError> {
        match self.vars.get(name) {
            Some(value) => Ok(value.clone().into_bytes()),
            None if self.strict => Err(TextError::NotSet(name.to_string())),
            None => Ok(Vec::new()),
        }
    }

    /// One operand: either one nested expansion, or text up to a terminator or the next `${`.
    /// Text may not be empty.
    fn operand(&mut self, ends: &[u8], escapes: Escapes) -> Result<Vec<u8>, TextError> {
        if self.eat(b"${") {
            return self.expansion();
        }
        let mut text = Vec::new();
        while let Some(&c) = self.rest.first() {
            if self.rest.starts_with(b"${") {
                break;
            }
            let escaped = escapes == Escapes::Replace
                && (self.rest.starts_with(b"$$")
                    || self.rest.starts_with(b"\\/")
                    || self.rest.starts_with(b"\\\\"));
            if escaped {
                text.push(self.rest[1]);
                self.rest = &self.rest[2..];
            } else if ends.contains(&c) {
                break;
            } else {
                text.push(c);
                self.rest = &self.rest[1..];
            }
        }
        if text.is_empty() {
            Err(TextError::ParseFuncSubstitution)
        } else {
            Ok(text)
        }
    }

    fn default_value(&mut self, name: &str) -> Result<Vec<u8>, TextError> {
        let mut default = Vec::new();
        while self.rest.first() != Some(&b'}') {
            default.extend(self.operand(b"}", Escapes::None)?);
        }
        self.close()?;
        match self.vars.get(name) {
            Some(value) if !value.is_empty() => Ok(value.clone().into_bytes()),
            _ => Ok(default),
        }
    }

    fn substring(&mut self, name: &str) -> Result<Vec<u8>, TextError> {
        self.eat(b":");
        let offset = self.operand(b":}", Escapes::None)?;
        let length = if self.eat(b":") {
            while self.eat(b":") {}
            Some(self.operand(b"}", Escapes::None)?)
        } else {
            None
        };
        self.close()?;
        let value = self.value(name)?;
        let Some(offset) = integer(&offset) else {
            return Ok(value);
        };
        let len = value.len() as i64;
        let start = if offset < 0 {
            (len.saturating_add(offset)).max(0)
        } else {
            offset
        };
        let end = match length {
            None => len,
            Some(text) => match integer(&text) {
                None => return Ok(value),
                Some(n) => start.saturating_add(n).min(len),
            },
        };
        if start >= end {
            return Ok(Vec::new());
        }
        Ok(value[start as usize..end as usize].to_vec())
    }

    fn casing(&mut self, name: &str) -> Result<Vec<u8>, TextError> {
        let mut operator = Vec::new();
        while operator.len() < 2
            && let Some(&c @ (b',' | b'^')) = self.rest.first()
        {
            operator.push(c);
            self.rest = &self.rest[1..];
        }
        self.close()?;
        let value = String::from_utf8_lossy(&self.value(name)?).into_owned();
        Ok(match operator.as_slice() {
            b"," => first(&value, |c| c.to_lowercase().collect()),
            b"^" => first(&value, |c| c.to_uppercase().collect()),
            b",," => value.chars().map(simple_lower).collect(),
            b"^^" => value.chars().map(simple_upper).collect(),
            _ => value,
        }
        .into_bytes())
    }

    fn trim(&mut self, name: &str, sign: u8, edge: Edge) -> Result<Vec<u8>, TextError> {
        self.eat(&[sign]);
        let longest = self.eat(&[sign]);
        let pattern = self.operand(b"}", Escapes::None)?;
        self.close()?;
        let value = self.value(name)?;
        let (Ok(value), Ok(pattern)) = (String::from_utf8(value.clone()), String::from_utf8(pattern)) else {
            return Ok(value);
        };
        let trimmed = match edge {
            Edge::Prefix => trim_prefix(&value, &pattern, longest),
            Edge::Suffix => reverse(&trim_prefix(&reverse(&value), &reverse(&pattern), longest)),
        };
        Ok(trimmed.into_bytes())
    }

    fn replace(&mut self, name: &str) -> Result<Vec<u8>, TextError> {
        self.eat(b"/");
        let mode = match self.rest.first() {
            Some(&c @ (b'/' | b'#' | b'%')) => {
                self.rest = &self.rest[1..];
                Some(c)
            }
            _ => None,
        };
        let pattern = self.operand(b"/", Escapes::Replace)?;
        if !self.eat(b"/") {
            return Err(TextError::BadSubstitution);
        }
        while self.eat(b"/") {}
        let with = if self.rest.first() == Some(&b'}') {
            None
        } else {
            Some(self.operand(b"}", Escapes::Replace)?)
        };
        self.close()?;
        let value = self.value(name)?;
        let replacement = with.clone().unwrap_or_default();
        Ok(match mode {
            None => replace_bytes(&value, &pattern, &replacement, 1),
            Some(b'/') => replace_bytes(&value, &pattern, &replacement, usize::MAX),
            // At an edge Flux does nothing without a replacement.
            Some(b'#') if with.is_some() && value.starts_with(&pattern) => {
                [&replacement, &value[pattern.len()..]].concat()
            }
            Some(b'%') if with.is_some() && value.ends_with(&pattern) => {
                [&value[..value.len() - pattern.len()], &replacement].concat()
            }
            Some(_) => value,
        })
    }
}

/// Go's `strconv.Atoi`: an optional sign and digits, nothing else, no overflow.
fn integer(text: &[u8]) -> Option<i64> {
    let text = std::str::from_utf8(text).ok()?;
    let digits = text.strip_prefix(['+', '-']).unwrap_or(text);
    if digits.is_empty() || !digits.bytes().all(|b| b.is_ascii_digit()) {
        return None;
    }
    text.parse().ok()
}

fn first(value: &str, change: impl Fn(char) -> String) -> String {
    let mut chars = value.chars();
    match chars.next() {
        Some(c) => change(c) + chars.as_str(),
        None => String::new(),
    }
}

/// One character to one character, as Go's `unicode.ToUpper` does (`ß` stays).
fn simple_upper(c: char) -> char {
    let mut upper = c.to_uppercase();
    match (upper.next(), upper.next()) {
        (Some(u), None) => u,
        _ => c,
    }
}

fn simple_lower(c: char) -> char {
    let mut lower = c.to_lowercase();
    match (lower.next(), lower.next()) {
        (Some(l), None) => l,
        _ => c,
    }
}

fn reverse(text: &str) -> String {
    text.chars().rev().collect()
}

/// Removes the shortest or longest non-empty prefix that `pattern` matches.
fn trim_prefix(value: &str, pattern: &str, longest: bool) -> String {
    let mut ends: Vec<usize> = value.char_indices().map(|(at, c)| at + c.len_utf8()).collect();
    if longest {
        ends.reverse();
    }
    for end in ends {
        match glob::matches(pattern, &value[..end]) {
            Ok(true) => return value[end..].to_string(),
            Ok(false) => {}
            Err(glob::BadPattern) => break,
        }
    }
    value.to_string()
}

fn replace_bytes(value: &[u8], from: &[u8], to: &[u8], mut times: usize) -> Vec<u8> {
    let mut out = Vec::with_capacity(value.len());
    let mut at = 0;
    while at < value.len() {
        if times > 0 && !from.is_empty() && value[at..].starts_with(from) {
            out.extend_from_slice(to);
            at += from.len();
            times -= 1;
        } else {
            out.push(value[at]);
            at += 1;
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use serde_json::Value;

    #[test]
    fn every_vector_of_flux_gives_the_same_text_or_the_same_error() {
        let path = concat!(
            env!("CARGO_MANIFEST_DIR"),
            "/../../../shared/data/flux/envsubst/vectors.json"
        );
        let Ok(text) = std::fs::read_to_string(path) else {
            eprintln!("SKIPPED: Flux's substitution vectors, ../shared is not here");
            return;
        };
        let data: Value = serde_json::from_str(&text).unwrap();
        let vars: BTreeMap<String, String> = data["vars"]
            .as_object()
            .unwrap()
            .iter()
            .map(|(k, v)| (k.clone(), v.as_str().unwrap().to_string()))
            .collect();
        let mut failures = Vec::new();
        for case in data["cases"].as_array().unwrap() {
            let got = substitute(
                case["input"].as_str().unwrap().as_bytes(),
                &vars,
                case["strict"].as_bool().unwrap(),
            );
            let want = if let Some(error) = case.get("error") {
                Err(error.as_str().unwrap().to_string())
            } else if let Some(output) = case.get("output") {
                Ok(output.as_str().unwrap().as_bytes().to_vec())
            } else {
                use base64::Engine as _;
                let text = case["output_base64"].as_str().unwrap();
                Ok(base64::engine::general_purpose::STANDARD.decode(text).unwrap())
            };
            let got = got.map_err(|e| e.to_string());
            if got != want {
                failures.push(format!(
                    "{}: {} gave {got:?}, want {want:?}",
                    case["id"], case["input"]
                ));
            }
        }
        assert!(failures.is_empty(), "{}", failures.join("\n"));
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(128))]

        #[test]
        fn text_without_a_dollar_is_never_changed(text in "[^$]{0,80}") {
            let got = substitute(text.as_bytes(), &BTreeMap::new(), true);
            prop_assert_eq!(got, Ok(text.into_bytes()));
        }

        #[test]
        fn no_text_makes_the_parser_fail_otherwise_than_by_an_error(text in "[${}a:/#%^,=\\\\ -]{0,40}") {
            let vars = BTreeMap::from([("a".to_string(), "x/y".to_string())]);
            let _ = substitute(text.as_bytes(), &vars, false);
        }
    }
}
