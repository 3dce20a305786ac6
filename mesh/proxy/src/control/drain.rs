//! The end of what a proxy serves: of all of it when the process ends, of listeners while it goes on
//! (`/drain_listeners`).

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use super::Proxy;
use crate::config::listener::{Direction, Listener};
use crate::worker::{Command, DrainPhase};

/// Which listeners drain.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Drained {
    /// All.
    All,
    /// Those with `traffic_direction: INBOUND`.
    Inbound,
}

impl Proxy {
    /// For how long clients are told to go elsewhere before listeners close.
    pub fn set_drain_time(&self, time: Duration) {
        *self.drain_time.lock() = time;
    }

    fn inbound(&self) -> Vec<Arc<Listener>> {
        self.store(|store| {
            let listeners = store.listeners();
            listeners
                .filter(|listener| listener.direction == Direction::Inbound)
                .cloned()
                .collect()
        })
    }

    /// Nothing new is accepted, connections are told to end.
    pub async fn close_listeners(&self, whose: Drained) {
        match whose {
            Drained::All => self.drain(DrainPhase::Closing).await,
            Drained::Inbound => {
                for listener in self.inbound() {
                    listener.retire();
                    if !listener.bind {
                        continue;
                    }
                    self.sockets.forget(&listener.name);
                    for worker in &self.workers {
                        let _ = worker.commands.send(Command::Close(listener.name.clone())).await;
                    }
                }
            }
        }
    }

    /// Clients are told to go elsewhere with their next answers; after the drain time listeners close, if `close`. Asked
    /// again while that goes on, it changes nothing.
    pub async fn drain_gracefully(self: &Arc<Self>, whose: Drained, close: bool) {
        if self.drainer.lock().is_some() {
            return;
        }
        match whose {
            Drained::All => self.drain(DrainPhase::Discouraging).await,
            Drained::Inbound => self.inbound().iter().for_each(|listener| listener.retire()),
        }
        let time = *self.drain_time.lock();
        // Weak: a process that ends meanwhile need not be waited for.
        let proxy = Arc::downgrade(self);
        let task = tokio::spawn(async move {
            tokio::time::sleep(time).await;
            if close && let Some(proxy) = proxy.upgrade() {
                proxy.close_listeners(whose).await;
            }
        });
        if let Some(before) = self.drainer.lock().replace(task) {
            before.abort();
        }
    }

    /// Accepts no more; what is connected is served on.
    pub async fn stop_accepting(&self) {
        self.sockets.drop_copies();
        for worker in &self.workers {
            let _ = worker.commands.send(Command::StopAccepting).await;
        }
    }

    /// Enters a phase of the end.
    pub async fn drain(&self, phase: DrainPhase) {
        self.draining.store(true, Ordering::Release);
        if phase == DrainPhase::Closing {
            // A copy would keep the socket listening.
            self.sockets.drop_copies();
        }
        for worker in &self.workers {
            let _ = worker.commands.send(Command::Drain(phase)).await;
        }
    }

    /// Drains in order: for up to `discourage` clients are told to go elsewhere while everything is still served, then
    /// nothing new is accepted and what runs has `finish` to end. Over earlier when nobody is connected any more.
    pub async fn shut_down(&self, discourage: Duration, finish: Duration) {
        /// How often connections are counted.
        const LOOK: Duration = Duration::from_millis(100);
        /// Nobody connected for this long means that nobody will come.
        const QUIET: u32 = 10;
        self.drain(DrainPhase::Discouraging).await;
        let end = tokio::time::Instant::now() + discourage;
        let mut quiet = 0;
        while tokio::time::Instant::now() < end && quiet < QUIET {
            tokio::time::sleep(LOOK).await;
            quiet = if self.connections().await == 0 {
                quiet + 1
            } else {
                0
            };
        }
        self.drain(DrainPhase::Closing).await;
        let end = tokio::time::Instant::now() + finish;
        while tokio::time::Instant::now() < end && self.connections().await > 0 {
            tokio::time::sleep(LOOK).await;
        }
    }

    /// Ends the workers and waits for their threads. Connections still open are dropped.
    pub async fn stop(self: Arc<Self>) {
        for worker in &self.workers {
            let _ = worker.commands.send(Command::Stop).await;
        }
        if let Some(mut proxy) = Arc::into_inner(self) {
            let workers = std::mem::take(&mut proxy.workers);
            let join = move || {
                for worker in workers {
                    // A panic has been reported by the thread itself.
                    let _ = worker.thread.join();
                }
            };
            let _ = tokio::task::spawn_blocking(join).await;
        }
    }
}
