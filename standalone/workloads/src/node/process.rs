//! The node's process: namespaces first, while it has one thread; then the runtime.

use std::fs;
use std::io;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::process::{Command, ExitCode, Stdio};
use std::time::Duration;

use nix::fcntl::{Flock, FlockArg};
use nix::sched::{CloneFlags, setns, unshare};
use nix::unistd::{getgid, getuid};
use tokio_util::sync::CancellationToken;

use super::broker;
use super::config::NodeConfig;
use super::record::{NodeRecord, Paths, read_node, write_atomically, write_first};
use super::run::{HostSide, Node};
use super::shim_client::shim_process;
use crate::Error;
use crate::sys::fdpass;
use crate::sys::process::{ProcessRecord, end, fork_single_threaded, spawn_with_fds};

/// How long an old node may take to go before it is killed.
const REPLACE_GRACE: Duration = Duration::from_secs(3);

/// How often and how far apart the lock of the state directory is tried: three seconds in all.
const LOCK_TRIES: u32 = 150;
const LOCK_PAUSE_MILLIS: u16 = 20;

const NAMESPACE_REMEDY: &str = "run as root, or allow unprivileged user namespaces (sysctl kernel.unprivileged_userns_clone=1, kernel.apparmor_restrict_unprivileged_userns=0, user.max_user_namespaces > 0)";

/// Entry of the hidden subcommand `node`. `config_file` holds a [`NodeConfig`] as JSON.
///
/// Must be called before the process starts any thread: it forks, enters namespaces and then builds its own runtime.
/// Ends on SIGTERM, leaving the pods to the next node.
pub fn main(config_file: &Path) -> ExitCode {
    match run(config_file) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("node: {error}");
            ExitCode::FAILURE
        }
    }
}

fn run(config_file: &Path) -> Result<(), Error> {
    let text = fs::read(config_file).map_err(|error| Error::file("read", config_file, error))?;
    let mut config: NodeConfig =
        serde_json::from_slice(&text).map_err(|error| Error::file("read", config_file, error.into()))?;
    let paths = Paths::new(&config.state_dir);
    fs::create_dir_all(paths.pods()).map_err(|error| Error::file("create", paths.pods(), error))?;
    let (ours, theirs) =
        fdpass::pair().map_err(|error| Error::file("create sockets for", paths.root(), error))?;
    // The broker keeps the host's namespaces, which this process is about to leave.
    let broker_pid =
        match fork_single_threaded().map_err(|error| Error::file("fork for", paths.root(), error))? {
            Some(pid) => pid,
            None => {
                drop(ours);
                broker::serve(&theirs);
                crate::sys::process::exit_now(0);
            }
        };
    drop(theirs);
    // After the fork: the broker must not hold on to the lock of a node that was killed.
    let _lock = lock(&paths)?;
    config.unprivileged = enter_namespaces(&paths)?;
    let record = NodeRecord {
        node: ProcessRecord::current().map_err(|error| Error::file("read", "/proc/self/stat", error))?,
        broker: ProcessRecord::of(broker_pid).ok(),
        fingerprint: fingerprint(&config),
    };
    let encoded = serde_json::to_vec(&record).unwrap_or_default();
    write_atomically(&paths.node_record(), &encoded)
        .map_err(|error| Error::file("write", paths.node_record(), error))?;
    // Two threads: the control plane of a node is little work, and DNS should not wait for it.
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .map_err(|error| Error::file("start the runtime of", paths.root(), error))?;
    let result = runtime.block_on(async {
        let cancel = CancellationToken::new();
        let stop = cancel.clone();
        tokio::spawn(async move {
            use tokio::signal::unix::{SignalKind, signal};
            let (Ok(mut term), Ok(mut int)) =
                (signal(SignalKind::terminate()), signal(SignalKind::interrupt()))
            else {
                return;
            };
            tokio::select! {
                _ = term.recv() => {}
                _ = int.recv() => {}
            }
            stop.cancel();
        });
        let client = serin_kit::client::over_unix(&config.api_socket, config.api_token.as_deref())?;
        Node::run(config, client, HostSide(ours), cancel).await
    });
    runtime.shutdown_timeout(Duration::from_secs(1));
    result
}

fn lock(paths: &Paths) -> Result<Flock<fs::File>, Error> {
    let path = paths.lock();
    let file = fs::OpenOptions::new()
        .create(true)
        .truncate(false)
        .write(true)
        .open(&path)
        .map_err(|error| Error::file("open", &path, error))?;
    // A node that was killed lets go only when the last of its threads has ended, a moment after it counts as dead.
    let mut file = file;
    for _ in 0..LOCK_TRIES {
        match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
            Ok(lock) => return Ok(lock),
            Err((back, nix::errno::Errno::EWOULDBLOCK)) => file = back,
            Err((_, error)) => return Err(Error::file("lock", &path, error.into())),
        }
        let _ = nix::poll::poll(&mut [], nix::poll::PollTimeout::from(LOCK_PAUSE_MILLIS));
    }
    Err(Error::AlreadyRunning {
        pid: read_node(paths).map_or(0, |record| record.node.pid),
        path: paths.root().to_owned(),
    })
}

/// Enters the namespaces that pods of an earlier node keep, or makes new ones. Whether they are unprivileged.
fn enter_namespaces(paths: &Paths) -> Result<bool, Error> {
    let kernel = |action: &'static str| {
        move |source: io::Error| Error::Kernel {
            action,
            source,
            remedy: NAMESPACE_REMEDY,
        }
    };
    let root = getuid().is_root();
    let survivor = paths
        .pod_directories()
        .into_iter()
        .find_map(|(_, directory)| shim_process(&directory));
    if let Some(shim) = survivor {
        let open = |name: &str| fs::File::open(format!("/proc/{}/ns/{name}", shim.pid)).map(OwnedFd::from);
        let network = open("net").map_err(kernel("open the network namespace of the pods that still run"))?;
        let user = open("user").map_err(kernel("open the user namespace of the pods that still run"))?;
        let own_user = fs::read_link("/proc/self/ns/user").ok();
        let other_user = fs::read_link(format!("/proc/{}/ns/user", shim.pid)).ok();
        if own_user != other_user {
            setns(&user, CloneFlags::CLONE_NEWUSER)
                .map_err(io::Error::from)
                .map_err(kernel("enter the user namespace of the pods that still run"))?;
        }
        setns(&network, CloneFlags::CLONE_NEWNET)
            .map_err(io::Error::from)
            .map_err(kernel("enter the network namespace of the pods that still run"))?;
        return Ok(!root);
    }
    if !root {
        let (uid, gid) = (getuid(), getgid());
        unshare(CloneFlags::CLONE_NEWUSER)
            .map_err(io::Error::from)
            .map_err(kernel("create a user namespace"))?;
        for (file, text) in [
            ("/proc/self/setgroups", "deny".to_owned()),
            ("/proc/self/uid_map", format!("0 {uid} 1")),
            ("/proc/self/gid_map", format!("0 {gid} 1")),
        ] {
            fs::write(file, text).map_err(kernel("map the user into the user namespace"))?;
        }
    }
    unshare(CloneFlags::CLONE_NEWNET)
        .map_err(io::Error::from)
        .map_err(kernel("create a network namespace"))?;
    Ok(!root)
}

/// Which program with which configuration: a running node of another one is replaced.
fn fingerprint(config: &NodeConfig) -> String {
    use std::hash::{Hash, Hasher};
    let mut hasher = std::hash::DefaultHasher::new();
    serde_json::to_string(config)
        .unwrap_or_default()
        .hash(&mut hasher);
    let program = config.shim_command.first().cloned().unwrap_or_default();
    if let Ok(metadata) = fs::metadata(&program) {
        use std::os::unix::fs::MetadataExt;
        (
            metadata.dev(),
            metadata.ino(),
            metadata.mtime(),
            metadata.mtime_nsec(),
        )
            .hash(&mut hasher);
    }
    format!("{:016x}", hasher.finish())
}

/// Whether a node works on this state directory; its pid.
pub fn running(state_dir: &Path) -> Option<i32> {
    let record = read_node(&Paths::new(state_dir)).ok()?;
    record.node.is_alive().then_some(record.node.pid)
}

/// Makes sure that a node with this configuration runs, in a process that outlives this one; its pid.
///
/// One that runs already is kept if it is the same program with the same configuration, and otherwise replaced, which
/// leaves its pods running. `command` becomes the node when the configuration's path is appended:
/// `["/path/serin", "node"]`. Its output goes to `log`. Blocks for a moment; call it on a blocking thread.
pub fn spawn(config: &NodeConfig, command: &[String], log: &Path) -> Result<i32, Error> {
    let paths = Paths::new(&config.state_dir);
    fs::create_dir_all(paths.root()).map_err(|error| Error::file("create", paths.root(), error))?;
    if let Ok(record) = read_node(&paths)
        && record.node.is_alive()
    {
        if record.fingerprint == fingerprint(config) {
            return Ok(record.node.pid);
        }
        end(&record.node, REPLACE_GRACE);
    }
    // Of a node that is gone; the next one and we both write a new one, and its own knows more.
    match fs::remove_file(paths.node_record()) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            return Err(Error::file("remove", paths.node_record(), error));
        }
        _ => {}
    }
    let file = paths.root().join("config.json");
    let text = serde_json::to_vec_pretty(config).unwrap_or_default();
    // It may hold a token.
    write_atomically(&file, &text).map_err(|error| Error::file("write", &file, error))?;
    fs::set_permissions(&file, std::os::unix::fs::PermissionsExt::from_mode(0o600))
        .map_err(|error| Error::file("protect", &file, error))?;
    let output = fs::OpenOptions::new()
        .create(true)
        .append(true)
        .open(log)
        .map_err(|error| Error::file("open", log, error))?;
    let errors = output
        .try_clone()
        .map_err(|error| Error::file("open", log, error))?;
    let missing = || {
        Error::file(
            "start a node in",
            paths.root(),
            io::ErrorKind::InvalidInput.into(),
        )
    };
    let (program, arguments) = command.split_first().ok_or_else(missing)?;
    let mut node = Command::new(program);
    node.args(arguments)
        .arg(&file)
        .stdin(Stdio::null())
        .stdout(output)
        .stderr(errors)
        .current_dir("/");
    let mut child = spawn_with_fds(&mut node, &[]).map_err(|error| Error::file("start", program, error))?;
    let pid = child.id() as i32;
    // At once, and not only when the node has come that far: a teardown that follows must find it.
    if let Ok(node) = ProcessRecord::of(pid) {
        let record = NodeRecord {
            node,
            broker: None,
            fingerprint: fingerprint(config),
        };
        let encoded = serde_json::to_vec(&record).unwrap_or_default();
        write_first(&paths.node_record(), &encoded)
            .map_err(|error| Error::file("write", paths.node_record(), error))?;
    }
    // Reaped when it ends while we are still there; otherwise init does.
    std::thread::Builder::new()
        .name("node-reaper".to_owned())
        .spawn(move || {
            let _ = child.wait();
        })
        .map_err(|error| Error::file("start", program, error))?;
    Ok(pid)
}
