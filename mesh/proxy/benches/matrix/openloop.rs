//! An open-loop generator, as a process of its own: requests go out at the times that a schedule says, whatever becomes of
//! those before. A request's latency counts from when it was its turn, whether or not there was room for it, until the kernel
//! had the last of its answer ([`crate::stamped`]): how long the generator itself waits for a processor, which it shares with
//! the backend, is neither the proxy's time nor the backend's.
//!
//! One thread, which sleeps in `ppoll` between two requests: a runtime's timers are a millisecond coarse, and spinning would
//! starve the backend on the same processor. HTTP/1.1 without pipelining, or HTTP/2 with a few streams per connection; a
//! request for which there is no room waits, and its wait counts.

use std::collections::VecDeque;
use std::io::{ErrorKind, Write};
use std::net::TcpStream;
use std::os::fd::AsFd;
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use nix::poll::{PollFd, PollFlags, ppoll};
use nix::sys::time::TimeSpec;

use crate::stamped;

/// Requests of the beginning that do not count: connections have to be made.
const WARM_UP: Duration = Duration::from_millis(300);
/// How long what is on its way at the end may take.
const REST: Duration = Duration::from_secs(5);
/// Streams per HTTP/2 connection.
const STREAMS: usize = 10;

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
    /// As arguments of this program.
    pub(crate) fn arguments(&self) -> [String; 6] {
        [
            "open-loop".to_owned(),
            self.port.to_string(),
            self.rate.to_string(),
            self.seconds.to_string(),
            self.connections.to_string(),
            u8::from(self.http2).to_string(),
        ]
    }

    pub(crate) fn parse(arguments: &[&str]) -> anyhow::Result<Self> {
        let [port, rate, seconds, connections, http2] = arguments else {
            bail!("open-loop PORT RATE SECONDS CONNECTIONS HTTP2");
        };
        Ok(Self {
            port: port.parse()?,
            rate: rate.parse()?,
            seconds: seconds.parse()?,
            connections: connections.parse()?,
            http2: *http2 == "1",
        })
    }
}

/// When it was a request's turn.
#[derive(Clone, Copy)]
struct Turn {
    /// By the schedule.
    due: Instant,
    /// Nanoseconds of the wall clock when the generator got to it.
    at: u64,
}

/// One connection.
struct Connection {
    stream: TcpStream,
    http2: bool,
    /// Requests on their way, oldest first, by the number of the stream for HTTP/2.
    open: VecDeque<(u32, Turn)>,
    next_stream: u32,
    read: Vec<u8>,
    write: Vec<u8>,
    /// Body bytes since the connection's window was given back.
    consumed: u32,
}

impl Connection {
    fn open(job: &Job) -> anyhow::Result<Self> {
        let stream = TcpStream::connect(("127.0.0.1", job.port)).context("connecting")?;
        stream.set_nodelay(true)?;
        stream.set_nonblocking(true)?;
        stamped::stamp(&stream)?;
        let mut write = Vec::new();
        if job.http2 {
            write.extend_from_slice(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n");
            frame(&mut write, 4, 0, 0, &[]);
        }
        Ok(Self {
            stream,
            http2: job.http2,
            open: VecDeque::new(),
            next_stream: 1,
            read: Vec::with_capacity(16 << 10),
            write,
            consumed: 0,
        })
    }

    fn has_room(&self) -> bool {
        self.open.len() < if self.http2 { STREAMS } else { 1 }
    }

    fn send(&mut self, turn: Turn) -> anyhow::Result<()> {
        if self.http2 {
            // GET, http, /, and the authority without being indexed.
            let block = [0x82, 0x86, 0x84, 0x01, 0x01, b'a'];
            frame(&mut self.write, 1, 0x5, self.next_stream, &block);
        } else {
            self.write
                .extend_from_slice(b"GET / HTTP/1.1\r\nHost: a\r\nUser-Agent: b\r\n\r\n");
        }
        self.open.push_back((self.next_stream, turn));
        self.next_stream += 2;
        self.flush()
    }

    fn flush(&mut self) -> anyhow::Result<()> {
        while !self.write.is_empty() {
            match self.stream.write(&self.write) {
                Ok(count) => drop(self.write.drain(..count)),
                Err(error) if error.kind() == ErrorKind::WouldBlock => break,
                Err(error) => return Err(error).context("writing"),
            }
        }
        Ok(())
    }

    /// Takes what has come: the turns of those that have been answered, and when the kernel had it.
    fn receive(&mut self, done: &mut Vec<Turn>) -> anyhow::Result<Option<u64>> {
        let mut chunk = [0; 16 << 10];
        let at = match stamped::receive(&self.stream, &mut chunk) {
            Ok((0, _)) => bail!("the connection was closed"),
            Ok((count, at)) => {
                self.read.extend_from_slice(&chunk[..count]);
                at
            }
            Err(error) if error.kind() == ErrorKind::WouldBlock => return Ok(None),
            Err(error) => return Err(error).context("reading"),
        };
        if self.http2 {
            self.frames(done)?;
        } else {
            self.messages(done)?;
        }
        Ok(at)
    }

    fn messages(&mut self, done: &mut Vec<Turn>) -> anyhow::Result<()> {
        while let Some(end) = self.read.windows(4).position(|four| four == b"\r\n\r\n") {
            let head = std::str::from_utf8(&self.read[..end])?;
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
            if self.read.len() < end + 4 + length {
                return Ok(());
            }
            self.read.drain(..end + 4 + length);
            let (_, turn) = self.open.pop_front().context("an answer to nothing")?;
            done.push(turn);
        }
        Ok(())
    }

    fn frames(&mut self, done: &mut Vec<Turn>) -> anyhow::Result<()> {
        let mut at = 0;
        while let Some(head) = self.read.get(at..at + 9) {
            let length = usize::from(head[0]) << 16 | usize::from(head[1]) << 8 | usize::from(head[2]);
            let (kind, flags) = (head[3], head[4]);
            let stream = u32::from_be_bytes([head[5], head[6], head[7], head[8]]);
            let Some(payload) = self.read.get(at + 9..at + 9 + length) else {
                break;
            };
            match kind {
                0 => self.consumed += length as u32,
                // The first field of each answer is its status: 200 is the static table's eighth entry.
                1 if payload.first() != Some(&0x88) => bail!("not answered 200"),
                3 | 7 => bail!("a stream or the connection was reset"),
                4 if flags & 1 == 0 => frame(&mut self.write, 4, 1, 0, &[]),
                6 if flags & 1 == 0 => frame(&mut self.write, 6, 1, 0, payload),
                _ => {}
            }
            if kind <= 1 && flags & 1 != 0 {
                let found = self.open.iter().position(|(own, _)| *own == stream);
                let (_, turn) = found
                    .and_then(|index| self.open.remove(index))
                    .context("an answer to nothing")?;
                done.push(turn);
            }
            at += 9 + length;
        }
        self.read.drain(..at);
        if self.consumed > 16 << 10 {
            frame(&mut self.write, 8, 0, 0, &self.consumed.to_be_bytes());
            self.consumed = 0;
        }
        self.flush()
    }
}

fn frame(out: &mut Vec<u8>, kind: u8, flags: u8, stream: u32, payload: &[u8]) {
    out.extend_from_slice(&(payload.len() as u32).to_be_bytes()[1..]);
    out.extend_from_slice(&[kind, flags]);
    out.extend_from_slice(&stream.to_be_bytes());
    out.extend_from_slice(payload);
}

/// Does it and prints the median, the 99th and the 99.9th percentile in microseconds, and the number of requests.
pub(crate) fn run(job: &Job) -> anyhow::Result<()> {
    // A process without privileges may sleep as precisely as it likes.
    let _ = nix::sys::prctl::set_timerslack(1);
    let mut connections = (0..job.connections)
        .map(|_| Connection::open(job))
        .collect::<Result<Vec<_>, _>>()?;
    let start = Instant::now();
    let end = start + Duration::from_secs_f64(job.seconds);
    let interval = Duration::from_secs_f64(1.0 / job.rate);
    let mut latencies: Vec<u64> = Vec::with_capacity((job.rate * job.seconds) as usize);
    let (mut due, mut waiting, mut turn) = (start, VecDeque::new(), 0);
    let mut done = Vec::new();
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
        }
        let outstanding = connections.iter().any(|connection| !connection.open.is_empty());
        if due >= end && waiting.is_empty() && !outstanding {
            break;
        }
        if now > end + REST {
            bail!("requests were not answered within {} s", REST.as_secs());
        }
        let limit = if due < end {
            due.saturating_duration_since(Instant::now())
        } else {
            Duration::from_millis(100)
        };
        let ready: Vec<bool> = {
            let mut polled: Vec<PollFd<'_>> = connections
                .iter()
                .map(|connection| {
                    let mut flags = PollFlags::POLLIN;
                    flags.set(PollFlags::POLLOUT, !connection.write.is_empty());
                    PollFd::new(connection.stream.as_fd(), flags)
                })
                .collect();
            match ppoll(&mut polled, Some(TimeSpec::from_duration(limit)), None) {
                Ok(_) | Err(nix::errno::Errno::EINTR) => {}
                Err(error) => return Err(error).context("ppoll"),
            }
            polled
                .iter()
                .map(|one| one.revents().is_some_and(|events| !events.is_empty()))
                .collect()
        };
        for (connection, ready) in connections.iter_mut().zip(ready) {
            if ready {
                connection.flush()?;
                let arrived = connection.receive(&mut done)?.unwrap_or_else(stamped::now);
                for turn in done.drain(..).filter(|turn| turn.due >= start + WARM_UP) {
                    latencies.push(arrived.saturating_sub(turn.at) / 1_000);
                }
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
    println!("{} {} {} {}", at(0.5), at(0.99), at(0.999), latencies.len());
    Ok(())
}
