//! Names of resources that requests wait for: virtual hosts and clusters on demand.
//!
//! A worker asks ([`OnDemand::ask`]) and waits; the control thread subscribes to what [`OnDemand::names`] says and settles
//! names as answers come ([`OnDemand::settle`]). A name that is known to be absent is answered at once for as long as it is
//! subscribed to: the control plane says so when it comes into being. Names that nobody has used for a while are given up.
//!
//! # Limits
//! Names and waiting requests are bounded. Where there is no room for a name, absent ones that were asked for longest ago
//! make it, an eighth of all at a time, so that clients who invent names cost a constant each.

use std::collections::{BTreeSet, HashMap};
use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;
use tokio::sync::{Notify, oneshot};

/// What there may be of them, and for how long.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Names at a time.
    pub names: usize,
    /// Requests that wait at a time.
    pub waiting: usize,
    /// A name that nobody has used for this long is given up.
    pub idle: Duration,
    /// How long a request waits for its virtual host; for its cluster the filter says it. Envoy has no limit of its own.
    pub host_timeout: Duration,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            names: 4096,
            waiting: 1024,
            idle: Duration::from_secs(600),
            host_timeout: Duration::from_secs(5),
        }
    }
}

/// What is asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Wanted {
    /// A virtual host, as `<route configuration>/<host>`.
    VirtualHost,
    /// A cluster.
    Cluster,
}

type Key = (Wanted, Arc<str>);

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    Asked,
    Present,
    Absent,
}

#[derive(Debug)]
struct Entry {
    state: State,
    waiters: Vec<oneshot::Sender<bool>>,
    /// Process clock, ms.
    used: u64,
    /// The resource that came for it, where that has another name.
    resource: Option<Arc<str>>,
}

#[derive(Debug, Default)]
struct Inner {
    /// Whether somebody can be asked.
    following: bool,
    waiting: usize,
    entries: HashMap<Key, Entry, foldhash::fast::RandomState>,
}

/// See the module.
#[derive(Debug, Default)]
pub struct OnDemand {
    limits: Limits,
    inner: Mutex<Inner>,
    asked: Notify,
}

/// What a worker hears.
#[derive(Debug)]
pub enum Answer {
    /// It is there, or known not to be.
    Known(bool),
    /// It has been asked for.
    Wait(Ticket),
    /// There is no room for one more.
    Full,
}

/// A request's place among those that wait, until it is dropped.
#[derive(Debug)]
pub struct Ticket {
    answer: oneshot::Receiver<bool>,
    owner: Arc<OnDemand>,
}

impl Ticket {
    /// Whether it has come, within `limit`.
    pub async fn wait(mut self, limit: Duration) -> bool {
        tokio::time::timeout(limit, &mut self.answer)
            .await
            .is_ok_and(|answer| answer.unwrap_or(false))
    }
}

impl Drop for Ticket {
    fn drop(&mut self) {
        self.owner.inner.lock().waiting -= 1;
    }
}

/// Somebody follows a control plane, until it is dropped; then whoever waits hears that nothing will come.
#[derive(Debug)]
pub struct Following(Arc<OnDemand>);

impl Drop for Following {
    fn drop(&mut self) {
        let mut inner = self.0.inner.lock();
        inner.following = false;
        inner.entries.clear();
    }
}

impl OnDemand {
    /// With these limits.
    pub fn new(limits: Limits) -> Arc<Self> {
        Arc::new(Self {
            limits,
            ..Self::default()
        })
    }

    /// The limits.
    pub fn limits(&self) -> Limits {
        self.limits
    }

    /// From now on names can be asked for.
    pub fn follow(self: &Arc<Self>) -> Following {
        self.inner.lock().following = true;
        Following(self.clone())
    }

    /// A request needs `name`; `now` is the process clock, ms.
    pub fn ask(self: &Arc<Self>, kind: Wanted, name: &str, now: u64) -> Answer {
        let mut inner = self.inner.lock();
        if !inner.following {
            return Answer::Known(false);
        }
        let waiting = inner.waiting;
        let key = (kind, Arc::from(name));
        if let Some(entry) = inner.entries.get_mut(&key) {
            entry.used = now;
            match entry.state {
                State::Present => return Answer::Known(true),
                State::Absent => return Answer::Known(false),
                State::Asked => {}
            }
        }
        if waiting >= self.limits.waiting {
            return Answer::Full;
        }
        if !inner.entries.contains_key(&key) {
            if inner.entries.len() >= self.limits.names && !inner.make_room(self.limits.names) {
                return Answer::Full;
            }
            self.asked.notify_one();
        }
        let entry = inner.entries.entry(key).or_insert(Entry {
            state: State::Asked,
            waiters: Vec::new(),
            used: now,
            resource: None,
        });
        // Of requests that gave up meanwhile.
        entry.waiters.retain(|waiter| !waiter.is_closed());
        let (sender, answer) = oneshot::channel();
        entry.waiters.push(sender);
        inner.waiting += 1;
        Answer::Wait(Ticket {
            answer,
            owner: self.clone(),
        })
    }

    /// Waits until a name is asked for that was not before.
    pub async fn changed(&self) {
        self.asked.notified().await;
    }

    /// The names to subscribe to.
    pub fn names(&self, kind: Wanted) -> BTreeSet<Arc<str>> {
        let inner = self.inner.lock();
        let of_kind = inner.entries.keys().filter(|(of, _)| *of == kind);
        of_kind.map(|(_, name)| name.clone()).collect()
    }

    /// Whether anything is subscribed to by name.
    pub fn holds_any(&self) -> bool {
        !self.inner.lock().entries.is_empty()
    }

    /// Names that nothing is known of yet.
    pub fn pending(&self, kind: Wanted) -> Vec<Arc<str>> {
        let inner = self.inner.lock();
        inner
            .entries
            .iter()
            .filter(|((of, _), entry)| *of == kind && entry.state == State::Asked)
            .map(|((_, name), _)| name.clone())
            .collect()
    }

    /// `name` is there, as part of `resource`, or is known not to be. Names that nobody asked for are passed over.
    pub fn settle(&self, kind: Wanted, name: &str, resource: Option<&Arc<str>>) {
        let mut inner = self.inner.lock();
        let Some(entry) = inner.entries.get_mut(&(kind, Arc::from(name))) else {
            return;
        };
        entry.state = if resource.is_some() {
            State::Present
        } else {
            State::Absent
        };
        entry.resource = resource.cloned();
        for waiter in entry.waiters.drain(..) {
            // A request that gave up needs no answer.
            let _ = waiter.send(resource.is_some());
        }
    }

    /// Forgets the names that have not been used for too long, and says which resources nobody has a name for any more.
    /// `used` says whether a name that is there has been used since the last time.
    pub fn give_up(&self, now: u64, used: impl Fn(Wanted, &str) -> bool) -> Vec<(Wanted, Arc<str>)> {
        let idle = self.limits.idle.as_millis() as u64;
        let mut inner = self.inner.lock();
        let mut freed = Vec::new();
        inner.entries.retain(|(kind, name), entry| {
            if entry.state == State::Present && used(*kind, name) {
                entry.used = now;
            }
            let waited_for = entry.waiters.iter().any(|waiter| !waiter.is_closed());
            let keep = waited_for || now.saturating_sub(entry.used) < idle;
            if !keep && let Some(resource) = &entry.resource {
                freed.push((*kind, resource.clone()));
            }
            keep
        });
        freed.retain(|(kind, resource)| {
            !inner
                .entries
                .iter()
                .any(|((of, _), entry)| of == kind && entry.resource.as_ref() == Some(resource))
        });
        freed
    }

    /// How many requests wait now.
    pub fn waiting(&self) -> usize {
        self.inner.lock().waiting
    }
}

impl Inner {
    /// Forgets the absent names that were asked for longest ago; whether there were any.
    fn make_room(&mut self, limit: usize) -> bool {
        let mut ages: Vec<u64> = self
            .entries
            .values()
            .filter(|entry| entry.state == State::Absent)
            .map(|entry| entry.used)
            .collect();
        if ages.is_empty() {
            return false;
        }
        let count = (limit / 8).clamp(1, ages.len());
        let (_, youngest, _) = ages.select_nth_unstable(count - 1);
        let (youngest, mut left) = (*youngest, count);
        self.entries.retain(|_, entry| {
            let goes = entry.state == State::Absent && entry.used <= youngest && left > 0;
            left -= usize::from(goes);
            !goes
        });
        true
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn small() -> Arc<OnDemand> {
        OnDemand::new(Limits {
            names: 8,
            waiting: 4,
            idle: Duration::from_millis(100),
            ..Limits::default()
        })
    }

    #[test]
    fn without_anybody_to_ask_a_name_is_absent_at_once() {
        let registry = small();
        assert!(matches!(
            registry.ask(Wanted::Cluster, "a", 1),
            Answer::Known(false)
        ));
        let following = registry.follow();
        let Answer::Wait(ticket) = registry.ask(Wanted::Cluster, "a", 1) else {
            panic!("not asked for");
        };
        drop(following);
        assert_eq!(registry.names(Wanted::Cluster).len(), 0);
        drop(ticket);
        assert_eq!(registry.waiting(), 0);
    }

    #[test]
    fn a_name_that_is_absent_stays_subscribed_to_and_is_not_waited_for_again() {
        let registry = small();
        let _following = registry.follow();
        let Answer::Wait(_ticket) = registry.ask(Wanted::VirtualHost, "80/a", 1) else {
            panic!("not asked for");
        };
        registry.settle(Wanted::VirtualHost, "80/a", None);
        assert!(matches!(
            registry.ask(Wanted::VirtualHost, "80/a", 2),
            Answer::Known(false)
        ));
        assert!(registry.names(Wanted::VirtualHost).contains("80/a"));
        registry.settle(Wanted::VirtualHost, "80/a", Some(&"80/host".into()));
        assert!(matches!(
            registry.ask(Wanted::VirtualHost, "80/a", 3),
            Answer::Known(true)
        ));
    }

    #[test]
    fn what_has_not_been_used_for_a_while_is_given_up_once_no_other_name_stands_for_it() {
        let registry = small();
        let _following = registry.follow();
        for name in ["80/a", "80/b"] {
            registry.ask(Wanted::VirtualHost, name, 1);
            registry.settle(Wanted::VirtualHost, name, Some(&"80/host".into()));
        }
        let freed = registry.give_up(101, |_, name| name == "80/b");
        assert_eq!(freed, []);
        assert_eq!(registry.names(Wanted::VirtualHost).len(), 1);
        let freed = registry.give_up(300, |_, _| false);
        assert_eq!(freed, [(Wanted::VirtualHost, "80/host".into())]);
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(128))]

        #[test]
        fn neither_names_nor_waiting_requests_pass_their_limits(
            steps in proptest::collection::vec((0u8..5, 0u8..24), 1..200)
        ) {
            let registry = small();
            let _following = registry.follow();
            let mut tickets = Vec::new();
            for (now, (step, name)) in steps.into_iter().enumerate() {
                let name = format!("n{name}");
                match step {
                    0..=1 => match registry.ask(Wanted::Cluster, &name, now as u64) {
                        Answer::Wait(ticket) => tickets.push(ticket),
                        Answer::Known(_) | Answer::Full => {}
                    },
                    2 => registry.settle(Wanted::Cluster, &name, None),
                    3 => registry.settle(Wanted::Cluster, &name, Some(&name.as_str().into())),
                    _ => {
                        tickets.pop();
                    }
                }
                prop_assert!(registry.names(Wanted::Cluster).len() <= 8);
                prop_assert_eq!(registry.waiting(), tickets.len());
                prop_assert!(tickets.len() <= 4);
            }
        }
    }
}
