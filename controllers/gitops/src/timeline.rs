//! What happened when, for whoever tells the story of a release (the CLI's live view and report).

use jiff::Timestamp;
use tokio::sync::mpsc;

/// One moment on the way from a commit to running objects.
#[derive(Debug, Clone, PartialEq)]
pub struct Moment {
    /// When it happened.
    pub at: Timestamp,
    /// `GitRepository/ns/name` or `Kustomization/ns/name`.
    pub object: String,
    /// The revision that it is about, `main@sha1:…`.
    pub revision: String,
    /// What happened.
    pub what: What,
}

/// What happened.
#[derive(Debug, Clone, PartialEq)]
pub enum What {
    /// A source saw a new revision.
    RevisionSeen {
        /// The commit's first line.
        subject: String,
        /// Its author's name.
        author: String,
    },
    /// A Kustomization has applied the revision; health is still open.
    Applied {
        /// Objects created, as `Kind/namespace/name`.
        created: Vec<String>,
        /// Objects changed.
        configured: Vec<String>,
        /// Objects deleted.
        deleted: Vec<String>,
        /// Objects that were as they should be.
        unchanged: usize,
    },
    /// A Kustomization is ready on the revision.
    Ready,
    /// An attempt failed.
    Failed {
        /// The reason of the condition.
        reason: String,
        /// Its message.
        message: String,
    },
}

/// The sender's side; a listener that is slow or gone loses moments, never time of ours.
#[derive(Debug, Clone, Default)]
pub(crate) struct Timeline(pub(crate) Option<mpsc::Sender<Moment>>);

impl Timeline {
    pub(crate) fn tell(&self, object: String, revision: &str, what: What) {
        if let Some(sink) = &self.0 {
            let moment = Moment {
                at: Timestamp::now(),
                object,
                revision: revision.to_string(),
                what,
            };
            if sink.try_send(moment).is_err() {
                tracing::debug!("a moment of the timeline was dropped: nobody takes it");
            }
        }
    }
}
