//! Is a webhook call from whom it says? Pure; comparisons take the same time whatever they find.

use aws_lc_rs::constant_time::verify_slices_are_equal;
use aws_lc_rs::hmac;
use http::HeaderMap;
use serin_crds::flux::notification::ReceiverType;

/// Why a call is refused. The words go into the log and not to the caller.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Refusal {
    /// No signature or token where one must be.
    Missing(&'static str),
    /// It is not the right one.
    Wrong,
    /// The signature's algorithm is none that we take.
    Algorithm(String),
    /// The event is not among `spec.events`.
    Event(String),
}

/// The kinds of callers that are understood.
pub(crate) fn supported(type_: &ReceiverType) -> bool {
    matches!(
        type_,
        ReceiverType::Generic | ReceiverType::GenericHmac | ReceiverType::Github | ReceiverType::Gitlab
    )
}

fn header<'a>(headers: &'a HeaderMap, name: &str) -> Option<&'a str> {
    headers.get(name).and_then(|v| v.to_str().ok())
}

/// Checks one call.
pub(crate) fn check(
    type_: &ReceiverType,
    token: &[u8],
    events: &[String],
    headers: &HeaderMap,
    body: &[u8],
) -> Result<(), Refusal> {
    match type_ {
        // The path is derived from the token, and is the secret.
        ReceiverType::Generic => Ok(()),
        ReceiverType::GenericHmac => signature(
            header(headers, "x-signature").ok_or(Refusal::Missing("X-Signature"))?,
            token,
            body,
        ),
        ReceiverType::Github => {
            let given = header(headers, "x-hub-signature-256").or_else(|| header(headers, "x-hub-signature"));
            signature(given.ok_or(Refusal::Missing("X-Hub-Signature-256"))?, token, body)?;
            event(events, header(headers, "x-github-event"))
        }
        ReceiverType::Gitlab => {
            let given = header(headers, "x-gitlab-token").ok_or(Refusal::Missing("X-Gitlab-Token"))?;
            verify_slices_are_equal(given.as_bytes(), token).map_err(|_| Refusal::Wrong)?;
            event(events, header(headers, "x-gitlab-event"))
        }
        _ => Err(Refusal::Algorithm(type_.to_string())),
    }
}

/// `sha256=<hex>`; also sha1, which GitHub's older header has, sha384 and sha512.
fn signature(given: &str, token: &[u8], body: &[u8]) -> Result<(), Refusal> {
    let (algorithm, digits) = given.split_once('=').ok_or(Refusal::Wrong)?;
    let algorithm = match algorithm {
        "sha256" => hmac::HMAC_SHA256,
        "sha1" => hmac::HMAC_SHA1_FOR_LEGACY_USE_ONLY,
        "sha384" => hmac::HMAC_SHA384,
        "sha512" => hmac::HMAC_SHA512,
        other => return Err(Refusal::Algorithm(other.chars().take(20).collect())),
    };
    let tag = unhex(digits).ok_or(Refusal::Wrong)?;
    hmac::verify(&hmac::Key::new(algorithm, token), body, &tag).map_err(|_| Refusal::Wrong)
}

fn unhex(text: &str) -> Option<Vec<u8>> {
    if !text.len().is_multiple_of(2) || text.len() > 256 || !text.is_ascii() {
        return None;
    }
    (0..text.len())
        .step_by(2)
        .map(|i| u8::from_str_radix(&text[i..i + 2], 16).ok())
        .collect()
}

fn event(wanted: &[String], given: Option<&str>) -> Result<(), Refusal> {
    let given = given.unwrap_or_default();
    if wanted.is_empty() || wanted.iter().any(|w| w == given) {
        Ok(())
    } else {
        Err(Refusal::Event(given.chars().take(60).collect()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::source::credentials::hex;

    fn headers(pairs: &[(&'static str, String)]) -> HeaderMap {
        pairs
            .iter()
            .map(|(k, v)| (http::HeaderName::from_static(k), v.parse().unwrap()))
            .collect()
    }

    fn signed(token: &[u8], body: &[u8]) -> String {
        format!(
            "sha256={}",
            hex(hmac::sign(&hmac::Key::new(hmac::HMAC_SHA256, token), body).as_ref())
        )
    }

    #[test]
    fn a_signature_must_be_of_this_body_with_this_token() {
        let good = headers(&[("x-signature", signed(b"token", b"body"))]);
        let check = |headers: &HeaderMap, body: &[u8]| {
            check(&ReceiverType::GenericHmac, b"token", &[], headers, body)
        };
        assert_eq!(check(&good, b"body"), Ok(()));
        assert_eq!(check(&good, b"other"), Err(Refusal::Wrong));
        assert_eq!(
            check(&headers(&[("x-signature", signed(b"guess", b"body"))]), b"body"),
            Err(Refusal::Wrong)
        );
        assert_eq!(
            check(&headers(&[]), b"body"),
            Err(Refusal::Missing("X-Signature"))
        );
        assert_eq!(
            check(&headers(&[("x-signature", "md5=00".into())]), b"body"),
            Err(Refusal::Algorithm("md5".into()))
        );
        for nonsense in ["sha256=", "sha256=zz", "sha256=é", "sha256"] {
            let value = http::HeaderValue::from_bytes(nonsense.as_bytes()).unwrap();
            let mut map = HeaderMap::new();
            map.insert("x-signature", value);
            assert!(check(&map, b"body").is_err(), "{nonsense}");
        }
    }

    #[test]
    fn github_and_gitlab_calls_are_checked_with_their_headers_and_events() {
        let events = ["push".to_string(), "ping".to_string()];
        let github = |event: &str| {
            headers(&[
                ("x-hub-signature-256", signed(b"t", b"b")),
                ("x-github-event", event.into()),
            ])
        };
        assert_eq!(
            check(&ReceiverType::Github, b"t", &events, &github("push"), b"b"),
            Ok(())
        );
        assert_eq!(
            check(&ReceiverType::Github, b"t", &events, &github("star"), b"b"),
            Err(Refusal::Event("star".into()))
        );
        assert_eq!(
            check(&ReceiverType::Github, b"t", &[], &github("star"), b"b"),
            Ok(())
        );
        let gitlab = headers(&[
            ("x-gitlab-token", "t".into()),
            ("x-gitlab-event", "Push Hook".into()),
        ]);
        assert_eq!(check(&ReceiverType::Gitlab, b"t", &[], &gitlab, b""), Ok(()));
        assert_eq!(
            check(&ReceiverType::Gitlab, b"x", &[], &gitlab, b""),
            Err(Refusal::Wrong)
        );
    }
}
