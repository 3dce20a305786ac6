//! The one place where the CLI needs the kernel without a safe wrapper.

#![allow(unsafe_code)]

use std::io;
use std::os::fd::{FromRawFd as _, OwnedFd, RawFd};

use nix::libc;
use nix::sys::signal::{SigHandler, Signal, signal};
use nix::unistd::Pid;

/// A handle on a process that becomes readable when it ends. It is that process for ever, whoever gets its number later.
pub(crate) fn pidfd(pid: Pid) -> io::Result<OwnedFd> {
    // SAFETY: takes two integers and returns a new descriptor, which nobody else owns, or -1.
    let handle = unsafe { libc::syscall(libc::SYS_pidfd_open, pid.as_raw(), 0) };
    let handle = RawFd::try_from(handle).map_err(io::Error::other)?;
    if handle < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: as above.
    Ok(unsafe { OwnedFd::from_raw_fd(handle) })
}

/// Lets a command that prints into a pipe end quietly when the reader has had enough (`serin status | head -1`), as
/// every Unix program does; Rust's runtime ignores SIGPIPE, and printing would panic.
///
/// For commands of the user only: a server must not die because somebody closed a pipe.
pub(crate) fn end_quietly_on_a_closed_pipe() {
    // SAFETY: SIG_DFL is no handler of ours, so no code runs in a signal's context; called before any thread starts.
    // An error leaves SIGPIPE ignored, which is what Rust does.
    let _ = unsafe { signal(Signal::SIGPIPE, SigHandler::SigDfl) };
}
