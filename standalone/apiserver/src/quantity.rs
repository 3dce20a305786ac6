//! Resource quantities in Kubernetes' canonical form (`0.5` is `500m`, `1024Mi` is `1Gi`).

#[derive(Clone, Copy, PartialEq, Eq)]
enum Format {
    Binary,
    Decimal,
    Exponent,
}

const DECIMAL: [(&str, i32); 10] = [
    ("n", -9),
    ("u", -6),
    ("m", -3),
    ("", 0),
    ("k", 3),
    ("M", 6),
    ("G", 9),
    ("T", 12),
    ("P", 15),
    ("E", 18),
];
const BINARY: [(&str, u32); 6] = [
    ("Ki", 10),
    ("Mi", 20),
    ("Gi", 30),
    ("Ti", 40),
    ("Pi", 50),
    ("Ei", 60),
];

/// The value in units of 10^-9 and its format; fractions below a nano are rounded up, as Kubernetes does.
fn parse(text: &str) -> Option<(i128, Format)> {
    let text = text.trim();
    let (negative, rest) = match text.strip_prefix('-') {
        Some(rest) => (true, rest),
        None => (false, text.strip_prefix('+').unwrap_or(text)),
    };
    let digits_end = rest
        .find(|c: char| !c.is_ascii_digit() && c != '.')
        .unwrap_or(rest.len());
    let (number, suffix) = rest.split_at(digits_end);
    let (whole, fraction) = number.split_once('.').unwrap_or((number, ""));
    if (whole.is_empty() && fraction.is_empty())
        || fraction.contains('.')
        || whole.len() + fraction.len() > 28
    {
        return None;
    }
    let mantissa: i128 = format!("{whole}{fraction}").parse().ok()?;
    let scale = i32::try_from(fraction.len()).ok()?;
    let (power, shift, format) = if let Some((_, shift)) = BINARY.iter().find(|(s, _)| *s == suffix) {
        (0, *shift, Format::Binary)
    } else if let Some((_, power)) = DECIMAL.iter().find(|(s, _)| *s == suffix) {
        (*power, 0, Format::Decimal)
    } else {
        let exponent: i32 = suffix.strip_prefix(['e', 'E'])?.parse().ok()?;
        (exponent, 0, Format::Exponent)
    };
    let exponent = power - scale + 9;
    let scaled = mantissa.checked_mul(1i128.checked_shl(shift)?)?;
    let nanos = if exponent >= 0 {
        scaled.checked_mul(10i128.checked_pow(u32::try_from(exponent).ok()?)?)?
    } else {
        let divisor = 10i128.checked_pow(u32::try_from(-exponent).ok()?)?;
        scaled.div_euclid(divisor) + i128::from(scaled.rem_euclid(divisor) != 0)
    };
    Some((if negative { -nanos } else { nanos }, format))
}

/// What is said of a text that is no quantity.
pub(crate) const MALFORMED: &str =
    "quantities must match the regular expression '^([+-]?[0-9.]+)([eEinumkKMGTP]*[-+]?[0-9]*)$'";

/// The canonical spelling; `None` where the text is no quantity.
pub(crate) fn canonical(text: &str) -> Option<String> {
    let (nanos, format) = parse(text)?;
    if nanos == 0 {
        return Some("0".to_owned());
    }
    const NANO: i128 = 1_000_000_000;
    if format == Format::Binary && nanos % NANO == 0 && (nanos / NANO).abs() >= 1024 {
        let mut value = nanos / NANO;
        let mut suffix = "";
        for (name, _) in BINARY {
            if value % 1024 != 0 {
                break;
            }
            value /= 1024;
            suffix = name;
        }
        return Some(format!("{value}{suffix}"));
    }
    let mut value = nanos;
    let mut at = 0;
    while value % 1000 == 0 && at + 1 < DECIMAL.len() {
        value /= 1000;
        at += 1;
    }
    let (suffix, power) = DECIMAL.get(at)?;
    Some(if format == Format::Exponent && *power != 0 {
        format!("{value}e{power}")
    } else {
        format!("{value}{suffix}")
    })
}

/// The value in billionths, for comparisons.
pub(crate) fn nanos(text: &str) -> Option<i128> {
    parse(text).map(|(n, _)| n)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quantities_are_written_canonically() {
        for (given, wanted) in [
            ("0.5", "500m"),
            ("1000m", "1"),
            ("1024Mi", "1Gi"),
            ("1.5Gi", "1536Mi"),
            ("100Mi", "100Mi"),
            ("1000", "1k"),
            ("2e3", "2e3"),
            ("0", "0"),
            ("512", "512"),
            ("-1", "-1"),
            (".5", "500m"),
        ] {
            assert_eq!(canonical(given).as_deref(), Some(wanted), "{given}");
        }
        for bad in ["", "abc", "1.2.3", "5Xi", "1e"] {
            assert_eq!(canonical(bad), None, "{bad}");
        }
    }
}
