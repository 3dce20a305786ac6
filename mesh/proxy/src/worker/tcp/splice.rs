//! Bulk from socket to socket without a copy in between: `splice(2)` through a pipe.
//!
//! It takes two system calls for up to 256 KiB, but a pipe as well, and is no gain for short messages. So a direction begins with
//! copying, changes to this when a read has filled the whole buffer, and goes back when nothing more has come. Each worker keeps a few
//! pipes that are empty; a direction whose peer takes nothing for a while holds one, with what it owes.

use std::cell::RefCell;
use std::io;
use std::os::fd::OwnedFd;

use nix::fcntl::{FcntlArg, OFlag, SpliceFFlags, fcntl, splice};
use nix::unistd::pipe2;
use tokio::io::Interest;
use tokio::net::TcpStream;
use tokio::task::coop::consume_budget;

/// What a pipe should hold.
const SIZE: usize = 256 * 1024;
/// One that holds less is no gain: the system gives those who have many pipes small ones.
const USEFUL: i32 = 64 * 1024;
/// Empty pipes that a worker keeps.
const KEPT: usize = 8;

thread_local! {
    static PIPES: RefCell<Vec<Pipe>> = const { RefCell::new(Vec::new()) };
}

/// A pipe with nothing in it, between uses.
#[derive(Debug)]
struct Pipe {
    read: OwnedFd,
    write: OwnedFd,
}

impl Pipe {
    /// One that is kept, or a new one; none where there are no more to be had.
    fn take() -> Option<Self> {
        if let Some(kept) = PIPES.with_borrow_mut(Vec::pop) {
            return Some(kept);
        }
        let (read, write) = pipe2(OFlag::O_CLOEXEC | OFlag::O_NONBLOCK).ok()?;
        // Refused to who has many: then it is as large as it is.
        let _ = fcntl(&write, FcntlArg::F_SETPIPE_SZ(SIZE as i32));
        let size = fcntl(&write, FcntlArg::F_GETPIPE_SZ).ok()?;
        (size >= USEFUL).then_some(Self { read, write })
    }

    /// Keeps it for the next one. It must be empty.
    fn keep(self) {
        PIPES.with_borrow_mut(|kept| {
            if kept.len() < KEPT {
                kept.push(self);
            }
        });
    }
}

/// How it ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Bulk {
    /// Nothing more has come so far, after so many bytes.
    Paused(usize),
    /// The sender has closed.
    Ended,
}

/// Moves what has come, as long as more comes. `moved` is told how much.
pub(super) async fn bulk(from: &TcpStream, to: &TcpStream, moved: impl Fn(usize)) -> io::Result<Bulk> {
    let Some(pipe) = Pipe::take() else {
        return Ok(Bulk::Paused(0));
    };
    // Dropped with what is in it wherever something fails or is given up.
    let outcome = through(&pipe, from, to, moved).await?;
    pipe.keep();
    Ok(outcome)
}

async fn through(pipe: &Pipe, from: &TcpStream, to: &TcpStream, moved: impl Fn(usize)) -> io::Result<Bulk> {
    let flags = SpliceFFlags::SPLICE_F_MOVE | SpliceFFlags::SPLICE_F_NONBLOCK;
    let mut total = 0;
    loop {
        // The pipe is empty, so that it is the socket that has nothing if nothing comes.
        let filled = from.try_io(Interest::READABLE, || {
            Ok(splice(from, None, &pipe.write, None, SIZE, flags)?)
        });
        let mut left = match filled {
            Ok(0) => return Ok(Bulk::Ended),
            Ok(count) => count,
            // Nothing has come, or the system cannot do that with these.
            Err(error)
                if matches!(
                    error.kind(),
                    io::ErrorKind::WouldBlock | io::ErrorKind::InvalidInput
                ) =>
            {
                return Ok(Bulk::Paused(total));
            }
            Err(error) => return Err(error),
        };
        total += left;
        moved(left);
        while left > 0 {
            let written = to.try_io(Interest::WRITABLE, || {
                Ok(splice(&pipe.read, None, to, None, left, flags)?)
            });
            match written {
                Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
                Ok(count) => left -= count,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => to.writable().await?,
                Err(error) => return Err(error),
            }
        }
        // Others want to be served as well.
        consume_budget().await;
    }
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;

    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
    use tokio::net::TcpListener;

    use super::*;

    async fn pair() -> (TcpStream, TcpStream) {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let (near, far) = tokio::join!(
            TcpStream::connect(listener.local_addr().unwrap()),
            listener.accept()
        );
        (near.unwrap(), far.unwrap().0)
    }

    #[tokio::test]
    async fn bulk_arrives_whole_and_in_order_and_its_end_is_told() {
        let ((mut sender, from), (to, mut receiver)) = (pair().await, pair().await);
        let sent: Vec<u8> = (0..5_000_000u32).map(|at| (at % 251) as u8).collect();
        let moved = Cell::new(0);
        let moving = async {
            while {
                from.readable().await.unwrap();
                let outcome = bulk(&from, &to, |count| moved.set(moved.get() + count)).await;
                outcome.unwrap() != Bulk::Ended
            } {}
            drop(to);
        };
        let sending = async {
            sender.write_all(&sent).await.unwrap();
            sender.shutdown().await.unwrap();
        };
        let mut got = Vec::new();
        let ((), (), read) = tokio::join!(moving, sending, receiver.read_to_end(&mut got));
        read.unwrap();
        assert!(got == sent, "{} of {} bytes", got.len(), sent.len());
        assert_eq!(moved.get(), sent.len());
        assert_eq!(
            PIPES.with_borrow(Vec::len),
            1,
            "an empty pipe is kept for the next one"
        );
    }

    #[tokio::test]
    async fn what_is_given_up_half_way_leaves_no_bytes_for_the_next_one() {
        let ((mut sender, from), (to, receiver)) = (pair().await, pair().await);
        let sending = tokio::spawn(async move {
            // Until what is between is full.
            let _ = sender.write_all(&vec![1; 50_000_000]).await;
        });
        let before = PIPES.with_borrow(Vec::len);
        let stuck = async {
            loop {
                from.readable().await.unwrap();
                bulk(&from, &to, |_| {}).await.unwrap();
            }
        };
        let gave_up = tokio::time::timeout(std::time::Duration::from_millis(300), stuck).await;
        assert!(gave_up.is_err());
        assert!(PIPES.with_borrow(Vec::len) <= before, "its pipe is gone");
        drop(receiver);
        sending.abort();
    }
}
