//! The part of Kubernetes' JSONPath that CRD columns and scale paths use: members, quoted members, indices, wildcards, `?(@.a=="b")`.

use serde_json::Value;

/// All values at `path`.
pub(crate) fn find<'a>(object: &'a Value, path: &str) -> Vec<&'a Value> {
    let mut found = vec![object];
    let mut rest = path
        .trim()
        .trim_start_matches('{')
        .trim_end_matches('}')
        .trim_start_matches('$');
    while !rest.is_empty() {
        let (next, after) = step(&found, rest);
        found = next;
        if after.len() == rest.len() {
            return Vec::new();
        }
        rest = after;
    }
    found
}

fn step<'a, 'p>(found: &[&'a Value], path: &'p str) -> (Vec<&'a Value>, &'p str) {
    if let Some(rest) = path.strip_prefix('[') {
        let end = closing(rest);
        let (inner, after) = (rest.get(..end).unwrap_or(""), rest.get(end + 1..).unwrap_or(""));
        return (bracket(found, inner.trim()), after);
    }
    let rest = path.trim_start_matches('.');
    let mut name = String::new();
    let mut end = rest.len();
    let mut chars = rest.char_indices();
    while let Some((i, c)) = chars.next() {
        match c {
            '\\' => name.extend(chars.next().map(|(_, c)| c)),
            '.' | '[' => {
                end = i;
                break;
            }
            c => name.push(c),
        }
    }
    let after = rest.get(end..).unwrap_or("");
    if name == "*" {
        return (children(found), after);
    }
    (found.iter().filter_map(|v| v.get(&name)).collect(), after)
}

fn closing(text: &str) -> usize {
    let mut depth = 0;
    let mut quote = None;
    for (i, c) in text.char_indices() {
        match (quote, c) {
            (Some(q), c) if c == q => quote = None,
            (Some(_), _) => {}
            (None, '\'' | '"') => quote = Some(c),
            (None, '[') => depth += 1,
            (None, ']') if depth == 0 => return i,
            (None, ']') => depth -= 1,
            _ => {}
        }
    }
    text.len()
}

fn children<'a>(found: &[&'a Value]) -> Vec<&'a Value> {
    found
        .iter()
        .flat_map(|v| match v {
            Value::Array(list) => list.iter().collect::<Vec<_>>(),
            Value::Object(map) => map.values().collect(),
            _ => Vec::new(),
        })
        .collect()
}

fn bracket<'a>(found: &[&'a Value], inner: &str) -> Vec<&'a Value> {
    if inner == "*" || inner == ":" {
        return children(found);
    }
    if let Some(condition) = inner.strip_prefix("?(").and_then(|c| c.strip_suffix(')')) {
        let Some((left, right)) = condition.split_once("==") else {
            let path = condition.trim().trim_start_matches('@');
            return children(found)
                .into_iter()
                .filter(|v| !find(v, path).is_empty())
                .collect();
        };
        let path = left.trim().trim_start_matches('@');
        let wanted = right.trim().trim_matches(['"', '\'']);
        return children(found)
            .into_iter()
            .filter(|v| find(v, path).first().is_some_and(|f| text(f) == wanted))
            .collect();
    }
    if let Some(name) = inner
        .strip_prefix(['\'', '"'])
        .and_then(|n| n.strip_suffix(['\'', '"']))
    {
        return found.iter().filter_map(|v| v.get(name)).collect();
    }
    let Ok(index) = inner.parse::<i64>() else {
        return Vec::new();
    };
    found
        .iter()
        .filter_map(|v| {
            let list = v.as_array()?;
            let at = if index < 0 {
                list.len().checked_sub(index.unsigned_abs() as usize)?
            } else {
                index as usize
            };
            list.get(at)
        })
        .collect()
}

/// A value as a table cell shows it.
pub(crate) fn text(value: &Value) -> String {
    match value {
        Value::String(s) => s.clone(),
        Value::Null => String::new(),
        other => other.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn paths_of_printer_columns_are_found() {
        let object = json!({"spec": {"list": [{"n": "a", "v": 1}, {"n": "b", "v": 2}], "k.x": "dot"},
            "status": {"conditions": [{"type": "Ready", "status": "True"}]}});
        for (path, wanted) in [
            (".spec.list[0].n", vec!["a"]),
            (".spec.list[*].v", vec!["1", "2"]),
            (".spec.list[-1].n", vec!["b"]),
            (".status.conditions[?(@.type==\"Ready\")].status", vec!["True"]),
            (".spec.k\\.x", vec!["dot"]),
            (".spec['k.x']", vec!["dot"]),
            (".spec.missing", vec![]),
        ] {
            let found: Vec<String> = find(&object, path).into_iter().map(text).collect();
            assert_eq!(found, wanted, "{path}");
        }
    }
}
