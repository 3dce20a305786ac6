//! Revisions made up for tests.

use super::tree::{Repo, Snapshot};

/// A bare repository with one commit made of `(path, content)`; a content that starts with `-> ` is a link.
pub(crate) fn snapshot(
    files: &[(&str, &str)],
    ignore: Option<&str>,
    sparse: &[&str],
) -> (tempfile::TempDir, Snapshot) {
    let dir = tempfile::tempdir().unwrap();
    let repo = git2::Repository::init_bare(dir.path()).unwrap();
    let mut index = git2::Index::new().unwrap();
    for (path, content) in files {
        let (mode, body) = match content.strip_prefix("-> ") {
            Some(target) => (0o120_000, target),
            None => (0o100_644, *content),
        };
        let entry = git2::IndexEntry {
            ctime: git2::IndexTime::new(0, 0),
            mtime: git2::IndexTime::new(0, 0),
            dev: 0,
            ino: 0,
            mode,
            uid: 0,
            gid: 0,
            file_size: 0,
            id: repo.blob(body.as_bytes()).unwrap(),
            flags: 0,
            flags_extended: 0,
            path: path.as_bytes().to_vec(),
        };
        index.add(&entry).unwrap();
    }
    let root = index.write_tree_to(&repo).unwrap();
    let sparse: Vec<String> = sparse.iter().map(|s| (*s).to_string()).collect();
    let opened = Repo::open(dir.path()).unwrap();
    let snapshot = Snapshot::new(opened, "main@sha1:x".into(), "x", root, ignore, &sparse);
    (dir, snapshot)
}
