//! From changes of the world to every proxy, and from every proxy to the ledger.
//!
//! One task, the *pump*, owns the [`World`] (in production the translator). It takes changes in, waits as long as the
//! [`Debounce`] says, asks the world what each connected proxy has to hear, and hands that to the proxies' connections,
//! which send what their clients' acknowledgements allow. What happens there goes to the [`Ledger`] directly.
//!
//! Nothing is served before the world says that it is complete ([`Input::Synced`]): a half-known world would take
//! routes away from proxies that reconnect.
//!
//! Limits: changes queue in a bounded channel, which holds back the watches; joining proxies wait in line behind
//! changes, so that a reconnect storm does not delay a weight; what waits for one slow client is merged in its
//! connection and costs only its own memory.

mod debounce;
#[cfg(test)]
mod tests;

use std::collections::{HashMap, VecDeque};
use std::sync::Arc;
use std::time::Duration;

use k8s_openapi::apimachinery::pkg::apis::meta::v1::Condition;
use parking_lot::Mutex;
use serin_xds::server::{AdsServer, Client, ClientId, Event, Options, Source};
use serin_xds::{Change, Resource};
use tokio::sync::{Notify, mpsc, oneshot};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tonic::Status;
use tracing::{debug, warn};

pub use debounce::Debounce;

use crate::ledger::Ledger;
use crate::proxy_identity::Proxy;

/// Changes that may wait for the pump.
pub const CHANGES: usize = 4096;

/// Questions that may wait for the pump.
const QUERIES: usize = 16;

/// Clients served between two chances for others on the same thread.
const CLIENTS_PER_TURN: usize = 64;

/// Where the resources of proxies come from.
pub trait World: Send + 'static {
    /// One change of it.
    type Change: Send + 'static;
    /// What some changes mean for proxies.
    type Touched: Send;

    /// Takes in changes that belong together. `now` is since any fixed moment.
    fn apply(&mut self, changes: Vec<Self::Change>, now: Duration) -> Applied<Self::Touched>;

    /// Everything that exists has been said.
    fn complete(&mut self) {}

    /// When to apply again even if nothing changes: something that was said waits, at most until then.
    fn wake_at(&self) -> Option<Duration> {
        None
    }

    /// Everything that a proxy needs, from now until it is forgotten.
    fn resources_for(&mut self, proxy: &Proxy) -> Vec<Arc<Resource>>;

    /// What a proxy has to hear of changes.
    fn changes_for(&self, proxy: &Proxy, touched: &Self::Touched) -> Vec<Change>;

    /// No proxy of this id is connected any more.
    fn forget(&mut self, proxy: &str);

    /// What a person should be told about a user object, as things stand.
    fn note(&self, object: &str) -> Option<Note>;

    /// Every user object that there is a note on.
    fn noted(&self) -> Vec<Arc<str>>;
}

/// What a person should be told about a user object, and what its status says now.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Note {
    /// Its kind, for example `VirtualService`.
    pub kind: &'static str,
    /// Its namespace.
    pub namespace: Arc<str>,
    /// Its name.
    pub name: Arc<str>,
    /// Its newest generation.
    pub generation: i64,
    /// Rules that it breaks, because of which it is not in effect.
    pub refused: Vec<String>,
    /// References to what is not there.
    pub unresolved: Vec<String>,
    /// Fields that are set and not honoured.
    pub unhonoured: Vec<serin_kit::unhonoured::Field>,
    /// The conditions of its status.
    pub conditions: Vec<Condition>,
}

/// A question to the pump, which owns the world.
#[derive(Debug)]
pub struct Query {
    /// Which objects.
    pub objects: Vec<Arc<str>>,
    /// Where the notes go; objects that are unknown are left out.
    pub reply: oneshot::Sender<Vec<(Arc<str>, Note)>>,
}

/// What became of some changes.
#[derive(Debug)]
pub struct Applied<T> {
    /// What they mean for proxies.
    pub touched: T,
    /// What became of the user objects among them.
    pub verdicts: Vec<Verdict>,
    /// Notes on any objects may be others now.
    pub notes_changed: bool,
}

/// What became of a user object that changed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// It is in effect.
    Taken {
        /// `Kind/namespace/name`.
        object: Arc<str>,
        /// `metadata.generation`.
        generation: i64,
    },
    /// It breaks a rule; the last valid version stays in effect.
    Refused {
        /// `Kind/namespace/name`.
        object: Arc<str>,
        /// `metadata.generation`.
        generation: i64,
        /// The rule, in words.
        reason: String,
    },
    /// It was deleted.
    Deleted {
        /// `Kind/namespace/name`.
        object: Arc<str>,
    },
}

/// What the pump is fed with.
#[derive(Debug)]
pub enum Input<C> {
    /// Changes, in order.
    Changes(Vec<C>),
    /// Everything that exists has been said: proxies may be served.
    Synced,
}

/// The meeting point of connections and pump.
#[derive(Debug)]
struct Hub {
    ledger: Ledger,
    doors: Mutex<Doors>,
    changed: Notify,
}

/// Who came and went since the pump last looked. Bounded by the number of connections.
#[derive(Debug, Default)]
struct Doors {
    joining: VecDeque<(Arc<Client>, Proxy)>,
    gone: Vec<ClientId>,
}

impl Source for Hub {
    fn connect(&self, client: Arc<Client>) {
        match Proxy::from_node(client.node()) {
            Ok(proxy) => {
                self.ledger.connect(client.id(), &proxy.id);
                self.doors.lock().joining.push_back((client, proxy));
                self.changed.notify_one();
            }
            Err(error) => {
                warn!(%error, "a client was turned away");
                client.close(Status::invalid_argument(error.to_string()));
            }
        }
    }

    fn observe(&self, client: ClientId, events: &[Event]) {
        self.ledger.record(client, events);
    }

    fn disconnect(&self, client: ClientId) {
        self.ledger.disconnect(client);
        let mut doors = self.doors.lock();
        let waiting = doors.joining.len();
        doors.joining.retain(|(joining, _)| joining.id() != client);
        if doors.joining.len() == waiting {
            doors.gone.push(client);
            drop(doors);
            self.changed.notify_one();
        }
    }
}

/// The pump of a world; [`Pump::run`] is its task.
#[derive(Debug)]
pub struct Pump<W: World> {
    world: W,
    hub: Arc<Hub>,
    clients: HashMap<ClientId, (Arc<Client>, Proxy)>,
    /// Connections per node id: a proxy that reconnects may be here before its old connection is noticed to be dead.
    connections: HashMap<String, usize>,
    debounce: Debounce,
    /// Everything that exists has been said.
    listed: bool,
    /// And taken in.
    synced: bool,
    return_grace: Duration,
    queries: mpsc::Receiver<Query>,
    asking: mpsc::Sender<Query>,
}

impl<W: World> Pump<W> {
    /// A pump and the server of its clients, which ends when `cancel` is cancelled.
    pub fn new(world: W, ledger: Ledger, cancel: CancellationToken) -> (Self, AdsServer) {
        let hub = Arc::new(Hub {
            ledger,
            doors: Mutex::default(),
            changed: Notify::new(),
        });
        let server = AdsServer::new(hub.clone(), Options::default(), cancel);
        let (asking, queries) = mpsc::channel(QUERIES);
        let pump = Self {
            world,
            hub,
            clients: HashMap::new(),
            connections: HashMap::new(),
            debounce: Debounce::default(),
            listed: false,
            synced: false,
            return_grace: Duration::ZERO,
            queries,
            asking,
        };
        (pump, server)
    }

    /// Reports no generation as observed before the proxies of a former process have had this long to return: until
    /// then "every connected proxy runs with it" says nothing of those that are still on their way.
    pub fn with_return_grace(mut self, grace: Duration) -> Self {
        self.return_grace = grace;
        self
    }

    /// Where questions to the pump go.
    pub fn asking(&self) -> mpsc::Sender<Query> {
        self.asking.clone()
    }

    /// Runs until `cancel` is cancelled or the inputs end.
    pub async fn run<I>(mut self, mut inputs: mpsc::Receiver<I>, cancel: CancellationToken)
    where
        I: Into<Input<W::Change>>,
    {
        let started = Instant::now();
        let hub = self.hub.clone();
        let mut batch = Vec::new();
        let mut due: Option<Instant> = None;
        let mut held_back = (!self.return_grace.is_zero()).then(Vec::new);
        let grace = tokio::time::sleep(self.return_grace);
        tokio::pin!(grace);
        loop {
            let timer = async {
                match due {
                    Some(due) => tokio::time::sleep_until(due).await,
                    None => std::future::pending().await,
                }
            };
            // In this order: what is known goes out before more is taken in, changes before newcomers.
            tokio::select! {
                biased;
                () = cancel.cancelled() => return,
                () = &mut grace, if held_back.is_some() => self.record(held_back.take().unwrap_or_default()),
                () = timer => {
                    // What arrived together goes out together.
                    while let Ok(input) = inputs.try_recv() {
                        self.take(input.into(), &mut batch);
                    }
                    let before = Instant::now();
                    let waited = self.world.wake_at().is_some_and(|at| started + at <= before);
                    if !batch.is_empty() || waited {
                        let now = before.duration_since(started);
                        let verdicts = self.push(std::mem::take(&mut batch), now).await;
                        match &mut held_back {
                            Some(held_back) => held_back.extend(verdicts),
                            None => self.record(verdicts),
                        }
                        self.debounce.pushed(started.elapsed(), before.elapsed());
                    }
                    if self.listed && !self.synced {
                        // All of it is in the world now, not only in the queue.
                        self.synced = true;
                        self.world.complete();
                        hub.changed.notify_one();
                    }
                    due = self.world.wake_at().map(|at| started + at);
                }
                input = inputs.recv() => {
                    let Some(input) = input else { return };
                    let begins = batch.is_empty();
                    self.take(input.into(), &mut batch);
                    if begins {
                        let at = Instant::now() + self.debounce.wait(started.elapsed());
                        due = Some(due.map_or(at, |due| due.min(at)));
                    }
                }
                () = hub.changed.notified() => self.mind_the_doors(),
                Some(query) = self.queries.recv() => {
                    let notes = query.objects.into_iter();
                    let notes = notes.filter_map(|object| self.world.note(&object).map(|note| (object, note)));
                    let _ = query.reply.send(notes.collect()); // whoever asked may have gone
                }
            }
        }
    }

    fn take(&mut self, input: Input<W::Change>, batch: &mut Vec<W::Change>) {
        match input {
            Input::Changes(changes) => batch.extend(changes),
            Input::Synced => self.listed = true,
        }
    }

    /// Gives every connected proxy what it needs of some changes.
    async fn push(&mut self, batch: Vec<W::Change>, now: Duration) -> Vec<Verdict> {
        let count = batch.len();
        let Applied {
            touched,
            verdicts,
            notes_changed,
        } = self.world.apply(batch, now);
        let mut told = 0;
        for (index, (client, proxy)) in self.clients.values().enumerate() {
            if index % CLIENTS_PER_TURN == CLIENTS_PER_TURN - 1 {
                tokio::task::yield_now().await;
            }
            let changes = self.world.changes_for(proxy, &touched);
            if !changes.is_empty() {
                told += 1;
                client.apply(changes);
            }
        }
        debug!(changes = count, proxies = told, "pushed");
        if notes_changed {
            self.hub.ledger.mark(self.world.noted());
        }
        verdicts
    }

    /// Tells the ledger of generations that every connected proxy has been given.
    fn record(&self, verdicts: Vec<Verdict>) {
        let ledger = &self.hub.ledger;
        for verdict in verdicts {
            match verdict {
                Verdict::Taken { object, generation } => ledger.observe(&object, generation),
                Verdict::Refused {
                    object,
                    generation,
                    reason,
                } => ledger.reject(&object, generation, &reason),
                Verdict::Deleted { object } => ledger.forget(&object),
            }
        }
    }

    /// Lets out whoever is gone and one newcomer in.
    fn mind_the_doors(&mut self) {
        let (gone, newcomer, more) = {
            let mut doors = self.hub.doors.lock();
            let newcomer = if self.synced {
                doors.joining.pop_front()
            } else {
                None
            };
            (
                std::mem::take(&mut doors.gone),
                newcomer,
                self.synced && !doors.joining.is_empty(),
            )
        };
        if let Some((client, proxy)) = newcomer {
            client.load(self.world.resources_for(&proxy));
            *self.connections.entry(proxy.id.clone()).or_default() += 1;
            self.clients.insert(client.id(), (client, proxy));
        }
        for client in gone {
            let Some((_, proxy)) = self.clients.remove(&client) else {
                continue;
            };
            let Some(left) = self.connections.get_mut(&proxy.id) else {
                continue;
            };
            *left -= 1;
            if *left == 0 {
                self.connections.remove(&proxy.id);
                self.world.forget(&proxy.id);
            }
        }
        if more {
            self.hub.changed.notify_one();
        }
    }
}

/// How long a change may wait at most before it is pushed; see [`Debounce`].
pub const MAX_DEBOUNCE: Duration = Duration::from_millis(100);
