//! What ends a connection, and what does not.

mod sending;

use std::cell::Cell;
use std::io::{Read as _, Write as _};
use std::os::unix::net::UnixStream as Peer;
use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::task::Wake;

use bytes::Bytes;
use http::{Response, StatusCode};
use http_body_util::BodyExt as _;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::UnixStream;
use tokio::sync::mpsc;
use tokio::task::LocalSet;
use tokio_util::either::Either;

use super::*;
use crate::config::slot::ClusterSlot;
use crate::metrics::clusters::ClusterCells;
use crate::stream::Together;
use crate::upstream::connect::{Socket, Stream};
use crate::upstream::pool::{SendError, Unanswered};
use crate::worker::body::{Inbound, RequestSource};
use crate::worker::incoming::Incoming;

/// A connection, and its other end.
struct Pair {
    handle: Handle,
    peer: Peer,
    tasks: TaskTracker,
    /// Whether it has been closed.
    closed: Rc<Cell<bool>>,
}

/// Tells that it was dropped.
struct Held(Rc<Cell<bool>>);

impl Drop for Held {
    fn drop(&mut self) {
        self.0.set(true);
    }
}

impl Pair {
    async fn new() -> Self {
        let (near, peer) = Peer::pair().unwrap();
        near.set_nonblocking(true).unwrap();
        peer.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
        let near = UnixStream::from_std(near).unwrap();
        near.writable().await.unwrap();
        let slot = Arc::new(ClusterSlot::new(0, "c".into(), Arc::default()));
        let stream = Stream::Plain(Socket::over(Either::Right(near), Together));
        let (tasks, closed) = (TaskTracker::new(), Rc::new(Cell::new(false)));
        let stream = Metered::new(stream, ClusterCells::new(&slot));
        let handle = connect(stream, &tasks, Held(closed.clone()));
        Self {
            handle,
            peer,
            tasks,
            closed,
        }
    }

    fn get(&self) -> Answering {
        self.handle.send(&mut request(UpstreamBody::Empty), None)
    }

    /// What the endpoint has been sent by now.
    fn heard(&mut self) -> String {
        let mut bytes = [0; 4 * 1024];
        let count = self.peer.read(&mut bytes).unwrap();
        String::from_utf8_lossy(&bytes[..count]).into_owned()
    }

    /// From now on a bell is rung where its task would be woken.
    async fn ring_in_place_of_its_task(&self) -> Arc<Bell> {
        // It has begun.
        tokio::task::yield_now().await;
        let bell = Arc::new(Bell::default());
        self.handle.conn.state.borrow_mut().watcher = Some(bell.clone().into());
        bell
    }

    /// A whole exchange.
    async fn exchange(&mut self, answer: &str) -> String {
        let mut answering = pin!(self.get());
        assert!(look(answering.as_mut()).is_pending());
        self.heard();
        self.peer.write_all(answer.as_bytes()).unwrap();
        text(answering.await.unwrap().into_body()).await.unwrap()
    }

    async fn is_closed_soon(&self) {
        let closed = async {
            while !self.closed.get() {
                tokio::task::yield_now().await;
            }
        };
        tokio::time::timeout(Duration::from_secs(10), closed)
            .await
            .expect("closed");
        assert!(self.handle.is_closed());
        assert!(self.tasks.is_empty());
    }
}

fn request(body: UpstreamBody) -> Request<UpstreamBody> {
    let mut request = Request::new(body);
    *request.uri_mut() = "/x".parse().unwrap();
    *request.method_mut() = match request.body() {
        UpstreamBody::Empty => Method::GET,
        _ => Method::POST,
    };
    request
}

/// Polls once, before anything can have been heard of the socket.
fn look<F: Future>(future: Pin<&mut F>) -> Poll<F::Output> {
    future.poll(&mut Context::from_waker(Waker::noop()))
}

async fn text(body: Incoming) -> Result<String, crate::worker::body::BodyError> {
    let bytes = body.collect().await?.to_bytes();
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}

fn failure(answer: Result<Response<Incoming>, Unanswered>) -> (Error, bool) {
    match answer {
        Err(Unanswered {
            error: SendError::Http1(error),
            unsent,
        }) => (error, unsent),
        other => panic!("{other:?}"),
    }
}

async fn locally(test: impl Future<Output = ()>) {
    LocalSet::new().run_until(test).await;
}

const SHORT: &str = "HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok";

/// Counts how often it was called.
#[derive(Default)]
struct Bell(AtomicUsize);

impl Bell {
    fn count(&self) -> usize {
        self.0.load(Ordering::Relaxed)
    }

    async fn rung(&self) {
        let rung = async {
            while self.count() == 0 {
                tokio::task::yield_now().await;
            }
        };
        tokio::time::timeout(Duration::from_secs(10), rung)
            .await
            .expect("rung");
    }
}

impl Wake for Bell {
    fn wake(self: Arc<Self>) {
        self.0.fetch_add(1, Ordering::Relaxed);
    }
}

#[tokio::test]
async fn an_exchange_makes_no_task_and_wakes_no_other() {
    locally(async {
        let mut pair = Pair::new().await;
        let bell = pair.ring_in_place_of_its_task().await;
        for answer in [
            SHORT,
            "HTTP/1.1 204 No Content\r\n\r\n",
            "HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n2\r\nok\r\n0\r\nt: v\r\n\r\n",
        ] {
            assert!(pair.handle.is_ready());
            let read = pair.exchange(answer).await;
            assert_eq!(read, if answer.contains("204") { "" } else { "ok" });
            assert!(pair.handle.rest());
            assert_eq!((pair.tasks.len(), bell.count()), (1, 0));
        }
        // What happens from now on is for the one who watches.
        pair.peer.write_all(b"x").unwrap();
        bell.rung().await;
    })
    .await;
}

#[tokio::test]
async fn an_idle_connection_that_is_closed_or_spoken_on_ends_at_once() {
    locally(async {
        for (used, unasked) in [(false, true), (true, true), (false, false), (true, false)] {
            let mut pair = Pair::new().await;
            if used {
                assert_eq!(pair.exchange(SHORT).await, "ok");
                assert!(pair.handle.rest());
            }
            tokio::task::yield_now().await;
            assert!(pair.handle.is_ready() && !pair.closed.get());
            if unasked {
                pair.peer.write_all(b"HTTP/1.1 408 Late\r\n\r\n").unwrap();
            } else {
                pair.peer.shutdown(std::net::Shutdown::Write).unwrap();
            }
            pair.is_closed_soon().await;
            assert_eq!(pair.peer.read(&mut [0]).unwrap(), 0, "and says so");
        }
    })
    .await;
}

#[tokio::test]
async fn a_request_on_a_connection_that_was_closed_is_known_not_to_have_been_sent() {
    locally(async {
        let mut pair = Pair::new().await;
        pair.exchange(SHORT).await;
        // Between the end of the connection and the moment at which its task finds it.
        let bell = pair.ring_in_place_of_its_task().await;
        assert!(pair.handle.rest());
        pair.peer.shutdown(std::net::Shutdown::Write).unwrap();
        bell.rung().await;
        assert!(pair.handle.is_ready());
        let (error, unsent) = failure(pair.get().await);
        assert!(matches!(error, Error::Closed) && unsent);
        // One that was closed with the request in hand is another matter.
        let mut pair = Pair::new().await;
        let mut answering = pin!(pair.get());
        assert!(look(answering.as_mut()).is_pending());
        pair.heard();
        pair.peer.shutdown(std::net::Shutdown::Both).unwrap();
        let (error, unsent) = failure(answering.await);
        assert!(matches!(error, Error::Closed) && !unsent);
        pair.is_closed_soon().await;
    })
    .await;
}

#[tokio::test]
async fn what_comes_behind_an_answer_is_nobodys_and_ends_the_connection() {
    locally(async {
        for answer in [
            format!("{SHORT}{SHORT}"),
            format!("{SHORT}x"),
            "HTTP/1.1 204 No Content\r\n\r\nbody".to_owned(),
        ] {
            let mut pair = Pair::new().await;
            pair.exchange(&answer).await;
            assert!(!pair.handle.rest(), "{answer}");
        }
    })
    .await;
}

#[tokio::test]
async fn a_connection_goes_back_when_and_only_when_its_answer_says_that_it_may() {
    locally(async {
        for (answer, may) in [
            (SHORT, true),
            (
                "HTTP/1.1 200 OK\r\ncontent-length: 2\r\nconnection: close\r\n\r\nok",
                false,
            ),
            ("HTTP/1.0 200 OK\r\ncontent-length: 2\r\n\r\nok", false),
            ("HTTP/1.1 101 Go on\r\nupgrade: x\r\n\r\n", false),
        ] {
            let mut pair = Pair::new().await;
            pair.exchange(answer).await;
            assert_eq!(pair.handle.rest(), may, "{answer}");
        }
        let mut pair = Pair::new().await;
        let mut asks = request(UpstreamBody::Empty);
        asks.headers_mut()
            .insert("connection", http::HeaderValue::from_static("close"));
        let mut answering = pin!(pair.handle.send(&mut asks, None));
        assert!(look(answering.as_mut()).is_pending());
        pair.peer.write_all(SHORT.as_bytes()).unwrap();
        text(answering.await.unwrap().into_body()).await.unwrap();
        assert!(!pair.handle.rest());
    })
    .await;
}

#[tokio::test]
async fn an_answer_that_ends_with_the_connection_is_whole_and_one_that_breaks_off_is_not() {
    locally(async {
        for (answer, body) in [
            ("HTTP/1.1 200 OK\r\n\r\nok", Some("ok")),
            ("HTTP/1.1 200 OK\r\ncontent-length: 3\r\n\r\nok", None),
            (
                "HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n2\r\nok\r\n",
                None,
            ),
        ] {
            let mut pair = Pair::new().await;
            let mut answering = pin!(pair.get());
            assert!(look(answering.as_mut()).is_pending());
            pair.peer.write_all(answer.as_bytes()).unwrap();
            pair.peer.shutdown(std::net::Shutdown::Both).unwrap();
            let read = text(answering.await.unwrap().into_body()).await;
            assert_eq!(read.ok().as_deref(), body);
            assert!(!pair.handle.rest());
        }
        for cut in 1..SHORT.find("ok").unwrap() {
            let mut pair = Pair::new().await;
            let mut answering = pin!(pair.get());
            assert!(look(answering.as_mut()).is_pending());
            pair.peer.write_all(&SHORT.as_bytes()[..cut]).unwrap();
            pair.peer.shutdown(std::net::Shutdown::Both).unwrap();
            let (error, unsent) = failure(answering.await);
            assert!(matches!(error, Error::Closed) && !unsent, "{cut}");
        }
    })
    .await;
}

#[tokio::test]
async fn a_length_that_does_not_hold_is_not_passed_on() {
    locally(async {
        for (answer, length) in [
            (SHORT, Some("2")),
            (
                "HTTP/1.1 200 OK\r\ncontent-length: 9\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n",
                None,
            ),
        ] {
            let mut pair = Pair::new().await;
            let mut answering = pin!(pair.get());
            assert!(look(answering.as_mut()).is_pending());
            pair.peer.write_all(answer.as_bytes()).unwrap();
            let answer = answering.await.unwrap();
            let told = answer.headers().get("content-length");
            assert_eq!(told.map(|told| told.to_str().unwrap()), length);
        }
    })
    .await;
}

#[tokio::test]
async fn what_is_no_answer_is_refused_without_waiting_for_more_of_it() {
    locally(async {
        for text in ["SSH-2.0-x\r\n", "\x15\x03\x01", "HTTP/2.0 200 OK\r\n"] {
            let mut pair = Pair::new().await;
            let mut answering = pin!(pair.get());
            assert!(look(answering.as_mut()).is_pending());
            pair.peer.write_all(text.as_bytes()).unwrap();
            let (error, _) = failure(answering.await);
            assert!(error.is_malformed(), "{text}");
            pair.is_closed_soon().await;
        }
    })
    .await;
}

#[tokio::test]
async fn what_is_given_up_ends_its_connection() {
    locally(async {
        let pair = Pair::new().await;
        let mut answering = Box::pin(pair.get());
        assert!(look(answering.as_mut()).is_pending());
        drop(answering);
        pair.is_closed_soon().await;

        let mut pair = Pair::new().await;
        let mut answering = pin!(pair.get());
        assert!(look(answering.as_mut()).is_pending());
        pair.peer
            .write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 9\r\n\r\nok")
            .unwrap();
        drop(answering.await.unwrap());
        pair.is_closed_soon().await;

        let Pair {
            handle,
            mut peer,
            closed,
            ..
        } = Pair::new().await;
        drop(handle);
        while !closed.get() {
            tokio::task::yield_now().await;
        }
        assert_eq!(peer.read(&mut [0]).unwrap(), 0);
    })
    .await;
}

#[tokio::test]
async fn a_tunnel_begins_with_what_came_behind_the_head_and_outlives_its_handle() {
    locally(async {
        let mut pair = Pair::new().await;
        let mut answering = pin!(pair.get());
        assert!(look(answering.as_mut()).is_pending());
        pair.heard();
        pair.peer
            .write_all(b"HTTP/1.1 101 Go on\r\nupgrade: x\r\n\r\nfirst")
            .unwrap();
        let Incoming::Upgraded(mut tunnel) = answering.await.unwrap().into_body() else {
            panic!("no tunnel");
        };
        let (mut peer, closed) = (pair.peer, pair.closed);
        drop(pair.handle);
        let mut bytes = [0; 9];
        tunnel.read_exact(&mut bytes[..5]).await.unwrap();
        assert_eq!(&bytes[..5], b"first");
        peer.write_all(b"next").unwrap();
        tunnel.read_exact(&mut bytes[5..]).await.unwrap();
        assert_eq!(&bytes, b"firstnext");
        tunnel.write_all(b"back").await.unwrap();
        peer.read_exact(&mut bytes[..4]).unwrap();
        assert_eq!(&bytes[..4], b"back");
        assert!(!closed.get());
        drop(tunnel);
        while !closed.get() {
            tokio::task::yield_now().await;
        }
        assert_eq!(peer.read(&mut bytes).unwrap(), 0);
    })
    .await;
}

#[tokio::test]
async fn what_came_before_an_answer_broke_off_can_be_passed_on_before_that_is_told() {
    locally(async {
        let mut pair = Pair::new().await;
        let mut answering = pin!(pair.get());
        assert!(look(answering.as_mut()).is_pending());
        pair.peer
            .write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 9\r\n\r\nok")
            .unwrap();
        pair.peer.shutdown(std::net::Shutdown::Both).unwrap();
        let mut body = answering.await.unwrap().into_body();
        let frame = body.frame().await.unwrap().unwrap();
        assert_eq!(frame.into_data().unwrap(), "ok");
        let bell = Arc::new(Bell::default());
        let waker = Waker::from(bell.clone());
        let mut cx = Context::from_waker(&waker);
        let mut next = pin!(body.frame());
        assert!(next.as_mut().poll(&mut cx).is_pending());
        assert_eq!(bell.count(), 1, "and it is told at once");
        assert!(matches!(next.as_mut().poll(&mut cx), Poll::Ready(Some(Err(_)))));
    })
    .await;
}

#[test]
fn a_connection_costs_less_than_a_kilobyte() {
    assert!(size_of::<Conn>() <= 640, "{}", size_of::<Conn>());
    assert!(size_of::<Answering>() <= 16, "{}", size_of::<Answering>());
}
