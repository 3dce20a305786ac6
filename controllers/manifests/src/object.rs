//! Kubernetes objects and their identity.

use std::fmt;
use std::sync::Arc;

use crate::error::{Error, Place};
use crate::limits::Limits;
use crate::resolve::Dialect;
use crate::value::{Map, Pos, Value};
use crate::yaml::{ReadOptions, parse_document, split_documents, write_map};

/// The identity of an object. The version is part of it as written; compare with [`Id::same_object`] where it must not count.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Debug, Default)]
pub struct Id {
    /// API group, empty for the core group.
    pub group: String,
    /// API version without the group.
    pub version: String,
    /// Kind.
    pub kind: String,
    /// Namespace, empty when not set.
    pub namespace: String,
    /// Name.
    pub name: String,
}

impl Id {
    /// Whether both name the same object of a cluster: group, kind, namespace and name.
    pub fn same_object(&self, other: &Id) -> bool {
        self.group == other.group
            && self.kind == other.kind
            && self.namespace == other.namespace
            && self.name == other.name
    }

    /// `group/version`, or the version alone for the core group.
    pub fn api_version(&self) -> String {
        if self.group.is_empty() {
            self.version.clone()
        } else {
            format!("{}/{}", self.group, self.version)
        }
    }
}

impl fmt::Display for Id {
    /// `Kind/namespace/name`, as Flux writes it.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/", self.kind)?;
        if !self.namespace.is_empty() {
            write!(f, "{}/", self.namespace)?;
        }
        f.write_str(&self.name)
    }
}

/// Splits `apps/v1` into group and version; the core group is empty.
pub fn split_api_version(api_version: &str) -> (&str, &str) {
    api_version.split_once('/').unwrap_or(("", api_version))
}

/// Where an object comes from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Source {
    /// The file, as the reader was told.
    pub file: Arc<str>,
    /// The line where its document starts, from 1.
    pub line: usize,
}

/// A Kubernetes object as data.
#[derive(Clone, Debug, PartialEq)]
pub struct Object {
    root: Map,
    source: Option<Source>,
}

impl Object {
    /// An object of a mapping. Nothing is checked; see [`parse_documents`] for checked reading.
    pub fn new(root: Map) -> Object {
        Object { root, source: None }
    }

    /// The same object with a note where it comes from.
    pub fn with_source(mut self, source: Option<Source>) -> Object {
        self.source = source;
        self
    }

    /// Where it comes from, if it was read from a file.
    pub fn source(&self) -> Option<&Source> {
        self.source.as_ref()
    }

    /// The fields.
    pub fn root(&self) -> &Map {
        &self.root
    }

    /// The fields, to change.
    pub fn root_mut(&mut self) -> &mut Map {
        &mut self.root
    }

    /// The fields, without the object around them.
    pub fn into_root(self) -> Map {
        self.root
    }

    fn field(&self, key: &str) -> &str {
        self.root.get(key).and_then(Value::text).unwrap_or("")
    }

    fn metadata(&self, key: &str) -> Option<&Value> {
        self.root.get("metadata")?.get(key)
    }

    /// `apiVersion`, empty if absent.
    pub fn api_version(&self) -> &str {
        self.field("apiVersion")
    }

    /// `kind`, empty if absent.
    pub fn kind(&self) -> &str {
        self.field("kind")
    }

    /// `metadata.name`, empty if absent.
    pub fn name(&self) -> &str {
        self.metadata("name").and_then(Value::text).unwrap_or("")
    }

    /// `metadata.namespace`, empty if absent.
    pub fn namespace(&self) -> &str {
        self.metadata("namespace").and_then(Value::text).unwrap_or("")
    }

    /// API group, empty for the core group.
    pub fn group(&self) -> &str {
        split_api_version(self.api_version()).0
    }

    /// API version without the group.
    pub fn version(&self) -> &str {
        split_api_version(self.api_version()).1
    }

    /// Its identity.
    pub fn id(&self) -> Id {
        Id {
            group: self.group().into(),
            version: self.version().into(),
            kind: self.kind().into(),
            namespace: self.namespace().into(),
            name: self.name().into(),
        }
    }

    /// Labels in the order of the manifest.
    pub fn labels(&self) -> impl Iterator<Item = (&str, &str)> {
        self.string_map("labels")
    }

    /// One label.
    pub fn label(&self, key: &str) -> Option<&str> {
        self.metadata("labels")?.get(key)?.text()
    }

    /// Annotations in the order of the manifest.
    pub fn annotations(&self) -> impl Iterator<Item = (&str, &str)> {
        self.string_map("annotations")
    }

    /// One annotation.
    pub fn annotation(&self, key: &str) -> Option<&str> {
        self.metadata("annotations")?.get(key)?.text()
    }

    fn string_map(&self, key: &str) -> impl Iterator<Item = (&str, &str)> {
        let map = self.metadata(key).and_then(Value::as_map);
        map.into_iter()
            .flat_map(|m| m.iter().map(|(k, v)| (k, v.text().unwrap_or(""))))
    }

    fn metadata_mut(&mut self, field: &str) -> Option<&mut Map> {
        if self.root.get("metadata").is_none_or(Value::is_null) {
            self.root.set("metadata", Value::Map(Map::new()));
        }
        let metadata = self.root.get_mut("metadata")?.as_map_mut()?;
        if metadata.get(field).is_none_or(Value::is_null) {
            metadata.set(field, Value::Map(Map::new()));
        }
        metadata.get_mut(field)?.as_map_mut()
    }

    /// Sets a label. Does nothing when `metadata.labels` is no mapping.
    pub fn set_label(&mut self, key: &str, value: &str) {
        if let Some(labels) = self.metadata_mut("labels") {
            labels.set(key, Value::string(value));
        }
    }

    /// Sets an annotation. Does nothing when `metadata.annotations` is no mapping.
    pub fn set_annotation(&mut self, key: &str, value: &str) {
        if let Some(annotations) = self.metadata_mut("annotations") {
            annotations.set(key, Value::string(value));
        }
    }

    /// Sets `metadata.namespace`.
    pub fn set_namespace(&mut self, namespace: &str) {
        if self.root.get("metadata").is_none_or(Value::is_null) {
            self.root.set("metadata", Value::Map(Map::new()));
        }
        if let Some(metadata) = self.root.get_mut("metadata").and_then(Value::as_map_mut) {
            metadata.set("namespace", Value::string(namespace));
        }
    }

    /// The object as JSON.
    pub fn to_json(&self) -> Result<serde_json::Value, Error> {
        let mut out = serde_json::Map::new();
        for e in &self.root.entries {
            let value = e.value.to_json().map_err(|message| self.value_error(message))?;
            out.insert(e.key.text.to_string(), value);
        }
        Ok(serde_json::Value::Object(out))
    }

    /// An object of JSON. Fails when the value is no JSON object.
    pub fn from_json(json: &serde_json::Value) -> Result<Object, Error> {
        match Value::from_json(json) {
            Value::Map(root) => Ok(Object::new(root)),
            other => Err(Error::Value {
                object: "JSON".into(),
                message: format!("expected an object, found a {}", other.type_name()),
            }),
        }
    }

    /// The object as YAML, byte for byte as `kustomize build` prints it.
    pub fn to_yaml(&self) -> Result<String, Error> {
        let mut out = String::new();
        self.write_yaml(&mut out)?;
        Ok(out)
    }

    /// [`Object::to_yaml`] at the end of a text.
    pub fn write_yaml(&self, out: &mut String) -> Result<(), Error> {
        write_map(&self.root, out).map_err(|message| self.value_error(message))
    }

    fn value_error(&self, message: String) -> Error {
        Error::Value {
            object: self.id().to_string(),
            message,
        }
    }
}

/// Reads all objects of a file as kubectl does: several documents, `List`s taken apart, empty documents skipped.
///
/// Every document must be a mapping with `apiVersion`, `kind` and `metadata.name` or `metadata.generateName`.
pub fn parse_documents(text: &str, file: &str) -> Result<Vec<Object>, Error> {
    parse_documents_within(text, file, &Limits::default())
}

/// [`parse_documents`] with budgets of the caller.
pub fn parse_documents_within(text: &str, file: &str, limits: &Limits) -> Result<Vec<Object>, Error> {
    let shared: Arc<str> = file.into();
    let mut objects = Vec::new();
    for (line_offset, part) in split_documents(text, file, limits)? {
        let options = ReadOptions {
            file,
            line_offset,
            dialect: Dialect::Kubectl,
            limits,
        };
        if let Some(value) = parse_document(part, &options)? {
            collect(value, text, &shared, &mut objects)?;
        }
    }
    Ok(objects)
}

fn collect(value: Value, text: &str, file: &Arc<str>, objects: &mut Vec<Object>) -> Result<(), Error> {
    let pos = value.pos();
    let not_an_object = |message: String| Error::NotAnObject {
        message,
        place: place(file, text, pos),
    };
    let mut root = match value {
        Value::Map(root) => root,
        other => {
            return Err(not_an_object(format!(
                "expected an object, found a {}",
                other.type_name()
            )));
        }
    };
    let kind = root.get("kind").and_then(Value::text).unwrap_or("").to_owned();
    if kind.is_empty() {
        return Err(not_an_object("Object 'Kind' is missing".into()));
    }
    if root
        .get("apiVersion")
        .and_then(Value::text)
        .is_none_or(str::is_empty)
    {
        return Err(not_an_object(format!("Object 'apiVersion' is missing in {kind}")));
    }
    if kind.ends_with("List") && root.get("items").is_some_and(|i| i.as_seq().is_some()) {
        if let Some(Value::Seq(items)) = root.remove("items") {
            for item in items.items {
                collect(item, text, file, objects)?;
            }
        }
        return Ok(());
    }
    let object = Object::new(root).with_source(Some(Source {
        file: file.clone(),
        line: pos.line(),
    }));
    let generated = object.metadata("generateName").and_then(Value::text).is_some();
    if object.name().is_empty() && !generated {
        return Err(not_an_object(format!("metadata.name is missing in {kind}")));
    }
    objects.push(object);
    Ok(())
}

fn place(file: &str, text: &str, pos: Pos) -> Place {
    Place::in_text(file, text, pos.line(), pos.column())
}
