//! What is compared of two answers and two lines of the log, what is pardoned, and what a difference is about.

use std::collections::{BTreeMap, BTreeSet};

use super::client::{Answer, Ask};

/// Of what endpoints see: who we are is told (the peers' metadata); an empty request is told to be so only where its method
/// says that it might not be.
const NOT_COMPARED: [&str; 3] = [
    "x-envoy-peer-metadata",
    "content-length: 0",
    "x-envoy-peer-metadata-id",
];

/// How cases end that bring several tokens where none is needed.
pub(crate) const SEVERAL_OPTIONAL: &str = "-several-optional";

/// Whether ours has refused a bad token beside a good one where no token is needed. Envoy looks at one of them only, and what
/// else the request lacks may be its reason.
fn is_stricter_about_tokens(ask: &Ask, ours: &str, theirs: &str) -> bool {
    let details = |line| said(line, "details");
    ask.case.ends_with(SEVERAL_OPTIONAL)
        && details(ours).starts_with("jwt_authn_access_denied")
        && details(ours) != details(theirs)
}

/// What is compared of an answer, without what differs for a reason that is listed.
fn pardoned(ask: &Ask, mut answer: Answer) -> Answer {
    // The rest of a request that was answered early is read, and its connection goes on. How long a bucket takes to have
    // more is told also while it has some.
    for name in [
        "date",
        "x-envoy-upstream-service-time",
        "x-serin-response-flags",
        "connection",
        "x-ratelimit-reset",
    ] {
        answer.headers.remove(name);
    }
    // What services say that is no field is left out.
    for name in ["bad name", "x-bad"] {
        answer.headers.remove(name);
    }
    // An answer that must not be used leaves the request as it was; Envoy may have changed its route by then.
    // A processor that fails the answer to a request without a cluster takes with it what the route says of answers.
    let processed = ask.case.starts_with('e') && ask.target.starts_with("/missing");
    let type_of = |answer: &Answer| answer.headers.get("content-type").map(|values| values[0].clone());
    let failed = answer.status == 500 || type_of(&answer).as_deref() == Some("application/grpc");
    if ask.target.contains("/zv") && failed || processed {
        for name in [
            "x-host",
            "x-table",
            "x-route",
            "cookie",
            "x-new",
            "x-multi",
            "x-k",
            "x-empty",
            "host",
            "x-envoy-internal",
        ] {
            answer.headers.remove(name);
        }
    }
    if let Some(values) = answer.headers.get_mut("x-request-id") {
        for value in values.iter_mut().filter(|value| *value != "mine") {
            *value = "(id)".into();
        }
    }
    let lines: Vec<String> = answer
        .body
        .split('\n')
        .filter(|line| !NOT_COMPARED.iter().any(|name| line.starts_with(name)))
        .map(|line| match line.split_once(": ") {
            Some(("x-request-id", value)) if value != "mine" => "x-request-id: (id)".to_owned(),
            // Of a further try, what is left of the time: to the second.
            Some((name @ "x-envoy-expected-rq-timeout-ms", left)) => {
                let left: u64 = left.parse().unwrap_or(0);
                format!("{name}: {}", left.div_ceil(1000))
            }
            // Envoy names this machine's own address where the client's is a loopback address.
            Some(("x-forwarded-for", value)) => {
                let before = value.rsplit_once(',').map_or("", |(before, _)| before);
                format!("x-forwarded-for: {before}")
            }
            _ => line.to_owned(),
        })
        .collect();
    if answer.headers.contains_key("x-backend")
        || answer.body.starts_with("a ")
        || answer.body.starts_with("b ")
    {
        answer.body = lines.join("\n");
        answer.headers.remove("content-length");
    }
    // A host is what processors may give requests only.
    if ask.case.starts_with('e') {
        answer.headers.remove("host");
    }
    // Compressors are not the same; what they make means the same.
    if answer.headers.contains_key("content-encoding") {
        answer.body.clear();
        answer.headers.remove("content-length");
        answer.headers.remove("transfer-encoding");
    }
    if answer.status == 204 {
        answer.headers.remove("content-length");
    }
    for value in answer.headers.values_mut().flatten() {
        *value = value.replace('#', "%23");
    }
    answer.body = answer.body.replace('#', "%23");
    answer.length = 0;
    // A HEAD is answered with the fields of a GET, and what answers a preflight is never compressed.
    if matches!(ask.method, "HEAD" | "OPTIONS") {
        answer.headers.remove("vary");
    }
    if ask.method == "HEAD" {
        answer.headers.remove("content-length");
        answer.headers.remove("transfer-encoding");
    }
    answer
}

/// The same of a line of the log; so many bytes were answered.
fn pardoned_line(line: &str, length: usize) -> String {
    // A number sign in a path is escaped by ours.
    let mut out = line.replace('#', "%23");
    // The words of a service that has failed, and a service's answer that has no name.
    if let Some((before, rest)) = out.split_once("details=ext_proc_error_gRPC_error_")
        && let Some((code, after)) = rest.split_once(' ')
    {
        let code = code.split('{').next().unwrap_or_default();
        out = format!("{before}details=ext_proc_error_gRPC_error_{code} {after}");
    }
    out = out.replace(" details=ext_proc_immediate_response ", " details= ");
    // Content of a request that is answered without it is counted by Envoy only.
    if !out.contains("via_upstream") {
        cut(&mut out, "received", |_| "*".into());
    }
    // Of an answer that must not be used nothing is used.
    if out.contains("details=ext_authz_invalid") || out.contains("details=header_mutation_") {
        for key in ["path", "host", "cluster"] {
            cut(&mut out, key, |_| "*".into());
        }
    }
    // A cluster that is not there is named all the same.
    if said(&out, "flags").split(',').any(|flag| flag == "NC") {
        out = out
            .replace(" cluster=missing ", " cluster=- ")
            .replace(" cluster=nope ", " cluster=- ");
    }
    // How many bytes there are depends on the addresses; the client has got so many.
    cut(&mut out, "sent", |sent| {
        if sent == length.to_string() {
            "*".into()
        } else {
            format!("{sent} and the client has got {length}")
        }
    });
    out
}

/// Puts something else where a line of the log has the value of `key`.
fn cut(line: &mut String, key: &str, with: impl FnOnce(&str) -> String) {
    let key = format!(" {key}=");
    if let Some((before, rest)) = line.split_once(&key) {
        let (value, after) = rest.split_once(' ').unwrap_or((rest, ""));
        *line = format!("{before}{key}{} {after}", with(value));
    }
}

/// What a line of the log says of `key`.
fn said<'a>(line: &'a str, key: &str) -> &'a str {
    line.split(' ')
        .find_map(|word| word.strip_prefix(key)?.strip_prefix('='))
        .unwrap_or_default()
}

/// Whether a rewrite has made something of the path that is none. Envoy sends it on; ours refuses what it would send, and a
/// redirect there leaves the path of the request as it is.
fn is_no_path(answers: &[Answer; 2], ours: &str, theirs: &str) -> bool {
    let [our_answer, their_answer] = answers;
    !said(theirs, "path").starts_with('/')
        && (said(ours, "details") == "path_rewrite_failed"
            || our_answer.status == their_answer.status
                && our_answer.headers.get("location") == their_answer.headers.get("location"))
}

/// Something that the two did not do alike.
pub(crate) struct Difference {
    /// What it is about: names of fields, keys of the log.
    pub(crate) about: BTreeSet<String>,
    /// All of it, with the request.
    pub(crate) text: String,
}

impl Difference {
    /// Of a whole configuration.
    pub(crate) fn of_setup(text: String) -> Self {
        Self {
            about: BTreeSet::from(["refused".to_owned()]),
            text,
        }
    }

    /// Of one request; nothing where all is alike.
    pub(crate) fn find(
        setup: &str,
        ask: &Ask,
        answers: [Answer; 2],
        [our_line, their_line]: [Option<&String>; 2],
    ) -> Option<Self> {
        if let (Some(our_line), Some(their_line)) = (our_line, their_line)
            && (is_no_path(&answers, our_line, their_line)
                || is_stricter_about_tokens(ask, our_line, their_line))
        {
            return None;
        }
        let refused_early = our_line.is_some_and(|line| said(line, "details") == "path_normalization_failed");
        if refused_early && ask.fields.iter().any(|(name, _)| name == "x-forwarded-proto") {
            // Such a request has found no route yet; Envoy searches one for its answer, if it has that field.
            let [ours, theirs] = &answers;
            if ours.status == theirs.status && ours.headers.get("location") == theirs.headers.get("location")
            {
                return None;
            }
        }
        // What endpoints are asked ends at a number sign, where it is not escaped.
        let cut_short = their_line.is_some_and(|line| said(line, "path").contains('#'));
        let [mut ours, mut theirs] = answers;
        if cut_short {
            for answer in [&mut ours, &mut theirs] {
                if let Some((first, rest)) = answer.body.split_once('\n') {
                    let name = first.split(' ').next().unwrap_or_default();
                    answer.body = format!("{name} \n{rest}");
                }
            }
        }
        let our_line = our_line.map(|line| pardoned_line(line, ours.length));
        let their_line = their_line.map(|line| pardoned_line(line, theirs.length));
        let (ours, theirs) = (pardoned(ask, ours), pardoned(ask, theirs));
        if ours == theirs && our_line == their_line {
            return None;
        }
        let mut about = BTreeSet::new();
        let mut text = format!("{setup} {:?}\n", String::from_utf8_lossy(&ask.bytes()));
        if ours.status != theirs.status {
            about.insert("status".to_owned());
            text.push_str(&format!("  status {} and {}\n", ours.status, theirs.status));
        }
        let names: BTreeSet<_> = ours.headers.keys().chain(theirs.headers.keys()).collect();
        for name in names {
            let (one, other) = (ours.headers.get(name), theirs.headers.get(name));
            if one != other {
                about.insert(format!("header {name}"));
                text.push_str(&format!("  {name}: {one:?} and {other:?}\n"));
            }
        }
        let (one, other): (Vec<_>, Vec<_>) = (ours.body.lines().collect(), theirs.body.lines().collect());
        for (who, some, others) in [("ours  ", &one, &other), ("theirs", &other, &one)] {
            for line in some.iter().filter(|line| !others.contains(line)) {
                about.insert(format!(
                    "saw {}",
                    line.split([':', ' ']).next().unwrap_or_default()
                ));
                text.push_str(&format!("  body {who} {line:?}\n"));
            }
        }
        if ours.body != theirs.body && one.len() == other.len() && about.is_empty() {
            about.insert("body".to_owned());
            text.push_str(&format!("  body {:?} and {:?}\n", ours.body, theirs.body));
        }
        match (&our_line, &their_line) {
            (Some(one), Some(other)) => {
                let (some, others): (Vec<_>, Vec<_>) = (one.split(' ').collect(), other.split(' ').collect());
                let longest = some.len().max(others.len());
                for index in 0..longest {
                    let (one, other) = (some.get(index), others.get(index));
                    if one != other {
                        let key = one.or(other).and_then(|text| text.split('=').next());
                        about.insert(format!("log {}", key.unwrap_or_default()));
                    }
                }
            }
            (None, None) => {}
            (Some(_), None) => drop(about.insert("log of ours alone".to_owned())),
            (None, Some(_)) => drop(about.insert("log of theirs alone".to_owned())),
        }
        if our_line != their_line {
            text.push_str(&format!(
                "  log ours   {our_line:?}\n  log theirs {their_line:?}\n"
            ));
        }
        Some(Self { about, text })
    }
}

/// How often what differs, most frequent first, and one example or several of each.
pub(crate) fn summary(differences: &[Difference]) -> String {
    let mut kinds: BTreeMap<&BTreeSet<String>, Vec<&Difference>> = BTreeMap::new();
    for one in differences {
        kinds.entry(&one.about).or_default().push(one);
    }
    let mut kinds: Vec<_> = kinds.into_iter().collect();
    kinds.sort_by_key(|(_, all)| std::cmp::Reverse(all.len()));
    let named = std::env::var("SERIN_GENERATED_EXAMPLES").ok();
    let examples = named.and_then(|text| text.parse().ok()).unwrap_or(2);
    let mut out = String::new();
    for (about, all) in kinds {
        let about: Vec<_> = about.iter().map(String::as_str).collect();
        out.push_str(&format!("== {} times: {}\n", all.len(), about.join(", ")));
        for one in all.iter().take(examples) {
            out.push_str(&one.text);
        }
    }
    out
}
