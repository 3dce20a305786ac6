//! Times as text: a strftime of the parts that access logs use, in UTC, parsed when the configuration arrives.

use std::fmt::Write;
use std::time::Duration;

use crate::calendar;
use crate::error::Refusal;

/// A parsed time format.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TimeFormat(Box<[Part]>);

#[derive(Clone, Debug, PartialEq, Eq)]
enum Part {
    Literal(Box<str>),
    Year,
    ShortYear,
    Month,
    MonthName,
    Day,
    DayPadded,
    DayOfYear,
    WeekdayName,
    Hour,
    Minute,
    Second,
    /// Digits of the second's fraction.
    Fraction(usize),
    /// Seconds with that many digits of fraction.
    SecondFraction(usize),
    Epoch,
    /// Seconds since 1970 with that many digits of fraction, as Envoy's `%s` with `%3f` would give.
    Offset,
    Zone,
}

/// A moment of the Gregorian calendar in UTC.
struct Civil {
    year: i64,
    month: u32,
    day: u32,
    day_of_year: u32,
    weekday: usize,
    second_of_day: u64,
}

const MONTHS: [&str; 12] = [
    "Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec",
];
const WEEKDAYS: [&str; 7] = ["Thu", "Fri", "Sat", "Sun", "Mon", "Tue", "Wed"];

fn civil(seconds: u64) -> Civil {
    let days = (seconds / 86_400) as i64;
    let (year, month, day) = calendar::date(days);
    let leap = (year % 4 == 0 && year % 100 != 0) || year % 400 == 0;
    let before = [0, 31, 59, 90, 120, 151, 181, 212, 243, 273, 304, 334][(month - 1) as usize];
    Civil {
        year,
        month,
        day,
        day_of_year: before + day + u32::from(leap && month > 2),
        weekday: (days % 7) as usize,
        second_of_day: seconds % 86_400,
    }
}

/// A moment as the `date` field has it (RFC 9110 section 5.6.7), in seconds since 1970.
pub(crate) fn http_date(seconds: u64) -> String {
    let at = civil(seconds);
    format!(
        "{}, {:02} {} {:04} {:02}:{:02}:{:02} GMT",
        WEEKDAYS[at.weekday],
        at.day,
        MONTHS[(at.month - 1) as usize],
        at.year,
        at.second_of_day / 3600,
        at.second_of_day / 60 % 60,
        at.second_of_day % 60
    )
}

impl TimeFormat {
    /// RFC 3339 in UTC with milliseconds, the default.
    pub fn rfc3339() -> Self {
        use Part::{Day, Hour, Literal, Minute, Month, SecondFraction, Year};
        let colon = || Literal(":".into());
        let dash = || Literal("-".into());
        Self(Box::new([
            Year,
            dash(),
            Month,
            dash(),
            Day,
            Literal("T".into()),
            Hour,
            colon(),
            Minute,
            colon(),
            SecondFraction(3),
            Literal("Z".into()),
        ]))
    }

    /// Parses a format; conversions that are not known are refused.
    pub fn parse(text: &str) -> Result<Self, Refusal> {
        let mut parts = Vec::new();
        let mut literal = String::new();
        let mut chars = text.chars().peekable();
        let refused = |what: &str| Refusal::new("", format!("time format {text:?}: {what}"));
        while let Some(char) = chars.next() {
            if char != '%' {
                literal.push(char);
                continue;
            }
            let mut conversion = chars.next().ok_or_else(|| refused("ends with %"))?;
            let extended = conversion == 'E';
            if extended {
                conversion = chars.next().ok_or_else(|| refused("ends with %E"))?;
            }
            let mut digits = None;
            if let Some(digit) = conversion.to_digit(10) {
                if !(1..=9).contains(&digit) {
                    return Err(refused("a fraction has 1 to 9 digits"));
                }
                digits = Some(digit as usize);
                conversion = chars.next().ok_or_else(|| refused("ends within a conversion"))?;
            }
            let part = match (conversion, digits, extended) {
                ('f', digits, false) => Part::Fraction(digits.unwrap_or(9)),
                ('S', Some(digits), true) => Part::SecondFraction(digits),
                (_, Some(_), _) | (_, _, true) => return Err(refused("a number of digits belongs to f")),
                ('%', ..) => {
                    literal.push('%');
                    continue;
                }
                ('n', ..) => {
                    literal.push('\n');
                    continue;
                }
                ('t', ..) => {
                    literal.push('\t');
                    continue;
                }
                ('Y', ..) => Part::Year,
                ('y', ..) => Part::ShortYear,
                ('m', ..) => Part::Month,
                ('b' | 'h', ..) => Part::MonthName,
                ('d', ..) => Part::Day,
                ('e', ..) => Part::DayPadded,
                ('j', ..) => Part::DayOfYear,
                ('a', ..) => Part::WeekdayName,
                ('H', ..) => Part::Hour,
                ('M', ..) => Part::Minute,
                ('S', ..) => Part::Second,
                ('s', ..) => Part::Epoch,
                ('z', ..) => Part::Offset,
                ('Z', ..) => Part::Zone,
                ('F' | 'T' | 'D' | 'R', ..) => {
                    flush(&mut literal, &mut parts);
                    let whole = match conversion {
                        'F' => "%Y-%m-%d",
                        'T' => "%H:%M:%S",
                        'D' => "%m/%d/%y",
                        _ => "%H:%M",
                    };
                    parts.extend(Self::parse(whole)?.0);
                    continue;
                }
                (other, ..) => return Err(refused(&format!("the conversion %{other} is not supported"))),
            };
            flush(&mut literal, &mut parts);
            parts.push(part);
        }
        flush(&mut literal, &mut parts);
        Ok(Self(parts.into()))
    }

    /// Writes a time, given since 1970.
    pub fn write(&self, time: Duration, out: &mut String) {
        let civil = civil(time.as_secs());
        let second = civil.second_of_day;
        for part in &self.0 {
            // Writing to a String cannot fail.
            let _ = match part {
                Part::Literal(text) => out.write_str(text),
                Part::Year => write!(out, "{:04}", civil.year),
                Part::ShortYear => write!(out, "{:02}", civil.year % 100),
                Part::Month => write!(out, "{:02}", civil.month),
                Part::MonthName => out.write_str(MONTHS[(civil.month - 1) as usize]),
                Part::Day => write!(out, "{:02}", civil.day),
                Part::DayPadded => write!(out, "{:2}", civil.day),
                Part::DayOfYear => write!(out, "{:03}", civil.day_of_year),
                Part::WeekdayName => out.write_str(WEEKDAYS[civil.weekday]),
                Part::Hour => write!(out, "{:02}", second / 3600),
                Part::Minute => write!(out, "{:02}", second / 60 % 60),
                Part::Second => write!(out, "{:02}", second % 60),
                Part::Fraction(digits) => fraction(time, *digits, out),
                Part::SecondFraction(digits) => {
                    let _ = write!(out, "{:02}.", second % 60);
                    fraction(time, *digits, out)
                }
                Part::Epoch => write!(out, "{}", time.as_secs()),
                Part::Offset => out.write_str("+0000"),
                Part::Zone => out.write_str("UTC"),
            };
        }
    }
}

fn flush(literal: &mut String, parts: &mut Vec<Part>) {
    if !literal.is_empty() {
        parts.push(Part::Literal(std::mem::take(literal).into()));
    }
}

fn fraction(time: Duration, digits: usize, out: &mut String) -> std::fmt::Result {
    let value = u64::from(time.subsec_nanos()) / 10u64.pow(9 - digits as u32);
    write!(out, "{value:0digits$}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_date_field_is_written_as_rfc_9110_has_it() {
        assert_eq!(http_date(784_111_777), "Sun, 06 Nov 1994 08:49:37 GMT");
        assert_eq!(http_date(0), "Thu, 01 Jan 1970 00:00:00 GMT");
    }

    #[test]
    fn times_are_written_as_strftime_writes_them_in_utc() {
        let time = Duration::new(1_709_210_096, 7_008_009); // 2024-02-29T12:34:56.007008009Z, a Thursday
        let cases = [
            ("%Y-%m-%dT%H:%M:%S.%3fZ", "2024-02-29T12:34:56.007Z"),
            ("%Y/%m/%dT%H:%M:%S%z %s", "2024/02/29T12:34:56+0000 1709210096"),
            ("%s.%6f", "1709210096.007008"),
            ("%f|%9f|%1f", "007008009|007008009|0"),
            (
                "%a, %e %b %y %j %F %T %D %R",
                "Thu, 29 Feb 24 060 2024-02-29 12:34:56 02/29/24 12:34",
            ),
            ("100%% %Z", "100% UTC"),
            ("%E3S", "56.007"),
        ];
        for (format, expected) in cases {
            let mut out = String::new();
            TimeFormat::parse(format).unwrap().write(time, &mut out);
            assert_eq!(out, expected, "{format}");
        }
        let mut out = String::new();
        TimeFormat::rfc3339().write(Duration::ZERO, &mut out);
        assert_eq!(out, "1970-01-01T00:00:00.000Z");
        for bad in ["%", "%E", "%0f", "%Q", "%3Y"] {
            assert!(TimeFormat::parse(bad).is_err(), "{bad}");
        }
    }
}
