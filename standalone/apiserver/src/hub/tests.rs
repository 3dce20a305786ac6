//! A server killed at any moment between the staging of a write and its answer.

use std::collections::BTreeMap;
use std::future::Future;
use std::path::Path;
use std::pin::Pin;
use std::time::Duration;

use futures::FutureExt as _;
use parking_lot::Condvar;
use proptest::prelude::*;
use serde_json::json;

use super::*;
use crate::clock::SystemClock;
use crate::log::Segment;

const RESOURCE: &str = "/configmaps";
const DEADLINE: Duration = Duration::from_secs(20);

/// Where the log's writer stands with a group of records.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum At {
    /// Not in a write.
    Idle,
    /// About to write a group: nothing of it is on disk.
    BeforeDisk,
    /// The group is on disk and not published.
    OnDisk,
}

/// Stops the log's writer before and after each group.
struct Gate {
    at: Mutex<(At, bool)>,
    moved: Condvar,
}

impl Gate {
    fn stop(&self, here: At) {
        let mut at = self.at.lock();
        at.0 = here;
        self.moved.notify_all();
        while at.0 == here && !at.1 {
            self.moved.wait(&mut at);
        }
    }

    /// Where the writer stops next, once it has been given something to write.
    fn stopped(&self) -> At {
        let mut at = self.at.lock();
        while at.0 == At::Idle {
            let late = self.moved.wait_for(&mut at, DEADLINE).timed_out();
            assert!(!late, "the log's writer never came to what was staged");
        }
        at.0
    }

    fn let_go(&self) {
        self.at.lock().0 = At::Idle;
        self.moved.notify_all();
    }

    fn open(&self) {
        self.at.lock().1 = true;
        self.moved.notify_all();
    }
}

struct Gated {
    file: Box<dyn Segment>,
    gate: Arc<Gate>,
}

impl Segment for Gated {
    fn append(&mut self, bytes: &[u8]) -> std::io::Result<()> {
        self.gate.stop(At::BeforeDisk);
        self.file.append(bytes)?;
        self.gate.stop(At::OnDisk);
        Ok(())
    }

    fn cut(&mut self, length: u64) -> std::io::Result<()> {
        self.file.cut(length)
    }
}

fn hub_of(store: Store, log: Option<Log>) -> Arc<Hub> {
    Arc::new(Hub::new(store, log, Arc::new(SystemClock), None, None, false))
}

fn gated(dir: &Path) -> (Arc<Hub>, Arc<Gate>) {
    let gate = Arc::new(Gate {
        at: Mutex::new((At::Idle, false)),
        moved: Condvar::new(),
    });
    let mut store = Store::new(1);
    let mut recovered = Log::open(dir, &mut store).expect("opens");
    let file = std::mem::replace(
        &mut recovered.file,
        Box::new(tempfile::tempfile().expect("a file")),
    );
    recovered.file = Box::new(Gated {
        file,
        gate: gate.clone(),
    });
    let behind = Arc::new(BehindLog::default());
    let log = Log::start(recovered, behind.clone()).expect("starts");
    let hub = hub_of(store, Some(log));
    behind.attach(&hub);
    (hub, gate)
}

type Contents = BTreeMap<String, u64>;

fn contents(store: &Store) -> Contents {
    store
        .list(RESOURCE, "", None, None, |_| true)
        .items
        .iter()
        .map(|o| (meta_name(&o.value), o.rv))
        .collect()
}

fn meta_name(object: &Value) -> String {
    crate::meta::name(object).to_owned()
}

/// What a server finds that starts from the disk as it is now.
fn after_a_kill(dir: &Path) -> Contents {
    let copy = tempfile::tempdir().expect("a directory");
    for entry in std::fs::read_dir(dir).expect("listed") {
        let path = entry.expect("an entry").path();
        if path.extension().is_some_and(|e| e == "log" || e == "snapshot") {
            let name = path.file_name().expect("a name");
            std::fs::copy(&path, copy.path().join(name)).expect("copied");
        }
    }
    let mut store = Store::new(1);
    Log::open(copy.path(), &mut store).expect("opens");
    contents(&store)
}

#[derive(Debug, Clone)]
enum Step {
    /// A writer that expects what it can read.
    Write(u8),
    Remove(u8),
    /// The log's writer goes on to its next stop.
    Proceed,
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    prop::collection::vec(
        prop_oneof![
            3 => (0..3u8).prop_map(Step::Write),
            1 => (0..3u8).prop_map(Step::Remove),
            3 => Just(Step::Proceed),
        ],
        1..40,
    )
}

type Write = Pin<Box<dyn Future<Output = Result<Arc<Event>, CommitError>>>>;

fn write(hub: &Arc<Hub>, name: &str, removal: bool) -> Option<(Option<u64>, Write)> {
    let key = format!("n/{name}");
    let current = hub.get_at(RESOURCE, &key);
    let seen = current.as_ref().map(|o| o.rv);
    let object =
        json!({"kind": "ConfigMap", "apiVersion": "v1", "metadata": {"name": name, "namespace": "n"}});
    let hub = hub.clone();
    let write: Write = match (removal, current) {
        (true, None) => return None,
        (true, Some(current)) => Box::pin(async move {
            let resource = RESOURCE.into();
            hub.remove(&resource, &key, object, current.rv).await
        }),
        (false, current) => Box::pin(async move {
            let expect = current.map_or(Expect::Absent, |c| Expect::At(c.rv));
            hub.put(&RESOURCE.into(), &key, object, expect).await
        }),
    };
    Some((seen, write))
}

async fn killed_anywhere(steps: &[Step]) {
    let dir = tempfile::tempdir().expect("a directory");
    let (hub, gate) = gated(dir.path());
    let mut published = hub.any.subscribe();
    let mut writers: Vec<(String, Option<u64>, Write)> = Vec::new();
    // What was seen before each kill, and what came back after it.
    let mut kills: Vec<(u64, Contents, Contents)> = Vec::new();
    let first = hub.store.lock().rv();
    let under_way = |hub: &Hub| {
        let store = hub.store.lock();
        (0..3).any(|n| store.staged_at(RESOURCE, &format!("n/{n}")).is_some())
    };
    for step in steps {
        match step {
            Step::Write(name) | Step::Remove(name) => {
                let name = name.to_string();
                if let Some((seen, mut future)) = write(&hub, &name, matches!(step, Step::Remove(_))) {
                    assert!(
                        future.as_mut().now_or_never().is_none(),
                        "neither done nor lost before anything is on disk"
                    );
                    writers.push((name, seen, future));
                }
            }
            Step::Proceed if under_way(&hub) => match gate.stopped() {
                At::OnDisk => {
                    published.mark_unchanged();
                    gate.let_go();
                    tokio::time::timeout(DEADLINE, published.changed())
                        .await
                        .expect("what is on disk is published")
                        .expect("a hub");
                }
                At::Idle | At::BeforeDisk => {
                    gate.let_go();
                    assert_eq!(gate.stopped(), At::OnDisk);
                }
            },
            Step::Proceed => {}
        }
        // Writers are answered with what can be read, and with nothing else.
        let mut waiting = Vec::new();
        for (name, seen, mut future) in writers {
            match future.as_mut().now_or_never() {
                None => waiting.push((name, seen, future)),
                Some(Ok(event)) => assert!(event.rv <= hub.store.lock().rv()),
                Some(Err(CommitError::Lost(_))) => {
                    let now = hub.get_at(RESOURCE, &format!("n/{name}")).map(|o| o.rv);
                    assert_ne!(now, seen, "the loser of {name} can see why");
                }
                Some(Err(CommitError::Storage(error))) => panic!("{error}"),
            }
        }
        writers = waiting;
        let (rv, seen) = {
            let store = hub.store.lock();
            let last = store
                .events_after(RESOURCE, first)
                .expect("history")
                .last()
                .map(|e| e.rv);
            assert!(
                last.unwrap_or(first) <= store.rv(),
                "a watch is not ahead of a list"
            );
            (store.rv(), contents(&store))
        };
        if matches!(step, Step::Proceed) {
            kills.push((rv, seen, after_a_kill(dir.path())));
        }
    }
    gate.open();
    for (_, _, future) in writers {
        let done = tokio::time::timeout(DEADLINE, future).await.expect("an answer");
        assert!(!matches!(done, Err(CommitError::Storage(_))));
    }
    // The states that ever were, by version.
    let mut states: Vec<(u64, Contents)> = vec![(first, Contents::new())];
    for event in hub.store.lock().events_after(RESOURCE, first).expect("history") {
        let mut state = states.last().map(|(_, s)| s.clone()).unwrap_or_default();
        let name = meta_name(&event.object.value);
        match event.change {
            Change::Deleted => state.remove(&name),
            Change::Added | Change::Modified => state.insert(name, event.rv),
        };
        states.push((event.rv, state));
    }
    for (rv, seen, back) in kills {
        assert!(
            states.contains(&(rv, seen)),
            "what was seen at {rv} was the state of that version"
        );
        let kept = states.iter().any(|(at, state)| *at >= rv && *state == back);
        assert!(kept, "{rv} was seen, and the kill left {back:?}");
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(32))]

    #[test]
    fn a_kill_at_any_moment_takes_back_nothing_that_a_reader_watcher_or_writer_has_seen(steps in steps()) {
        tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .expect("a runtime")
            .block_on(killed_anywhere(&steps));
    }
}

#[tokio::test]
async fn a_new_object_waits_for_a_change_of_its_namespace_and_is_considered_again() {
    let dir = tempfile::tempdir().expect("a directory");
    let (hub, gate) = gated(dir.path());
    let namespace = json!({"kind": "Namespace", "apiVersion": "v1", "metadata": {"name": "n"}});
    let spaces: ResourceId = "/namespaces".into();
    let mut change = Box::pin(hub.put(&spaces, "n", namespace, Expect::Absent));
    assert!(change.as_mut().now_or_never().is_none());
    let (_, mut new) = write(&hub, "a", false).expect("a creation");
    assert!(new.as_mut().now_or_never().is_none());
    assert!(
        hub.store.lock().staged_at(RESOURCE, "n/a").is_none(),
        "not staged yet"
    );
    gate.open();
    change.await.expect("the namespace is there");
    assert!(matches!(new.await, Err(CommitError::Lost(Lost::Changed))));
}
