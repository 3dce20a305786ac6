//! Times as Kubernetes writes them: RFC 3339 in UTC, whole seconds or six digits.

use jiff::Timestamp;

/// Parse an RFC 3339 time of any precision and offset.
pub(crate) fn parse(text: &str) -> Option<Timestamp> {
    let bytes = text.as_bytes();
    (bytes.len() >= 20 && bytes.get(10) == Some(&b'T'))
        .then(|| text.parse::<Timestamp>().ok())
        .flatten()
}

/// `2026-11-21T12:00:00Z`.
pub(crate) fn seconds(at: Timestamp) -> String {
    at.strftime("%Y-%m-%dT%H:%M:%SZ").to_string()
}

/// `2026-11-21T12:00:00.123456Z`.
pub(crate) fn micros(at: Timestamp) -> String {
    at.strftime("%Y-%m-%dT%H:%M:%S%.6fZ").to_string()
}

/// A duration as kubectl's AGE column shows it (Go's `duration.HumanDuration`).
pub(crate) fn human(seconds: i64) -> String {
    if seconds < -1 {
        return "<invalid>".to_owned();
    }
    let s = seconds.max(0);
    let (minutes, hours) = (s / 60, s / 3600);
    let pair = |a: i64, au: &str, b: i64, bu: &str| {
        if b == 0 {
            format!("{a}{au}")
        } else {
            format!("{a}{au}{b}{bu}")
        }
    };
    if s < 120 {
        format!("{s}s")
    } else if minutes < 10 {
        pair(minutes, "m", s % 60, "s")
    } else if minutes < 180 {
        format!("{minutes}m")
    } else if hours < 8 {
        pair(hours, "h", minutes % 60, "m")
    } else if hours < 48 {
        format!("{hours}h")
    } else if hours < 24 * 8 {
        pair(hours / 24, "d", hours % 24, "h")
    } else if hours < 24 * 365 * 2 {
        format!("{}d", hours / 24)
    } else if hours < 24 * 365 * 8 {
        pair(hours / 24 / 365, "y", (hours / 24) % 365, "d")
    } else {
        format!("{}y", hours / 24 / 365)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_written_in_utc_with_the_precision_of_their_type() {
        let at = parse("2026-11-21T12:00:00.5+01:00").expect("a time");
        assert_eq!(seconds(at), "2026-11-21T11:00:00Z");
        assert_eq!(micros(at), "2026-11-21T11:00:00.500000Z");
        assert!(parse("yesterday").is_none());
    }

    #[test]
    fn ages_read_as_kubectl_prints_them() {
        for (s, text) in [
            (5, "5s"),
            (119, "119s"),
            (125, "2m5s"),
            (900, "15m"),
            (11000, "3h3m"),
            (90_000, "25h"),
            (260_000, "3d"),
        ] {
            assert_eq!(human(s), text, "{s}");
        }
    }
}
