//! The fields of a Kustomization's spec laid over its kustomization file, and the file made up where there is none.

use serde_json::{Value as Json, json};
use serin_crds::flux::kustomize::KustomizationSpec;
use serin_manifests::yaml::{ReadOptions, parse_document, write_map};
use serin_manifests::{Dialect, Limits, Map, Seq, Value};

use super::view::View;
use crate::error::Error;

/// The names that kustomize looks for, in its order.
const FILE_NAMES: [&str; 3] = ["kustomization.yaml", "kustomization.yml", "Kustomization"];
/// Directories below a path that has no kustomization file, against trees made to exhaust the walk.
const DEPTH_MAX: usize = 32;
/// Files that a made-up kustomization may list.
const FILES_MAX: usize = 10_000;

/// `spec.path` as a path inside the revision: no leading `./` or `/`, nothing above the root.
pub(crate) fn normalise(path: Option<&str>) -> Result<String, Error> {
    let path = path.unwrap_or("");
    let mut out: Vec<&str> = Vec::new();
    for element in path.split('/') {
        match element {
            "" | "." => {}
            ".." => {
                if out.pop().is_none() {
                    return Err(Error::Build(format!(
                        "spec.path '{path}' leads out of the repository"
                    )));
                }
            }
            e if e.contains(['\\', '\0']) => {
                return Err(Error::Build(format!(
                    "spec.path '{path}' is not a path of a repository"
                )));
            }
            e => out.push(e),
        }
    }
    Ok(out.join("/"))
}

fn join(directory: &str, name: &str) -> String {
    if directory.is_empty() {
        name.to_string()
    } else {
        format!("{directory}/{name}")
    }
}

/// Prepares the view: after this a build of `directory` gives what the spec asks for.
pub(crate) fn lay_over(view: &mut View<'_>, directory: &str, spec: &KustomizationSpec) -> Result<(), Error> {
    let mut found = None;
    for name in FILE_NAMES {
        let path = join(directory, name);
        if view.is_file(&path)? {
            found = Some(path);
            break;
        }
    }
    let (path, mut map) = match found {
        Some(path) if !has_overlay(spec) => {
            // As it is, so that messages give its own lines.
            drop(path);
            return Ok(());
        }
        Some(path) => {
            let map = read(view, &path)?;
            (path, map)
        }
        None => (join(directory, FILE_NAMES[0]), made_up(view, directory)?),
    };
    edit(&mut map, view, directory, spec)?;
    let mut text = String::new();
    write_map(&map, &mut text)
        .map_err(|e| Error::Build(format!("{path} with the fields of the spec: {e}")))?;
    view.put(path, text.into_bytes());
    Ok(())
}

fn has_overlay(spec: &KustomizationSpec) -> bool {
    spec.target_namespace.is_some()
        || spec.name_prefix.is_some()
        || spec.name_suffix.is_some()
        || !spec.patches.is_empty()
        || !spec.images.is_empty()
        || !spec.components.is_empty()
        || !spec.build_metadata.is_empty()
}

fn read(view: &View<'_>, path: &str) -> Result<Map, Error> {
    let text = view.read(path)?.unwrap_or_default();
    let text = String::from_utf8(text).map_err(|_| Error::Build(format!("{path} is not text")))?;
    let limits = Limits::default();
    let options = ReadOptions {
        file: path,
        line_offset: 0,
        dialect: Dialect::Kubectl,
        limits: &limits,
    };
    match parse_document(&text, &options).map_err(|e| Error::Build(e.to_string()))? {
        None => Ok(Map::new()),
        Some(Value::Map(map)) => Ok(map),
        Some(_) => Err(Error::Build(format!("{path} is not a mapping"))),
    }
}

/// All YAML files below a directory, and those of its directories that have a kustomization file of their own.
fn made_up(view: &View<'_>, directory: &str) -> Result<Map, Error> {
    let mut resources = Vec::new();
    walk(view, directory, "", 0, &mut resources)?;
    let Json::Object(object) = json!({"apiVersion": "kustomize.config.k8s.io/v1beta1", "kind": "Kustomization", "resources": resources})
    else {
        return Ok(Map::new());
    };
    match Value::from_json(&Json::Object(object)) {
        Value::Map(map) => Ok(map),
        _ => Ok(Map::new()),
    }
}

fn walk(view: &View<'_>, root: &str, below: &str, depth: usize, out: &mut Vec<String>) -> Result<(), Error> {
    let here = join(root, below);
    let here = here.trim_end_matches('/');
    let Some(entries) = view.list(here)? else {
        return Err(Error::Build(format!(
            "kustomization path not found: '{here}' is not a directory of the revision"
        )));
    };
    if depth > DEPTH_MAX || out.len() > FILES_MAX {
        return Err(Error::Build(format!(
            "'{here}': more than {DEPTH_MAX} levels or {FILES_MAX} files without a kustomization file; add one that lists what is meant"
        )));
    }
    for (name, directory) in entries {
        let path = join(below, &name);
        if directory {
            let inside = join(root, &path);
            let own = FILE_NAMES
                .iter()
                .map(|n| view.is_file(&join(&inside, n)))
                .collect::<Result<Vec<_>, _>>()?;
            if own.contains(&true) {
                out.push(path);
            } else {
                walk(view, root, &path, depth + 1, out)?;
            }
        } else if matches!(name.rsplit_once('.'), Some((_, "yaml" | "yml"))) {
            out.push(path);
        }
    }
    Ok(())
}

fn append(map: &mut Map, key: &str, items: impl IntoIterator<Item = Json>) {
    let mut all: Vec<Value> = map
        .get(key)
        .and_then(Value::as_seq)
        .map(<[Value]>::to_vec)
        .unwrap_or_default();
    all.extend(items.into_iter().map(|i| Value::from_json(&i)));
    if !all.is_empty() {
        map.set(
            key,
            Value::Seq(Seq {
                items: all,
                ..Seq::default()
            }),
        );
    }
}

fn edit(map: &mut Map, view: &View<'_>, directory: &str, spec: &KustomizationSpec) -> Result<(), Error> {
    for (key, value) in [
        ("namespace", &spec.target_namespace),
        ("namePrefix", &spec.name_prefix),
        ("nameSuffix", &spec.name_suffix),
    ] {
        if let Some(value) = value.as_ref().filter(|v| !v.is_empty()) {
            map.set(key, Value::string(value.as_str()));
        }
    }
    append(
        map,
        "patches",
        spec.patches
            .iter()
            .map(|p| json!({"patch": p.patch, "target": p.target}))
            .map(without_nulls),
    );
    append(map, "buildMetadata", spec.build_metadata.iter().map(|m| json!(m)));
    let mut components = Vec::new();
    for component in &spec.components {
        let path = normalise(Some(&join(directory, component)))?;
        if spec.ignore_missing_components == Some(true) && !view.is_directory(&path)? {
            continue;
        }
        components.push(json!(component));
    }
    append(map, "components", components);
    for image in &spec.images {
        images(map, image);
    }
    Ok(())
}

fn without_nulls(mut value: Json) -> Json {
    if let Some(map) = value.as_object_mut() {
        map.retain(|_, v| !v.is_null());
    }
    value
}

/// Merged by name; a tag set here clears a digest set there, and the reverse.
fn images(map: &mut Map, image: &serin_crds::flux::kustomize::Image) {
    let mut all: Vec<Json> = map
        .get("images")
        .and_then(Value::as_seq)
        .map(|items| items.iter().filter_map(|i| i.to_json().ok()).collect())
        .unwrap_or_default();
    let wanted = without_nulls(
        json!({"name": image.name, "newName": image.new_name, "newTag": image.new_tag, "digest": image.digest}),
    );
    match all.iter_mut().find(|i| i["name"] == image.name.as_str()) {
        Some(Json::Object(held)) => {
            if image.new_tag.is_some() || image.digest.is_some() {
                held.remove("newTag");
                held.remove("digest");
            }
            if let Json::Object(wanted) = wanted {
                held.extend(wanted);
            }
        }
        _ => all.push(wanted),
    }
    map.set(
        "images",
        Value::Seq(Seq {
            items: all.iter().map(Value::from_json).collect(),
            ..Seq::default()
        }),
    );
}
