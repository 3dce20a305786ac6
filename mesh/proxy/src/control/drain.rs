//! Draining on purpose while the process goes on (`/drain_listeners`).

use std::sync::Arc;
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
                    if let Some(kept) = &mut *self.kept.lock() {
                        // A copy would keep the socket listening.
                        kept.remove(&listener.name);
                    }
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
}
