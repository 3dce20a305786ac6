//! The log cut, flipped and reopened.

use std::path::Path;
use std::sync::Arc;

use bytes::Bytes;
use serde_json::{Value, json};

use super::*;
use crate::store::{Event, Expect};

struct Nothing;

impl StoreSide for Nothing {
    fn publish(&self, _durable: u64) {}

    fn snapshot(&self) -> (Vec<(Arc<str>, Arc<str>, u64, Vec<u8>)>, u64) {
        (Vec::new(), 0)
    }
}

fn object(name: &str, value: usize) -> Value {
    json!({"kind": "ConfigMap", "apiVersion": "v1", "metadata": {"name": name, "namespace": "n"}, "data": {"v": value.to_string()}})
}

fn open(dir: &Path) -> Result<Store, Error> {
    let mut store = Store::new(1);
    Log::open(dir, &mut store)?;
    Ok(store)
}

/// Writes `count` objects, each replaced and some deleted; returns what is expected after each record.
fn write(dir: &Path, count: usize) -> Vec<Vec<(String, String)>> {
    let mut store = Store::new(1);
    let recovered = Log::open(dir, &mut store).expect("opens");
    let log = Log::start(recovered, Arc::new(Nothing)).expect("starts");
    let resource: crate::kinds::ResourceId = "/configmaps".into();
    let mut states = vec![Vec::new()];
    let note = |store: &Store, event: &Event| {
        match event.change {
            crate::store::Change::Deleted => log.delete(&resource, &event.key, event.rv),
            _ => log.put(&resource, &event.key, event.rv, &event.object.whole()),
        }
        contents(store)
    };
    for i in 0..count {
        let key = format!("n/o{}", i % 4);
        let event = match store.get(&resource, &key).map(|o| o.rv) {
            None => store.put(&resource, &key, object(&format!("o{}", i % 4), i), Expect::Absent),
            Some(rv) if i % 3 == 0 => store.remove(&resource, &key, object("gone", i), rv),
            Some(rv) => store.put(&resource, &key, object(&format!("o{}", i % 4), i), Expect::At(rv)),
        }
        .expect("committed");
        store.publish(event.rv);
        let state = note(&store, &event);
        states.push(state);
    }
    log.close();
    states
}

fn contents(store: &Store) -> Vec<(String, String)> {
    store
        .list("/configmaps", "", None, None, |_| true)
        .items
        .iter()
        .map(|o| {
            (
                crate::meta::name(&o.value).to_owned(),
                crate::meta::str_at(&o.value, "data.v").to_owned(),
            )
        })
        .collect()
}

fn segment(dir: &Path) -> std::path::PathBuf {
    std::fs::read_dir(dir)
        .expect("a directory")
        .map(|e| e.expect("an entry").path())
        .find(|p| p.extension().is_some_and(|e| e == "log"))
        .expect("a segment")
}

#[test]
fn a_log_cut_at_any_byte_comes_back_with_a_prefix_of_its_writes() {
    let dir = tempfile::tempdir().expect("a directory");
    let states = write(dir.path(), 12);
    let whole = std::fs::read(segment(dir.path())).expect("readable");
    let mut last = 0;
    // Every byte of the last records, and samples of what is before.
    let tail = whole.len().saturating_sub(260);
    for cut in (0..tail).step_by(37).chain(tail..=whole.len()) {
        let other = tempfile::tempdir().expect("a directory");
        std::fs::write(
            other
                .path()
                .join(segment(dir.path()).file_name().expect("a name")),
            &whole[..cut],
        )
        .expect("written");
        let store = open(other.path()).unwrap_or_else(|e| panic!("cut at {cut}: {e}"));
        let found = states
            .iter()
            .skip(last)
            .position(|s| *s == contents(&store))
            .map(|p| p + last);
        last = found.unwrap_or_else(|| {
            panic!(
                "cut at {cut}: {:?} is no state that ever was, or one from before",
                contents(&store)
            )
        });
    }
    assert_eq!(last, states.len() - 1, "the whole log gives the last state");
}

#[test]
fn a_flipped_byte_before_the_tail_is_damage_with_its_offset_and_never_served() {
    let dir = tempfile::tempdir().expect("a directory");
    let states = write(dir.path(), 6);
    let path = segment(dir.path());
    let whole = std::fs::read(&path).expect("readable");
    for at in (0..whole.len()).step_by(17) {
        let mut bytes = whole.clone();
        bytes[at] ^= 0x55;
        std::fs::write(&path, &bytes).expect("written");
        match open(dir.path()) {
            Err(Error::Damaged { .. }) => {}
            Err(other) => panic!("byte {at}: {other}"),
            // Only in the last record it cannot be told from a torn write.
            Ok(store) => assert!(states.contains(&contents(&store)), "byte {at}"),
        }
        std::fs::write(&path, &whole).expect("written");
    }
}

#[test]
fn writing_goes_on_after_a_torn_tail() {
    let dir = tempfile::tempdir().expect("a directory");
    write(dir.path(), 3);
    let path = segment(dir.path());
    let whole = std::fs::read(&path).expect("readable");
    std::fs::write(&path, &whole[..whole.len() - 3]).expect("cut");
    {
        let mut store = Store::new(1);
        let recovered = Log::open(dir.path(), &mut store).expect("opens");
        let log = Log::start(recovered, Arc::new(Nothing)).expect("starts");
        let event = store
            .put(&"/configmaps".into(), "n/late", object("late", 9), Expect::Absent)
            .expect("committed");
        log.put(
            "/configmaps",
            "n/late",
            event.rv,
            &Bytes::from(event.object.whole()),
        );
        log.close();
    }
    let store = open(dir.path()).expect("opens again");
    assert!(contents(&store).contains(&("late".to_owned(), "9".to_owned())));
}

#[test]
fn a_directory_is_used_by_one_server_at_a_time() {
    let dir = tempfile::tempdir().expect("a directory");
    let mut store = Store::new(1);
    let first = Log::open(dir.path(), &mut store).expect("opens");
    assert!(open(dir.path()).is_err());
    drop(first);
    assert!(open(dir.path()).is_ok());
}

#[test]
fn versions_are_never_given_out_twice_across_restarts() {
    let dir = tempfile::tempdir().expect("a directory");
    write(dir.path(), 3);
    let first = open(dir.path()).expect("opens").rv();
    assert!(first > 1000, "a gap is left after what was written: {first}");
}

/// A disk without space as long as somebody says so. What does not fit is written in part, as real ones do.
struct Full {
    file: std::fs::File,
    is_full: Arc<std::sync::atomic::AtomicBool>,
}

impl segment::Segment for Full {
    fn append(&mut self, bytes: &[u8]) -> std::io::Result<()> {
        if self.is_full.load(std::sync::atomic::Ordering::SeqCst) {
            segment::Segment::append(&mut self.file, &bytes[..bytes.len() / 2])?;
            return Err(std::io::ErrorKind::StorageFull.into());
        }
        segment::Segment::append(&mut self.file, bytes)
    }

    fn cut(&mut self, length: u64) -> std::io::Result<()> {
        segment::Segment::cut(&mut self.file, length)
    }
}

#[tokio::test]
async fn on_a_full_disk_writes_are_refused_nothing_is_lost_and_it_goes_on_when_there_is_space_again() {
    use std::sync::atomic::{AtomicBool, Ordering};
    let dir = tempfile::tempdir().expect("a directory");
    let is_full = Arc::new(AtomicBool::new(false));
    let mut store = Store::new(1);
    let mut recovered = Log::open(dir.path(), &mut store).expect("opens");
    let file = std::fs::OpenOptions::new()
        .append(true)
        .open(&recovered.segment)
        .expect("the segment");
    recovered.file = Box::new(Full {
        file,
        is_full: is_full.clone(),
    });
    let log = Log::start(recovered, Arc::new(Nothing)).expect("starts");
    let mut write = |name: &str| -> u64 {
        let key = format!("n/{name}");
        let event = store
            .put(&"/configmaps".into(), &key, object(name, 1), Expect::Absent)
            .expect("committed");
        log.put("/configmaps", &key, event.rv, &event.object.whole());
        event.rv
    };
    let before = write("before");
    log.durable(before).await.expect("there is space");

    is_full.store(true, Ordering::SeqCst);
    let during = write("during");
    let error = log.durable(during).await.expect_err("there is no space");
    assert!(error.contains("no storage space"), "{error}");
    assert!(log.failure().is_some(), "and so is every further write, at once");
    // Killed now, the server comes back with what it answered, and only that.
    {
        let copy = tempfile::tempdir().expect("a directory");
        let from = segment(dir.path());
        std::fs::copy(&from, copy.path().join(from.file_name().expect("a name"))).expect("copied");
        let names: Vec<String> = contents(&open(copy.path()).expect("opens"))
            .into_iter()
            .map(|c| c.0)
            .collect();
        assert_eq!(names, ["before"]);
    }

    is_full.store(false, Ordering::SeqCst);
    let mut durable = log.durable.clone();
    let waited = durable.wait_for(|rv| *rv >= during);
    tokio::time::timeout(std::time::Duration::from_secs(20), waited)
        .await
        .expect("it is tried again by itself")
        .expect("the writer runs");
    assert!(log.failure().is_none());
    let after = write("after");
    log.durable(after).await.expect("there is space again");
    log.close();
    drop(log);
    let names: Vec<String> = contents(&open(dir.path()).expect("opens"))
        .into_iter()
        .map(|c| c.0)
        .collect();
    assert_eq!(
        names,
        ["after", "before", "during"],
        "what was not answered may be there, what was must"
    );
}
