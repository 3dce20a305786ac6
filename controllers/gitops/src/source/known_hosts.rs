//! Whether an ssh server's key is one that `known_hosts` vouches for (sshd(8), SSH_KNOWN_HOSTS FILE FORMAT).
//!
//! libgit2 hands us the server's raw key and leaves the comparison to us. Plain, `[host]:port`, wildcard, negated
//! and hashed names are understood; a `@revoked` key is refused; `@cert-authority` lines are not used.

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;

/// Why a host key is not accepted.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Refusal {
    /// No line speaks of this host.
    UnknownHost,
    /// Lines speak of it, with other keys of the same type.
    Mismatch,
    /// Lines speak of it, with keys of other types only. libssh2 and the server agree on a type without asking us what we know.
    OtherTypes {
        /// The type of the key that the server showed.
        shown: String,
        /// The types of the keys that are listed.
        listed: String,
    },
    /// The key is marked as revoked.
    Revoked,
}

/// Checks `key` (the raw key as on the wire) of `host`:`port` against the text of a `known_hosts` file.
pub(crate) fn check(text: &str, host: &str, port: u16, key: &[u8]) -> Result<(), Refusal> {
    let name = if port == 22 {
        host.to_string()
    } else {
        format!("[{host}]:{port}")
    };
    let shown = key_type(key);
    let mut seen = false;
    let mut good = false;
    let mut listed: Vec<&str> = Vec::new();
    for line in text
        .lines()
        .map(str::trim)
        .filter(|l| !l.is_empty() && !l.starts_with('#'))
    {
        let mut fields = line.split_whitespace();
        let Some(first) = fields.next() else { continue };
        let (marker, names) = match first.strip_prefix('@') {
            Some(marker) => (Some(marker), fields.next().unwrap_or_default()),
            None => (None, first),
        };
        let (Some(algorithm), Some(encoded)) = (fields.next(), fields.next()) else {
            continue;
        };
        if !names_match(names, &name) {
            continue;
        }
        let same = STANDARD.decode(encoded).is_ok_and(|k| k == key);
        match marker {
            Some("revoked") if same => return Err(Refusal::Revoked),
            Some(_) => {}
            None => {
                seen = true;
                good |= same;
                if !listed.contains(&algorithm) {
                    listed.push(algorithm);
                }
            }
        }
    }
    match (good, seen) {
        (true, _) => Ok(()),
        (false, true) => match shown {
            Some(shown) if !listed.contains(&shown) => Err(Refusal::OtherTypes {
                shown: shown.to_string(),
                listed: listed.join(", "),
            }),
            _ => Err(Refusal::Mismatch),
        },
        (false, false) => Err(Refusal::UnknownHost),
    }
}

/// The type that a key on the wire begins with (RFC 4253 section 6.6): a length of four bytes and the name.
fn key_type(key: &[u8]) -> Option<&str> {
    let (length, rest) = key.split_first_chunk::<4>()?;
    let length = usize::try_from(u32::from_be_bytes(*length)).ok()?;
    std::str::from_utf8(rest.get(..length)?).ok()
}

fn names_match(names: &str, name: &str) -> bool {
    let mut matched = false;
    for pattern in names.split(',') {
        if let Some(negated) = pattern.strip_prefix('!') {
            if wildcard(negated, name) {
                return false;
            }
        } else if let Some(hashed) = pattern.strip_prefix("|1|") {
            matched |= hash_matches(hashed, name);
        } else {
            matched |= wildcard(pattern, name);
        }
    }
    matched
}

/// `salt|hmac-sha1(salt, name)`, both in base64. SHA-1 is what the format prescribes.
fn hash_matches(hashed: &str, name: &str) -> bool {
    let Some((salt, hash)) = hashed.split_once('|') else {
        return false;
    };
    let (Ok(salt), Ok(hash)) = (STANDARD.decode(salt), STANDARD.decode(hash)) else {
        return false;
    };
    let key = aws_lc_rs::hmac::Key::new(aws_lc_rs::hmac::HMAC_SHA1_FOR_LEGACY_USE_ONLY, &salt);
    aws_lc_rs::hmac::verify(&key, name.as_bytes(), &hash).is_ok()
}

/// `*` and `?`; brackets are literal, since `[host]:port` uses them.
fn wildcard(pattern: &str, name: &str) -> bool {
    fn walk(p: &[u8], n: &[u8]) -> bool {
        match p.split_first() {
            None => n.is_empty(),
            Some((b'*', rest)) => (0..=n.len()).any(|skip| walk(rest, &n[skip..])),
            Some((b'?', rest)) => n.split_first().is_some_and(|(_, more)| walk(rest, more)),
            Some((c, rest)) => n
                .split_first()
                .is_some_and(|(d, more)| c.eq_ignore_ascii_case(d) && walk(rest, more)),
        }
    }
    // Host patterns are short; a long one full of stars would make the walk expensive.
    pattern.len() <= 256
        && pattern.bytes().filter(|b| *b == b'*').count() <= 4
        && walk(pattern.as_bytes(), name.as_bytes())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn line(names: &str, key: &[u8]) -> String {
        format!("{names} ssh-ed25519 {}", STANDARD.encode(key))
    }

    #[test]
    fn a_key_is_accepted_only_for_the_host_and_port_that_it_is_listed_for() {
        let text = line("git.example.com,10.0.0.1", b"k1") + "\n" + &line("[git.example.com]:2222", b"k2");
        assert_eq!(check(&text, "git.example.com", 22, b"k1"), Ok(()));
        assert_eq!(check(&text, "10.0.0.1", 22, b"k1"), Ok(()));
        assert_eq!(check(&text, "git.example.com", 2222, b"k2"), Ok(()));
        assert_eq!(
            check(&text, "git.example.com", 2222, b"k1"),
            Err(Refusal::Mismatch)
        );
        assert_eq!(
            check(&text, "other.example.com", 22, b"k1"),
            Err(Refusal::UnknownHost)
        );
    }

    #[test]
    fn hashed_names_wildcards_negation_and_revocation_are_understood() {
        let salt = [7u8; 20];
        let key = aws_lc_rs::hmac::Key::new(aws_lc_rs::hmac::HMAC_SHA1_FOR_LEGACY_USE_ONLY, &salt);
        let tag = aws_lc_rs::hmac::sign(&key, b"github.com");
        let hashed = format!("|1|{}|{}", STANDARD.encode(salt), STANDARD.encode(tag.as_ref()));
        assert_eq!(check(&line(&hashed, b"k"), "github.com", 22, b"k"), Ok(()));
        assert_eq!(
            check(&line(&hashed, b"k"), "gitlab.com", 22, b"k"),
            Err(Refusal::UnknownHost)
        );
        let text = line("*.example.com,!bad.example.com", b"k");
        assert_eq!(check(&text, "a.example.com", 22, b"k"), Ok(()));
        assert_eq!(
            check(&text, "bad.example.com", 22, b"k"),
            Err(Refusal::UnknownHost)
        );
        let text = line("h", b"k") + "\n@revoked " + &line("*", b"k");
        assert_eq!(check(&text, "h", 22, b"k"), Err(Refusal::Revoked));
    }
    #[test]
    fn a_key_of_a_type_that_is_not_listed_is_told_from_a_wrong_one() {
        let wire = |kind: &str, body: &str| {
            let length = u32::try_from(kind.len()).unwrap().to_be_bytes();
            [&length[..], kind.as_bytes(), body.as_bytes()].concat()
        };
        let text = line("h", &wire("ssh-ed25519", "1"));
        assert_eq!(
            check(&text, "h", 22, &wire("ssh-ed25519", "2")),
            Err(Refusal::Mismatch)
        );
        let other = Refusal::OtherTypes {
            shown: "ecdsa-sha2-nistp256".into(),
            listed: "ssh-ed25519".into(),
        };
        assert_eq!(
            check(&text, "h", 22, &wire("ecdsa-sha2-nistp256", "1")),
            Err(other)
        );
    }
}
