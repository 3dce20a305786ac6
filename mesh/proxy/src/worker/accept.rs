//! Accepting connections: from the socket to the worker that serves them.
//!
//! `arrival` finds out what a connection is and which filter chain serves it, from its `first_bytes`; `chain` does for
//! it what the chain says, up to the handler.

use std::io;
use std::net::SocketAddr;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use tokio::net::{TcpListener, TcpStream};

mod arrival;
mod chain;
mod first_bytes;

use super::{Command, Worker};
use crate::config::listener::Listener;
use crate::config::slot::ListenerSlot;
use crate::metrics::events::ListenerEvent;
use crate::overload::Action;
use crate::policy::stats::OpenCount;
use crate::random;

/// Pause after an accept that failed for lack of descriptors or memory.
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);
/// Limit for the first bytes of a connection, when nothing else bounds them.
const FIRST_BYTES: Duration = Duration::from_secs(3600);

/// The connection is closed; why has been noted where it was found out.
struct Closed;

/// Accepts until aborted.
pub(super) async fn run(worker: Rc<Worker>, slot: Arc<ListenerSlot>, socket: TcpListener) {
    let overload = worker.shared.overload.clone();
    loop {
        overload.while_saturated(Action::StopAcceptingConnections).await;
        match socket.accept().await {
            Ok(_) if overload.hits(Action::RejectIncomingConnections, random::next) => {
                worker.recorder.counters().refused_connections.add(1);
                slot.load()
                    .traffic
                    .note_listener(ListenerEvent::OverloadReject, worker.id);
            }
            Ok((stream, remote)) => balance(&worker, &slot, stream, remote),
            Err(error) => match error.kind() {
                // The client gave up before it was accepted.
                io::ErrorKind::ConnectionAborted | io::ErrorKind::Interrupted | io::ErrorKind::WouldBlock => {
                }
                _ => {
                    tracing::warn!(listener = %slot.load().name, %error, "cannot accept");
                    tokio::time::sleep(ACCEPT_PAUSE).await;
                }
            },
        }
    }
}

/// A connection's share in its worker's number, for exact balance.
#[derive(Debug)]
pub struct Share {
    slot: Arc<ListenerSlot>,
    worker: usize,
}

impl Share {
    fn of(slot: &Arc<ListenerSlot>, worker: usize) -> Self {
        slot.connections[worker].fetch_add(1, Ordering::Relaxed);
        Self {
            slot: slot.clone(),
            worker,
        }
    }
}

impl Drop for Share {
    fn drop(&mut self) {
        self.slot.connections[self.worker].fetch_sub(1, Ordering::Relaxed);
    }
}

/// Serves an accepted connection here, or where the listener wants the numbers exactly even, on the worker with the
/// fewest connections of it.
fn balance(worker: &Rc<Worker>, slot: &Arc<ListenerSlot>, stream: TcpStream, remote: SocketAddr) {
    if !slot.load().exact_balance {
        return serve(worker.clone(), slot.clone(), stream, remote, None);
    }
    let count = |index: usize| slot.connections[index].load(Ordering::Relaxed);
    let least = (0..slot.connections.len())
        .min_by_key(|index| (count(*index), *index != worker.id))
        .unwrap_or(worker.id);
    let share = Share::of(slot, least);
    if least == worker.id {
        return serve(worker.clone(), slot.clone(), stream, remote, Some(share));
    }
    let neighbours = worker.shared.neighbours.load();
    let Some(neighbour) = neighbours.get(least) else {
        return;
    };
    match stream.into_std() {
        Ok(stream) => {
            let command = Command::Serve(slot.clone(), stream, remote, share);
            // A neighbour that has no room is busy beyond help, or has ended: the connection is closed, as when the
            // kernel's queue is full.
            if neighbour.try_send(command).is_err() {
                tracing::warn!(worker = least, "a connection could not be handed over");
            }
        }
        Err(error) => tracing::warn!(%error, "a connection could not be handed over"),
    }
}

/// Serves a connection on this worker.
pub(super) fn serve(
    worker: Rc<Worker>,
    slot: Arc<ListenerSlot>,
    stream: TcpStream,
    remote: SocketAddr,
    share: Option<Share>,
) {
    // Beyond the limit of all listeners a connection is closed at once, as in Envoy.
    let Some(counted) = worker.shared.overload.count_connection() else {
        worker.recorder.counters().refused_connections.add(1);
        slot.load()
            .traffic
            .note_listener(ListenerEvent::GlobalOverflow, worker.id);
        return;
    };
    let open = worker.open_connection();
    worker.tasks.clone().spawn_local(async move {
        let listener = slot.load();
        drop(slot);
        let mut place = Entrance::new(listener.clone(), worker.id);
        // Boxed, so that what detection and handshakes need is given back while requests are served.
        if let Ok(Some(http)) =
            Box::pin(arrival::classify(worker, listener, stream, remote, &mut place)).await
        {
            http.serve().await;
        }
        drop((open, share, counted, place));
    });
}

/// A connection in its listener's statistics: as Envoy counts, it is one once its filter chain is known, and waits before.
struct Entrance {
    listener: Option<Arc<Listener>>,
    worker: usize,
    _open: Option<OpenCount>,
}

impl Entrance {
    fn new(listener: Arc<Listener>, worker: usize) -> Self {
        listener.traffic.note_listener(ListenerEvent::Accepted, worker);
        Self {
            listener: Some(listener),
            worker,
            _open: None,
        }
    }

    fn note(&self, event: ListenerEvent) {
        if let Some(listener) = &self.listener {
            listener.traffic.note_listener(event, self.worker);
        }
    }

    /// Its filter chain is known.
    fn enter(&mut self) {
        if let Some(listener) = self.listener.take() {
            listener
                .traffic
                .note_listener(ListenerEvent::Classified, self.worker);
            self._open = Some(listener.traffic.open(self.worker));
        }
    }
}

impl Drop for Entrance {
    fn drop(&mut self) {
        self.note(ListenerEvent::Classified);
    }
}
