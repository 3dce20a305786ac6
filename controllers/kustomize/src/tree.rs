//! The files that a build may see. Nothing outside the tree exists.

use std::collections::BTreeMap;
use std::sync::Arc;

/// What is at a path. Paths are relative to the root of the tree, `/` between parts, no `.` or `..`; the root is ``.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum TreeEntry {
    /// A regular file.
    File,
    /// A directory.
    Dir,
    /// A symbolic link with its target as written.
    Symlink(String),
    /// Nothing.
    Missing,
}

/// A tree of files: a directory, a git tree, or a map in memory. Links are reported, not followed.
pub trait FileTree {
    /// What is at a path. No part of the path but the last is a link.
    fn entry(&self, path: &str) -> Result<TreeEntry, String>;

    /// The content of a regular file.
    fn read(&self, path: &str) -> Result<Arc<[u8]>, String>;
}

/// Files in memory.
#[derive(Clone, Debug, Default)]
pub struct MemoryTree {
    files: BTreeMap<String, Arc<[u8]>>,
    links: BTreeMap<String, String>,
}

impl MemoryTree {
    /// A tree without files.
    pub fn new() -> MemoryTree {
        MemoryTree::default()
    }

    /// Adds a file.
    pub fn add(&mut self, path: impl Into<String>, content: impl AsRef<[u8]>) -> &mut MemoryTree {
        self.files.insert(path.into(), content.as_ref().into());
        self
    }

    /// Adds a symbolic link.
    pub fn link(&mut self, path: impl Into<String>, target: impl Into<String>) -> &mut MemoryTree {
        self.links.insert(path.into(), target.into());
        self
    }
}

impl<P: Into<String>, C: AsRef<[u8]>> FromIterator<(P, C)> for MemoryTree {
    fn from_iter<I: IntoIterator<Item = (P, C)>>(files: I) -> MemoryTree {
        let mut tree = MemoryTree::new();
        for (path, content) in files {
            tree.add(path, content);
        }
        tree
    }
}

impl FileTree for MemoryTree {
    fn entry(&self, path: &str) -> Result<TreeEntry, String> {
        if let Some(target) = self.links.get(path) {
            return Ok(TreeEntry::Symlink(target.clone()));
        }
        if self.files.contains_key(path) {
            return Ok(TreeEntry::File);
        }
        let prefix = if path.is_empty() {
            String::new()
        } else {
            format!("{path}/")
        };
        let below = |key: Option<&String>| path.is_empty() || key.is_some_and(|k| k.starts_with(&prefix));
        let dir = below(self.files.range(prefix.clone()..).next().map(|(k, _)| k))
            || below(self.links.range(prefix.clone()..).next().map(|(k, _)| k));
        Ok(if dir { TreeEntry::Dir } else { TreeEntry::Missing })
    }

    fn read(&self, path: &str) -> Result<Arc<[u8]>, String> {
        self.files.get(path).cloned().ok_or_else(|| "no such file".into())
    }
}

/// Remote files that the caller has fetched and allows. What it does not answer for is refused.
pub trait Remotes {
    /// The content of a file named by its address.
    fn file(&self, url: &str) -> Option<Arc<[u8]>>;

    /// The path in the tree at which a remote directory has been made available.
    fn directory(&self, url: &str) -> Option<String>;
}

/// Whether a path in a kustomization names something on another machine.
pub(crate) fn is_remote(path: &str) -> bool {
    let lower = path.to_ascii_lowercase();
    path.contains("://")
        || lower.starts_with("git::")
        || lower.starts_with("git@")
        || lower.starts_with("gh:")
        || lower.starts_with("github.com/")
        || lower.starts_with("github.com:")
}

/// Joins a relative path to a directory of the tree and takes out `.` and `..`. `None` when it leaves the tree.
pub(crate) fn join(dir: &str, path: &str) -> Option<String> {
    let mut parts: Vec<&str> = if dir.is_empty() {
        Vec::new()
    } else {
        dir.split('/').collect()
    };
    for part in path.split('/') {
        match part {
            "" | "." => {}
            ".." => {
                parts.pop()?;
            }
            name => parts.push(name),
        }
    }
    Some(parts.join("/"))
}

/// Whether a path is a directory or lies below it.
pub(crate) fn is_in(path: &str, dir: &str) -> bool {
    dir.is_empty() || path == dir || (path.starts_with(dir) && path.as_bytes().get(dir.len()) == Some(&b'/'))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_path_cannot_leave_the_tree() {
        assert_eq!(join("a/b", "../c/./d"), Some("a/c/d".into()));
        assert_eq!(join("a", "../../x"), None);
        assert_eq!(join("", "."), Some(String::new()));
    }

    #[test]
    fn a_directory_is_not_taken_for_another_with_the_same_start() {
        assert!(is_in("apps/web/x", "apps/web"));
        assert!(!is_in("apps/web2/x", "apps/web"));
        assert!(is_in("x", ""));
    }
}
