//! Semantic versions (`kubernetes.Semver`).

use std::any::Any;
use std::cmp::Ordering;

use cel::common::types::{CelBool, CelInt, CelString, Type};
use cel::common::value::{StaticVal, Val};
use cel::{DeclarationError, Env, add_member_overload, add_overload};

use super::{Outcome, Text, failed, number};

#[derive(Clone, Debug, PartialEq, Eq)]
struct Version {
    numbers: [u64; 3],
    pre: Vec<String>,
}
value!(Version, VERSION, "kubernetes.Semver");

pub(super) fn extension(env: &mut Env) -> Result<(), DeclarationError> {
    env.add_type(VERSION.to_owned())?;
    add_overload!(env, fn semver: (CelString) -> Result<Version>)?;
    add_overload!(env, fn is_semver: (CelString) -> CelBool)?;
    add_member_overload!(env, fn major: (Version) -> CelInt)?;
    add_member_overload!(env, fn minor: (Version) -> CelInt)?;
    add_member_overload!(env, fn patch: (Version) -> CelInt)?;
    add_member_overload!(env, fn version_less: (Version, Version) -> CelBool, name = "isLessThan")?;
    add_member_overload!(env, fn version_greater: (Version, Version) -> CelBool, name = "isGreaterThan")?;
    add_member_overload!(env, fn version_compare: (Version, Version) -> CelInt, name = "compareTo")?;
    Ok(())
}

fn parse_version(text: &str) -> Result<Version, String> {
    let (text, build) = text.split_once('+').map_or((text, None), |(t, b)| (t, Some(b)));
    let (core, pre) = text.split_once('-').map_or((text, None), |(c, p)| (c, Some(p)));
    let parts: Vec<&str> = core.split('.').collect();
    let [major, minor, patch] = parts.as_slice() else {
        return Err("No Major.Minor.Patch elements found".to_owned());
    };
    let mut numbers = [0; 3];
    for ((part, number), name) in [major, minor, patch]
        .into_iter()
        .zip(&mut numbers)
        .zip(["major", "minor", "patch"])
    {
        if part.len() > 1 && part.starts_with('0') {
            return Err(format!(
                "{} number must not contain leading zeroes \"{part}\"",
                capitalized(name)
            ));
        }
        *number = part
            .parse()
            .map_err(|_| format!("Invalid character(s) found in {name} number \"{part}\""))?;
    }
    let names: Vec<String> = pre
        .map(|p| p.split('.').map(str::to_owned).collect())
        .unwrap_or_default();
    let plain = |name: &str| !name.is_empty() && name.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-');
    let build_holds = build.is_none_or(|build| build.split('.').all(plain));
    let numeric_holds = names
        .iter()
        .all(|n| !(n.len() > 1 && n.starts_with('0') && n.bytes().all(|b| b.is_ascii_digit())));
    if !names.iter().all(|name| plain(name)) || !build_holds || !numeric_holds {
        return Err("Invalid character(s) found in prerelease or build meta data".to_owned());
    }
    Ok(Version { numbers, pre: names })
}

fn capitalized(word: &str) -> String {
    let mut characters = word.chars();
    characters.next().map_or_else(String::new, |first| {
        first.to_uppercase().collect::<String>() + characters.as_str()
    })
}

fn compare(one: &Version, other: &Version) -> Ordering {
    one.numbers.cmp(&other.numbers).then_with(|| {
        // Without a pre-release is later than with one.
        match (one.pre.is_empty(), other.pre.is_empty()) {
            (true, true) => return Ordering::Equal,
            (true, false) => return Ordering::Greater,
            (false, true) => return Ordering::Less,
            (false, false) => {}
        }
        for (a, b) in one.pre.iter().zip(&other.pre) {
            let ordering = match (a.parse::<u64>(), b.parse::<u64>()) {
                (Ok(a), Ok(b)) => a.cmp(&b),
                (Ok(_), Err(_)) => Ordering::Less,
                (Err(_), Ok(_)) => Ordering::Greater,
                (Err(_), Err(_)) => a.cmp(b),
            };
            if ordering != Ordering::Equal {
                return ordering;
            }
        }
        one.pre.len().cmp(&other.pre.len())
    })
}

fn semver(text: &Text<'_>) -> Outcome<Version> {
    parse_version(text.inner()).or_else(|why| failed("semver", why))
}

fn is_semver(text: &Text<'_>) -> CelBool {
    CelBool::from(parse_version(text.inner()).is_ok())
}

fn part(this: &Version, index: usize) -> CelInt {
    let number = this.numbers.get(index).copied().unwrap_or_default();
    CelInt::from(i64::try_from(number).unwrap_or(i64::MAX))
}

fn major(this: &Version) -> CelInt {
    part(this, 0)
}

fn minor(this: &Version) -> CelInt {
    part(this, 1)
}

fn patch(this: &Version) -> CelInt {
    part(this, 2)
}

fn version_less(this: &Version, other: &Version) -> CelBool {
    CelBool::from(compare(this, other) == Ordering::Less)
}

fn version_greater(this: &Version, other: &Version) -> CelBool {
    CelBool::from(compare(this, other) == Ordering::Greater)
}

fn version_compare(this: &Version, other: &Version) -> CelInt {
    number(compare(this, other))
}
