//! What a recorded answer means for ours: symbols such as `$uid1` are bound where they are first met and must stand for the same
//! thing ever after.

use std::sync::LazyLock;

use regex::Regex;
use serde_json::{Value, json};

use crate::recording::Run;

/// An age of two years and more as tables show it, years of 365 days: `6y326d`, and `8y` from eight years on.
static AGE: LazyLock<Regex> =
    LazyLock::new(|| Regex::new(r"\b(?<years>\d+)y(?:(?<days>\d+)d)?\b").expect("a pattern"));

/// What was recorded, with the ages it would show by now: objects with fixed times of creation have grown older since the
/// recording, never younger.
fn aged(wanted: &str, found: &str) -> String {
    let days = |c: &regex::Captures<'_>| {
        let number = |name| c.name(name).map_or(0, |m| m.as_str().parse().unwrap_or(0));
        number("years") * 365 + number("days")
    };
    let mut now = AGE.captures_iter(found);
    AGE.replace_all(wanted, |then: &regex::Captures<'_>| match now.next() {
        Some(now) if days(&now) >= days(then) => now[0].to_owned(),
        _ => then[0].to_owned(),
    })
    .into_owned()
}

#[test]
fn ages_of_a_recording_grow_and_never_shrink() {
    for (wanted, found, by_now) in [
        ("4 (6y326d ago)", "4 (6y327d ago)", "4 (6y327d ago)"),
        (
            "6y326d (x3 over 6y326d)",
            "7y1d (x3 over 7y1d)",
            "7y1d (x3 over 7y1d)",
        ),
        ("p 7y364d", "p 8y", "p 8y"),
        ("4 (6y326d ago)", "4 (6y325d ago)", "4 (6y326d ago)"),
        ("4 (6y326d ago)", "4 (5m ago)", "4 (6y326d ago)"),
        ("5m", "6y327d", "5m"),
    ] {
        assert_eq!(aged(wanted, found), by_now, "{wanted} and {found}");
    }
}

impl Run {
    pub(crate) fn substitute(&self, value: &Value) -> Value {
        match value {
            Value::String(s) => {
                if let Some(bound) = self.symbols.get(s) {
                    return bound.clone();
                }
                json!(self.substitute_text(s))
            }
            Value::Array(a) => Value::Array(a.iter().map(|v| self.substitute(v)).collect()),
            Value::Object(o) => Value::Object(
                o.iter()
                    .map(|(k, v)| (self.substitute_text(k), self.substitute(v)))
                    .collect(),
            ),
            other => other.clone(),
        }
    }

    pub(crate) fn substitute_text(&self, text: &str) -> String {
        self.pattern
            .replace_all(text, |c: &regex::Captures<'_>| match self.symbols.get(&c[0]) {
                Some(Value::String(s)) => s.clone(),
                Some(other) => other.to_string(),
                None => c[0].to_owned(),
            })
            .into_owned()
    }

    /// Compare and bind symbols; the error names the first difference.
    pub(crate) fn compare(&mut self, wanted: &Value, found: &Value, path: &str) -> Result<(), String> {
        if let Some(choices) = wanted.get("$any_of").and_then(Value::as_array) {
            let choices = choices.clone();
            for choice in &choices {
                if self.compare(choice, found, path).is_ok() {
                    return Ok(());
                }
            }
            return Err(format!("{path}: none of {choices:?} is {found}"));
        }
        match (wanted, found) {
            (Value::String(w), f) => self.compare_text(w, f, path),
            (Value::Object(w), Value::Object(f)) => {
                let unordered = w.get("$unordered_causes").is_some();
                // All members are looked at even after a difference, so that symbols are bound.
                let mut outcome = Ok(());
                for (key, value) in w {
                    if key == "$unordered_causes" || (unordered && key == "message") {
                        continue;
                    }
                    let key = self.substitute_text(key);
                    let at = format!("{path}.{key}");
                    match f.get(&key) {
                        Some(found) => outcome = outcome.and(self.compare(value, found, &at)),
                        None => outcome = outcome.and(Err(format!("{at}: missing, wanted {value}"))),
                    }
                }
                for (key, value) in f {
                    if !w.keys().any(|k| self.substitute_text(k) == *key) {
                        outcome = outcome.and(Err(format!("{path}.{key}: not wanted, found {value}")));
                    }
                }
                outcome
            }
            (Value::Array(w), Value::Array(f)) => {
                let (mut w, mut f) = (w.clone(), f.clone());
                if path.ends_with(".managedFields") {
                    let key = |v: &Value| {
                        ["operation", "manager", "subresource", "apiVersion"]
                            .map(|k| v.get(k).and_then(Value::as_str).unwrap_or_default().to_owned())
                    };
                    w.sort_by_key(key);
                    f.sort_by_key(key);
                }
                if path.ends_with(".conditions") && w.iter().all(|c| c.get("type").is_some()) {
                    let key = |v: &Value| {
                        v.get("type")
                            .and_then(Value::as_str)
                            .unwrap_or_default()
                            .to_owned()
                    };
                    w.sort_by_key(key);
                    f.sort_by_key(key);
                }
                if path.ends_with(".causes") {
                    let key = |v: &Value| {
                        ["field", "reason", "message"]
                            .map(|k| v.get(k).and_then(Value::as_str).unwrap_or_default().to_owned())
                    };
                    w.sort_by_key(key);
                    f.sort_by_key(key);
                }
                let mut outcome = Ok(());
                for (i, value) in w.iter().enumerate() {
                    match f.get(i) {
                        Some(found) => {
                            outcome = outcome.and(self.compare(value, found, &format!("{path}[{i}]")))
                        }
                        None => outcome = outcome.and(Err(format!("{path}[{i}]: missing, wanted {value}"))),
                    }
                }
                match f.get(w.len()) {
                    Some(extra) => {
                        outcome.and(Err(format!("{path}[{}]: not wanted, found {extra}", w.len())))
                    }
                    None => outcome,
                }
            }
            (Value::Number(w), Value::Number(f)) if w.as_f64() == f.as_f64() => Ok(()),
            (w, f) if w == f => Ok(()),
            (w, f) => Err(format!("{path}: wanted {w}, found {f}")),
        }
    }

    pub(crate) fn compare_text(&mut self, wanted: &str, found: &Value, path: &str) -> Result<(), String> {
        let wanted = &*aged(wanted, found.as_str().unwrap_or_default());
        let symbols: Vec<String> = self
            .pattern
            .find_iter(wanted)
            .map(|m| m.as_str().to_owned())
            .collect();
        if symbols.is_empty() {
            return if found.as_str() == Some(wanted) {
                Ok(())
            } else {
                Err(format!("{path}: wanted {wanted:?}, found {found}"))
            };
        }
        let numbered = |s: &str| s.ends_with(|c: char| c.is_ascii_digit());
        if symbols.len() == 1 && symbols[0] == wanted {
            if !numbered(wanted) {
                // A time that is sent back later has to be one.
                self.symbols.insert(wanted.to_owned(), found.clone());
            }
            match self.symbols.get(wanted) {
                Some(bound) if numbered(wanted) && bound != found => {
                    return Err(format!("{path}: wanted {wanted} = {bound}, found {found}"));
                }
                None if numbered(wanted) => {
                    self.symbols.insert(wanted.to_owned(), found.clone());
                }
                _ => {}
            }
            return if found.is_null() {
                Err(format!("{path}: wanted {wanted}, found null"))
            } else {
                Ok(())
            };
        }
        let found = match found {
            Value::String(s) => s.clone(),
            other => return Err(format!("{path}: wanted {wanted:?}, found {other}")),
        };
        let mut expression = String::from("(?s)^");
        let mut groups = Vec::new();
        let mut at = 0;
        for m in self.pattern.find_iter(wanted) {
            expression.push_str(&regex::escape(&wanted[at..m.start()]));
            match self.symbols.get(m.as_str()) {
                Some(Value::String(bound)) if numbered(m.as_str()) => {
                    expression.push_str(&regex::escape(bound))
                }
                Some(bound) if numbered(m.as_str()) => {
                    expression.push_str(&regex::escape(&bound.to_string()))
                }
                _ => {
                    expression.push_str("(.+?)");
                    groups.push(m.as_str().to_owned());
                }
            }
            at = m.end();
        }
        expression.push_str(&regex::escape(&wanted[at..]));
        expression.push('$');
        let expression = Regex::new(&expression).expect("an expression");
        match expression.captures(&found) {
            Some(captures) => {
                for (i, symbol) in groups.iter().enumerate() {
                    if numbered(symbol) {
                        self.symbols.insert(symbol.clone(), json!(&captures[i + 1]));
                    }
                }
                Ok(())
            }
            None => Err(format!("{path}: wanted {wanted:?}, found {found:?}")),
        }
    }
}
