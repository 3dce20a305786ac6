//! Which metadata a service is told, and which it may set.

use serin_xds::pb::envoy::extensions::filters::http::ext_proc::v3 as filter;
use serin_xds::pb::google::protobuf as google;

use crate::error::Refusal;

/// Namespaces of metadata that a service has to do with.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Namespaces {
    pub(super) sent: Box<[Box<str>]>,
    pub(super) taken: Box<[Box<str>]>,
}

impl Namespaces {
    pub(super) fn compile(from: Option<&filter::MetadataOptions>) -> Result<Self, Refusal> {
        let Some(from) = from else {
            return Ok(Self::default());
        };
        let names = |field: &str, from: Option<&filter::metadata_options::MetadataNamespaces>| {
            let Some(from) = from else {
                return Ok(Box::default());
            };
            if !from.typed.is_empty() {
                return Err(Refusal::new(format!("{field}.typed"), "not supported"));
            }
            Ok(from.untyped.iter().map(|name| name.as_str().into()).collect())
        };
        if from.cluster_metadata_forwarding_namespaces.is_some() {
            return Err(Refusal::new(
                "cluster_metadata_forwarding_namespaces",
                "not supported",
            ));
        }
        Ok(Self {
            sent: names("forwarding_namespaces", from.forwarding_namespaces.as_ref())?,
            taken: names("receiving_namespaces", from.receiving_namespaces.as_ref())?,
        })
    }
}

/// The namespaces of an answer that may be set.
pub(super) fn taken(names: &[Box<str>], from: Option<google::Struct>) -> Vec<(Box<str>, google::Struct)> {
    use google::value::Kind;
    let mut fields = from.unwrap_or_default().fields;
    names
        .iter()
        .filter_map(|name| match fields.remove(&**name)?.kind? {
            Kind::StructValue(fields) => Some((name.clone(), fields)),
            _ => None,
        })
        .collect()
}
