//! Small shared types: durations as text, open enumerations, references by name.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use std::fmt;

/// A duration in Go's notation (`1h30m`, `1.5s`, `300ms`), kept as it was written.
///
/// Parsed on use by [`Duration::parse`], so that an object with an unusable duration can still be read, shown and
/// refused with a message.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Duration(pub String);

/// The schema pattern of a [`Duration`], as upstream has it.
const DURATION_PATTERN: &str = r"^([0-9]+(\.[0-9]+)?(ms|s|m|h))+$";

impl JsonSchema for Duration {
    fn inline_schema() -> bool {
        true
    }

    fn schema_name() -> std::borrow::Cow<'static, str> {
        "Duration".into()
    }

    fn json_schema(_: &mut schemars::SchemaGenerator) -> schemars::Schema {
        schemars::json_schema!({"type": "string", "pattern": DURATION_PATTERN})
    }
}

/// Text that is not a duration.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DurationError {
    /// The text as found.
    pub text: String,
}

impl fmt::Display for DurationError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{:?} is not a duration; write it like 30s, 1m30s or 500ms",
            self.text
        )
    }
}

impl std::error::Error for DurationError {}

impl Duration {
    /// The length of time, by the rules of Go's `time.ParseDuration` for durations that are not negative: a sequence of
    /// decimal numbers, each with a unit out of `ns us µs ms s m h`; a lone `0` is allowed.
    pub fn parse(&self) -> Result<std::time::Duration, DurationError> {
        parse_duration(&self.0)
    }

    /// The length of time, or `default` when the text cannot be parsed. For places where the schema has already
    /// refused what cannot be parsed.
    pub fn parse_or(&self, default: std::time::Duration) -> std::time::Duration {
        self.parse().unwrap_or(default)
    }
}

/// Go's `time.ParseDuration`, for durations that are not negative.
pub(crate) fn parse_duration(text: &str) -> Result<std::time::Duration, DurationError> {
    let error = || DurationError {
        text: text.to_owned(),
    };
    let mut rest = text.strip_prefix('+').unwrap_or(text);
    if rest == "0" {
        return Ok(std::time::Duration::ZERO);
    }
    if rest.is_empty() {
        return Err(error());
    }
    let mut total_ns: u128 = 0;
    while !rest.is_empty() {
        let digits = rest.find(|c: char| !c.is_ascii_digit()).ok_or_else(error)?;
        let whole = &rest[..digits];
        rest = &rest[digits..];
        let mut fraction = "";
        if let Some(after) = rest.strip_prefix('.') {
            let end = after.find(|c: char| !c.is_ascii_digit()).ok_or_else(error)?;
            fraction = &after[..end];
            rest = &after[end..];
        }
        if whole.is_empty() && fraction.is_empty() {
            return Err(error());
        }
        let unit_end = rest
            .find(|c: char| c == '.' || c.is_ascii_digit())
            .unwrap_or(rest.len());
        let unit_ns: u128 = match &rest[..unit_end] {
            "ns" => 1,
            "us" | "µs" | "μs" => 1_000,
            "ms" => 1_000_000,
            "s" => 1_000_000_000,
            "m" => 60_000_000_000,
            "h" => 3_600_000_000_000,
            _ => return Err(error()),
        };
        rest = &rest[unit_end..];
        let whole: u128 = if whole.is_empty() {
            0
        } else {
            whole.parse().map_err(|_| error())?
        };
        total_ns = whole
            .checked_mul(unit_ns)
            .and_then(|ns| total_ns.checked_add(ns))
            .ok_or_else(error)?;
        let mut scale = unit_ns;
        for digit in fraction.bytes() {
            scale /= 10;
            total_ns += u128::from(digit - b'0') * scale;
        }
    }
    // Go's durations end at i64::MAX nanoseconds (292 years).
    match i64::try_from(total_ns) {
        Ok(ns) => Ok(std::time::Duration::from_nanos(ns.unsigned_abs())),
        Err(_) => Err(error()),
    }
}

impl fmt::Display for Duration {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl From<&str> for Duration {
    fn from(text: &str) -> Self {
        Self(text.to_owned())
    }
}

impl From<std::time::Duration> for Duration {
    /// Writes Go's form: `1h2m3.5s`, `250ms`, `0s`.
    fn from(duration: std::time::Duration) -> Self {
        let ns = duration.as_nanos();
        let fraction = |value: u128, unit: u128, name: &str| {
            let mut text = format!("{}", value / unit);
            let rest = value % unit;
            if rest > 0 {
                let width = unit.ilog10() as usize;
                let digits = format!("{rest:0width$}");
                text.push('.');
                text.push_str(digits.trim_end_matches('0'));
            }
            text + name
        };
        Self(match ns {
            0 => "0s".to_owned(),
            1..1_000 => format!("{ns}ns"),
            1_000..1_000_000 => fraction(ns, 1_000, "µs"),
            1_000_000..1_000_000_000 => fraction(ns, 1_000_000, "ms"),
            _ => {
                let (hours, minutes) = (ns / 3_600_000_000_000, ns / 60_000_000_000 % 60);
                let seconds = fraction(ns % 60_000_000_000, 1_000_000_000, "s");
                match (hours, minutes) {
                    (0, 0) => seconds,
                    (0, m) => format!("{m}m{seconds}"),
                    (h, m) => format!("{h}h{m}m{seconds}"),
                }
            }
        })
    }
}

/// An object of the same namespace, by name.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize, JsonSchema)]
pub struct LocalObjectReference {
    /// Name of the object.
    pub name: String,
}

/// The schema of a port that is a number or a name.
pub(crate) fn int_or_string(_: &mut schemars::SchemaGenerator) -> schemars::Schema {
    schemars::json_schema!({"x-kubernetes-int-or-string": true})
}

/// Declares an enumeration of strings that carries unknown values instead of failing on them.
///
/// The first variant is the `Default`. Unknown values are kept in `Other`; the JSON schema lists the known ones only.
#[macro_export]
macro_rules! open_enum {
    ($(#[$meta:meta])* pub enum $name:ident { $(#[$first_meta:meta])* $first:ident = $first_text:literal, $($(#[$variant_meta:meta])* $variant:ident = $text:literal,)* }) => {
        $(#[$meta])*
        #[derive(Clone, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord, ::serde::Serialize, ::serde::Deserialize)]
        #[serde(from = "String", into = "String")]
        pub enum $name {
            $(#[$first_meta])*
            #[default]
            $first,
            $($(#[$variant_meta])* $variant,)*
            /// A value that this version does not know.
            Other(String),
        }

        impl $name {
            /// The values that this version knows.
            pub const KNOWN: &'static [&'static str] = &[$first_text, $($text),*];

            /// The value as it stands in the object.
            pub fn as_str(&self) -> &str {
                match self {
                    Self::$first => $first_text,
                    $(Self::$variant => $text,)*
                    Self::Other(text) => text,
                }
            }
        }

        impl From<String> for $name {
            fn from(text: String) -> Self {
                match text.as_str() {
                    $first_text => Self::$first,
                    $($text => Self::$variant,)*
                    _ => Self::Other(text),
                }
            }
        }

        impl From<$name> for String {
            fn from(value: $name) -> Self {
                match value {
                    $name::Other(text) => text,
                    known => known.as_str().to_owned(),
                }
            }
        }

        impl ::std::fmt::Display for $name {
            fn fmt(&self, f: &mut ::std::fmt::Formatter<'_>) -> ::std::fmt::Result {
                f.write_str(self.as_str())
            }
        }

        impl ::schemars::JsonSchema for $name {
            fn inline_schema() -> bool {
                true
            }

            fn schema_name() -> ::std::borrow::Cow<'static, str> {
                stringify!($name).into()
            }

            fn json_schema(_: &mut ::schemars::SchemaGenerator) -> ::schemars::Schema {
                ::schemars::json_schema!({"type": "string", "enum": Self::KNOWN})
            }
        }
    };
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn durations_are_read_as_go_reads_them() {
        for (text, expected_ms) in [
            ("1m", 60_000.0),
            ("1m30s", 90_000.0),
            ("1.5h", 5_400_000.0),
            ("250ms", 250.0),
            ("0", 0.0),
            (".5s", 500.0),
            ("1.s", 1000.0),
            ("100us", 0.1),
            ("1h1m1s1ms", 3_661_001.0),
        ] {
            let parsed = Duration::from(text).parse();
            assert_eq!(
                parsed.map(|d| d.as_secs_f64() * 1000.0),
                Ok(expected_ms),
                "{text}"
            );
        }
        for text in [
            "",
            "1",
            "s",
            "1x",
            "-1s",
            "1m ",
            ".s",
            "1..5s",
            "9223372036854775808ns",
            "99999999999h",
        ] {
            assert_eq!(
                Duration::from(text).parse(),
                Err(DurationError {
                    text: text.to_owned()
                }),
                "{text:?}"
            );
        }
    }

    #[test]
    fn durations_are_written_as_go_writes_them() {
        for (ns, text) in [
            (0, "0s"),
            (1, "1ns"),
            (1_100, "1.1µs"),
            (2_200_000, "2.2ms"),
            (3_300_000_000, "3.3s"),
            (245_000_000_000, "4m5s"),
            (3_600_000_000_000, "1h0m0s"),
        ] {
            assert_eq!(Duration::from(std::time::Duration::from_nanos(ns)).0, text);
        }
    }

    proptest! {
        #[test]
        fn a_written_duration_is_read_back_unchanged(ns in 0..=i64::MAX.unsigned_abs()) {
            let duration = std::time::Duration::from_nanos(ns);
            prop_assert_eq!(Duration::from(duration).parse(), Ok(duration));
        }
    }
}
