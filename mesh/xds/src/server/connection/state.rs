//! What a connection remembers of each resource type.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;
use std::time::Duration;

use foldhash::fast::RandomState;

use crate::resource::Resource;
use crate::server::dirty::Dirty;

#[derive(Debug)]
pub(super) struct TypeState {
    pub(super) asked: bool,
    pub(super) answered: bool,
    pub(super) all: bool,
    pub(super) names: HashSet<Arc<str>, RandomState>,
    pub(super) entries: HashMap<Arc<str>, Entry, RandomState>,
    pub(super) upserts: Dirty,
    pub(super) removals: Dirty,
    pub(super) outstanding: Option<Outstanding>,
    /// Most resources in the next response, while a culprit is being searched.
    pub(super) batch: usize,
    pub(super) upserts_blocked_since: Option<Duration>,
    pub(super) removals_blocked_since: Option<Duration>,
}

impl Default for TypeState {
    fn default() -> Self {
        Self {
            asked: false,
            answered: false,
            all: false,
            names: HashSet::default(),
            entries: HashMap::default(),
            upserts: Dirty::default(),
            removals: Dirty::default(),
            outstanding: None,
            batch: usize::MAX,
            upserts_blocked_since: None,
            removals_blocked_since: None,
        }
    }
}

#[derive(Debug, Default)]
pub(super) struct Entry {
    pub(super) wanted: Option<Arc<Resource>>,
    pub(super) held: Held,
    /// What the client will hold if it accepts the outstanding response.
    pub(super) in_flight: Option<Held>,
    /// Version that was refused last.
    pub(super) refused: Option<Arc<str>>,
}

#[derive(Clone, Debug, Default)]
pub(super) enum Held {
    /// Nothing, or nothing known: it must be told.
    #[default]
    Unknown,
    /// Whatever was on its way to it as it gave the name up, if it took it as part of everything.
    Perhaps,
    /// It was told that there is none.
    Nothing,
    /// A version that the client stated.
    Stated(Arc<str>),
    /// A resource that it accepted.
    Resource(Arc<Resource>),
}

impl Held {
    pub(super) fn is_version(&self, version: &str) -> bool {
        match self {
            Self::Unknown | Self::Perhaps | Self::Nothing => false,
            Self::Stated(held) => **held == *version,
            Self::Resource(held) => *held.version == *version,
        }
    }
}

#[derive(Debug)]
pub(super) struct Outstanding {
    pub(super) nonce: u64,
    pub(super) upserted: Vec<Arc<Resource>>,
    pub(super) removed: Vec<Arc<str>>,
    /// Lowest sequence numbers within.
    pub(super) oldest_upsert: u64,
    pub(super) oldest_removal: u64,
}

impl TypeState {
    pub(super) fn subscribed(&self, name: &str) -> bool {
        self.all || self.names.contains(name)
    }

    pub(super) fn oldest_upsert(&self) -> u64 {
        self.upserts.oldest().min(
            self.outstanding
                .as_ref()
                .map_or(u64::MAX, |outstanding| outstanding.oldest_upsert),
        )
    }

    pub(super) fn oldest_removal(&self) -> u64 {
        self.removals.oldest().min(
            self.outstanding
                .as_ref()
                .map_or(u64::MAX, |outstanding| outstanding.oldest_removal),
        )
    }
}
