//! `crds`: OpenAPI definitions whose `x-kubernetes-…` notes tell which fields hold names, labels and annotations.

use serde_json::Value as Json;

use crate::config::{NameReference, TransformerConfig};
use crate::field_spec::{FieldSpec, merge_one};
use crate::id::Gvk;

/// Definitions below each other; a schema that contains itself ends here.
const MAX_DEPTH: usize = 32;

/// Reads the notes of a file of definitions.
pub(crate) fn config_of(document: &Json) -> Result<TransformerConfig, String> {
    let mut config = TransformerConfig::default();
    let Some(definitions) = document.as_object() else {
        return Err(format!(
            "unable to parse open API definition: expected an object, found {document}"
        ));
    };
    for (name, definition) in definitions {
        let properties = properties(definition);
        if ["kind", "apiVersion", "metadata"]
            .iter()
            .all(|p| properties.is_some_and(|m| m.contains_key(*p)))
        {
            let kind = name.rsplit(['.']).next().unwrap_or(name).to_owned();
            let gvk = Gvk {
                kind,
                ..Gvk::default()
            };
            collect(&mut config, &gvk, document, name, &mut Vec::new())?;
        }
    }
    config.sort();
    Ok(config)
}

fn properties(definition: &Json) -> Option<&serde_json::Map<String, Json>> {
    definition
        .get("Schema")
        .or_else(|| definition.get("schema"))?
        .get("properties")?
        .as_object()
}

fn collect(
    config: &mut TransformerConfig,
    gvk: &Gvk,
    document: &Json,
    name: &str,
    path: &mut Vec<String>,
) -> Result<(), String> {
    if path.len() >= MAX_DEPTH {
        return Err(format!(
            "definition {name} is nested deeper than {MAX_DEPTH} levels; does it contain itself?"
        ));
    }
    let Some(properties) = document.get(name).and_then(properties) else {
        return Ok(());
    };
    for (property, schema) in properties {
        path.push(property.clone());
        let spec = |path: &[String]| FieldSpec {
            gvk: gvk.clone(),
            path: path.join("/"),
            create: false,
        };
        let note = |key: &str| schema.get(key).and_then(Json::as_str);
        if note("x-kubernetes-annotation").is_some() {
            merge_one(&mut config.common_annotations, &spec(path))?;
        }
        if note("x-kubernetes-label-selector").is_some() {
            merge_one(&mut config.common_labels, &spec(path))?;
        }
        if note("x-kubernetes-identity").is_some() {
            merge_one(&mut config.name_prefix, &spec(path))?;
        }
        if let (Some(version), Some(kind)) = (
            note("x-kubernetes-object-ref-api-version"),
            note("x-kubernetes-object-ref-kind"),
        ) {
            path.push(
                note("x-kubernetes-object-ref-name-key")
                    .unwrap_or("name")
                    .to_owned(),
            );
            let target = Gvk {
                kind: kind.to_owned(),
                version: version.to_owned(),
                group: String::new(),
            };
            config.merge_reference(&NameReference {
                target,
                referrers: vec![spec(path)],
            })?;
            path.pop();
        }
        if let Some(reference) = note("$ref") {
            collect(config, gvk, document, reference, path)?;
        }
        path.pop();
    }
    Ok(())
}
