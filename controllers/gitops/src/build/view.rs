//! What a build sees of a revision, and a record of everything that it looked at.
//!
//! The record is the exact key of the build's result: a later revision in which every look gives the same answer
//! builds to the same objects, and is not built again. Checking costs one path lookup per look, in directories that are
//! decoded once for all ([`crate::source::tree`]).

use std::collections::BTreeMap;

use parking_lot::Mutex;
use sha2::{Digest, Sha256};

use serin_kustomize::{FileTree, TreeEntry};

use crate::error::Error;
use crate::source::tree::{Node, Snapshot};

/// One question that a build asked.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
enum Look {
    /// What is at this path, and if it is a file, its content.
    Path(String),
    /// What is in this directory.
    Listing(String),
}

/// Its answer, short enough to keep.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Answer {
    Nothing,
    /// That there is a directory; what is in it is a question of its own.
    Directory,
    File(git2::Oid),
    Listing([u8; 32]),
}

/// Everything that a build looked at.
#[derive(Debug, Clone, Default)]
pub(crate) struct ReadSet(Vec<(Look, Answer)>);

impl ReadSet {
    /// Whether a build from `snapshot` would see exactly the same.
    pub(crate) fn holds(&self, snapshot: &Snapshot) -> Result<bool, Error> {
        for (look, answer) in &self.0 {
            if ask(snapshot, look)? != *answer {
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// Number of paths and directories looked at.
    pub(crate) fn len(&self) -> usize {
        self.0.len()
    }
}

fn ask(snapshot: &Snapshot, look: &Look) -> Result<Answer, Error> {
    Ok(match look {
        Look::Path(path) => match snapshot.look(path)? {
            Some(Node::File(id)) => Answer::File(id),
            Some(Node::Directory(_)) => Answer::Directory,
            Some(Node::Link(_) | Node::Submodule) | None => Answer::Nothing,
        },
        Look::Listing(path) => snapshot
            .list(path)?
            .map_or(Answer::Nothing, |entries| Answer::Listing(digest(&entries))),
    })
}

fn digest(entries: &[(String, bool)]) -> [u8; 32] {
    let mut hash = Sha256::new();
    for (name, directory) in entries {
        hash.update(name);
        hash.update([0, u8::from(*directory)]);
    }
    hash.finalize().into()
}

/// A revision with one file put over it (the edited kustomization), recording.
pub(crate) struct View<'a> {
    snapshot: &'a Snapshot,
    put_over: BTreeMap<String, Vec<u8>>,
    looks: Mutex<BTreeMap<Look, Answer>>,
}

impl<'a> View<'a> {
    pub(crate) fn new(snapshot: &'a Snapshot) -> Self {
        Self {
            snapshot,
            put_over: BTreeMap::new(),
            looks: Mutex::default(),
        }
    }

    /// Puts a file over the revision; the path is normalised.
    pub(crate) fn put(&mut self, path: String, content: Vec<u8>) {
        self.put_over.insert(path, content);
    }

    fn note(&self, look: Look, answer: Answer) {
        self.looks.lock().insert(look, answer);
    }

    pub(crate) fn read(&self, path: &str) -> Result<Option<Vec<u8>>, Error> {
        if let Some(content) = self.put_over.get(path) {
            return Ok(Some(content.clone()));
        }
        let look = Look::Path(path.to_string());
        let answer = ask(self.snapshot, &look)?;
        self.note(look, answer);
        self.snapshot.read(path)
    }

    pub(crate) fn is_file(&self, path: &str) -> Result<bool, Error> {
        if self.put_over.contains_key(path) {
            return Ok(true);
        }
        Ok(matches!(self.look(path)?, Answer::File(_)))
    }

    pub(crate) fn is_directory(&self, path: &str) -> Result<bool, Error> {
        Ok(self.look(path)? == Answer::Directory)
    }

    fn look(&self, path: &str) -> Result<Answer, Error> {
        let look = Look::Path(path.to_string());
        let answer = ask(self.snapshot, &look)?;
        self.note(look, answer.clone());
        Ok(answer)
    }

    /// Names in a directory, sorted, and whether each is a directory.
    pub(crate) fn list(&self, path: &str) -> Result<Option<Vec<(String, bool)>>, Error> {
        let entries = self.snapshot.list(path)?;
        let answer = entries
            .as_ref()
            .map_or(Answer::Nothing, |e| Answer::Listing(digest(e)));
        self.note(Look::Listing(path.to_string()), answer);
        Ok(entries)
    }

    pub(crate) fn entry(&self, path: &str) -> Result<TreeEntry, Error> {
        if self.put_over.contains_key(path) {
            return Ok(TreeEntry::File);
        }
        if path.is_empty() {
            return Ok(TreeEntry::Dir);
        }
        Ok(match self.look(path)? {
            Answer::File(_) => TreeEntry::File,
            Answer::Directory => TreeEntry::Dir,
            Answer::Nothing | Answer::Listing(_) => TreeEntry::Missing,
        })
    }

    pub(crate) fn into_reads(self) -> ReadSet {
        ReadSet(self.looks.into_inner().into_iter().collect())
    }
}

/// Links are followed by the revision itself, inside of it, so a build never sees one.
impl FileTree for View<'_> {
    fn entry(&self, path: &str) -> Result<TreeEntry, String> {
        View::entry(self, path).map_err(|e| e.to_string())
    }

    fn read(&self, path: &str) -> Result<std::sync::Arc<[u8]>, String> {
        match View::read(self, path) {
            Ok(Some(content)) => Ok(content.into()),
            Ok(None) => Err("no such file".into()),
            Err(e) => Err(e.to_string()),
        }
    }
}
