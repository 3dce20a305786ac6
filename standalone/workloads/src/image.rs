//! The image catalogue: which local program an image reference stands for.
//!
//! There is no container runtime underneath; an image is a promise of a program, and the catalogue keeps it. Entries
//! are `Image` objects (`serin.dev/v1alpha1`, cluster-scoped) plus a list that the program ships. References are
//! compared after Docker's normalisation (`nginx` is `docker.io/library/nginx:latest`); `*` in an entry stands for any
//! run of characters. The most literal entry wins: exact before wildcard, longer before shorter, the user's before
//! the built-in.

use std::path::PathBuf;

use kube::Api;
use kube::api::{ApiResource, DeleteParams, DynamicObject, GroupVersionKind, Patch, PatchParams};
use serde::{Deserialize, Serialize};

use crate::Error;

/// One entry: `spec` of an `Image`.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct ImageSpec {
    /// Image reference, possibly with wildcards: `docker.io/istio/examples-bookinfo-reviews-v1:*`.
    pub reference: String,
    /// The program: a path on this machine, or a name looked up in the container's PATH.
    pub program: String,
    /// Arguments in front of the container's own `args` (an image's ENTRYPOINT beyond the program).
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub args: Vec<String>,
    /// Default arguments, replaced by the container's `args` (an image's CMD).
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub default_args: Vec<String>,
    /// Environment under the container's own (an image's ENV).
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub env: Vec<ImageEnv>,
    /// Working directory (an image's WORKDIR).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub working_dir: Option<PathBuf>,
    /// Programs that the image would contain beside its entrypoint: what `command: [./podinfo, …]` and the command of
    /// an exec probe (`podcli …`) stand for. Compared with the command as written and with its last path element.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub commands: Vec<ImageCommand>,
}

/// A variable of [`ImageSpec::env`].
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct ImageEnv {
    /// Name of the variable.
    pub name: String,
    /// Its value.
    pub value: String,
}

/// A program of [`ImageSpec::commands`].
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct ImageCommand {
    /// The name under which manifests call it.
    pub name: String,
    /// The program on this machine.
    pub program: String,
    /// Arguments in front of the manifest's.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub args: Vec<String>,
}

/// A program with its arguments, the zeroth included.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Invocation {
    /// What is executed.
    pub program: String,
    /// Its arguments, the zeroth included.
    pub argv: Vec<String>,
}

impl ImageSpec {
    /// What a container with this image runs. `command` replaces the entrypoint and drops the image's default
    /// arguments; `args` replace those only. As for an OCI image.
    pub fn invocation(&self, command: &[String], args: &[String]) -> Invocation {
        if let Some((first, rest)) = command.split_first() {
            let mut invocation = self.command(first);
            invocation.argv.extend(rest.iter().chain(args).cloned());
            return invocation;
        }
        let own = if args.is_empty() { &self.default_args } else { args };
        let mut argv = vec![self.program.clone()];
        argv.extend(self.args.iter().chain(own).cloned());
        Invocation {
            program: self.program.clone(),
            argv,
        }
    }

    /// What a command word means in this image: one of [`ImageSpec::commands`], or the word itself.
    pub fn command(&self, word: &str) -> Invocation {
        let last = word.rsplit('/').next().unwrap_or(word);
        let known = self
            .commands
            .iter()
            .find(|command| command.name == word)
            .or_else(|| self.commands.iter().find(|command| command.name == last));
        match known {
            Some(known) => {
                let mut argv = vec![known.program.clone()];
                argv.extend(known.args.iter().cloned());
                Invocation {
                    program: known.program.clone(),
                    argv,
                }
            }
            None => Invocation {
                program: word.to_owned(),
                argv: vec![word.to_owned()],
            },
        }
    }
}

/// A reference in full: `docker.io/library/nginx:latest`.
pub fn normalise(reference: &str) -> String {
    let (name, digest) = match reference.split_once('@') {
        Some((name, digest)) => (name, Some(digest)),
        None => (reference, None),
    };
    let mut name = name.to_owned();
    let has_registry = name.split_once('/').is_some_and(|(first, _)| {
        first.contains('.') || first.contains(':') || first == "localhost" || first.contains('*')
    });
    if !has_registry {
        let official = if name.contains('/') { "" } else { "library/" };
        name = format!("docker.io/{official}{name}");
    } else if let Some(rest) = name.strip_prefix("index.docker.io/") {
        name = format!("docker.io/{rest}");
    }
    let tagged = name.rsplit('/').next().is_some_and(|last| last.contains(':'));
    match digest {
        Some(digest) => format!("{name}@{digest}"),
        None if tagged || name.ends_with('*') => name,
        None => format!("{name}:latest"),
    }
}

/// Whether `text` matches `pattern`, in which `*` stands for any run of characters.
fn matches(pattern: &str, text: &str) -> bool {
    let mut pieces = pattern.split('*');
    let first = pieces.next().unwrap_or_default();
    let Some(mut rest) = text.strip_prefix(first) else { return false };
    let pieces: Vec<&str> = pieces.collect();
    let Some((last, middle)) = pieces.split_last() else { return rest.is_empty() };
    for piece in middle {
        match rest.find(piece) {
            Some(at) => rest = &rest[at + piece.len()..],
            None => return false,
        }
    }
    rest.ends_with(last)
}

/// The entries, in the order of preference.
#[derive(Debug, Clone, Default)]
pub struct Catalogue {
    entries: Vec<(String, ImageSpec)>,
}

impl Catalogue {
    /// From the user's entries and the built-in ones.
    pub fn new(user: impl IntoIterator<Item = ImageSpec>, built_in: impl IntoIterator<Item = ImageSpec>) -> Self {
        let mut entries: Vec<(bool, String, ImageSpec)> = user
            .into_iter()
            .map(|entry| (false, entry))
            .chain(built_in.into_iter().map(|entry| (true, entry)))
            .map(|(built_in, entry)| (built_in, normalise(&entry.reference), entry))
            .collect();
        entries.sort_by(|(a_built_in, a, _), (b_built_in, b, _)| {
            let literal = |pattern: &str| pattern.bytes().filter(|byte| *byte != b'*').count();
            a.contains('*')
                .cmp(&b.contains('*'))
                .then_with(|| literal(b).cmp(&literal(a)))
                .then_with(|| a_built_in.cmp(b_built_in))
                .then_with(|| a.cmp(b))
        });
        Self {
            entries: entries.into_iter().map(|(_, pattern, entry)| (pattern, entry)).collect(),
        }
    }

    /// The entry for an image reference.
    pub fn find(&self, reference: &str) -> Option<&ImageSpec> {
        let reference = normalise(reference);
        // `name:tag@digest` is the same image as `name:tag` here.
        let without_digest = reference.split_once('@').map(|(name, _)| normalise(name));
        self.entries
            .iter()
            .find(|(pattern, _)| {
                matches(pattern, &reference) || without_digest.as_deref().is_some_and(|name| matches(pattern, name))
            })
            .map(|(_, entry)| entry)
    }
}

/// What a person is told whose image is not in the catalogue.
pub fn unknown_image(reference: &str) -> String {
    format!(
        "image \"{reference}\" is not in the image catalogue: name the local program that stands for it with `serin image add {reference} -- /path/to/program [arguments]`, or see `serin image list`"
    )
}

/// Group, version, kind and plural of `Image`.
pub fn api_resource() -> ApiResource {
    ApiResource::from_gvk_with_plural(&GroupVersionKind::gvk("serin.dev", "v1alpha1", "Image"), "images")
}

/// The entry in an `Image` object.
pub fn from_object(object: &DynamicObject) -> Result<ImageSpec, Error> {
    let name = object.metadata.name.clone().unwrap_or_default();
    serde_json::from_value(object.data.get("spec").cloned().unwrap_or_default()).map_err(|source| Error::Image {
        name,
        source,
    })
}

/// An object name for a reference: what a DNS subdomain may not hold becomes `-`.
pub fn object_name(reference: &str) -> String {
    let mut name: String = reference
        .chars()
        .map(|c| match c {
            'a'..='z' | '0'..='9' | '.' | '-' => c,
            'A'..='Z' => c.to_ascii_lowercase(),
            '*' => 'x',
            _ => '-',
        })
        .collect();
    name.truncate(240);
    name.trim_matches(|c: char| !c.is_ascii_alphanumeric()).to_owned()
}

/// The user's entries (`serin image list` adds the built-in ones).
pub async fn list(client: kube::Client) -> Result<Vec<ImageSpec>, Error> {
    let api: Api<DynamicObject> = Api::all_with(client, &api_resource());
    let objects = api.list(&Default::default()).await.map_err(|source| Error::api("list images", source))?;
    objects.items.iter().map(from_object).collect()
}

/// Adds or replaces an entry.
pub async fn add(client: kube::Client, entry: &ImageSpec) -> Result<(), Error> {
    let api: Api<DynamicObject> = Api::all_with(client, &api_resource());
    let name = object_name(&entry.reference);
    let object = serde_json::json!({
        "apiVersion": "serin.dev/v1alpha1",
        "kind": "Image",
        "metadata": {"name": name},
        "spec": entry,
    });
    api.patch(&name, &PatchParams::apply("serin-image").force(), &Patch::Apply(&object))
        .await
        .map_err(|source| Error::api(format!("apply image {name}"), source))?;
    Ok(())
}

/// Removes an entry; whether there was one.
pub async fn remove(client: kube::Client, reference: &str) -> Result<bool, Error> {
    let api: Api<DynamicObject> = Api::all_with(client, &api_resource());
    let name = object_name(reference);
    match api.delete(&name, &DeleteParams::default()).await {
        Ok(_) => Ok(true),
        Err(kube::Error::Api(status)) if status.code == 404 => Ok(false),
        Err(source) => Err(Error::api(format!("delete image {name}"), source)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(reference: &str, program: &str) -> ImageSpec {
        ImageSpec {
            reference: reference.to_owned(),
            program: program.to_owned(),
            ..ImageSpec::default()
        }
    }

    #[test]
    fn references_are_normalised_as_docker_does() {
        for (given, full) in [
            ("nginx", "docker.io/library/nginx:latest"),
            ("nginx:1.25", "docker.io/library/nginx:1.25"),
            ("istio/proxyv2", "docker.io/istio/proxyv2:latest"),
            ("localhost/x", "localhost/x:latest"),
            ("localhost:5000/x:2", "localhost:5000/x:2"),
            ("ghcr.io/stefanprodan/podinfo:6.0.0", "ghcr.io/stefanprodan/podinfo:6.0.0"),
            ("nginx@sha256:abc", "docker.io/library/nginx@sha256:abc"),
            ("index.docker.io/library/nginx:1", "docker.io/library/nginx:1"),
            ("ghcr.io/x/*", "ghcr.io/x/*"),
        ] {
            assert_eq!(normalise(given), full);
        }
    }

    #[test]
    fn the_most_literal_entry_wins_and_the_users_before_the_built_in() {
        let catalogue = Catalogue::new(
            [entry("ghcr.io/stefanprodan/podinfo:*", "user-any"), entry("*", "anything")],
            [
                entry("ghcr.io/stefanprodan/podinfo:*", "built-in-any"),
                entry("ghcr.io/stefanprodan/podinfo:6.0.0", "exact"),
                entry("docker.io/istio/examples-bookinfo-*:*", "bookinfo"),
            ],
        );
        let program = |reference: &str| catalogue.find(reference).map(|entry| entry.program.as_str());
        assert_eq!(program("ghcr.io/stefanprodan/podinfo:6.0.0"), Some("exact"));
        assert_eq!(program("ghcr.io/stefanprodan/podinfo:6.1.0"), Some("user-any"));
        assert_eq!(program("ghcr.io/stefanprodan/podinfo:6.0.0@sha256:11"), Some("exact"));
        assert_eq!(program("istio/examples-bookinfo-reviews-v1:1.20.3"), Some("bookinfo"));
        assert_eq!(program("quay.io/other:1"), Some("anything"));
        assert_eq!(Catalogue::default().find("nginx"), None);
    }

    #[test]
    fn command_and_args_replace_entrypoint_and_default_arguments_as_for_an_oci_image() {
        let image = ImageSpec {
            args: vec!["serve".into()],
            default_args: vec!["--default".into()],
            commands: vec![ImageCommand {
                name: "podinfo".into(),
                program: "/bin/apps".into(),
                args: vec!["podinfo".into()],
            }],
            ..entry("x", "/bin/apps")
        };
        let run = |command: &[&str], args: &[&str]| {
            let owned = |words: &[&str]| words.iter().map(|word| (*word).to_owned()).collect::<Vec<_>>();
            image.invocation(&owned(command), &owned(args)).argv.join(" ")
        };
        assert_eq!(run(&[], &[]), "/bin/apps serve --default");
        assert_eq!(run(&[], &["--mine"]), "/bin/apps serve --mine");
        assert_eq!(run(&["./podinfo", "--port=1"], &["-v"]), "/bin/apps podinfo --port=1 -v");
        assert_eq!(run(&["/bin/sh", "-c"], &["true"]), "/bin/sh -c true");
    }

    #[test]
    fn wildcards_match_any_run_of_characters_and_nothing_else() {
        for (pattern, text, expected) in [
            ("a*c", "abc", true),
            ("a*c", "ac", true),
            ("a*c", "acb", false),
            ("*", "", true),
            ("a*b*c", "a1b2b3c", true),
            ("a*b*c", "a1c", false),
            ("abc", "abcd", false),
        ] {
            assert_eq!(matches(pattern, text), expected, "{pattern} {text}");
        }
    }

    #[test]
    fn an_object_name_is_a_dns_subdomain() {
        assert_eq!(object_name("docker.io/Istio/reviews-v1:*"), "docker.io-istio-reviews-v1-x");
    }
}
