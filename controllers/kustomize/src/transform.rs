//! The built-in transformers, each a value that is applied to all resources.

use std::cell::Cell;

use serin_manifests::{Limits, Map, Place, Scalar, Tag, Value};

use crate::error::{Cause, Error, Result, nearest};
use crate::field_spec::{Create, FieldSpec, Walk, set_entry, set_scalar};
use crate::id::Gvk;
use crate::image::ImageRule;
use crate::json_patch::{self, Operation};
use crate::kustomization::Replica;
use crate::options::Budget;
use crate::replacement::{self, PreparedReplacement};
use crate::resmap::ResMap;
use crate::resource::{Resource, raw_text};
use crate::schema::Schemas;
use crate::selector::{Matcher, Selector};
use crate::smp;

/// What all transformers of a build share.
pub(crate) struct Env<'a> {
    pub schemas: &'a Schemas,
    pub budget: &'a Budget,
    pub steps: &'a Cell<u64>,
}

impl Env<'_> {
    /// Counts work; a pure function has no clock to look at.
    pub(crate) fn step(&self, n: usize) -> Result<()> {
        let steps = self.steps.get().saturating_add(n as u64);
        self.steps.set(steps);
        if steps > self.budget.max_steps {
            let limit = usize::try_from(self.budget.max_steps).unwrap_or(usize::MAX);
            return Err(Cause::Budget {
                budget: "steps",
                what: format!("{steps} fields visited"),
                limit,
            }
            .into());
        }
        Ok(())
    }

    pub(crate) fn limits(&self) -> &Limits {
        &self.budget.document
    }
}

/// Which subjects of role bindings get the namespace.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub(crate) enum SubjectMode {
    /// Those named `default`.
    #[default]
    DefaultOnly,
    /// All service accounts.
    AllServiceAccounts,
    /// None.
    None,
}

/// The patch of a `patches` entry.
#[derive(Debug)]
pub(crate) enum PatchBody {
    Merge(Vec<Resource>),
    Json(Vec<Operation>),
}

#[derive(Debug)]
pub(crate) enum Transformer {
    /// `patchesStrategicMerge`: each patch names its target.
    StrategicMerge(Vec<Resource>),
    /// An entry of `patches`.
    Patch {
        body: PatchBody,
        target: Option<(Selector, Box<Matcher>)>,
        source: String,
    },
    Namespace {
        namespace: String,
        specs: Vec<FieldSpec>,
        unset_only: bool,
        subjects: SubjectMode,
    },
    Prefix {
        text: String,
        specs: Vec<FieldSpec>,
    },
    Suffix {
        text: String,
        specs: Vec<FieldSpec>,
    },
    Labels {
        pairs: Vec<(String, String)>,
        specs: Vec<FieldSpec>,
    },
    Annotations {
        pairs: Vec<(String, String)>,
        specs: Vec<FieldSpec>,
    },
    /// An entry of `patchesJson6902`.
    Json6902 {
        target: Box<Matcher>,
        patch: Vec<Operation>,
    },
    Replicas {
        replica: Replica,
        specs: Vec<FieldSpec>,
    },
    Image {
        rule: Box<ImageRule>,
        specs: Vec<FieldSpec>,
    },
    Replacements(Vec<PreparedReplacement>),
    Hash,
    ValueAdd {
        value: String,
        targets: Vec<ValueTarget>,
    },
    /// Several in order: `PrefixSuffixTransformer`.
    Several(Vec<Transformer>),
}

#[derive(Debug)]
pub(crate) struct ValueTarget {
    pub matcher: Option<Box<Matcher>>,
    pub field_path: String,
    pub position: usize,
}

impl Transformer {
    /// The kind that kustomize gives it, for origins and traces.
    pub(crate) fn kind(&self) -> &'static str {
        match self {
            Transformer::StrategicMerge(_) => "PatchStrategicMergeTransformer",
            Transformer::Patch { .. } => "PatchTransformer",
            Transformer::Namespace { .. } => "NamespaceTransformer",
            Transformer::Prefix { .. } => "PrefixTransformer",
            Transformer::Suffix { .. } => "SuffixTransformer",
            Transformer::Labels { .. } => "LabelTransformer",
            Transformer::Annotations { .. } => "AnnotationsTransformer",
            Transformer::Json6902 { .. } => "PatchJson6902Transformer",
            Transformer::Replicas { .. } => "ReplicaCountTransformer",
            Transformer::Image { .. } => "ImageTagTransformer",
            Transformer::Replacements(_) => "ReplacementTransformer",
            Transformer::Hash => "HashTransformer",
            Transformer::ValueAdd { .. } => "ValueAddTransformer",
            Transformer::Several(_) => "PrefixSuffixTransformer",
        }
    }

    pub(crate) fn apply(&self, map: &mut ResMap, env: &Env<'_>) -> Result<()> {
        match self {
            Transformer::StrategicMerge(patches) => {
                for patch in patches {
                    let index = patch_target(map, patch, env)?;
                    merge_patch(map, index, patch.clone(), true, env)?;
                }
                map.drop_empty();
                map.check_unique(env.schemas)
            }
            Transformer::Patch { body, target, source } => {
                apply_patch(map, body, target.as_ref(), source, env)
            }
            Transformer::Namespace {
                namespace,
                specs,
                unset_only,
                subjects,
            } => {
                if namespace.is_empty() {
                    return Ok(());
                }
                let setter = NamespaceSetter {
                    namespace,
                    unset_only: *unset_only,
                };
                let walks: Vec<Walk> = specs.iter().map(Walk::new).collect();
                for r in map.resources_mut() {
                    if r.is_empty() {
                        continue;
                    }
                    env.step(4 + walks.len())?;
                    r.store_previous_id(env.schemas);
                    setter
                        .run(r, &walks, *subjects, env.schemas)
                        .map_err(|e| transformer_error(r, env, &e))?;
                }
                map.check_unique(env.schemas).map_err(|e| match *e.cause {
                    Cause::DuplicateId { id } => Error {
                        cause: Box::new(Cause::Transformer(format!(
                            "namespace transformation produces ID conflict: {id}"
                        ))),
                        ..Error::new(Cause::EmptyKustomization)
                    }
                    .help(e.help.unwrap_or_default()),
                    _ => e,
                })
            }
            Transformer::Prefix { text, specs } => affix(map, text, specs, true, env),
            Transformer::Suffix { text, specs } => affix(map, text, specs, false, env),
            Transformer::Labels { pairs, specs } | Transformer::Annotations { pairs, specs } => {
                set_pairs(map, pairs, specs, env)
            }
            Transformer::Json6902 { target, patch } => {
                for index in map.select(target, env.schemas) {
                    env.step(patch.len() + 16)?;
                    json_patch_one(map, index, patch, env)?;
                }
                Ok(())
            }
            Transformer::Replicas { replica, specs } => set_replicas(map, replica, specs, env),
            Transformer::Image { rule, specs } => {
                let walks: Vec<Walk> = specs.iter().map(Walk::new).collect();
                for r in map.contents_mut() {
                    if r.kind() == "CustomResourceDefinition" {
                        continue;
                    }
                    env.step(16 + walks.len())?;
                    rule.run(&mut r.root, &walks)
                        .map_err(|e| transformer_error(r, env, &e))?;
                }
                Ok(())
            }
            Transformer::Replacements(list) => replacement::apply(map, list, env),
            Transformer::Hash => add_hashes(map, env),
            Transformer::ValueAdd { value, targets } => add_values(map, value, targets, env),
            Transformer::Several(list) => list.iter().try_for_each(|t| t.apply(map, env)),
        }
    }
}

fn transformer_error(r: &Resource, env: &Env<'_>, message: &str) -> Error {
    let error = Error::new(Cause::Transformer(format!(
        "{message} of object {}",
        r.id(env.schemas)
    )));
    match &r.source {
        Some(source) => error.help(format!(
            "the object is defined in {}:{}",
            source.file, source.line
        )),
        None => error,
    }
}

/// The one resource that a patch names by kind and name.
fn patch_target(map: &mut ResMap, patch: &Resource, env: &Env<'_>) -> Result<usize> {
    let id = patch.original_id(env.schemas);
    let mut found = map.by_any_id(&id, env.schemas);
    // What an earlier document of the same patch deleted is gone for the later ones.
    found.retain(|index| !map.resources()[*index].deleted);
    match found[..] {
        [index] => Ok(index),
        [] => {
            let error = Error::new(Cause::NoPatchTarget { id: id.to_string() }).at_option(patch_place(patch));
            Err(match suggest_target(map, patch, env) {
                Some(help) => error.help(help),
                None => error,
            })
        }
        _ => Err(Cause::Patch(format!(
            "multiple matches for Id {id}; failed to find unique target for patch {id}"
        ))
        .into()),
    }
}

fn patch_place(patch: &Resource) -> Option<Place> {
    let source = patch.source.as_ref()?;
    Some(Place {
        file: source.file.to_string(),
        line: source.line,
        ..Place::default()
    })
}

/// What the author of a patch without target may have meant.
fn suggest_target(map: &ResMap, patch: &Resource, env: &Env<'_>) -> Option<String> {
    let same_kind: Vec<&Resource> = map
        .resources()
        .iter()
        .filter(|r| r.kind() == patch.kind())
        .collect();
    if let Some(r) = same_kind
        .iter()
        .find(|r| r.name() == patch.name() || r.original_name() == patch.name())
    {
        let (found, wanted) = (r.id(env.schemas), patch.id(env.schemas));
        if found.gvk != wanted.gvk {
            return Some(format!("there is {found}: the apiVersion of the patch differs"));
        }
        return Some(format!(
            "there is {found}: the namespace differs; give the patch the namespace that the resource has in its file, or a `target`"
        ));
    }
    let name = nearest(patch.name(), same_kind.iter().map(|r| r.name()))?;
    Some(format!("did you mean {} '{name}'?", patch.kind()))
}

fn apply_patch(
    map: &mut ResMap,
    body: &PatchBody,
    target: Option<&(Selector, Box<Matcher>)>,
    source: &str,
    env: &Env<'_>,
) -> Result<()> {
    match (body, target) {
        (PatchBody::Merge(patches), None) => {
            for patch in patches {
                let index = patch_target(map, patch, env)?;
                merge_patch(map, index, patch.clone(), false, env)?;
            }
            Ok(())
        }
        (PatchBody::Merge(patches), Some((_, matcher))) => {
            let [patch] = &patches[..] else {
                return Err(Cause::Patch(format!(
                    "Multiple Strategic-Merge Patches in one `patches` entry is not allowed to set `patches.target` field: {source}"
                ))
                .into());
            };
            let selected = map.select(matcher, env.schemas);
            for index in &selected {
                merge_patch(map, *index, patch.clone(), true, env)?;
            }
            map.drop_empty();
            if patch.allow_name_change || patch.allow_kind_change {
                map.check_unique(env.schemas)?;
            }
            Ok(())
        }
        (PatchBody::Json(_), None) => Err(Error::new(Cause::Patch(format!(
            "must specify a target for JSON patch {source}"
        )))
        .help("add `target:` with kind and name beside the patch")),
        (PatchBody::Json(patch), Some((_, matcher))) => {
            for index in map.select(matcher, env.schemas) {
                env.step(patch.len() + 16)?;
                map.resources_mut()[index].store_previous_id(env.schemas);
                json_patch_one(map, index, patch, env)?;
            }
            Ok(())
        }
    }
}

fn merge_patch(
    map: &mut ResMap,
    index: usize,
    mut patch: Resource,
    retarget: bool,
    env: &Env<'_>,
) -> Result<()> {
    env.step(64)?;
    let changes_identity = patch.allow_name_change || patch.allow_kind_change;
    let resources = if changes_identity {
        map.resources_mut()
    } else {
        map.contents_mut()
    };
    let r = &mut resources[index];
    if retarget {
        // The patch takes the group and version of its target, and keeps its own kind.
        let api_version = r.api_version().to_owned();
        crate::resource::set_keeping_style(&mut patch.root, "apiVersion", &api_version);
        rewrite_as_text(&mut patch, "labels");
    }
    if retarget || changes_identity {
        rewrite_as_text(&mut patch, "annotations");
    }
    let (name, namespace, kind) = (r.name().to_owned(), r.namespace().to_owned(), r.kind().to_owned());
    if changes_identity {
        r.store_previous_id(env.schemas);
    }
    if wipes_annotations(&patch.root) {
        r.forget_notes();
    }
    let root = std::mem::take(&mut r.root);
    match smp::apply(root, patch.root, env.schemas) {
        Ok(Some(merged)) => r.root = merged,
        Ok(None) => {
            r.deleted = true;
            return Ok(());
        }
        Err(message) => {
            return Err(Error::new(Cause::Patch(format!(
                "applying a strategic merge patch to {kind} '{name}': {message}"
            ))));
        }
    }
    if r.root.is_empty() {
        r.deleted = true;
        return Ok(());
    }
    if !patch.allow_kind_change {
        r.set_kind(&kind);
    }
    if !patch.allow_name_change {
        r.set_name(&name);
    }
    r.set_namespace(&namespace);
    r.sync_shared();
    Ok(())
}

/// kustomize writes the labels and annotations of such a patch anew, as text: a null in there deletes nothing, it becomes
/// the text `null`, and a null in their place is lost.
fn rewrite_as_text(patch: &mut Resource, key: &str) {
    let pairs = patch.string_map(key);
    patch.set_string_map(key, pairs);
}

/// kustomize keeps its notes in annotations, so a patch that removes those makes it forget.
fn wipes_annotations(patch: &Map) -> bool {
    let directive = |m: &Map| m.get("$patch").is_some_and(|d| raw_text(d) == "replace");
    let Some(Value::Map(metadata)) = patch.get("metadata") else {
        return false;
    };
    // At the top the directive has no effect; see `smp::apply`.
    if directive(patch) {
        return false;
    }
    if directive(metadata) {
        return true;
    }
    match metadata.get("annotations") {
        Some(Value::Map(m)) => m
            .get("$patch")
            .is_some_and(|d| matches!(raw_text(d), "replace" | "delete")),
        Some(v) => v.is_null(),
        None => false,
    }
}

fn json_patch_one(map: &mut ResMap, index: usize, patch: &[Operation], env: &Env<'_>) -> Result<()> {
    let r = &mut map.resources_mut()[index];
    let id = r.id(env.schemas);
    if r.has_notes() {
        // The notes of kustomize stand in annotations, so a patch can rely on `/metadata/annotations`.
        if let Some(metadata) = r.metadata_mut()
            && metadata.get("annotations").is_none_or(Value::is_null)
        {
            metadata.set("annotations", Value::Map(Map::new()));
        }
    }
    json_patch::apply(&mut r.root, patch).map_err(|message| {
        let all: Vec<String> = patch.iter().map(Operation::describe).collect();
        Error::new(Cause::Patch(message))
            .help(format!("the JSON patch [{}] was applied to {id}", all.join(", ")))
    })?;
    // The way through JSON has made each place a value of its own.
    r.shared.clear();
    let annotations = r.string_map("annotations");
    r.set_string_map("annotations", annotations);
    Ok(())
}

struct NamespaceSetter<'a> {
    namespace: &'a str,
    unset_only: bool,
}

impl NamespaceSetter<'_> {
    fn set(&self, value: &mut Value) -> std::result::Result<(), String> {
        if self.unset_only && matches!(value, Value::Scalar(s) if !s.is_null() && !s.text.is_empty()) {
            return Ok(());
        }
        set_scalar(value, self.namespace, Tag::Str)
    }

    fn run(
        &self,
        r: &mut Resource,
        walks: &[Walk],
        subjects: SubjectMode,
        schemas: &Schemas,
    ) -> std::result::Result<(), String> {
        if !r.is_cluster_scoped(schemas) {
            let spec = Walk::new(&FieldSpec::everywhere("metadata/namespace"));
            spec.visit(&mut r.root, Create::Scalar(Tag::Unset), &mut |v| self.set(v))?;
        }
        let core = r.api_version() == "v1";
        let binding = matches!(r.kind(), "RoleBinding" | "ClusterRoleBinding");
        if binding {
            self.set_subjects(&mut r.root, subjects)?;
        }
        let gvk = r.gvk();
        for walk in walks {
            let skip = walk.path() == "metadata/namespace"
                || (!core && walk.path() == "metadata/name")
                || (binding && walk.path() == "subjects/namespace" && walk.names_kind(r.kind()));
            if !skip && walk.applies_to(&gvk.group, &gvk.version, &gvk.kind) {
                walk.visit(&mut r.root, Create::Scalar(Tag::Str), &mut |v| self.set(v))
                    .map_err(|e| format!("namespace transformation failed: {e}"))?;
            }
        }
        Ok(())
    }

    fn set_subjects(&self, root: &mut Map, mode: SubjectMode) -> std::result::Result<(), String> {
        let (field, wanted) = match mode {
            SubjectMode::None => return Ok(()),
            SubjectMode::DefaultOnly => ("name", "default"),
            SubjectMode::AllServiceAccounts => ("kind", "ServiceAccount"),
        };
        let items = match root.get_mut("subjects") {
            None => return Ok(()),
            Some(v) if v.is_null() => return Ok(()),
            Some(Value::Seq(seq)) => &mut seq.items,
            Some(other) => return Err(crate::field_spec::wrong_kind("sequence", other)),
        };
        for item in items {
            match item {
                Value::Map(subject) if subject.get(field).and_then(Value::text) == Some(wanted) => {
                    if subject.get("namespace").is_none() {
                        subject.push("namespace", Value::Scalar(Scalar::untyped("")));
                    }
                    if let Some(namespace) = subject.get_mut("namespace") {
                        self.set(namespace)?;
                    }
                }
                Value::Map(_) => {}
                v if v.is_null() => {}
                other => return Err(crate::field_spec::wrong_kind("mapping", other)),
            }
        }
        Ok(())
    }
}

/// Kinds whose names are left alone.
fn keeps_its_name(r: &Resource) -> bool {
    let kind = |kind: &str, group: &str| Gvk {
        kind: kind.into(),
        group: group.into(),
        ..Gvk::default()
    };
    r.original_kind_is(&kind("CustomResourceDefinition", ""))
        || r.original_kind_is(&kind("APIService", "apiregistration.k8s.io"))
        || r.original_kind_is(&kind("Namespace", ""))
}

fn affix(map: &mut ResMap, text: &str, specs: &[FieldSpec], prefix: bool, env: &Env<'_>) -> Result<()> {
    let walks: Vec<Walk> = specs.iter().map(Walk::new).collect();
    for r in map.resources_mut() {
        if keeps_its_name(r) {
            continue;
        }
        env.step(1 + walks.len())?;
        // Which fields apply is decided by what the resource was at first, before any of this.
        let applies: Vec<bool> = specs.iter().map(|s| r.original_kind_is(&s.gvk)).collect();
        for (walk, _) in walks.iter().zip(applies).filter(|(_, applies)| *applies) {
            if walk.path() == "metadata/name" && !text.is_empty() {
                let list = if prefix { &mut r.prefixes } else { &mut r.suffixes };
                list.push(text.to_owned());
                r.store_previous_id(env.schemas);
            }
            let gvk = r.gvk();
            if walk.applies_to(&gvk.group, &gvk.version, &gvk.kind) {
                let result = walk.visit(&mut r.root, Create::Scalar(Tag::Str), &mut |v| {
                    let old = raw_text(v);
                    let new = if prefix {
                        format!("{text}{old}")
                    } else {
                        format!("{old}{text}")
                    };
                    set_scalar(v, &new, Tag::Unset)
                });
                result.map_err(|e| transformer_error(r, env, &e))?;
            }
        }
    }
    Ok(())
}

fn set_pairs(map: &mut ResMap, pairs: &[(String, String)], specs: &[FieldSpec], env: &Env<'_>) -> Result<()> {
    if pairs.is_empty() {
        return Ok(());
    }
    let walks: Vec<Walk> = specs.iter().map(Walk::new).collect();
    for r in map.contents_mut() {
        env.step(walks.len() + pairs.len())?;
        let gvk = r.gvk();
        let applying: Vec<&Walk> = walks
            .iter()
            .filter(|w| w.applies_to(&gvk.group, &gvk.version, &gvk.kind))
            .collect();
        let numbers: Vec<u8> = match applying.len() {
            0 | 1 => vec![0; pairs.len()],
            _ => pairs.iter().map(|(_, text)| r.share(text, Tag::Str)).collect(),
        };
        for walk in applying {
            let result = walk.visit(&mut r.root, Create::Mapping, &mut |v| {
                let mut with_numbers = pairs.iter().zip(&numbers);
                with_numbers.try_for_each(|((key, text), number)| set_entry(v, key, text, Tag::Str, *number))
            });
            result.map_err(|e| transformer_error(r, env, &e))?;
        }
        r.sync_shared();
    }
    Ok(())
}

fn set_replicas(map: &mut ResMap, replica: &Replica, specs: &[FieldSpec], env: &Env<'_>) -> Result<()> {
    let mut found = false;
    let count = replica.count.to_string();
    for spec in specs {
        let walk = Walk::new(spec);
        for r in map.contents_mut() {
            let named = |name: &str| name == replica.name;
            let (group, version) = serin_manifests::split_api_version(r.api_version());
            let selected = |kind: &str| crate::id::selects(&spec.gvk, group, version, kind);
            let matches = (named(r.name()) && selected(r.kind()))
                || r.previous.iter().any(|p| named(&p.name) && selected(&p.kind));
            if !matches {
                continue;
            }
            found = true;
            let gvk = r.gvk();
            if walk.applies_to(&gvk.group, &gvk.version, &gvk.kind) {
                walk.visit(&mut r.root, Create::Scalar(Tag::Int), &mut |v| {
                    set_scalar(v, &count, Tag::Int)
                })
                .map_err(|e| transformer_error(r, env, &e))?;
            }
        }
        env.step(map.len())?;
    }
    if found {
        return Ok(());
    }
    let kinds: Vec<String> = specs.iter().map(|s| s.gvk.to_string()).collect();
    let error = Error::new(Cause::Transformer(format!(
        "resource with name {} does not match a config with the following GVK [{}]",
        replica.name,
        kinds.join(" ")
    )));
    let candidates = map
        .resources()
        .iter()
        .filter(|r| specs.iter().any(|s| r.original_kind_is(&s.gvk)))
        .map(Resource::name);
    Err(match nearest(&replica.name, candidates) {
        Some(name) => error.help(format!("did you mean '{name}'?")),
        None => error,
    })
}

/// Adds the hash of its content to the name of every resource that asks for it.
pub(crate) fn add_hashes(map: &mut ResMap, env: &Env<'_>) -> Result<()> {
    if !map.resources().iter().any(|r| r.needs_hash) {
        return Ok(());
    }
    for r in map.resources_mut().iter_mut().filter(|r| r.needs_hash) {
        env.step(16)?;
        let hash = crate::generate::content_hash(r).map_err(|e| transformer_error(r, env, &e))?;
        r.store_previous_id(env.schemas);
        let name = format!("{}-{hash}", r.name());
        r.set_name(&name);
    }
    Ok(())
}

fn add_values(map: &mut ResMap, value: &str, targets: &[ValueTarget], env: &Env<'_>) -> Result<()> {
    for target in targets {
        let selected = match &target.matcher {
            Some(matcher) => map.select(matcher, env.schemas),
            None => (0..map.len()).collect(),
        };
        for index in selected {
            env.step(4)?;
            let r = &mut map.resources_mut()[index];
            let result = if target.field_path == "metadata/namespace" {
                NamespaceSetter {
                    namespace: value,
                    unset_only: false,
                }
                .run(r, &[], SubjectMode::DefaultOnly, env.schemas)
            } else {
                let spec = FieldSpec {
                    path: target.field_path.clone(),
                    ..FieldSpec::everywhere("")
                };
                Walk::new(&spec).visit(&mut r.root, Create::Scalar(Tag::Unset), &mut |v| {
                    let old = raw_text(v).to_owned();
                    let mut parts: Vec<&str> = old.split('/').collect();
                    match target.position {
                        0 => return set_scalar(v, value, Tag::Unset),
                        n if n <= parts.len() + 1 => parts.insert(n - 1, value),
                        _ => parts.push(value),
                    }
                    set_scalar(v, &parts.join("/"), Tag::Unset)
                })
            };
            result.map_err(|e| transformer_error(r, env, &e))?;
        }
    }
    Ok(())
}
