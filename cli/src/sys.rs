//! The one place where the CLI needs the kernel without a safe wrapper.

#![allow(unsafe_code)]

use nix::sys::signal::{SigHandler, Signal, signal};

/// Lets a command that prints into a pipe end quietly when the reader has had enough (`serin status | head -1`), as
/// every Unix program does; Rust's runtime ignores SIGPIPE, and printing would panic.
///
/// For commands of the user only: a server must not die because somebody closed a pipe.
pub(crate) fn end_quietly_on_a_closed_pipe() {
    // SAFETY: SIG_DFL is no handler of ours, so no code runs in a signal's context; called before any thread starts.
    // An error leaves SIGPIPE ignored, which is what Rust does.
    let _ = unsafe { signal(Signal::SIGPIPE, SigHandler::SigDfl) };
}
