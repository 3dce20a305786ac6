//! Recorded transcripts of a real kube-apiserver, replayed against ours.
//!
//! Every step of the groups below is sent and its answer compared after normalisation (the README beside the data says how symbols such as
//! `$uid1` are meant). What differs is listed in `expected-differences.tsv` with its reason; a scenario that is listed and agrees fails
//! the test, and so does one that differs and is not listed. To look into one: `SERIN_TRANSCRIPT=crud/pod cargo test … transcripts -- --nocapture`.

use std::collections::{BTreeMap, HashMap};
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

/// Groups of scenarios that are replayed.
const GROUPS: [&str; 11] = [
    "crud",
    "patch-json",
    "patch-merge",
    "patch-strategic",
    "ssa",
    "list",
    "watch",
    "delete",
    "crd",
    "fieldvalidation",
    "errors",
];

/// Per cent of all steps that agree; raise it with each improvement.
const FLOOR: f64 = 92.0;

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
    symbols: HashMap<String, Value>,
    pattern: Regex,
    pub(crate) failures: Vec<(usize, String)>,
    steps: usize,
}

enum Reply {
    Whole {
        status: u16,
        headers: http::HeaderMap,
        body: Vec<u8>,
    },
}

impl Run {
    fn substitute(&self, value: &Value) -> Value {
        match value {
            Value::String(s) => {
                if let Some(bound) = self.symbols.get(s) {
                    return bound.clone();
                }
                json!(self.substitute_text(s))
            }
            Value::Array(a) => Value::Array(a.iter().map(|v| self.substitute(v)).collect()),
            Value::Object(o) => Value::Object(
                o.iter()
                    .map(|(k, v)| (self.substitute_text(k), self.substitute(v)))
                    .collect(),
            ),
            other => other.clone(),
        }
    }

    pub(crate) fn substitute_text(&self, text: &str) -> String {
        self.pattern
            .replace_all(text, |c: &regex::Captures<'_>| match self.symbols.get(&c[0]) {
                Some(Value::String(s)) => s.clone(),
                Some(other) => other.to_string(),
                None => c[0].to_owned(),
            })
            .into_owned()
    }

    /// Compare and bind symbols; the error names the first difference.
    fn compare(&mut self, wanted: &Value, found: &Value, path: &str) -> Result<(), String> {
        if let Some(choices) = wanted.get("$any_of").and_then(Value::as_array) {
            let choices = choices.clone();
            for choice in &choices {
                if self.compare(choice, found, path).is_ok() {
                    return Ok(());
                }
            }
            return Err(format!("{path}: none of {choices:?} is {found}"));
        }
        match (wanted, found) {
            (Value::String(w), f) => self.compare_text(w, f, path),
            (Value::Object(w), Value::Object(f)) => {
                let unordered = w.get("$unordered_causes").is_some();
                // All members are looked at even after a difference, so that symbols are bound.
                let mut outcome = Ok(());
                for (key, value) in w {
                    if key == "$unordered_causes" || (unordered && key == "message") {
                        continue;
                    }
                    let key = self.substitute_text(key);
                    let at = format!("{path}.{key}");
                    match f.get(&key) {
                        Some(found) => outcome = outcome.and(self.compare(value, found, &at)),
                        None => outcome = outcome.and(Err(format!("{at}: missing, wanted {value}"))),
                    }
                }
                for (key, value) in f {
                    if !w.keys().any(|k| self.substitute_text(k) == *key) {
                        outcome = outcome.and(Err(format!("{path}.{key}: not wanted, found {value}")));
                    }
                }
                outcome
            }
            (Value::Array(w), Value::Array(f)) => {
                let (mut w, mut f) = (w.clone(), f.clone());
                if path.ends_with(".managedFields") {
                    let key = |v: &Value| {
                        ["operation", "manager", "subresource", "apiVersion"]
                            .map(|k| v.get(k).and_then(Value::as_str).unwrap_or_default().to_owned())
                    };
                    w.sort_by_key(key);
                    f.sort_by_key(key);
                }
                if path.ends_with(".conditions") && w.iter().all(|c| c.get("type").is_some()) {
                    let key = |v: &Value| {
                        v.get("type")
                            .and_then(Value::as_str)
                            .unwrap_or_default()
                            .to_owned()
                    };
                    w.sort_by_key(key);
                    f.sort_by_key(key);
                }
                if path.ends_with(".causes") {
                    let key = |v: &Value| {
                        ["field", "reason", "message"]
                            .map(|k| v.get(k).and_then(Value::as_str).unwrap_or_default().to_owned())
                    };
                    w.sort_by_key(key);
                    f.sort_by_key(key);
                }
                let mut outcome = Ok(());
                for (i, value) in w.iter().enumerate() {
                    match f.get(i) {
                        Some(found) => {
                            outcome = outcome.and(self.compare(value, found, &format!("{path}[{i}]")))
                        }
                        None => outcome = outcome.and(Err(format!("{path}[{i}]: missing, wanted {value}"))),
                    }
                }
                match f.get(w.len()) {
                    Some(extra) => {
                        outcome.and(Err(format!("{path}[{}]: not wanted, found {extra}", w.len())))
                    }
                    None => outcome,
                }
            }
            (Value::Number(w), Value::Number(f)) if w.as_f64() == f.as_f64() => Ok(()),
            (w, f) if w == f => Ok(()),
            (w, f) => Err(format!("{path}: wanted {w}, found {f}")),
        }
    }

    pub(crate) fn compare_text(&mut self, wanted: &str, found: &Value, path: &str) -> Result<(), String> {
        let symbols: Vec<String> = self
            .pattern
            .find_iter(wanted)
            .map(|m| m.as_str().to_owned())
            .collect();
        if symbols.is_empty() {
            return if found.as_str() == Some(wanted) {
                Ok(())
            } else {
                Err(format!("{path}: wanted {wanted:?}, found {found}"))
            };
        }
        let numbered = |s: &str| s.ends_with(|c: char| c.is_ascii_digit());
        if symbols.len() == 1 && symbols[0] == wanted {
            if !numbered(wanted) {
                // A time that is sent back later has to be one.
                self.symbols.insert(wanted.to_owned(), found.clone());
            }
            match self.symbols.get(wanted) {
                Some(bound) if numbered(wanted) && bound != found => {
                    return Err(format!("{path}: wanted {wanted} = {bound}, found {found}"));
                }
                None if numbered(wanted) => {
                    self.symbols.insert(wanted.to_owned(), found.clone());
                }
                _ => {}
            }
            return if found.is_null() {
                Err(format!("{path}: wanted {wanted}, found null"))
            } else {
                Ok(())
            };
        }
        let found = match found {
            Value::String(s) => s.clone(),
            other => return Err(format!("{path}: wanted {wanted:?}, found {other}")),
        };
        let mut expression = String::from("(?s)^");
        let mut groups = Vec::new();
        let mut at = 0;
        for m in self.pattern.find_iter(wanted) {
            expression.push_str(&regex::escape(&wanted[at..m.start()]));
            match self.symbols.get(m.as_str()) {
                Some(Value::String(bound)) if numbered(m.as_str()) => {
                    expression.push_str(&regex::escape(bound))
                }
                Some(bound) if numbered(m.as_str()) => {
                    expression.push_str(&regex::escape(&bound.to_string()))
                }
                _ => {
                    expression.push_str("(.+?)");
                    groups.push(m.as_str().to_owned());
                }
            }
            at = m.end();
        }
        expression.push_str(&regex::escape(&wanted[at..]));
        expression.push('$');
        let expression = Regex::new(&expression).expect("an expression");
        match expression.captures(&found) {
            Some(captures) => {
                for (i, symbol) in groups.iter().enumerate() {
                    if numbered(symbol) {
                        self.symbols.insert(symbol.clone(), json!(&captures[i + 1]));
                    }
                }
                Ok(())
            }
            None => Err(format!("{path}: wanted {wanted:?}, found {found:?}")),
        }
    }

    async fn send(&self, request: &Value) -> Reply {
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
            self.compare(body, &found, "body")?;
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
    async fn take_old_tokens(&mut self, later: &[Value]) {
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
            let found: Value = serde_json::from_slice(&bytes).unwrap_or(Value::Null);
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

async fn replay(scenario: &Value) -> (usize, Vec<(usize, String)>) {
    let mut run = set_up(scenario).await;
    let steps = scenario["steps"].as_array().cloned().unwrap_or_default();
    for (i, step) in steps.iter().enumerate() {
        if step.get("storage").is_some() {
            run.take_old_tokens(steps.get(i..).unwrap_or_default()).await;
        }
        run.step(i + 1, step).await;
    }
    run.server.shutdown().await;
    (run.steps, run.failures)
}

/// Members of an object come in the order in which they were recorded: unknown fields are reported in that order.
fn ordered(value: &serde_yaml::Value, out: &mut String) {
    match value {
        serde_yaml::Value::Mapping(members) => {
            out.push('{');
            for (i, (key, member)) in members.iter().enumerate() {
                if i > 0 {
                    out.push(',');
                }
                write!(out, "{}:", json!(key.as_str().expect("a name"))).expect("written");
                ordered(member, out);
            }
            out.push('}');
        }
        serde_yaml::Value::Sequence(items) => {
            out.push('[');
            for (i, item) in items.iter().enumerate() {
                if i > 0 {
                    out.push(',');
                }
                ordered(item, out);
            }
            out.push(']');
        }
        other => out.push_str(&serde_json::to_string(other).expect("JSON")),
    }
}

/// Adds the text of each body as it was recorded; JSON is YAML, and its mappings keep their order.
fn keep_order(scenario: &mut Value, text: &str) {
    let recorded: serde_yaml::Value = serde_yaml::from_str(text).expect("JSON");
    let steps = scenario["steps"].as_array_mut().expect("steps");
    for (step, recorded) in steps
        .iter_mut()
        .zip(recorded["steps"].as_sequence().expect("steps"))
    {
        if let Some(body) = recorded.get("request").and_then(|request| request.get("body")) {
            let mut text = String::new();
            ordered(body, &mut text);
            step["request"]["body_in_order"] = json!(text);
        }
    }
}

/// `scenario<TAB>reason` per line.
fn expected() -> BTreeMap<String, String> {
    include_str!("expected-differences.tsv")
        .lines()
        .filter(|l| !l.starts_with('#') && !l.trim().is_empty())
        .map(|l| {
            let (name, reason) = l.split_once('\t').expect("a scenario and its reason");
            (name.to_owned(), reason.to_owned())
        })
        .collect()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn answers_agree_with_those_of_a_real_kube_apiserver() {
    let Some(root) = data() else {
        eprintln!("SKIPPED: the transcripts of a real kube-apiserver: ../shared is not here");
        return;
    };
    let filter = std::env::var("SERIN_TRANSCRIPT").ok();
    let mut groups: BTreeMap<String, (usize, usize)> = BTreeMap::new();
    let mut differing: BTreeMap<String, Vec<(usize, String)>> = BTreeMap::new();
    for group in GROUPS {
        let mut files: Vec<PathBuf> = std::fs::read_dir(root.join(group))
            .expect("a group")
            .map(|e| e.expect("an entry").path())
            .collect();
        files.sort();
        for file in files {
            let text = std::fs::read_to_string(&file).expect("a scenario");
            let mut scenario: Value = serde_json::from_str(&text).expect("JSON");
            if group == "fieldvalidation" {
                keep_order(&mut scenario, &text);
            }
            let name = scenario["name"].as_str().expect("a name").to_owned();
            if filter.as_ref().is_some_and(|f| !name.contains(f.as_str())) {
                continue;
            }
            let (steps, failures) = replay(&scenario).await;
            let entry = groups.entry(group.to_owned()).or_default();
            entry.0 += steps.saturating_sub(failures.len());
            entry.1 += steps;
            if !failures.is_empty() {
                differing.insert(name, failures);
            }
        }
    }
    let mut report = String::new();
    let (mut passed, mut all) = (0, 0);
    for (group, (p, a)) in &groups {
        writeln!(report, "{group}: {p} of {a}").expect("written");
        passed += p;
        all += a;
    }
    let percent = 100.0 * passed as f64 / all.max(1) as f64;
    writeln!(report, "all: {passed} of {all} = {percent:.1} %").expect("written");
    eprintln!("{report}");
    let expected = expected();
    let mut complaints = Vec::new();
    for (name, failures) in &differing {
        if filter.is_some() || !expected.contains_key(name) {
            for (step, text) in failures {
                complaints.push(format!("{name} step {step}: {text}"));
            }
        }
    }
    if filter.is_none() {
        for name in expected.keys().filter(|n| !differing.contains_key(*n)) {
            complaints.push(format!(
                "{name} is listed as differing and agrees: take it off the list"
            ));
        }
        if percent < FLOOR {
            complaints.push(format!(
                "{percent:.1} % of the steps agree, less than the floor of {FLOOR} %"
            ));
        }
    }
    assert!(complaints.is_empty(), "{}\n{report}", complaints.join("\n"));
}
