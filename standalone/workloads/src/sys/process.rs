//! Processes: identity that survives pid reuse, pidfds, and `clone3` for starting a container.
#![allow(unsafe_code)]

use std::fs;
use std::io;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::time::Duration;

use nix::libc;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde::{Deserialize, Serialize};

/// A process, recorded so that it can be recognised later: pids are reused, pid and start time together are not
/// (within one boot, and the boot is part of the record).
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct ProcessRecord {
    pub(crate) pid: i32,
    /// Field 22 of `/proc/PID/stat`: clock ticks since boot.
    pub(crate) start_ticks: u64,
    pub(crate) boot: String,
}

impl ProcessRecord {
    /// The record of a process that runs now.
    pub(crate) fn of(pid: i32) -> io::Result<Self> {
        Ok(Self {
            pid,
            start_ticks: start_ticks(pid)?,
            boot: boot_id(),
        })
    }

    pub(crate) fn current() -> io::Result<Self> {
        Self::of(nix::unistd::getpid().as_raw())
    }

    /// Whether the very process that was recorded still runs (a zombie does not).
    pub(crate) fn is_alive(&self) -> bool {
        self.boot == boot_id() && start_ticks(self.pid).is_ok_and(|ticks| ticks == self.start_ticks)
    }

    /// Sends a signal to the very process that was recorded; `false` if it is gone.
    pub(crate) fn signal(&self, signal: Signal) -> bool {
        // The pidfd is opened before the identity is checked, so that the signal cannot reach a successor.
        let Ok(fd) = pidfd_open(self.pid) else {
            return false;
        };
        self.is_alive() && pidfd_signal(&fd, signal).is_ok()
    }

    /// Waits until it has ended, at most `deadline`; whether it has.
    pub(crate) fn wait_gone(&self, deadline: Duration) -> bool {
        let Ok(fd) = pidfd_open(self.pid) else { return true };
        if !self.is_alive() {
            return true;
        }
        let millis = u16::try_from(deadline.as_millis()).unwrap_or(u16::MAX);
        let mut fds = [PollFd::new(fd.as_fd(), PollFlags::POLLIN)];
        match poll(&mut fds, PollTimeout::from(millis)) {
            Ok(n) => n > 0 || !self.is_alive(),
            Err(_) => !self.is_alive(),
        }
    }
}

/// The id of this boot of the kernel; start times are relative to it.
pub(crate) fn boot_id() -> String {
    fs::read_to_string("/proc/sys/kernel/random/boot_id")
        .map(|id| id.trim().to_owned())
        .unwrap_or_default()
}

fn start_ticks(pid: i32) -> io::Result<u64> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat"))?;
    let malformed = || io::Error::new(io::ErrorKind::InvalidData, "malformed /proc/PID/stat");
    // The command name may hold spaces and parentheses; fields are counted from the last parenthesis.
    let (_, fields) = stat.rsplit_once(") ").ok_or_else(malformed)?;
    let mut fields = fields.split(' ');
    let state = fields.next().ok_or_else(malformed)?;
    if state == "Z" || state == "X" {
        return Err(io::Error::new(io::ErrorKind::NotFound, "the process has ended"));
    }
    fields
        .nth(18)
        .and_then(|ticks| ticks.parse().ok())
        .ok_or_else(malformed)
}

/// A file descriptor of a process, readable once it has ended.
pub(crate) fn pidfd_open(pid: i32) -> io::Result<OwnedFd> {
    // SAFETY: pidfd_open takes two integers and returns a new descriptor or -1; nobody else owns what it returns.
    unsafe {
        let fd = libc::syscall(libc::SYS_pidfd_open, pid, 0);
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        Ok(OwnedFd::from_raw_fd(fd as RawFd))
    }
}

/// Sends a signal through a pidfd.
pub(crate) fn pidfd_signal(fd: &OwnedFd, signal: Signal) -> io::Result<()> {
    // SAFETY: integers and a null siginfo pointer, which the kernel documents as "as kill(2) would".
    let result = unsafe {
        libc::syscall(
            libc::SYS_pidfd_send_signal,
            fd.as_raw_fd(),
            signal as libc::c_int,
            std::ptr::null::<libc::siginfo_t>(),
            0,
        )
    };
    if result < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(())
    }
}

/// Which side of a [`clone_process`] we are on.
pub(crate) enum Cloned {
    /// The caller.
    Parent {
        /// The child's pid in the caller's PID namespace.
        pid: i32,
        /// Readable once the child has ended.
        pidfd: OwnedFd,
    },
    /// The new process.
    Child,
}

/// `fork` with namespace flags (`CLONE_NEWPID | CLONE_NEWNS`): `unshare` cannot give each of several children a PID
/// namespace of its own.
///
/// Only for single-threaded processes (the shim): the child may then allocate and use the standard library.
pub(crate) fn clone_process(flags: i32) -> io::Result<Cloned> {
    let mut pidfd: RawFd = -1;
    // SAFETY: clone_args is plain integers for which all-zero is the documented default. Without CLONE_VM the child
    // gets its own copy of the address space, as fork does; the process has one thread (see above), so no lock can be
    // held by a thread that does not exist in the child. `pidfd` outlives the call that writes it.
    unsafe {
        let mut arguments: libc::clone_args = std::mem::zeroed();
        arguments.flags = u64::from((flags | libc::CLONE_PIDFD) as u32);
        arguments.pidfd = std::ptr::from_mut(&mut pidfd) as u64;
        arguments.exit_signal = libc::SIGCHLD as u64;
        match libc::syscall(
            libc::SYS_clone3,
            std::ptr::from_mut(&mut arguments),
            std::mem::size_of::<libc::clone_args>(),
        ) {
            -1 => Err(io::Error::last_os_error()),
            0 => Ok(Cloned::Child),
            pid => Ok(Cloned::Parent {
                pid: pid as i32,
                pidfd: OwnedFd::from_raw_fd(pidfd),
            }),
        }
    }
}

/// Gives `fd` the number `number` in this process, inheritable by what is executed next.
pub(crate) fn place_fd(fd: RawFd, number: RawFd) -> io::Result<()> {
    // SAFETY: dup2 and fcntl on integers; in the freshly cloned child nobody else owns `number`.
    let result = unsafe {
        if fd == number {
            libc::fcntl(fd, libc::F_SETFD, 0)
        } else {
            libc::dup2(fd, number)
        }
    };
    if result < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(())
    }
}

/// Marks every descriptor from `first` on as closed on exec.
pub(crate) fn close_on_exec_from(first: u32) {
    // SAFETY: integers only; CLOSE_RANGE_CLOEXEC changes flags and closes nothing.
    unsafe {
        libc::syscall(libc::SYS_close_range, first, u32::MAX, libc::CLOSE_RANGE_CLOEXEC);
    }
}

/// Ends this process at once, without destructors or buffers: the only way out of a cloned child.
pub(crate) fn exit_now(code: i32) -> ! {
    // SAFETY: _exit does not return and touches nothing of ours.
    unsafe { libc::_exit(code) }
}

/// An inherited descriptor, taken into ownership.
///
/// The caller states that it was handed to this process by number and that nobody else here closes it.
pub(crate) fn adopt_fd(number: RawFd) -> io::Result<OwnedFd> {
    // SAFETY: F_GETFD only checks that the number is open; ownership is the caller's statement above.
    unsafe {
        if libc::fcntl(number, libc::F_GETFD) < 0 {
            return Err(io::Error::last_os_error());
        }
        let fd = OwnedFd::from_raw_fd(number);
        libc::fcntl(number, libc::F_SETFD, libc::FD_CLOEXEC);
        Ok(fd)
    }
}

/// Forks a process that is still single-threaded; `true` in the child.
pub(crate) fn fork_single_threaded() -> io::Result<Option<i32>> {
    // SAFETY: the caller has one thread (the node before it starts its runtime), so the child may use everything.
    match unsafe { nix::unistd::fork() } {
        Ok(nix::unistd::ForkResult::Parent { child }) => Ok(Some(child.as_raw())),
        Ok(nix::unistd::ForkResult::Child) => Ok(None),
        Err(error) => Err(error.into()),
    }
}

/// Starts `command` with the given descriptors inherited under their own numbers.
pub(crate) fn spawn_with_fds(
    command: &mut std::process::Command,
    fds: &[RawFd],
) -> io::Result<std::process::Child> {
    use std::os::unix::process::CommandExt;
    let fds = fds.to_vec();
    // SAFETY: between fork and exec the closure calls fcntl and setsid only, both async-signal-safe.
    unsafe {
        command.pre_exec(move || {
            for fd in &fds {
                if libc::fcntl(*fd, libc::F_SETFD, 0) < 0 {
                    return Err(io::Error::last_os_error());
                }
            }
            libc::setsid();
            Ok(())
        });
    }
    command.spawn()
}

/// `SIGTERM`, then after `grace` `SIGKILL`; whether it is gone.
pub(crate) fn end(record: &ProcessRecord, grace: Duration) -> bool {
    if !record.signal(Signal::SIGTERM) || record.wait_gone(grace) {
        return !record.is_alive();
    }
    record.signal(Signal::SIGKILL);
    record.wait_gone(Duration::from_secs(5))
}

/// `kill` by number, for children that cannot have been reaped yet.
pub(crate) fn signal_child(pid: i32, signal: Signal) -> io::Result<()> {
    kill(Pid::from_raw(pid), signal).map_err(Into::into)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_record_recognises_its_process_and_not_a_successor() {
        let mut record = ProcessRecord::current().unwrap();
        assert!(record.is_alive());
        record.start_ticks += 1;
        assert!(!record.is_alive());
        assert!(!record.signal(Signal::SIGKILL));
    }

    #[test]
    fn a_record_of_an_ended_process_is_not_alive() {
        let mut child = std::process::Command::new("/bin/sh")
            .args(["-c", "read x"])
            .stdin(std::process::Stdio::piped())
            .spawn()
            .unwrap();
        let record = ProcessRecord::of(child.id() as i32).unwrap();
        assert!(end(&record, Duration::from_secs(5)));
        child.wait().unwrap();
        assert!(record.wait_gone(Duration::from_secs(5)));
        assert!(!record.is_alive());
    }
}
