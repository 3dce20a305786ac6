//! JSON patches (RFC 6902) with the tolerance of the library that kustomize uses: `replace` of a missing key of a map adds
//! it, negative indexes count from the end.

use serin_manifests::yaml::{ReadOptions, parse_document};
use serin_manifests::{Dialect, Limits, Map, Value};

use crate::resource::{raw_text, through_json};

/// One operation.
#[derive(Clone, Debug)]
pub(crate) struct Operation {
    op: String,
    path: Option<String>,
    from: Option<String>,
    value: Option<Value>,
}

/// Reads a patch, JSON or YAML. The error tells why the text is no JSON patch.
pub(crate) fn parse(
    text: &str,
    file: &str,
    limits: &Limits,
) -> Result<Vec<Operation>, serin_manifests::Error> {
    let options = ReadOptions {
        file,
        line_offset: 0,
        dialect: Dialect::Kubectl,
        limits,
    };
    let value = parse_document(text, &options)?;
    let not_a_patch = |message: &str, value: &Value| serin_manifests::Error::Syntax {
        message: message.to_owned(),
        place: serin_manifests::Place::in_text(file, text, value.pos().line(), value.pos().column()),
    };
    let items = match value {
        // An empty document is the JSON value null, which is an empty patch.
        None => return Ok(Vec::new()),
        Some(Value::Seq(seq)) => seq.items,
        Some(other) => return Err(not_a_patch("a JSON patch is a list of operations", &other)),
    };
    let mut operations = Vec::with_capacity(items.len());
    for item in items {
        let Value::Map(mut map) = item else {
            return Err(not_a_patch("each operation of a JSON patch is an object", &item));
        };
        let text_of = |map: &Map, key: &str| match map.get(key) {
            Some(v) if !v.is_null() => v.as_str().map(str::to_owned),
            _ => None,
        };
        let (op, path, from) = (text_of(&map, "op"), text_of(&map, "path"), text_of(&map, "from"));
        operations.push(Operation {
            op: op.unwrap_or_default(),
            path,
            from,
            value: map.remove("value"),
        });
    }
    Ok(operations)
}

/// Applies a patch. The object goes through JSON, so its numbers come out as doubles; see [`through_json`].
pub(crate) fn apply(root: &mut Map, patch: &[Operation]) -> Result<(), String> {
    crate::resource::check_keys(root)?;
    let mut document = Value::Map(std::mem::take(root));
    through_json(&mut document)?;
    for operation in patch {
        operation.apply(&mut document)?;
    }
    // Values of the patch are doubles as well.
    through_json(&mut document)?;
    match document {
        Value::Map(map) => {
            *root = map;
            Ok(())
        }
        _ => Err("the patched object is no object any more".into()),
    }
}

fn decode(part: &str) -> String {
    part.replace("~1", "/").replace("~0", "~")
}

/// The container of a path and the last part.
fn find<'v>(document: &'v mut Value, path: &str) -> Option<(&'v mut Value, String)> {
    let parts: Vec<&str> = path.split('/').collect();
    if parts.len() < 2 {
        return None;
    }
    let mut at = document;
    for part in &parts[1..parts.len() - 1] {
        at = get_mut(at, &decode(part)).ok()??;
        if matches!(at, Value::Scalar(_)) {
            return None;
        }
    }
    Some((at, decode(parts[parts.len() - 1])))
}

fn position(key: &str, len: usize) -> Result<usize, String> {
    let index: i64 = key
        .parse()
        .map_err(|_| format!("value was not a proper array index: '{key}'"))?;
    let resolved = if index < 0 { index + len as i64 } else { index };
    match usize::try_from(resolved) {
        Ok(i) if i < len => Ok(i),
        _ => Err(format!(
            "Unable to access invalid index: {index}: invalid index referenced"
        )),
    }
}

fn get_mut<'v>(container: &'v mut Value, key: &str) -> Result<Option<&'v mut Value>, String> {
    match container {
        Value::Map(map) => Ok(map.get_mut(key)),
        Value::Seq(seq) => {
            let i = position(key, seq.items.len())?;
            Ok(seq.items.get_mut(i))
        }
        Value::Scalar(_) => Ok(None),
    }
}

fn add(container: &mut Value, key: &str, value: Value) -> Result<(), String> {
    match container {
        Value::Map(map) => map.set(key, value),
        Value::Seq(seq) if key == "-" => seq.items.push(value),
        Value::Seq(seq) => {
            let i = position(key, seq.items.len() + 1)?;
            seq.items.insert(i, value);
        }
        Value::Scalar(_) => {}
    }
    Ok(())
}

fn remove(container: &mut Value, key: &str) -> Result<Value, String> {
    match container {
        Value::Map(map) => map
            .remove(key)
            .ok_or_else(|| format!("Unable to remove nonexistent key: {key}: missing value")),
        Value::Seq(seq) => {
            let i = position(key, seq.items.len())?;
            Ok(seq.items.remove(i))
        }
        Value::Scalar(_) => Err(format!("Unable to remove nonexistent key: {key}: missing value")),
    }
}

impl Operation {
    fn path(&self) -> Result<&str, String> {
        self.path
            .as_deref()
            .ok_or_else(|| format!("{} operation failed to decode path: missing value", self.op))
    }

    fn from(&self) -> Result<&str, String> {
        self.from
            .as_deref()
            .ok_or_else(|| format!("{} operation failed to decode from: missing value", self.op))
    }

    fn value(&self) -> Value {
        self.value.clone().unwrap_or_else(Value::null)
    }

    /// The path of the operation, for messages.
    pub(crate) fn describe(&self) -> String {
        format!("{} {}", self.op, self.path.as_deref().unwrap_or(""))
    }

    fn apply(&self, document: &mut Value) -> Result<(), String> {
        let path = self.path()?;
        match self.op.as_str() {
            "add" => {
                let (container, key) = find(document, path).ok_or_else(|| {
                    format!("add operation does not apply: doc is missing path: \"{path}\": missing value")
                })?;
                add(container, &key, self.value())
                    .map_err(|e| format!("error in add for path: '{path}': {e}"))
            }
            "remove" => {
                let (container, key) = find(document, path).ok_or_else(|| {
                    format!("remove operation does not apply: doc is missing path: \"{path}\": missing value")
                })?;
                remove(container, &key)
                    .map(drop)
                    .map_err(|e| format!("error in remove for path: '{path}': {e}"))
            }
            "replace" => {
                if path.is_empty() {
                    *document = self.value();
                    return Ok(());
                }
                let (container, key) = find(document, path).ok_or_else(|| {
                    format!("replace operation does not apply: doc is missing path: {path}: missing value")
                })?;
                match container {
                    Value::Map(map) => map.set(&key, self.value()),
                    other => match get_mut(other, &key) {
                        Ok(Some(slot)) => *slot = self.value(),
                        Ok(None) | Err(_) => {
                            return Err(format!(
                                "replace operation does not apply: doc is missing key: {path}: missing value"
                            ));
                        }
                    },
                }
                Ok(())
            }
            "move" => {
                let from = self.from()?;
                let (container, key) = find(document, from).ok_or_else(|| {
                    format!("move operation does not apply: doc is missing from path: {from}: missing value")
                })?;
                let value =
                    remove(container, &key).map_err(|e| format!("error in move for path: '{key}': {e}"))?;
                let (container, key) = find(document, path).ok_or_else(|| {
                    format!("move operation does not apply: doc is missing destination path: {path}: missing value")
                })?;
                add(container, &key, value).map_err(|e| format!("error in move for path: '{path}': {e}"))
            }
            "copy" => {
                let from = self.from()?;
                let (container, key) = find(document, from).ok_or_else(|| {
                    format!("copy operation does not apply: doc is missing from path: {from}: missing value")
                })?;
                let value = get_mut(container, &key)
                    .map_err(|e| format!("error in copy for from: '{from}': {e}"))?
                    .cloned()
                    .unwrap_or_else(Value::null);
                let (container, key) = find(document, path).ok_or_else(|| {
                    format!("copy operation does not apply: doc is missing destination path: {path}: missing value")
                })?;
                add(container, &key, value).map_err(|e| format!("error while adding value during copy: {e}"))
            }
            "test" => {
                let failed = || format!("testing value {path} failed: test failed");
                let mut wanted = self.value();
                through_json(&mut wanted)?;
                if path.is_empty() {
                    return if *document == wanted {
                        Ok(())
                    } else {
                        Err(failed())
                    };
                }
                let (container, key) = find(document, path).ok_or_else(|| {
                    format!("test operation does not apply: is missing path: {path}: missing value")
                })?;
                let found =
                    get_mut(container, &key).map_err(|e| format!("error in test for path: '{path}': {e}"))?;
                match found {
                    None if wanted.is_null() => Ok(()),
                    Some(value) if same(value, &wanted) => Ok(()),
                    _ => Err(failed()),
                }
            }
            other => Err(format!("Unexpected kind: {other}")),
        }
    }
}

/// Equality of JSON: text and numbers are different things.
fn same(a: &Value, b: &Value) -> bool {
    match (a, b) {
        (Value::Scalar(x), Value::Scalar(y)) => {
            x.is_string() == y.is_string() && (x == y || raw_text(a) == raw_text(b))
        }
        _ => a == b,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run(document: &str, patch: &str) -> Result<String, String> {
        let limits = Limits::default();
        let options = ReadOptions {
            file: "d",
            line_offset: 0,
            dialect: Dialect::Kustomize,
            limits: &limits,
        };
        let Some(Value::Map(mut root)) = parse_document(document, &options).unwrap() else {
            panic!("no map")
        };
        apply(&mut root, &parse(patch, "p", &limits).unwrap())?;
        let mut out = String::new();
        serin_manifests::yaml::write_map(&root, &mut out)?;
        Ok(out)
    }

    #[test]
    fn operations_do_what_the_rfc_says() {
        let cases: &[(&str, &str, &str)] = &[
            ("a: 1", "- {op: add, path: /b, value: x}", "a: 1\nb: x\n"),
            (
                "a: [1, 3]",
                "- {op: add, path: /a/1, value: 2}",
                "a:\n- 1\n- 2\n- 3\n",
            ),
            ("a: [1]", "- {op: add, path: /a/-, value: 2}", "a:\n- 1\n- 2\n"),
            ("a: [1, 2]", "- {op: remove, path: /a/-1}", "a:\n- 1\n"),
            ("a: 1", "- {op: replace, path: /new, value: 2}", "a: 1\nnew: 2\n"),
            ("a: 1", "- {op: move, from: /a, path: /b}", "b: 1\n"),
            (
                "a: {b: 1}",
                "- {op: copy, from: /a, path: /c}",
                "a:\n  b: 1\nc:\n  b: 1\n",
            ),
            (
                "a/b: 1\nc~d: 2",
                "- {op: remove, path: /a~1b}\n- {op: remove, path: /c~0d}\n- {op: add, path: /x, value: 1}",
                "x: 1\n",
            ),
            (
                "a: '1'",
                "[{\"op\": \"test\", \"path\": \"/a\", \"value\": \"1\"}]",
                "a: \"1\"\n",
            ),
            ("a: 1.0", "- {op: test, path: /a, value: 1}", "a: 1\n"),
        ];
        for (document, patch, want) in cases {
            assert_eq!(run(document, patch).as_deref(), Ok(*want), "{patch}");
        }
        for (document, patch) in [
            ("a: 1", "- {op: add, path: /x/y, value: 1}"),
            ("a: 1", "- {op: remove, path: /x}"),
            ("a: '1'", "- {op: test, path: /a, value: 1}"),
            ("a: [1]", "- {op: add, path: /a/5, value: 1}"),
            ("a: [1]", "- {op: replace, path: /a/x, value: 1}"),
        ] {
            assert!(run(document, patch).is_err(), "{patch}");
        }
    }
}
