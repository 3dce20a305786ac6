//! What a client could not accept, and how that travels in a NACK.
//!
//! A NACK concerns a whole response, and its only free field is the text of `error_detail`. Our client writes one line
//! per refused resource, so that our server knows exactly which ones were refused and that all others were accepted:
//!
//! ```text
//! refused 1 of 3 resources
//! - outbound|80||reviews.default.svc.cluster.local: lb_policy MAGLEV is not supported
//! ```
//!
//! Envoy writes prose that contains the names (`Error adding/updating cluster(s) a: …, b: …`); from it we learn names
//! but not that the rest was accepted.

use std::sync::Arc;

/// One refused resource.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Refusal {
    /// Name of the resource.
    pub name: Arc<str>,
    /// Why it was refused, in words for the person who wrote the object.
    pub reason: Arc<str>,
}

impl Refusal {
    /// A refusal of `name` for `reason`.
    pub fn new(name: impl Into<Arc<str>>, reason: impl Into<Arc<str>>) -> Self {
        Self {
            name: name.into(),
            reason: reason.into(),
        }
    }
}

/// Longest reason that travels, in bytes; a control plane keeps reasons per proxy and object.
pub const MAX_REASON_BYTES: usize = 1024;

/// gRPC status code `INVALID_ARGUMENT`, which every NACK carries.
pub const INVALID_ARGUMENT: i32 = 3;

const PREFIX: &str = "refused ";

/// The text of a NACK that refuses `refusals` out of `total` resources.
pub(crate) fn format_detail(refusals: &[Refusal], total: usize) -> String {
    let mut text = format!("{PREFIX}{} of {total} resources", refusals.len());
    for refusal in refusals {
        let reason: String = truncate(&refusal.reason)
            .chars()
            .map(|c| if c.is_control() { ' ' } else { c })
            .collect();
        text.push_str("\n- ");
        text.push_str(&refusal.name);
        text.push_str(": ");
        text.push_str(&reason);
    }
    text
}

/// What a NACK says about the resources of the response it answers.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Attribution {
    /// Exactly these were refused, the rest was accepted.
    Exact(Vec<Refusal>),
    /// These were refused; nothing is known of the rest.
    Named(Vec<Refusal>),
    /// Something was refused.
    Unknown,
}

/// Reads the text of a NACK against the names that were sent.
pub(crate) fn attribute<'a>(text: &str, sent: impl Iterator<Item = &'a Arc<str>> + Clone) -> Attribution {
    if let Some(refusals) = exact(text, sent.clone()) {
        return Attribution::Exact(refusals);
    }
    let reason: Arc<str> = truncate(text).into();
    let named: Vec<_> = sent
        .filter(|name| contains_name(text, name))
        .map(|name| Refusal {
            name: name.clone(),
            reason: reason.clone(),
        })
        .collect();
    if named.is_empty() {
        Attribution::Unknown
    } else {
        Attribution::Named(named)
    }
}

fn exact<'a>(text: &str, sent: impl Iterator<Item = &'a Arc<str>> + Clone) -> Option<Vec<Refusal>> {
    let mut lines = text.lines();
    let (count, _) = lines.next()?.strip_prefix(PREFIX)?.split_once(" of ")?;
    let refusals: Vec<_> = lines
        .map(|line| {
            let line = line.strip_prefix("- ")?;
            let name = sent.clone().find(|name| {
                line.strip_prefix(name.as_ref())
                    .is_some_and(|rest| rest.starts_with(": "))
            })?;
            Some(Refusal {
                name: name.clone(),
                reason: line[name.len() + 2..].into(),
            })
        })
        .collect::<Option<_>>()?;
    (count.parse() == Ok(refusals.len()) && !refusals.is_empty()).then_some(refusals)
}

/// Whether `text` contains `name` as a whole: `outbound|80||a` must not match within `outbound|80||a.b`.
fn contains_name(text: &str, name: &str) -> bool {
    let part_of_name = |c: char| c.is_alphanumeric() || matches!(c, '|' | '-' | '_' | '/');
    !name.is_empty()
        && text.match_indices(name).any(|(at, _)| {
            let before = text[..at].chars().next_back();
            let mut after = text[at + name.len()..].chars();
            let ends = match after.next() {
                None => true,
                // A full stop or a colon ends a sentence or joins two parts of a name: what follows decides.
                Some('.' | ':') => after.next().is_none_or(|c| !part_of_name(c)),
                Some(c) => !part_of_name(c),
            };
            ends && before.is_none_or(|c| !part_of_name(c) && c != '.')
        })
}

fn truncate(text: &str) -> &str {
    &text[..text.floor_char_boundary(MAX_REASON_BYTES)]
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn names(names: &[&str]) -> Vec<Arc<str>> {
        names.iter().map(|name| Arc::from(*name)).collect()
    }

    #[test]
    fn our_own_refusals_are_read_back_exactly() {
        let sent = names(&["outbound|80||a", "outbound|80||b", "80/reviews:9080"]);
        let refusals = [
            Refusal::new("80/reviews:9080", "cluster x: unknown\nretry"),
            Refusal::new("outbound|80||a", "no"),
        ];
        let text = format_detail(&refusals, sent.len());
        let Attribution::Exact(read) = attribute(&text, sent.iter()) else {
            panic!("not exact: {text}")
        };
        assert_eq!(
            read[0],
            Refusal::new("80/reviews:9080", "cluster x: unknown retry")
        );
        assert_eq!(read[1], refusals[1]);
    }

    #[test]
    fn names_are_found_in_the_prose_of_envoy() {
        let sent = names(&["outbound|80||a.ns", "outbound|80||a", "outbound|80||c"]);
        let text = "Error adding/updating cluster(s) outbound|80||a.ns: bad lb, outbound|80||c: bad address";
        let Attribution::Named(read) = attribute(text, sent.iter()) else {
            panic!("names not found")
        };
        let read: Vec<_> = read.iter().map(|refusal| refusal.name.as_ref()).collect();
        assert_eq!(read, ["outbound|80||a.ns", "outbound|80||c"]);
    }

    #[test]
    fn prose_without_a_name_blames_nobody() {
        let sent = names(&["outbound|80||a"]);
        assert_eq!(
            attribute("Proto constraint validation failed", sent.iter()),
            Attribution::Unknown
        );
        assert_eq!(attribute("", sent.iter()), Attribution::Unknown);
    }

    #[test]
    fn a_long_reason_is_cut_at_a_character() {
        let text = format_detail(&[Refusal::new("a", "ä".repeat(MAX_REASON_BYTES))], 1);
        assert!(text.len() < MAX_REASON_BYTES + 100, "{} bytes", text.len());
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(128))]

        #[test]
        fn any_text_is_read_without_harm(text in "\\PC*", extra in any::<String>()) {
            let sent = names(&["a", "80/b", "ü"]);
            let _ = attribute(&text, sent.iter());
            let _ = attribute(&format!("refused 1 of 3 resources\n- a: {extra}"), sent.iter());
        }
    }
}
