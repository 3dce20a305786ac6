//! The transformer configuration: field specifications by transformer, the defaults, and what `configurations` adds.

use std::sync::OnceLock;

use serin_manifests::order::{LEGACY_FIRST, LEGACY_LAST, legacy_rank};

use crate::field_spec::{FieldSpec, merge_all};
use crate::id::Gvk;

/// What refers to objects of one kind by name.
#[derive(Clone, Debug, PartialEq, Eq, Default)]
pub(crate) struct NameReference {
    /// The kind referred to.
    pub target: Gvk,
    /// The fields that hold its name.
    pub referrers: Vec<FieldSpec>,
}

/// All field specifications.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct TransformerConfig {
    /// `namePrefix`
    pub name_prefix: Vec<FieldSpec>,
    /// `nameSuffix`
    pub name_suffix: Vec<FieldSpec>,
    /// `namespace`
    pub namespace: Vec<FieldSpec>,
    /// `commonLabels`
    pub common_labels: Vec<FieldSpec>,
    /// `labels`
    pub labels: Vec<FieldSpec>,
    /// `labels` with `includeTemplates`
    pub template_labels: Vec<FieldSpec>,
    /// `commonAnnotations`
    pub common_annotations: Vec<FieldSpec>,
    /// Name references.
    pub name_reference: Vec<NameReference>,
    /// Where `$(VAR)` is replaced.
    pub var_reference: Vec<FieldSpec>,
    /// `images`
    pub images: Vec<FieldSpec>,
    /// `replicas`
    pub replicas: Vec<FieldSpec>,
}

impl TransformerConfig {
    /// The defaults of kustomize 5.7.
    pub(crate) fn defaults() -> &'static TransformerConfig {
        static DEFAULTS: OnceLock<TransformerConfig> = OnceLock::new();
        DEFAULTS.get_or_init(|| {
            let mut config = parse_defaults(include_str!("data/field_specs.txt"));
            config.sort();
            config
        })
    }

    /// The lists by their names in a configuration file, the name references apart.
    pub(crate) fn lists_mut(&mut self) -> [(&'static str, &mut Vec<FieldSpec>); 10] {
        [
            ("namePrefix", &mut self.name_prefix),
            ("nameSuffix", &mut self.name_suffix),
            ("namespace", &mut self.namespace),
            ("commonLabels", &mut self.common_labels),
            ("labels", &mut self.labels),
            ("templateLabels", &mut self.template_labels),
            ("commonAnnotations", &mut self.common_annotations),
            ("varReference", &mut self.var_reference),
            ("images", &mut self.images),
            ("replicas", &mut self.replicas),
        ]
    }

    /// Adds another configuration.
    pub(crate) fn merge(&mut self, mut other: TransformerConfig) -> Result<(), String> {
        for ((name, mine), (_, theirs)) in self.lists_mut().into_iter().zip(other.lists_mut()) {
            merge_all(mine, theirs).map_err(|e| format!("failed to merge {name} fieldSpec: {e}"))?;
        }
        for reference in &other.name_reference {
            self.merge_reference(reference)
                .map_err(|e| format!("failed to merge nameReference fieldSpec: {e}"))?;
        }
        self.sort();
        Ok(())
    }

    /// Adds what refers to one kind.
    pub(crate) fn merge_reference(&mut self, reference: &NameReference) -> Result<(), String> {
        match self
            .name_reference
            .iter_mut()
            .find(|r| r.target == reference.target)
        {
            Some(existing) => merge_all(&mut existing.referrers, &reference.referrers),
            None => {
                self.name_reference.push(reference.clone());
                Ok(())
            }
        }
    }

    /// Sorts by kind, in the order in which kustomize sorts: it decides which of two matching references is tried first.
    pub(crate) fn sort(&mut self) {
        for (_, list) in self.lists_mut() {
            list.sort_by_cached_key(|s| sort_key(&s.gvk));
        }
        self.name_reference.sort_by_cached_key(|r| sort_key(&r.target));
    }
}

fn sort_key(gvk: &Gvk) -> (i32, String) {
    let or = |s: &str, none: &'static str| {
        if s.is_empty() {
            none.to_owned()
        } else {
            s.to_owned()
        }
    };
    let text = format!(
        "{}_{}_{}",
        or(&gvk.group, "~G"),
        or(&gvk.version, "~V"),
        or(&gvk.kind, "~K")
    );
    (legacy_rank(&gvk.kind, &LEGACY_FIRST, &LEGACY_LAST), text)
}

fn parse_defaults(text: &str) -> TransformerConfig {
    let mut config = TransformerConfig::default();
    let mut section = "";
    let any = |s: &str| if s == "*" { String::new() } else { s.to_owned() };
    for line in text.lines().filter(|l| !l.starts_with('#') && !l.is_empty()) {
        if let Some(name) = line.strip_prefix('[') {
            section = name.trim_end_matches(']');
            continue;
        }
        let words: Vec<&str> = line.split(' ').collect();
        match words[..] {
            [">", kind, version, group] => {
                let target = Gvk {
                    group: any(group),
                    version: any(version),
                    kind: any(kind),
                };
                config.name_reference.push(NameReference {
                    target,
                    referrers: Vec::new(),
                });
            }
            [create, kind, version, group, path] => {
                let gvk = Gvk {
                    group: any(group),
                    version: any(version),
                    kind: any(kind),
                };
                let spec = FieldSpec {
                    gvk,
                    path: path.to_owned(),
                    create: create == "+",
                };
                if section == "nameReference" {
                    if let Some(last) = config.name_reference.last_mut() {
                        last.referrers.push(spec);
                    }
                } else if let Some((_, list)) =
                    config.lists_mut().into_iter().find(|(name, _)| *name == section)
                {
                    list.push(spec);
                }
            }
            _ => {}
        }
    }
    config
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_default_tables_are_complete() {
        let mut defaults = TransformerConfig::defaults().clone();
        let counts: Vec<(&str, usize)> = defaults
            .lists_mut()
            .into_iter()
            .map(|(n, l)| (n, l.len()))
            .collect();
        assert_eq!(
            counts,
            [
                ("namePrefix", 1),
                ("nameSuffix", 1),
                ("namespace", 3),
                ("commonLabels", 32),
                ("labels", 0),
                ("templateLabels", 10),
                ("commonAnnotations", 9),
                ("varReference", 72),
                ("images", 6),
                ("replicas", 4),
            ]
        );
        let references: usize = defaults.name_reference.iter().map(|r| r.referrers.len()).sum();
        assert_eq!((defaults.name_reference.len(), references), (16, 167));
    }
}
