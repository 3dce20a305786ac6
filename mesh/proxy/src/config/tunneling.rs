//! TCP connections that are carried on within a CONNECT (`tcp_proxy`'s `tunneling_config`).

use http::{HeaderMap, HeaderValue, header};
use serin_xds::pb::envoy::config::core::v3 as core;
use serin_xds::pb::envoy::extensions::filters::network::tcp_proxy::v3::tcp_proxy::TunnelingConfig;

use super::headers::{HeaderOps, Scene};
use crate::config::convert::refuse_present;
use crate::error::Refusal;

/// What is asked of the endpoint, compiled.
#[derive(Debug)]
pub struct Tunneling {
    /// The first of them makes the authority.
    fields: HeaderOps,
}

impl Tunneling {
    /// Compiles the message.
    pub(crate) fn compile(from: &TunnelingConfig) -> Result<Self, Refusal> {
        refuse_present(
            &[
                ("use_post", from.use_post),
                ("post_path", !from.post_path.is_empty()),
                ("propagate_response_headers", from.propagate_response_headers),
                ("propagate_response_trailers", from.propagate_response_trailers),
                ("request_id_extension", from.request_id_extension.is_some()),
                ("request_id_header", !from.request_id_header.is_empty()),
                (
                    "request_id_metadata_key",
                    !from.request_id_metadata_key.is_empty(),
                ),
                ("formatters", !from.formatters.is_empty()),
            ],
            "not supported",
        )?;
        if from.hostname.is_empty() {
            return Err(Refusal::new("hostname", "is missing"));
        }
        let authority = core::HeaderValueOption {
            header: Some(core::HeaderValue {
                key: ":authority".into(),
                value: from.hostname.clone(),
                ..Default::default()
            }),
            ..Default::default()
        };
        let all: Vec<_> = std::iter::once(authority)
            .chain(from.headers_to_add.iter().cloned())
            .collect();
        Ok(Self {
            fields: HeaderOps::compile(&all, &[], false)?,
        })
    }

    /// Authority and fields of a CONNECT; `None` where the authority cannot be told, since nobody named one.
    pub fn head(&self, scene: &dyn Scene) -> Option<(HeaderValue, HeaderMap)> {
        let mut headers = HeaderMap::new();
        self.fields.apply(&mut headers, scene);
        let authority = headers.remove(header::HOST)?;
        Some((authority, headers))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::observe::record::{Kept, Record, Wants};
    use crate::policy::metadata::Metadata;

    /// A connection with this server name.
    struct Connection(&'static str);

    impl Scene for Connection {
        fn show(&self, _: &Wants, _: &HeaderMap, to: &mut dyn FnMut(&Record<'_>)) {
            let (kept, metadata) = (Kept::default(), Metadata::EMPTY);
            let (client, own) = ("10.0.0.1:5".parse().unwrap(), "10.0.0.2:443".parse().unwrap());
            to(&Record {
                server_name: Some(self.0),
                ..Record::of_connection(&kept, &metadata, client, own)
            });
        }
    }

    #[test]
    fn the_authority_may_be_what_the_client_asked_for_and_fields_go_with_it() {
        let config = |hostname: &str| TunnelingConfig {
            hostname: hostname.into(),
            headers_to_add: vec![core::HeaderValueOption {
                header: Some(core::HeaderValue {
                    key: "x-client".into(),
                    value: "%DOWNSTREAM_REMOTE_ADDRESS_WITHOUT_PORT%".into(),
                    ..Default::default()
                }),
                ..Default::default()
            }],
            ..Default::default()
        };
        let scene = Connection("shop.example");
        for (hostname, authority) in [
            ("fixed.example:443", "fixed.example:443"),
            ("%REQUESTED_SERVER_NAME%:443", "shop.example:443"),
            ("%DOWNSTREAM_LOCAL_ADDRESS%", "10.0.0.2:443"),
        ] {
            let tunneling = Tunneling::compile(&config(hostname)).unwrap();
            let (own, headers) = tunneling.head(&scene).unwrap();
            assert_eq!(own, authority);
            assert_eq!(headers["x-client"], "10.0.0.1");
        }
        let nameless = Tunneling::compile(&config("%REQUESTED_SERVER_NAME%")).unwrap();
        assert!(nameless.head(&Connection("")).is_none());
        for (wrong, path) in [
            (config(""), "hostname"),
            (config("%NOTHING%"), "headers_to_add"),
            (
                TunnelingConfig {
                    use_post: true,
                    ..config("a")
                },
                "use_post",
            ),
        ] {
            let refusal = Tunneling::compile(&wrong).unwrap_err().to_string();
            assert!(refusal.contains(path), "{refusal}");
        }
    }
}
