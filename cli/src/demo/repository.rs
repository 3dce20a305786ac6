//! The git repository of the demo: a bare one that the cluster reads, and a clone that a developer pushes from.

use std::path::{Path, PathBuf};

use anyhow::Context as _;
use git2::{IndexAddOption, Repository, Signature};

/// The files of `examples/demo/repository`, as they are in our own tree.
const FILES: &[(&str, &str)] = &[
    (
        "base/kustomization.yaml",
        include_str!("../../../examples/demo/repository/base/kustomization.yaml"),
    ),
    (
        "base/deployment.yaml",
        include_str!("../../../examples/demo/repository/base/deployment.yaml"),
    ),
    (
        "base/canary.yaml",
        include_str!("../../../examples/demo/repository/base/canary.yaml"),
    ),
    (
        "overlays/demo/kustomization.yaml",
        include_str!("../../../examples/demo/repository/overlays/demo/kustomization.yaml"),
    ),
];
/// The file that a release changes.
const OVERLAY: &str = "overlays/demo/kustomization.yaml";
const BRANCH: &str = "main";

/// A developer's clone and the repository that it pushes to.
pub(super) struct DemoRepository {
    bare: PathBuf,
    clone: Repository,
}

/// What a release looks like in git.
#[derive(Clone, Copy, Debug)]
pub(super) struct Release {
    /// Tag of the image.
    pub(super) version: &'static str,
    /// Share of answers that fail, in percent.
    pub(super) error_percent: u8,
}

impl DemoRepository {
    /// Creates both repositories below `directory` and pushes the first commit.
    pub(super) fn create(directory: &Path) -> anyhow::Result<Self> {
        let bare = directory.join("repository.git");
        let mut options = git2::RepositoryInitOptions::new();
        options.bare(true).initial_head(BRANCH).mkpath(true);
        Repository::init_opts(&bare, &options).context("create the demo's git repository")?;
        let mut options = git2::RepositoryInitOptions::new();
        options.initial_head(BRANCH).mkpath(true);
        let clone = Repository::init_opts(directory.join("clone"), &options).context("create the clone")?;
        clone.remote(
            "origin",
            bare.to_str().context("the demo's directory is not UTF-8")?,
        )?;
        let repository = Self { bare, clone };
        for (path, content) in FILES {
            repository.write(path, content)?;
        }
        repository.commit_and_push("podinfo 1.0.0 with its canary")?;
        Ok(repository)
    }

    /// Address for a GitRepository.
    pub(super) fn url(&self) -> String {
        format!("file://{}", self.bare.display())
    }

    /// Commits a release and pushes it. Returns the commit's id.
    pub(super) fn release(&self, release: Release) -> anyhow::Result<String> {
        let (_, overlay) = FILES
            .iter()
            .find(|(path, _)| *path == OVERLAY)
            .context("the overlay is missing")?;
        let mut overlay = overlay.replace("newTag: 1.0.0", &format!("newTag: {}", release.version));
        if release.error_percent > 0 {
            overlay.push_str(&format!(
                "patches:\n  - patch: |\n      apiVersion: apps/v1\n      kind: Deployment\n      metadata:\n        name: podinfo\n      spec:\n        template:\n          spec:\n            containers:\n              - name: podinfod\n                env:\n                  - name: PODINFO_ERROR_PERCENT\n                    value: \"{}\"\n",
                release.error_percent
            ));
        }
        self.write(OVERLAY, &overlay)?;
        self.commit_and_push(&format!("podinfo {}", release.version))
    }

    fn write(&self, path: &str, content: &str) -> anyhow::Result<()> {
        let root = self.clone.workdir().context("the clone has no work tree")?;
        let file = root.join(path);
        if let Some(parent) = file.parent() {
            std::fs::create_dir_all(parent)?;
        }
        std::fs::write(&file, content).with_context(|| format!("write {}", file.display()))
    }

    fn commit_and_push(&self, message: &str) -> anyhow::Result<String> {
        let mut index = self.clone.index()?;
        index.add_all(["."], IndexAddOption::DEFAULT, None)?;
        index.write()?;
        let tree = self.clone.find_tree(index.write_tree()?)?;
        let author = Signature::now("A developer", "developer@example.com")?;
        let parent = self.clone.head().ok().and_then(|head| head.peel_to_commit().ok());
        let parents: Vec<_> = parent.iter().collect();
        let commit = self
            .clone
            .commit(Some("HEAD"), &author, &author, message, &tree, &parents)?;
        let mut remote = self.clone.find_remote("origin")?;
        let refspec = format!("refs/heads/{BRANCH}:refs/heads/{BRANCH}");
        remote
            .push(&[refspec], None)
            .context("push to the demo's repository")?;
        Ok(commit.to_string())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_release_is_pushed_as_a_commit_that_changes_the_overlay() {
        let directory = tempfile::tempdir().unwrap();
        let repository = DemoRepository::create(directory.path()).unwrap();
        let commit = repository
            .release(Release {
                version: "3.0.0",
                error_percent: 30,
            })
            .unwrap();
        let bare = Repository::open_bare(directory.path().join("repository.git")).unwrap();
        let head = bare
            .find_reference("refs/heads/main")
            .unwrap()
            .peel_to_commit()
            .unwrap();
        assert_eq!(head.id().to_string(), commit);
        let entry = head.tree().unwrap().get_path(Path::new(OVERLAY)).unwrap();
        let blob = bare.find_blob(entry.id()).unwrap();
        let text = std::str::from_utf8(blob.content()).unwrap();
        assert!(
            text.contains("newTag: 3.0.0") && text.contains("value: \"30\""),
            "{text}"
        );
        assert_eq!(head.parent_count(), 1);
    }
}
