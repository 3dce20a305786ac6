//! Sets of field paths in the form of `fieldsV1`.

use std::collections::BTreeMap;
use std::fmt::Write as _;

use serde_json::{Map, Value};

/// A set of paths. Steps are kept in their written form (`f:spec`, `k:{"name":"c"}`, `v:"x"`, `i:0`).
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct FieldSet(pub(crate) BTreeMap<Box<str>, Node>);

#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Node {
    /// The path that ends here is in the set.
    pub(crate) member: bool,
    pub(crate) children: FieldSet,
}

impl FieldSet {
    pub(crate) fn is_empty(&self) -> bool {
        self.0.values().all(|n| !n.member && n.children.is_empty())
    }

    pub(crate) fn from_json(fields: &Value) -> Option<Self> {
        let mut out = BTreeMap::new();
        for (key, value) in fields.as_object()? {
            if key == "." {
                continue;
            }
            if !matches!(key.get(..2), Some("f:" | "k:" | "v:" | "i:")) {
                return None;
            }
            let children = Self::from_json(value)?;
            let member = children.0.is_empty() || value.get(".").is_some();
            out.insert(key.as_str().into(), Node { member, children });
        }
        Some(Self(out))
    }

    pub(crate) fn to_json(&self) -> Value {
        let mut out = Map::new();
        for (key, node) in &self.0 {
            if !node.member && node.children.is_empty() {
                continue;
            }
            let mut value = match node.children.to_json() {
                Value::Object(map) => map,
                _ => Map::new(),
            };
            if node.member && !value.is_empty() {
                value.insert(".".into(), Value::Object(Map::new()));
            }
            out.insert(key.to_string(), Value::Object(value));
        }
        Value::Object(out)
    }

    pub(crate) fn union(mut self, other: &Self) -> Self {
        self.add(other);
        self
    }

    fn add(&mut self, other: &Self) {
        for (key, node) in &other.0 {
            let mine = self.0.entry(key.clone()).or_default();
            mine.member |= node.member;
            mine.children.add(&node.children);
        }
    }

    pub(crate) fn intersection(&self, other: &Self) -> Self {
        let mut out = BTreeMap::new();
        for (key, node) in &self.0 {
            if let Some(theirs) = other.0.get(key) {
                let both = Node {
                    member: node.member && theirs.member,
                    children: node.children.intersection(&theirs.children),
                };
                if both.member || !both.children.0.is_empty() {
                    out.insert(key.clone(), both);
                }
            }
        }
        Self(out)
    }

    /// Paths of `self` that are not exactly in `other`.
    pub(crate) fn difference(&self, other: &Self) -> Self {
        let mut out = BTreeMap::new();
        for (key, node) in &self.0 {
            let left = match other.0.get(key) {
                Some(theirs) => Node {
                    member: node.member && !theirs.member,
                    children: node.children.difference(&theirs.children),
                },
                None => node.clone(),
            };
            if left.member || !left.children.0.is_empty() {
                out.insert(key.clone(), left);
            }
        }
        Self(out)
    }

    /// Paths of `self` that are neither in `other` nor below one of its members.
    pub(crate) fn recursive_difference(&self, other: &Self) -> Self {
        let mut out = BTreeMap::new();
        for (key, node) in &self.0 {
            let left = match other.0.get(key) {
                Some(theirs) if theirs.member => continue,
                Some(theirs) => Node {
                    member: node.member,
                    children: node.children.recursive_difference(&theirs.children),
                },
                None => node.clone(),
            };
            if left.member || !left.children.0.is_empty() {
                out.insert(key.clone(), left);
            }
        }
        Self(out)
    }

    pub(crate) fn insert(&mut self, path: &[Box<str>]) {
        if let Some((first, rest)) = path.split_first() {
            let node = self.0.entry(first.clone()).or_default();
            if rest.is_empty() {
                node.member = true;
            } else {
                node.children.insert(rest);
            }
        }
    }

    /// Every path as it is shown in messages (`.spec.containers[name="c"].image`).
    pub(crate) fn paths(&self) -> Vec<String> {
        let mut out = Vec::new();
        self.collect("", &mut out);
        out
    }

    fn collect(&self, prefix: &str, out: &mut Vec<String>) {
        for (key, node) in &self.0 {
            let path = format!("{prefix}{}", show_step(key));
            if node.member {
                out.push(path.clone());
            }
            node.children.collect(&path, out);
        }
    }
}

/// A step as it is shown in messages.
pub(crate) fn show_step(step: &str) -> String {
    let (kind, rest) = step.split_at(step.len().min(2));
    match kind {
        "f:" => format!(".{rest}"),
        "k:" => {
            let mut out = String::from("[");
            if let Ok(Value::Object(keys)) = serde_json::from_str(rest) {
                for (i, (k, v)) in keys.iter().enumerate() {
                    let _ = write!(out, "{}{k}={v}", if i == 0 { "" } else { "," });
                }
            }
            out.push(']');
            out
        }
        "v:" => format!("[={rest}]"),
        _ => format!("[{rest}]"),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::json;

    use super::*;

    #[test]
    fn the_written_form_survives_a_round_trip() {
        let fields = json!({"f:spec": {"f:containers": {"k:{\"name\":\"c\"}": {".": {}, "f:image": {}}}}, "f:data": {}});
        let set = FieldSet::from_json(&fields).expect("parses");
        assert_eq!(set.to_json(), fields);
        assert_eq!(
            set.paths(),
            [
                ".data",
                ".spec.containers[name=\"c\"]",
                ".spec.containers[name=\"c\"].image"
            ]
        );
    }

    fn sets() -> impl Strategy<Value = FieldSet> {
        prop::collection::vec(prop::collection::vec("[abc]", 1..4), 0..8).prop_map(|paths| {
            let mut set = FieldSet::default();
            for path in paths {
                let steps: Vec<Box<str>> = path.iter().map(|s| format!("f:{s}").into()).collect();
                set.insert(&steps);
            }
            set
        })
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(128))]

        #[test]
        fn sets_obey_the_laws_of_sets(a in sets(), b in sets()) {
            let as_paths = |s: &FieldSet| s.paths().into_iter().collect::<std::collections::BTreeSet<_>>();
            let (pa, pb) = (as_paths(&a), as_paths(&b));
            prop_assert_eq!(as_paths(&a.clone().union(&b)), pa.union(&pb).cloned().collect());
            prop_assert_eq!(as_paths(&a.intersection(&b)), pa.intersection(&pb).cloned().collect());
            prop_assert_eq!(as_paths(&a.difference(&b)), pa.difference(&pb).cloned().collect());
            prop_assert_eq!(FieldSet::from_json(&a.to_json()).map(|s| as_paths(&s)), Some(pa));
        }
    }
}
