//! Reading within the rules: what a kustomization may load, which files the build has seen, how much it may read.

use std::cell::{Cell, RefCell};
use std::collections::{BTreeSet, HashMap};
use std::sync::Arc;

use crate::error::{Cause, Error, Result};
use crate::options::{Decrypt, EncryptedUse, LoadRestrictor, Options};
use crate::tree::{FileTree, Remotes, TreeEntry, is_in, is_remote, join};

/// What influenced a build. Two trees that agree in all of this give the same result.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ReadSet {
    /// Files whose content was read.
    pub files: BTreeSet<String>,
    /// Paths that were looked for and are not there; one that appears may change the result.
    pub missing: BTreeSet<String>,
    /// Directories that were found where one was looked for.
    pub directories: BTreeSet<String>,
    /// Symbolic links that were followed.
    pub links: BTreeSet<String>,
}

/// Links followed before a path counts as a loop; the value of Linux.
const MAX_LINKS: usize = 40;

/// A path with all links followed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Resolved {
    File(String),
    Dir(String),
    Missing,
}

/// Reads files for all kustomizations of one build.
pub(crate) struct Loader<'a> {
    tree: &'a dyn FileTree,
    remotes: Option<&'a dyn Remotes>,
    decrypt: Option<&'a dyn Decrypt>,
    restrictor: LoadRestrictor,
    max_files: usize,
    max_bytes: usize,
    bytes: Cell<usize>,
    read_set: RefCell<ReadSet>,
    cache: RefCell<HashMap<String, Arc<[u8]>>>,
}

impl<'a> Loader<'a> {
    pub(crate) fn new(tree: &'a dyn FileTree, options: &Options<'a>) -> Loader<'a> {
        Loader {
            tree,
            remotes: options.remotes,
            decrypt: options.decrypt,
            restrictor: options.load_restrictor,
            max_files: options.budget.max_files,
            max_bytes: options.budget.max_bytes,
            bytes: Cell::new(0),
            read_set: RefCell::default(),
            cache: RefCell::default(),
        }
    }

    /// Loads a file that may lie encrypted in the tree.
    pub(crate) fn load_opened(
        &self,
        dir: &str,
        path: &str,
        wanted: EncryptedUse,
    ) -> Result<(Arc<[u8]>, String)> {
        let (content, file) = self.load(dir, path)?;
        let Some(decrypt) = self.decrypt else {
            return Ok((content, file));
        };
        match decrypt.open(&file, &content, wanted) {
            Ok(Some(opened)) => Ok((opened.into(), file)),
            Ok(None) => Ok((content, file)),
            Err(message) => Err(Cause::Decrypt { path: file, message }.into()),
        }
    }

    pub(crate) fn into_read_set(self) -> (ReadSet, usize) {
        (self.read_set.into_inner(), self.bytes.get())
    }

    /// Follows links. The result has no link in any part.
    pub(crate) fn resolve(&self, dir: &str, path: &str) -> Result<Resolved> {
        let outside = || {
            Error::new(Cause::OutsideTree {
                path: path.to_owned(),
            })
        };
        let mut todo: Vec<String> = Vec::new();
        let mut at: Vec<String> = if dir.is_empty() {
            Vec::new()
        } else {
            dir.split('/').map(Into::into).collect()
        };
        todo.extend(path.split('/').rev().map(str::to_owned));
        let mut links = 0;
        let mut kind = TreeEntry::Dir;
        while let Some(part) = todo.pop() {
            match part.as_str() {
                "" | "." => continue,
                ".." => {
                    at.pop().ok_or_else(outside)?;
                    kind = TreeEntry::Dir;
                    continue;
                }
                _ => {}
            }
            if kind != TreeEntry::Dir {
                return Ok(Resolved::Missing);
            }
            at.push(part);
            let here = at.join("/");
            kind = self.tree.entry(&here).map_err(|message| Cause::Tree {
                path: here.clone(),
                message,
            })?;
            match &kind {
                TreeEntry::Symlink(target) => {
                    links += 1;
                    if links > MAX_LINKS {
                        let message = "too many levels of symbolic links".to_owned();
                        return Err(Cause::Tree {
                            path: path.to_owned(),
                            message,
                        }
                        .into());
                    }
                    if target.starts_with('/') {
                        return Err(outside().help(format!("'{here}' is a symbolic link to '{target}'; links must be relative and stay inside the tree")));
                    }
                    self.read_set.borrow_mut().links.insert(here);
                    at.pop();
                    todo.extend(target.split('/').rev().map(str::to_owned));
                    kind = TreeEntry::Dir;
                }
                TreeEntry::Missing => {
                    self.read_set.borrow_mut().missing.insert(here);
                    return Ok(Resolved::Missing);
                }
                TreeEntry::File | TreeEntry::Dir => {}
            }
        }
        let full = at.join("/");
        Ok(match kind {
            TreeEntry::File => Resolved::File(full),
            _ => {
                self.read_set.borrow_mut().directories.insert(full.clone());
                Resolved::Dir(full)
            }
        })
    }

    /// The content of a file named in a kustomization at `root`, and its path in the tree.
    pub(crate) fn load(&self, root: &str, path: &str) -> Result<(Arc<[u8]>, String)> {
        if path.starts_with("http://") || path.starts_with("https://") {
            return match self.remotes.and_then(|r| r.file(path)) {
                Some(content) => {
                    self.count(content.len(), path)?;
                    Ok((content, path.to_owned()))
                }
                None => Err(refuse_remote(path)),
            };
        }
        if path.starts_with('/') {
            return Err(Cause::OutsideTree {
                path: path.to_owned(),
            }
            .into());
        }
        match self.resolve(root, path)? {
            Resolved::File(full) => {
                if self.restrictor == LoadRestrictor::RootOnly && !is_in(&full, root) {
                    return Err(Error::new(Cause::OutsideRoot { path: full, root: display_dir(root) }).help(
                        "move the file below the kustomization, or build with --load-restrictor LoadRestrictionsNone",
                    ));
                }
                Ok((self.read(&full)?, full))
            }
            Resolved::Dir(full) => Err(Cause::WrongEntry {
                path: display_dir(&full),
                expected: "a file",
                found: "a directory",
            }
            .into()),
            Resolved::Missing => Err(Cause::Missing {
                path: join(root, path).unwrap_or_else(|| path.to_owned()),
            }
            .into()),
        }
    }

    fn read(&self, full: &str) -> Result<Arc<[u8]>> {
        if let Some(content) = self.cache.borrow().get(full) {
            return Ok(content.clone());
        }
        let content = self.tree.read(full).map_err(|message| Cause::Tree {
            path: full.to_owned(),
            message,
        })?;
        self.count(content.len(), full)?;
        self.read_set.borrow_mut().files.insert(full.to_owned());
        // Small files are read again when several kustomizations share a base; large ones are rarely shared.
        if content.len() <= 1 << 20 {
            self.cache.borrow_mut().insert(full.to_owned(), content.clone());
        }
        Ok(content)
    }

    fn count(&self, bytes: usize, path: &str) -> Result<()> {
        let total = self.bytes.get() + bytes;
        self.bytes.set(total);
        if total > self.max_bytes {
            let what = format!("{total} bytes read, the last from '{path}'");
            return Err(Cause::Budget {
                budget: "bytes",
                what,
                limit: self.max_bytes,
            }
            .into());
        }
        let files = self.read_set.borrow().files.len();
        if files >= self.max_files {
            let what = format!("more than {files} files, the last '{path}'");
            return Err(Cause::Budget {
                budget: "files",
                what,
                limit: self.max_files,
            }
            .into());
        }
        Ok(())
    }

    /// The directory of a base or component named in a kustomization at `root`.
    pub(crate) fn base(&self, root: &str, path: &str) -> Result<String> {
        if path.is_empty() {
            return Err(Cause::Missing {
                path: "new root cannot be empty".into(),
            }
            .into());
        }
        if path.starts_with('/') {
            return Err(Cause::AbsolutePath {
                path: path.to_owned(),
            }
            .into());
        }
        match self.resolve(root, path) {
            Ok(Resolved::Dir(full)) => Ok(full),
            Ok(Resolved::File(full)) => Err(Cause::WrongEntry {
                path: full,
                expected: "a directory",
                found: "a file",
            }
            .into()),
            Ok(Resolved::Missing) if is_remote(path) => self
                .remotes
                .and_then(|r| r.directory(path))
                .ok_or_else(|| refuse_remote(path)),
            Ok(Resolved::Missing) => Err(Cause::Missing {
                path: join(root, path).unwrap_or_else(|| path.to_owned()),
            }
            .into()),
            Err(e) => Err(e),
        }
    }
}

fn refuse_remote(url: &str) -> Error {
    Error::new(Cause::Remote { url: url.to_owned() }).help(
        "copy it into the repository, or declare it as a source of its own; a build reads its own tree only",
    )
}

/// A directory for messages: the root of the tree is `.`.
pub(crate) fn display_dir(dir: &str) -> String {
    if dir.is_empty() { ".".into() } else { dir.into() }
}
