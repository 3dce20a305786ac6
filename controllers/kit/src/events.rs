//! Kubernetes events about objects: queued, published in the background, never in the way of a reconcile.
//!
//! What is said again within six minutes is counted in the event that said it first; another note is another event. An event is
//! information for people. When the API server does not take it within its deadline, or more than
//! `QUEUE` are waiting, it is dropped and counted in the log; conditions on the object carry the truth.
//!
//! A controller that ends in good order waits for its recorder ([`Recorder::flush`]), so that what it said last is published as well.
//! What waits in the queue of a process that is killed is lost with it.

use std::collections::HashMap;
use std::time::Duration;

use jiff::Timestamp;
use k8s_openapi::api::core::v1::ObjectReference;
use k8s_openapi::api::events::v1::{Event, EventSeries};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::MicroTime;
use kube::api::{Patch, PatchParams, PostParams};
use kube::{Api, Client};
use serde_json::json;
use tokio::sync::mpsc;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tracing::warn;

/// How many events may wait to be published.
const QUEUE: usize = 1024;
/// How long one event may take.
const PUBLISH_TIMEOUT: Duration = Duration::from_secs(5);
/// How long what still waits may take to be published once the controller is to end.
const FLUSH_TIMEOUT: Duration = Duration::from_secs(2);
/// The API server refuses longer notes.
const NOTE_MAX: usize = 1024;
/// How long the same words count as one event.
const SERIES: Duration = Duration::from_secs(6 * 60);
/// How many events may be remembered for that.
const REMEMBERED: usize = 1024;

/// What was said, about what.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct Said {
    warning: bool,
    reason: String,
    action: String,
    note: String,
    /// `kind`, namespace, name and uid of the object.
    about: [String; 4],
}

/// Publishes events for one controller. Cloning is cheap.
#[derive(Clone, Debug)]
pub struct Recorder {
    queue: mpsc::Sender<(Said, ObjectReference)>,
    /// Nothing more will be said.
    said: CancellationToken,
    /// The publishing task has ended.
    ended: CancellationToken,
}

impl Recorder {
    /// Starts a recorder that reports as `controller` until `cancel` fires; what waits then is still published, within 2 s.
    pub fn start(client: Client, controller: &str, cancel: CancellationToken) -> Self {
        let (queue, waiting) = mpsc::channel(QUEUE);
        let said = CancellationToken::new();
        let ended = CancellationToken::new();
        let publisher = Publisher {
            client,
            controller: controller.to_owned(),
            waiting,
            known: HashMap::new(),
        };
        let (last, end) = (said.clone(), ended.clone().drop_guard());
        tokio::spawn(async move {
            publisher.run(cancel, last).await;
            drop(end);
        });
        Self { queue, said, ended }
    }

    /// Waits until everything that was said is published, or until the deadline for that has passed (2 s). Nothing can be said
    /// afterwards, by no clone.
    pub async fn flush(&self) {
        self.said.cancel();
        if tokio::time::timeout(FLUSH_TIMEOUT, self.ended.cancelled())
            .await
            .is_err()
        {
            warn!("events are still being published; this does not wait for them any longer");
        }
    }

    /// Queues an event of type `Normal`.
    pub fn normal(&self, about: &ObjectReference, reason: &str, action: &str, note: &str) {
        self.publish(false, about, reason, action, note);
    }

    /// Queues an event of type `Warning`.
    pub fn warning(&self, about: &ObjectReference, reason: &str, action: &str, note: &str) {
        self.publish(true, about, reason, action, note);
    }

    fn publish(&self, warning: bool, about: &ObjectReference, reason: &str, action: &str, note: &str) {
        let mut end = note.len().min(NOTE_MAX);
        while !note.is_char_boundary(end) {
            end -= 1;
        }
        let said = Said {
            warning,
            reason: reason.to_owned(),
            action: action.to_owned(),
            note: note[..end].to_owned(),
            about: [&about.kind, &about.namespace, &about.name, &about.uid]
                .map(|part| part.clone().unwrap_or_default()),
        };
        if let Err(error) = self.queue.try_send((said, about.clone())) {
            warn!(reason, %error, "event dropped");
        }
    }
}

/// An event that was published.
struct Known {
    name: String,
    count: i32,
    last: Instant,
}

/// The task that publishes.
struct Publisher {
    client: Client,
    controller: String,
    waiting: mpsc::Receiver<(Said, ObjectReference)>,
    /// The event of each thing that was said not long ago.
    known: HashMap<Said, Known>,
}

impl Publisher {
    /// Publishes until `cancel` or `said` fires, or until nobody is left who could say something; then what still waits.
    async fn run(mut self, cancel: CancellationToken, said: CancellationToken) {
        loop {
            let next = tokio::select! {
                () = cancel.cancelled() => break,
                () = said.cancelled() => break,
                next = self.waiting.recv() => next,
            };
            let Some((said, about)) = next else { return };
            self.publish(said, about, PUBLISH_TIMEOUT).await;
        }
        // The controller is ending: it may still say something until it asks for the rest.
        let deadline = Instant::now() + FLUSH_TIMEOUT;
        loop {
            let next = tokio::select! {
                biased;
                next = self.waiting.recv() => next,
                () = said.cancelled(), if !self.waiting.is_closed() => {
                    self.waiting.close();
                    continue;
                }
                () = tokio::time::sleep_until(deadline) => None,
            };
            let Some((said, about)) = next else { break };
            let left = deadline.saturating_duration_since(Instant::now());
            self.publish(said, about, left).await;
        }
        self.waiting.close();
        if !self.waiting.is_empty() {
            warn!(
                events = self.waiting.len(),
                "events not published: the controller ended before"
            );
        }
    }

    async fn publish(&mut self, said: Said, about: ObjectReference, timeout: Duration) {
        let reason = said.reason.clone();
        match tokio::time::timeout(timeout, self.write(said, about)).await {
            Ok(Ok(())) => {}
            Ok(Err(error)) => warn!(%reason, %error, "event not published"),
            Err(_) => warn!(%reason, "event not published within its deadline"),
        }
    }

    /// Counts what was said lately, or makes an event of it.
    async fn write(&mut self, said: Said, about: ObjectReference) -> kube::Result<()> {
        let namespace = about.namespace.as_deref().unwrap_or("default");
        let events: Api<Event> = Api::namespaced(self.client.clone(), namespace);
        let (now, at) = (Instant::now(), MicroTime(Timestamp::now()));
        self.forget(now);
        let recent = |known: &&mut Known| now.duration_since(known.last) < SERIES;
        if let Some(known) = self.known.get_mut(&said).filter(recent) {
            known.count += 1;
            known.last = now;
            let series = EventSeries {
                count: known.count,
                last_observed_time: at.clone(),
            };
            let patch = Patch::Merge(json!({ "series": series }));
            match events.patch(&known.name, &PatchParams::default(), &patch).await {
                Ok(_) => return Ok(()),
                // Somebody removed it.
                Err(kube::Error::Api(status)) if status.code == 404 => {}
                Err(error) => return Err(error),
            }
        }
        let name = format!(
            "{}.{:x}",
            about.name.as_deref().unwrap_or_default(),
            at.0.as_nanosecond()
        );
        let mut event = Event {
            event_time: Some(at),
            type_: Some(if said.warning { "Warning" } else { "Normal" }.to_owned()),
            reason: Some(said.reason.clone()),
            action: Some(said.action.clone()),
            note: Some(said.note.clone()),
            reporting_controller: Some(self.controller.clone()),
            reporting_instance: Some(self.controller.clone()),
            ..Event::default()
        };
        event.metadata.name = Some(name.clone());
        event.metadata.namespace = Some(namespace.to_owned());
        event.regarding = Some(about);
        events.create(&PostParams::default(), &event).await?;
        let known = Known {
            name,
            count: 1,
            last: now,
        };
        self.known.insert(said, known);
        Ok(())
    }

    /// Drops what was said long ago; everything where too much is remembered.
    fn forget(&mut self, now: Instant) {
        let full = self.known.len() >= REMEMBERED;
        if full {
            self.known
                .retain(|_, known| now.duration_since(known.last) < SERIES);
            if self.known.len() >= REMEMBERED {
                self.known.clear();
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use http::{Request, Response};
    use kube::client::Body;
    use serde_json::Value;
    use tokio::sync::Semaphore;

    use super::*;

    /// A server that takes as many writes as there are permits; each is told, by its method and body, once it was taken.
    fn server(permits: Arc<Semaphore>) -> (Client, mpsc::UnboundedReceiver<(String, Value)>) {
        let (taken, count) = mpsc::unbounded_channel();
        let service = tower::service_fn(move |request: Request<Body>| {
            let (permits, taken) = (permits.clone(), taken.clone());
            async move {
                let method = request.method().to_string();
                let body = request.into_body().collect_bytes().await?;
                if let Ok(permit) = permits.acquire().await {
                    permit.forget();
                }
                let written: Value = serde_json::from_slice(&body)?;
                let mut answer = json!({"regarding": {}, "metadata": {}, "eventTime": null});
                if method == "POST" {
                    answer = written.clone();
                }
                let _ = taken.send((method, written));
                let answer = Response::new(Body::from(serde_json::to_vec(&answer)?));
                Ok::<_, tower::BoxError>(answer)
            }
        });
        (Client::new(service, "default"), count)
    }

    fn object() -> ObjectReference {
        ObjectReference {
            kind: Some("Pod".to_owned()),
            name: Some("p".to_owned()),
            namespace: Some("default".to_owned()),
            uid: Some("u".to_owned()),
            ..ObjectReference::default()
        }
    }

    #[tokio::test(start_paused = true)]
    async fn what_was_said_before_the_end_is_published_and_the_end_waits_for_it() {
        let (client, mut published) = server(Arc::new(Semaphore::new(1000)));
        let cancel = CancellationToken::new();
        let recorder = Recorder::start(client, "test", cancel.clone());
        for i in 0..20 {
            recorder.normal(&object(), &format!("Reason{i}"), "Act", "a note");
        }
        cancel.cancel();
        // A pass that was under way says something as well.
        recorder.warning(&object(), "Late", "Act", "a note");
        recorder.flush().await;
        let mut count = 0;
        while published.try_recv().is_ok() {
            count += 1;
        }
        assert_eq!(count, 21);
    }

    #[tokio::test(start_paused = true)]
    async fn a_server_that_takes_nothing_holds_the_end_up_for_a_bounded_time_only() {
        let (client, mut published) = server(Arc::new(Semaphore::new(0)));
        let cancel = CancellationToken::new();
        let recorder = Recorder::start(client, "test", cancel.clone());
        for i in 0..20 {
            recorder.normal(&object(), &format!("Reason{i}"), "Act", "a note");
        }
        cancel.cancel();
        // The clock goes on by itself only while everything waits.
        tokio::time::timeout(FLUSH_TIMEOUT * 2, recorder.flush())
            .await
            .expect("the end does not wait for ever");
        assert!(published.try_recv().is_err());
    }

    #[tokio::test]
    async fn the_same_words_are_counted_and_other_words_are_another_event() {
        let (client, mut published) = server(Arc::new(Semaphore::new(1000)));
        let recorder = Recorder::start(client, "test", CancellationToken::new());
        recorder.normal(&object(), "Created", "Create", "created one");
        recorder.normal(&object(), "Created", "Create", "created two");
        recorder.normal(&object(), "Created", "Create", "created one");
        recorder.flush().await;
        let (method, first) = published.recv().await.expect("an event");
        assert_eq!((method.as_str(), &first["note"]), ("POST", &json!("created one")));
        for field in [
            "reportingController",
            "reportingInstance",
            "action",
            "reason",
            "type",
            "eventTime",
        ] {
            assert!(
                first[field].as_str().is_some_and(|text| !text.is_empty()),
                "{field}: {first}"
            );
        }
        let (method, second) = published.recv().await.expect("an event");
        assert_eq!(
            (method.as_str(), &second["note"]),
            ("POST", &json!("created two"))
        );
        let (method, again) = published.recv().await.expect("an event");
        assert_eq!((method.as_str(), &again["series"]["count"]), ("PATCH", &json!(2)));
    }
}
