//! Messages with file descriptors over `SOCK_SEQPACKET` Unix sockets: one message is one packet, so nothing needs
//! framing, and descriptors travel with the message that names them.
#![allow(unsafe_code)]

use std::io::{self, IoSlice, IoSliceMut};
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::path::Path;

use nix::fcntl::{OFlag, open};
use nix::sys::socket::{
    AddressFamily, Backlog, ControlMessage, ControlMessageOwned, MsgFlags, SockFlag, SockType, UnixAddr,
    accept4, bind, connect, listen, recvmsg, sendmsg, setsockopt, socket, socketpair, sockopt,
};
use nix::sys::stat::Mode;
use tokio::io::unix::AsyncFd;

/// The longest message. Container specifications travel in files, so messages are small; exec output is cut at 10 KiB.
pub(crate) const MAX_MESSAGE: usize = 64 * 1024;
/// The most descriptors in one message.
pub(crate) const MAX_FDS: usize = 32;

/// Registers a descriptor with the runtime's event loop.
pub(crate) fn watched<T: AsFd + AsRawFd + 'static>(inner: T) -> io::Result<AsyncFd<T>> {
    // SAFETY: `register` wants the descriptor to stay open and the same for as long as the value lives. Every type of
    // this crate that comes here owns its descriptor (`OwnedFd`, or a type around one) and never replaces it.
    unsafe { AsyncFd::register(inner) }.map_err(Into::into)
}

/// Two connected ends, both close-on-exec.
pub(crate) fn pair() -> io::Result<(OwnedFd, OwnedFd)> {
    let (a, b) = socketpair(
        AddressFamily::Unix,
        SockType::SeqPacket,
        None,
        SockFlag::SOCK_CLOEXEC,
    )?;
    widen(&a);
    widen(&b);
    Ok((a, b))
}

fn widen(fd: &OwnedFd) {
    // A larger buffer is comfort, not need: a full one only makes the sender wait.
    let _ = setsockopt(fd, sockopt::SndBuf, &(4 * MAX_MESSAGE));
}

/// A directory entry as a short path: socket addresses end at 108 bytes, state directories do not.
fn short_path(path: &Path) -> io::Result<(OwnedFd, String)> {
    let (Some(directory), Some(name)) = (path.parent(), path.file_name().and_then(|name| name.to_str()))
    else {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "not a socket path"));
    };
    let directory = open(
        directory,
        OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC,
        Mode::empty(),
    )?;
    let short = format!("/proc/self/fd/{}/{name}", directory.as_raw_fd());
    Ok((directory, short))
}

/// Listens at `path`, replacing what a dead predecessor left there.
pub(crate) fn listen_at(path: &Path) -> io::Result<OwnedFd> {
    match std::fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    let (_directory, short) = short_path(path)?;
    let fd = socket(
        AddressFamily::Unix,
        SockType::SeqPacket,
        SockFlag::SOCK_CLOEXEC,
        None,
    )?;
    bind(fd.as_raw_fd(), &UnixAddr::new(short.as_str())?)?;
    listen(&fd, Backlog::new(16)?)?;
    Ok(fd)
}

/// Connects to a listener at `path`.
pub(crate) fn connect_to(path: &Path) -> io::Result<OwnedFd> {
    let (_directory, short) = short_path(path)?;
    let fd = socket(
        AddressFamily::Unix,
        SockType::SeqPacket,
        SockFlag::SOCK_CLOEXEC,
        None,
    )?;
    widen(&fd);
    connect(fd.as_raw_fd(), &UnixAddr::new(short.as_str())?)?;
    Ok(fd)
}

/// Accepts one connection.
pub(crate) fn accept(listener: &OwnedFd) -> io::Result<OwnedFd> {
    let fd = accept4(listener.as_raw_fd(), SockFlag::SOCK_CLOEXEC)?;
    // SAFETY: accept4 returned a new descriptor that nobody else owns.
    let fd = unsafe { OwnedFd::from_raw_fd(fd) };
    widen(&fd);
    Ok(fd)
}

/// Sends one message with descriptors.
pub(crate) fn send(socket: impl AsFd, message: &[u8], fds: &[RawFd]) -> io::Result<()> {
    if message.len() > MAX_MESSAGE || fds.len() > MAX_FDS {
        return Err(io::Error::new(
            io::ErrorKind::InvalidInput,
            "message too large for the control socket",
        ));
    }
    let control = [ControlMessage::ScmRights(fds)];
    sendmsg::<()>(
        socket.as_fd().as_raw_fd(),
        &[IoSlice::new(message)],
        if fds.is_empty() { &[] } else { &control },
        MsgFlags::MSG_NOSIGNAL,
        None,
    )?;
    Ok(())
}

/// Receives one message; empty at the end of the connection. `WouldBlock` on a non-blocking socket without one.
pub(crate) fn receive(socket: impl AsFd) -> io::Result<(Vec<u8>, Vec<OwnedFd>)> {
    let mut buffer = vec![0_u8; MAX_MESSAGE];
    let mut control = nix::cmsg_space!([RawFd; MAX_FDS]);
    let (length, fds) = {
        let mut slices = [IoSliceMut::new(&mut buffer)];
        let received = recvmsg::<()>(
            socket.as_fd().as_raw_fd(),
            &mut slices,
            Some(&mut control),
            MsgFlags::MSG_CMSG_CLOEXEC,
        )?;
        let mut fds = Vec::new();
        for message in received.cmsgs()? {
            if let ControlMessageOwned::ScmRights(numbers) = message {
                for number in numbers {
                    // SAFETY: the kernel has just installed these descriptors for this message; nobody else knows them.
                    fds.push(unsafe { OwnedFd::from_raw_fd(number) });
                }
            }
        }
        (received.bytes, fds)
    };
    buffer.truncate(length);
    Ok((buffer, fds))
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};

    use super::*;

    #[test]
    fn a_descriptor_travels_with_its_message() {
        let (a, b) = pair().unwrap();
        let (reader, writer) = nix::unistd::pipe2(OFlag::O_CLOEXEC).unwrap();
        send(&a, b"take this", &[writer.as_raw_fd()]).unwrap();
        drop(writer);
        let (message, mut fds) = receive(&b).unwrap();
        assert_eq!(message, b"take this");
        let mut handed = std::fs::File::from(fds.pop().unwrap());
        handed.write_all(b"through").unwrap();
        drop(handed);
        let mut text = String::new();
        std::fs::File::from(reader).read_to_string(&mut text).unwrap();
        assert_eq!(text, "through");
    }

    #[test]
    fn a_socket_in_a_directory_deeper_than_108_bytes_is_reachable() {
        let directory = tempfile::tempdir().unwrap();
        let deep = directory.path().join("d".repeat(100)).join("e".repeat(100));
        std::fs::create_dir_all(&deep).unwrap();
        let path = deep.join("s.sock");
        let listener = listen_at(&path).unwrap();
        let client = connect_to(&path).unwrap();
        let server = accept(&listener).unwrap();
        send(&client, b"hello", &[]).unwrap();
        assert_eq!(receive(&server).unwrap().0, b"hello");
        drop(client);
        assert!(receive(&server).unwrap().0.is_empty());
    }
}
