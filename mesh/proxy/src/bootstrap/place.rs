//! Where in a document a field is, for whoever has to mend it.
//!
//! Documents become values without lines, and refusals name fields by their paths. So when something is refused the document
//! is read again, down the path; the reader of YAML tells the line at which it is stopped.

use std::fmt;

use serde::de::{DeserializeSeed, Deserializer, Error as _, IgnoredAny, MapAccess, SeqAccess, Visitor};

/// The line, from 1, of the field at `path` (`static_resources.clusters[0].connect_timeout`), or of what is around it if it
/// is not there itself. Nothing if not even its first part is there, or the document cannot be read.
pub(super) fn line(text: &str, path: &str) -> Option<usize> {
    let mut path = path;
    while !path.is_empty() {
        if let Some(line) = exactly(text, path) {
            return Some(line);
        }
        path = path.rfind(['.', '[']).map_or("", |end| &path[..end]);
    }
    None
}

fn exactly(text: &str, path: &str) -> Option<usize> {
    let stopped = Down { path }.deserialize(serde_yaml::Deserializer::from_str(text));
    // Whatever else stops the reader has no line that is worth telling: the document was read before.
    let error = stopped.err().filter(|error| error.to_string().contains(HERE))?;
    Some(error.location()?.line())
}

/// What the reader is stopped with.
const HERE: &str = "the field that was looked for";

/// Goes down a path and stops the reader at its end.
#[derive(Clone, Copy)]
struct Down<'a> {
    /// What is left of it: nothing, `name…`, `.name…` or `[index]…`.
    path: &'a str,
}

impl Down<'_> {
    /// The rest of the path behind that key, if it leads there. Keys may have dots in them, and may be written as protobuf's
    /// JSON mapping has them.
    fn behind(self, key: &str) -> Option<Self> {
        let path = self.path.strip_prefix('.').unwrap_or(self.path);
        let mut snake = String::with_capacity(key.len() + 4);
        for char in key.chars() {
            if char.is_ascii_uppercase() {
                snake.push('_');
            }
            snake.push(char.to_ascii_lowercase());
        }
        let rest = path.strip_prefix(key).or_else(|| path.strip_prefix(&*snake))?;
        (rest.is_empty() || rest.starts_with(['.', '['])).then_some(Self { path: rest })
    }

    /// The index that comes next, and the rest of the path behind it.
    fn index(self) -> Option<(usize, Self)> {
        let (index, rest) = self.path.strip_prefix('[')?.split_once(']')?;
        Some((index.parse().ok()?, Self { path: rest }))
    }

    fn stop<E: serde::de::Error>(self) -> Result<(), E> {
        if self.path.is_empty() {
            Err(E::custom(HERE))
        } else {
            Ok(())
        }
    }
}

impl<'de> DeserializeSeed<'de> for Down<'_> {
    type Value = ();

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<(), D::Error> {
        deserializer.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for Down<'_> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("anything")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<(), A::Error> {
        if self.path.is_empty() {
            return Err(A::Error::custom(HERE));
        }
        while let Some(key) = map.next_key::<String>()? {
            match self.behind(&key) {
                Some(behind) => map.next_value_seed(behind)?,
                None => drop(map.next_value::<IgnoredAny>()?),
            }
        }
        Ok(())
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<(), A::Error> {
        if self.path.is_empty() {
            return Err(A::Error::custom(HERE));
        }
        let wanted = self.index();
        for index in 0.. {
            let more = match wanted {
                Some((own, behind)) if own == index => list.next_element_seed(behind)?.is_some(),
                _ => list.next_element::<IgnoredAny>()?.is_some(),
            };
            if !more {
                break;
            }
        }
        Ok(())
    }

    fn visit_bool<E: serde::de::Error>(self, _: bool) -> Result<(), E> {
        self.stop()
    }

    fn visit_i64<E: serde::de::Error>(self, _: i64) -> Result<(), E> {
        self.stop()
    }

    fn visit_u64<E: serde::de::Error>(self, _: u64) -> Result<(), E> {
        self.stop()
    }

    fn visit_f64<E: serde::de::Error>(self, _: f64) -> Result<(), E> {
        self.stop()
    }

    fn visit_str<E: serde::de::Error>(self, _: &str) -> Result<(), E> {
        self.stop()
    }

    fn visit_unit<E: serde::de::Error>(self) -> Result<(), E> {
        self.stop()
    }

    fn visit_none<E: serde::de::Error>(self) -> Result<(), E> {
        self.stop()
    }
}

#[cfg(test)]
mod tests {
    #[test]
    fn a_path_leads_to_the_line_of_its_field_or_of_what_is_around_it() {
        let text = r#"# a comment
static_resources:
  clusters:
  - name: a
    connectTimeout: 1s
    typed_extension_protocol_options:
      envoy.extensions.upstreams.http.v3.HttpProtocolOptions:
        "@type": x
        explicit: { a: 1 }
  - name: b
    load_assignment:
      endpoints:
      - lb_endpoints:
        - endpoint: {}
        -
          health_status: 3
admin: null
"#;
        for (path, line) in [
            ("static_resources", Some(3)),
            ("static_resources.clusters[0].name", Some(4)),
            ("static_resources.clusters[0].connect_timeout", Some(5)),
            ("static_resources.clusters[0].connect_timeout.nanos", Some(5)),
            (
                "static_resources.clusters[0].typed_extension_protocol_options.envoy.extensions.upstreams.http.v3.HttpProtocolOptions.explicit.a",
                Some(9),
            ),
            ("static_resources.clusters[1].colour", Some(10)),
            (
                "static_resources.clusters[1].load_assignment.endpoints[0].lb_endpoints[1].health_status",
                Some(16),
            ),
            ("admin", Some(17)),
            ("nothing.of.it", None),
            ("", None),
        ] {
            assert_eq!(super::line(text, path), line, "{path}");
        }
        assert_eq!(super::line("{a: [1, {b: 2}]}", "a[1].b"), Some(1));
    }
}
