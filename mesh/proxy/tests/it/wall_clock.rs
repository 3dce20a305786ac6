//! Clock jumps: who looks at the wall clock at all. Limits, back-off, ejection, buckets, expiry of series and idle times go
//! by the monotonic clock, so a jump changes none of them.

use std::path::Path;
use std::time::Duration;

use base64::Engine as _;
use rustls_pki_types::UnixTime;
use serin_proxy::policy::jwt::token::Token;
use serin_proxy::tls::secret::Secret;

use crate::certificates::Authority;

/// Files that may look, and why.
const LOOKERS: [(&str, &str); 17] = [
    ("bootstrap/", "start"),
    ("config/store/received.rs", "when resources came, told"),
    ("control/admin.rs", "days left of certificates, told"),
    ("control/server_stats.rs", "days left of certificates, told"),
    ("metrics/push.rs", "the time of a measurement, told"),
    ("observe/", "times in logs and spans, told"),
    ("policy/cel/", "request.time of conditions"),
    ("tls/", "certificates and tickets are good until a time of day"),
    (
        "worker/attempts/judge.rs",
        "rate limits that upstreams say are reset at a time of day",
    ),
    ("worker/connection_log.rs", "times in logs, told"),
    ("worker/exchange.rs", "times in logs, told"),
    (
        "worker/filters/",
        "tokens are good until a time of day; ext_authz is told it",
    ),
    ("worker/date.rs", "`date` of answers, told"),
    ("worker/logging.rs", "times in logs, told"),
    ("worker/tcp_tunnel.rs", "times in fields, told"),
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

/// Seconds since 1970.
fn at(seconds: u64) -> UnixTime {
    UnixTime::since_unix_epoch(Duration::from_secs(seconds))
}

#[test]
fn a_clock_that_is_behind_refuses_no_certificate_and_one_that_is_ahead_only_those_that_expire_by_then() {
    let authority = Authority::new("ca");
    // 2024-01-01 to 2030-01-01.
    let issued = authority.issue_with(&["a.example"], |params| {
        params.not_before = rcgen::date_time_ymd(2024, 1, 1);
        params.not_after = rcgen::date_time_ymd(2030, 1, 1);
    });
    let secret = issued.secret("s");
    const EXPIRY: u64 = 1_893_456_000;
    for (now, good) in [
        // A machine that has not been told the time yet.
        (0, true),
        (1_704_067_199, true),
        (1_704_067_200, true),
        (EXPIRY, true),
        (EXPIRY + 1, false),
        (u64::from(u32::MAX), false),
    ] {
        let result = Secret::compile(&secret, at(now));
        assert_eq!(result.is_ok(), good, "at {now}: {result:?}");
        if let Err(refusal) = result {
            assert!(refusal.reason.contains("expired at 2030-01-01"), "{refusal}");
        }
    }
}

#[test]
fn tokens_are_good_in_their_time_wherever_the_clock_jumps_and_whatever_time_they_say() {
    let encode = |text: &str| base64::engine::general_purpose::URL_SAFE_NO_PAD.encode(text);
    let token = |claims: &str| {
        let head = encode(r#"{"alg":"RS256","typ":"JWT"}"#);
        Token::parse(&format!("{head}.{}.{}", encode(claims), encode("signature"))).unwrap()
    };
    const SKEW: u64 = 60;
    let cases = [
        (r#"{"nbf":1000,"exp":2000}"#, 939, false),
        (r#"{"nbf":1000,"exp":2000}"#, 940, true),
        (r#"{"nbf":1000,"exp":2000}"#, 2060, true),
        (r#"{"nbf":1000,"exp":2000}"#, 2061, false),
        // Back into its time.
        (r#"{"nbf":1000,"exp":2000}"#, 1500, true),
        (r#"{"nbf":1000,"exp":2000}"#, 0, false),
        (r#"{"nbf":1000,"exp":2000}"#, u64::MAX, false),
        // Times that no clock shows.
        (r#"{"exp":1e300}"#, u64::MAX, true),
        (r#"{"nbf":1e300}"#, u64::MAX - 1, true),
        ("{}", u64::MAX, true),
    ];
    for (claims, now, good) in cases {
        let result = token(claims).check_time(now, SKEW);
        assert_eq!(result.is_ok(), good, "{claims} at {now}: {result:?}");
    }
}
