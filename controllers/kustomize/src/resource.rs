//! A resource in the middle of a build: the object, who it was before, and what is still to be done with it.

use serin_manifests::{Map, Scalar, Source, Style, Tag, Value, split_api_version};

use crate::id::{Gvk, NOT_A_NAMESPACE, ResId, effective_namespace, selects};
use crate::origin::Origin;
use crate::schema::Schemas;

/// What a generator does with a resource of the same name.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub(crate) enum Behavior {
    /// Not said; counts as create.
    #[default]
    Unspecified,
    /// There must be none.
    Create,
    /// Takes its place.
    Replace,
    /// Adds to it.
    Merge,
}

/// An identity that a resource had before a transformer changed it. The group is always the current one.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct PreviousId {
    /// The effective namespace.
    pub namespace: String,
    /// The name.
    pub name: String,
    /// The kind.
    pub kind: String,
}

/// An object with its history.
#[derive(Clone, Debug)]
pub(crate) struct Resource {
    /// The object.
    pub root: Map,
    /// The file it was read from.
    pub source: Option<Source>,
    /// Identities it had, the oldest first.
    pub previous: Vec<PreviousId>,
    /// Prefixes that were put before its name, in that order.
    pub prefixes: Vec<String>,
    /// Suffixes that were put behind its name.
    pub suffixes: Vec<String>,
    /// Made by a generator; how it meets others.
    pub behavior: Option<Behavior>,
    /// A hash of its content is to be added to its name.
    pub needs_hash: bool,
    /// A patch that may change the name of its target.
    pub allow_name_change: bool,
    /// A patch that may change the kind of its target.
    pub allow_kind_change: bool,
    /// Variables whose value is a field of it.
    pub variables: Vec<String>,
    /// Where it comes from, if asked.
    pub origin: Option<Origin>,
    /// Which transformers saw it, if asked.
    pub transformations: Vec<Origin>,
    /// Taken out by a patch.
    pub deleted: bool,
    /// The number that identifies it in a trace.
    pub serial: u32,
}

impl Resource {
    /// A resource of an object.
    pub(crate) fn new(root: Map, source: Option<Source>) -> Resource {
        Resource {
            root,
            source,
            previous: Vec::new(),
            prefixes: Vec::new(),
            suffixes: Vec::new(),
            behavior: None,
            needs_hash: false,
            allow_name_change: false,
            allow_kind_change: false,
            variables: Vec::new(),
            origin: None,
            transformations: Vec::new(),
            deleted: false,
            serial: 0,
        }
    }

    /// `apiVersion` as text.
    pub(crate) fn api_version(&self) -> &str {
        self.root.get("apiVersion").map_or("", raw_text)
    }

    /// `kind` as text.
    pub(crate) fn kind(&self) -> &str {
        self.root.get("kind").map_or("", raw_text)
    }

    fn metadata_text(&self, key: &str) -> &str {
        let value = self.root.get("metadata").and_then(|m| m.get(key));
        value.filter(|v| !v.is_null_or_empty()).map_or("", raw_text)
    }

    /// `metadata.name`
    pub(crate) fn name(&self) -> &str {
        self.metadata_text("name")
    }

    /// `metadata.namespace`
    pub(crate) fn namespace(&self) -> &str {
        self.metadata_text("namespace")
    }

    /// Group, version, kind.
    pub(crate) fn gvk(&self) -> Gvk {
        Gvk::of(self.api_version(), self.kind())
    }

    /// Whether its kind is known to live outside namespaces.
    pub(crate) fn is_cluster_scoped(&self, schemas: &Schemas) -> bool {
        schemas.is_cluster_scoped(self.api_version(), self.kind())
    }

    /// The identity it has now.
    pub(crate) fn id(&self, schemas: &Schemas) -> ResId {
        ResId {
            gvk: self.gvk(),
            name: self.name().into(),
            namespace: self.namespace().into(),
            cluster_scoped: self.is_cluster_scoped(schemas),
        }
    }

    /// The identity it had first.
    pub(crate) fn original_id(&self, schemas: &Schemas) -> ResId {
        match self.previous.first() {
            Some(first) => self.previous_id(first),
            None => self.id(schemas),
        }
    }

    /// An earlier identity in full.
    pub(crate) fn previous_id(&self, previous: &PreviousId) -> ResId {
        let (group, version) = split_api_version(self.api_version());
        ResId {
            gvk: Gvk {
                group: group.into(),
                version: version.into(),
                kind: previous.kind.clone(),
            },
            name: previous.name.clone(),
            namespace: previous.namespace.clone(),
            cluster_scoped: false,
        }
    }

    /// Whether a selector selects the kind it had first.
    pub(crate) fn original_kind_is(&self, selector: &Gvk) -> bool {
        let (group, version) = split_api_version(self.api_version());
        let kind = self.previous.first().map_or_else(|| self.kind(), |p| &p.kind);
        selects(selector, group, version, kind)
    }

    /// The effective namespace it had first.
    pub(crate) fn original_namespace<'a>(&'a self, schemas: &Schemas) -> &'a str {
        match self.previous.first() {
            Some(first) => effective_namespace(&first.namespace, false),
            None => self.effective_namespace(schemas),
        }
    }

    /// The name it had first.
    pub(crate) fn original_name(&self) -> &str {
        self.previous.first().map_or_else(|| self.name(), |p| &p.name)
    }

    /// The effective namespace.
    pub(crate) fn effective_namespace(&self, schemas: &Schemas) -> &str {
        effective_namespace(self.namespace(), self.is_cluster_scoped(schemas))
    }

    /// Remembers the identity it has now.
    pub(crate) fn store_previous_id(&mut self, schemas: &Schemas) {
        let namespace = if self.is_cluster_scoped(schemas) {
            NOT_A_NAMESPACE.to_owned()
        } else {
            effective_namespace(self.namespace(), false).to_owned()
        };
        let previous = PreviousId {
            namespace,
            name: self.name().to_owned(),
            kind: self.kind().to_owned(),
        };
        self.previous.push(previous);
        // kustomize would write this into the annotations, and take anything there that is no mapping out of the way.
        if let Some(metadata) = self.root.get_mut("metadata").and_then(Value::as_map_mut)
            && matches!(metadata.get("annotations"), Some(v) if v.as_map().is_none() && v.as_seq().is_none_or(<[Value]>::is_empty))
        {
            metadata.remove("annotations");
        }
    }

    /// Whether kustomize would keep notes about it in annotations now: they make `metadata.annotations` exist for JSON patches.
    pub(crate) fn has_notes(&self) -> bool {
        !self.previous.is_empty()
            || !self.prefixes.is_empty()
            || !self.suffixes.is_empty()
            || self.behavior.is_some()
            || self.needs_hash
            || self.origin.is_some()
            || !self.transformations.is_empty()
    }

    /// Forgets what the notes say: a patch has removed all annotations.
    pub(crate) fn forget_notes(&mut self) {
        self.previous.clear();
        self.prefixes.clear();
        self.suffixes.clear();
        self.behavior = None;
        self.needs_hash = false;
        self.origin = None;
        self.transformations.clear();
    }

    /// Whether nothing is left of it.
    pub(crate) fn is_empty(&self) -> bool {
        self.deleted || self.root.is_empty()
    }

    /// `metadata`, made if missing.
    pub(crate) fn metadata_mut(&mut self) -> Option<&mut Map> {
        if self.root.get("metadata").is_none_or(Value::is_null) {
            self.root.set("metadata", Value::Map(Map::new()));
        }
        self.root.get_mut("metadata")?.as_map_mut()
    }

    /// Sets a scalar in `metadata`, keeping how an existing one was quoted.
    fn set_metadata(&mut self, key: &str, text: &str) {
        if let Some(metadata) = self.metadata_mut() {
            set_keeping_style(metadata, key, text);
        }
    }

    /// Sets the name.
    pub(crate) fn set_name(&mut self, name: &str) {
        self.set_metadata("name", name);
    }

    /// Sets the namespace; an empty one removes it.
    pub(crate) fn set_namespace(&mut self, namespace: &str) {
        if namespace.is_empty() {
            if let Some(metadata) = self.root.get_mut("metadata").and_then(Value::as_map_mut) {
                metadata.remove("namespace");
            }
        } else {
            self.set_metadata("namespace", namespace);
        }
    }

    /// Sets the kind.
    pub(crate) fn set_kind(&mut self, kind: &str) {
        set_keeping_style(&mut self.root, "kind", kind);
    }

    /// Labels or annotations as text, in the order of the manifest.
    pub(crate) fn string_map(&self, key: &str) -> Vec<(String, String)> {
        let map = self
            .root
            .get("metadata")
            .and_then(|m| m.get(key))
            .and_then(Value::as_map);
        map.into_iter()
            .flat_map(Map::iter)
            .map(|(k, v)| (k.to_owned(), raw_text(v).to_owned()))
            .collect()
    }

    /// Writes labels or annotations anew: sorted, all values text; none at all when empty.
    pub(crate) fn set_string_map(&mut self, key: &str, mut pairs: Vec<(String, String)>) {
        let Some(metadata) = self.metadata_mut() else {
            return;
        };
        metadata.remove(key);
        if pairs.is_empty() {
            return;
        }
        pairs.sort();
        // The last of equal keys wins, as in a map.
        pairs.reverse();
        pairs.dedup_by(|a, b| a.0 == b.0);
        pairs.reverse();
        metadata.push(key, Value::string_map(pairs));
    }
}

/// The text of a scalar as written, also of a null; empty for anything else.
pub(crate) fn raw_text(value: &Value) -> &str {
    match value {
        Value::Scalar(s) => &s.text,
        _ => "",
    }
}

/// Sets a key to untyped text, keeping how an existing value was quoted.
pub(crate) fn set_keeping_style(map: &mut Map, key: &str, text: &str) {
    match map.get_mut(key) {
        Some(Value::Scalar(old)) => {
            *old = Scalar {
                text: text.into(),
                pos: old.pos,
                tag: Tag::Unset,
                style: old.style,
                tagged: false,
            };
        }
        Some(other) => *other = Value::Scalar(Scalar::untyped(text)),
        None => map.push(key, Value::Scalar(Scalar::untyped(text))),
    }
}

/// What a value becomes when kustomize sends an object through JSON and back: numbers are doubles printed by Go, strings
/// are quoted where they must be.
pub(crate) fn through_json(value: &mut Value) -> Result<(), String> {
    match value {
        Value::Map(map) => {
            for entry in &mut map.entries {
                entry.key = Scalar {
                    pos: entry.key.pos,
                    ..Scalar::string(&*entry.key.text)
                };
                through_json(&mut entry.value)?;
            }
            Ok(())
        }
        Value::Seq(seq) => seq.items.iter_mut().try_for_each(through_json),
        Value::Scalar(s) => {
            let number = |f: f64| {
                let text = serin_manifests::go_float(f);
                let tag = serin_manifests::tag_of(&text);
                (tag, text)
            };
            let (tag, text) = match s.plain()? {
                serin_manifests::Plain::Null => (Tag::Null, "null".to_owned()),
                serin_manifests::Plain::Bool(b) => (Tag::Bool, b.to_string()),
                serin_manifests::Plain::Int(i) => number(i as f64),
                serin_manifests::Plain::Uint(u) => number(u as f64),
                serin_manifests::Plain::Float(f) if f.is_finite() => number(f),
                serin_manifests::Plain::Float(f) => return Err(format!("json: unsupported value: {f}")),
                serin_manifests::Plain::Str(text) => (Tag::Str, text.into_owned()),
            };
            let quoted = tag == Tag::Str && serin_manifests::tag_of(&text) != Tag::Str;
            let style = match (quoted, text.contains('\n')) {
                (_, true) => Style::Literal,
                (true, false) => Style::Double,
                (false, false) => Style::Plain,
            };
            *s = Scalar {
                text: text.into(),
                pos: s.pos,
                tag,
                style,
                tagged: false,
            };
            Ok(())
        }
    }
}

/// Keys below the top that are not text make an object unfit for JSON.
pub(crate) fn check_keys(root: &Map) -> Result<(), String> {
    fn value(v: &Value) -> Result<(), String> {
        match v {
            Value::Map(m) => {
                for e in &m.entries {
                    if !e.key.is_string() && e.key.tag != Tag::Merge {
                        return Err(format!(
                            "the key `{0}` is not a string; write \"{0}\" in quotes",
                            e.key.text
                        ));
                    }
                    value(&e.value)?;
                }
                Ok(())
            }
            Value::Seq(s) => s.items.iter().try_for_each(value),
            Value::Scalar(_) => Ok(()),
        }
    }
    root.entries.iter().try_for_each(|e| value(&e.value))
}
