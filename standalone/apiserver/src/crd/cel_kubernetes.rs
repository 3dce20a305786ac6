//! What Kubernetes adds to CEL: quantities, URLs, addresses, networks and versions as values, and some functions of lists and texts.
//!
//! Each value is made of a text by a function of its own name (`quantity(self)`), which fails in Kubernetes' words where the text is none,
//! and has a question that never fails (`isQuantity(self)`). Not here, and so refused with the definition that calls them: `format.*`,
//! the authorizer, versions that need normalizing.

use std::any::Any;
use std::cmp::Ordering;

use cel::common::types::{CelBool, CelDouble, CelInt, CelString, Type};
use cel::common::value::{StaticVal, Val};
use cel::{DeclarationError, Env, ExecutionError, add_member_overload, add_overload};

use crate::quantity;

/// Names of the functions, for the list of those that rules may call.
pub(super) const FUNCTIONS: [&str; 51] = [
    "quantity",
    "isQuantity",
    "isLessThan",
    "isGreaterThan",
    "compareTo",
    "sign",
    "isInteger",
    "asInteger",
    "asApproximateFloat",
    "add",
    "sub",
    "url",
    "isURL",
    "getScheme",
    "getHost",
    "getHostname",
    "getPort",
    "getEscapedPath",
    "ip",
    "isIP",
    "ip.isCanonical",
    "isCanonical",
    "family",
    "isUnspecified",
    "isLoopback",
    "isLinkLocalMulticast",
    "isLinkLocalUnicast",
    "isGlobalUnicast",
    "cidr",
    "isCIDR",
    "containsIP",
    "containsCIDR",
    "masked",
    "prefixLength",
    "semver",
    "isSemver",
    "major",
    "minor",
    "patch",
    "sum",
    "min",
    "max",
    "isSorted",
    "find",
    "findAll",
    "slice",
    "sortBy",
    "lists.range",
    "range",
    "lastIndexOf",
    "indexOf",
];

type Outcome<T> = Result<T, ExecutionError>;
type Text<'v> = CelString<'v>;

fn failed<T>(function: &str, message: impl ToString) -> Outcome<T> {
    Err(ExecutionError::function_error(function, message.to_string()))
}

/// A value of a type of its own: how it is copied, compared and found again.
macro_rules! value {
    ($type:ident, $static:ident, $name:literal) => {
        static $static: Type = Type::new_unspecified_type($name);

        impl Val for $type {
            fn get_type(&self) -> &Type {
                &$static
            }
            fn cel_type() -> &'static Type {
                &$static
            }
            fn equals(&self, other: &dyn Val) -> bool {
                other
                    .downcast_ref::<$type>()
                    .is_some_and(|other| other == self)
            }
            fn clone_as_boxed<'v>(&self) -> Box<dyn Val + 'v> {
                Box::new(self.clone())
            }
            fn as_any(&self) -> Option<&dyn Any> {
                Some(self)
            }
        }
        impl StaticVal for $type {}
    };
}

mod lists;
mod networks;
mod versions;

/// In units of 10^-9.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Quantity(i128);
value!(Quantity, QUANTITY, "kubernetes.Quantity");

#[derive(Clone, Debug, PartialEq, Eq)]
struct Url {
    scheme: String,
    host: String,
    path: String,
}
value!(Url, URL, "kubernetes.URL");

pub(super) fn extension(env: &mut Env) -> Result<(), DeclarationError> {
    env.add_type(QUANTITY.to_owned())?;
    env.add_type(URL.to_owned())?;
    quantities(env)?;
    urls(env)?;
    networks::extension(env)?;
    versions::extension(env)?;
    lists::extension(env)?;
    Ok(())
}

fn number(ordering: Ordering) -> CelInt {
    CelInt::from(ordering as i64)
}

// Quantities.

const NANO: i128 = 1_000_000_000;

fn quantities(env: &mut Env) -> Result<(), DeclarationError> {
    add_overload!(env, fn quantity: (CelString) -> Result<Quantity>)?;
    add_overload!(env, fn is_quantity: (CelString) -> CelBool)?;
    add_member_overload!(env, fn quantity_less: (Quantity, Quantity) -> CelBool, name = "isLessThan")?;
    add_member_overload!(env, fn quantity_greater: (Quantity, Quantity) -> CelBool, name = "isGreaterThan")?;
    add_member_overload!(env, fn quantity_compare: (Quantity, Quantity) -> CelInt, name = "compareTo")?;
    add_member_overload!(env, fn sign: (Quantity) -> CelInt)?;
    add_member_overload!(env, fn is_integer: (Quantity) -> CelBool)?;
    add_member_overload!(env, fn as_integer: (Quantity) -> Result<CelInt>)?;
    add_member_overload!(env, fn as_approximate_float: (Quantity) -> CelDouble)?;
    add_member_overload!(env, fn add: (Quantity, Quantity) -> Result<Quantity>)?;
    add_member_overload!(env, fn add_int: (Quantity, CelInt) -> Result<Quantity>, name = "add")?;
    add_member_overload!(env, fn sub: (Quantity, Quantity) -> Result<Quantity>)?;
    add_member_overload!(env, fn sub_int: (Quantity, CelInt) -> Result<Quantity>, name = "sub")?;
    Ok(())
}

fn quantity(text: &Text<'_>) -> Outcome<Quantity> {
    match quantity::nanos(text.inner()) {
        Some(nanos) => Ok(Quantity(nanos)),
        None => failed("quantity", quantity::MALFORMED),
    }
}

fn is_quantity(text: &Text<'_>) -> CelBool {
    CelBool::from(quantity::nanos(text.inner()).is_some())
}

fn quantity_less(this: &Quantity, other: &Quantity) -> CelBool {
    CelBool::from(this < other)
}

fn quantity_greater(this: &Quantity, other: &Quantity) -> CelBool {
    CelBool::from(this > other)
}

fn quantity_compare(this: &Quantity, other: &Quantity) -> CelInt {
    number(this.cmp(other))
}

fn sign(this: &Quantity) -> CelInt {
    number(this.0.cmp(&0))
}

fn whole(this: &Quantity) -> Option<i64> {
    (this.0 % NANO == 0)
        .then(|| i64::try_from(this.0 / NANO).ok())
        .flatten()
}

fn is_integer(this: &Quantity) -> CelBool {
    CelBool::from(whole(this).is_some())
}

fn as_integer(this: &Quantity) -> Outcome<CelInt> {
    match whole(this) {
        Some(whole) => Ok(CelInt::from(whole)),
        None => failed("asInteger", "cannot convert value to integer"),
    }
}

fn as_approximate_float(this: &Quantity) -> CelDouble {
    CelDouble::from(this.0 as f64 / NANO as f64)
}

fn moved(this: &Quantity, by: Option<i128>) -> Outcome<Quantity> {
    match by.and_then(|by| this.0.checked_add(by)) {
        Some(nanos) => Ok(Quantity(nanos)),
        None => failed("add", "quantity overflow"),
    }
}

fn add(this: &Quantity, other: &Quantity) -> Outcome<Quantity> {
    moved(this, Some(other.0))
}

fn add_int(this: &Quantity, other: &CelInt) -> Outcome<Quantity> {
    moved(this, i128::from(*other.inner()).checked_mul(NANO))
}

fn sub(this: &Quantity, other: &Quantity) -> Outcome<Quantity> {
    moved(this, other.0.checked_neg())
}

fn sub_int(this: &Quantity, other: &CelInt) -> Outcome<Quantity> {
    moved(this, i128::from(*other.inner()).checked_mul(-NANO))
}

// URLs.

fn urls(env: &mut Env) -> Result<(), DeclarationError> {
    add_overload!(env, fn url: (CelString) -> Result<Url>)?;
    add_overload!(env, fn is_url: (CelString) -> CelBool, name = "isURL")?;
    add_member_overload!(env, fn get_scheme: (Url) -> CelString)?;
    add_member_overload!(env, fn get_host: (Url) -> CelString)?;
    add_member_overload!(env, fn get_hostname: (Url) -> CelString)?;
    add_member_overload!(env, fn get_port: (Url) -> CelString)?;
    add_member_overload!(env, fn get_escaped_path: (Url) -> CelString)?;
    Ok(())
}

/// An absolute URI or an absolute path, as Go's `url.ParseRequestURI` takes them.
fn parse_url(text: &str) -> Option<Url> {
    let printable = !text.is_empty() && !text.bytes().any(|b| b.is_ascii_control() || b == b' ');
    if !printable {
        return None;
    }
    let (scheme, rest) = match text.split_once("://") {
        Some((scheme, rest)) if !scheme.contains('/') => (scheme, rest),
        _ if text.starts_with('/') => ("", text),
        _ => return None,
    };
    let named = scheme.is_empty()
        || (scheme.starts_with(|c: char| c.is_ascii_alphabetic())
            && scheme
                .bytes()
                .all(|b| b.is_ascii_alphanumeric() || b"+-.".contains(&b)));
    let (authority, rest) = if scheme.is_empty() {
        ("", rest)
    } else {
        rest.split_at(rest.find(['/', '?']).unwrap_or(rest.len()))
    };
    let host = authority.rsplit('@').next().unwrap_or(authority);
    let path = rest.split('?').next().unwrap_or(rest);
    let escapes_hold = [host, path].iter().all(|part| {
        part.split('%')
            .skip(1)
            .all(|after| after.len() >= 2 && after.bytes().take(2).all(|b| b.is_ascii_hexdigit()))
    });
    let port_holds = port_of(host).is_none_or(|port| port.bytes().all(|b| b.is_ascii_digit()));
    (named && escapes_hold && port_holds).then(|| Url {
        scheme: scheme.to_ascii_lowercase(),
        host: host.to_owned(),
        path: path.to_owned(),
    })
}

fn port_of(host: &str) -> Option<&str> {
    let (before, port) = host.rsplit_once(':')?;
    // Within brackets a colon belongs to the address.
    (!port.contains(']') && (!before.contains(':') || before.ends_with(']'))).then_some(port)
}

fn url(text: &Text<'_>) -> Outcome<Url> {
    let text = text.inner();
    match parse_url(text) {
        Some(url) => Ok(url),
        None => failed(
            "url",
            format!("URL parse error during conversion from string: parse {text:?}: invalid URI for request"),
        ),
    }
}

fn is_url(text: &Text<'_>) -> CelBool {
    CelBool::from(parse_url(text.inner()).is_some())
}

fn get_scheme(this: &Url) -> Text<'static> {
    CelString::from(this.scheme.clone())
}

fn get_host(this: &Url) -> Text<'static> {
    CelString::from(this.host.clone())
}

fn get_hostname(this: &Url) -> Text<'static> {
    let host = match port_of(&this.host) {
        Some(port) => this.host.strip_suffix(port).and_then(|h| h.strip_suffix(':')),
        None => None,
    };
    let host = host.unwrap_or(&this.host);
    CelString::from(host.trim_start_matches('[').trim_end_matches(']').to_owned())
}

fn get_port(this: &Url) -> Text<'static> {
    CelString::from(port_of(&this.host).unwrap_or_default().to_owned())
}

fn get_escaped_path(this: &Url) -> Text<'static> {
    CelString::from(this.path.clone())
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use cel::{Context, Value};

    use super::*;

    fn ask(rule: &str) -> Result<Value, String> {
        let mut env = Env::stdlib();
        env.add_extension(extension).expect("no name is taken");
        let program = env.compile(rule).map_err(|e| e.to_string())?;
        let context = Context::with_env(Arc::new(env));
        program.execute(&context).map_err(|e| match e {
            ExecutionError::FunctionError { message, .. } => message,
            other => other.to_string(),
        })
    }

    #[test]
    fn kubernetes_own_functions_say_what_they_say_there() {
        for rule in [
            "quantity('512Mi').isLessThan(quantity('1Gi'))",
            "quantity('1000m').compareTo(quantity('1')) == 0",
            "quantity('1').add(quantity('500m')).isGreaterThan(quantity('1400m'))",
            "quantity('2k').sub(1000).asInteger() == 1000",
            "!quantity('1500m').isInteger() && quantity('-1').sign() == -1",
            "isQuantity('1e3') && !isQuantity('1 Mi')",
            "url('https://user@a.example:8443/x?q=1').getHostname() == 'a.example'",
            "url('https://[::1]:80/x').getHostname() == '::1' && url('https://[::1]:80/x').getPort() == '80'",
            "url('http://a.example').getHost() == 'a.example' && url('/p').getEscapedPath() == '/p'",
            "isURL('http://a.example') && !isURL('a.example') && !isURL('%%') && !isURL('http://a b')",
            "isIP('1.2.3.4') && ip('1.2.3.4').family() == 4 && ip('::1').family() == 6 && !isIP('::ffff:1.2.3.4')",
            "ip('127.0.0.1').isLoopback() && ip('0.0.0.0').isUnspecified() && ip('8.8.8.8').isGlobalUnicast()",
            "ip('fe80::1').isLinkLocalUnicast() && ip('224.0.0.1').isLinkLocalMulticast()",
            "ip.isCanonical('::1') && !ip.isCanonical('0:0::1') && string(ip('0:0::1')) == '::1'",
            "cidr('10.0.0.0/8').containsIP('10.1.1.1') && !cidr('10.0.0.0/8').containsIP(ip('11.1.1.1'))",
            "cidr('10.0.0.0/8').containsCIDR('10.1.0.0/16') && !cidr('10.1.0.0/16').containsCIDR(cidr('10.0.0.0/8'))",
            "string(cidr('10.1.2.3/8').masked()) == '10.0.0.0/8' && cidr('::/0').prefixLength() == 0",
            "isCIDR('10.0.0.0/8') && !isCIDR('10.0.0.0/33') && !isCIDR('10.0.0.0/08')",
            "semver('1.2.3-rc.1').isLessThan(semver('1.2.3')) && semver('1.10.0').isGreaterThan(semver('1.9.0'))",
            "semver('1.2.3-rc.2').compareTo(semver('1.2.3-rc.10')) == -1 && semver('1.2.3+b').major() == 1",
            "isSemver('1.2.3') && !isSemver('1.2') && !isSemver('01.2.3') && !isSemver('1.2.3-')",
            "[1, 2, 3].sum() == 6 && [1.5, 2.5].sum() == 4.0 && [3, 1].min() == 1 && ['a', 'b'].max() == 'b'",
            "[1, 2, 2].isSorted() && ![2, 1].isSorted() && [].isSorted()",
            "[1, 2, 1].indexOf(1) == 0 && [1, 2, 1].lastIndexOf(1) == 2 && [1].indexOf(3) == -1",
            "'x42y'.find('[0-9]+') == '42' && 'none'.find('[0-9]+') == '' && 'a1b2'.findAll('[0-9]') == ['1', '2']",
            "'a1b2c3'.findAll('[0-9]', 2) == ['1', '2']",
        ] {
            assert_eq!(ask(rule), Ok(Value::Bool(true)), "{rule}");
        }
        for (rule, wanted) in [
            ("quantity('xx').isInteger()", quantity::MALFORMED),
            (
                "url('%%').getHost() == ''",
                "URL parse error during conversion from string: parse \"%%\": invalid URI for request",
            ),
            ("semver('x').major() == 1", "No Major.Minor.Patch elements found"),
            ("[].min() == 1", "min called on empty list"),
        ] {
            assert_eq!(ask(rule), Err(wanted.to_owned()), "{rule}");
        }
        assert!(matches!(ask("cidr('10.0.0.0/8').containsIP('zz')"), Err(text) if text.contains("overload")));
    }
}
