//! GET of an object and of a collection.

use axum::body::Body;
use base64::Engine as _;
use bytes::{BufMut as _, Bytes, BytesMut};
use http::Response;
use serde_json::{Value, json};

use super::accept::{self, Form};
use super::request::Call;
use super::respond;
use crate::error::{ApiError, ApiResult, Cause, Details};
use crate::hub::Hub;
use crate::schema::syntax;
use crate::selector::{FieldSelector, LabelSelector};
use crate::store::{Stored, TypeHead};
use crate::{table, versions};

/// How long a read of a version in the future waits for it, as Kubernetes does.
const FUTURE_WAIT: std::time::Duration = std::time::Duration::from_secs(3);

/// What narrows a list or watch.
#[derive(Debug, Clone)]
pub(crate) struct Selection {
    pub(crate) prefix: String,
    pub(crate) labels: LabelSelector,
    pub(crate) fields: FieldSelector,
}

impl Selection {
    pub(crate) fn of(call: &Call) -> ApiResult<Self> {
        let target = &call.target;
        let labels = LabelSelector::parse(call.query.text("labelSelector")).map_err(ApiError::bad_request)?;
        let mut fields =
            FieldSelector::parse(call.query.text("fieldSelector")).map_err(ApiError::bad_request)?;
        for term in &fields.0 {
            if !crate::kinds::selectable(&target.kind, target.version(), &term.path) {
                return Err(ApiError::bad_request(unknown_field(&target.kind, &term.path)));
            }
        }
        if !target.name.is_empty() {
            fields.0.push(crate::selector::FieldTerm {
                path: "metadata.name".into(),
                value: target.name.clone(),
                equal: true,
            });
        }
        versions::hub_field_names(&target.kind, &mut fields);
        let prefix = if target.kind.namespaced && !target.namespace.is_empty() {
            format!("{}/", target.namespace)
        } else {
            String::new()
        };
        Ok(Self {
            prefix,
            labels,
            fields,
        })
    }

    pub(crate) fn holds(&self, object: &Stored) -> bool {
        self.labels.matches(&object.value) && (self.fields.is_empty() || self.fields.matches(&object.value))
    }

    pub(crate) fn is_narrow(&self) -> bool {
        !self.labels.is_empty() || !self.fields.is_empty()
    }
}

/// Kinds with selectable fields of their own have their own wording.
fn unknown_field(kind: &crate::kinds::Kind, path: &str) -> String {
    let own = matches!(
        (&*kind.group, &*kind.plural),
        (
            "",
            "pods" | "nodes" | "namespaces" | "secrets" | "services" | "replicationcontrollers" | "events"
        ) | ("batch", "jobs")
            | ("events.k8s.io", _)
    );
    if own || kind.is_custom() {
        return format!("field label not supported: {path}");
    }
    let namespace = if kind.namespaced {
        ", \"metadata.namespace\""
    } else {
        ""
    };
    format!("{path:?} is not a known field selector: only \"metadata.name\"{namespace}")
}

pub(crate) async fn get(hub: &Hub, call: &Call) -> ApiResult<Response<Body>> {
    let accepted = accept::negotiate(call.header("accept"))?;
    accepted.check_single(&call.target.kind)?;
    let target = &call.target;
    let rv = call.query.text("resourceVersion");
    if !rv.is_empty() && rv != "0" {
        let wanted: u64 = rv.parse().map_err(|_| {
            let mut error = ApiError::plain_internal(format!(
                "resourceVersion: Invalid value: {rv:?}: strconv.ParseUint: parsing {rv:?}: invalid syntax"
            ));
            error.code = 500;
            error
        })?;
        await_version(hub, &target.kind.resource, wanted).await?;
    }
    let Some(stored) = hub.get(&target.kind, &target.key()) else {
        return Err(target.not_found());
    };
    let warnings = warnings(call);
    if accepted.form == Form::Object && !accepted.yaml && versions::is_stored_form(&target.kind) {
        let mut out = Vec::with_capacity(stored.bare().len() + 64);
        stored.write(&TypeHead::new(&target.kind.kind, &target.api_version()), &mut out);
        return Ok(respond::bytes(200, out.into(), "application/json", &warnings));
    }
    let object = versions::from_hub(&target.kind, target.version(), &stored.value);
    let now = hub.clock.now();
    Ok(respond::object(200, &object, accepted, &warnings, |o| {
        table::of_one(
            &target.kind,
            target.version(),
            o,
            call.query.text("includeObject"),
            now,
        )
    }))
}

/// Warnings that every request for a kind carries.
pub(crate) fn warnings(call: &Call) -> Vec<String> {
    let mut out = Vec::new();
    if let Some(text) = call.target.kind.row().and_then(crate::kinds::Row::warning) {
        out.push(text.to_owned());
    }
    if let Some(text) = &call.target.version().deprecation {
        out.push(text.clone());
    }
    out
}

/// Wait until the store has reached a version, for a short time.
async fn await_version(hub: &Hub, _resource: &str, wanted: u64) -> ApiResult<()> {
    let mut any = hub.any.subscribe();
    let reached = |hub: &Hub| hub.store.lock().rv() >= wanted;
    let wait = async {
        while !reached(hub) {
            if any.changed().await.is_err() {
                return;
            }
        }
    };
    if reached(hub) || tokio::time::timeout(FUTURE_WAIT, wait).await.is_ok() {
        return Ok(());
    }
    let current = hub.store.lock().rv();
    let mut error = ApiError::new(
        504,
        "Timeout",
        format!("Timeout: Too large resource version: {wanted}, current: {current}"),
    );
    error.details = Some(Details {
        causes: vec![Cause {
            reason: "ResourceVersionTooLarge".into(),
            message: "Too large resource version".into(),
            field: String::new(),
        }],
        retry_after_seconds: Some(1),
        ..Details::default()
    });
    Err(error)
}

/// Where the next page of a list begins.
struct Continue {
    /// -1 goes on with what is there now.
    rv: i64,
    after: String,
}

fn encode_continue(rv: i64, after: &str, prefix: &str) -> String {
    let start = after.strip_prefix(prefix).unwrap_or(after);
    let body = json!({"v": "meta.k8s.io/v1", "rv": rv, "start": format!("{start}\0")}).to_string();
    base64::engine::general_purpose::URL_SAFE_NO_PAD.encode(body)
}

fn decode_continue(token: &str, prefix: &str) -> ApiResult<Continue> {
    let invalid = |why: &str| {
        ApiError::bad_request(format!(
            "invalid continue token: continue key is not valid: {why}"
        ))
    };
    // As Go reads it: bits that are left over do not matter.
    let lenient = base64::engine::GeneralPurpose::new(
        &base64::alphabet::URL_SAFE,
        base64::engine::general_purpose::NO_PAD.with_decode_allow_trailing_bits(true),
    );
    let bytes = lenient.decode(token).map_err(|e| invalid(&e.to_string()))?;
    let body: Value = serde_json::from_slice(&bytes)
        .map_err(|e| invalid(&syntax::complaint(&bytes).unwrap_or_else(|| e.to_string())))?;
    let version = body.get("v").and_then(Value::as_str).unwrap_or_default();
    if version != "meta.k8s.io/v1" {
        return Err(invalid(&format!(
            "server does not recognize this encoded version {version}"
        )));
    }
    if body.get("rv").and_then(Value::as_i64).unwrap_or(0) == 0 {
        return Err(invalid(
            "incorrect encoded start resourceVersion (version meta.k8s.io/v1)",
        ));
    }
    let start = body.get("start").and_then(Value::as_str).unwrap_or_default();
    if start.contains("..") {
        return Err(invalid(start));
    }
    if start.is_empty() {
        return Err(invalid("encoded start key empty (version meta.k8s.io/v1)"));
    }
    Ok(Continue {
        rv: body.get("rv").and_then(Value::as_i64).unwrap_or(-1),
        after: format!("{prefix}{}", start.trim_end_matches('\0')),
    })
}

pub(crate) async fn list(hub: &Hub, call: &Call) -> ApiResult<Response<Body>> {
    let accepted = accept::negotiate(call.header("accept"))?;
    let target = &call.target;
    check_list_options(call)?;
    let selection = Selection::of(call)?;
    if !call.query.text("continue").is_empty() && !matches!(call.query.text("resourceVersion"), "" | "0") {
        return Err(ApiError::bad_request(
            "specifying resource version is not allowed when using continue",
        ));
    }
    let limit = call.query.text("limit").parse::<usize>().ok().filter(|l| *l > 0);
    let token = call.query.text("continue");
    let from = if token.is_empty() {
        None
    } else {
        Some(decode_continue(token, &selection.prefix)?)
    };
    let rv = call.query.text("resourceVersion");
    let wanted: u64 = if rv.is_empty() { 0 } else { rv.parse().unwrap_or(0) };
    let mut exact = false;
    if wanted > 0 && from.is_none() {
        await_version(hub, &target.kind.resource, wanted).await?;
        let (oldest, current) = {
            let store = hub.store.lock();
            (store.oldest(&target.kind.resource), store.rv())
        };
        exact = call.query.text("resourceVersionMatch") == "Exact"
            || (limit.is_some() && call.query.text("resourceVersionMatch").is_empty());
        if exact && wanted < current && wanted < oldest {
            return Err(too_old(None, &selection.prefix));
        }
    }
    if let Some(from) = &from {
        let oldest = hub.store.lock().oldest(&target.kind.resource);
        if from.rv >= 0 && from.rv.cast_unsigned() < oldest {
            return Err(too_old(Some(from), &selection.prefix));
        }
    }
    // Pages that follow show what the first one was taken from.
    let at = match &from {
        Some(from) => u64::try_from(from.rv).ok(),
        None => exact.then_some(wanted),
    };
    let page = {
        let store = hub.store.lock();
        let after = from.as_ref().map(|f| f.after.as_str());
        let (resource, prefix) = (&target.kind.resource, &selection.prefix);
        let keep = |o: &Stored| selection.holds(o);
        match at {
            Some(at) => store
                .list_at(resource, prefix, after, limit, at, keep)
                .ok_or_else(|| too_old(from.as_ref(), &selection.prefix))?,
            None => store.list(resource, prefix, after, limit, keep),
        }
    };
    let list_rv = page.rv;
    let next = page
        .next_after
        .as_ref()
        .map(|after| encode_continue(list_rv.cast_signed(), after, &selection.prefix));
    let mut metadata = json!({"resourceVersion": list_rv.to_string()});
    if let Some(next) = &next {
        metadata["continue"] = json!(next);
        if !selection.is_narrow() {
            metadata["remainingItemCount"] = json!(page.remaining);
        }
    }
    if next.is_none() && target.kind.is_custom() && accepted.form == Form::Object {
        metadata["continue"] = json!("");
    }
    let warnings = warnings(call);
    let version = target.version();
    match accepted.form {
        Form::Object if !accepted.yaml && versions::is_stored_form(&target.kind) => Ok(respond::bytes(
            200,
            encode_list(call, &metadata, &page.items),
            "application/json",
            &warnings,
        )),
        Form::Object => {
            let items: Vec<Value> = page
                .items
                .iter()
                .map(|o| {
                    let mut object = versions::from_hub(&target.kind, version, &o.value);
                    strip_type(&mut object, call);
                    object
                })
                .collect();
            let list = json!({"kind": target.kind.list_kind, "apiVersion": target.api_version(), "metadata": metadata, "items": items});
            Ok(respond::value(200, &list, accepted, &warnings))
        }
        Form::Metadata => {
            let items: Vec<Value> = page.items.iter().map(|o| respond::partial(&o.value)).collect();
            let items = if items.is_empty() {
                Value::Null
            } else {
                Value::Array(items)
            };
            let list = json!({"kind": "PartialObjectMetadataList", "apiVersion": "meta.k8s.io/v1", "metadata": metadata, "items": items});
            Ok(respond::value(200, &list, accepted, &warnings))
        }
        Form::Table => {
            let objects: Vec<Value> = page
                .items
                .iter()
                .map(|o| versions::from_hub(&target.kind, version, &o.value))
                .collect();
            let table = table::of_list(
                &target.kind,
                version,
                &objects,
                &metadata,
                call.query.text("includeObject"),
                hub.clock.now(),
            );
            Ok(respond::value(200, &table, accepted, &warnings))
        }
    }
}

/// The history does not reach back to the version of a list, or of the page that a token continues.
fn too_old(from: Option<&Continue>, prefix: &str) -> ApiError {
    let Some(from) = from else {
        return ApiError::expired("The resourceVersion for the provided list is too old.");
    };
    let mut error = ApiError::expired(
        "The provided continue parameter is too old to display a consistent list result. You can start a new list without the continue parameter, or use the continue token in this response to retrieve the remainder of the results. Continuing with the provided token results in an inconsistent list - objects that were created, modified, or deleted between the time the first chunk was returned and now may show up in the list.",
    );
    error.continue_token = Some(encode_continue(-1, &from.after, prefix));
    error
}

trait Tap: Sized {
    fn tap_message(self, change: impl FnOnce(&mut Self)) -> Self;
}

impl Tap for ApiError {
    fn tap_message(mut self, change: impl FnOnce(&mut Self)) -> Self {
        change(&mut self);
        self
    }
}

/// Items of built-in lists come without their own apiVersion and kind.
fn strip_type(object: &mut Value, call: &Call) {
    if !call.target.kind.is_custom()
        && let Some(map) = object.as_object_mut()
    {
        map.remove("kind");
        map.remove("apiVersion");
    }
}

/// Write the list from the encoded objects, without cloning any.
fn encode_list(call: &Call, metadata: &Value, items: &[std::sync::Arc<Stored>]) -> Bytes {
    let total: usize = items.iter().map(|o| o.bare().len() + 80).sum();
    let mut out = BytesMut::with_capacity(total + 256);
    // Items of built-in lists come without their own type.
    let head = call
        .target
        .kind
        .is_custom()
        .then(|| TypeHead::new(&call.target.kind.kind, &call.target.api_version()));
    let start = format!(
        "{{\"kind\":{},\"apiVersion\":{},\"metadata\":{metadata},\"items\":[",
        json!(call.target.kind.list_kind),
        json!(call.target.api_version())
    );
    out.put_slice(start.as_bytes());
    for (i, object) in items.iter().enumerate() {
        if i > 0 {
            out.put_u8(b',');
        }
        match &head {
            Some(head) => object.write(head, &mut out),
            None => out.put_slice(object.bare()),
        }
    }
    out.put_slice(b"]}");
    out.freeze()
}

/// Options that Kubernetes refuses on a list.
pub(crate) fn check_list_options(call: &Call) -> ApiResult<()> {
    use crate::error::FieldError;
    let q = &call.query;
    let rv = q.text("resourceVersion");
    let matching = q.text("resourceVersionMatch");
    let mut errors = Vec::new();
    {
        let field = "timeoutSeconds";
        let text = q.text(field);
        if !text.is_empty() && text.parse::<i64>().is_err() {
            return Err(ApiError::bad_request(format!(
                "strconv.ParseInt: parsing {text:?}: invalid syntax"
            )));
        }
    }
    if let Some(limit) = q.get("limit")
        && !limit.is_empty()
        && limit.parse::<i64>().is_err()
    {
        return Err(ApiError::bad_request(format!(
            "strconv.ParseInt: parsing {limit:?}: invalid syntax"
        )));
    }
    if !rv.is_empty() && rv.parse::<u64>().is_err() {
        return Err(ApiError::bad_request(format!(
            "resourceVersion: Invalid value: {rv:?}: strconv.ParseUint: parsing {rv:?}: invalid syntax"
        ))
        .tap_message(|e| {
            e.message =
                format!("invalid resource version: resourceVersion: Invalid value: {rv:?}: strconv.ParseUint: parsing {rv:?}: invalid syntax");
        }));
    }
    if !matching.is_empty() {
        if rv.is_empty() {
            errors.push(FieldError::forbidden(
                "resourceVersionMatch",
                "resourceVersionMatch is forbidden unless resourceVersion is provided",
            ));
        }
        if !q.text("continue").is_empty() {
            errors.push(FieldError::forbidden(
                "resourceVersionMatch",
                "resourceVersionMatch is forbidden when continue is provided",
            ));
        }
        if matching != "Exact" && matching != "NotOlderThan" {
            let mut error = FieldError::not_supported("resourceVersionMatch", &json!(matching), &[]);
            error.detail = "supported values: \"Exact\", \"NotOlderThan\", \"\"".to_owned();
            errors.push(error);
        }
        if matching == "Exact" && rv == "0" {
            errors.push(FieldError::forbidden(
                "resourceVersionMatch",
                "resourceVersionMatch \"exact\" is forbidden for resourceVersion \"0\"",
            ));
        }
    }
    if q.get("sendInitialEvents").is_some() {
        errors.push(FieldError::forbidden(
            "sendInitialEvents",
            "sendInitialEvents is forbidden for list",
        ));
    }
    if errors.is_empty() {
        Ok(())
    } else {
        Err(ApiError::invalid("meta.k8s.io", "ListOptions", "", &errors))
    }
}
