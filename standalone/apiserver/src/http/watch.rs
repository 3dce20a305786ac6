//! Watches: a position in the history of a kind, moved on when the kind changes.
//!
//! Nothing is queued per watcher. A watcher that does not read falls behind the history and is told so by an in-stream 410,
//! which is also the answer to a version from before the history.

use std::collections::VecDeque;
use std::convert::Infallible;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use axum::body::Body;
use bytes::{BufMut as _, Bytes, BytesMut};
use futures::stream;
use http::Response;
use serde_json::{Value, json};
use tokio::time::{Instant, Sleep};

use super::accept::{self, Accepted, Form};
use super::read::Selection;
use super::request::Call;
use super::respond;
use crate::error::{ApiError, ApiResult, FieldError};
use crate::hub::Hub;
use crate::store::{Change, Event, Stored, TypeHead};
use crate::{table, versions};

/// Time between bookmarks to a client that asked for them.
const BOOKMARK_EVERY: Duration = Duration::from_secs(60);
/// A watch without `timeoutSeconds` ends after this, as Kubernetes' do after 30 to 60 minutes.
const DEFAULT_TIMEOUT: Duration = Duration::from_secs(45 * 60);
/// Watches at one time.
const MAX_WATCHERS: usize = 20_000;
/// Events put into one chunk at most, so that one burst is not one allocation.
const CHUNK_EVENTS: usize = 256;

struct Watch {
    hub: Arc<Hub>,
    call: Call,
    selection: Selection,
    accepted: Accepted,
    position: u64,
    wake: tokio::sync::watch::Receiver<u64>,
    /// Objects sent as synthetic ADDED before the first event.
    initial: VecDeque<Arc<Stored>>,
    /// A bookmark closes the initial events.
    initial_end: Option<u64>,
    bookmarks: bool,
    first_table: bool,
    deadline: std::pin::Pin<Box<Sleep>>,
    next_bookmark: std::pin::Pin<Box<Sleep>>,
    ended: bool,
    head: TypeHead,
}

impl Drop for Watch {
    fn drop(&mut self) {
        self.hub.watchers.fetch_sub(1, Ordering::Relaxed);
    }
}

fn check_options(call: &Call) -> ApiResult<bool> {
    let q = &call.query;
    let send = match q.text("sendInitialEvents") {
        "" => None,
        text => Some(!matches!(text, "false" | "0")),
    };
    let matching = q.text("resourceVersionMatch");
    let mut errors = Vec::new();
    if !matching.is_empty() && send.is_none() {
        errors.push(FieldError::forbidden(
            "resourceVersionMatch",
            "resourceVersionMatch is forbidden for watch unless sendInitialEvents is provided",
        ));
    }
    if send.is_some() && matching != "NotOlderThan" {
        errors.push(FieldError::forbidden(
            "resourceVersionMatch",
            "sendInitialEvents requires setting resourceVersionMatch to NotOlderThan",
        ));
        if !matching.is_empty() {
            errors.push(FieldError::not_supported(
                "resourceVersionMatch",
                &serde_json::json!(matching),
                &["NotOlderThan"],
            ));
        }
    }
    if errors.is_empty() {
        Ok(send == Some(true))
    } else {
        Err(ApiError::invalid("meta.k8s.io", "ListOptions", "", &errors))
    }
}

pub(crate) async fn serve(hub: Arc<Hub>, call: Call) -> ApiResult<Response<Body>> {
    let accepted = accept::negotiate(call.header("accept"))?;
    if accepted.yaml {
        // Told in the form that was asked for.
        let error = ApiError::new(406, "NotAcceptable", accept::STREAMS);
        return Ok(super::respond::value(406, &error.to_status(), accepted, &[]));
    }
    let streaming_list = check_options(&call)?;
    let selection = Selection::of(&call)?;
    let rv = call.query.text("resourceVersion");
    let resource = call.target.kind.resource.clone();
    let from = match rv {
        "" | "0" => None,
        text => Some(text.parse::<u64>().map_err(|_| {
            ApiError::plain_internal(format!(
                "resourceVersion: Invalid value: {text:?}: strconv.ParseUint: parsing {text:?}: invalid syntax"
            ))
        })?),
    };
    if hub.watchers.load(Ordering::Relaxed) >= MAX_WATCHERS {
        let mut error = ApiError::new(
            429,
            "TooManyRequests",
            format!("too many watches ({MAX_WATCHERS}); try again later"),
        );
        error.retry_after = Some(5);
        return Err(error);
    }
    let wake = hub.subscribe(&resource);
    let seconds = call
        .query
        .text("timeoutSeconds")
        .parse::<u64>()
        .ok()
        .filter(|s| *s > 0);
    let timeout = seconds.map_or(DEFAULT_TIMEOUT, Duration::from_secs);
    let (position, initial, expired) = {
        let store = hub.store.lock();
        match from {
            Some(from) if !streaming_list => {
                let expired = from < store.oldest(&resource);
                (from, VecDeque::new(), expired)
            }
            _ => {
                let page = store.list(&resource, &selection.prefix, None, None, |o| selection.holds(o));
                (page.rv, page.items.into(), false)
            }
        }
    };
    let warnings = super::read::warnings(&call);
    hub.watchers.fetch_add(1, Ordering::Relaxed);
    let bookmarks = call.query.flag("allowWatchBookmarks");
    let mut watch = Watch {
        hub,
        selection,
        accepted,
        position,
        wake,
        initial,
        // Kubernetes ends the initial events of any watch that began with some and asked for bookmarks.
        initial_end: (bookmarks && (streaming_list || from.is_none())).then_some(position),
        bookmarks,
        first_table: true,
        deadline: Box::pin(tokio::time::sleep(timeout)),
        next_bookmark: Box::pin(tokio::time::sleep(BOOKMARK_EVERY)),
        ended: false,
        head: TypeHead::new(&call.target.kind.kind, &call.target.api_version()),
        call,
    };
    let first = if expired {
        watch.ended = true;
        Some(watch.gone())
    } else {
        None
    };
    let stream = stream::unfold((watch, first), |(mut watch, first)| async move {
        let chunk = match first {
            Some(chunk) => Some(chunk),
            None => watch.next_chunk().await,
        };
        chunk.map(|c| (Ok::<Bytes, Infallible>(c), (watch, None)))
    });
    let mut response = respond::bytes(200, Bytes::new(), "application/json", &warnings);
    *response.body_mut() = Body::from_stream(stream);
    Ok(response)
}

impl Watch {
    async fn next_chunk(&mut self) -> Option<Bytes> {
        if self.ended {
            return None;
        }
        loop {
            let mut out = BytesMut::new();
            if !self.initial.is_empty() {
                for _ in 0..CHUNK_EVENTS {
                    let Some(object) = self.initial.pop_front() else {
                        break;
                    };
                    self.write(&mut out, "ADDED", &object);
                }
                return Some(out.freeze());
            }
            if let Some(rv) = self.initial_end.take() {
                self.bookmark(&mut out, rv, true);
                return Some(out.freeze());
            }
            // Marked seen before reading, so that an event between the two wakes us again.
            self.wake.mark_unchanged();
            let pending = self
                .hub
                .store
                .lock()
                .events_after(&self.call.target.kind.resource, self.position);
            let Some(events) = pending else {
                self.ended = true;
                return Some(self.gone());
            };
            for event in events {
                self.position = event.rv;
                self.deliver(&mut out, &event);
            }
            if !out.is_empty() {
                return Some(out.freeze());
            }
            tokio::select! {
                changed = self.wake.changed() => {
                    if changed.is_err() {
                        return None;
                    }
                }
                () = self.deadline.as_mut() => {
                    self.ended = true;
                    return self.last_bookmark();
                }
                () = self.hub.shutdown.cancelled() => {
                    self.ended = true;
                    return self.last_bookmark();
                }
                () = self.next_bookmark.as_mut() => {
                    self.next_bookmark.as_mut().reset(Instant::now() + BOOKMARK_EVERY);
                    if let Some(chunk) = self.last_bookmark() {
                        return Some(chunk);
                    }
                }
            }
        }
    }

    /// A bookmark at the newest version of which this watcher has certainly seen everything.
    fn last_bookmark(&mut self) -> Option<Bytes> {
        if !self.bookmarks {
            return None;
        }
        let rv = {
            let store = self.hub.store.lock();
            let nothing_pending = store
                .events_after(&self.call.target.kind.resource, self.position)
                .is_some_and(|e| e.is_empty());
            if nothing_pending {
                store.rv()
            } else {
                self.position
            }
        };
        self.position = self.position.max(rv);
        let mut out = BytesMut::new();
        self.bookmark(&mut out, rv, false);
        Some(out.freeze())
    }

    /// What an event is to this watcher: an object may enter or leave its selection.
    fn deliver(&mut self, out: &mut BytesMut, event: &Event) {
        if !event.key.starts_with(&self.selection.prefix) {
            return;
        }
        let before = event.previous.as_ref().is_some_and(|o| self.selection.holds(o));
        let after = event.change != Change::Deleted && self.selection.holds(&event.object);
        match (before, after) {
            (false, true) => self.write(out, "ADDED", &event.object),
            (true, true) => self.write(out, "MODIFIED", &event.object),
            (true, false) if event.change == Change::Deleted => self.write(out, "DELETED", &event.object),
            (true, false) => {
                // It left the selection: the old state under the new version.
                if let Some(previous) = &event.previous {
                    let left = Stored::new(previous.value.clone(), event.rv);
                    self.write(out, "DELETED", &Arc::new(left));
                }
            }
            (false, false) => {}
        }
    }

    fn write(&mut self, out: &mut BytesMut, kind: &str, object: &Arc<Stored>) {
        let target = &self.call.target;
        let version = target.version();
        if self.accepted.form == Form::Object && !self.accepted.yaml && versions::is_stored_form(&target.kind)
        {
            out.reserve(object.bare().len() + 120);
            out.put_slice(b"{\"type\":\"");
            out.put_slice(kind.as_bytes());
            out.put_slice(b"\",\"object\":");
            object.write(&self.head, out);
            out.put_slice(b"}\n");
            return;
        }
        let value = versions::from_hub(&target.kind, version, &object.value);
        let shown = match self.accepted.form {
            Form::Object => value,
            Form::Metadata => respond::partial(&value),
            Form::Table => {
                let with_columns = std::mem::take(&mut self.first_table);
                table::of_event(
                    &target.kind,
                    version,
                    &value,
                    with_columns,
                    self.call.query.text("includeObject"),
                    self.hub.clock.now(),
                )
            }
        };
        self.frame(out, &json!({"type": kind, "object": shown}));
    }

    fn frame(&self, out: &mut BytesMut, event: &Value) {
        out.put_slice(event.to_string().as_bytes());
        out.put_u8(b'\n');
    }

    fn bookmark(&self, out: &mut BytesMut, rv: u64, initial_end: bool) {
        let target = &self.call.target;
        let mut metadata = json!({"resourceVersion": rv.to_string()});
        if initial_end {
            metadata["annotations"] = json!({"k8s.io/initial-events-end": "true"});
        }
        let mut object =
            json!({"kind": &*target.kind.kind, "apiVersion": target.api_version(), "metadata": metadata});
        match self.accepted.form {
            Form::Metadata => {
                object["kind"] = json!("PartialObjectMetadata");
                object["apiVersion"] = json!("meta.k8s.io/v1");
            }
            Form::Table => {
                let row = json!({"cells": [], "object": {"kind": "PartialObjectMetadata", "apiVersion": "meta.k8s.io/v1", "metadata": metadata}});
                object = json!({"kind": "Table", "apiVersion": "meta.k8s.io/v1", "metadata": {"resourceVersion": rv.to_string()}, "columnDefinitions": [], "rows": [row]});
            }
            Form::Object => {
                if !target.kind.is_custom() {
                    merge_zero(&mut object, &target.version().zero);
                }
            }
        }
        self.frame(out, &json!({"type": "BOOKMARK", "object": object}));
    }

    fn gone(&self) -> Bytes {
        let current = self.hub.store.lock().rv();
        let status =
            ApiError::expired(format!("too old resource version: {} ({current})", self.position)).to_status();
        let mut out = BytesMut::new();
        self.frame(&mut out, &json!({"type": "ERROR", "object": status}));
        out.freeze()
    }
}

/// A typed bookmark carries what Go always writes (`spec: {}`, `status: {}`).
fn merge_zero(object: &mut Value, zero: &Value) {
    if let (Some(object), Some(zero)) = (object.as_object_mut(), zero.as_object()) {
        for (key, value) in zero {
            object.entry(key.clone()).or_insert_with(|| value.clone());
        }
    }
}
