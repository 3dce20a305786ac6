//! What a client is interested in and what it holds, per resource type: the state that outlives a stream.
//!
//! The two wire variants are in `delta.rs` and `sotw.rs`; both work on this state. No clock, no network: a history of
//! requests, responses and verdicts is a test.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::sync::Arc;

use bytes::Bytes;
use envoy_types::pb::envoy::config::core::v3::Node;
use envoy_types::pb::google::rpc::Status;
use foldhash::fast::RandomState;

use crate::refusal::{self, Refusal};
use crate::resource::ResourceType;

/// Name that subscribes to every resource of a type.
pub(crate) const WILDCARD: &str = "*";

/// What a client wants of one resource type.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Interest {
    /// Everything that the server has for this client.
    pub all: bool,
    /// These resources.
    pub names: BTreeSet<Arc<str>>,
}

impl Interest {
    /// Everything that the server has for this client.
    pub fn all() -> Self {
        Self {
            all: true,
            names: BTreeSet::new(),
        }
    }

    /// The named resources only.
    pub fn names<N: Into<Arc<str>>>(names: impl IntoIterator<Item = N>) -> Self {
        Self {
            all: false,
            names: names.into_iter().map(Into::into).collect(),
        }
    }

    /// Whether there is anything to ask for.
    pub fn is_empty(&self) -> bool {
        !self.all && self.names.is_empty()
    }

    pub(crate) fn includes(&self, name: &str) -> bool {
        self.all || self.names.contains(name)
    }
}

/// What becomes of one name in an interest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum NameChange {
    Added,
    Removed,
    /// Removed and added again: what was held is forgotten, so it must be asked for again.
    Renewed,
}

/// Names that are wanted from now on and names that are not, in the order in which that was found out: what a large interest
/// is kept up to date with at the cost of what has changed. Bounded by the number of names.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct NameChanges(BTreeMap<Arc<str>, NameChange>);

impl NameChanges {
    /// From now on it is wanted.
    pub fn add(&mut self, name: impl Into<Arc<str>>) {
        self.0
            .entry(name.into())
            .and_modify(|change| {
                if *change == NameChange::Removed {
                    *change = NameChange::Renewed;
                }
            })
            .or_insert(NameChange::Added);
    }

    /// From now on it is not.
    pub fn remove(&mut self, name: impl Into<Arc<str>>) {
        self.0.insert(name.into(), NameChange::Removed);
    }

    /// Whether nothing has changed.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// What happened afterwards, added to this.
    pub(crate) fn merge(&mut self, later: Self) {
        for (name, change) in later.0 {
            if change != NameChange::Added {
                self.remove(name.clone());
            }
            if change != NameChange::Removed {
                self.add(name);
            }
        }
    }
}

/// A resource as it came from the server.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Received {
    /// Name, unique within its type.
    pub name: Arc<str>,
    /// The server's version of it, or a content hash where the protocol variant has none.
    pub version: Arc<str>,
    /// The encoded protobuf message.
    pub body: Bytes,
    /// Other names under which it may be asked for: those of a virtual host on demand are `<route configuration>/<host>`.
    pub aliases: Vec<Arc<str>>,
}

/// A response that cannot be understood.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum ProtocolError {
    /// The response is about a type that was never asked for.
    #[error("the control plane sent resources of type {0:?}, which was not subscribed to")]
    UnexpectedType(String),
}

/// What a response brought, after what is known already and what is of no interest has been left out.
#[derive(Debug, Default)]
pub struct Incoming {
    /// New or changed resources.
    pub upserted: Vec<Received>,
    /// Resources that exist no more.
    pub removed: Vec<Arc<str>>,
    /// What the server calls the state that it is of.
    pub version: Box<str>,
}

/// What must be remembered of a response until its verdict.
#[derive(Debug)]
pub struct Receipt {
    /// Type of the resources.
    pub resource_type: ResourceType,
    /// Which of the responses in the consumer's hands this is.
    pub(super) id: u64,
    pub(super) nonce: String,
    /// Of the whole response; state of the world only.
    pub(super) version_info: String,
    pub(super) upserted: Vec<(Arc<str>, Arc<str>)>,
    pub(super) removed: Vec<Arc<str>>,
    /// How many resources the response carried.
    pub(super) total: usize,
    /// Resources that were refused before the consumer saw them.
    pub(super) malformed: Vec<Refusal>,
}

/// The state of one client. See the module's documentation.
#[derive(Debug)]
pub struct ClientState {
    pub(super) node: Node,
    pub(super) node_sent: bool,
    pub(super) types: [TypeState; ResourceType::COUNT],
    next_receipt: u64,
}

#[derive(Debug, Default)]
pub(super) struct TypeState {
    pub(super) interest: Interest,
    /// Name → version of everything accepted and not removed.
    pub(super) held: HashMap<Arc<str>, Arc<str>, RandomState>,
    /// Resources in the consumer's hands, by receipt. A name whose interest goes meanwhile is taken out: the consumer
    /// forgets it, even if the interest comes back before the verdict.
    pub(super) in_hand: HashMap<u64, HashSet<Arc<str>>, RandomState>,
    /// What the server has been told on this stream; `None` before the first request of this type.
    pub(super) announced: Option<Announced>,
    /// Names that were asked for on demand → the resource that came for them.
    pub(super) aliases: HashMap<Arc<str>, Arc<str>, RandomState>,
    /// Nonce and version of the last response and the last accepted one; state of the world only.
    pub(super) nonce: String,
    pub(super) version_info: String,
}

/// What the server has been told of an interest, as the difference to the interest: it is small where that is large.
#[derive(Debug, Default)]
pub(super) struct Announced {
    /// Whether it was asked for everything.
    pub(super) all: bool,
    /// Names that it is yet to be asked for, and whether it was asked for them before.
    pub(super) gained: BTreeMap<Arc<str>, bool>,
    /// Names that it is yet to be told are not wanted any more.
    pub(super) lost: BTreeSet<Arc<str>>,
}

impl ClientState {
    /// A client that holds nothing and is interested in nothing.
    pub fn new(node: Node) -> Self {
        Self {
            node,
            node_sent: false,
            types: Default::default(),
            next_receipt: 0,
        }
    }

    /// States what is wanted of a type from now on. Resources that are no longer wanted are no longer held: the
    /// server will not say anything about them again. Nor are those that were asked for by a name that is given up while
    /// everything is wanted: the server sends them again if they are part of everything.
    pub fn set_interest(&mut self, resource_type: ResourceType, interest: Interest) {
        let state = &mut self.types[resource_type.index()];
        let mut changes = NameChanges::default();
        for name in state.interest.names.difference(&interest.names) {
            changes.remove(name.clone());
        }
        for name in interest.names.difference(&state.interest.names) {
            changes.add(name.clone());
        }
        let narrowed = state.interest.all && !interest.all;
        state.interest.all = interest.all;
        self.change_interest(resource_type, changes);
        if narrowed {
            let state = &mut self.types[resource_type.index()];
            let names = &state.interest.names;
            state.held.retain(|name, _| names.contains(name));
            for in_hand in state.in_hand.values_mut() {
                in_hand.retain(|name| names.contains(name));
            }
        }
    }

    /// The same for names beside those that are wanted already, and for names of these: costs what changes.
    pub fn change_interest(&mut self, resource_type: ResourceType, changes: NameChanges) {
        let state = &mut self.types[resource_type.index()];
        let mut gone: HashSet<Arc<str>> = HashSet::new();
        for (name, change) in changes.0 {
            if change != NameChange::Added && state.interest.names.remove(&name) {
                if let Some(announced) = &mut state.announced
                    && announced.gained.remove(&name) != Some(false)
                {
                    announced.lost.insert(name.clone());
                }
                gone.extend(state.aliases.remove(&name));
                gone.insert(name.clone());
            }
            if change != NameChange::Removed
                && state.interest.names.insert(name.clone())
                && let Some(announced) = &mut state.announced
            {
                // What was held under a name that has been given up meanwhile is forgotten, so it is asked for again.
                let known = announced.lost.remove(&name);
                announced.gained.insert(name, known);
            }
        }
        if gone.is_empty() {
            return;
        }
        // Another name that is still asked for may stand for the same resource.
        let TypeState {
            aliases, interest, ..
        } = &*state;
        for resource in aliases.values() {
            if interest.includes(resource) {
                gone.remove(resource);
            }
        }
        for name in gone {
            state.held.remove(&name);
            for in_hand in state.in_hand.values_mut() {
                in_hand.remove(&name);
            }
        }
    }

    /// What is wanted of a type.
    pub fn interest(&self, resource_type: ResourceType) -> &Interest {
        &self.types[resource_type.index()].interest
    }

    /// A new stream begins: everything must be asked for again, stating what is held.
    pub fn connected(&mut self) {
        self.node_sent = false;
        for state in &mut self.types {
            state.announced = None;
            state.nonce.clear();
            state.version_info.clear();
        }
    }

    /// Name and version of everything held of a type, in no order.
    pub fn held(&self, resource_type: ResourceType) -> impl Iterator<Item = (&Arc<str>, &Arc<str>)> {
        self.types[resource_type.index()].held.iter()
    }

    /// Puts a response into the consumer's hands; returns the number of its receipt.
    pub(super) fn hand_over(&mut self, resource_type: ResourceType, upserted: &[Received]) -> u64 {
        self.next_receipt += 1;
        let names = upserted.iter().map(|one| one.name.clone()).collect();
        self.types[resource_type.index()]
            .in_hand
            .insert(self.next_receipt, names);
        self.next_receipt
    }

    /// The node for the first request of a stream, nothing for the others.
    pub(super) fn node_once(&mut self) -> Option<Node> {
        (!std::mem::replace(&mut self.node_sent, true)).then(|| self.node.clone())
    }

    /// Takes over what the consumer accepted; returns the `error_detail` if it refused anything.
    pub(super) fn settle(&mut self, receipt: &Receipt, mut refusals: Vec<Refusal>) -> Option<Status> {
        let state = &mut self.types[receipt.resource_type.index()];
        if !refusals.is_empty() {
            let sent: HashSet<&str> = receipt.upserted.iter().map(|(name, _)| &**name).collect();
            refusals.retain(|refusal| sent.contains(&*refusal.name));
        }
        let refused: HashSet<&str> = refusals.iter().map(|refusal| &*refusal.name).collect();
        let in_hand = state.in_hand.remove(&receipt.id).unwrap_or_default();
        for (name, version) in &receipt.upserted {
            if !refused.contains(&**name) && in_hand.contains(name) {
                state.held.insert(name.clone(), version.clone());
            }
        }
        for name in &receipt.removed {
            state.held.remove(name);
        }
        drop(refused);
        refusals.extend(receipt.malformed.iter().cloned());
        (!refusals.is_empty()).then(|| Status {
            code: refusal::INVALID_ARGUMENT,
            message: refusal::format_detail(&refusals, receipt.total),
            details: Vec::new(),
        })
    }
}

impl TypeState {
    /// Whether the server is to be told something about what is wanted.
    pub(super) fn is_to_be_announced(&self) -> bool {
        match &self.announced {
            Some(announced) => {
                announced.all != self.interest.all
                    || !announced.gained.is_empty()
                    || !announced.lost.is_empty()
            }
            // An empty first request would mean "everything".
            None => !self.interest.is_empty(),
        }
    }

    /// Notes which of the names that are asked for a resource came for; whether one of them was not known yet.
    pub(super) fn note_aliases(&mut self, resource: &str, aliases: &[String]) -> bool {
        let mut news = false;
        for alias in aliases {
            if self.interest.names.contains(alias.as_str()) && !self.aliases.contains_key(alias.as_str()) {
                self.aliases.insert(alias.as_str().into(), resource.into());
                news = true;
            }
        }
        news
    }

    /// Whether the resource is wanted and differs from what is held.
    pub(super) fn is_news(&self, name: &str, version: &str) -> bool {
        self.interest.includes(name) && self.held.get(name).is_none_or(|held| **held != *version)
    }
}

/// The type of a response, if it was asked for on this stream.
pub(super) fn expected_type(state: &ClientState, type_url: &str) -> Result<ResourceType, ProtocolError> {
    ResourceType::from_type_url(type_url)
        .filter(|resource_type| state.types[resource_type.index()].announced.is_some())
        .ok_or_else(|| ProtocolError::UnexpectedType(type_url.to_owned()))
}
