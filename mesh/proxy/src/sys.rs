//! The few kernel calls that have no safe wrapper: taking over inherited file descriptors.
#![allow(unsafe_code)] // the crate's only unsafe code: adopting a descriptor that our parent opened for us

use std::net::TcpListener;
use std::os::fd::{FromRawFd, RawFd};

/// Takes ownership of the listening socket that the parent process left at descriptor `fd`.
///
/// Returns an error when the descriptor is not an open listening TCP socket, so a wrong `SERIN_LISTENERS` is told
/// instead of adopted.
pub(crate) fn adopt_listener(fd: RawFd) -> std::io::Result<TcpListener> {
    if fd < 3 {
        return Err(std::io::Error::other(
            "descriptors 0 to 2 are the standard streams",
        ));
    }
    nix::fcntl::fcntl(
        // SAFETY: borrowed for one F_GETFD only, which fails with EBADF on a closed descriptor and changes nothing.
        unsafe { std::os::fd::BorrowedFd::borrow_raw(fd) },
        nix::fcntl::FcntlArg::F_GETFD,
    )
    .map_err(std::io::Error::from)?;
    // SAFETY: the descriptor is open (checked above) and named to us by SERIN_LISTENERS, the parent's promise that it
    // belongs to this process alone; it is adopted once, at start, by the only caller.
    let listener = unsafe { TcpListener::from_raw_fd(fd) };
    listener.local_addr()?;
    listener.set_nonblocking(true)?;
    Ok(listener)
}
