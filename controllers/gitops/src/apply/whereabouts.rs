//! The line of a manifest that a refusal of the API server is about.
//!
//! The server names a field (`.spec.progressDeadlineSecond: field not declared in schema`); a person looks for a line. The build knows
//! the file and where the object's document begins there; the field is looked up in that document, as it was written. What is not in
//! it (a patch or a generator put it there) is told with the beginning of the document.

use serin_manifests::{Object, Value, parse_documents};

/// One step of the server's path to a field.
#[derive(Debug, PartialEq, Eq)]
enum Step<'a> {
    Member(&'a str),
    Index(usize),
    /// `[name="web",protocol="TCP"]`: the item with these values.
    Item(Vec<(&'a str, &'a str)>),
}

/// The line in `text` of the field that `reason` names, of the object whose document begins at `begin`; `begin` where there is none.
pub(super) fn line(text: &str, file: &str, begin: usize, reason: &str) -> usize {
    let Ok(objects) = parse_documents(text, file) else {
        return begin;
    };
    let Some(object) = objects
        .iter()
        .find(|object| object.source().is_some_and(|source| source.line == begin))
    else {
        return begin;
    };
    paths(reason)
        .find_map(|path| find(object, &path))
        .unwrap_or(begin)
}

/// What looks like a path to a field, in order.
fn paths(reason: &str) -> impl Iterator<Item = Vec<Step<'_>>> {
    let words = reason.split(|c: char| c.is_whitespace() || c == '\'');
    words
        .map(|word| {
            // Either `path:` or a path in quotes; quotes within brackets belong to it.
            let word = word
                .trim_end_matches([':', ',', ';', ')'])
                .trim_start_matches('(');
            word.strip_prefix('"')
                .map_or(word, |word| word.strip_suffix('"').unwrap_or(word))
        })
        .filter_map(steps)
        .filter(|steps| steps.len() > 1)
}

fn steps(word: &str) -> Option<Vec<Step<'_>>> {
    let mut rest = word.strip_prefix('.').unwrap_or(word);
    let mut steps = Vec::new();
    while !rest.is_empty() {
        if let Some(bracket) = rest.strip_prefix('[') {
            let end = bracket.find(']')?;
            let (inside, after) = (bracket.get(..end)?, bracket.get(end + 1..)?);
            steps.push(match inside.parse() {
                Ok(index) => Step::Index(index),
                Err(_) if inside.contains('=') => Step::Item(
                    inside
                        .split(',')
                        .filter_map(|pair| pair.split_once('='))
                        .map(|(key, value)| (key, value.trim_matches('"')))
                        .collect(),
                ),
                Err(_) => Step::Member(inside.trim_matches('"')),
            });
            rest = after.strip_prefix('.').unwrap_or(after);
        } else {
            let end = rest.find(['.', '[']).unwrap_or(rest.len());
            let (name, after) = rest.split_at_checked(end)?;
            if name.is_empty() {
                return None;
            }
            steps.push(Step::Member(name));
            rest = after.strip_prefix('.').unwrap_or(after);
        }
    }
    Some(steps)
}

/// The line of the deepest part of the path that is there; none if it does not begin with a field of the object.
fn find(object: &Object, path: &[Step<'_>]) -> Option<usize> {
    let mut line = None;
    let mut map = Some(object.root());
    let mut value: Option<&Value> = None;
    for step in path {
        let (pos, next) = match step {
            Step::Member(name) => {
                let Some(entry) = map.and_then(|map| map.entries.iter().find(|e| &*e.key.text == *name))
                else {
                    break;
                };
                (entry.key.pos, &entry.value)
            }
            Step::Index(index) => {
                let Some(item) = value.and_then(Value::as_seq).and_then(|items| items.get(*index)) else {
                    break;
                };
                (item.pos(), item)
            }
            Step::Item(wanted) => {
                let fits = |item: &&Value| {
                    wanted
                        .iter()
                        .all(|(key, value)| item.get(key).and_then(Value::text) == Some(*value))
                };
                let Some(item) = value
                    .and_then(Value::as_seq)
                    .and_then(|items| items.iter().find(fits))
                else {
                    break;
                };
                (item.pos(), item)
            }
        };
        line = Some(pos.line()).filter(|line| *line > 0).or(line);
        map = next.as_map();
        value = Some(next);
    }
    line
}

#[cfg(test)]
mod tests {
    use super::*;

    const TEXT: &str = "\
# a comment
kind: Namespace
apiVersion: v1
metadata: {name: shop}
---
apiVersion: apps/v1
kind: Deployment
metadata:
  name: web
  labels:
    app.kubernetes.io/name: web
spec:
  progressDeadlineSecond: 60
  replicas: -1
  template:
    spec:
      containers:
        - name: other
          image: a
        - name: web
          imag: b
          ports:
            - {containerPort: 80, protocol: TCP}
";

    #[test]
    fn the_line_of_a_refused_field_is_found_by_the_servers_own_words() {
        for (reason, wanted) in [
            (
                "failed to create typed patch object (shop/web; apps/v1, Kind=Deployment): .spec.progressDeadlineSecond: field not declared in schema",
                13,
            ),
            (
                "Deployment.apps \"web\" is invalid: spec.replicas: Invalid value: -1: must be greater than or equal to 0",
                14,
            ),
            (
                "failed to create typed patch object: .spec.template.spec.containers[name=\"web\"].imag: field not declared in schema",
                21,
            ),
            (
                "Deployment.apps \"web\" is invalid: spec.template.spec.containers[1].ports[0].containerPort: Invalid value: 0",
                23,
            ),
            (
                "strict decoding error: unknown field \"spec.progressDeadlineSecond\"",
                13,
            ),
            ("metadata.labels[\"app.kubernetes.io/name\"]: Invalid value", 11),
            // What is missing is told where it should be.
            ("spec.template.spec.containers[0].command: Required value", 18),
            // Nothing of it is in the document.
            ("admission webhook \"a.b.c\" denied the request", 6),
            ("spec: Required value", 6),
        ] {
            assert_eq!(line(TEXT, "web.yaml", 6, reason), wanted, "{reason}");
        }
    }

    #[test]
    fn a_document_that_is_not_as_it_was_is_told_by_its_beginning() {
        assert_eq!(line("a: [", "web.yaml", 6, ".spec.replicas: no"), 6);
        assert_eq!(line(TEXT, "web.yaml", 3, ".spec.replicas: no"), 3);
        assert_eq!(
            line(
                TEXT,
                "web.yaml",
                6,
                ".nothing[: .: [=]: .nothing.a[\"]\": [9999999999999999999999].b: "
            ),
            6
        );
    }
}
