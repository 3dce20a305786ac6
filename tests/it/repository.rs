//! A git repository that a story pushes to: a bare one that the cluster reads, and a clone that a developer works in.

use std::path::{Path, PathBuf};
use std::process::Command;

/// Both repositories.
pub(crate) struct Repository {
    pub(crate) bare: PathBuf,
    clone: PathBuf,
}

impl Repository {
    /// Makes both below `directory` and pushes `files` as the first commit.
    pub(crate) fn create(directory: &Path, files: &[(&str, &str)]) -> Self {
        let repository = Self {
            bare: directory.join("repository.git"),
            clone: directory.join("clone"),
        };
        std::fs::create_dir_all(directory).unwrap();
        let text = |path: &Path| path.to_str().unwrap().to_owned();
        git(
            directory,
            &["init", "-q", "--bare", "-b", "main", &text(&repository.bare)],
        );
        git(directory, &["init", "-q", "-b", "main", &text(&repository.clone)]);
        git(
            &repository.clone,
            &["remote", "add", "origin", &text(&repository.bare)],
        );
        repository.push(files);
        repository
    }

    /// Address for a GitRepository.
    pub(crate) fn url(&self) -> String {
        format!("file://{}", self.bare.display())
    }

    /// Commits files (those with empty content are removed) and pushes. Returns the commit.
    pub(crate) fn push(&self, files: &[(&str, &str)]) -> String {
        for (path, content) in files {
            let file = self.clone.join(path);
            if content.is_empty() {
                std::fs::remove_file(file).unwrap();
                continue;
            }
            std::fs::create_dir_all(file.parent().unwrap()).unwrap();
            std::fs::write(file, content).unwrap();
        }
        git(&self.clone, &["add", "-A"]);
        git(&self.clone, &["commit", "-q", "-m", "change"]);
        self.publish()
    }

    /// `git revert` of the newest commit, pushed. Returns the commit.
    pub(crate) fn revert(&self) -> String {
        git(&self.clone, &["revert", "--no-edit", "HEAD"]);
        self.publish()
    }

    fn publish(&self) -> String {
        git(&self.clone, &["push", "-q", "origin", "main"]);
        git(&self.clone, &["rev-parse", "HEAD"]).trim().to_owned()
    }
}

fn git(directory: &Path, arguments: &[&str]) -> String {
    let output = Command::new("git")
        .current_dir(directory)
        .env("GIT_CONFIG_GLOBAL", "/dev/null")
        .env("GIT_CONFIG_NOSYSTEM", "1")
        .env("GIT_AUTHOR_NAME", "A developer")
        .env("GIT_AUTHOR_EMAIL", "developer@example.com")
        .env("GIT_COMMITTER_NAME", "A developer")
        .env("GIT_COMMITTER_EMAIL", "developer@example.com")
        .args(arguments)
        .output()
        .expect("run git");
    assert!(
        output.status.success(),
        "git {arguments:?}: {}",
        String::from_utf8_lossy(&output.stderr)
    );
    String::from_utf8(output.stdout).unwrap()
}
