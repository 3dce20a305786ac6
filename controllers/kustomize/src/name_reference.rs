//! Name references: fields that hold the name of another resource follow when that name changes.
//!
//! A candidate must have had the old name and the referred kind at some earlier time, be in reach of the referrer (same
//! namespace, cluster-scoped, a service account, or named by a role binding), and of several the one that went through
//! the same prefixes and suffixes is taken. An index by earlier name makes this linear in the number of references.

use std::collections::{HashMap, HashSet};
use std::rc::Rc;

use serin_manifests::{Map, Scalar, Tag, Value};

use crate::config::NameReference;
use crate::error::{Cause, Error, Result};
use crate::field_spec::{Create, Walk, set_scalar};
use crate::id::{Gvk, selects};
use crate::resmap::ResMap;
use crate::resource::{Resource, raw_text};
use crate::schema::Schemas;
use crate::transform::Env;

/// What is known of a resource that may be referred to; a copy, since the fields that hold references change meanwhile.
struct Candidate {
    name: String,
    namespace: String,
    kind: String,
    effective_namespace: String,
    original_namespace: String,
    cluster_scoped: bool,
    group: String,
    version: String,
    /// Earlier kinds.
    previous_kinds: Vec<String>,
    prefixes: Vec<String>,
    suffixes: Vec<String>,
    shown: String,
}

/// What decides whether a resource is in reach.
#[derive(PartialEq)]
struct Place {
    namespace: String,
    effective_namespace: String,
    cluster_scoped: bool,
}

struct Candidates {
    all: Vec<Candidate>,
    by_previous_name: HashMap<String, Vec<u32>>,
    /// Where the resources that were first in a namespace are now.
    original_namespaces: HashMap<String, Vec<Place>>,
}

impl Candidates {
    fn new(map: &ResMap, schemas: &Schemas) -> Candidates {
        let mut all = Vec::new();
        let mut by_previous_name: HashMap<String, Vec<u32>> = HashMap::new();
        let mut original_namespaces: HashMap<String, Vec<Place>> = HashMap::new();
        for r in map.resources() {
            let original_namespace = r.original_namespace(schemas).to_owned();
            let place = Place {
                namespace: r.namespace().into(),
                effective_namespace: r.effective_namespace(schemas).into(),
                cluster_scoped: r.is_cluster_scoped(schemas),
            };
            let places = original_namespaces.entry(original_namespace.clone()).or_default();
            if !places.contains(&place) {
                places.push(place);
            }
            if r.previous.is_empty() {
                continue;
            }
            let index = all.len() as u32;
            for p in &r.previous {
                let list = by_previous_name.entry(p.name.clone()).or_default();
                if list.last() != Some(&index) {
                    list.push(index);
                }
            }
            let gvk = r.gvk();
            all.push(Candidate {
                name: r.name().into(),
                namespace: r.namespace().into(),
                kind: gvk.kind,
                effective_namespace: r.effective_namespace(schemas).into(),
                original_namespace,
                cluster_scoped: r.is_cluster_scoped(schemas),
                group: gvk.group,
                version: gvk.version,
                previous_kinds: r.previous.iter().map(|p| p.kind.clone()).collect(),
                prefixes: r.prefixes.clone(),
                suffixes: r.suffixes.clone(),
                shown: r.id(schemas).to_string(),
            });
        }
        Candidates {
            all,
            by_previous_name,
            original_namespaces,
        }
    }
}

impl Candidate {
    fn was(&self, selector: &Gvk) -> bool {
        self.previous_kinds
            .iter()
            .any(|kind| selects(selector, &self.group, &self.version, kind))
    }
}

/// One field of one kind of referrer, with what it refers to.
struct Rule {
    walk: Walk,
    target: Gvk,
    is_role_ref: bool,
}

/// Corrects all references.
pub(crate) fn fix(map: &mut ResMap, references: &[NameReference], env: &Env<'_>) -> Result<()> {
    let candidates = Candidates::new(map, env.schemas);
    // The rules for a kind are the same for all its objects.
    let mut rules_by_kind: HashMap<Gvk, Rc<Vec<Rule>>> = HashMap::new();
    for r in map.resources_mut() {
        let original = r.original_id(env.schemas).gvk;
        let rules = rules_by_kind
            .entry(original)
            .or_insert_with_key(|gvk| Rc::new(rules_for(references, gvk)))
            .clone();
        if rules.is_empty() {
            continue;
        }
        let referrer = Referrer::new(r, env.schemas)?;
        if candidates.all.is_empty() {
            // Nothing was renamed.
            continue;
        }
        let mut root = std::mem::take(&mut r.root);
        let result = referrer.apply(&mut root, &rules, &candidates, env);
        r.root = root;
        result?;
    }
    Ok(())
}

fn rules_for(references: &[NameReference], gvk: &Gvk) -> Vec<Rule> {
    let mut rules = Vec::new();
    for reference in references {
        for spec in reference.referrers.iter().filter(|s| gvk.is_selected_by(&s.gvk)) {
            // The kind was matched against the original one; the walk must not ask again.
            let spec = crate::field_spec::FieldSpec {
                gvk: Gvk::default(),
                ..spec.clone()
            };
            rules.push(Rule {
                walk: Walk::new(&spec),
                target: reference.target.clone(),
                is_role_ref: spec.path.ends_with("roleRef/name"),
            });
        }
    }
    rules
}

struct Referrer {
    shown: String,
    effective_namespace: String,
    cluster_scoped: bool,
    prefixes: Vec<String>,
    suffixes: Vec<String>,
    role_ref: Option<Gvk>,
    /// Namespaces of service accounts that a RoleBinding names.
    subject_namespaces: HashSet<String>,
}

impl Referrer {
    fn new(r: &Resource, schemas: &Schemas) -> Result<Referrer> {
        let role_ref = r.root.get("roleRef").and_then(|role_ref| {
            let group = role_ref.get("apiGroup")?;
            let kind = role_ref.get("kind")?;
            Some(Gvk {
                group: raw_text(group).into(),
                version: String::new(),
                kind: raw_text(kind).into(),
            })
        });
        let shown = r.id(schemas).to_string();
        let mut subject_namespaces = HashSet::new();
        let cluster_scoped = r.is_cluster_scoped(schemas);
        if r.kind() == "RoleBinding" && !cluster_scoped {
            for subject in r.root.get("subjects").and_then(Value::as_seq).unwrap_or(&[]) {
                let Some(namespace) = subject.get("namespace") else {
                    continue;
                };
                if subject.get("kind").map(raw_text) != Some("ServiceAccount") {
                    continue;
                }
                match namespace.as_str() {
                    Some(text) => {
                        subject_namespaces.insert(text.to_owned());
                    }
                    None => {
                        let message = format!("Invalid Input: namespace is blank for resource \"{shown}\"");
                        return Err(Cause::NameReference(message).into());
                    }
                }
            }
        }
        Ok(Referrer {
            shown,
            effective_namespace: r.effective_namespace(schemas).into(),
            cluster_scoped,
            prefixes: r.prefixes.clone(),
            suffixes: r.suffixes.clone(),
            role_ref,
            subject_namespaces,
        })
    }

    fn apply(&self, root: &mut Map, rules: &[Rule], candidates: &Candidates, env: &Env<'_>) -> Result<()> {
        for rule in rules {
            env.step(1)?;
            let result = rule.walk.visit(root, Create::Never, &mut |value| {
                self.set(value, rule, candidates)
            });
            result.map_err(|e| {
                let message = format!(
                    "updating name reference in '{}' field of '{}': {e}",
                    rule.walk.path(),
                    self.shown
                );
                Error::new(Cause::NameReference(message))
            })?;
        }
        Ok(())
    }

    fn set(
        &self,
        value: &mut Value,
        rule: &Rule,
        candidates: &Candidates,
    ) -> std::result::Result<(), String> {
        match value {
            Value::Scalar(s) if s.is_null() => Ok(()),
            Value::Scalar(_) => self.set_name(value, rule, candidates),
            Value::Map(map) => self.set_name_and_namespace(map, rule, candidates),
            Value::Seq(seq) => seq.items.iter_mut().try_for_each(|item| match item {
                Value::Scalar(s) if s.is_null() => Ok(()),
                Value::Scalar(_) => self.set_name(item, rule, candidates),
                Value::Map(map) => self.set_name_and_namespace(map, rule, candidates),
                Value::Seq(_) => Err("expected to be either a string or a map of string".into()),
            }),
        }
    }

    fn set_name(
        &self,
        value: &mut Value,
        rule: &Rule,
        candidates: &Candidates,
    ) -> std::result::Result<(), String> {
        let old = raw_text(value).to_owned();
        match self.select(&old, rule, candidates, None, |a, b| a.name == b.name)? {
            Some(found) if found.name != old => set_scalar(value, &found.name, Tag::Unset),
            _ => Ok(()),
        }
    }

    fn set_name_and_namespace(
        &self,
        map: &mut Map,
        rule: &Rule,
        candidates: &Candidates,
    ) -> std::result::Result<(), String> {
        let Some(name) = map.get("name") else {
            return Err("path config error; no 'name' field in node".into());
        };
        let old = raw_text(name).to_owned();
        let namespace = map.get("namespace").map(|n| raw_text(n).to_owned());
        let same = |a: &Candidate, b: &Candidate| a.name == b.name && a.namespace == b.namespace;
        let Some(found) = self.select(&old, rule, candidates, namespace.as_deref(), same)? else {
            return Ok(());
        };
        if found.name == old && found.namespace.is_empty() {
            return Ok(());
        }
        set_text(map, "name", &found.name);
        if !found.namespace.is_empty() {
            set_text(map, "namespace", &found.namespace);
        }
        Ok(())
    }

    /// Whether a resource can be referred to from here at all.
    fn reaches(&self, c: &Candidate) -> bool {
        self.cluster_scoped
            || c.cluster_scoped
            || c.effective_namespace == self.effective_namespace
            || self.subject_namespaces.contains(&c.namespace)
    }

    /// The same, asked again by the rules for references: service accounts may be anywhere.
    fn same_namespace(&self, c: &Candidate) -> bool {
        self.cluster_scoped
            || c.cluster_scoped
            || c.kind == "ServiceAccount"
            || c.effective_namespace == self.effective_namespace
    }

    fn select<'c>(
        &self,
        old_name: &str,
        rule: &Rule,
        candidates: &'c Candidates,
        namespace: Option<&str>,
        same: impl Fn(&Candidate, &Candidate) -> bool,
    ) -> std::result::Result<Option<&'c Candidate>, String> {
        let Some(list) = candidates.by_previous_name.get(old_name) else {
            return Ok(None);
        };
        let by_original = namespace.is_some_and(|ns| self.original_namespace_exists(ns, candidates));
        let mut found: Vec<&Candidate> = list
            .iter()
            .map(|&i| &candidates.all[i as usize])
            .filter(|c| {
                let in_namespace = match namespace {
                    None => true,
                    Some(ns) if by_original => c.original_namespace == ns,
                    Some(ns) => c.effective_namespace == ns && !c.cluster_scoped,
                };
                in_namespace
                    && self.reaches(c)
                    && c.was(&rule.target)
                    && (!rule.is_role_ref || self.role_ref.as_ref().is_none_or(|role| c.was(role)))
                    && self.same_namespace(c)
            })
            .collect();
        if found.len() > 1 {
            found.retain(|c| {
                affixes_match(&c.prefixes, &self.prefixes, true)
                    && affixes_match(&c.suffixes, &self.suffixes, true)
            });
        } else if let [only] = found[..] {
            return Ok(Some(only));
        }
        if found.len() > 1 {
            found.retain(|c| {
                affixes_match(&c.prefixes, &self.prefixes, false)
                    && affixes_match(&c.suffixes, &self.suffixes, false)
            });
        }
        match found[..] {
            [] => Ok(None),
            [first, ref rest @ ..] if rest.iter().all(|c| same(first, c)) => Ok(Some(first)),
            _ => {
                let ids: Vec<&str> = found.iter().map(|c| c.shown.as_str()).collect();
                Err(format!("found multiple possible referrals: {}", ids.join(", ")))
            }
        }
    }

    /// Whether any resource in reach was first in this namespace: then the namespace is meant as it was first.
    fn original_namespace_exists(&self, namespace: &str, candidates: &Candidates) -> bool {
        namespace != crate::id::NOT_A_NAMESPACE
            && candidates
                .original_namespaces
                .get(namespace)
                .is_some_and(|places| {
                    places.iter().any(|p| {
                        self.cluster_scoped
                            || p.cluster_scoped
                            || p.effective_namespace == self.effective_namespace
                            || self.subject_namespaces.contains(&p.namespace)
                    })
                })
    }
}

/// Whether two resources went through the same prefixes: the shorter list must be the end of the longer one.
fn affixes_match(a: &[String], b: &[String], empty_matches: bool) -> bool {
    if a.is_empty() || b.is_empty() {
        return empty_matches || a.len() == b.len();
    }
    a.ends_with(b) || b.ends_with(a)
}

fn set_text(map: &mut Map, key: &str, text: &str) {
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
