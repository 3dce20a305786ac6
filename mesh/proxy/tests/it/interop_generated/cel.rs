//! Expressions of CEL in the parsed form that configurations hold: typed ones, and now and then one whose types do not fit.

use serde_json::{Value, json};

use super::random::Rng;

/// A name, dots and all.
fn name(path: &str) -> Value {
    let mut parts = path.split('.');
    let first = json!({ "ident_expr": { "name": parts.next().unwrap() } });
    parts.fold(first, |operand, field| select(operand, field, false))
}

fn select(operand: Value, field: &str, test: bool) -> Value {
    let mut out = json!({ "operand": operand, "field": field });
    if test {
        out["test_only"] = json!(true);
    }
    json!({ "select_expr": out })
}

fn call(function: &str, arguments: Vec<Value>) -> Value {
    json!({ "call_expr": { "function": function, "args": arguments } })
}

fn method(target: Value, function: &str, argument: Value) -> Value {
    json!({ "call_expr": { "target": target, "function": function, "args": [argument] } })
}

fn text(value: &str) -> Value {
    json!({ "const_expr": { "string_value": value } })
}

fn int(value: i64) -> Value {
    json!({ "const_expr": { "int64_value": value.to_string() } })
}

fn truth(value: bool) -> Value {
    json!({ "const_expr": { "bool_value": value } })
}

fn list(items: Vec<Value>) -> Value {
    json!({ "list_expr": { "elements": items } })
}

fn header(field: &str) -> Value {
    call("_[_]", vec![name("request.headers"), text(field)])
}

const TEXTS: [&str; 14] = [
    "one",
    "o",
    "",
    "/forward",
    "GET",
    "POST",
    "a.test",
    "http",
    "127.0.0.1",
    "spiffe://cluster.local/ns/a/sa/one",
    "one.example",
    "5",
    "v",
    "q=1",
];

/// Fields of the request, whether they are there or not.
const FIELDS: [&str; 9] = [
    "x-k",
    "X-K",
    "x-m",
    "x-absent",
    ":path",
    ":method",
    ":authority",
    "host",
    "user-agent",
];

/// Without `request.id`, which is another one each time.
const ATTRIBUTES: [&str; 13] = [
    "request.path",
    "request.url_path",
    "request.host",
    "request.scheme",
    "request.method",
    "request.query",
    "request.referer",
    "request.useragent",
    "connection.requested_server_name",
    "connection.uri_san_peer_certificate",
    "connection.dns_san_peer_certificate",
    "connection.subject_peer_certificate",
    "source.address",
];

fn noted(rng: &mut Rng) -> Value {
    let namespace = call(
        "_[_]",
        vec![
            name("metadata.filter_metadata"),
            text(rng.pick(&["set", "set", "none"])),
        ],
    );
    call("_[_]", vec![namespace, text(rng.pick(&["s", "n", "b", "none"]))])
}

fn string(rng: &mut Rng, depth: usize) -> Value {
    match rng.below(if depth == 0 { 8 } else { 10 }) {
        0 | 1 => header(rng.pick(&FIELDS)),
        2..=5 => name(rng.pick(&ATTRIBUTES)),
        6 => text(rng.pick(&TEXTS)),
        7 => noted(rng),
        _ => call(
            "_?_:_",
            vec![
                boolean(rng, depth - 1),
                string(rng, depth - 1),
                string(rng, depth - 1),
            ],
        ),
    }
}

fn number(rng: &mut Rng) -> Value {
    match rng.below(6) {
        0 => int(rng.pick(&[0, 1, 3, 5, 17])),
        1 => call("size", vec![string(rng, 0)]),
        2 => json!({ "const_expr": { "double_value": 5.0 } }),
        3 => noted(rng),
        4 => call(
            "_+_",
            vec![call("size", vec![string(rng, 0)]), int(rng.pick(&[1, -4]))],
        ),
        _ => name(rng.pick(&["source.port", "destination.port"])),
    }
}

/// One that is true or false, if it is not in error.
pub(crate) fn boolean(rng: &mut Rng, depth: usize) -> Value {
    match rng.below(if depth == 0 { 13 } else { 20 }) {
        0 => truth(rng.chance(50)),
        1..=3 => {
            let (subject, other) = (string(rng, depth.min(1)), text(rng.pick(&TEXTS)));
            call(rng.pick(&["_==_", "_!=_", "_==_"]), vec![subject, other])
        }
        4 | 5 => {
            let function = rng.pick(&["startsWith", "endsWith", "contains"]);
            let subject = string(rng, 0);
            method(subject, function, text(rng.pick(&TEXTS)))
        }
        6 => {
            let pattern = text(rng.pick(&["o.*e", "^/forward$", "[a-z]+", "^one", "T$", "."]));
            method(string(rng, 0), "matches", pattern)
        }
        7 => call(
            "@in",
            vec![string(rng, 0), list(rng.some(1, 3, |rng| text(rng.pick(&TEXTS))))],
        ),
        8 => call("@in", vec![text(rng.pick(&FIELDS)), name("request.headers")]),
        9 => match rng.below(4) {
            0 => select(
                name("request.headers"),
                rng.pick(&["cookie", "absent", "referer"]),
                true,
            ),
            1 => select(
                name("connection"),
                rng.pick(&["mtls", "requested_server_name", "uri_san_peer_certificate"]),
                true,
            ),
            2 => select(
                name("request"),
                rng.pick(&["path", "referer", "useragent", "query", "id"]),
                true,
            ),
            _ => select(name("metadata.filter_metadata"), rng.pick(&["set", "none"]), true),
        },
        10 => name("connection.mtls"),
        11 => call(
            rng.pick(&["_<_", "_<=_", "_>_", "_>=_", "_==_", "_!=_"]),
            vec![number(rng), number(rng)],
        ),
        // Types that do not fit, most of the time.
        12 => {
            let (one, other) = (number(rng), string(rng, 0));
            call(rng.pick(&["_==_", "_!=_", "_<_"]), vec![one, other])
        }
        13 | 14 => call("_&&_", vec![boolean(rng, depth - 1), boolean(rng, depth - 1)]),
        15 | 16 => call("_||_", vec![boolean(rng, depth - 1), boolean(rng, depth - 1)]),
        17 => call("!_", vec![boolean(rng, depth - 1)]),
        18 => call(rng.pick(&["_==_", "_<_"]), vec![string(rng, 0), string(rng, 0)]),
        _ => call(
            "_?_:_",
            vec![
                boolean(rng, depth - 1),
                boolean(rng, depth - 1),
                boolean(rng, depth - 1),
            ],
        ),
    }
}
