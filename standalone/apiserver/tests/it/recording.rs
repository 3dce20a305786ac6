//! A recorded scenario and a server of ours that it is replayed against.

use std::collections::HashMap;
use std::fmt::Write as _;
use std::path::PathBuf;
use std::time::Duration;

use axum::body::Body;
use base64::Engine as _;
use http_body_util::BodyExt as _;
use regex::Regex;
use serde_json::{Value, json};
use serin_apiserver::ApiServer;
use tower::ServiceExt as _;

/// A wait step or an expected event may take this long.
const DEADLINE: Duration = Duration::from_millis(1500);
/// How long a watch must be quiet to count as having said everything.
const QUIET: Duration = Duration::from_millis(15);

pub(crate) fn data() -> Option<PathBuf> {
    let root = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../../shared/data/kube-api/scenarios");
    root.is_dir().then_some(root)
}

/// A recorded scenario being replayed.
pub(crate) struct Run {
    pub(crate) server: ApiServer,
    pub(crate) symbols: HashMap<String, Value>,
    pub(crate) pattern: Regex,
    pub(crate) failures: Vec<(usize, String)>,
    pub(crate) steps: usize,
}

pub(crate) enum Reply {
    Whole {
        status: u16,
        headers: http::HeaderMap,
        body: Vec<u8>,
    },
}

impl Run {
    pub(crate) async fn send(&self, request: &Value) -> Reply {
        let response = self.start(request).await;
        let status = response.status().as_u16();
        let headers = response.headers().clone();
        let body = response
            .into_body()
            .collect()
            .await
            .expect("a body")
            .to_bytes()
            .to_vec();
        Reply::Whole {
            status,
            headers,
            body,
        }
    }

    async fn start(&self, request: &Value) -> http::Response<Body> {
        let mut uri = self
            .substitute_text(request["path"].as_str().expect("a path"))
            .replace(' ', "%20");
        match &request["query"] {
            Value::String(raw) => {
                write!(uri, "?{}", self.substitute_text(raw).replace(' ', "%20")).expect("written");
            }
            Value::Object(query) => {
                let mut first = true;
                for (key, value) in query {
                    let values = match value {
                        Value::Array(list) => list.clone(),
                        one => vec![one.clone()],
                    };
                    for value in values {
                        let text = match self.substitute(&value) {
                            Value::String(s) => s,
                            other => other.to_string(),
                        };
                        write!(
                            uri,
                            "{}{}={}",
                            if first { '?' } else { '&' },
                            encode(key),
                            encode(&text)
                        )
                        .expect("written");
                        first = false;
                    }
                }
            }
            _ => {}
        }
        let mut builder = http::Request::builder()
            .method(request["method"].as_str().unwrap_or("GET"))
            .uri(&uri);
        let mut agent = false;
        for (name, value) in request["headers"].as_object().into_iter().flatten() {
            agent |= name.eq_ignore_ascii_case("user-agent");
            builder = builder.header(name, value.as_str().unwrap_or_default());
        }
        if !agent {
            builder = builder.header("User-Agent", "tester");
        }
        let body = if let Some(text) = request.get("body_text").and_then(Value::as_str) {
            self.substitute_text(text).into_bytes()
        } else if let Some(bytes) = request.get("body_base64").and_then(Value::as_str) {
            base64::engine::general_purpose::STANDARD
                .decode(bytes)
                .expect("base64")
        } else if let Some(generator) = request.get("body_generator") {
            generate(generator)
        } else if let Some(text) = request.get("body_in_order").and_then(Value::as_str) {
            self.substitute_text(text).into_bytes()
        } else if let Some(body) = request.get("body") {
            serde_json::to_vec(&self.substitute(body)).expect("JSON")
        } else {
            Vec::new()
        };
        let request = builder.body(Body::from(body)).expect("a request");
        self.server.service().oneshot(request).await.expect("an answer")
    }

    fn check(&mut self, wanted: &Value, reply: &Reply) -> Result<(), String> {
        let Reply::Whole {
            status,
            headers,
            body,
        } = reply;
        let text = String::from_utf8_lossy(body);
        let found: Value = serde_json::from_slice(body).unwrap_or(Value::Null);
        if wanted["status"].as_u64() != Some(u64::from(*status)) {
            return Err(format!(
                "status: wanted {}, found {status}: {}\n      wanted body: {}",
                wanted["status"],
                cut(&text),
                cut(&wanted["body"].to_string())
            ));
        }
        if let Some(body) = wanted.get("body") {
            self.compare(body, &found, "body")
                .map_err(|difference| format!("{difference}\n      found body: {}", cut(&text)))?;
        } else if let Some(expected) = wanted.get("body_text").and_then(Value::as_str) {
            self.compare_text(expected, &json!(text), "body_text")?;
        }
        let want_headers = wanted["headers"].as_object().cloned().unwrap_or_default();
        if let Some(kind) = want_headers.get("content-type").and_then(Value::as_str) {
            let found = headers
                .get("content-type")
                .and_then(|v| v.to_str().ok())
                .unwrap_or_default();
            if found != kind {
                return Err(format!("content-type: wanted {kind:?}, found {found:?}"));
            }
        }
        let warnings: Vec<Value> = headers
            .get_all("warning")
            .iter()
            .map(|v| json!(String::from_utf8_lossy(v.as_bytes())))
            .collect();
        let wanted_warnings = want_headers.get("warning").cloned().unwrap_or_else(|| json!([]));
        self.compare(&wanted_warnings, &json!(warnings), "warning")
    }

    /// Tokens that later steps continue with are those of lists from before the history was discarded.
    pub(crate) async fn take_old_tokens(&mut self, later: &[Value]) {
        for step in later {
            let request = &step["request"];
            let symbol = request["query"]["continue"].as_str().unwrap_or_default();
            if !symbol.starts_with("$oldcontinue") {
                continue;
            }
            let mut list = request.clone();
            list["query"] = json!({"limit": "1"});
            let Reply::Whole { body, .. } = self.send(&list).await;
            let found: Value = serde_json::from_slice(&body).expect("a list");
            self.symbols
                .insert(symbol.to_owned(), found["metadata"]["continue"].clone());
            // The present is not forgotten: something else happens in between, as it did where this was recorded.
            let between = json!({"method": "POST", "path": "/api/v1/namespaces/default/configmaps",
                "body": {"metadata": {"generateName": "between-"}}});
            self.send(&between).await;
        }
    }

    pub(crate) async fn step(&mut self, index: usize, step: &Value) {
        if let Some(request) = step.get("request") {
            self.steps += 1;
            let reply = self.send(request).await;
            if let Err(difference) = self.check(&step["response"], &reply) {
                let what = format!(
                    "{} {} {}",
                    request["method"].as_str().unwrap_or_default(),
                    request["path"].as_str().unwrap_or_default(),
                    request.get("query").unwrap_or(&Value::Null)
                );
                self.failures.push((index, format!("{what}\n    {difference}")));
            }
        } else if let Some(watch) = step.get("watch") {
            self.steps += 1;
            self.watch(index, watch).await;
        } else if let Some(wait) = step.get("wait") {
            self.steps += 1;
            if !self.wait(wait).await {
                self.failures
                    .push((index, format!("wait {wait} did not come true")));
            }
        } else if step.get("storage").is_some() {
            self.server.compact_history();
        } else if step.get("trace").is_some() || step.get("kubectl").is_some() {
            self.steps += 1;
            self.failures
                .push((index, "needs controllers or kubectl".to_owned()));
        }
    }

    async fn watch(&mut self, index: usize, watch: &Value) {
        let request = json!({"method": "GET", "path": watch["path"], "query": watch.get("query").cloned().unwrap_or(Value::Null),
            "headers": {"Accept": watch.get("accept").cloned().unwrap_or_else(|| json!("application/json"))}});
        let response = self.start(&request).await;
        let status = response.status().as_u16();
        let content_type = response
            .headers()
            .get("content-type")
            .and_then(|v| v.to_str().ok())
            .unwrap_or_default()
            .to_owned();
        for step in watch["during"].as_array().cloned().unwrap_or_default() {
            Box::pin(self.step(index, &step)).await;
        }
        let mut body = response.into_body();
        let mut bytes: Vec<u8> = Vec::new();
        let wanted = watch["events"].as_array().cloned();
        let count = |bytes: &[u8]| events(bytes).len();
        let until_end = watch["end"] == "server" || wanted.is_none();
        let expected = wanted.as_ref().map_or(0, Vec::len);
        loop {
            let patience = if until_end || count(&bytes) < expected {
                DEADLINE
            } else {
                QUIET
            };
            match tokio::time::timeout(patience, body.frame()).await {
                Ok(Some(Ok(frame))) => bytes.extend_from_slice(frame.data_ref().map_or(&[][..], |d| d)),
                _ => break,
            }
        }
        let mut outcome = Ok(());
        if watch["status"].as_u64() != Some(u64::from(status)) {
            outcome = Err(format!("status: wanted {}, found {status}", watch["status"]));
        } else if let Some(kind) = watch["content_type"].as_str().filter(|k| *k != content_type) {
            outcome = Err(format!("content-type: wanted {kind:?}, found {content_type:?}"));
        } else if let Some(wanted) = wanted.filter(|_| watch.get("body").is_none()) {
            outcome = self.compare(&Value::Array(wanted), &Value::Array(events(&bytes)), "events");
        } else if let Some(wanted) = watch.get("body") {
            let found: Value =
                serde_json::from_slice(&bytes).unwrap_or_else(|_| json!(String::from_utf8_lossy(&bytes)));
            outcome = self.compare(wanted, &found, "body");
        }
        if let Err(difference) = outcome {
            self.failures.push((
                index,
                format!(
                    "watch {} {}\n    {difference}",
                    watch["path"],
                    watch.get("query").unwrap_or(&Value::Null)
                ),
            ));
        }
    }

    /// Poll as the recorder did: with a deadline, letting the server's tasks run between two looks.
    async fn wait(&mut self, wait: &Value) -> bool {
        let request = json!({"method": "GET", "path": wait["path"], "query": wait.get("query").cloned().unwrap_or(Value::Null), "headers": {"Accept": "application/json"}});
        let until = &wait["until"];
        let look = async {
            loop {
                let Reply::Whole { status, body, .. } = self.send(&request).await;
                let found: Value = serde_json::from_slice(&body).unwrap_or(Value::Null);
                if self.holds(until, status, &found) {
                    return;
                }
                tokio::time::sleep(Duration::from_millis(2)).await;
            }
        };
        tokio::time::timeout(DEADLINE, look).await.is_ok()
    }

    fn holds(&self, until: &Value, status: u16, found: &Value) -> bool {
        let at = |path: &str| {
            path.trim_start_matches('.')
                .split('.')
                .try_fold(found, |v, p| v.get(p))
                .cloned()
        };
        if let Some(wanted) = until["status"].as_u64() {
            return wanted == u64::from(status);
        }
        if status != 200 {
            return false;
        }
        if let Some(field) = until["field"].as_str() {
            return at(field).unwrap_or(Value::Null) == self.substitute(&until["equals"]);
        }
        if let Some(condition) = until.get("condition") {
            return at("status.conditions")
                .and_then(|c| c.as_array().cloned())
                .is_some_and(|c| {
                    c.iter()
                        .any(|c| c["type"] == condition["type"] && c["status"] == condition["status"])
                });
        }
        if let Some(items) = until["items"].as_u64() {
            return found["items"].as_array().is_some_and(|i| i.len() as u64 == items);
        }
        if let Some(owners) = until["owner_references"].as_u64() {
            return at("metadata.ownerReferences")
                .and_then(|o| o.as_array().map(Vec::len))
                .unwrap_or(0) as u64
                == owners;
        }
        false
    }
}

fn cut(text: &str) -> String {
    text.chars().take(700).collect()
}

/// Events of a watch stream; plain bookmarks may come at any time and are left out.
fn events(bytes: &[u8]) -> Vec<Value> {
    let text = String::from_utf8_lossy(bytes);
    text.lines()
        .filter_map(|l| serde_json::from_str::<Value>(l).ok())
        .filter(|e| e["type"] != "BOOKMARK" || e["object"].to_string().contains("initial-events-end"))
        .collect()
}

fn encode(text: &str) -> String {
    text.bytes().fold(String::new(), |mut out, b| {
        if b.is_ascii_alphanumeric() || b"-_.~".contains(&b) {
            out.push(char::from(b));
        } else {
            write!(out, "%{b:02X}").expect("written");
        }
        out
    })
}

fn generate(generator: &Value) -> Vec<u8> {
    let text = |key: &str| generator[key].as_str().unwrap_or_default();
    let number = |key: &str| usize::try_from(generator[key].as_u64().unwrap_or(0)).expect("a count");
    if let Some(template) = generator.get("template") {
        let template = template
            .as_str()
            .map_or_else(|| template.to_string(), str::to_owned);
        return template
            .replace("$PAD", &text("pad").repeat(number("bytes")))
            .into_bytes();
    }
    if let Some(item) = generator.get("array_of") {
        let item = item.as_str().map_or_else(|| item.to_string(), str::to_owned);
        return format!("[{}]", vec![item; number("count")].join(",")).into_bytes();
    }
    let n = number("nested_arrays");
    format!(
        "{}{}{}{}",
        text("prefix"),
        "[".repeat(n),
        "]".repeat(n),
        text("suffix")
    )
    .into_bytes()
}

/// A server in the state in which a scenario begins.
pub(crate) async fn set_up(scenario: &Value) -> Run {
    let with_controllers = scenario["server"] == "controllers";
    let server = ApiServer::builder()
        .garbage_collector(with_controllers)
        .kubernetes_admission(true)
        .build()
        .await
        .expect("the server starts");
    let mut run = Run {
        server,
        symbols: HashMap::new(),
        pattern: Regex::new(
            r"\$(?:uid|rv|list|time|microtime|nanotime|gen|hash|ip|port|continue|oldcontinue|freshcontinue|jwt|age|ev|epoch|server|current|oldest|date|tmpfile|etag|random)\d*\b",
        )
        .expect("a pattern"),
        failures: Vec::new(),
        steps: 0,
    };
    for step in scenario["setup"].as_array().into_iter().flatten() {
        if let Some(request) = step.get("request") {
            let Reply::Whole { status, body, .. } = run.send(request).await;
            if step["response"]["status"].as_u64() != Some(u64::from(status)) {
                run.failures.push((
                    0,
                    format!(
                        "setup {} {}: {status} {}",
                        request["method"],
                        request["path"],
                        cut(&String::from_utf8_lossy(&body))
                    ),
                ));
            }
        } else if let Some(wait) = step.get("wait")
            && !run.wait(wait).await
        {
            run.failures.push((0, format!("setup wait {wait}")));
        }
    }
    run
}
