//! The image catalogue: which local program an image reference stands for.
//!
//! There is no container runtime underneath; an image is a promise of a program, and the catalogue keeps it. Entries
//! are `Image` objects (`serin.dev/v1alpha1`, cluster-scoped) plus a list that the program ships. References are
//! compared after Docker's normalisation (`nginx` is `docker.io/library/nginx:latest`); `*` in an entry stands for any
//! run of characters. The most literal entry wins: exact before wildcard, longer before shorter, the user's before
//! the built-in.

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
    /// The program: an absolute path, or a name looked up in the container's PATH.
    pub program: String,
    /// Arguments in front of the container's own. `{name}` (the last element of the repository), `{tag}` and `{1}`
    /// (the first wildcard's text) and so on are replaced, in the values of `env` too.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub args: Vec<String>,
    /// Environment under the container's own.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub env: Vec<ImageEnv>,
}

/// A variable of [`ImageSpec::env`].
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct ImageEnv {
    /// Name of the variable.
    pub name: String,
    /// Its value; empty by default.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub value: Option<String>,
}

/// A program with its arguments, the zeroth included.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Invocation {
    /// What is executed.
    pub program: String,
    /// Its arguments, the zeroth included.
    pub argv: Vec<String>,
}

/// What an image reference stands for: an entry with its placeholders filled in.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Resolved {
    program: String,
    args: Vec<String>,
    /// Environment under the container's own.
    pub env: Vec<(String, String)>,
}

impl Resolved {
    /// What a container runs. Without `command` the program with the entry's arguments; with one, its first word
    /// stands for exactly that (`./podinfo` of a podinfo image) and the rest are arguments, unless the word is the
    /// absolute path of a program of this machine (`exists`), which is then run instead. `args` follow.
    pub fn invocation(
        &self,
        command: &[String],
        args: &[String],
        exists: impl Fn(&str) -> bool,
    ) -> Invocation {
        match command.split_first() {
            Some((first, rest)) if first.starts_with('/') && exists(first) => {
                let mut argv = vec![first.clone()];
                argv.extend(rest.iter().chain(args).cloned());
                Invocation {
                    program: first.clone(),
                    argv,
                }
            }
            Some((_, rest)) => self.with(rest.iter().chain(args)),
            None => self.with(args.iter()),
        }
    }

    /// What a command run beside the container (exec probe, hook) means: a program of this machine if there is one of
    /// that name, else this image's program as above (`podcli check http …`).
    pub fn command(&self, command: &[String], exists: impl Fn(&str) -> bool) -> Invocation {
        match command.split_first() {
            Some((first, _)) if exists(first) => Invocation {
                program: first.clone(),
                argv: command.to_vec(),
            },
            Some((_, rest)) => self.with(rest.iter()),
            None => self.with([].iter()),
        }
    }

    fn with<'a>(&self, more: impl Iterator<Item = &'a String>) -> Invocation {
        let mut argv = vec![self.program.clone()];
        argv.extend(self.args.iter().cloned());
        argv.extend(more.cloned());
        Invocation {
            program: self.program.clone(),
            argv,
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
    // A wildcard in front stands for any registry.
    let has_registry = name.starts_with('*')
        || name
            .split_once('/')
            .is_some_and(|(first, _)| first.contains(['.', ':', '*']) || first == "localhost");
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

/// Whether `text` matches `pattern`, in which `*` stands for any run of characters: the text of each run, the shortest
/// possible from the left.
fn matches<'a>(pattern: &str, text: &'a str) -> Option<Vec<&'a str>> {
    let mut pieces = pattern.split('*');
    let mut rest = text.strip_prefix(pieces.next().unwrap_or_default())?;
    let pieces: Vec<&str> = pieces.collect();
    let Some((last, middle)) = pieces.split_last() else {
        return rest.is_empty().then(Vec::new);
    };
    let mut runs = Vec::with_capacity(pieces.len());
    for piece in middle {
        let at = rest.find(piece)?;
        runs.push(&rest[..at]);
        rest = &rest[at + piece.len()..];
    }
    runs.push(rest.strip_suffix(last)?);
    Some(runs)
}

/// Fills in `{name}`, `{tag}`, `{1}` …
fn fill(text: &str, reference: &str, runs: &[&str]) -> String {
    if !text.contains('{') {
        return text.to_owned();
    }
    let last = reference
        .split('@')
        .next()
        .unwrap_or_default()
        .rsplit('/')
        .next()
        .unwrap_or_default();
    let (name, tag) = last.split_once(':').unwrap_or((last, ""));
    let mut text = text.replace("{name}", name).replace("{tag}", tag);
    for (position, run) in runs.iter().enumerate() {
        text = text.replace(&format!("{{{}}}", position + 1), run);
    }
    text
}

/// The entries, in the order of preference.
#[derive(Debug, Clone, Default)]
pub struct Catalogue {
    entries: Vec<(String, ImageSpec)>,
}

impl Catalogue {
    /// From the user's entries and the built-in ones.
    pub fn new(
        user: impl IntoIterator<Item = ImageSpec>,
        built_in: impl IntoIterator<Item = ImageSpec>,
    ) -> Self {
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
            entries: entries
                .into_iter()
                .map(|(_, pattern, entry)| (pattern, entry))
                .collect(),
        }
    }

    /// What an image reference stands for.
    pub fn find(&self, reference: &str) -> Option<Resolved> {
        let reference = normalise(reference);
        // `name:tag@digest` is the same image as `name:tag` here.
        let without_digest = reference.split_once('@').map(|(name, _)| normalise(name));
        self.entries.iter().find_map(|(pattern, entry)| {
            let runs = matches(pattern, &reference)
                .or_else(|| without_digest.as_deref().and_then(|name| matches(pattern, name)))?;
            let fill = |text: &str| fill(text, &reference, &runs);
            Some(Resolved {
                program: entry.program.clone(),
                args: entry.args.iter().map(|argument| fill(argument)).collect(),
                env: entry
                    .env
                    .iter()
                    .map(|variable| {
                        (
                            variable.name.clone(),
                            fill(variable.value.as_deref().unwrap_or_default()),
                        )
                    })
                    .collect(),
            })
        })
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
    serde_json::from_value(object.data.get("spec").cloned().unwrap_or_default())
        .map_err(|source| Error::Image { name, source })
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
    let objects = api
        .list(&Default::default())
        .await
        .map_err(|source| Error::api("list images", source))?;
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
    api.patch(
        &name,
        &PatchParams::apply("serin-image").force(),
        &Patch::Apply(&object),
    )
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
            (
                "ghcr.io/stefanprodan/podinfo:6.0.0",
                "ghcr.io/stefanprodan/podinfo:6.0.0",
            ),
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
            [
                entry("ghcr.io/stefanprodan/podinfo:*", "user-any"),
                entry("*", "anything"),
            ],
            [
                entry("ghcr.io/stefanprodan/podinfo:*", "built-in-any"),
                entry("ghcr.io/stefanprodan/podinfo:6.0.0", "exact"),
                entry("docker.io/istio/examples-bookinfo-*:*", "bookinfo"),
            ],
        );
        let program = |reference: &str| catalogue.find(reference).map(|entry| entry.program);
        let named = |name: &str| Some(name.to_owned());
        assert_eq!(program("ghcr.io/stefanprodan/podinfo:6.0.0"), named("exact"));
        assert_eq!(program("ghcr.io/stefanprodan/podinfo:6.1.0"), named("user-any"));
        assert_eq!(
            program("ghcr.io/stefanprodan/podinfo:6.0.0@sha256:11"),
            named("exact")
        );
        assert_eq!(
            program("istio/examples-bookinfo-reviews-v1:1.20.3"),
            named("bookinfo")
        );
        assert_eq!(program("quay.io/other:1"), named("anything"));
        assert_eq!(Catalogue::default().find("nginx"), None);
    }

    #[test]
    fn placeholders_are_filled_from_the_reference() {
        let catalogue = Catalogue::new(
            [ImageSpec {
                args: vec!["{1}".into(), "--version={tag}".into()],
                env: vec![ImageEnv {
                    name: "NAME".into(),
                    value: Some("{name}".into()),
                }],
                ..entry("*/istio/examples-bookinfo-*-v*:*", "/bin/apps")
            }],
            [],
        );
        let found = catalogue
            .find("docker.io/istio/examples-bookinfo-reviews-v1:1.20.3")
            .unwrap();
        assert_eq!(found.args, ["docker.io", "--version=1.20.3"]);
        assert_eq!(
            found.env,
            [("NAME".to_owned(), "examples-bookinfo-reviews-v1".to_owned())]
        );
    }

    #[test]
    fn a_command_stands_for_the_program_unless_this_machine_has_it() {
        let image = Resolved {
            program: "/bin/apps".into(),
            args: vec!["podinfo".into()],
            env: Vec::new(),
        };
        let owned = |words: &[&str]| words.iter().map(|word| (*word).to_owned()).collect::<Vec<_>>();
        let exists = |word: &str| word == "/bin/sh" || word == "ls";
        let run = |command: &[&str], args: &[&str]| {
            image
                .invocation(&owned(command), &owned(args), exists)
                .argv
                .join(" ")
        };
        assert_eq!(run(&[], &[]), "/bin/apps podinfo");
        assert_eq!(run(&[], &["--mine"]), "/bin/apps podinfo --mine");
        assert_eq!(
            run(&["./podinfo", "--port=1"], &["-v"]),
            "/bin/apps podinfo --port=1 -v"
        );
        assert_eq!(run(&["/bin/sh", "-c"], &["true"]), "/bin/sh -c true");
        let beside = |command: &[&str]| image.command(&owned(command), exists).argv.join(" ");
        assert_eq!(
            beside(&["podcli", "check", "http"]),
            "/bin/apps podinfo check http"
        );
        assert_eq!(beside(&["ls", "/"]), "ls /");
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
            assert_eq!(matches(pattern, text).is_some(), expected, "{pattern} {text}");
        }
    }

    #[test]
    fn an_object_name_is_a_dns_subdomain() {
        assert_eq!(
            object_name("docker.io/Istio/reviews-v1:*"),
            "docker.io-istio-reviews-v1-x"
        );
    }
}
