//! Where a resource comes from, as `buildMetadata: [originAnnotations, transformerAnnotations]` writes it.

use crate::tree::join;

/// The annotation that tells the origin.
pub(crate) const ORIGIN_ANNOTATION: &str = "config.kubernetes.io/origin";
/// The annotation that tells the transformers.
pub(crate) const TRANSFORMATIONS_ANNOTATION: &str = "alpha.config.kubernetes.io/transformations";

/// Where something comes from.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Origin {
    /// The file, relative to the root of the build.
    pub path: String,
    /// The file that configures the generator or transformer.
    pub configured_in: String,
    /// The configuration: apiVersion, kind, name, namespace.
    pub configured_by: Option<[String; 4]>,
}

impl Origin {
    /// The origin of something below this one.
    pub(crate) fn append(&self, path: &str) -> Origin {
        Origin {
            path: join_lexically(&self.path, path),
            ..self.clone()
        }
    }

    /// The origin of what a builtin transformer or generator of a kustomization does.
    pub(crate) fn builtin(&self, file: &str, kind: &str) -> Origin {
        Origin {
            path: String::new(),
            configured_in: join_lexically(&self.path, file),
            configured_by: Some(["builtin".into(), kind.into(), String::new(), String::new()]),
        }
    }

    /// The origin as YAML.
    pub(crate) fn to_yaml(&self) -> String {
        let mut out = String::new();
        self.write("", "", &mut out);
        if out.is_empty() { "{}\n".into() } else { out }
    }

    fn write(&self, first: &str, indent: &str, out: &mut String) {
        let mut lines: Vec<String> = Vec::new();
        if !self.path.is_empty() {
            lines.push(format!("path: {}", scalar(&self.path)));
        }
        if !self.configured_in.is_empty() {
            lines.push(format!("configuredIn: {}", scalar(&self.configured_in)));
        }
        if let Some(by) = &self.configured_by {
            lines.push("configuredBy:".into());
            for (key, value) in ["apiVersion", "kind", "name", "namespace"].iter().zip(by) {
                if !value.is_empty() {
                    lines.push(format!("  {key}: {}", scalar(value)));
                }
            }
        }
        for (i, line) in lines.iter().enumerate() {
            out.push_str(if i == 0 { first } else { indent });
            out.push_str(line);
            out.push('\n');
        }
    }
}

/// A list of origins as YAML.
pub(crate) fn list_to_yaml(origins: &[Origin]) -> String {
    let mut out = String::new();
    for origin in origins {
        origin.write("- ", "  ", &mut out);
    }
    out
}

fn scalar(text: &str) -> String {
    let value = serin_manifests::Value::string(text);
    serin_manifests::yaml::write_value(&value).map_or_else(|_| text.to_owned(), |t| t.trim_end().to_owned())
}

/// Joins paths as text; `..` above the start stays.
fn join_lexically(base: &str, path: &str) -> String {
    let joined = if base.is_empty() {
        path.to_owned()
    } else {
        format!("{base}/{path}")
    };
    if let Some(clean) = join("", &joined) {
        return clean;
    }
    let mut parts: Vec<&str> = Vec::new();
    for part in joined.split('/') {
        match part {
            "" | "." => {}
            ".." if parts.last().is_some_and(|p| *p != "..") => {
                parts.pop();
            }
            other => parts.push(other),
        }
    }
    parts.join("/")
}
