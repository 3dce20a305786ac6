//! An open loop, in the backend's own process: requests go out at the times that a schedule says, whatever becomes of those
//! before. A request's latency counts from when it was its turn, whether or not there was room for it, until the kernel had the
//! last of its answer ([`crate::stamped`]).
//!
//! Load and backend are one thread, because they have one processor: as two processes each would wait for the other's turn, for
//! as long as the scheduler likes, and the time that a request waits at its backend would be told as the proxy's. While it has a
//! job the thread does not sleep: nobody else needs that processor, timers of polls are a millisecond coarse, and waking up would
//! be part of each latency. HTTP/1.1 without pipelining, or HTTP/2 with a few streams per connection; a request for which there is no room waits, and
//! its wait counts.

use std::collections::VecDeque;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use mio::unix::SourceFd;
use mio::{Events, Interest, Poll, Token};
use nix::fcntl::{FcntlArg, OFlag, fcntl};

use crate::endpoint::{Endpoint, Ports};
use crate::socket::{
    ACK, DATA, END_HEADERS, END_STREAM, Frame, GOAWAY, HEADERS, PING, PREFACE, RST_STREAM, SETTINGS, Socket,
    WINDOW_UPDATE, frame,
};
use crate::stamped;

/// Requests of the beginning that do not count: connections have to be made.
const WARM_UP: Duration = Duration::from_millis(300);
/// How long what is on its way at the end may take.
const REST: Duration = Duration::from_secs(5);
/// Streams per HTTP/2 connection.
const STREAMS: usize = 10;
/// The first token of the load's own connections: no backend has as many.
const CLIENTS: usize = 1_000_000;
/// The token of the commands.
const COMMANDS: Token = Token(999);

/// What is to be done.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Job {
    pub(crate) port: u16,
    /// Requests a second.
    pub(crate) rate: f64,
    pub(crate) seconds: f64,
    pub(crate) connections: usize,
    pub(crate) http2: bool,
}

impl Job {
    /// As a line of commands.
    pub(crate) fn line(&self) -> String {
        let Self {
            port,
            rate,
            seconds,
            connections,
            http2,
        } = self;
        format!("{port} {rate} {seconds} {connections} {http2}\n")
    }

    fn parse(line: &str) -> anyhow::Result<Self> {
        let parts: Vec<&str> = line.split_whitespace().collect();
        let [port, rate, seconds, connections, http2] = parts[..] else {
            bail!("a job is PORT RATE SECONDS CONNECTIONS HTTP2, not {line:?}");
        };
        Ok(Self {
            port: port.parse()?,
            rate: rate.parse()?,
            seconds: seconds.parse()?,
            connections: connections.parse()?,
            http2: http2.parse()?,
        })
    }
}

/// When it was a request's turn.
#[derive(Clone, Copy)]
struct Turn {
    /// By the schedule.
    due: Instant,
    /// Nanoseconds of the wall clock when the load got to it.
    at: u64,
}

/// One connection of the load.
struct Connection {
    socket: Socket,
    http2: bool,
    /// Requests on their way, oldest first, by the number of the stream for HTTP/2.
    open: VecDeque<(u32, Turn)>,
    next_stream: u32,
    /// Body bytes since the connection's window was given back.
    consumed: u32,
}

impl Connection {
    fn has_room(&self) -> bool {
        self.open.len() < if self.http2 { STREAMS } else { 1 }
    }

    fn send(&mut self, turn: Turn) -> anyhow::Result<()> {
        let out = &mut self.socket.write;
        if self.http2 {
            // GET, http, /, and the authority without being indexed.
            let block = [0x82, 0x86, 0x84, 0x01, 0x01, b'a'];
            frame(out, HEADERS, END_HEADERS | END_STREAM, self.next_stream, &block);
        } else {
            out.extend_from_slice(b"GET / HTTP/1.1\r\nHost: a\r\nUser-Agent: b\r\n\r\n");
        }
        self.open.push_back((self.next_stream, turn));
        self.next_stream += 2;
        self.socket.flush().context("writing")
    }

    /// Takes what has come: the turns of those that have been answered, and when the kernel had it.
    fn receive(&mut self, done: &mut Vec<Turn>) -> anyhow::Result<Option<u64>> {
        self.socket.flush().context("writing")?;
        let at = self.socket.fill().context("reading")?;
        if self.http2 {
            self.frames(done)?;
        } else {
            self.messages(done)?;
        }
        Ok(at)
    }

    fn messages(&mut self, done: &mut Vec<Turn>) -> anyhow::Result<()> {
        let read = &mut self.socket.read;
        while let Some(end) = read.windows(4).position(|four| four == b"\r\n\r\n") {
            let head = std::str::from_utf8(&read[..end])?;
            if !head.starts_with("HTTP/1.1 200") {
                bail!("answered {head:?}");
            }
            let length: usize = head
                .lines()
                .find_map(|line| {
                    let (name, value) = line.split_once(':')?;
                    name.eq_ignore_ascii_case("content-length")
                        .then(|| value.trim().parse().ok())?
                })
                .context("an answer without a length")?;
            if read.len() < end + 4 + length {
                return Ok(());
            }
            read.drain(..end + 4 + length);
            let (_, turn) = self.open.pop_front().context("an answer to nothing")?;
            done.push(turn);
        }
        Ok(())
    }

    fn frames(&mut self, done: &mut Vec<Turn>) -> anyhow::Result<()> {
        let Socket { read, write, .. } = &mut self.socket;
        let mut at = 0;
        while let Some((got, length)) = Frame::first(&read[at..]) {
            match got.kind {
                DATA => self.consumed += got.payload.len() as u32,
                // The first field of each answer is its status: 200 is the static table's eighth entry.
                HEADERS if got.payload.first() != Some(&0x88) => bail!("not answered 200"),
                RST_STREAM | GOAWAY => bail!("a stream or the connection was reset"),
                SETTINGS if !got.acknowledges() => frame(write, SETTINGS, ACK, 0, &[]),
                PING if !got.acknowledges() => frame(write, PING, ACK, 0, got.payload),
                _ => {}
            }
            if got.ends() {
                let found = self.open.iter().position(|(own, _)| *own == got.stream);
                let (_, turn) = found
                    .and_then(|index| self.open.remove(index))
                    .context("an answer to nothing")?;
                done.push(turn);
            }
            at += length;
        }
        read.drain(..at);
        if self.consumed > 16 << 10 {
            frame(write, WINDOW_UPDATE, 0, 0, &self.consumed.to_be_bytes());
            self.consumed = 0;
        }
        self.socket.flush().context("writing")
    }
}

/// The process: a backend that runs jobs.
pub(crate) struct Process {
    poll: Poll,
    events: Events,
    backend: Endpoint,
    commands: Vec<u8>,
}

impl Process {
    /// Serves on `ports` and does what lines of the standard input say, until that ends: each is a [`Job`], and is answered by a
    /// line with the median, the 99th and the 99.9th percentile in microseconds, and the number of requests.
    pub(crate) fn run(ports: Ports, folder: &Path) -> anyhow::Result<()> {
        let poll = Poll::new()?;
        let input = std::io::stdin();
        fcntl(&input, FcntlArg::F_SETFL(OFlag::O_NONBLOCK))?;
        poll.registry()
            .register(&mut SourceFd(&input.as_raw_fd()), COMMANDS, Interest::READABLE)?;
        let backend = Endpoint::open(ports, folder, poll.registry())?;
        let mut process = Self {
            poll,
            events: Events::with_capacity(1024),
            backend,
            commands: Vec::new(),
        };
        loop {
            process.turn(Duration::from_secs(1))?;
            if !process.listen(input.as_fd())? {
                return Ok(());
            }
            while let Some(end) = process.commands.iter().position(|byte| *byte == b'\n') {
                let line = String::from_utf8(process.commands.drain(..=end).collect())?;
                let job = Job::parse(&line)?;
                println!("{}", process.job(&job)?);
            }
        }
    }

    /// Takes commands that have come; whether there may be more.
    fn listen(&mut self, input: BorrowedFd<'_>) -> anyhow::Result<bool> {
        let mut chunk = [0; 1024];
        loop {
            match nix::unistd::read(input, &mut chunk) {
                Ok(0) => return Ok(false),
                Ok(count) => self.commands.extend_from_slice(&chunk[..count]),
                Err(nix::errno::Errno::EAGAIN) => return Ok(true),
                Err(error) => return Err(error).context("reading commands"),
            }
        }
    }

    /// Waits until something is ready, but no longer than this, and serves as the backend.
    fn turn(&mut self, limit: Duration) -> anyhow::Result<()> {
        match self.poll.poll(&mut self.events, Some(limit)) {
            Err(error) if error.kind() != std::io::ErrorKind::Interrupted => {
                return Err(error).context("polling");
            }
            _ => {}
        }
        for event in self.events.iter().filter(|event| event.token().0 < CLIENTS) {
            self.backend.ready(event.token(), self.poll.registry())?;
        }
        Ok(())
    }

    fn open(&self, job: &Job, index: usize) -> anyhow::Result<Connection> {
        let stream = std::net::TcpStream::connect(("127.0.0.1", job.port)).context("connecting")?;
        stream.set_nonblocking(true)?;
        let token = Token(CLIENTS + index);
        let stream = mio::net::TcpStream::from_std(stream);
        let mut socket = Socket::new(stream, self.poll.registry(), token, None)?;
        socket.stamp()?;
        if job.http2 {
            socket.write.extend_from_slice(PREFACE);
            frame(&mut socket.write, SETTINGS, 0, 0, &[]);
        }
        Ok(Connection {
            socket,
            http2: job.http2,
            open: VecDeque::new(),
            next_stream: 1,
            consumed: 0,
        })
    }

    fn job(&mut self, job: &Job) -> anyhow::Result<String> {
        let mut connections = (0..job.connections)
            .map(|index| self.open(job, index))
            .collect::<Result<Vec<_>, _>>()?;
        let start = Instant::now();
        let end = start + Duration::from_secs_f64(job.seconds);
        let interval = Duration::from_secs_f64(1.0 / job.rate);
        let mut latencies: Vec<u64> = Vec::with_capacity((job.rate * job.seconds) as usize);
        let (mut due, mut waiting, mut turn) = (start, VecDeque::new(), 0);
        let (mut done, mut outstanding) = (Vec::new(), 0_usize);
        loop {
            let now = Instant::now();
            let at = stamped::now();
            while due <= now && due < end {
                waiting.push_back(Turn { due, at });
                due += interval;
            }
            while let Some(next) = waiting.front().copied() {
                let count = connections.len();
                let Some(free) = (0..count)
                    .map(|step| (turn + step) % count)
                    .find(|index| connections[*index].has_room())
                else {
                    break;
                };
                waiting.pop_front();
                turn = free + 1;
                connections[free].send(next)?;
                outstanding += 1;
            }
            if due >= end && waiting.is_empty() && outstanding == 0 {
                break;
            }
            if now > end + REST {
                bail!("requests were not answered within {} s", REST.as_secs());
            }
            self.turn(Duration::ZERO)?;
            for event in &self.events {
                let Some(connection) = event
                    .token()
                    .0
                    .checked_sub(CLIENTS)
                    .and_then(|index| connections.get_mut(index))
                else {
                    continue;
                };
                let arrived = connection.receive(&mut done)?.unwrap_or_else(stamped::now);
                outstanding -= done.len();
                for turn in done.drain(..).filter(|turn| turn.due >= start + WARM_UP) {
                    latencies.push(arrived.saturating_sub(turn.at) / 1_000);
                }
            }
        }
        latencies.sort_unstable();
        let at = |share: f64| {
            let last = latencies.len().saturating_sub(1);
            latencies
                .get((last as f64 * share) as usize)
                .copied()
                .unwrap_or(0)
        };
        Ok(format!(
            "{} {} {} {}",
            at(0.5),
            at(0.99),
            at(0.999),
            latencies.len()
        ))
    }
}
