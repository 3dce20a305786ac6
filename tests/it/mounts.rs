//! Small file systems in a mount namespace of their own, which are gone with the process that holds it.

use std::fmt::Write as _;
use std::io::{BufRead as _, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

/// The namespace, held by a process.
pub(crate) struct Mounts {
    holder: Child,
}

impl Mounts {
    /// Mounts a file system of `megabytes` on each of the directories, which are made.
    pub(crate) fn new(directories: &[PathBuf], megabytes: u32) -> Self {
        let mut script = String::from("set -e\n");
        for directory in directories {
            let _ = writeln!(
                script,
                "mkdir -p '{0}'\nmount -t tmpfs -o size={megabytes}m,mode=700 tmpfs '{0}'",
                directory.display()
            );
        }
        script.push_str("echo mounted\nexec cat\n");
        // Ends when its standard input does, that is with this process at the latest.
        let mut holder = Command::new("unshare")
            .args(["--mount", "--propagation", "private", "sh", "-c", &script])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .expect("make a mount namespace");
        let mut said = String::new();
        let output = holder.stdout.take().unwrap();
        BufReader::new(output).read_line(&mut said).unwrap();
        assert_eq!(said, "mounted\n", "the file systems are mounted");
        Self { holder }
    }

    /// A command that runs what follows in the namespace.
    pub(crate) fn enter(&self) -> Command {
        let mut command = Command::new("nsenter");
        command.args(["--mount", "--target", &self.holder.id().to_string(), "--"]);
        command
    }

    /// The process that holds the namespace.
    pub(crate) fn holder(&self) -> u32 {
        self.holder.id()
    }

    /// A path as the namespace sees it.
    pub(crate) fn inside(&self, path: &Path) -> PathBuf {
        let root = PathBuf::from(format!("/proc/{}/root", self.holder.id()));
        root.join(path.strip_prefix("/").unwrap())
    }
}

impl Drop for Mounts {
    fn drop(&mut self) {
        drop(self.holder.stdin.take());
        let _ = self.holder.wait();
    }
}
