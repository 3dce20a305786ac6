//! Kubernetes events about objects: queued, published in the background, never in the way of a reconcile.
//!
//! An event is information for people. When the API server does not take it within its deadline, or more than
//! `QUEUE` are waiting, it is dropped and counted in the log; conditions on the object carry the truth.

use std::time::Duration;

use k8s_openapi::api::core::v1::ObjectReference;
use kube::runtime::events::{Event, EventType, Recorder as KubeRecorder, Reporter};
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;
use tracing::warn;

/// How many events may wait to be published.
const QUEUE: usize = 1024;
/// How long one event may take.
const PUBLISH_TIMEOUT: Duration = Duration::from_secs(5);
/// The API server refuses longer notes.
const NOTE_MAX: usize = 1024;

/// Publishes events for one controller. Cloning is cheap.
#[derive(Clone, Debug)]
pub struct Recorder {
    queue: mpsc::Sender<(Event, ObjectReference)>,
}

impl Recorder {
    /// Starts a recorder that reports as `controller` until `cancel` fires.
    pub fn start(client: kube::Client, controller: &str, cancel: CancellationToken) -> Self {
        let reporter = Reporter {
            controller: controller.to_owned(),
            instance: None,
        };
        let recorder = KubeRecorder::new(client, reporter);
        let (queue, mut waiting) = mpsc::channel(QUEUE);
        tokio::spawn(async move {
            loop {
                let next = tokio::select! {
                    () = cancel.cancelled() => return,
                    next = waiting.recv() => next,
                };
                let Some((event, reference)) = next else { return };
                match tokio::time::timeout(PUBLISH_TIMEOUT, recorder.publish(&event, &reference)).await {
                    Ok(Ok(())) => {}
                    Ok(Err(error)) => warn!(reason = %event.reason, %error, "event not published"),
                    Err(_) => warn!(reason = %event.reason, "event not published within its deadline"),
                }
            }
        });
        Self { queue }
    }

    /// Queues an event of type `Normal`.
    pub fn normal(&self, about: &ObjectReference, reason: &str, action: &str, note: &str) {
        self.publish(EventType::Normal, about, reason, action, note);
    }

    /// Queues an event of type `Warning`.
    pub fn warning(&self, about: &ObjectReference, reason: &str, action: &str, note: &str) {
        self.publish(EventType::Warning, about, reason, action, note);
    }

    fn publish(&self, type_: EventType, about: &ObjectReference, reason: &str, action: &str, note: &str) {
        let mut end = note.len().min(NOTE_MAX);
        while !note.is_char_boundary(end) {
            end -= 1;
        }
        let event = Event {
            type_,
            reason: reason.to_owned(),
            note: Some(note[..end].to_owned()),
            action: action.to_owned(),
            secondary: None,
        };
        if self.queue.try_send((event, about.clone())).is_err() {
            warn!(reason, "event dropped: too many are waiting");
        }
    }
}
