//! Version ranges as Masterminds' semver reads them, which is what `spec.ref.semver` means in Flux.
//!
//! `||` separates alternatives; spaces and commas mean *and*; operators are `= != > < >= <= ~ ^` (and `=>`, `=<`,
//! `~>`); `1.x`, `1.*` and `1` are wildcards; `1.2 - 2.0` is a closed range. A pre-release only matches when some
//! bound of the alternative names one (`>=1.0.0-0` opens the door). Tags may have a leading `v` and may leave out
//! minor and patch.

use semver::{Prerelease, Version};

/// A parsed range.
#[derive(Debug, Clone)]
pub(crate) struct Range(Vec<Vec<Bound>>);

#[derive(Debug, Clone)]
struct Bound {
    op: Op,
    version: Version,
    /// How many of major, minor, patch were written.
    precision: u8,
}

#[derive(Debug, Clone, Copy, PartialEq)]
enum Op {
    Equal,
    NotEqual,
    Greater,
    Less,
    GreaterOrEqual,
    LessOrEqual,
    Tilde,
    Caret,
}

/// Longest first, so that `>=` is not read as `>`.
const OPERATORS: [(&str, Op); 11] = [
    ("!=", Op::NotEqual),
    (">=", Op::GreaterOrEqual),
    ("=>", Op::GreaterOrEqual),
    ("<=", Op::LessOrEqual),
    ("=<", Op::LessOrEqual),
    ("~>", Op::Tilde),
    ("=", Op::Equal),
    (">", Op::Greater),
    ("<", Op::Less),
    ("~", Op::Tilde),
    ("^", Op::Caret),
];

/// Reads a tag as a version: `v1.2.3`, `1.2`, `v2`. `None` if it is none.
pub(crate) fn version(tag: &str) -> Option<Version> {
    partial(tag.strip_prefix('v').unwrap_or(tag)).and_then(|(v, wild, _)| (!wild).then_some(v))
}

/// Version, whether it has a wildcard or is empty, and how many numbers were written.
fn partial(text: &str) -> Option<(Version, bool, u8)> {
    let (core, build) = text.split_once('+').map_or((text, ""), |(a, b)| (a, b));
    let (core, pre) = core.split_once('-').map_or((core, ""), |(a, b)| (a, b));
    let mut numbers = [0u64; 3];
    let mut written = 0u8;
    let mut wild = core.is_empty();
    for (i, part) in core.split('.').enumerate() {
        if i > 2 {
            return None;
        }
        if matches!(part, "x" | "X" | "*" | "") {
            wild = true;
            continue;
        }
        if wild || !part.bytes().all(|b| b.is_ascii_digit()) {
            return None;
        }
        numbers[i] = part.parse().ok()?;
        written += 1;
    }
    let mut version = Version::new(numbers[0], numbers[1], numbers[2]);
    if !pre.is_empty() {
        version.pre = Prerelease::new(pre).ok()?;
    }
    if !build.is_empty() {
        version.build = semver::BuildMetadata::new(build).ok()?;
    }
    Some((version, wild, written))
}

impl Range {
    /// Reads a range; the error is a sentence.
    pub(crate) fn parse(text: &str) -> Result<Self, String> {
        text.split("||")
            .map(|alternative| alternative_bounds(alternative, text))
            .collect::<Result<_, _>>()
            .map(Range)
    }

    /// Whether a version lies in the range.
    pub(crate) fn matches(&self, version: &Version) -> bool {
        self.0.iter().any(|bounds| {
            let pre_allowed = version.pre.is_empty() || bounds.iter().any(|b| !b.version.pre.is_empty());
            pre_allowed && bounds.iter().all(|b| b.holds(version))
        })
    }
}

fn alternative_bounds(text: &str, whole: &str) -> Result<Vec<Bound>, String> {
    let bad = |part: &str| format!("'{part}' in the semver range '{whole}' is not a version bound");
    let spaced = text.replace(',', " ");
    let words: Vec<&str> = spaced.split_whitespace().collect();
    let mut bounds = Vec::new();
    let mut i = 0;
    while i < words.len() {
        if words.get(i + 1) == Some(&"-") {
            let upper = words.get(i + 2).ok_or_else(|| bad(words[i]))?;
            bounds.push(bound(Op::GreaterOrEqual, words[i]).ok_or_else(|| bad(words[i]))?);
            bounds.push(bound(Op::LessOrEqual, upper).ok_or_else(|| bad(upper))?);
            i += 3;
            continue;
        }
        let (op, rest) = OPERATORS
            .iter()
            .find_map(|(sign, op)| words[i].strip_prefix(sign).map(|rest| (*op, rest)))
            .unwrap_or((Op::Equal, words[i]));
        // `>= 1.0` with a space between.
        let operand = if rest.is_empty() {
            i += 1;
            words.get(i).copied().ok_or_else(|| bad(words[i - 1]))?
        } else {
            rest
        };
        bounds.push(bound(op, operand).ok_or_else(|| bad(operand))?);
        i += 1;
    }
    if bounds.is_empty() {
        Err(bad(text))
    } else {
        Ok(bounds)
    }
}

fn bound(op: Op, text: &str) -> Option<Bound> {
    let (version, _, precision) = partial(text.strip_prefix('v').unwrap_or(text))?;
    Some(Bound {
        op,
        version,
        precision,
    })
}

impl Bound {
    fn holds(&self, v: &Version) -> bool {
        let low = v.cmp_precedence(&self.version).is_ge();
        match self.op {
            Op::Equal if self.precision < 3 => low && self.below_next(v, self.precision),
            Op::NotEqual if self.precision < 3 => !(low && self.below_next(v, self.precision)),
            Op::Equal => v.cmp_precedence(&self.version).is_eq(),
            Op::NotEqual => v.cmp_precedence(&self.version).is_ne(),
            Op::Greater if self.precision < 3 => !self.below_next(v, self.precision),
            Op::Greater => v.cmp_precedence(&self.version).is_gt(),
            Op::GreaterOrEqual => low,
            Op::Less => v.cmp_precedence(&self.version).is_lt(),
            Op::LessOrEqual if self.precision < 3 => self.below_next(v, self.precision),
            Op::LessOrEqual => v.cmp_precedence(&self.version).is_le(),
            Op::Tilde => low && self.below_next(v, self.precision.min(2)),
            Op::Caret => {
                let leading_zeros = match (self.version.major, self.version.minor) {
                    (0, 0) => 2,
                    (0, _) => 1,
                    _ => 0,
                };
                low && self.below_next(v, (leading_zeros + 1).min(self.precision))
            }
        }
    }

    /// Whether `v` is below the version that follows when the number at `precision` is raised by one.
    fn below_next(&self, v: &Version, precision: u8) -> bool {
        let b = &self.version;
        match precision {
            0 => true,
            1 => v.major <= b.major,
            2 => (v.major, v.minor) <= (b.major, b.minor),
            _ => (v.major, v.minor, v.patch) <= (b.major, b.minor, b.patch),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_match_the_versions_that_masterminds_semver_matches() {
        let cases: &[(&str, &str, bool)] = &[
            ("*", "1.2.3", true),
            ("*", "1.2.3-beta.1", false),
            (">=1.0.0-0", "1.2.3-beta.1", true),
            (">=1.0.0 <2.0.0", "1.9.9", true),
            (">=1.0.0, <2.0.0", "2.0.0", false),
            (">= 1.0.0", "1.0.0", true),
            ("1.x", "1.9.0", true),
            ("1.x", "2.0.0", false),
            ("1.2", "1.2.9", true),
            ("^1.2.3", "1.9.0", true),
            ("^1.2.3", "2.0.0", false),
            ("^0.2.3", "0.2.9", true),
            ("^0.2.3", "0.3.0", false),
            ("^0.0.3", "0.0.4", false),
            ("^0.0", "0.0.9", true),
            ("^0", "0.9.0", true),
            ("~1.2.3", "1.2.9", true),
            ("~1.2.3", "1.3.0", false),
            ("~1", "1.9.0", true),
            ("1.2 - 2.0", "2.0.5", true),
            ("1.2 - 2.0.0", "2.0.5", false),
            ("<1.0 || >=3", "2.5.0", false),
            ("<1.0 || >=3", "3.0.0", true),
            ("!=1.5.x", "1.5.2", false),
            (">1", "1.5.0", false),
            (">1", "2.0.0", true),
            ("<=1", "1.5.0", true),
            ("1.0.0", "1.0.0+build", true),
        ];
        for (range, text, want) in cases {
            let v = version(text).unwrap();
            assert_eq!(
                Range::parse(range).unwrap().matches(&v),
                *want,
                "{text} in {range}"
            );
        }
    }

    #[test]
    fn a_range_that_cannot_be_read_names_the_part() {
        let error = Range::parse(">=1.0 <two").unwrap_err();
        assert!(error.contains("'two'"), "{error}");
    }

    #[test]
    fn tags_may_carry_a_v_and_leave_numbers_out_but_not_be_wildcards() {
        assert_eq!(version("v1.2"), Some(Version::new(1, 2, 0)));
        assert_eq!(version("release-1"), None);
        assert_eq!(version("1.x"), None);
    }
}
