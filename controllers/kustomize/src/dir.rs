//! A directory of the disk as a tree, for the command line. The only place of this crate that touches a file system.

use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::tree::{FileTree, TreeEntry};

/// A directory and all below it. Links that lead out of it are refused by the build.
#[derive(Clone, Debug)]
pub struct DirTree {
    root: PathBuf,
}

impl DirTree {
    /// A tree over a directory.
    pub fn new(root: impl AsRef<Path>) -> DirTree {
        DirTree {
            root: root.as_ref().to_path_buf(),
        }
    }
}

impl FileTree for DirTree {
    fn entry(&self, path: &str) -> Result<TreeEntry, String> {
        let full = self.root.join(path);
        match std::fs::symlink_metadata(&full) {
            Ok(meta) if meta.is_dir() => Ok(TreeEntry::Dir),
            Ok(meta) if meta.is_file() => Ok(TreeEntry::File),
            Ok(meta) if meta.is_symlink() && path.is_empty() => Ok(TreeEntry::Dir),
            Ok(meta) if meta.is_symlink() => {
                let target = std::fs::read_link(&full).map_err(|e| e.to_string())?;
                Ok(TreeEntry::Symlink(target.to_string_lossy().into_owned()))
            }
            // Sockets, devices, pipes: reading one could block for ever.
            Ok(_) => Err("not a regular file".into()),
            Err(e) if matches!(e.kind(), ErrorKind::NotFound | ErrorKind::NotADirectory) => {
                Ok(TreeEntry::Missing)
            }
            Err(e) => Err(e.to_string()),
        }
    }

    fn read(&self, path: &str) -> Result<Arc<[u8]>, String> {
        std::fs::read(self.root.join(path))
            .map(Into::into)
            .map_err(|e| e.to_string())
    }
}
