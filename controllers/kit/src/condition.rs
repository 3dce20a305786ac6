//! `metav1.Condition` lists: set by type, touched only when something changed, transition times kept honest.

use jiff::Timestamp;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{Condition, Time};

/// The status of a condition.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Status {
    /// The condition holds.
    True,
    /// The condition does not hold.
    False,
    /// It is not known whether the condition holds.
    Unknown,
}

impl Status {
    /// The word that Kubernetes writes.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::True => "True",
            Self::False => "False",
            Self::Unknown => "Unknown",
        }
    }
}

impl From<bool> for Status {
    fn from(holds: bool) -> Self {
        if holds { Self::True } else { Self::False }
    }
}

/// A condition as a controller wishes it; the transition time is worked out by [`set`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Wanted<'a> {
    /// For example `Ready`.
    pub type_: &'a str,
    /// Whether it holds.
    pub status: Status,
    /// One CamelCase word.
    pub reason: &'a str,
    /// A sentence for the person at the terminal.
    pub message: &'a str,
    /// `metadata.generation` that was looked at.
    pub observed_generation: Option<i64>,
}

/// The longest message that the Kubernetes schema of conditions allows, in bytes.
const MESSAGE_MAX: usize = 32_768;

/// Sets a condition. Returns whether anything changed; `lastTransitionTime` moves only when `status` does.
pub fn set(conditions: &mut Vec<Condition>, wanted: &Wanted<'_>, now: Timestamp) -> bool {
    let message = truncated(wanted.message);
    let mut next = Condition {
        type_: wanted.type_.to_owned(),
        status: wanted.status.as_str().to_owned(),
        reason: wanted.reason.to_owned(),
        message: message.to_owned(),
        observed_generation: wanted.observed_generation,
        last_transition_time: Time(now),
    };
    match conditions
        .iter_mut()
        .find(|condition| condition.type_ == wanted.type_)
    {
        Some(current) => {
            if current.status == next.status {
                next.last_transition_time = current.last_transition_time.clone();
            }
            let changed = *current != next;
            *current = next;
            changed
        }
        None => {
            conditions.push(next);
            true
        }
    }
}

/// Removes a condition. Returns whether it was there.
pub fn remove(conditions: &mut Vec<Condition>, type_: &str) -> bool {
    let before = conditions.len();
    conditions.retain(|condition| condition.type_ != type_);
    conditions.len() != before
}

/// The condition of a type, if it is there.
pub fn get<'a>(conditions: &'a [Condition], type_: &str) -> Option<&'a Condition> {
    conditions.iter().find(|condition| condition.type_ == type_)
}

/// Whether a condition is there and holds.
pub fn is_true(conditions: &[Condition], type_: &str) -> bool {
    get(conditions, type_).is_some_and(|condition| condition.status == "True")
}

fn truncated(message: &str) -> &str {
    if message.len() <= MESSAGE_MAX {
        return message;
    }
    let mut end = MESSAGE_MAX;
    while !message.is_char_boundary(end) {
        end -= 1;
    }
    &message[..end]
}

#[cfg(test)]
mod tests {
    use super::*;

    fn wanted(status: Status, message: &'static str) -> Wanted<'static> {
        Wanted {
            type_: "Ready",
            status,
            reason: "Because",
            message,
            observed_generation: Some(1),
        }
    }

    fn at(second: i64) -> Timestamp {
        Timestamp::from_second(second).unwrap()
    }

    #[test]
    fn a_condition_that_stays_the_same_is_not_a_change() {
        let mut conditions = Vec::new();
        assert!(set(&mut conditions, &wanted(Status::True, "up"), at(1)));
        assert!(!set(&mut conditions, &wanted(Status::True, "up"), at(2)));
        assert_eq!(conditions[0].last_transition_time, Time(at(1)));
    }

    #[test]
    fn the_transition_time_moves_with_the_status_and_not_with_the_message() {
        let mut conditions = Vec::new();
        set(&mut conditions, &wanted(Status::Unknown, "waiting"), at(1));
        assert!(set(
            &mut conditions,
            &wanted(Status::Unknown, "still waiting"),
            at(2)
        ));
        assert_eq!(conditions[0].last_transition_time, Time(at(1)));
        assert!(set(&mut conditions, &wanted(Status::False, "gone"), at(3)));
        assert_eq!(conditions[0].last_transition_time, Time(at(3)));
    }

    #[test]
    fn a_message_longer_than_the_schema_allows_is_cut_at_a_character() {
        let long = "ä".repeat(MESSAGE_MAX);
        let mut conditions = Vec::new();
        let wish = Wanted {
            type_: "Ready",
            status: Status::True,
            reason: "Long",
            message: &long,
            observed_generation: None,
        };
        set(&mut conditions, &wish, at(1));
        assert_eq!(conditions[0].message.len(), MESSAGE_MAX);
    }

    #[test]
    fn conditions_are_found_and_removed_by_type() {
        let mut conditions = Vec::new();
        set(&mut conditions, &wanted(Status::True, ""), at(1));
        assert!(is_true(&conditions, "Ready"));
        assert!(!is_true(&conditions, "Stalled"));
        assert!(remove(&mut conditions, "Ready"));
        assert!(!remove(&mut conditions, "Ready"));
    }
}
