//! The shim's loop: one `poll` over its control connections, its containers' output and its children's ends.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::path::PathBuf;
use std::time::{Duration, Instant};

use jiff::Timestamp;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sched::{CloneFlags, unshare};
use nix::sys::prctl::set_child_subreaper;
use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::Pid;

use super::container::{self, Beside, Child};
use super::logfile::{Lines, LogFile, Stream};
use super::protocol::{
    ContainerReport, ContainerSpec, Exit, Message, Request, ShimConfig, ShimRecord, files,
};
use crate::sys::process::{ProcessRecord, adopt_fd, signal_child};
use crate::sys::{fdpass, mounts};

/// Output of an exec that is kept; a probe's message is cut to that by Kubernetes too.
const MAX_OUTPUT_BYTES: usize = 10 * 1024;

struct Container {
    spec: ContainerSpec,
    child: Child,
    started_at: i64,
    exit: Option<Exit>,
    log: Option<LogFile>,
    stdout: Lines,
    stderr: Lines,
    /// Whether the pipe may still bring something.
    open: [bool; 2],
    listeners: Vec<OwnedFd>,
}

struct Running {
    id: u64,
    connection: usize,
    process: Beside,
    deadline: Instant,
    timed_out: bool,
    output: Vec<u8>,
    /// Whether its pipe may still bring something; a pipe at its end would wake `poll` for ever.
    open: bool,
}

/// A pod's shim.
pub(crate) struct Server {
    config: ShimConfig,
    network: OwnedFd,
    signals: SignalFd,
    listener: OwnedFd,
    connections: BTreeMap<usize, OwnedFd>,
    next_connection: usize,
    containers: BTreeMap<String, Container>,
    running: Vec<Running>,
    shutdown: Option<(Instant, Vec<(usize, u64)>)>,
    killed: bool,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Source {
    Signals,
    Listener,
    Connection(usize),
    Output(usize, Stream),
    Exec(usize),
}

fn now_millis() -> i64 {
    Timestamp::now().as_millisecond()
}

impl Server {
    /// Takes over what was inherited, enters the pod's own namespaces, listens, and says so in `shim.json`.
    pub(crate) fn start(config: ShimConfig) -> io::Result<Self> {
        let network = adopt_fd(config.network)?;
        let control = adopt_fd(config.control)?;
        set_child_subreaper(true)?;
        let mut mask = SigSet::empty();
        for signal in [Signal::SIGCHLD, Signal::SIGTERM, Signal::SIGINT, Signal::SIGHUP] {
            mask.add(signal);
        }
        mask.thread_block()?;
        let signals = SignalFd::with_flags(&mask, SfdFlags::SFD_CLOEXEC | SfdFlags::SFD_NONBLOCK)?;
        unshare(CloneFlags::CLONE_NEWNS | CloneFlags::CLONE_NEWUTS | CloneFlags::CLONE_NEWIPC)?;
        mounts::enter_private(false)?;
        nix::unistd::sethostname(&config.hostname)?;
        for (directory, size) in &config.memory_volumes {
            fs::create_dir_all(directory)?;
            mounts::mount_tmpfs(directory, *size)?;
        }
        let listener = fdpass::listen_at(&config.directory.join(files::SOCKET))?;
        let server = Self {
            config,
            network,
            signals,
            listener,
            connections: BTreeMap::from([(0, control)]),
            next_connection: 1,
            containers: BTreeMap::new(),
            running: Vec::new(),
            shutdown: None,
            killed: false,
        };
        server.write_record()?;
        Ok(server)
    }

    fn write_record(&self) -> io::Result<()> {
        let record = ShimRecord {
            shim: ProcessRecord::current()?,
            containers: self
                .containers
                .values()
                .filter(|container| container.exit.is_none())
                .filter_map(|container| ProcessRecord::of(container.child.pid).ok())
                .collect(),
        };
        let path = self.config.directory.join(files::RECORD);
        let temporary = path.with_extension("tmp");
        fs::write(&temporary, serde_json::to_vec(&record)?)?;
        fs::rename(temporary, path)
    }

    /// Serves until shut down.
    pub(crate) fn run(mut self) -> io::Result<()> {
        loop {
            if self.finished() {
                self.answer_shutdown();
                return Ok(());
            }
            for source in self.wait()? {
                match source {
                    Source::Signals => self.on_signal(),
                    Source::Listener => {
                        if let Ok(connection) = fdpass::accept(&self.listener) {
                            self.connections.insert(self.next_connection, connection);
                            self.next_connection += 1;
                        }
                    }
                    Source::Connection(number) => self.on_request(number),
                    Source::Output(position, stream) => self.on_output(position, stream),
                    Source::Exec(position) => self.on_exec_output(position),
                }
            }
            self.on_deadlines();
        }
    }

    fn finished(&self) -> bool {
        self.shutdown.is_some() && self.containers.values().all(|container| container.exit.is_some())
    }

    fn answer_shutdown(&mut self) {
        if let Some((_, askers)) = self.shutdown.take() {
            for (connection, id) in askers {
                self.say(connection, &Message::Done { id }, &[]);
            }
        }
    }

    fn wait(&mut self) -> io::Result<Vec<Source>> {
        let mut sources = vec![Source::Signals, Source::Listener];
        let mut fds = vec![
            PollFd::new(self.signals.as_fd(), PollFlags::POLLIN),
            PollFd::new(self.listener.as_fd(), PollFlags::POLLIN),
        ];
        for (number, connection) in &self.connections {
            sources.push(Source::Connection(*number));
            fds.push(PollFd::new(connection.as_fd(), PollFlags::POLLIN));
        }
        for (position, container) in self.containers.values().enumerate() {
            for (open, stream, pipe) in [
                (container.open[0], Stream::Stdout, &container.child.stdout),
                (container.open[1], Stream::Stderr, &container.child.stderr),
            ] {
                if open {
                    sources.push(Source::Output(position, stream));
                    fds.push(PollFd::new(pipe.as_fd(), PollFlags::POLLIN));
                }
            }
        }
        for (position, running) in self
            .running
            .iter()
            .enumerate()
            .filter(|(_, running)| running.open)
        {
            sources.push(Source::Exec(position));
            fds.push(PollFd::new(running.process.output.as_fd(), PollFlags::POLLIN));
        }
        let deadline = self
            .running
            .iter()
            .filter(|running| !running.timed_out)
            .map(|running| running.deadline)
            .chain(
                self.shutdown
                    .as_ref()
                    .filter(|_| !self.killed)
                    .map(|(deadline, _)| *deadline),
            )
            .min();
        let timeout = match deadline {
            None => PollTimeout::NONE,
            Some(deadline) => {
                // Rounded up, so that the deadline has passed when poll returns.
                let millis = deadline.saturating_duration_since(Instant::now()).as_millis() + 1;
                PollTimeout::from(u16::try_from(millis).unwrap_or(u16::MAX))
            }
        };
        match poll(&mut fds, timeout) {
            Ok(_) => {}
            Err(nix::errno::Errno::EINTR) => return Ok(Vec::new()),
            Err(error) => return Err(error.into()),
        }
        Ok(sources
            .into_iter()
            .zip(&fds)
            .filter(|(_, fd)| fd.revents().is_some_and(|events| !events.is_empty()))
            .map(|(source, _)| source)
            .collect())
    }

    fn say(&mut self, connection: usize, message: &Message, fds: &[OwnedFd]) {
        let (Some(socket), Ok(text)) = (self.connections.get(&connection), serde_json::to_vec(message))
        else {
            return;
        };
        let numbers: Vec<_> = fds.iter().map(AsRawFd::as_raw_fd).collect();
        if fdpass::send(socket, &text, &numbers).is_err() {
            self.connections.remove(&connection);
        }
    }

    fn tell_all(&mut self, message: &Message) {
        for connection in self.connections.keys().copied().collect::<Vec<_>>() {
            self.say(connection, message, &[]);
        }
    }

    fn on_request(&mut self, connection: usize) {
        let Some(socket) = self.connections.get(&connection) else {
            return;
        };
        let (message, fds) = match fdpass::receive(socket) {
            Ok((message, fds)) if !message.is_empty() => (message, fds),
            Ok(_) | Err(_) => {
                self.connections.remove(&connection);
                return;
            }
        };
        let Ok(request) = serde_json::from_slice::<Request>(&message) else {
            self.connections.remove(&connection);
            return;
        };
        match request {
            Request::Start { id, spec_file } => {
                let answer = match self.start_container(&spec_file, fds) {
                    Ok((pid, started_at)) => Message::Started { id, pid, started_at },
                    Err(reason) => Message::Failed { id, reason },
                };
                self.say(connection, &answer, &[]);
            }
            Request::Signal {
                id,
                container,
                signal,
            } => {
                let answer = match self.signal(&container, signal) {
                    Ok(()) => Message::Done { id },
                    Err(reason) => Message::Failed { id, reason },
                };
                self.say(connection, &answer, &[]);
            }
            Request::Exec {
                id,
                container,
                argv,
                env,
                timeout_millis,
            } => {
                let result = match self.containers.get(&container) {
                    Some(known) if known.exit.is_none() => {
                        container::run_beside(&known.child.pidfd, &known.spec, &argv, &env)
                    }
                    _ => Err(format!("container {container} is not running")),
                };
                match result {
                    Ok(process) => self.running.push(Running {
                        id,
                        connection,
                        process,
                        deadline: Instant::now() + Duration::from_millis(timeout_millis),
                        timed_out: false,
                        output: Vec::new(),
                        open: true,
                    }),
                    Err(reason) => self.say(connection, &Message::Failed { id, reason }, &[]),
                }
            }
            Request::State { id } => {
                let containers = self
                    .containers
                    .values()
                    .map(|container| ContainerReport {
                        name: container.spec.name.clone(),
                        attempt: container.spec.attempt,
                        pid: container.child.pid,
                        started_at: container.started_at,
                        exit: container.exit,
                    })
                    .collect();
                self.say(connection, &Message::State { id, containers }, &[]);
            }
            Request::Listeners { id } => {
                let mut ports = Vec::new();
                let mut copies = Vec::new();
                for container in self.containers.values() {
                    for (port, listener) in container.spec.listeners.iter().zip(&container.listeners) {
                        if let Ok(copy) = listener.try_clone() {
                            ports.push(*port);
                            copies.push(copy);
                        }
                    }
                }
                self.say(connection, &Message::Listeners { id, ports }, &copies);
            }
            Request::Shutdown { id, grace_millis } => {
                self.begin_shutdown(Duration::from_millis(grace_millis), Some((connection, id)));
            }
        }
    }

    fn start_container(
        &mut self,
        spec_file: &PathBuf,
        listeners: Vec<OwnedFd>,
    ) -> Result<(i32, i64), String> {
        let text = fs::read(spec_file).map_err(|error| format!("read {}: {error}", spec_file.display()))?;
        let _ = fs::remove_file(spec_file);
        let spec: ContainerSpec = serde_json::from_slice(&text)
            .map_err(|error| format!("read {}: {error}", spec_file.display()))?;
        if self.shutdown.is_some() {
            return Err("the pod is shutting down".to_owned());
        }
        if self
            .containers
            .get(&spec.name)
            .is_some_and(|known| known.exit.is_none())
        {
            return Err(format!("container {} is running", spec.name));
        }
        let log =
            LogFile::open(&spec.log).map_err(|error| format!("open log {}: {error}", spec.log.display()))?;
        let scratch = self.config.directory.join("scratch");
        let child = container::start(&spec, &self.network, &scratch, &listeners)?;
        let (pid, started_at) = (child.pid, now_millis());
        self.containers.insert(
            spec.name.clone(),
            Container {
                spec,
                child,
                started_at,
                exit: None,
                log: Some(log),
                stdout: Lines::default(),
                stderr: Lines::default(),
                open: [true, true],
                listeners,
            },
        );
        // Only a comfort for `teardown` when this shim is killed: the parent-death signal does the same.
        let _ = self.write_record();
        Ok((pid, started_at))
    }

    fn signal(&self, name: &str, signal: i32) -> Result<(), String> {
        let signal = Signal::try_from(signal).map_err(|_| format!("{signal} is not a signal"))?;
        match self.containers.get(name) {
            // Not reaped while `exit` is none, so the pid is its.
            Some(container) if container.exit.is_none() => {
                signal_child(container.child.pid, signal).map_err(|error| error.to_string())
            }
            _ => Err(format!("container {name} is not running")),
        }
    }

    fn begin_shutdown(&mut self, grace: Duration, asker: Option<(usize, u64)>) {
        let deadline = Instant::now() + grace;
        let (known, askers) = self.shutdown.get_or_insert((deadline, Vec::new()));
        *known = (*known).min(deadline);
        askers.extend(asker);
        for container in self
            .containers
            .values()
            .filter(|container| container.exit.is_none())
        {
            let _ = signal_child(container.child.pid, Signal::SIGTERM);
        }
    }

    fn on_signal(&mut self) {
        while let Ok(Some(info)) = self.signals.read_signal() {
            if info.ssi_signo == Signal::SIGTERM as u32 || info.ssi_signo == Signal::SIGINT as u32 {
                self.begin_shutdown(Duration::from_secs(2), None);
            }
        }
        loop {
            match waitpid(Pid::from_raw(-1), Some(WaitPidFlag::WNOHANG)) {
                Ok(WaitStatus::Exited(pid, code)) => self.on_exit(pid.as_raw(), code, None),
                Ok(WaitStatus::Signaled(pid, signal, _)) => {
                    self.on_exit(pid.as_raw(), 128 + signal as i32, Some(signal as i32));
                }
                Ok(WaitStatus::StillAlive) | Err(_) => return,
                Ok(_) => {}
            }
        }
    }

    fn on_exit(&mut self, pid: i32, code: i32, signal: Option<i32>) {
        if let Some(position) = self.running.iter().position(|running| running.process.pid == pid) {
            self.drain_exec(position);
            let running = self.running.swap_remove(position);
            let message = Message::Executed {
                id: running.id,
                code: (!running.timed_out).then_some(code),
                output: String::from_utf8_lossy(&running.output).into_owned(),
            };
            self.say(running.connection, &message, &[]);
            return;
        }
        let Some(position) = self
            .containers
            .values()
            .position(|container| container.child.pid == pid && container.exit.is_none())
        else {
            return; // an orphan of a container, inherited as its subreaper
        };
        // What it wrote last is read before its end is announced, so that who hears of the end can read the log.
        for stream in [Stream::Stdout, Stream::Stderr] {
            self.on_output(position, stream);
        }
        let Some(container) = self.containers.values_mut().nth(position) else {
            return;
        };
        let exit = Exit {
            code,
            signal,
            started_at: container.started_at,
            finished_at: now_millis(),
        };
        container.exit = Some(exit);
        container.listeners.clear();
        // Whoever follows the log learns from it that nothing more will come.
        let _ = fs::write(crate::logs::end_marker(&container.spec.log), "");
        let message = Message::Exited {
            container: container.spec.name.clone(),
            attempt: container.spec.attempt,
            exit,
        };
        let _ = self.write_record();
        self.tell_all(&message);
    }

    fn on_output(&mut self, position: usize, stream: Stream) {
        let Some(container) = self.containers.values_mut().nth(position) else {
            return;
        };
        let (pipe, lines, open) = match stream {
            Stream::Stdout => (
                &container.child.stdout,
                &mut container.stdout,
                &mut container.open[0],
            ),
            Stream::Stderr => (
                &container.child.stderr,
                &mut container.stderr,
                &mut container.open[1],
            ),
        };
        if !*open {
            return;
        }
        let mut buffer = [0_u8; 16 * 1024];
        // Bounded per turn, so that a flood of one container does not starve the control connections.
        for _ in 0..8 {
            match nix::unistd::read(pipe, &mut buffer) {
                Ok(0) => {
                    *open = false;
                    let time = Timestamp::now().to_string();
                    if let Some(log) = &mut container.log {
                        lines.finish(|line, complete| log.line(&time, stream, line, complete));
                    }
                    break;
                }
                Ok(length) => {
                    let time = Timestamp::now().to_string();
                    if let Some(log) = &mut container.log {
                        lines.push(&buffer[..length], |line, complete| {
                            log.line(&time, stream, line, complete)
                        });
                    }
                }
                Err(nix::errno::Errno::EINTR) => {}
                Err(nix::errno::Errno::EAGAIN) => break,
                Err(_) => {
                    *open = false;
                    break;
                }
            }
        }
        if let Some(log) = &mut container.log {
            // A full disk must not stop the pod; the lines are lost.
            let _ = log.flush();
        }
        if container.open == [false, false] && container.exit.is_some() {
            container.log = None;
        }
    }

    fn drain_exec(&mut self, position: usize) -> bool {
        let Some(running) = self.running.get_mut(position) else {
            return false;
        };
        let mut buffer = [0_u8; 4096];
        loop {
            match nix::unistd::read(&running.process.output, &mut buffer) {
                Ok(0) => return false,
                Ok(length) => {
                    let room = MAX_OUTPUT_BYTES.saturating_sub(running.output.len());
                    running.output.extend_from_slice(&buffer[..length.min(room)]);
                }
                Err(nix::errno::Errno::EINTR) => {}
                Err(_) => return true,
            }
        }
    }

    fn on_exec_output(&mut self, position: usize) {
        let open = self.drain_exec(position);
        if let Some(running) = self.running.get_mut(position) {
            running.open = open;
        }
    }

    fn on_deadlines(&mut self) {
        let now = Instant::now();
        for running in &mut self.running {
            if !running.timed_out && now >= running.deadline {
                running.timed_out = true;
                let _ = signal_child(running.process.pid, Signal::SIGKILL);
            }
        }
        if !self.killed
            && self
                .shutdown
                .as_ref()
                .is_some_and(|(deadline, _)| now >= *deadline)
        {
            self.killed = true;
            for container in self
                .containers
                .values()
                .filter(|container| container.exit.is_none())
            {
                let _ = signal_child(container.child.pid, Signal::SIGKILL);
            }
        }
    }
}
