//! Times and spans: reading and writing them, and their parts (`getFullYear` and its like).
//!
//! Days and dates go by Howard Hinnant's civil-from-days: the Gregorian calendar in eras of 400 years.

/// Nanoseconds of a second.
const SECOND: i64 = 1_000_000_000;

/// A part of a time; of a span only those from hours on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs)] // the names are CEL's, without `get`
pub(super) enum Part {
    FullYear,
    Month,
    DayOfYear,
    DayOfMonth,
    Date,
    DayOfWeek,
    Hours,
    Minutes,
    Seconds,
    Milliseconds,
}

impl Part {
    /// By the name of CEL's function.
    pub(super) fn find(function: &str) -> Option<Self> {
        Some(match function {
            "getFullYear" => Self::FullYear,
            "getMonth" => Self::Month,
            "getDayOfYear" => Self::DayOfYear,
            "getDayOfMonth" => Self::DayOfMonth,
            "getDate" => Self::Date,
            "getDayOfWeek" => Self::DayOfWeek,
            "getHours" => Self::Hours,
            "getMinutes" => Self::Minutes,
            "getSeconds" => Self::Seconds,
            "getMilliseconds" => Self::Milliseconds,
            _ => return None,
        })
    }

    /// The part of a time (nanoseconds since 1970) so many seconds east of UTC. Months, days of the month and of the year
    /// count from 0, `getDate` from 1, weeks begin on Sunday.
    pub(super) fn of_time(self, nanos: i64, east: i32) -> i64 {
        let seconds = nanos.div_euclid(SECOND) + i64::from(east);
        let (days, of_day) = (seconds.div_euclid(86_400), seconds.rem_euclid(86_400));
        let (year, month, day) = civil(days);
        match self {
            Self::FullYear => year,
            Self::Month => month - 1,
            Self::DayOfYear => days - days_of(year, 1, 1),
            Self::DayOfMonth => day - 1,
            Self::Date => day,
            // 1970 began on a Thursday.
            Self::DayOfWeek => (days + 4).rem_euclid(7),
            Self::Hours => of_day / 3600,
            Self::Minutes => of_day / 60 % 60,
            Self::Seconds => of_day % 60,
            Self::Milliseconds => nanos.rem_euclid(SECOND) / 1_000_000,
        }
    }

    /// How many whole hours, minutes or seconds a span has, or the milliseconds beside its seconds.
    pub(super) fn of_span(self, nanos: i64) -> Option<i64> {
        Some(match self {
            Self::Hours => nanos / (3600 * SECOND),
            Self::Minutes => nanos / (60 * SECOND),
            Self::Seconds => nanos / SECOND,
            Self::Milliseconds => nanos % SECOND / 1_000_000,
            _ => return None,
        })
    }
}

/// Year, month and day of a day since 1970.
fn civil(days: i64) -> (i64, i64, i64) {
    let (year, month, day) = crate::calendar::date(days);
    (year, i64::from(month), i64::from(day))
}

/// The day since 1970 of a date.
fn days_of(year: i64, month: i64, day: i64) -> i64 {
    let year = if month <= 2 { year - 1 } else { year };
    let era = year.div_euclid(400);
    let year_of_era = year.rem_euclid(400);
    let shifted = (month + 9) % 12;
    let day_of_year = (153 * shifted + 2) / 5 + day - 1;
    era * 146_097 + year_of_era * 365 + year_of_era / 4 - year_of_era / 100 + day_of_year - 719_468
}

/// Digits at the start of a text, exactly so many.
fn digits(text: &str, count: usize) -> Option<(i64, &str)> {
    let (head, rest) = text.split_at_checked(count)?;
    let all = head.bytes().all(|byte| byte.is_ascii_digit());
    Some((head.parse().ok().filter(|_| all)?, rest))
}

/// `2024-05-06T07:08:09.5Z` (RFC 3339) in nanoseconds since 1970.
pub(super) fn timestamp(text: &str) -> Option<i64> {
    let (year, rest) = digits(text, 4)?;
    let (month, rest) = digits(rest.strip_prefix('-')?, 2)?;
    let (day, rest) = digits(rest.strip_prefix('-')?, 2)?;
    let (hour, rest) = digits(rest.strip_prefix(['T', 't', ' '])?, 2)?;
    let (minute, rest) = digits(rest.strip_prefix(':')?, 2)?;
    let (second, mut rest) = digits(rest.strip_prefix(':')?, 2)?;
    let mut nanos = 0i64;
    if let Some(fraction) = rest.strip_prefix('.') {
        let end = fraction
            .find(|char: char| !char.is_ascii_digit())
            .unwrap_or(fraction.len());
        if end == 0 || end > 9 {
            return None;
        }
        nanos = fraction[..end].parse::<i64>().ok()? * 10i64.pow(9 - end as u32);
        rest = &fraction[end..];
    }
    let east = offset(rest)?;
    // The day is on the calendar if it is found again.
    let days = days_of(year, month, day);
    if !(1..=12).contains(&month) || civil(days) != (year, month, day) {
        return None;
    }
    if hour > 23 || minute > 59 || second > 59 {
        return None;
    }
    let seconds = days * 86_400 + hour * 3600 + minute * 60 + second - i64::from(east);
    seconds.checked_mul(SECOND)?.checked_add(nanos)
}

/// `Z`, `UTC`, `+01:30` and `01:30` in seconds east of UTC. Other names of zones would need their history.
pub(super) fn offset(text: &str) -> Option<i32> {
    if text.eq_ignore_ascii_case("z") || text.eq_ignore_ascii_case("utc") {
        return Some(0);
    }
    let (sign, rest) = match text.as_bytes().first()? {
        b'-' => (-1, &text[1..]),
        b'+' => (1, &text[1..]),
        _ => (1, text),
    };
    let (hours, rest) = digits(rest, 2)?;
    let (minutes, rest) = digits(rest.strip_prefix(':')?, 2)?;
    let seconds = i32::try_from(hours * 3600 + minutes * 60).ok()?;
    (rest.is_empty() && hours < 24 && minutes < 60).then_some(sign * seconds)
}

fn fraction(nanos: i64) -> String {
    if nanos == 0 {
        return String::new();
    }
    format!(".{nanos:09}").trim_end_matches('0').to_owned()
}

/// The text of a time, in UTC.
pub(super) fn write_time(nanos: i64) -> String {
    let part = |part: Part| part.of_time(nanos, 0);
    format!(
        "{:04}-{:02}-{:02}T{:02}:{:02}:{:02}{}Z",
        part(Part::FullYear),
        part(Part::Month) + 1,
        part(Part::Date),
        part(Part::Hours),
        part(Part::Minutes),
        part(Part::Seconds),
        fraction(nanos.rem_euclid(SECOND)),
    )
}

/// The text of a span, in seconds.
pub(super) fn write_span(nanos: i64) -> String {
    let sign = if nanos < 0 { "-" } else { "" };
    let size = nanos.unsigned_abs();
    let rest = (size % SECOND as u64) as i64;
    format!("{sign}{}{}s", size / SECOND as u64, fraction(rest))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn times_outside_the_calendar_are_none() {
        for text in [
            "2023-02-29T00:00:00Z",
            "2024-13-01T00:00:00Z",
            "2024-00-01T00:00:00Z",
            "2024-01-01T24:00:00Z",
            "2024-01-01T00:00:00",
            "2024-01-01T00:00:00.Z",
            "2024-01-01",
            "2024-01-01T00:00:00+1:00",
            "２024-01-01T00:00:00Z",
        ] {
            assert_eq!(timestamp(text), None, "{text}");
        }
        assert_eq!(timestamp("1970-01-01T01:00:00+01:00"), Some(0));
        assert_eq!(timestamp("1969-12-31T23:59:59.5Z"), Some(-SECOND / 2));
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(128))]
        #[test]
        fn what_is_written_of_a_time_is_read_as_the_same(nanos in -30_000_000_000i64 * 1_000_000..i64::MAX / 2) {
            prop_assert_eq!(timestamp(&write_time(nanos)), Some(nanos));
        }

        #[test]
        fn no_text_is_too_odd_to_be_a_time(text in "\\PC{0,40}") {
            let _ = (timestamp(&text), offset(&text));
        }
    }
}
