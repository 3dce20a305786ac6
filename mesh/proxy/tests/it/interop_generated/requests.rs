//! Requests, made of what the routes of [`super::routes`] look at.

use super::client::Ask;
use super::random::Rng;

const HOSTS: [&str; 15] = [
    "a.test",
    "A.Test",
    "a.test:8080",
    "a.test:80",
    "b.test",
    "x.b.test",
    "y.x.b.test",
    "api.test",
    "api.b.org",
    "api.b.test",
    "other.org",
    "a.test.",
    "[::1]:80",
    "127.0.0.1",
    "test",
];

const PATHS: [&str; 38] = [
    "/",
    "/a",
    "/a/",
    "/A",
    "/A/B",
    "/a/b",
    "/a/b/c",
    "/ab",
    "/a;p=1",
    "/a;p=1/b",
    "/a.html",
    "/api",
    "/api/",
    "/apix",
    "/api/v1",
    "/api/v1/",
    "/api/v1/users/7",
    "/api/v12",
    "/api/V1",
    "/api/v1/users/a.b",
    "//a",
    "/a//b",
    "/./a",
    "/a/../api",
    "/a/./b",
    "/%61",
    "/a%2Fb",
    "/a%2fb",
    "/a%5Cb",
    "/%7Ea",
    "/a%20b",
    "/a%00b",
    "/a/..%2fapi",
    "/a+b",
    "/x/y/z.html",
    "/*",
    "/a/%2e%2e/api",
    "/a$b",
];

const QUERIES: [&str; 18] = [
    "",
    "",
    "",
    "",
    "?",
    "?q=1",
    "?q=",
    "?q",
    "?q=1&q=2",
    "?n=5&q=abc",
    "?e=%20x",
    "?Q=1",
    "?q=a/b?c",
    "?q=1&&n=7",
    "?q=ABC",
    "?n=-3",
    "?redirect=http://x/",
    "?=1",
];

const FIELDS: [(&str, &str); 37] = [
    ("x-k", "one"),
    ("x-k", "ONE"),
    ("X-K", "two"),
    ("x-k", "two-more"),
    ("x-k", ""),
    ("x-n", "5"),
    ("x-n", "-3"),
    ("x-n", "10"),
    ("x-n", "5x"),
    ("x-n", "+5"),
    ("x-n", " 7 "),
    ("x-multi", "a"),
    ("x-multi", "b"),
    ("x-multi", "a,b"),
    ("X-Multi", "one"),
    ("x-cluster", "a"),
    ("x-cluster", "b"),
    ("x-cluster", "nope"),
    ("x-want", "503"),
    ("x-want", "500"),
    ("x-want", "404"),
    ("x-want", "204"),
    ("x-want", "304"),
    ("origin", "http://good.test"),
    ("origin", "http://bad.test"),
    ("access-control-request-method", "PUT"),
    ("cookie", "c=1; d=2"),
    ("cookie", "c=\"q\""),
    ("content-type", "application/grpc"),
    ("content-type", "text/plain"),
    ("x-forwarded-proto", "https"),
    ("x-forwarded-for", "1.2.3.4"),
    ("x-forwarded-host", "before.test"),
    ("x-request-id", "mine"),
    ("x-envoy-original-path", "/was"),
    ("user-agent", "t"),
    ("accept", "*/*"),
];

pub(crate) const METHODS: [&str; 14] = [
    "GET", "GET", "GET", "GET", "GET", "GET", "POST", "PUT", "HEAD", "OPTIONS", "DELETE", "PATCH", "PURGE",
    "GET",
];

/// A request among those of one configuration.
pub(crate) fn request(rng: &mut Rng, case: String) -> Ask {
    let method = rng.pick(&METHODS);
    let target = format!("{}{}", rng.pick(&PATHS), rng.pick(&QUERIES));
    let mut fields = vec![
        ("Host".to_owned(), rng.pick(&HOSTS).to_owned()),
        ("X-Case".to_owned(), case.clone()),
    ];
    fields.extend(
        rng.some(0, 4, |rng| rng.pick(&FIELDS))
            .into_iter()
            .map(|(name, value)| (name.to_owned(), value.to_owned())),
    );
    // What decides about content comes once.
    let mut once: Vec<&str> = Vec::new();
    let singles = [
        "content-type",
        "user-agent",
        "accept",
        "x-forwarded-host",
        "x-envoy-original-path",
        "x-request-id",
        "x-want",
        "origin",
        "x-forwarded-proto",
    ];
    let mut kept = Vec::new();
    for (name, value) in &fields {
        if singles.contains(&name.as_str()) {
            if once.contains(&name.as_str()) {
                continue;
            }
            once.push(name);
        }
        kept.push((name.clone(), value.clone()));
    }
    let body = if matches!(method, "POST" | "PUT" | "PATCH") && rng.chance(70) {
        "content".to_owned()
    } else {
        String::new()
    };
    Ask {
        case,
        method,
        target,
        fields: kept,
        body,
        who: 0,
    }
}
