//! The node's end of a shim's control connection.

use std::collections::HashMap;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use parking_lot::Mutex;
use tokio::io::unix::AsyncFd;
use tokio::sync::{mpsc, oneshot};
use tokio_util::task::AbortOnDropHandle;

use crate::shim::protocol::{ContainerReport, Exit, Message, Request, ShimConfig, ShimRecord, files};
use crate::sys::fdpass;
use crate::sys::process::{ProcessRecord, spawn_with_fds};

/// How long the shim may take to do what it is asked (mounts and exec take milliseconds).
const ANSWER_DEADLINE: Duration = Duration::from_secs(20);
/// How many container ends may wait for the pod's worker.
const EVENTS: usize = 64;

/// What a shim tells unasked.
#[derive(Debug)]
pub(crate) enum ShimEvent {
    Exited {
        container: String,
        attempt: u32,
        exit: Exit,
    },
    /// The connection ended: the shim, and with it every container, is gone.
    Gone,
}

type Answer = (Message, Vec<OwnedFd>);

/// A connection to a pod's shim.
pub(crate) struct ShimClient {
    socket: Arc<AsyncFd<OwnedFd>>,
    next: AtomicU64,
    waiting: Arc<Mutex<HashMap<u64, oneshot::Sender<Answer>>>>,
    _reader: AbortOnDropHandle<()>,
}

impl ShimClient {
    /// Starts a pod's shim with its network namespace. The connection is there at once; the first request waits until
    /// the shim is ready.
    pub(crate) fn spawn(
        program: &[String],
        mut config: ShimConfig,
        network: &OwnedFd,
        log: &Path,
    ) -> io::Result<(Self, mpsc::Receiver<ShimEvent>, std::process::Child)> {
        let (ours, theirs) = fdpass::pair()?;
        config.network = network.as_raw_fd();
        config.control = theirs.as_raw_fd();
        let (program, arguments) = program
            .split_first()
            .ok_or_else(|| io::Error::new(io::ErrorKind::InvalidInput, "no shim command is configured"))?;
        let errors = std::fs::OpenOptions::new().create(true).append(true).open(log)?;
        let mut command = std::process::Command::new(program);
        command
            .args(arguments)
            .arg(serde_json::to_string(&config)?)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(errors)
            .current_dir("/");
        let child = spawn_with_fds(&mut command, &[config.network, config.control])?;
        let (client, events) = Self::over(ours)?;
        Ok((client, events, child))
    }

    /// Connects to a shim that an earlier node started; an error if it is not there any more.
    pub(crate) fn adopt(directory: &Path) -> io::Result<(Self, mpsc::Receiver<ShimEvent>)> {
        let record = read_record(directory)?;
        if !record.shim.is_alive() {
            return Err(io::Error::new(io::ErrorKind::NotFound, "the shim has ended"));
        }
        Self::over(fdpass::connect_to(&directory.join(files::SOCKET))?)
    }

    fn over(socket: OwnedFd) -> io::Result<(Self, mpsc::Receiver<ShimEvent>)> {
        nix::fcntl::fcntl(
            &socket,
            nix::fcntl::FcntlArg::F_SETFL(nix::fcntl::OFlag::O_NONBLOCK),
        )?;
        let socket = Arc::new(fdpass::watched(socket)?);
        let waiting: Arc<Mutex<HashMap<u64, oneshot::Sender<Answer>>>> = Arc::default();
        let (events, receiver) = mpsc::channel(EVENTS);
        let reader = tokio::spawn(read(socket.clone(), waiting.clone(), events));
        Ok((
            Self {
                socket,
                next: AtomicU64::new(1),
                waiting,
                _reader: AbortOnDropHandle::new(reader),
            },
            receiver,
        ))
    }

    async fn ask(
        &self,
        deadline: Duration,
        fds: &[RawFd],
        request: impl FnOnce(u64) -> Request,
    ) -> Result<Answer, String> {
        let id = self.next.fetch_add(1, Ordering::Relaxed);
        let (sender, receiver) = oneshot::channel();
        self.waiting.lock().insert(id, sender);
        let text = serde_json::to_vec(&request(id)).map_err(|error| error.to_string())?;
        let result = tokio::time::timeout(deadline, async {
            self.socket
                .async_io(tokio::io::Interest::WRITABLE, |socket| {
                    fdpass::send(socket, &text, fds)
                })
                .await
                .map_err(|error| format!("send to the pod's shim: {error}"))?;
            receiver.await.map_err(|_| "the pod's shim has ended".to_owned())
        })
        .await;
        self.waiting.lock().remove(&id);
        match result {
            Ok(Ok((Message::Failed { reason, .. }, _))) => Err(reason),
            Ok(answer) => answer,
            Err(_) => Err(format!(
                "the pod's shim did not answer within {} s",
                deadline.as_secs()
            )),
        }
    }

    /// Starts the container described in a file; its pid and start time (Unix milliseconds).
    pub(crate) async fn start(&self, spec_file: PathBuf, listeners: &[RawFd]) -> Result<(i32, i64), String> {
        match self
            .ask(ANSWER_DEADLINE, listeners, |id| Request::Start { id, spec_file })
            .await?
            .0
        {
            Message::Started { pid, started_at, .. } => Ok((pid, started_at)),
            other => Err(unexpected(&other)),
        }
    }

    pub(crate) async fn signal(&self, container: &str, signal: i32) -> Result<(), String> {
        let container = container.to_owned();
        self.ask(ANSWER_DEADLINE, &[], |id| Request::Signal {
            id,
            container,
            signal,
        })
        .await
        .map(|_| ())
    }

    /// Runs a command; its exit code (none: it took longer than `timeout`) and what it wrote.
    pub(crate) async fn exec(
        &self,
        container: &str,
        argv: Vec<String>,
        env: Vec<(String, String)>,
        timeout: Duration,
    ) -> Result<(Option<i32>, String), String> {
        let container = container.to_owned();
        let timeout_millis = timeout.as_millis() as u64;
        match self
            .ask(timeout + ANSWER_DEADLINE, &[], |id| Request::Exec {
                id,
                container,
                argv,
                env,
                timeout_millis,
            })
            .await?
            .0
        {
            Message::Executed { code, output, .. } => Ok((code, output)),
            other => Err(unexpected(&other)),
        }
    }

    pub(crate) async fn state(&self) -> Result<Vec<ContainerReport>, String> {
        match self
            .ask(ANSWER_DEADLINE, &[], |id| Request::State { id })
            .await?
            .0
        {
            Message::State { containers, .. } => Ok(containers),
            other => Err(unexpected(&other)),
        }
    }

    /// The listening sockets that the pod holds.
    pub(crate) async fn listeners(&self) -> Result<Vec<(u16, OwnedFd)>, String> {
        match self
            .ask(ANSWER_DEADLINE, &[], |id| Request::Listeners { id })
            .await?
        {
            (Message::Listeners { ports, .. }, fds) => Ok(ports.into_iter().zip(fds).collect()),
            (other, _) => Err(unexpected(&other)),
        }
    }

    /// Ends the shim and whatever still runs.
    pub(crate) async fn shutdown(&self, grace: Duration) -> Result<(), String> {
        let grace_millis = grace.as_millis() as u64;
        self.ask(grace + ANSWER_DEADLINE, &[], |id| Request::Shutdown {
            id,
            grace_millis,
        })
        .await
        .map(|_| ())
    }
}

fn unexpected(message: &Message) -> String {
    format!("the pod's shim gave another answer than asked for: {message:?}")
}

async fn read(
    socket: Arc<AsyncFd<OwnedFd>>,
    waiting: Arc<Mutex<HashMap<u64, oneshot::Sender<Answer>>>>,
    events: mpsc::Sender<ShimEvent>,
) {
    loop {
        let received = socket
            .async_io(tokio::io::Interest::READABLE, |socket| fdpass::receive(socket))
            .await;
        let (text, fds) = match received {
            Ok((text, fds)) if !text.is_empty() => (text, fds),
            Ok(_) | Err(_) => break,
        };
        let Ok(message) = serde_json::from_slice::<Message>(&text) else {
            break;
        };
        match message {
            Message::Exited {
                container,
                attempt,
                exit,
            } => {
                let event = ShimEvent::Exited {
                    container,
                    attempt,
                    exit,
                };
                if events.send(event).await.is_err() {
                    break;
                }
            }
            answer => {
                let sender = answer.answers().and_then(|id| waiting.lock().remove(&id));
                if let Some(sender) = sender {
                    // The asker may have given up meanwhile.
                    let _ = sender.send((answer, fds));
                }
            }
        }
    }
    waiting.lock().clear();
    let _ = events.send(ShimEvent::Gone).await;
}

/// Who the shim of a pod directory is.
pub(crate) fn read_record(directory: &Path) -> io::Result<ShimRecord> {
    Ok(serde_json::from_slice(&std::fs::read(
        directory.join(files::RECORD),
    )?)?)
}

/// Whether a pod directory's shim runs.
pub(crate) fn shim_process(directory: &Path) -> Option<ProcessRecord> {
    read_record(directory)
        .ok()
        .map(|record| record.shim)
        .filter(ProcessRecord::is_alive)
}
