//! ConfigMaps and Secrets of literals, files and env files; and the hash of their content.

use base64::Engine as _;
use serin_manifests::yaml::write_json;
use serin_manifests::{Map, Scalar, Style, Tag, Value};
use sha2::{Digest, Sha256};

use crate::error::{Cause, Error, Result};
use crate::kustomization::{GeneratorArgs, GeneratorOptions};
use crate::loader::Loader;
use crate::options::EncryptedUse;
use crate::resource::{Behavior, Resource};

/// A configMapGenerator or secretGenerator at work in a directory.
pub(crate) struct Generator<'l, 't> {
    pub loader: &'l Loader<'t>,
    pub root: &'l str,
    pub secret: bool,
}

impl Generator<'_, '_> {
    /// Makes the resource.
    pub(crate) fn generate(
        &self,
        args: &GeneratorArgs,
        global: Option<&GeneratorOptions>,
    ) -> Result<Resource> {
        let fail = |e: Error| e.at_option(args.place.clone());
        let options = merge_options(args.options.as_ref(), global);
        let mut root = Map::new();
        root.push("apiVersion", Value::Scalar(Scalar::untyped("v1")));
        root.push(
            "kind",
            Value::Scalar(Scalar::untyped(if self.secret { "Secret" } else { "ConfigMap" })),
        );
        if args.name.is_empty() {
            return Err(fail(
                Cause::Generator("a configmap must have a name".into()).into(),
            ));
        }
        let mut metadata = Map::new();
        metadata.push("name", Value::string(args.name.as_str()));
        if !args.namespace.is_empty() {
            metadata.push("namespace", Value::string(args.namespace.as_str()));
        }
        if let Some(options) = &options {
            for (key, pairs) in [("labels", &options.labels), ("annotations", &options.annotations)] {
                if let Some(pairs) = pairs.as_ref().filter(|p| !p.is_empty()) {
                    let mut pairs = pairs.clone();
                    pairs.sort();
                    metadata.push(key, Value::string_map(pairs));
                }
            }
        }
        root.push("metadata", Value::Map(metadata));
        if self.secret {
            let kind = if args.kind.is_empty() {
                "Opaque"
            } else {
                &args.kind
            };
            root.push("type", Value::string(kind));
        }
        let pairs = self.pairs(args).map_err(fail)?;
        self.fill(&mut root, pairs);
        if options.as_ref().is_some_and(|o| o.immutable) {
            root.push("immutable", Value::bool(true));
        }
        let mut resource = Resource::new(root, None);
        resource.needs_hash = !options.is_some_and(|o| o.disable_name_suffix_hash);
        resource.behavior = Some(match args.behavior.as_str() {
            "create" => Behavior::Create,
            "replace" => Behavior::Replace,
            "merge" => Behavior::Merge,
            _ => Behavior::Unspecified,
        });
        Ok(resource)
    }

    fn fill(&self, root: &mut Map, mut pairs: Vec<(String, Vec<u8>)>) {
        pairs.sort_by(|a, b| a.0.cmp(&b.0));
        if self.secret {
            let data = pairs.into_iter().map(|(k, v)| (k, encode_base64(&v)));
            let mut map = Map::new();
            for (key, text) in data {
                map.push(&key, Value::Scalar(text_scalar(text)));
            }
            root.push("data", Value::Map(map));
            return;
        }
        let (mut data, mut binary) = (Map::new(), Map::new());
        for (key, bytes) in pairs {
            match String::from_utf8(bytes) {
                Ok(text) => data.push(&key, Value::Scalar(text_scalar(text))),
                Err(e) => binary.push(&key, Value::Scalar(text_scalar(encode_base64(e.as_bytes())))),
            }
        }
        for (field, map) in [("data", data), ("binaryData", binary)] {
            if !map.is_empty() {
                root.push(field, Value::Map(map));
            }
        }
    }

    /// Only files of secrets are opened: what a ConfigMap is made of stays as it is.
    fn load(&self, path: &str, wanted: EncryptedUse) -> Result<(std::sync::Arc<[u8]>, String)> {
        if self.secret {
            self.loader.load_opened(self.root, path, wanted)
        } else {
            self.loader.load(self.root, path)
        }
    }

    fn pairs(&self, args: &GeneratorArgs) -> Result<Vec<(String, Vec<u8>)>> {
        let mut pairs: Vec<(String, Vec<u8>)> = Vec::new();
        for path in &args.envs {
            let (content, file) = self.load(path, EncryptedUse::Env)?;
            env_pairs(&content, &file, &mut pairs)?;
        }
        for literal in &args.literals {
            pairs.push(literal_pair(literal)?);
        }
        for source in &args.files {
            let (key, path) = file_source(source)?;
            let (content, _) = self.load(path, EncryptedUse::File)?;
            pairs.push((key.to_owned(), content.to_vec()));
        }
        let mut seen = std::collections::HashSet::new();
        for (key, _) in &pairs {
            if !seen.insert(key.as_str()) {
                let message = format!("configmap {} illegally repeats the key `{key}`", args.name);
                return Err(Cause::Generator(message).into());
            }
        }
        Ok(pairs)
    }
}

fn text_scalar(text: String) -> Scalar {
    let style = if text.contains('\n') {
        Style::Literal
    } else {
        Style::Plain
    };
    Scalar {
        style,
        ..Scalar::string(text)
    }
}

/// Local options win; of the global ones, flags that are set and keys that are missing are added.
fn merge_options(
    local: Option<&GeneratorOptions>,
    global: Option<&GeneratorOptions>,
) -> Option<GeneratorOptions> {
    let Some(global) = global else {
        return local.cloned();
    };
    let mut out = local.cloned().unwrap_or_default();
    for (mine, theirs) in [
        (&mut out.labels, &global.labels),
        (&mut out.annotations, &global.annotations),
    ] {
        if let Some(theirs) = theirs {
            let mine = mine.get_or_insert_with(Vec::new);
            for (k, v) in theirs {
                if !mine.iter().any(|(key, _)| key == k) {
                    mine.push((k.clone(), v.clone()));
                }
            }
        }
    }
    out.disable_name_suffix_hash |= global.disable_name_suffix_hash;
    out.immutable |= global.immutable;
    Some(out)
}

fn literal_pair(literal: &str) -> Result<(String, Vec<u8>)> {
    match literal.split_once('=') {
        Some((key, value)) if !key.is_empty() => Ok((key.to_owned(), unquote(value).as_bytes().to_vec())),
        _ => Err(Cause::Generator(format!("invalid literal source {literal}, expected key=value")).into()),
    }
}

fn unquote(value: &str) -> &str {
    let b = value.as_bytes();
    if b.len() >= 2 && b[0] == b[b.len() - 1] && matches!(b[0], b'"' | b'\'') {
        &value[1..value.len() - 1]
    } else {
        value
    }
}

fn file_source(source: &str) -> Result<(&str, &str)> {
    let fail = |message: String| Err(Cause::Generator(message).into());
    match source.matches('=').count() {
        0 => Ok((source.rsplit('/').next().unwrap_or(source), source)),
        1 => match source.split_once('=') {
            Some(("", path)) => fail(format!(
                "missing key name for file path \"{path}\" in source \"{source}\""
            )),
            Some((key, "")) => fail(format!(
                "missing file path for key name \"{key}\" in source \"{source}\""
            )),
            Some(pair) => Ok(pair),
            None => Ok((source, source)),
        },
        _ => fail(format!("source \"{source}\" key name or file path contains '='")),
    }
}

fn env_pairs(content: &[u8], file: &str, pairs: &mut Vec<(String, Vec<u8>)>) -> Result<()> {
    let content = content.strip_prefix(b"\xEF\xBB\xBF").unwrap_or(content);
    for (number, line) in content.split(|&b| b == b'\n').enumerate() {
        let line = line.strip_suffix(b"\r").unwrap_or(line);
        let Ok(line) = std::str::from_utf8(line) else {
            let message = format!("line {} of '{file}' has invalid utf8 bytes", number + 1);
            return Err(Cause::Generator(message).into());
        };
        let line = line.trim_start();
        if line.is_empty() || line.starts_with('#') {
            continue;
        }
        let (key, value) = line.split_once('=').unwrap_or((line, ""));
        if !key.is_empty() {
            pairs.push((key.to_owned(), value.as_bytes().to_vec()));
        }
    }
    Ok(())
}

/// Base64 in lines of 70 characters, a line end after each, when there is more than one.
pub(crate) fn encode_base64(bytes: &[u8]) -> String {
    let text = base64::engine::general_purpose::STANDARD.encode(bytes);
    let lines = text.len() / 70 + 1;
    if lines == 1 {
        return text;
    }
    let mut out = String::with_capacity(text.len() + lines);
    for chunk in text.as_bytes().chunks(70) {
        out.push_str(std::str::from_utf8(chunk).unwrap_or(""));
        out.push('\n');
    }
    out
}

/// The hash that is added to the name: of kind, data and (for a Secret) type. The name does not count.
pub(crate) fn content_hash(resource: &Resource) -> std::result::Result<String, String> {
    let field = |name: &str| -> Value {
        match resource.root.get(name) {
            None => Value::string(""),
            Some(Value::Scalar(s)) => Value::string(&*s.text),
            Some(other) => other.clone(),
        }
    };
    let mut input = Map::new();
    let (extra, kind) = match resource.kind() {
        "Secret" => {
            input.push("type", field("type"));
            ("stringData", "Secret")
        }
        "ConfigMap" => ("binaryData", "ConfigMap"),
        _ => return hash_other(&resource.root),
    };
    input.push("kind", Value::string(kind));
    input.push("name", Value::string(""));
    input.push("data", field("data"));
    if let Some(map @ Value::Map(_)) = resource.root.get(extra) {
        input.push(extra, map.clone());
    }
    let mut input = Value::Map(input);
    crate::resource::through_json(&mut input)?;
    Ok(encode_hash(&write_json(&input)?))
}

/// Only ConfigMaps and Secrets have a defined hash; a patch that changes the kind of one gets a hash of its whole content.
fn hash_other(root: &Map) -> std::result::Result<String, String> {
    Ok(encode_hash(&write_json(&Value::Map(root.clone()))?))
}

fn encode_hash(text: &str) -> String {
    let digest = Sha256::digest(text.as_bytes());
    let nibbles = digest.iter().take(5).flat_map(|b| [b >> 4, b & 15]);
    nibbles
        .filter_map(|n| char::from_digit(u32::from(n), 16))
        .map(|c| match c {
            '0' => 'g',
            '1' => 'h',
            '3' => 'k',
            'a' => 'm',
            'e' => 't',
            other => other,
        })
        .collect()
}

/// A generated resource meets one of the same identity.
pub(crate) fn combine(mut new: Resource, old: &Resource) -> Resource {
    let merge = new.behavior == Some(Behavior::Merge);
    for key in ["labels", "annotations"] {
        let mut pairs = old.string_map(key);
        pairs.extend(new.string_map(key));
        let mut merged: Vec<(String, String)> = Vec::with_capacity(pairs.len());
        for (k, v) in pairs {
            match merged.iter_mut().find(|(key, _)| *key == k) {
                Some(slot) => slot.1 = v,
                None => merged.push((k, v)),
            }
        }
        new.set_string_map(key, merged);
    }
    let (name, namespace) = (old.name().to_owned(), old.namespace().to_owned());
    new.set_name(&name);
    new.set_namespace(&namespace);
    // Notes of the old one win where both have them; the wish for a hash is that of the new one.
    new.needs_hash = old.needs_hash && new.needs_hash;
    new.behavior = old.behavior;
    new.previous.clone_from(&old.previous);
    new.prefixes.clone_from(&old.prefixes);
    new.suffixes.clone_from(&old.suffixes);
    new.variables.clone_from(&old.variables);
    new.allow_name_change = old.allow_name_change;
    new.allow_kind_change = old.allow_kind_change;
    new.transformations.clone_from(&old.transformations);
    new.source = new.source.or_else(|| old.source.clone());
    if merge {
        new.origin = old.origin.clone().or(new.origin);
        for field in ["data", "binaryData"] {
            merge_data(&mut new.root, &old.root, field);
        }
    }
    new
}

fn merge_data(new: &mut Map, old: &Map, field: &str) {
    let mut merged: std::collections::BTreeMap<String, String> = std::collections::BTreeMap::new();
    for side in [Some(old), Some(&*new)].into_iter().flatten() {
        if let Some(map) = side.get(field).and_then(Value::as_map) {
            for (k, v) in map.iter() {
                merged.insert(k.to_owned(), v.text().unwrap_or("").to_owned());
            }
        }
    }
    new.remove(field);
    if merged.is_empty() {
        return;
    }
    let mut map = Map::new();
    for (key, text) in merged {
        map.push(
            &key,
            Value::Scalar(Scalar {
                tag: Tag::Str,
                ..text_scalar(text)
            }),
        );
    }
    new.push(field, Value::Map(map));
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tree::MemoryTree;
    use crate::{LoadRestrictor, Options};

    fn hash(secret: bool, literals: &[&str]) -> String {
        let tree = MemoryTree::new();
        let options = Options {
            load_restrictor: LoadRestrictor::RootOnly,
            ..Options::default()
        };
        let loader = Loader::new(&tree, &options);
        let generator = Generator {
            loader: &loader,
            root: "",
            secret,
        };
        let args = GeneratorArgs {
            name: "n".into(),
            literals: literals.iter().map(|l| (*l).to_owned()).collect(),
            ..GeneratorArgs::default()
        };
        content_hash(&generator.generate(&args, None).unwrap()).unwrap()
    }

    #[test]
    fn hashes_are_those_of_kustomize() {
        assert_eq!(hash(false, &["k=<b>&x"]), "6gdg2bh7h7");
        assert_eq!(hash(false, &[]), "6ct58987ht");
        assert_eq!(hash(true, &["u=v"]), "8f56k68htf");
    }

    #[test]
    fn a_literal_loses_one_pair_of_matching_quotes() {
        assert_eq!(literal_pair("a='\"x\"'").unwrap().1, b"\"x\"");
        assert_eq!(literal_pair("a=\"x'").unwrap().1, b"\"x'");
        assert_eq!(literal_pair("a=b=c").unwrap().1, b"b=c");
        assert!(literal_pair("=x").is_err() && literal_pair("x").is_err());
    }

    #[test]
    fn an_env_line_without_equals_has_an_empty_value() {
        let mut pairs = Vec::new();
        env_pairs(b"\xEF\xBB\xBFA=1\r\n  # c\n\n  B\nC= x =y\n", "e", &mut pairs).unwrap();
        let text: Vec<(String, String)> = pairs
            .into_iter()
            .map(|(k, v)| (k, String::from_utf8(v).unwrap()))
            .collect();
        assert_eq!(
            text,
            [
                ("A".into(), "1".into()),
                ("B".into(), String::new()),
                ("C".into(), " x =y".into())
            ]
        );
    }
}
