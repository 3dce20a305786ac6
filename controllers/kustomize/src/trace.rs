//! Who gave a field its value: the record behind `serin build --explain`.

use std::collections::HashMap;

use serin_manifests::diff::{Change, diff};
use serin_manifests::{Id, Map};

use crate::resmap::ResMap;
use crate::resource::Resource;

/// One step that changed an object.
#[derive(Clone, Debug, PartialEq)]
pub struct TraceStep {
    /// The transformer, by its name in kustomize: `NamespaceTransformer`.
    pub transformer: String,
    /// The kustomization that asked for it.
    pub kustomization: String,
    /// What it changed.
    pub changes: Vec<Change>,
}

/// The life of one object.
#[derive(Clone, Debug, PartialEq)]
pub struct ObjectTrace {
    /// Its identity in the result.
    pub id: Id,
    /// Where it was read or generated: file and line.
    pub source: Option<(String, usize)>,
    /// The steps that changed it, in order.
    pub steps: Vec<TraceStep>,
}

/// The life of all objects of a result, in its order.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Trace {
    /// One for each object.
    pub objects: Vec<ObjectTrace>,
}

impl Trace {
    /// The steps that touched a path of an object, or something above or below it. Paths are those of [`Change::path`].
    pub fn explain<'a>(&'a self, id: &Id, path: &str) -> Option<(&'a ObjectTrace, Vec<&'a TraceStep>)> {
        let object = self.objects.iter().find(|o| o.id.same_object(id))?;
        let touches = |change: &str| {
            let below = |long: &str, short: &str| {
                long.strip_prefix(short)
                    .is_some_and(|rest| rest.is_empty() || rest.starts_with(['.', '[']))
            };
            path.is_empty() || below(change, path) || below(path, change)
        };
        let steps = object
            .steps
            .iter()
            .filter(|s| s.changes.iter().any(|c| touches(&c.path)))
            .collect();
        Some((object, steps))
    }
}

/// Compares the resources before and after each transformer.
#[derive(Default)]
pub(crate) struct Tracer {
    before: HashMap<u32, Map>,
    steps: HashMap<u32, Vec<TraceStep>>,
    trace: Trace,
}

impl Tracer {
    pub(crate) fn before(&mut self, map: &ResMap) {
        self.before = map
            .resources()
            .iter()
            .map(|r| (r.serial, r.root.clone()))
            .collect();
    }

    pub(crate) fn after(&mut self, transformer: &str, kustomization: &str, map: &ResMap) {
        for r in map.resources() {
            let Some(before) = self.before.get(&r.serial) else {
                continue;
            };
            let changes = diff(before, &r.root);
            if !changes.is_empty() {
                let (transformer, kustomization) = (transformer.to_owned(), kustomization.to_owned());
                self.steps.entry(r.serial).or_default().push(TraceStep {
                    transformer,
                    kustomization,
                    changes,
                });
            }
        }
        self.before.clear();
    }

    pub(crate) fn finish(&mut self, r: &Resource) {
        let gvk = r.gvk();
        self.trace.objects.push(ObjectTrace {
            id: Id {
                group: gvk.group,
                version: gvk.version,
                kind: gvk.kind,
                namespace: r.namespace().into(),
                name: r.name().into(),
            },
            source: r.source.as_ref().map(|s| (s.file.to_string(), s.line)),
            steps: self.steps.remove(&r.serial).unwrap_or_default(),
        });
    }

    pub(crate) fn into_trace(self) -> Trace {
        self.trace
    }
}
