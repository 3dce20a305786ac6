//! Clock jumps: who looks at the wall clock at all. Limits, back-off, ejection, buckets, expiry of series and idle times go
//! by the monotonic clock, so a jump changes none of them.

use std::path::Path;

/// Files that may look, and why.
const LOOKERS: [(&str, &str); 13] = [
    ("bootstrap/", "start"),
    ("control/admin.rs", "days left of certificates, told"),
    ("metrics/push.rs", "the time of a measurement, told"),
    ("observe/", "times in logs and spans, told"),
    ("policy/cel/", "request.time of conditions"),
    ("tls/", "certificates and tickets are good until a time of day"),
    (
        "worker/attempts.rs",
        "rate limits that upstreams say are reset at a time of day",
    ),
    ("worker/connection_log.rs", "times in logs, told"),
    ("worker/exchange.rs", "times in logs, told"),
    (
        "worker/filters/",
        "tokens are good until a time of day; ext_authz is told it",
    ),
    ("worker/logging.rs", "times in logs, told"),
    ("worker/spans.rs", "times in spans, told"),
    ("worker/tap.rs", "times in traces, told"),
];

fn files(folder: &Path, out: &mut Vec<std::path::PathBuf>) {
    for entry in std::fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            files(&path, out);
        } else if path.extension().is_some_and(|ending| ending == "rs") {
            out.push(path);
        }
    }
}

#[test]
fn only_what_is_told_or_good_until_a_time_of_day_goes_by_the_wall_clock() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let mut all = Vec::new();
    files(&root, &mut all);
    let mut found = 0;
    for path in all {
        let text = std::fs::read_to_string(&path).unwrap();
        if ["SystemTime::now", "UnixTime::now"]
            .iter()
            .any(|call| text.contains(call))
        {
            let name = path.strip_prefix(&root).unwrap().to_string_lossy().into_owned();
            found += 1;
            assert!(
                LOOKERS.iter().any(|(known, _)| name.starts_with(known)),
                "{name} looks at the wall clock: a jump of it would change what it decides"
            );
        }
    }
    assert!(found >= 5, "{found} files look at the wall clock");
}
