//! Header mutations with Envoy's substitution variables, parsed once.
//!
//! The variables are the operators of access logs ([`crate::observe::format`]): there is one way to write them and one to
//! read them. What is not there is nothing here, and a field that would be empty is not added.

use std::borrow::Cow;

use http::{HeaderMap, HeaderName, HeaderValue};
use serin_xds::pb::envoy::config::core::v3 as core;
use serin_xds::pb::envoy::config::route::v3 as route;

use crate::config::convert::{each, required};
use crate::error::{Refusal, Within};
use crate::hygiene::fields::append;
use crate::observe::format;
use crate::observe::record::{Record, Wants};

/// Whoever knows what the variables of templates stand for.
pub trait Scene {
    /// Shows what is known, with the fields that are wanted; `headers` are those that are being changed.
    fn show(&self, wants: &Wants, headers: &HeaderMap, to: &mut dyn FnMut(&Record<'_>));
}

/// Where nothing is known: values without variables are applied all the same.
#[derive(Clone, Copy, Debug)]
pub struct Nothing;

impl Scene for Nothing {
    fn show(&self, _: &Wants, _: &HeaderMap, _: &mut dyn FnMut(&Record<'_>)) {}
}

/// The value of a header to add: fixed, or with variables.
#[derive(Debug)]
enum Template {
    Fixed(HeaderValue),
    Variable(format::Template),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Mode {
    Append,
    AddIfAbsent,
    Overwrite,
    OverwriteIfExists,
}

#[derive(Debug)]
struct Addition {
    name: Target,
    value: Template,
    mode: Mode,
    keep_empty: bool,
}

/// `host` and `:authority` both mean the authority of the request.
#[derive(Debug)]
enum Target {
    Field(HeaderName),
    Authority,
}

impl Target {
    fn name(&self) -> &HeaderName {
        match self {
            Self::Field(name) => name,
            Self::Authority => &http::header::HOST,
        }
    }
}

/// A list of mutations, applied removals first, then overwriting, then adding, as Envoy does. Most routes and virtual hosts
/// have none, so an empty one is a null pointer.
#[derive(Debug, Default)]
pub struct HeaderOps(Option<Box<Ops>>);

#[derive(Debug)]
struct Ops {
    /// Of responses and not of requests.
    of_responses: bool,
    remove: Box<[HeaderName]>,
    add: Box<[Addition]>,
    /// What the variables of all values read; none where there are no variables.
    wants: Option<Box<Wants>>,
}

/// A message that says what is done to the fields of requests and of responses.
pub(crate) trait Mutating {
    /// What is added and removed, of requests and of responses.
    fn mutations(&self) -> [(&[core::HeaderValueOption], &[String]); 2];
}

macro_rules! mutating {
    ($($message:ty),+) => {$(
        impl Mutating for $message {
            fn mutations(&self) -> [(&[core::HeaderValueOption], &[String]); 2] {
                [
                    (&self.request_headers_to_add, &self.request_headers_to_remove),
                    (&self.response_headers_to_add, &self.response_headers_to_remove),
                ]
            }
        }
    )+};
}

mutating!(
    route::RouteConfiguration,
    route::VirtualHost,
    route::Route,
    route::weighted_cluster::ClusterWeight
);

impl HeaderOps {
    /// What a message does to requests, and to responses.
    pub(crate) fn of(message: &impl Mutating) -> Result<(Self, Self), Refusal> {
        let [(add, remove), (response_add, response_remove)] = message.mutations();
        Ok((
            Self::compile(add, remove, false)?,
            Self::compile(response_add, response_remove, true)?,
        ))
    }

    /// Compiles `*_headers_to_add` and `*_headers_to_remove`, of responses or of requests.
    pub(crate) fn compile(
        add: &[core::HeaderValueOption],
        remove: &[String],
        of_responses: bool,
    ) -> Result<Self, Refusal> {
        let field = if of_responses {
            "response_headers"
        } else {
            "request_headers"
        };
        let remove = remove
            .iter()
            .enumerate()
            .map(|(index, name)| {
                HeaderName::from_bytes(name.as_bytes())
                    .ok()
                    .filter(|name| name != http::header::HOST)
                    .ok_or_else(|| {
                        Refusal::new(
                            format!("{field}_to_remove[{index}]"),
                            format!("{name:?} cannot be removed"),
                        )
                    })
            })
            .collect::<Result<Box<[HeaderName]>, _>>()?;
        let mut wants = Wants::default();
        let add: Box<[Addition]> = each(add, &format!("{field}_to_add"), |option| {
            compile_addition(option, &mut wants)
        })?;
        let variable = add
            .iter()
            .any(|addition| matches!(addition.value, Template::Variable(_)));
        if remove.is_empty() && add.is_empty() {
            return Ok(Self(None));
        }
        Ok(Self(Some(Box::new(Ops {
            of_responses,
            remove,
            add,
            wants: variable.then(|| Box::new(wants)),
        }))))
    }

    /// Whether there is nothing to do.
    pub fn is_empty(&self) -> bool {
        self.0.is_none()
    }

    /// Applies the mutations to `headers`. All values and conditions are of the fields as they are after the removals. A
    /// new authority is returned through the `Host` field of `headers`.
    pub fn apply(&self, headers: &mut HeaderMap, scene: &dyn Scene) {
        if let Some(ops) = &self.0 {
            ops.remove(headers);
            let values = ops.values(headers, scene);
            ops.add(headers, values);
        }
    }

    /// The values of the fields to add, for [`Self::apply_values`] when the fields that change have come.
    pub(crate) fn values(&self, headers: &HeaderMap, scene: &dyn Scene) -> Values {
        Values(match &self.0 {
            Some(ops) => ops.values(headers, scene),
            None => Vec::new(),
        })
    }

    /// Like [`Self::apply`], with values that were made before.
    pub(crate) fn apply_values(&self, headers: &mut HeaderMap, values: &Values) {
        if let Some(ops) = &self.0 {
            ops.remove(headers);
            ops.add(headers, values.0.clone());
        }
    }

    /// Whether values name fields of responses.
    pub(crate) fn looks_at_responses(&self) -> bool {
        let wants = self.0.as_ref().and_then(|ops| ops.wants.as_deref());
        wants.is_some_and(Wants::looks_at_responses)
    }
}

/// Values of fields to add, in their order; none where a variable stands for what no field may hold.
#[derive(Clone, Debug)]
pub(crate) struct Values(Vec<Option<HeaderValue>>);

impl Ops {
    fn remove(&self, headers: &mut HeaderMap) {
        for name in &self.remove {
            headers.remove(name);
        }
    }

    fn values(&self, headers: &HeaderMap, scene: &dyn Scene) -> Vec<Option<HeaderValue>> {
        let mut made: Vec<Option<HeaderValue>> = Vec::with_capacity(self.add.len());
        if let Some(wants) = &self.wants {
            scene.show(wants, headers, &mut |record| {
                let values = self.add.iter().map(|addition| match &addition.value {
                    Template::Fixed(value) => Some(value.clone()),
                    Template::Variable(template) => {
                        let mut text = String::new();
                        template.write(record, &mut text);
                        HeaderValue::try_from(text).ok()
                    }
                });
                made.extend(values);
            });
        }
        if made.is_empty() {
            made.extend(self.add.iter().map(|addition| match &addition.value {
                Template::Fixed(value) => Some(value.clone()),
                Template::Variable(_) => None,
            }));
        }
        made
    }

    fn add(&self, headers: &mut HeaderMap, mut made: Vec<Option<HeaderValue>>) {
        for (addition, value) in self.add.iter().zip(&mut made) {
            let there = || headers.contains_key(addition.name.name());
            let stays = value
                .as_ref()
                .is_some_and(|value| !value.is_empty() || addition.keep_empty);
            let applies = match addition.mode {
                Mode::Append | Mode::Overwrite => true,
                Mode::AddIfAbsent => !there(),
                Mode::OverwriteIfExists => there(),
            };
            if !stays || !applies {
                *value = None;
            }
        }
        for overwrites in [true, false] {
            for (addition, value) in self.add.iter().zip(&mut made) {
                if overwrites != matches!(addition.mode, Mode::Overwrite | Mode::OverwriteIfExists) {
                    continue;
                }
                let Some(value) = value.take() else { continue };
                let name = addition.name.name();
                if overwrites {
                    headers.insert(name, value);
                } else {
                    append(headers, name, value, self.of_responses);
                }
            }
        }
    }
}

fn compile_addition(option: &core::HeaderValueOption, wants: &mut Wants) -> Result<Addition, Refusal> {
    use core::header_value_option::HeaderAppendAction;
    let header = required(option.header.as_ref(), "header")?;
    let name = match header.key.as_str() {
        ":authority" => Target::Authority,
        key if key.eq_ignore_ascii_case("host") => Target::Authority,
        key => Target::Field(
            HeaderName::from_bytes(key.as_bytes())
                .map_err(|_| Refusal::new("header.key", format!("{key:?} is not a header name")))?,
        ),
    };
    let mode = match (&option.append, HeaderAppendAction::try_from(option.append_action)) {
        (Some(append), _) if append.value => Mode::Append,
        (Some(_), _) => Mode::Overwrite,
        (None, Ok(HeaderAppendAction::AppendIfExistsOrAdd)) => Mode::Append,
        (None, Ok(HeaderAppendAction::AddIfAbsent)) => Mode::AddIfAbsent,
        (None, Ok(HeaderAppendAction::OverwriteIfExistsOrAdd)) => Mode::Overwrite,
        (None, Ok(HeaderAppendAction::OverwriteIfExists)) => Mode::OverwriteIfExists,
        (None, Err(_)) => {
            return Err(Refusal::new(
                "append_action",
                format!("{} is unknown", option.append_action),
            ));
        }
    };
    let value = if header.raw_value.is_empty() {
        compile_template(&header.value, wants).within("header.value")?
    } else {
        Template::Fixed(
            HeaderValue::from_bytes(&header.raw_value)
                .map_err(|_| Refusal::new("header.raw_value", "is not a header value"))?,
        )
    };
    // There is one authority.
    let mode = if matches!(name, Target::Authority) {
        Mode::Overwrite
    } else {
        mode
    };
    Ok(Addition {
        name,
        value,
        mode,
        keep_empty: option.keep_empty_value,
    })
}

fn compile_template(text: &str, wants: &mut Wants) -> Result<Template, Refusal> {
    let template = format::Template::parse(&translated(text), true, wants)?;
    match template.literal() {
        Some(literal) => HeaderValue::from_bytes(literal.as_bytes())
            .map(Template::Fixed)
            .map_err(|_| Refusal::new("", format!("{literal:?} is not a header value"))),
        None => Ok(Template::Variable(template)),
    }
}

/// Older ways to write variables, which headers alone have: `%DYNAMIC_METADATA(["a", "b"])%`, `%PER_REQUEST_STATE(a)%`.
fn translated(text: &str) -> Cow<'_, str> {
    let mut out = Cow::Borrowed(text);
    for name in ["DYNAMIC_METADATA", "UPSTREAM_METADATA", "CLUSTER_METADATA"] {
        let start = format!("%{name}([");
        while let Some(at) = out.find(&start) {
            let list = at + start.len() - 1;
            let Some(end) = out[list..].find("])%").map(|end| list + end + 1) else {
                break;
            };
            let Ok(parts) = serde_json::from_str::<Vec<String>>(&out[list..end]) else {
                break;
            };
            out = format!("{}{name}({}{}", &out[..=at], parts.join(":"), &out[end..]).into();
        }
    }
    let start = "%PER_REQUEST_STATE(";
    while let Some(at) = out.find(start) {
        let key = at + start.len();
        let Some(end) = out[key..].find(")%").map(|end| key + end) else {
            break;
        };
        out = format!(
            "{}FILTER_STATE({}:PLAIN{}",
            &out[..=at],
            &out[key..end],
            &out[end..]
        )
        .into();
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::given::headers;

    fn option(key: &str, value: &str, action: i32) -> core::HeaderValueOption {
        core::HeaderValueOption {
            header: Some(core::HeaderValue {
                key: key.into(),
                value: value.into(),
                ..Default::default()
            }),
            append_action: action,
            ..Default::default()
        }
    }

    #[test]
    fn header_operations_remove_first_then_append_overwrite_or_add_if_absent() {
        let ops = HeaderOps::compile(
            &[
                option("x-append", "b", 0),
                option("x-absent", "no", 1),
                option("x-new", "yes", 1),
                option("x-over", "new", 2),
                option("x-never", "new", 3),
                option("x-gone", "back", 0),
            ],
            &["x-gone".into()],
            false,
        )
        .unwrap();
        let mut headers = headers(&[
            ("x-append", "a"),
            ("x-absent", "a"),
            ("x-over", "a"),
            ("x-gone", "a"),
        ]);
        ops.apply(&mut headers, &Nothing);
        let all = |name: &str| {
            headers
                .get_all(name)
                .iter()
                .map(|v| v.to_str().unwrap())
                .collect::<Vec<_>>()
        };
        assert_eq!(all("x-append"), ["a", "b"]);
        assert_eq!(all("x-absent"), ["a"]);
        assert_eq!(all("x-new"), ["yes"]);
        assert_eq!(all("x-over"), ["new"]);
        assert!(all("x-never").is_empty());
        assert_eq!(all("x-gone"), ["back"]);
    }

    /// A request over HTTP/2 of a client.
    struct One;

    impl Scene for One {
        fn show(&self, wants: &Wants, headers: &HeaderMap, to: &mut dyn FnMut(&Record<'_>)) {
            let mut kept = crate::observe::record::Kept::default();
            let view = crate::config::matchers::RequestView {
                method: "GET",
                path: "/",
                query: None,
                authority: None,
                scheme: None,
                headers,
            };
            wants.keep_request(&view, &mut kept);
            let client = "10.0.0.1:5".parse().unwrap();
            let metadata = crate::policy::metadata::Metadata::EMPTY;
            to(&Record {
                protocol: "HTTP/2",
                ..Record::of_connection(&kept, &metadata, client, "10.0.0.2:80".parse().unwrap())
            });
        }
    }

    #[test]
    fn what_overwrites_comes_before_what_adds_and_what_is_empty_is_kept_where_that_is_said() {
        let mut empty = option("x-kept", "", 0);
        empty.keep_empty_value = true;
        let all = [
            option("x-a", "added", 0),
            option("x-a", "over", 2),
            option("x-new", "first", 0),
            option("x-new", "not absent before", 1),
            option("x-new", "not there before", 3),
            option("x-none", "%REQ(x-none)%", 0),
            empty,
        ];
        let ops = HeaderOps::compile(&all, &[], false).unwrap();
        let mut headers = HeaderMap::new();
        headers.insert("x-a", HeaderValue::from_static("old"));
        ops.apply(&mut headers, &One);
        let all = |name: &str| headers.get_all(name).iter().cloned().collect::<Vec<_>>();
        assert_eq!(all("x-a"), ["over", "added"]);
        assert_eq!(all("x-new"), ["first", "not absent before"]);
        assert!(all("x-none").is_empty());
        assert_eq!(all("x-kept"), [""]);
    }

    #[test]
    fn older_ways_to_write_variables_mean_the_same() {
        for (older, newer) in [
            ("%DYNAMIC_METADATA([\"a\", \"b\"])%", "%DYNAMIC_METADATA(a:b)%"),
            (
                "x%UPSTREAM_METADATA([\"a\",\"b\"])%y",
                "x%UPSTREAM_METADATA(a:b)%y",
            ),
            ("%PER_REQUEST_STATE(k.e)%", "%FILTER_STATE(k.e:PLAIN)%"),
            ("%REQ(a)%", "%REQ(a)%"),
        ] {
            assert_eq!(translated(older), newer);
        }
    }

    #[test]
    fn header_values_substitute_variables_and_refuse_unknown_ones() {
        let ops = HeaderOps::compile(
            &[option(
                "x-v",
                "100%% %PROTOCOL% %REQ(x-a)% %DOWNSTREAM_REMOTE_ADDRESS_WITHOUT_PORT%",
                2,
            )],
            &[],
            false,
        )
        .unwrap();
        let mut headers = HeaderMap::new();
        headers.insert("x-a", HeaderValue::from_static("v"));
        ops.apply(&mut headers, &One);
        assert_eq!(headers["x-v"], "100% HTTP/2 v 10.0.0.1");

        let error = HeaderOps::compile(&[option("x-v", "%NOT_A_THING%", 2)], &[], false).unwrap_err();
        assert_eq!(error.path, "request_headers_to_add[0].header.value");
        assert!(error.reason.contains("NOT_A_THING"), "{error}");
    }
}
