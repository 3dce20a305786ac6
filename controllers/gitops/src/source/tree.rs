//! A revision as something to read: a git tree, in place, behind the ignore rules.
//!
//! Directories are decoded once per tree id and shared by all revisions of a repository, so that looking up the same
//! paths in the next revision costs a hash lookup per path element. Symbolic links are followed inside the tree; one
//! that leaves it leads nowhere. Nothing outside the tree exists here.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use git2::{ObjectType, Oid};
use parking_lot::Mutex;
use sha2::{Digest, Sha256};

use super::ignore::{Rules, SOURCE_IGNORE};
use crate::error::Error;

/// Decoded directories kept per repository. A directory takes about 60 bytes per entry; monorepos have some
/// thousand directories that are ever looked at.
const DIRECTORIES_MAX: usize = 8192;
/// Links that one path may go through, as Linux.
const LINKS_MAX: usize = 40;
/// The largest file that is read. An API server refuses objects beyond 1.5 MiB; generators may read larger files,
/// but not endlessly.
const FILE_MAX_BYTES: usize = 32 << 20;

/// An opened bare cache.
pub(crate) struct Repo {
    path: PathBuf,
    handle: Mutex<git2::Repository>,
    directories: Mutex<HashMap<Oid, Arc<Directory>>>,
}

/// The entries of one directory, sorted by name.
#[derive(Debug)]
struct Directory(Vec<(String, Node)>);

/// What a path leads to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Node {
    /// A file's content.
    File(Oid),
    /// A directory.
    Directory(Oid),
    /// A symbolic link; the content is its target.
    Link(Oid),
    /// A submodule: not part of the artifact.
    Submodule,
}

impl Repo {
    pub(crate) fn open(path: &Path) -> Result<Arc<Self>, Error> {
        let handle = git2::Repository::open_bare(path).map_err(|e| Error::Git {
            action: "open the cache of",
            url: path.display().to_string(),
            reason: e.message().to_string(),
        })?;
        Ok(Arc::new(Self {
            path: path.to_path_buf(),
            handle: Mutex::new(handle),
            directories: Mutex::default(),
        }))
    }

    /// Whether an object can be read; not so when the cache was made anew under our feet.
    pub(crate) fn has(&self, id: Oid) -> bool {
        self.path.exists() && self.handle.lock().find_tree(id).is_ok()
    }

    fn directory(&self, id: Oid) -> Result<Arc<Directory>, git2::Error> {
        if let Some(known) = self.directories.lock().get(&id) {
            return Ok(known.clone());
        }
        let decoded = {
            let handle = self.handle.lock();
            let tree = handle.find_tree(id)?;
            let mut entries: Vec<(String, Node)> = tree
                .iter()
                .filter_map(|entry| {
                    let name = std::str::from_utf8(entry.name_bytes()).ok()?.to_string();
                    let node = match (entry.kind(), entry.filemode()) {
                        (Some(ObjectType::Tree), _) => Node::Directory(entry.id()),
                        (Some(ObjectType::Blob), 0o120_000) => Node::Link(entry.id()),
                        (Some(ObjectType::Blob), _) => Node::File(entry.id()),
                        _ => Node::Submodule,
                    };
                    // `.git` and the like cannot be written by git itself; a crafted tree may hold them.
                    (!matches!(name.as_str(), "" | "." | "..") && !name.contains(['/', '\\', '\0']))
                        .then_some((name, node))
                })
                .collect();
            entries.sort_by(|a, b| a.0.cmp(&b.0));
            Arc::new(Directory(entries))
        };
        let mut all = self.directories.lock();
        if all.len() >= DIRECTORIES_MAX {
            all.clear();
        }
        all.insert(id, decoded.clone());
        Ok(decoded)
    }

    fn blob(&self, id: Oid) -> Result<Vec<u8>, git2::Error> {
        let handle = self.handle.lock();
        let odb = handle.odb()?;
        let (size, _) = odb.read_header(id)?;
        if size > FILE_MAX_BYTES {
            return Err(git2::Error::from_str(&format!(
                "the file has {size} bytes; at most {FILE_MAX_BYTES} are read"
            )));
        }
        Ok(odb.read(id)?.data().to_vec())
    }
}

/// One revision.
pub(crate) struct Snapshot {
    repo: Arc<Repo>,
    /// `main@sha1:…`
    pub(crate) revision: String,
    pub(crate) commit: String,
    root: Oid,
    base: Rules,
    /// `spec.ignore`; beats every `.sourceignore`.
    last: Rules,
    /// `spec.sparseCheckout`; empty: everything.
    sparse: Vec<String>,
    /// Changes whenever the visible content may have changed.
    pub(crate) digest: String,
    layers: Mutex<HashMap<String, Option<Arc<Rules>>>>,
}

/// A normalised path inside a tree: no leading or trailing slash, no `.` or `..`; empty for the root.
fn normalise(base: &str, path: &str) -> Option<String> {
    let mut out: Vec<&str> = if path.starts_with('/') {
        Vec::new()
    } else {
        base.split('/').filter(|e| !e.is_empty()).collect()
    };
    for element in path.split('/') {
        match element {
            "" | "." => {}
            ".." => {
                out.pop()?;
            }
            e => out.push(e),
        }
    }
    Some(out.join("/"))
}

impl Snapshot {
    pub(crate) fn new(
        repo: Arc<Repo>,
        revision: String,
        commit: &str,
        root: Oid,
        ignore: Option<&str>,
        sparse: &[String],
    ) -> Self {
        let mut hash = Sha256::new();
        hash.update(root.as_bytes());
        hash.update([u8::from(ignore.is_some())]);
        hash.update(ignore.unwrap_or_default());
        for directory in sparse {
            hash.update([0]);
            hash.update(directory);
        }
        Self {
            repo,
            revision,
            commit: commit.to_string(),
            root,
            base: Rules::base(ignore.is_some()),
            last: Rules::parse(ignore.unwrap_or_default(), ""),
            sparse: sparse.iter().filter_map(|p| normalise("", p)).collect(),
            digest: format!("sha256:{}", super::credentials::hex(&hash.finalize())),
            layers: Mutex::default(),
        }
    }

    /// The first directory of `spec.sparseCheckout` that the revision does not have.
    pub(crate) fn missing_sparse(&self) -> Result<Option<&str>, Error> {
        for directory in &self.sparse {
            if !matches!(self.walk(directory)?, Some((_, Node::Directory(_)))) {
                return Ok(Some(directory));
            }
        }
        Ok(None)
    }

    fn error(&self, path: &str, e: &git2::Error) -> Error {
        Error::Tree {
            path: path.to_string(),
            revision: self.revision.clone(),
            reason: e.message().to_string(),
        }
    }

    /// Follows `path`, links included; gives the real path and what is there, without looking at ignore rules.
    fn walk(&self, path: &str) -> Result<Option<(String, Node)>, Error> {
        let Some(mut todo) = normalise("", path) else {
            return Ok(None);
        };
        let mut links = 0;
        'again: loop {
            let mut at = Node::Directory(self.root);
            let mut done = String::new();
            let mut rest = todo.as_str();
            while !rest.is_empty() {
                let (element, more) = rest.split_once('/').unwrap_or((rest, ""));
                let Node::Directory(id) = at else { return Ok(None) };
                let directory = self.repo.directory(id).map_err(|e| self.error(&done, &e))?;
                let Ok(found) = directory
                    .0
                    .binary_search_by(|(name, _)| name.as_str().cmp(element))
                else {
                    return Ok(None);
                };
                at = directory.0[found].1;
                if let Node::Link(id) = at {
                    links += 1;
                    if links > LINKS_MAX {
                        return Ok(None);
                    }
                    let target = self.repo.blob(id).map_err(|e| self.error(&done, &e))?;
                    let Ok(target) = String::from_utf8(target) else {
                        return Ok(None);
                    };
                    if target.starts_with('/') {
                        return Ok(None);
                    }
                    let Some(resolved) = normalise(&done, &target) else {
                        return Ok(None);
                    };
                    todo = if more.is_empty() {
                        resolved
                    } else {
                        format!("{resolved}/{more}")
                    };
                    continue 'again;
                }
                if !done.is_empty() {
                    done.push('/');
                }
                done.push_str(element);
                rest = more;
            }
            return Ok(Some((done, at)));
        }
    }

    fn layer(&self, directory: &str) -> Result<Option<Arc<Rules>>, Error> {
        if let Some(known) = self.layers.lock().get(directory) {
            return Ok(known.clone());
        }
        let file = if directory.is_empty() {
            SOURCE_IGNORE.to_string()
        } else {
            format!("{directory}/{SOURCE_IGNORE}")
        };
        let rules = match self.walk(&file)? {
            Some((_, Node::File(id))) => {
                let text = self.repo.blob(id).map_err(|e| self.error(&file, &e))?;
                Some(Arc::new(Rules::parse(&String::from_utf8_lossy(&text), directory)))
            }
            _ => None,
        };
        self.layers.lock().insert(directory.to_string(), rules.clone());
        Ok(rules)
    }

    /// Whether the file at a real path is part of the artifact.
    fn visible(&self, path: &str) -> Result<bool, Error> {
        let in_sparse =
            |s: &String| path.strip_prefix(s.as_str()).is_some_and(|r| r.starts_with('/')) || s.is_empty();
        // Files at the root are always checked out, as git's cone mode does.
        if !self.sparse.is_empty() && path.contains('/') && !self.sparse.iter().any(in_sparse) {
            return Ok(false);
        }
        if let Some(excluded) = self.last.excludes(path) {
            return Ok(!excluded);
        }
        let mut directory = path;
        while let Some((parent, _)) = directory.rsplit_once('/') {
            directory = parent;
            if let Some(excluded) = self.layer(directory)?.and_then(|rules| rules.excludes(path)) {
                return Ok(!excluded);
            }
        }
        if let Some(excluded) = self.layer("")?.and_then(|rules| rules.excludes(path)) {
            return Ok(!excluded);
        }
        Ok(!self.base.excludes(path).unwrap_or(false))
    }

    /// What a path leads to in the artifact.
    pub(crate) fn look(&self, path: &str) -> Result<Option<Node>, Error> {
        match self.walk(path)? {
            Some((real, node @ Node::File(_))) => Ok(self.visible(&real)?.then_some(node)),
            Some((_, node @ Node::Directory(_))) => Ok(Some(node)),
            Some((_, Node::Link(_) | Node::Submodule)) | None => Ok(None),
        }
    }

    /// A file's content, or `None` if there is no such file.
    pub(crate) fn read(&self, path: &str) -> Result<Option<Vec<u8>>, Error> {
        match self.look(path)? {
            Some(Node::File(id)) => self.repo.blob(id).map(Some).map_err(|e| self.error(path, &e)),
            _ => Ok(None),
        }
    }

    /// Names in a directory, sorted, with whether each is a directory; `None` if there is no such directory.
    pub(crate) fn list(&self, path: &str) -> Result<Option<Vec<(String, bool)>>, Error> {
        let Some((real, Node::Directory(id))) = self.walk(path)? else {
            return Ok(None);
        };
        let directory = self.repo.directory(id).map_err(|e| self.error(path, &e))?;
        let mut out = Vec::with_capacity(directory.0.len());
        for (name, node) in &directory.0 {
            let below = if real.is_empty() {
                name.clone()
            } else {
                format!("{real}/{name}")
            };
            match node {
                Node::Directory(_) => out.push((name.clone(), true)),
                Node::File(_) if self.visible(&below)? => out.push((name.clone(), false)),
                Node::Link(_) => match self.look(&below)? {
                    Some(Node::Directory(_)) => out.push((name.clone(), true)),
                    Some(_) => out.push((name.clone(), false)),
                    None => {}
                },
                Node::File(_) | Node::Submodule => {}
            }
        }
        Ok(Some(out))
    }
}

#[cfg(test)]
#[path = "tree_tests.rs"]
mod tests;
