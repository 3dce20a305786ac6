//! The shell: shared caches in, model changes out.

use std::time::Duration;

use super::{
    Api, Arc, Cache, CancellationToken, Change, Client, DestinationRule, EndpointSlice, Gateway, Index,
    JoinSet, Kind, Node, Object, Pod, Service, ServiceEntry, Sidecar, VirtualService, cache, mpsc,
};

/// Changes that may wait for the translation; watches wait when it is full, nothing is dropped.
const QUEUE: usize = 1024;

/// How long the first list of a kind may take before it counts as failed.
const FIRST_LIST: Duration = Duration::from_secs(60);

/// What the watches tell.
#[derive(Debug)]
pub enum Event {
    /// Something changed. Changes of one list come together.
    Changed(Vec<Change>),
    /// Every kind has been listed once; from now on the model is the world.
    Synced,
}

/// A watch that could not begin.
#[derive(Debug, thiserror::Error)]
#[error("watching {kind}: {source}; check that its definition is installed and that it may be read")]
pub struct WatchError {
    kind: &'static str,
    source: serin_kit::Error,
}

/// Watches every kind that the model reads, until cancelled. The tasks belong to `tasks`.
pub fn watch(
    client: &Client,
    cancel: &CancellationToken,
    tasks: &mut JoinSet<Result<(), WatchError>>,
) -> mpsc::Receiver<Event> {
    let (sender, receiver) = mpsc::channel(QUEUE);
    let ready = Arc::new(tokio::sync::Barrier::new(Kind::ALL.len() + 1));
    macro_rules! kind {
        ($kind:ident) => {
            let cache = Cache::<$kind>::start(Api::all(client.clone()), cancel.clone());
            tasks.spawn(follow(
                cache,
                Kind::$kind,
                Object::$kind as fn(Arc<$kind>) -> Object,
                sender.clone(),
                ready.clone(),
                cancel.clone(),
            ));
        };
    }
    kind!(Service);
    kind!(EndpointSlice);
    kind!(Pod);
    kind!(Node);
    kind!(VirtualService);
    kind!(DestinationRule);
    kind!(Gateway);
    kind!(ServiceEntry);
    kind!(Sidecar);
    let cancel = cancel.clone();
    tasks.spawn(async move {
        tokio::select! {
            () = cancel.cancelled() => {}
            _ = ready.wait() => {
                // The receiver being gone means that nobody wants to know any more.
                let _ = sender.send(Event::Synced).await;
            }
        }
        Ok(())
    });
    receiver
}

async fn follow<K>(
    cache: Cache<K>,
    kind: Kind,
    wrap: fn(Arc<K>) -> Object,
    sender: mpsc::Sender<Event>,
    ready: Arc<tokio::sync::Barrier>,
    cancel: CancellationToken,
) -> Result<(), WatchError>
where
    K: kube::Resource + serde::de::DeserializeOwned + Clone + std::fmt::Debug + Send + Sync + 'static,
    K::DynamicType: std::hash::Hash + Eq + Clone + std::fmt::Debug + Unpin + Default + Send + Sync,
{
    let mut index = Index::default();
    // Subscribed before the first read: what changes in between is told twice rather than never.
    let mut changes = cache.changes();
    tokio::select! {
        // First: a cache that is told to end says that it never became ready.
        biased;
        () = cancel.cancelled() => return Ok(()),
        listed = cache.ready(FIRST_LIST) => listed.map_err(|source| WatchError { kind: kind.as_str(), source })?,
    }
    let all = |cache: &Cache<K>| cache.list().into_iter().map(wrap).collect::<Vec<_>>();
    if sender
        .send(Event::Changed(index.reset(kind, all(&cache))))
        .await
        .is_err()
    {
        return Ok(());
    }
    ready.wait().await;
    loop {
        let change = tokio::select! {
            () = cancel.cancelled() => return Ok(()),
            change = changes.next() => change,
        };
        let told = match change {
            None => return Ok(()),
            Some(cache::Change::Applied(object)) => vec![index.apply(wrap(object))],
            Some(cache::Change::Deleted(object)) => index.delete(wrap(object).key()).into_iter().collect(),
            Some(cache::Change::Resync) => index.reset(kind, all(&cache)),
        };
        if !told.is_empty() && sender.send(Event::Changed(told)).await.is_err() {
            return Ok(());
        }
    }
}
