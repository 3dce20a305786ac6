//! Path templates (`envoy.path.match.uri_template`): `*` and `{name}` stand for one segment, `**` for any number of
//! characters, `{name=*}` and `{name=**}` likewise.

use regex::Regex;

use crate::error::Refusal;

/// Variables that a template may have (Envoy's limit).
const MAX_VARIABLES: usize = 5;
/// Characters of one segment (RFC 3986 `pchar` without `*`, `{` and `}`, percent escapes included).
const SEGMENT: &str = "[-._~0-9A-Za-z!$&'()+,;:@=%]+";
const REST: &str = "[-._~0-9A-Za-z!$&'()+,;:@=%/]*";

/// A compiled template.
#[derive(Clone, Debug)]
pub struct UriTemplate(Regex);

impl UriTemplate {
    /// Compiles the text of a template.
    pub fn compile(text: &str) -> Result<Self, Refusal> {
        let wrong = |reason: &str| Refusal::new("path_template", format!("{text:?}: {reason}"));
        let path = text.strip_prefix('/').ok_or_else(|| wrong("must begin with /"))?;
        let mut pattern = String::from("^");
        let mut variables = 0;
        let mut open_ended = false;
        let segments: Vec<&str> = if path.is_empty() { Vec::new() } else { split(path) };
        for segment in &segments {
            if open_ended && is_operator(segment) {
                return Err(wrong("nothing that matches variably may follow **"));
            }
            pattern.push('/');
            match *segment {
                "*" => pattern.push_str(SEGMENT),
                "**" => {
                    open_ended = true;
                    pattern.push_str(REST);
                }
                other if other.starts_with('{') => {
                    let inner = other.strip_prefix('{').and_then(|rest| rest.strip_suffix('}'));
                    let inner = inner.ok_or_else(|| wrong("a variable must be a whole segment"))?;
                    variables += 1;
                    if variables > MAX_VARIABLES {
                        return Err(wrong("more than 5 variables"));
                    }
                    let (name, value) = inner.split_once('=').unwrap_or((inner, "*"));
                    let valid = |byte: u8| byte.is_ascii_alphanumeric() || byte == b'_';
                    // Istio writes `{*}` and `{**}`, without a name.
                    let value = if matches!(name, "*" | "**") { name } else { value };
                    if !matches!(name, "*" | "**") && (name.is_empty() || !name.bytes().all(valid)) {
                        return Err(wrong(
                            "a variable's name has other characters than letters, digits and _",
                        ));
                    }
                    let named = !matches!(name, "*" | "**");
                    if named {
                        // The prefix keeps names apart that begin with a digit, which groups may not.
                        pattern.push_str("(?<v_");
                        pattern.push_str(name);
                        pattern.push('>');
                    }
                    for part in value.split('/').enumerate() {
                        if part.0 > 0 {
                            pattern.push('/');
                        }
                        match part.1 {
                            "*" => pattern.push_str(SEGMENT),
                            "**" => {
                                open_ended = true;
                                pattern.push_str(REST);
                            }
                            literal => pattern.push_str(&regex::escape(literal)),
                        }
                    }
                    if named {
                        pattern.push(')');
                    }
                }
                literal if literal.contains(['*', '{', '}']) => {
                    return Err(wrong("* must be a whole segment"));
                }
                literal => pattern.push_str(&regex::escape(literal)),
            }
        }
        if segments.is_empty() {
            pattern.push('/');
        }
        pattern.push('$');
        Regex::new(&pattern)
            .map(Self)
            .map_err(|error| wrong(&error.to_string()))
    }

    /// Whether a path (without its query) has the template's shape.
    pub fn matches(&self, path: &str) -> bool {
        self.0.is_match(path)
    }

    /// Whether it has a variable of that name.
    pub fn has(&self, variable: &str) -> bool {
        self.0
            .capture_names()
            .flatten()
            .any(|name| name.strip_prefix("v_") == Some(variable))
    }

    /// What the variables stand for in a path that has the template's shape.
    pub fn captures<'a>(&self, path: &'a str) -> Option<Captured<'a>> {
        self.0.captures(path).map(Captured)
    }
}

/// Variables of one path.
#[derive(Debug)]
pub struct Captured<'a>(regex::Captures<'a>);

impl Captured<'_> {
    /// The text of a variable.
    pub fn get(&self, variable: &str) -> Option<&str> {
        self.0.name(&format!("v_{variable}")).map(|found| found.as_str())
    }
}

fn is_operator(segment: &str) -> bool {
    segment.starts_with('{') || segment.contains('*')
}

/// Segments; a slash within braces belongs to the variable.
fn split(path: &str) -> Vec<&str> {
    let mut depth = 0;
    path.split(|char| {
        match char {
            '{' => depth += 1,
            '}' => depth -= 1,
            _ => {}
        }
        char == '/' && depth == 0
    })
    .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn templates_match_segments_and_rests() {
        let cases = [
            ("/path/template/*", "/path/template/x", true),
            ("/path/template/*", "/path/template/x/y", false),
            ("/path/template/*", "/path/template/", false),
            ("/**/path/template", "/a/b/path/template", true),
            ("/**/path/template", "/path/template", false),
            ("/{country}/{rest=**}", "/de/a/b", true),
            ("/{country}/{rest=**}", "/de", false),
            ("/a/{x=b/*}/c", "/a/b/q/c", true),
            ("/a/{x=b/*}/c", "/a/z/q/c", false),
            ("/foo/{*}/bar", "/foo/x/bar", true),
            ("/foo/{**}", "/foo/x/bar", true),
            ("/a.b", "/aXb", false),
            ("/", "/", true),
        ];
        for (template, path, expected) in cases {
            assert_eq!(
                UriTemplate::compile(template).unwrap().matches(path),
                expected,
                "{template} {path}"
            );
        }
    }

    #[test]
    fn malformed_templates_are_refused() {
        for template in ["a", "/a*", "/{a}/{b}/{c}/{d}/{e}/{f}", "/**/x/*", "/{a-b}", "/{a"] {
            assert!(UriTemplate::compile(template).is_err(), "{template}");
        }
    }
}
