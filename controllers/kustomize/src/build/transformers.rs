//! Which transformers a kustomization asks for, and their application.

use serin_manifests::Place;

use super::{Builder, Target};
use crate::accumulator::Accumulator;
use crate::config::TransformerConfig;
use crate::error::{Cause, Result};
use crate::field_spec::{FieldSpec, merge_all, merge_one};
use crate::kustomization::Label;
use crate::origin::Origin;
use crate::resource::Resource;
use crate::transform::{SubjectMode, Transformer};

impl Builder<'_> {
    pub(super) fn run_transformers(&mut self, target: &Target, acc: &mut Accumulator) -> Result<()> {
        let transformers = self.builtin_transformers(target, acc)?;
        for (transformer, place) in &transformers {
            let origin = target
                .origin
                .as_ref()
                .map(|o| o.builtin(target.file_name, transformer.kind()));
            self.apply(transformer, origin, target, acc)
                .map_err(|e| e.at_option(place.clone()))?;
        }
        if target.k.transformers.is_empty() {
            return Ok(());
        }
        // All configurations are read before any of them is applied.
        let mut configured = Vec::new();
        for config in self.plugin_configs(target, &target.k.transformers)? {
            let place = place_of(&config);
            let transformer = self
                .with_workshop(target, |w| w.transformer(&config))
                .map_err(|e| e.at_option(place.clone()))?;
            configured.push((transformer, plugin_origin(&config), place));
        }
        for (transformer, origin, place) in configured {
            self.apply(&transformer, origin, target, acc)
                .map_err(|e| e.at_option(place))?;
        }
        Ok(())
    }

    fn apply(
        &mut self,
        transformer: &Transformer,
        origin: Option<Origin>,
        target: &Target,
        acc: &mut Accumulator,
    ) -> Result<()> {
        self.traced(transformer.kind(), &target.file, &mut acc.map, |map, env| {
            transformer.apply(map, env)?;
            map.drop_empty();
            Ok(())
        })?;
        if let (true, Some(origin)) = (self.with_origin, origin) {
            for r in acc.map.contents_mut() {
                match &r.origin {
                    None => r.origin = Some(origin.clone()),
                    Some(_) => r.transformations.push(origin.clone()),
                }
            }
        }
        Ok(())
    }

    /// The transformers of the fields of a kustomization, in their fixed order, with the entry that each comes from.
    fn builtin_transformers(
        &self,
        target: &Target,
        acc: &Accumulator,
    ) -> Result<Vec<(Transformer, Option<Place>)>> {
        let k = &target.k;
        let config = acc.config();
        self.with_workshop(target, |w| {
            let mut out = Vec::new();
            if !k.patches_strategic_merge.is_empty() {
                out.push((w.strategic_merge(&k.patches_strategic_merge)?, None));
            }
            for patch in &k.patches {
                out.push((w.patch(patch)?, patch.place.clone()));
            }
            if !k.namespace.is_empty() {
                out.push((
                    Transformer::Namespace {
                        namespace: k.namespace.clone(),
                        specs: config.namespace.clone(),
                        unset_only: false,
                        subjects: SubjectMode::DefaultOnly,
                    },
                    None,
                ));
            }
            if !k.name_prefix.is_empty() {
                out.push((
                    Transformer::Prefix {
                        text: k.name_prefix.clone(),
                        specs: config.name_prefix.clone(),
                    },
                    None,
                ));
            }
            if !k.name_suffix.is_empty() {
                out.push((
                    Transformer::Suffix {
                        text: k.name_suffix.clone(),
                        specs: config.name_suffix.clone(),
                    },
                    None,
                ));
            }
            if !k.labels.is_empty() || !k.common_labels.is_empty() {
                for label in &k.labels {
                    let specs = label_specs(label, config)
                        .map_err(|m| Cause::Transformer(format!("failed to merge labels: {m}")))?;
                    out.push((
                        Transformer::Labels {
                            pairs: label.pairs.clone(),
                            specs,
                        },
                        None,
                    ));
                }
                out.push((
                    Transformer::Labels {
                        pairs: k.common_labels.clone(),
                        specs: config.common_labels.clone(),
                    },
                    None,
                ));
            }
            if !k.common_annotations.is_empty() {
                let (pairs, specs) = (k.common_annotations.clone(), config.common_annotations.clone());
                out.push((Transformer::Annotations { pairs, specs }, None));
            }
            for patch in &k.patches_json6902 {
                out.push((w.json6902(patch)?, patch.place.clone()));
            }
            for replica in &k.replicas {
                out.push((
                    Transformer::Replicas {
                        replica: replica.clone(),
                        specs: config.replicas.clone(),
                    },
                    None,
                ));
            }
            for image in &k.images {
                out.push((w.image(image.clone(), config.images.clone())?, None));
            }
            if !k.replacements.is_empty() {
                let only = match &k.replacements[..] {
                    [only] => only.place.clone(),
                    _ => None,
                };
                out.push((w.replacements(&k.replacements)?, only));
            }
            Ok(out)
        })
    }

    pub(super) fn run_validators(&mut self, target: &Target, acc: &mut Accumulator) -> Result<()> {
        if target.k.validators.is_empty() {
            return Ok(());
        }
        for config in self.plugin_configs(target, &target.k.validators)? {
            let validator = self.with_workshop(target, |w| w.transformer(&config))?;
            let mut copy = acc.map.clone();
            validator.apply(&mut copy, &self.env())?;
            let same = copy.len() == acc.map.len()
                && copy
                    .resources()
                    .iter()
                    .zip(acc.map.resources())
                    .all(|(a, b)| a.root == b.root);
            if !same {
                let message = format!(
                    "validator shouldn't modify the resource map: {}",
                    config.id(&self.schemas)
                );
                return Err(Cause::Transformer(message).into());
            }
        }
        Ok(())
    }
}

/// Where the configuration of a generator or transformer begins.
pub(super) fn place_of(config: &Resource) -> Option<Place> {
    let source = config.source.as_ref()?;
    Some(Place {
        file: source.file.to_string(),
        line: source.line,
        ..Place::default()
    })
}

pub(super) fn plugin_origin(config: &Resource) -> Option<Origin> {
    let origin = config.origin.as_ref()?;
    let by = [
        config.api_version(),
        config.kind(),
        config.name(),
        config.namespace(),
    ]
    .map(str::to_owned);
    Some(Origin {
        path: String::new(),
        configured_in: origin.path.clone(),
        configured_by: Some(by),
    })
}

fn label_specs(label: &Label, config: &TransformerConfig) -> std::result::Result<Vec<FieldSpec>, String> {
    let mut specs = label.fields.clone();
    merge_all(&mut specs, &config.labels)?;
    if label.include_selectors {
        merge_all(&mut specs, &config.common_labels)?;
    } else {
        if label.include_templates {
            merge_all(&mut specs, &config.template_labels)?;
        }
        merge_one(&mut specs, &FieldSpec::everywhere("metadata/labels"))?;
    }
    Ok(specs)
}
