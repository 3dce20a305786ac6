//! A container's view of the file system: the host's, with a few things on top.
//!
//! There is no image root: a catalogue program sees the machine's own files. What a manifest mounts is bound over it
//! in a private mount namespace. A mount point that the machine does not have (`/opt/ibm/wlp/output`, `/data`) must
//! not be created on the machine; so the deepest directory that exists is covered with an overlay whose upper layer
//! is the container's own tmpfs, or, where that directory is `/` itself, the container gets a new root whose entries
//! are bound from the machine's.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sys::statvfs::{FsFlags, statvfs};
use nix::unistd::{chdir, pivot_root};
use serde::{Deserialize, Serialize};

/// One thing bound into a container.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct Bind {
    /// A file or directory of the node.
    pub(crate) source: PathBuf,
    /// Where the container sees it.
    pub(crate) target: PathBuf,
    pub(crate) read_only: bool,
}

const NONE: Option<&str> = None;

/// Makes the calling process' mount namespace private and mounts what its new PID namespace needs.
pub(crate) fn enter_private(proc: bool) -> io::Result<()> {
    mount(NONE, "/", NONE, MsFlags::MS_REC | MsFlags::MS_PRIVATE, NONE)?;
    if proc {
        mount(
            Some("proc"),
            "/proc",
            Some("proc"),
            MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC,
            NONE,
        )?;
    }
    Ok(())
}

/// A tmpfs of at most `size` bytes (0: the kernel's default, half of the memory).
pub(crate) fn mount_tmpfs(target: &Path, size: u64) -> io::Result<()> {
    let options = if size == 0 {
        "mode=0777".to_owned()
    } else {
        format!("mode=0777,size={size}")
    };
    mount(
        Some("tmpfs"),
        target,
        Some("tmpfs"),
        MsFlags::MS_NOSUID | MsFlags::MS_NODEV,
        Some(options.as_str()),
    )
    .map_err(Into::into)
}

/// Covers directories without touching the machine's.
struct Cover {
    /// A directory of the pod on which a tmpfs is mounted at the first need.
    scratch: PathBuf,
    mounted: bool,
    layers: usize,
    /// Known mount points and whether what lies there is the container's own.
    owned: Vec<(PathBuf, bool)>,
}

impl Cover {
    fn layer(&mut self) -> io::Result<PathBuf> {
        if !self.mounted {
            fs::create_dir_all(&self.scratch)?;
            mount_tmpfs(&self.scratch, 0)?;
            self.mounted = true;
        }
        self.layers += 1;
        let layer = self.scratch.join(self.layers.to_string());
        fs::create_dir_all(&layer)?;
        Ok(layer)
    }

    fn is_own(&self, path: &Path) -> bool {
        self.owned
            .iter()
            .filter(|(prefix, _)| path.starts_with(prefix))
            .max_by_key(|(prefix, _)| prefix.components().count())
            .is_some_and(|(_, own)| *own)
    }

    /// Makes `target` exist as a directory or a file.
    fn ensure(&mut self, target: &Path, directory: bool) -> io::Result<()> {
        if target.exists() {
            return Ok(());
        }
        let ancestor = target
            .ancestors()
            .skip(1)
            .find(|path| path.is_dir())
            .unwrap_or(Path::new("/"))
            .to_owned();
        if !self.is_own(&ancestor) {
            if ancestor == Path::new("/") {
                self.new_root()?;
            } else {
                self.overlay(&ancestor)?;
            }
        }
        if directory {
            fs::create_dir_all(target)
        } else {
            if let Some(parent) = target.parent() {
                fs::create_dir_all(parent)?;
            }
            fs::File::create(target).map(|_| ())
        }
    }

    fn overlay(&mut self, directory: &Path) -> io::Result<()> {
        let layer = self.layer()?;
        let (upper, work) = (layer.join("upper"), layer.join("work"));
        fs::create_dir(&upper)?;
        fs::create_dir(&work)?;
        let plain = format!(
            "lowerdir={},upperdir={},workdir={}",
            directory.display(),
            upper.display(),
            work.display()
        );
        // Inside a user namespace the overlay's own attributes must be user.* ones (Linux 5.11).
        let result = mount(
            Some("overlay"),
            directory,
            Some("overlay"),
            MsFlags::empty(),
            Some(plain.as_str()),
        )
        .or_else(|_| {
            mount(
                Some("overlay"),
                directory,
                Some("overlay"),
                MsFlags::empty(),
                Some(format!("{plain},userxattr").as_str()),
            )
        });
        result.map_err(|error| {
            io::Error::new(
                io::Error::from(error).kind(),
                format!("cover {} with an overlay: {error}", directory.display()),
            )
        })?;
        self.owned.push((directory.to_owned(), true));
        Ok(())
    }

    fn new_root(&mut self) -> io::Result<()> {
        let root = self.layer()?;
        mount(
            Some("tmpfs"),
            &root,
            Some("tmpfs"),
            MsFlags::empty(),
            Some("mode=0755"),
        )?;
        for entry in fs::read_dir("/")? {
            let entry = entry?;
            let (source, target) = (entry.path(), root.join(entry.file_name()));
            let kind = entry.file_type()?;
            if kind.is_symlink() {
                std::os::unix::fs::symlink(fs::read_link(&source)?, &target)?;
                continue;
            }
            if kind.is_dir() {
                fs::create_dir(&target)?;
            } else if kind.is_file() {
                fs::File::create(&target)?;
            } else {
                continue;
            }
            mount(
                Some(&source),
                &target,
                NONE,
                MsFlags::MS_BIND | MsFlags::MS_REC,
                NONE,
            )?;
            self.owned.push((source, false));
        }
        chdir(&root)?;
        if pivot_root(".", ".").is_ok() {
            umount2(".", MntFlags::MNT_DETACH)?;
        } else {
            // The machine's root is the initial ramfs, which cannot be pivoted away.
            mount(Some("."), "/", NONE, MsFlags::MS_MOVE, NONE)?;
            nix::unistd::chroot(".")?;
        }
        chdir("/")?;
        self.owned.push((PathBuf::from("/"), true));
        Ok(())
    }
}

/// Binds everything into the calling process' mount namespace, which must be private already.
pub(crate) fn bind_all(binds: &[Bind], scratch: &Path, read_only_root: bool) -> io::Result<()> {
    let mut cover = Cover {
        scratch: scratch.to_owned(),
        mounted: false,
        layers: 0,
        owned: Vec::new(),
    };
    // Parents first, whatever the order in the manifest: a later mount on a parent would hide the child.
    let mut binds: Vec<&Bind> = binds.iter().collect();
    binds.sort_by_key(|bind| bind.target.components().count());
    // A new root first: what was opened before it would belong to mounts that are gone afterwards.
    let needs_root = |target: &Path| target.ancestors().find(|path| path.is_dir()) == Some(Path::new("/"));
    if binds
        .iter()
        .any(|bind| !bind.target.exists() && needs_root(&bind.target))
    {
        cover.new_root()?;
    }
    // Then the sources, before anything is covered: an emptyDir on /tmp may hide the node's own state directory.
    let mut opened = Vec::with_capacity(binds.len());
    for bind in &binds {
        let file = fs::OpenOptions::new()
            .read(true)
            .custom_flags_path()
            .open(&bind.source)
            .map_err(|error| {
                io::Error::new(error.kind(), format!("open {}: {error}", bind.source.display()))
            })?;
        opened.push(file);
    }
    for (bind, file) in binds.iter().zip(&opened) {
        use std::os::fd::AsRawFd;
        let explain = |error: io::Error| {
            io::Error::new(
                error.kind(),
                format!(
                    "mount {} on {}: {error}",
                    bind.source.display(),
                    bind.target.display()
                ),
            )
        };
        cover
            .ensure(&bind.target, file.metadata()?.is_dir())
            .map_err(explain)?;
        // The target is looked at before it is covered by a /proc-relative source.
        let source = format!("/proc/self/fd/{}", file.as_raw_fd());
        mount(
            Some(source.as_str()),
            &bind.target,
            NONE,
            MsFlags::MS_BIND | MsFlags::MS_REC,
            NONE,
        )
        .map_err(|error| explain(error.into()))?;
        if bind.read_only {
            remount_read_only(&bind.target).map_err(explain)?;
        }
    }
    if read_only_root {
        remount_root_read_only(&cover)?;
    }
    Ok(())
}

/// Flags that the source mount has and a user namespace may not take away are kept.
fn remount_read_only(target: &Path) -> io::Result<()> {
    let mut flags = MsFlags::MS_BIND | MsFlags::MS_REMOUNT | MsFlags::MS_RDONLY;
    let have = statvfs(target)?.flags();
    for (bit, flag) in [
        (FsFlags::ST_NOSUID, MsFlags::MS_NOSUID),
        (FsFlags::ST_NODEV, MsFlags::MS_NODEV),
        (FsFlags::ST_NOEXEC, MsFlags::MS_NOEXEC),
    ] {
        if have.contains(bit) {
            flags |= flag;
        }
    }
    mount(NONE, target, NONE, flags, NONE).map_err(Into::into)
}

fn remount_root_read_only(cover: &Cover) -> io::Result<()> {
    if !cover.is_own(Path::new("/")) {
        // `/` may be a mount that cannot be remounted for us alone; a bind of itself can.
        mount(Some("/"), "/", NONE, MsFlags::MS_BIND | MsFlags::MS_REC, NONE)?;
        nix::unistd::chroot("/")?;
    }
    for (path, _) in cover.owned.iter().filter(|(path, _)| path != Path::new("/")) {
        if ["/proc", "/dev", "/sys"]
            .iter()
            .all(|special| path != Path::new(special))
            && path.exists()
        {
            // Files and special mounts may refuse; the root itself below must not.
            let _ = remount_read_only(path);
        }
    }
    remount_read_only(Path::new("/"))
}

/// `O_PATH`, which also opens what we may not read.
trait PathOnly {
    fn custom_flags_path(&mut self) -> &mut Self;
}

impl PathOnly for fs::OpenOptions {
    fn custom_flags_path(&mut self) -> &mut Self {
        use std::os::unix::fs::OpenOptionsExt;
        self.custom_flags(nix::libc::O_PATH | nix::libc::O_CLOEXEC)
    }
}
