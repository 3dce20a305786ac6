//! Numbers as a person reads them in an explanation.

/// `12,345`.
pub(crate) fn count(number: u64) -> String {
    let digits = number.to_string();
    let mut text = String::with_capacity(digits.len() + digits.len() / 3);
    for (index, digit) in digits.chars().enumerate() {
        if index > 0 && (digits.len() - index).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
    }
    text
}

/// A number with two significant digits where it is below 10, and none after the point from 100 on.
pub(crate) fn short(value: f64) -> String {
    if !value.is_finite() {
        return "∞".to_owned();
    }
    let size = value.abs();
    if size >= 1e15 {
        format!("{value:.0e}")
    } else if size >= 100.0 {
        format!("{value:.0}")
    } else if size >= 1.0 {
        trimmed(format!("{value:.1}"))
    } else if size >= 0.1 {
        trimmed(format!("{value:.2}"))
    } else if size >= 0.01 {
        trimmed(format!("{value:.3}"))
    } else if size >= 0.0001 {
        trimmed(format!("{value:.5}"))
    } else if value == 0.0 {
        "0".to_owned()
    } else {
        format!("{value:.1e}")
    }
}

fn trimmed(text: String) -> String {
    text.trim_end_matches('0').trim_end_matches('.').to_owned()
}

/// A share as a percentage: `4.1 %`.
pub(crate) fn percent(part: u64, whole: u64) -> String {
    format!("{} %", short(100.0 * part as f64 / whole.max(1) as f64))
}

/// A duration: `45 s`, `12 min`, `3 h`, `2 days`.
pub(crate) fn seconds(seconds: f64) -> String {
    match seconds {
        s if s < 1.0 => "1 s".to_owned(),
        s if s < 100.0 => format!("{s:.0} s"),
        s if s < 6000.0 => format!("{:.0} min", s / 60.0),
        s if s < 172_800.0 => format!("{:.0} h", s / 3600.0),
        s => format!("{} days", count((s / 86_400.0).round() as u64)),
    }
}

/// `at most 1 in 100 healthy releases would ever look this bad`.
pub(crate) fn promise(alpha: f64) -> String {
    let one_in = count((1.0 / alpha).floor().max(1.0) as u64);
    format!("at most 1 in {one_in} healthy releases would ever look this bad")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_read_as_people_write_them() {
        assert_eq!(count(1_204), "1,204");
        assert_eq!(count(10_911), "10,911");
        assert_eq!(count(7), "7");
        assert_eq!(percent(49, 1204), "4.1 %");
        assert_eq!(percent(22, 10_911), "0.2 %");
        assert_eq!(percent(0, 0), "0 %");
        assert_eq!(percent(30, 100), "30 %");
        assert_eq!(short(1234.5), "1234");
        assert_eq!(seconds(45.4), "45 s");
        assert_eq!(seconds(720.0), "12 min");
        assert_eq!(seconds(7200.0), "2 h");
        assert_eq!(
            promise(0.01),
            "at most 1 in 100 healthy releases would ever look this bad"
        );
    }
}
