//! Which commit a `GitRepository` means, decided from the list of references that the remote offers. Pure.

use serin_crds::flux::source::GitRepositoryRef;

use super::semver_range::{self, Range};

/// Flux's default when nothing is asked for.
const DEFAULT_BRANCH: &str = "master";

/// What `spec.ref` asks for, in Flux's order of precedence.
#[derive(Debug, Clone)]
pub(crate) enum Wanted {
    /// A full commit id; the branch only goes into the revision's text and narrows the fallback fetch.
    Commit { id: String, branch: Option<String> },
    /// Any full reference name.
    Name(String),
    /// The highest tag in a range.
    Semver { range: Range, text: String },
    /// A tag.
    Tag(String),
    /// A branch.
    Branch(String),
}

/// A reference offered by the remote. Peeled tags appear a second time with `^{}` behind the name.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Head {
    pub(crate) name: String,
    /// 40 hexadecimal digits.
    pub(crate) id: String,
}

/// The reference that is followed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Selected {
    /// Full name, `refs/heads/main`; `None` for a bare commit.
    pub(crate) full_name: Option<String>,
    /// What stands in front of `@` in the revision; empty for a bare commit.
    pub(crate) label: String,
    /// The object that the reference points at: a commit, or a tag object.
    pub(crate) id: String,
}

impl Wanted {
    /// Reads `spec.ref`. The error is a sentence for the condition.
    pub(crate) fn from_spec(reference: Option<&GitRepositoryRef>) -> Result<Self, String> {
        let none = GitRepositoryRef::default();
        let r = reference.unwrap_or(&none);
        let set = |v: &Option<String>| v.clone().filter(|s| !s.is_empty());
        if let Some(id) = set(&r.commit) {
            if id.len() != 40 || !id.bytes().all(|b| b.is_ascii_hexdigit()) {
                return Err(format!(
                    "spec.ref.commit '{id}' is not a full commit id of 40 hexadecimal digits"
                ));
            }
            return Ok(Self::Commit {
                id: id.to_ascii_lowercase(),
                branch: set(&r.branch),
            });
        }
        if let Some(name) = set(&r.name) {
            return Ok(Self::Name(name));
        }
        if let Some(text) = set(&r.semver) {
            let range = Range::parse(&text).map_err(|e| format!("spec.ref.semver: {e}"))?;
            return Ok(Self::Semver { range, text });
        }
        if let Some(tag) = set(&r.tag) {
            return Ok(Self::Tag(tag));
        }
        Ok(Self::Branch(
            set(&r.branch).unwrap_or_else(|| DEFAULT_BRANCH.into()),
        ))
    }

    /// Picks among what the remote offers. The error is a sentence that names what is missing.
    pub(crate) fn select(&self, heads: &[Head]) -> Result<Selected, String> {
        if heads.is_empty() {
            return Err("the repository is empty: it has no reference yet; push a commit".into());
        }
        let find = |name: &str| heads.iter().find(|h| h.name == name);
        match self {
            Self::Commit { id, branch } => Ok(Selected {
                full_name: None,
                label: branch.clone().unwrap_or_default(),
                id: id.clone(),
            }),
            Self::Name(name) => match find(name) {
                Some(head) => Ok(selected(head, name)),
                None => Err(format!(
                    "reference '{name}' not found; spec.ref.name takes a full name such as refs/heads/main"
                )),
            },
            Self::Branch(branch) => match find(&format!("refs/heads/{branch}")) {
                Some(head) => Ok(selected(head, branch)),
                None => Err(format!(
                    "branch '{branch}' not found{}",
                    offered(heads, "refs/heads/")
                )),
            },
            Self::Tag(tag) => match find(&format!("refs/tags/{tag}")) {
                Some(head) => Ok(selected(head, tag)),
                None => Err(format!("tag '{tag}' not found{}", offered(heads, "refs/tags/"))),
            },
            Self::Semver { range, text } => heads
                .iter()
                .filter_map(|head| {
                    let tag = head.name.strip_prefix("refs/tags/")?;
                    let version = semver_range::version(tag)?;
                    range.matches(&version).then_some((version, tag, head))
                })
                // The full order of versions: among equal precedence the greater build metadata wins.
                .max_by(|a, b| a.0.cmp(&b.0).then(a.1.cmp(b.1)))
                .map(|(_, tag, head)| selected(head, tag))
                .ok_or_else(|| {
                    format!(
                        "no tag is in the semver range '{text}'{}",
                        offered(heads, "refs/tags/")
                    )
                }),
        }
    }
}

fn selected(head: &Head, label: &str) -> Selected {
    Selected {
        full_name: Some(head.name.clone()),
        label: label.to_string(),
        id: head.id.clone(),
    }
}

/// A few names that do exist, for the person who mistyped one.
fn offered(heads: &[Head], prefix: &str) -> String {
    let names: Vec<&str> = heads
        .iter()
        .filter_map(|h| h.name.strip_prefix(prefix))
        .filter(|n| !n.ends_with("^{}"))
        .collect();
    match names.len() {
        0 => "; there is none".into(),
        1..=5 => format!("; there is {}", names.join(", ")),
        n => format!("; there are {n}, among them {}", names[..5].join(", ")),
    }
}

/// `<label>@sha1:<commit>`, or `sha1:<commit>` for a bare commit, as Flux writes revisions.
pub(crate) fn revision(label: &str, commit: &str) -> String {
    if label.is_empty() {
        format!("sha1:{commit}")
    } else {
        format!("{label}@sha1:{commit}")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn heads() -> Vec<Head> {
        [
            "refs/heads/main",
            "refs/heads/dev",
            "refs/tags/v1.0.0",
            "refs/tags/v1.2.0",
            "refs/tags/v1.2.0^{}",
            "refs/tags/v2.0.0-rc.1",
            "refs/pull/4/head",
        ]
        .iter()
        .enumerate()
        .map(|(i, name)| Head {
            name: (*name).into(),
            id: format!("{i:040x}"),
        })
        .collect()
    }

    fn wanted(r: GitRepositoryRef) -> Wanted {
        Wanted::from_spec(Some(&r)).unwrap()
    }

    #[test]
    fn every_kind_of_reference_selects_what_flux_selects() {
        let s = |v: &str| Some(v.to_string());
        let cases = [
            (
                GitRepositoryRef {
                    branch: s("main"),
                    ..Default::default()
                },
                "main",
                0,
            ),
            (
                GitRepositoryRef {
                    tag: s("v1.0.0"),
                    branch: s("main"),
                    ..Default::default()
                },
                "v1.0.0",
                2,
            ),
            (
                GitRepositoryRef {
                    semver: s("1.x"),
                    tag: s("v1.0.0"),
                    ..Default::default()
                },
                "v1.2.0",
                3,
            ),
            (
                GitRepositoryRef {
                    semver: s(">=1.0.0-0"),
                    ..Default::default()
                },
                "v2.0.0-rc.1",
                5,
            ),
            (
                GitRepositoryRef {
                    name: s("refs/pull/4/head"),
                    semver: s("1.x"),
                    ..Default::default()
                },
                "refs/pull/4/head",
                6,
            ),
        ];
        for (reference, label, index) in cases {
            let got = wanted(reference.clone()).select(&heads()).unwrap();
            assert_eq!(
                (got.label.as_str(), got.id),
                (label, format!("{index:040x}")),
                "{reference:?}"
            );
        }
        let commit = "a".repeat(40);
        let got = wanted(GitRepositoryRef {
            commit: Some(commit.clone()),
            branch: s("main"),
            name: s("x"),
            ..Default::default()
        });
        assert_eq!(
            revision(&got.select(&heads()).unwrap().label, &commit),
            format!("main@sha1:{commit}")
        );
    }

    #[test]
    fn a_missing_reference_is_named_with_what_exists() {
        let error = wanted(GitRepositoryRef::default()).select(&heads()).unwrap_err();
        assert_eq!(error, "branch 'master' not found; there is main, dev");
        let error = wanted(GitRepositoryRef::default()).select(&[]).unwrap_err();
        assert!(error.contains("empty"), "{error}");
    }

    #[test]
    fn a_short_commit_id_is_refused() {
        let r = GitRepositoryRef {
            commit: Some("abc123".into()),
            ..Default::default()
        };
        assert!(
            Wanted::from_spec(Some(&r))
                .unwrap_err()
                .contains("40 hexadecimal digits")
        );
    }
}
