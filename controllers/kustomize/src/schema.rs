//! What the built-in schema says about lists that merge by key, and which kinds live outside namespaces; and schemas
//! that a repository brings with `openapi`.

use std::collections::HashMap;
use std::sync::OnceLock;

use serde_json::Value as Json;

/// The OpenAPI version whose facts are built in, as `openapi.version` names it.
pub(crate) const BUILTIN_VERSION: &str = "v1.21.2";

/// A place in a schema.
pub(crate) type NodeId = u32;

/// One type or field.
#[derive(Clone, Debug, Default)]
struct Node {
    fields: HashMap<Box<str>, NodeId>,
    /// The type of values under keys that are not in `fields`.
    additional: Option<NodeId>,
    /// The type of elements.
    items: Option<NodeId>,
    merges: bool,
    has_strategy: bool,
    keys: Vec<Box<str>>,
}

/// A set of types with the kinds that have them.
#[derive(Clone, Debug, Default)]
pub(crate) struct Schema {
    nodes: Vec<Node>,
    by_kind: HashMap<(Box<str>, Box<str>), NodeId>,
    namespaced: HashMap<(Box<str>, Box<str>), bool>,
}

impl Schema {
    /// The facts of Kubernetes 1.21, which kustomize embeds.
    pub(crate) fn builtin() -> &'static Schema {
        static BUILTIN: OnceLock<Schema> = OnceLock::new();
        BUILTIN.get_or_init(|| parse_builtin(include_str!("data/merge_keys.txt")))
    }

    /// A schema in OpenAPI form: `definitions` with `x-kubernetes-group-version-kind`, `paths` for scopes.
    pub(crate) fn from_openapi(document: &Json) -> Schema {
        let mut builder = Builder {
            definitions: document.get("definitions"),
            schema: Schema::default(),
            by_name: HashMap::new(),
        };
        if let Some(definitions) = builder.definitions.and_then(Json::as_object) {
            for (name, definition) in definitions {
                let Some(kinds) = definition
                    .get("x-kubernetes-group-version-kind")
                    .and_then(Json::as_array)
                else {
                    continue;
                };
                let id = builder.definition(name);
                for kind in kinds {
                    if let Some(key) = kind_key(kind) {
                        builder.schema.by_kind.insert(key, id);
                    }
                }
            }
        }
        let mut schema = builder.schema;
        for (path, operations) in document
            .get("paths")
            .and_then(Json::as_object)
            .into_iter()
            .flatten()
        {
            let kind = operations
                .get("get")
                .and_then(|g| g.get("x-kubernetes-group-version-kind"));
            let Some(key) = kind.and_then(kind_key) else {
                continue;
            };
            if path.contains("namespaces/{namespace}") {
                schema.namespaced.insert(key, true);
            } else {
                schema.namespaced.entry(key).or_insert(false);
            }
        }
        schema
    }

    fn kind(&self, api_version: &str, kind: &str) -> Option<NodeId> {
        self.by_kind.get(&(api_version.into(), kind.into())).copied()
    }

    fn node(&self, id: NodeId) -> Option<&Node> {
        self.nodes.get(id as usize)
    }
}

fn kind_key(json: &Json) -> Option<(Box<str>, Box<str>)> {
    let text = |key: &str| json.get(key).and_then(Json::as_str);
    let version = text("version")?;
    let kind = text("kind")?;
    let api_version = match text("group") {
        Some(group) if !group.is_empty() => format!("{group}/{version}"),
        _ => version.to_owned(),
    };
    Some((api_version.into(), kind.into()))
}

struct Builder<'a> {
    definitions: Option<&'a Json>,
    schema: Schema,
    by_name: HashMap<String, NodeId>,
}

impl Builder<'_> {
    /// The node of a named definition; made on first use, so that types may contain themselves.
    fn definition(&mut self, name: &str) -> NodeId {
        if let Some(&id) = self.by_name.get(name) {
            return id;
        }
        let id = self.schema.nodes.len() as NodeId;
        self.schema.nodes.push(Node::default());
        self.by_name.insert(name.to_owned(), id);
        if let Some(json) = self.definitions.and_then(|d| d.get(name)).cloned() {
            let node = self.content(&json, 0);
            self.schema.nodes[id as usize] = node;
        }
        id
    }

    fn child(&mut self, json: &Json, depth: usize) -> NodeId {
        if let Some(reference) = json.get("$ref").and_then(Json::as_str) {
            let name = reference.trim_start_matches("#/definitions/").to_owned();
            return self.definition(&name);
        }
        let id = self.schema.nodes.len() as NodeId;
        self.schema.nodes.push(Node::default());
        // Deeper than any real schema: a document that nests further is not looked at there.
        if depth < 64 {
            let node = self.content(json, depth + 1);
            self.schema.nodes[id as usize] = node;
        }
        id
    }

    fn content(&mut self, json: &Json, depth: usize) -> Node {
        let mut node = Node::default();
        for (name, property) in json
            .get("properties")
            .and_then(Json::as_object)
            .into_iter()
            .flatten()
        {
            let id = self.child(property, depth);
            node.fields.insert(name.as_str().into(), id);
        }
        if let Some(additional) = json.get("additionalProperties").filter(|a| a.is_object()) {
            node.additional = Some(self.child(additional, depth));
        }
        if json.get("type").and_then(Json::as_str) == Some("array")
            && let Some(items) = json.get("items")
        {
            node.items = Some(self.child(items, depth));
        }
        if let Some(strategy) = json.get("x-kubernetes-patch-strategy").and_then(Json::as_str) {
            node.has_strategy = !strategy.is_empty();
            node.merges = strategy.split(',').any(|s| s == "merge");
            if let Some(keys) = json.get("x-kubernetes-list-map-keys").and_then(Json::as_array) {
                node.keys = keys.iter().filter_map(Json::as_str).map(Into::into).collect();
            } else if let Some(key) = json.get("x-kubernetes-patch-merge-key").and_then(Json::as_str) {
                node.keys = vec![key.into()];
            }
        }
        node
    }
}

fn parse_builtin(text: &str) -> Schema {
    let mut schema = Schema::default();
    let types = text
        .lines()
        .filter_map(|l| l.strip_prefix("@ ")?.parse::<usize>().ok())
        .max()
        .unwrap_or(0)
        + 1;
    schema.nodes = vec![Node::default(); types];
    let mut current = 0usize;
    for line in text.lines() {
        let words: Vec<&str> = line.split(' ').collect();
        match words[..] {
            ["=", api_version, kind, id] => {
                let id = id.parse().unwrap_or(0);
                schema.by_kind.insert((api_version.into(), kind.into()), id);
            }
            ["@", id] => current = id.parse().unwrap_or(0),
            [name, shape, element, strategy, keys] if shape.len() == 1 => {
                let element: Option<NodeId> = element.parse().ok();
                let id = if shape == "o" {
                    element
                } else {
                    let node = Node {
                        additional: element.filter(|_| shape == "m"),
                        items: element.filter(|_| shape == "a"),
                        merges: strategy.split(',').any(|s| s == "merge"),
                        has_strategy: strategy != "-",
                        keys: if keys == "-" {
                            Vec::new()
                        } else {
                            keys.split(',').map(Into::into).collect()
                        },
                        ..Node::default()
                    };
                    schema.nodes.push(node);
                    Some(schema.nodes.len() as NodeId - 1)
                };
                if let Some(id) = id {
                    schema.nodes[current].fields.insert(name.into(), id);
                }
            }
            _ => {}
        }
    }
    schema
}

/// The schemas that hold for one build: the built-in one, or one that the repository brings, or both.
#[derive(Clone, Debug, Default)]
pub(crate) struct Schemas {
    custom: Option<Schema>,
    version_set: bool,
    /// A kind that no table knows was looked at before a custom schema came: the built-in one then stays in use.
    builtin_wanted: std::cell::Cell<bool>,
}

/// A place in one of the schemas.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Cursor<'a> {
    schema: &'a Schema,
    node: NodeId,
}

impl Schemas {
    /// Whether `openapi` has been set; the first to set it wins.
    pub(crate) fn is_set(&self) -> bool {
        self.custom.is_some() || self.version_set
    }

    /// Uses a schema of the repository.
    pub(crate) fn set_custom(&mut self, schema: Schema) {
        self.custom = Some(schema);
    }

    /// Uses the built-in schema explicitly.
    pub(crate) fn set_builtin(&mut self) {
        self.custom = None;
        self.version_set = true;
    }

    /// The schema of a kind.
    pub(crate) fn of_kind(&self, api_version: &str, kind: &str) -> Option<Cursor<'_>> {
        let in_schema =
            |schema: &'static Schema| schema.kind(api_version, kind).map(|node| Cursor { schema, node });
        match &self.custom {
            None => in_schema(Schema::builtin()),
            Some(custom) => {
                let builtin = if self.builtin_wanted.get() {
                    in_schema(Schema::builtin())
                } else {
                    None
                };
                builtin.or_else(|| {
                    custom
                        .kind(api_version, kind)
                        .map(|node| Cursor { schema: custom, node })
                })
            }
        }
    }

    /// Whether a kind is known to live outside namespaces. Unknown kinds count as namespaced, as in kustomize.
    pub(crate) fn is_cluster_scoped(&self, api_version: &str, kind: &str) -> bool {
        static SCOPES: OnceLock<HashMap<(&'static str, &'static str), bool>> = OnceLock::new();
        let scopes = SCOPES.get_or_init(|| {
            let lines = include_str!("data/scopes.txt").lines();
            lines
                .filter_map(|line| {
                    let mut words = line.split(' ');
                    let cluster = match words.next()? {
                        "C" => true,
                        "N" => false,
                        _ => return None,
                    };
                    Some(((words.next()?, words.next()?), cluster))
                })
                .collect()
        });
        if let Some(&cluster) = scopes.get(&(api_version, kind)) {
            return cluster;
        }
        match &self.custom {
            None => {
                if !self.version_set {
                    self.builtin_wanted.set(true);
                }
                false
            }
            Some(custom) => custom.namespaced.get(&(api_version.into(), kind.into())) == Some(&false),
        }
    }
}

impl<'a> Cursor<'a> {
    fn get(&self) -> Option<&'a Node> {
        self.schema.node(self.node)
    }

    /// The schema of a field.
    pub(crate) fn field(&self, name: &str) -> Option<Cursor<'a>> {
        let node = self.get()?;
        let id = node.fields.get(name).copied().or(node.additional)?;
        Some(Cursor {
            schema: self.schema,
            node: id,
        })
    }

    /// The schema of the elements of a list.
    pub(crate) fn elements(&self) -> Option<Cursor<'a>> {
        let node = self.get()?.items?;
        Some(Cursor {
            schema: self.schema,
            node,
        })
    }

    /// Whether patches merge this list element by element.
    pub(crate) fn merges(&self) -> bool {
        self.get().is_some_and(|n| n.merges)
    }

    /// The keys by which elements are matched; empty for a set of scalars. `None` if there is neither strategy nor key.
    pub(crate) fn merge_keys(&self) -> Option<&'a [Box<str>]> {
        let node = self.get()?;
        node.has_strategy.then_some(&node.keys[..])
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn containers_merge_by_name_and_ports_by_two_keys() {
        let schemas = Schemas::default();
        let pod = schemas
            .of_kind("apps/v1", "Deployment")
            .and_then(|d| d.field("spec")?.field("template")?.field("spec"));
        let containers = pod.and_then(|p| p.field("containers")).unwrap();
        assert!(containers.merges());
        assert_eq!(containers.merge_keys().unwrap(), ["name".into()]);
        let ports = containers.elements().unwrap().field("ports").unwrap();
        assert_eq!(
            ports.merge_keys().unwrap(),
            ["containerPort".into(), "protocol".into()]
        );
        assert!(
            containers
                .elements()
                .unwrap()
                .field("args")
                .is_none_or(|a| !a.merges())
        );
        let finalizers = schemas
            .of_kind("v1", "ConfigMap")
            .and_then(|d| d.field("metadata")?.field("finalizers"))
            .unwrap();
        assert!(finalizers.merges() && finalizers.merge_keys().unwrap().is_empty());
    }

    #[test]
    fn scopes_of_builtin_kinds_are_known() {
        let schemas = Schemas::default();
        assert!(schemas.is_cluster_scoped("rbac.authorization.k8s.io/v1", "ClusterRole"));
        assert!(!schemas.is_cluster_scoped("v1", "ConfigMap"));
        assert!(!schemas.is_cluster_scoped("example.com/v1", "Widget"));
    }
}
