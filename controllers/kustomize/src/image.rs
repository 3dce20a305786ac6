//! Image references: matching by name, and what becomes of tag and digest.

use regex::Regex;
use serin_manifests::{Map, Tag, Value};

use crate::error::Result;
use crate::field_spec::{Create, Walk, set_scalar, wrong_kind};
use crate::kustomization::Image;
use crate::selector::compile;

/// A rule of `images`, ready to be used.
#[derive(Debug)]
pub(crate) struct ImageRule {
    image: Image,
    pattern: Regex,
}

impl ImageRule {
    /// The name is a regular expression, anchored at both ends.
    pub(crate) fn new(image: Image, max_regex: usize) -> Result<ImageRule> {
        let pattern = format!(
            "^{}(:[a-zA-Z0-9_.{{}}-]*)?(@sha256:[a-zA-Z0-9_.{{}}-]*)?$",
            image.name
        );
        Ok(ImageRule {
            pattern: compile(&pattern, max_regex)?,
            image,
        })
    }

    /// Everything called `containers` or `initContainers`, wherever it is, then the configured fields.
    pub(crate) fn run(&self, root: &mut Map, walks: &[Walk]) -> std::result::Result<(), String> {
        self.in_map(root)?;
        let text = |m: &Map, key: &str| {
            m.get(key)
                .map_or(String::new(), |v| crate::resource::raw_text(v).to_owned())
        };
        let (api_version, kind) = (text(root, "apiVersion"), text(root, "kind"));
        let (group, version) = serin_manifests::split_api_version(&api_version);
        for walk in walks.iter().filter(|w| w.applies_to(group, version, &kind)) {
            walk.visit(root, Create::Never, &mut |v| self.set(v))?;
        }
        Ok(())
    }

    fn in_map(&self, map: &mut Map) -> std::result::Result<(), String> {
        for entry in &mut map.entries {
            self.in_value(&mut entry.value)?;
            if matches!(&*entry.key.text, "containers" | "initContainers")
                && let Value::Seq(seq) = &mut entry.value
            {
                for item in &mut seq.items {
                    match item {
                        Value::Map(container) => {
                            if let Some(image) = container.get_mut("image") {
                                self.set(image)?;
                            }
                        }
                        v if v.is_null() => {}
                        other => return Err(wrong_kind("mapping", other)),
                    }
                }
            }
        }
        Ok(())
    }

    fn in_value(&self, value: &mut Value) -> std::result::Result<(), String> {
        match value {
            Value::Map(map) => self.in_map(map),
            Value::Seq(seq) => seq.items.iter_mut().try_for_each(|v| self.in_value(v)),
            Value::Scalar(_) => Ok(()),
        }
    }

    fn set(&self, value: &mut Value) -> std::result::Result<(), String> {
        let Value::Scalar(scalar) = value else {
            return Err(wrong_kind("scalar", value));
        };
        if !self.pattern.is_match(&scalar.text) {
            return Ok(());
        }
        let new = self.rewrite(&scalar.text);
        set_scalar(value, &new, Tag::Unset)
    }

    fn rewrite(&self, reference: &str) -> String {
        let rule = &self.image;
        let (name, tag, digest) = split(reference);
        let name = if rule.new_name.is_empty() {
            name
        } else {
            &rule.new_name
        };
        let (tag, digest) = match (rule.new_tag.is_empty(), rule.digest.is_empty()) {
            (false, false) => (rule.new_tag.clone(), rule.digest.as_str()),
            (false, true) => (rule.new_tag.clone(), ""),
            (true, false) => (String::new(), rule.digest.as_str()),
            (true, true) if !rule.tag_suffix.is_empty() => (format!("{tag}{}", rule.tag_suffix), ""),
            (true, true) => (tag.to_owned(), digest),
        };
        let mut out = name.to_owned();
        for (separator, part) in [(':', tag.as_str()), ('@', digest)] {
            if !part.is_empty() {
                out.push(separator);
                out.push_str(part);
            }
        }
        out
    }
}

/// Name, tag and digest of a reference. A colon before the first slash belongs to a port.
fn split(reference: &str) -> (&str, &str, &str) {
    let start = match reference.find('/') {
        Some(i) if i > 0 => i,
        _ => 0,
    };
    let at = reference[start..].find('@').map(|i| i + start);
    let colon = reference[start..].find(':').map(|i| i + start);
    match (at, colon) {
        (None, None) => (reference, "", ""),
        (Some(a), c) if c.is_none_or(|c| a < c) => (&reference[..a], "", &reference[a + 1..]),
        (Some(a), Some(c)) => (&reference[..c], &reference[c + 1..a], &reference[a + 1..]),
        (_, Some(c)) => (&reference[..c], &reference[c + 1..], ""),
        (Some(a), None) => (&reference[..a], "", &reference[a + 1..]),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn references_are_split_and_rewritten() {
        assert_eq!(split("nginx"), ("nginx", "", ""));
        assert_eq!(split("host:5000/a/b:1"), ("host:5000/a/b", "1", ""));
        assert_eq!(split("a@sha256:xx"), ("a", "", "sha256:xx"));
        assert_eq!(split("a:1@sha256:xx"), ("a", "1", "sha256:xx"));
        let cases: &[(Image, &str, &str)] = &[
            (
                Image {
                    name: "nginx".into(),
                    new_tag: "2".into(),
                    ..Image::default()
                },
                "nginx@sha256:ab",
                "nginx:2",
            ),
            (
                Image {
                    name: "nginx".into(),
                    digest: "sha256:ff".into(),
                    ..Image::default()
                },
                "nginx:1",
                "nginx@sha256:ff",
            ),
            (
                Image {
                    name: "nginx".into(),
                    tag_suffix: "-x".into(),
                    ..Image::default()
                },
                "nginx:1",
                "nginx:1-x",
            ),
            (
                Image {
                    name: "nginx".into(),
                    new_name: "r/n".into(),
                    ..Image::default()
                },
                "nginx:1@sha256:ab",
                "r/n:1@sha256:ab",
            ),
            (
                Image {
                    name: "ngin".into(),
                    new_tag: "2".into(),
                    ..Image::default()
                },
                "nginx:1",
                "nginx:1",
            ),
        ];
        for (image, from, want) in cases {
            let rule = ImageRule::new(image.clone(), 1 << 18).unwrap();
            let mut value = Value::string(*from);
            rule.set(&mut value).unwrap();
            assert_eq!(value.text(), Some(*want), "{image:?}");
        }
    }
}
