//! The Kubernetes API of a test's cluster, spoken over its Unix socket with nothing but the standard library, so that
//! the stories need no kubectl and wait on watches instead of polling.

use std::io::{BufRead, BufReader, ErrorKind, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use serde_json::Value;

/// Where the objects of a kind are.
const KINDS: &[(&str, &str, &str)] = &[
    ("Namespace", "api/v1", "namespaces"),
    ("Pod", "api/v1", "pods"),
    ("Service", "api/v1", "services"),
    ("ConfigMap", "api/v1", "configmaps"),
    ("Event", "api/v1", "events"),
    ("Deployment", "apis/apps/v1", "deployments"),
    ("ReplicaSet", "apis/apps/v1", "replicasets"),
    (
        "GitRepository",
        "apis/source.toolkit.fluxcd.io/v1",
        "gitrepositories",
    ),
    (
        "Kustomization",
        "apis/kustomize.toolkit.fluxcd.io/v1",
        "kustomizations",
    ),
    ("Canary", "apis/flagger.app/v1beta1", "canaries"),
    ("VirtualService", "apis/networking.istio.io/v1", "virtualservices"),
    (
        "DestinationRule",
        "apis/networking.istio.io/v1",
        "destinationrules",
    ),
    ("Gateway", "apis/networking.istio.io/v1", "gateways"),
];
/// How long one answer may take that is not a watch.
const ANSWER: Duration = Duration::from_secs(30);

/// A client of the API.
#[derive(Clone, Debug)]
pub(crate) struct Api {
    socket: PathBuf,
}

/// What the API refused, in its own words.
#[derive(Debug)]
pub(crate) struct Refused {
    pub(crate) code: u16,
    pub(crate) message: String,
}

impl Api {
    /// The API behind a Unix socket.
    pub(crate) fn at(socket: PathBuf) -> Self {
        Self { socket }
    }

    /// An object, if it is there.
    pub(crate) fn find(&self, kind: &str, namespace: &str, name: &str) -> Option<Value> {
        match self.send("GET", &one(kind, namespace, name), None) {
            Ok(object) => Some(object),
            Err(Refused { code: 404, .. }) => None,
            Err(refused) => panic!("get {kind} {namespace}/{name}: {refused:?}"),
        }
    }

    /// An object that must be there.
    pub(crate) fn get(&self, kind: &str, namespace: &str, name: &str) -> Value {
        self.find(kind, namespace, name)
            .unwrap_or_else(|| panic!("there is no {kind} {namespace}/{name}"))
    }

    /// All objects of a kind in a namespace.
    pub(crate) fn list(&self, kind: &str, namespace: &str) -> Vec<Value> {
        let list = self.send("GET", &all(kind, namespace), None).unwrap();
        list["items"].as_array().unwrap().clone()
    }

    /// Applies every document of a manifest (server-side), which must succeed.
    pub(crate) fn apply(&self, manifest: &str) {
        if let Err(refused) = self.try_apply(manifest) {
            panic!("apply: {refused:?}\n{manifest}");
        }
    }

    /// Applies every document of a manifest (server-side) up to the first that is refused.
    pub(crate) fn try_apply(&self, manifest: &str) -> Result<(), Refused> {
        for document in manifest.split("\n---") {
            if document.trim().is_empty() {
                continue;
            }
            let object: Value = serde_yaml::from_str(document).unwrap();
            let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
            let path = one(
                &text(&object["kind"]),
                &text(&object["metadata"]["namespace"]),
                &text(&object["metadata"]["name"]),
            );
            let path = format!("{path}?fieldManager=story&force=true");
            self.send(
                "PATCH",
                &path,
                Some(("application/apply-patch+yaml", &object.to_string())),
            )?;
        }
        Ok(())
    }

    /// Merges a patch into an object.
    pub(crate) fn merge(&self, kind: &str, namespace: &str, name: &str, patch: &Value) {
        let body = patch.to_string();
        self.send(
            "PATCH",
            &one(kind, namespace, name),
            Some(("application/merge-patch+json", &body)),
        )
        .unwrap();
    }

    /// Waits on a watch until the object satisfies the predicate; returns it as it was then. Every version that is stored
    /// is looked at, so that what holds for a moment only is seen.
    pub(crate) fn until(
        &self,
        kind: &str,
        namespace: &str,
        name: &str,
        what: &str,
        wanted: impl FnMut(&Value) -> bool,
    ) -> Value {
        self.until_within(Duration::from_secs(60), kind, namespace, name, what, wanted)
    }

    /// As [`Api::until`], with a deadline of its own.
    pub(crate) fn until_within(
        &self,
        deadline: Duration,
        kind: &str,
        namespace: &str,
        name: &str,
        what: &str,
        mut wanted: impl FnMut(&Value) -> bool,
    ) -> Value {
        let mut last = Value::Null;
        let end = Instant::now() + deadline;
        let path = format!(
            "{}?watch=true&fieldSelector=metadata.name%3D{name}",
            all(kind, namespace)
        );
        let outcome = self.watch(&path, end, |event| {
            last = event["object"].clone();
            event["type"] != "DELETED" && wanted(&last)
        });
        match outcome {
            Ok(()) => last,
            Err(why) => panic!(
                "waited {deadline:?} in vain for {kind} {namespace}/{name} to {what}: {why}; it was last:\n{}",
                serde_json::to_string_pretty(&without_noise(last)).unwrap()
            ),
        }
    }

    /// Waits on a watch until the objects of a kind in a namespace, taken together, satisfy the predicate.
    pub(crate) fn until_all(
        &self,
        kind: &str,
        namespace: &str,
        what: &str,
        mut wanted: impl FnMut(&[Value]) -> bool,
    ) -> Vec<Value> {
        let deadline = Duration::from_secs(60);
        // From a list on: a watch without one would show objects one by one.
        let list = self.send("GET", &all(kind, namespace), None).unwrap();
        let mut objects = list["items"].as_array().unwrap().clone();
        if wanted(&objects) {
            return objects;
        }
        let version = list["metadata"]["resourceVersion"].as_str().unwrap_or_default();
        let path = format!("{}?watch=true&resourceVersion={version}", all(kind, namespace));
        let outcome = self.watch(&path, Instant::now() + deadline, |event| {
            let uid = &event["object"]["metadata"]["uid"];
            objects.retain(|object| object["metadata"]["uid"] != *uid);
            if event["type"] != "DELETED" {
                objects.push(event["object"].clone());
            }
            wanted(&objects)
        });
        match outcome {
            Ok(()) => objects,
            Err(why) => panic!(
                "waited {deadline:?} in vain for {kind}s of {namespace} to {what}: {why}; they were: {:?}",
                names(&objects)
            ),
        }
    }

    /// Pods and events of all namespaces, for a test that failed.
    pub(crate) fn story(&self) -> String {
        let mut lines = Vec::new();
        for pod in self.list("Pod", "") {
            lines.push(format!(
                "pod {}/{} deleted {} {}",
                pod["metadata"]["namespace"],
                pod["metadata"]["name"],
                pod["metadata"]["deletionTimestamp"],
                pod["status"]
            ));
        }
        for event in self.list("Event", "") {
            lines.push(format!(
                "event {} {} {}: {}",
                event["lastTimestamp"], event["involvedObject"]["name"], event["reason"], event["message"]
            ));
        }
        lines.join("\n")
    }

    /// Shows the events of a watch to `done` until it says so.
    fn watch(&self, path: &str, end: Instant, mut done: impl FnMut(&Value) -> bool) -> Result<(), String> {
        let stream = loop {
            match self.open("GET", path, None) {
                Ok(stream) => break stream,
                // The server is being started.
                Err(error) if Instant::now() < end && absent(&error) => pause(),
                Err(error) => return Err(error.to_string()),
            }
        };
        let socket = stream.try_clone().unwrap();
        let patience = || {
            end.saturating_duration_since(Instant::now())
                .max(Duration::from_millis(1))
        };
        socket.set_read_timeout(Some(patience())).unwrap();
        let (head, mut body) = answer(stream).map_err(|error| error.to_string())?;
        if head.status != 200 {
            return Err(format!("{head:?}"));
        }
        let mut line = String::new();
        loop {
            if Instant::now() >= end {
                return Err("the time is up".to_owned());
            }
            socket.set_read_timeout(Some(patience())).unwrap();
            line.clear();
            match body.read_line(&mut line) {
                Ok(0) => return Err("the API server ended the watch".to_owned()),
                Ok(_) => {}
                Err(error) => return Err(error.to_string()),
            }
            let event: Value = serde_json::from_str(&line).map_err(|error| format!("{error}: {line}"))?;
            if event["type"] != "BOOKMARK" && done(&event) {
                return Ok(());
            }
        }
    }

    fn open(&self, method: &str, path: &str, body: Option<(&str, &str)>) -> std::io::Result<UnixStream> {
        let mut stream = UnixStream::connect(&self.socket)?;
        let (content_type, body) = body.unwrap_or(("application/json", ""));
        write!(
            stream,
            "{method} /{path} HTTP/1.1\r\nhost: serin\r\nconnection: close\r\naccept: application/json\r\ncontent-type: {content_type}\r\ncontent-length: {}\r\n\r\n{body}",
            body.len()
        )?;
        Ok(stream)
    }

    /// Sends a request and reads its answer.
    pub(crate) fn send(
        &self,
        method: &str,
        path: &str,
        body: Option<(&str, &str)>,
    ) -> Result<Value, Refused> {
        let end = Instant::now() + ANSWER;
        let stream = loop {
            match self.open(method, path, body) {
                Ok(stream) => break stream,
                // The server is being started.
                Err(error) if Instant::now() < end && absent(&error) => pause(),
                Err(error) => panic!("{method} {path}: {error}"),
            }
        };
        stream.set_read_timeout(Some(ANSWER)).unwrap();
        let (head, mut body) = answer(stream).unwrap_or_else(|error| panic!("{method} {path}: {error}"));
        let mut text = String::new();
        body.read_to_string(&mut text).unwrap();
        let value: Value = serde_json::from_str(&text).unwrap_or(Value::String(text));
        if head.status < 300 {
            return Ok(value);
        }
        Err(Refused {
            code: head.status,
            message: value["message"].as_str().unwrap_or_default().to_owned(),
        })
    }
}

/// Nobody listens (any more, or yet).
fn absent(error: &std::io::Error) -> bool {
    matches!(error.kind(), ErrorKind::ConnectionRefused | ErrorKind::NotFound)
}

/// A moment for somebody else: a socket that will be there cannot be waited for.
fn pause() {
    let (_keep, never) = std::sync::mpsc::channel::<()>();
    let _ = never.recv_timeout(Duration::from_millis(2));
}

fn all(kind: &str, namespace: &str) -> String {
    let (_, prefix, plural) = KINDS
        .iter()
        .find(|(known, _, _)| *known == kind)
        .unwrap_or_else(|| panic!("where are objects of kind {kind}?"));
    if namespace.is_empty() {
        format!("{prefix}/{plural}")
    } else {
        format!("{prefix}/namespaces/{namespace}/{plural}")
    }
}

fn one(kind: &str, namespace: &str, name: &str) -> String {
    format!("{}/{name}", all(kind, namespace))
}

#[derive(Debug)]
struct Head {
    status: u16,
    chunked: bool,
}

/// Reads the head of an answer; its body follows.
fn answer(stream: UnixStream) -> std::io::Result<(Head, BufReader<Box<dyn Read>>)> {
    let mut reader = BufReader::new(stream);
    let mut line = String::new();
    reader.read_line(&mut line)?;
    let status = line
        .split_whitespace()
        .nth(1)
        .and_then(|status| status.parse().ok());
    let Some(status) = status else {
        return Err(std::io::Error::other(format!("no HTTP answer: {line:?}")));
    };
    let mut head = Head {
        status,
        chunked: false,
    };
    loop {
        line.clear();
        reader.read_line(&mut line)?;
        if line.trim().is_empty() {
            break;
        }
        head.chunked |= line
            .to_ascii_lowercase()
            .starts_with("transfer-encoding: chunked");
    }
    let body: Box<dyn Read> = if head.chunked {
        Box::new(Chunks { reader, left: 0 })
    } else {
        Box::new(reader)
    };
    Ok((head, BufReader::new(body)))
}

/// The content of a chunked body.
struct Chunks {
    reader: BufReader<UnixStream>,
    /// Bytes of the current chunk that are still to be read.
    left: usize,
}

impl Read for Chunks {
    fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<usize> {
        if self.left == 0 {
            let mut line = String::new();
            while line.trim().is_empty() {
                line.clear();
                if self.reader.read_line(&mut line)? == 0 {
                    return Ok(0);
                }
            }
            self.left = usize::from_str_radix(line.trim(), 16).map_err(std::io::Error::other)?;
            if self.left == 0 {
                return Ok(0);
            }
        }
        let wanted = buffer.len().min(self.left);
        let read = self.reader.read(&mut buffer[..wanted])?;
        self.left -= read;
        Ok(read)
    }
}

/// `metadata.name` of each object, sorted.
pub(crate) fn names(objects: &[Value]) -> Vec<String> {
    let mut names: Vec<String> = objects
        .iter()
        .map(|object| object["metadata"]["name"].as_str().unwrap_or_default().to_owned())
        .collect();
    names.sort();
    names
}

/// A condition of an object, by type.
pub(crate) fn condition<'a>(object: &'a Value, type_: &str) -> &'a Value {
    object["status"]["conditions"]
        .as_array()
        .and_then(|conditions| conditions.iter().find(|condition| condition["type"] == type_))
        .unwrap_or(&Value::Null)
}

/// Whether a condition has this status and speaks of the object as it is.
pub(crate) fn is(object: &Value, type_: &str, status: &str) -> bool {
    let condition = condition(object, type_);
    let observed = condition["observedGeneration"]
        .as_i64()
        .or_else(|| object["status"]["observedGeneration"].as_i64());
    condition["status"] == status
        && observed.is_none_or(|observed| Some(observed) >= object["metadata"]["generation"].as_i64())
}

/// The message of a condition.
pub(crate) fn message<'a>(object: &'a Value, type_: &str) -> &'a str {
    condition(object, type_)["message"].as_str().unwrap_or_default()
}

fn without_noise(mut object: Value) -> Value {
    if let Some(metadata) = object["metadata"].as_object_mut() {
        metadata.remove("managedFields");
    }
    object
}
