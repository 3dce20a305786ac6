//! Starting a container's first process, and commands beside it.

use std::ffi::CString;
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, AsRawFd, OwnedFd, RawFd};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use nix::fcntl::{AtFlags, OFlag, open};
use nix::libc;
use nix::sched::{CloneFlags, setns};
use nix::sys::prctl::set_pdeathsig;
use nix::sys::signal::{SigSet, SigmaskHow, Signal, sigprocmask};
use nix::sys::stat::Mode;
use nix::unistd::{Gid, Uid, access, chdir, execve, execveat, pipe2, setgroups, setresgid, setresuid};

use super::protocol::ContainerSpec;
use crate::sys::mounts::{bind_all, enter_private};
use crate::sys::process::{Cloned, clone_process, close_on_exec_from, exit_now, place_fd};

/// The PATH of a container that sets none; what container runtimes use.
pub(crate) const DEFAULT_PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// A running container, as its parent holds it.
pub(crate) struct Child {
    pub(crate) pid: i32,
    pub(crate) pidfd: OwnedFd,
    pub(crate) stdout: OwnedFd,
    pub(crate) stderr: OwnedFd,
}

/// Starts a container. Errors before exec come back as text, in the words a container runtime would use.
pub(crate) fn start(
    spec: &ContainerSpec,
    network: &OwnedFd,
    scratch: &Path,
    listeners: &[OwnedFd],
) -> Result<Child, String> {
    let pipes = || -> io::Result<_> {
        Ok((
            pipe2(OFlag::O_CLOEXEC)?,
            pipe2(OFlag::O_CLOEXEC)?,
            pipe2(OFlag::O_CLOEXEC)?,
        ))
    };
    let ((stdout, stdout_write), (stderr, stderr_write), (failure, failure_write)) =
        pipes().map_err(|error| format!("create pipes: {error}"))?;
    let cloned = clone_process(libc::CLONE_NEWPID | libc::CLONE_NEWNS)
        .map_err(|error| format!("create PID and mount namespaces: {error}"))?;
    match cloned {
        Cloned::Child => {
            let error = become_container(spec, network, scratch, listeners, &stdout_write, &stderr_write);
            let _ = std::fs::File::from(failure_write).write_all(error.as_bytes());
            exit_now(128);
        }
        Cloned::Parent { pid, pidfd } => {
            drop((stdout_write, stderr_write, failure_write));
            let mut reason = String::new();
            // Ends at exec (close-on-exec) or with the reason; mounts and exec take milliseconds.
            let _ = std::fs::File::from(failure).read_to_string(&mut reason);
            if reason.is_empty() {
                nonblocking(&stdout);
                nonblocking(&stderr);
                return Ok(Child {
                    pid,
                    pidfd,
                    stdout,
                    stderr,
                });
            }
            let _ = nix::sys::wait::waitpid(nix::unistd::Pid::from_raw(pid), None);
            Err(reason)
        }
    }
}

/// Makes reads from a pipe return at once.
pub(crate) fn nonblocking(fd: &OwnedFd) {
    let _ = nix::fcntl::fcntl(fd, nix::fcntl::FcntlArg::F_SETFL(OFlag::O_NONBLOCK));
}

/// Runs in the new process; returns only with the reason why it could not become the container.
fn become_container(
    spec: &ContainerSpec,
    network: &OwnedFd,
    scratch: &Path,
    listeners: &[OwnedFd],
    stdout: &OwnedFd,
    stderr: &OwnedFd,
) -> String {
    let explain = |what: &str, error: &dyn std::fmt::Display| format!("{what}: {error}");
    if let Err(error) = setns(network, CloneFlags::CLONE_NEWNET) {
        return explain("enter the pod's network namespace", &error);
    }
    // Opened before anything is mounted: an emptyDir on /tmp must not hide a program that lives there.
    let path = spec
        .env
        .iter()
        .rev()
        .find(|(name, _)| name == "PATH")
        .map_or(DEFAULT_PATH, |(_, value)| value.as_str());
    let early = open_program(&spec.program, path, None);
    if let Err(error) = enter_private(true) {
        return explain("make the mount namespace private", &error);
    }
    if let Err(error) = bind_all(&spec.binds, scratch, spec.read_only_root) {
        return explain("mount volumes", &error);
    }
    let directory = spec.working_dir.as_deref().unwrap_or(Path::new("/"));
    if let Err(error) = chdir(directory) {
        return format!(
            "chdir to cwd (\"{}\") set in config.json failed: {error}",
            directory.display()
        );
    }
    let program = match early.or_else(|_| open_program(&spec.program, path, Some(directory))) {
        Ok(program) => program,
        Err(reason) => return reason,
    };
    if let Err(error) = place_stdio(stdout, stderr) {
        return explain("set up standard streams", &error);
    }
    let mut env = spec.env.clone();
    close_on_exec_from(3);
    if let Err(error) = place_listeners(spec, listeners, &mut env) {
        return explain("hand over listening sockets", &error);
    }
    if let Err(error) = take_identity(spec) {
        return explain("set user and groups", &error);
    }
    // After the change of identity, which clears it. If the shim died in between, do not start at all.
    if let Err(error) = set_pdeathsig(Signal::SIGKILL) {
        return explain("set the parent-death signal", &error);
    }
    let _ = sigprocmask(SigmaskHow::SIG_SETMASK, Some(&SigSet::empty()), None);
    let argv = match strings(&spec.argv) {
        Ok(argv) => argv,
        Err(error) => return error,
    };
    let env = match strings(
        &env.iter()
            .map(|(name, value)| format!("{name}={value}"))
            .collect::<Vec<_>>(),
    ) {
        Ok(env) => env,
        Err(error) => return error,
    };
    execute(&program, &argv, &env)
}

fn strings(values: &[String]) -> Result<Vec<CString>, String> {
    values
        .iter()
        .map(|value| CString::new(value.as_str()).map_err(|_| format!("{value:?} contains a zero byte")))
        .collect()
}

struct Program {
    fd: OwnedFd,
    path: PathBuf,
    elf: bool,
}

/// Finds the program: by path, or in PATH.
fn open_program(program: &str, path: &str, directory: Option<&Path>) -> Result<Program, String> {
    let candidates: Vec<PathBuf> = if program.contains('/') {
        match directory {
            Some(directory) => vec![directory.join(program)],
            None if program.starts_with('/') => vec![PathBuf::from(program)],
            None => return Err(String::new()),
        }
    } else {
        path.split(':')
            .map(|directory| Path::new(directory).join(program))
            .collect()
    };
    for candidate in &candidates {
        if candidate.is_dir() || access(candidate, nix::unistd::AccessFlags::X_OK).is_err() {
            continue;
        }
        let Ok(fd) = open(candidate, OFlag::O_RDONLY | OFlag::O_CLOEXEC, Mode::empty()) else {
            continue;
        };
        let file = std::fs::File::from(fd);
        let mut magic = [0_u8; 4];
        let elf = file.read_exact_at(&mut magic, 0).is_ok() && magic == *b"\x7fELF";
        return Ok(Program {
            fd: OwnedFd::from(file),
            path: candidate.clone(),
            elf,
        });
    }
    Err(if program.contains('/') {
        format!("exec: \"{program}\": stat {program}: no such file or directory")
    } else {
        format!("exec: \"{program}\": executable file not found in $PATH")
    })
}

fn execute(program: &Program, argv: &[CString], env: &[CString]) -> String {
    let error = if program.elf {
        execveat(&program.fd, c"", argv, env, AtFlags::AT_EMPTY_PATH)
    } else {
        // A script: its interpreter opens it by name.
        match CString::new(program.path.as_os_str().as_encoded_bytes()) {
            Ok(path) => execve(&path, argv, env),
            Err(_) => return "the program's path contains a zero byte".to_owned(),
        }
    };
    match error {
        Ok(never) => match never {},
        Err(error) => format!("exec: \"{}\": {error}", program.path.display()),
    }
}

fn place_stdio(stdout: &OwnedFd, stderr: &OwnedFd) -> io::Result<()> {
    let null = open("/dev/null", OFlag::O_RDONLY | OFlag::O_CLOEXEC, Mode::empty())?;
    place_fd(null.as_raw_fd(), 0)?;
    place_fd(stdout.as_raw_fd(), 1)?;
    place_fd(stderr.as_raw_fd(), 2)
}

/// Puts the listening sockets at 3, 4, … and names them in `SERIN_LISTENERS`.
fn place_listeners(
    spec: &ContainerSpec,
    listeners: &[OwnedFd],
    env: &mut Vec<(String, String)>,
) -> io::Result<()> {
    if listeners.is_empty() {
        return Ok(());
    }
    // Copies above the target range first, so that no target number is still somebody's source.
    let base: RawFd = 3;
    let mut copies = Vec::new();
    for listener in listeners {
        let copy = nix::fcntl::fcntl(
            listener.as_fd(),
            nix::fcntl::FcntlArg::F_DUPFD_CLOEXEC(base + 2 * listeners.len() as RawFd + 32),
        )?;
        copies.push(copy);
    }
    let mut value = Vec::new();
    for (position, copy) in copies.iter().enumerate() {
        let number = base + position as RawFd;
        place_fd(*copy, number)?;
        if let Some(port) = spec.listeners.get(position) {
            value.push(format!("{port}={number}"));
        }
    }
    env.retain(|(name, _)| name != "SERIN_LISTENERS");
    env.push(("SERIN_LISTENERS".to_owned(), value.join(",")));
    Ok(())
}

fn take_identity(spec: &ContainerSpec) -> io::Result<()> {
    if spec.uid.is_none() && spec.gid.is_none() && spec.groups.is_empty() {
        return Ok(());
    }
    let groups: Vec<Gid> = spec.groups.iter().copied().map(Gid::from_raw).collect();
    if nix::unistd::geteuid().is_root() {
        // Denied in a user namespace without a group map: then there are no groups to drop either.
        let _ = setgroups(&groups);
    }
    if let Some(gid) = spec.gid.map(Gid::from_raw) {
        setresgid(gid, gid, gid)?;
    }
    if let Some(uid) = spec.uid.map(Uid::from_raw) {
        setresuid(uid, uid, uid)?;
    }
    Ok(())
}

/// A command running beside a container.
pub(crate) struct Beside {
    pub(crate) pid: i32,
    pub(crate) output: OwnedFd,
}

/// Runs a command in a container's namespaces and as its user. The process returned stands outside of the container's
/// PID namespace and passes on the exit status of the command inside; when it is killed, so is the command.
pub(crate) fn run_beside(
    container: &OwnedFd,
    spec: &ContainerSpec,
    argv: &[String],
    env: &[(String, String)],
) -> Result<Beside, String> {
    let (output, output_write) =
        pipe2(OFlag::O_CLOEXEC).map_err(|error| format!("create a pipe: {error}"))?;
    match clone_process(0).map_err(|error| format!("fork: {error}"))? {
        Cloned::Parent { pid, .. } => {
            nonblocking(&output);
            Ok(Beside { pid, output })
        }
        Cloned::Child => {
            let code = match beside(container, spec, argv, env, &output_write) {
                Ok(code) => code,
                Err(reason) => {
                    let _ = std::fs::File::from(output_write).write_all(reason.as_bytes());
                    126
                }
            };
            exit_now(code);
        }
    }
}

fn beside(
    container: &OwnedFd,
    spec: &ContainerSpec,
    argv: &[String],
    env: &[(String, String)],
    output: &OwnedFd,
) -> Result<i32, String> {
    let _ = set_pdeathsig(Signal::SIGKILL);
    setns(
        container,
        CloneFlags::CLONE_NEWPID | CloneFlags::CLONE_NEWNET | CloneFlags::CLONE_NEWNS,
    )
    .map_err(|error| format!("enter the container's namespaces: {error}"))?;
    // Entering a PID namespace takes effect for children only.
    match clone_process(0).map_err(|error| format!("fork: {error}"))? {
        Cloned::Parent { pid, .. } => match nix::sys::wait::waitpid(nix::unistd::Pid::from_raw(pid), None) {
            Ok(nix::sys::wait::WaitStatus::Exited(_, code)) => Ok(code),
            Ok(nix::sys::wait::WaitStatus::Signaled(_, signal, _)) => Ok(128 + signal as i32),
            Ok(_) | Err(_) => Ok(255),
        },
        Cloned::Child => {
            let reason = (|| -> Result<String, String> {
                let text = |what: &str, error: &dyn std::fmt::Display| format!("{what}: {error}");
                let directory = spec.working_dir.as_deref().unwrap_or(Path::new("/"));
                chdir(directory).map_err(|error| text("chdir", &error))?;
                let path = env
                    .iter()
                    .rev()
                    .find(|(name, _)| name == "PATH")
                    .map_or(DEFAULT_PATH, |(_, value)| value.as_str());
                let command = argv.first().ok_or("no command")?;
                let program = open_program(command, path, Some(directory))?;
                place_stdio(output, output).map_err(|error| text("standard streams", &error))?;
                close_on_exec_from(3);
                take_identity(spec).map_err(|error| text("set user and groups", &error))?;
                let _ = set_pdeathsig(Signal::SIGKILL);
                let _ = sigprocmask(SigmaskHow::SIG_SETMASK, Some(&SigSet::empty()), None);
                let argv = strings(argv)?;
                let env: Vec<String> = env
                    .iter()
                    .map(|(name, value)| format!("{name}={value}"))
                    .collect();
                Ok(execute(&program, &argv, &strings(&env)?))
            })();
            let reason = reason.unwrap_or_else(|reason| reason);
            let _ = nix::unistd::write(output, reason.as_bytes());
            exit_now(126);
        }
    }
}
