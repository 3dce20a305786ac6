//! Label and field selectors: parsing with Kubernetes' grammar, matching against objects.

use serde_json::Value;

use crate::meta;
use crate::names;

/// One condition on a label.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Requirement {
    key: String,
    operator: Operator,
    values: Vec<String>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Operator {
    In,
    NotIn,
    Exists,
    Absent,
    Greater,
    Less,
}

/// A label selector: all requirements must hold; an empty one matches everything.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct LabelSelector(Vec<Requirement>);

#[derive(Debug, Clone, PartialEq, Eq)]
enum Token {
    Comma,
    Open,
    Close,
    Bang,
    Equals,
    DoubleEquals,
    NotEquals,
    Greater,
    Less,
    Word(String),
    End,
}

impl Token {
    fn show(&self) -> &str {
        match self {
            Token::Comma => ",",
            Token::Open => "(",
            Token::Close => ")",
            Token::Bang => "!",
            Token::Equals => "=",
            Token::DoubleEquals => "==",
            Token::NotEquals => "!=",
            Token::Greater => ">",
            Token::Less => "<",
            Token::Word(w) => w,
            Token::End => "",
        }
    }
}

fn lex(text: &str) -> Vec<Token> {
    let mut out = Vec::new();
    let mut chars = text.chars().peekable();
    while let Some(&c) = chars.peek() {
        match c {
            ' ' | '\t' | '\r' | '\n' => {
                chars.next();
            }
            ',' | '(' | ')' | '>' | '<' => {
                chars.next();
                out.push(match c {
                    ',' => Token::Comma,
                    '(' => Token::Open,
                    ')' => Token::Close,
                    '>' => Token::Greater,
                    _ => Token::Less,
                });
            }
            '!' => {
                chars.next();
                if chars.next_if_eq(&'=').is_some() {
                    out.push(Token::NotEquals);
                } else {
                    out.push(Token::Bang);
                }
            }
            '=' => {
                chars.next();
                if chars.next_if_eq(&'=').is_some() {
                    out.push(Token::DoubleEquals);
                } else {
                    out.push(Token::Equals);
                }
            }
            _ => {
                let mut word = String::new();
                while let Some(&c) = chars.peek() {
                    if " \t\r\n,()!=<>".contains(c) {
                        break;
                    }
                    word.push(c);
                    chars.next();
                }
                out.push(Token::Word(word));
            }
        }
    }
    out.push(Token::End);
    out
}

impl LabelSelector {
    /// Parse the query form (`a=b,c in (d,e),!f`). The error is the text after "unable to parse requirement:" and the like.
    pub(crate) fn parse(text: &str) -> Result<Self, String> {
        let tokens = lex(text);
        let mut at = 0usize;
        let mut next = || {
            let token = tokens.get(at).cloned().unwrap_or(Token::End);
            at += 1;
            token
        };
        let mut requirements = Vec::new();
        let mut token = next();
        if token == Token::End {
            return Ok(Self(requirements));
        }
        loop {
            let negated = token == Token::Bang;
            if negated {
                token = next();
            }
            let key = match token {
                Token::Word(ref word) => word.clone(),
                Token::Comma | Token::End if !negated => {
                    return Err(format!(
                        "found '{}', expected: !, identifier, or 'end of string'",
                        token.show()
                    ));
                }
                other => {
                    return Err(format!(
                        "unable to parse requirement: found '{}', expected: identifier",
                        other.show()
                    ));
                }
            };
            check_key(&key)?;
            token = next();
            if negated {
                requirements.push(Requirement {
                    key,
                    operator: Operator::Absent,
                    values: Vec::new(),
                });
            } else {
                let operator = match &token {
                    Token::Comma | Token::End => {
                        requirements.push(Requirement {
                            key: key.clone(),
                            operator: Operator::Exists,
                            values: Vec::new(),
                        });
                        None
                    }
                    Token::Equals | Token::DoubleEquals => Some((Operator::In, false)),
                    Token::NotEquals => Some((Operator::NotIn, false)),
                    Token::Greater => Some((Operator::Greater, false)),
                    Token::Less => Some((Operator::Less, false)),
                    Token::Word(w) if w == "in" => Some((Operator::In, true)),
                    Token::Word(w) if w == "notin" => Some((Operator::NotIn, true)),
                    other => {
                        return Err(format!(
                            "unable to parse requirement: found '{}', expected: in, notin, =, ==, !=, gt, lt",
                            other.show()
                        ));
                    }
                };
                if let Some((operator, is_set)) = operator {
                    let mut values = Vec::new();
                    if is_set {
                        token = next();
                        if token != Token::Open {
                            return Err(format!(
                                "unable to parse requirement: found '{}' expected: '('",
                                token.show()
                            ));
                        }
                        let mut expect_value = true;
                        loop {
                            token = next();
                            match &token {
                                Token::Word(w) => {
                                    values.push(w.clone());
                                    expect_value = false;
                                }
                                Token::Comma => {
                                    if expect_value {
                                        values.push(String::new());
                                    }
                                    expect_value = true;
                                }
                                Token::Close => {
                                    if expect_value {
                                        values.push(String::new());
                                    }
                                    break;
                                }
                                other => {
                                    return Err(format!(
                                        "unable to parse requirement: found '{}', expected: {}",
                                        other.show(),
                                        if expect_value {
                                            "',', ')' or identifier"
                                        } else {
                                            "',' or ')'"
                                        }
                                    ));
                                }
                            }
                        }
                        token = next();
                    } else {
                        token = next();
                        match &token {
                            Token::Word(w) => {
                                values.push(w.clone());
                                token = next();
                            }
                            Token::Comma | Token::End => values.push(String::new()),
                            other => {
                                return Err(format!(
                                    "unable to parse requirement: found '{}', expected: identifier",
                                    other.show()
                                ));
                            }
                        }
                    }
                    check_values(&key, operator, &values)?;
                    values.sort();
                    values.dedup();
                    requirements.push(Requirement {
                        key,
                        operator,
                        values,
                    });
                }
            }
            match token {
                Token::End => break,
                Token::Comma => {
                    token = next();
                    if token == Token::End {
                        return Err("found '', expected: identifier after ','".into());
                    }
                }
                other => {
                    return Err(format!(
                        "found '{}', expected: ',' or 'end of string'",
                        other.show()
                    ));
                }
            }
        }
        Ok(Self(requirements))
    }

    /// From a `metav1.LabelSelector` (`matchLabels`, `matchExpressions`). An absent selector matches nothing.
    pub(crate) fn from_object(selector: &Value) -> Option<Self> {
        let mut requirements = Vec::new();
        for (key, value) in selector
            .get("matchLabels")
            .and_then(Value::as_object)
            .into_iter()
            .flatten()
        {
            requirements.push(Requirement {
                key: key.clone(),
                operator: Operator::In,
                values: vec![value.as_str().unwrap_or_default().to_owned()],
            });
        }
        for expression in meta::list_at(selector, "matchExpressions") {
            let operator = match meta::str_at(expression, "operator") {
                "In" => Operator::In,
                "NotIn" => Operator::NotIn,
                "Exists" => Operator::Exists,
                "DoesNotExist" => Operator::Absent,
                _ => return None,
            };
            requirements.push(Requirement {
                key: meta::str_at(expression, "key").to_owned(),
                operator,
                values: meta::list_at(expression, "values")
                    .iter()
                    .filter_map(Value::as_str)
                    .map(str::to_owned)
                    .collect(),
            });
        }
        Some(Self(requirements))
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    pub(crate) fn matches(&self, object: &Value) -> bool {
        self.0.is_empty() || self.matches_labels(meta::metadata(object).get("labels").unwrap_or(&Value::Null))
    }

    pub(crate) fn matches_labels(&self, labels: &Value) -> bool {
        self.0.iter().all(|r| {
            let value = labels.get(&r.key).and_then(Value::as_str);
            match r.operator {
                Operator::In => value.is_some_and(|v| r.values.iter().any(|w| w == v)),
                Operator::NotIn => value.is_none_or(|v| r.values.iter().all(|w| w != v)),
                Operator::Exists => value.is_some(),
                Operator::Absent => value.is_none(),
                Operator::Greater | Operator::Less => {
                    let bound = r.values.first().and_then(|b| b.parse::<i64>().ok());
                    match (value.and_then(|v| v.parse::<i64>().ok()), bound) {
                        (Some(v), Some(b)) if r.operator == Operator::Greater => v > b,
                        (Some(v), Some(b)) => v < b,
                        _ => false,
                    }
                }
            }
        })
    }
}

fn check_key(key: &str) -> Result<(), String> {
    match names::qualified_name_errors(key).first() {
        None => Ok(()),
        Some(_) => Err(format!(
            "unable to parse requirement: <nil>: Invalid value: {key:?}: {}",
            names::qualified_name_errors(key).join("; ")
        )),
    }
}

fn check_values(key: &str, operator: Operator, values: &[String]) -> Result<(), String> {
    if matches!(operator, Operator::Greater | Operator::Less) {
        return match values.first() {
            Some(v) if v.parse::<i64>().is_ok() => Ok(()),
            Some(v) => Err(format!(
                "unable to parse requirement: values[0][{key}]: Invalid value: {v:?}: for 'Gt', 'Lt' operators, the value must be an integer"
            )),
            None => Ok(()),
        };
    }
    for (i, value) in values.iter().enumerate() {
        let errors = names::label_value_errors(value);
        if !errors.is_empty() {
            return Err(format!(
                "unable to parse requirement: values[{i}][{key}]: Invalid value: {value:?}: {}",
                errors.join("; ")
            ));
        }
    }
    Ok(())
}

/// A field selector: `path=value`, `path!=value`, all of which must hold.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct FieldSelector(pub(crate) Vec<FieldTerm>);

#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct FieldTerm {
    pub(crate) path: String,
    pub(crate) value: String,
    pub(crate) equal: bool,
}

impl FieldSelector {
    pub(crate) fn parse(text: &str) -> Result<Self, String> {
        let mut terms = Vec::new();
        for term in split_unescaped(text) {
            if term.is_empty() {
                continue;
            }
            let (path, value, equal) = if let Some((p, v)) = term.split_once("!=") {
                (p, v, false)
            } else if let Some((p, v)) = term.split_once("==") {
                (p, v, true)
            } else if let Some((p, v)) = term.split_once('=') {
                (p, v, true)
            } else {
                return Err(format!("invalid selector: '{term}'; can't understand '{term}'"));
            };
            terms.push(FieldTerm {
                path: path.to_owned(),
                value: unescape(value)
                    .ok_or_else(|| format!("invalid field selector: invalid escape sequence in '{value}'"))?,
                equal,
            });
        }
        Ok(Self(terms))
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    pub(crate) fn matches(&self, object: &Value) -> bool {
        self.0
            .iter()
            .all(|t| (field_text(object, &t.path) == t.value) == t.equal)
    }
}

/// The value of a selectable field as text; absent is empty.
fn field_text(object: &Value, path: &str) -> String {
    match meta::at(object, path.trim_start_matches('.')) {
        Some(Value::String(s)) => s.clone(),
        Some(Value::Bool(b)) => b.to_string(),
        Some(Value::Number(n)) => n.to_string(),
        // Unset booleans and counts of selectable fields read as their Go zero value.
        _ if matches!(path, "spec.unschedulable" | "spec.hostNetwork") => "false".to_owned(),
        _ if path == "status.successful" => meta::int_at(object, "status.succeeded").unwrap_or(0).to_string(),
        _ if path == "reportingComponent" || path == "source" => {
            meta::str_at(object, "source.component").to_owned()
        }
        _ => String::new(),
    }
}

fn split_unescaped(text: &str) -> Vec<String> {
    let mut out = vec![String::new()];
    let mut escaped = false;
    for c in text.chars() {
        if c == ',' && !escaped {
            out.push(String::new());
            continue;
        }
        escaped = c == '\\' && !escaped;
        if let Some(last) = out.last_mut() {
            last.push(c);
        }
    }
    out
}

fn unescape(text: &str) -> Option<String> {
    let mut out = String::new();
    let mut chars = text.chars();
    while let Some(c) = chars.next() {
        match c {
            '\\' => match chars.next()? {
                c @ ('\\' | ',' | '=') => out.push(c),
                _ => return None,
            },
            '=' | ',' => return None,
            c => out.push(c),
        }
    }
    Some(out)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn label_selectors_match_as_kubernetes_does() {
        let object = json!({"metadata": {"labels": {"app": "web", "tier": "3"}}});
        for (selector, wanted) in [
            ("", true),
            ("app=web", true),
            ("app==web,tier", true),
            ("app!=web", false),
            ("other!=x", true),
            ("app in (api, web)", true),
            ("app notin (web)", false),
            ("other notin (web)", true),
            ("!other", true),
            ("!app", false),
            ("tier>2", true),
            ("tier<3", false),
            ("app=", false),
        ] {
            assert_eq!(
                LabelSelector::parse(selector).expect(selector).matches(&object),
                wanted,
                "{selector}"
            );
        }
        for bad in ["a=b=c", "a in b", "=x", "a b", ",", "a,,b", "-x=1", "a in (b"] {
            assert!(LabelSelector::parse(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn field_selectors_compare_the_text_of_a_field() {
        let pod = json!({"metadata": {"name": "p"}, "status": {"phase": "Running"}});
        for (selector, wanted) in [
            ("metadata.name=p", true),
            ("status.phase!=Running", false),
            ("spec.nodeName=", true),
        ] {
            assert_eq!(
                FieldSelector::parse(selector).expect(selector).matches(&pod),
                wanted,
                "{selector}"
            );
        }
        assert!(FieldSelector::parse("metadata.name").is_err());
    }
}
