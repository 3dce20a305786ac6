//! Content negotiation.

use crate::error::{ApiError, ApiResult};

/// The form of an answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Form {
    Object,
    /// `as=Table`.
    Table,
    /// `as=PartialObjectMetadata` or `…List`.
    Metadata,
}

impl Accepted {
    /// One object cannot be shown as a list.
    pub(crate) fn check_single(&self, kind: &crate::kinds::Kind) -> ApiResult<()> {
        if self.list_form && self.form == Form::Metadata {
            return Err(ApiError::new(
                406,
                "NotAcceptable",
                format!(
                    "you requested PartialObjectMetadataList, but the requested object is not a list ({})",
                    if kind.is_custom() {
                        "*unstructured.Unstructured".to_owned()
                    } else if kind.group.is_empty() {
                        format!("*core.{}", kind.kind)
                    } else {
                        format!(
                            "*{}.{}",
                            kind.group.split('.').next().unwrap_or_default(),
                            kind.kind
                        )
                    }
                ),
            ));
        }
        Ok(())
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Accepted {
    pub(crate) form: Form,
    pub(crate) yaml: bool,
    /// The form was asked for by its list's name.
    pub(crate) list_form: bool,
}

const SUPPORTED: &str = "only the following media types are accepted: application/json, application/yaml, application/vnd.kubernetes.protobuf";
/// What a watch comes in.
pub(crate) const STREAMS: &str = "only the following media types are accepted: application/json;stream=watch, application/vnd.kubernetes.protobuf;stream=watch";
const NONE: &str = "406: Not Acceptable\n\nAvailable representations: application/json, application/yaml, application/vnd.kubernetes.protobuf";

/// Choose from an Accept header. Protobuf is not written; clients that prefer it name JSON as well.
pub(crate) fn negotiate(accept: &str) -> ApiResult<Accepted> {
    let plain = Accepted {
        form: Form::Object,
        yaml: false,
        list_form: false,
    };
    if accept.trim().is_empty() {
        return Ok(plain);
    }
    let mut known = false;
    for range in by_weight(accept) {
        let mut parameters = range.split(';').map(str::trim);
        let media = parameters.next().unwrap_or_default();
        let yaml = match media {
            "application/json" | "*/*" => false,
            "application/yaml" => true,
            "application/vnd.kubernetes.protobuf" => {
                known = true;
                continue;
            }
            _ => continue,
        };
        known = true;
        let mut form = Form::Object;
        let mut list_form = false;
        let mut fits = true;
        for parameter in parameters {
            match parameter.split_once('=') {
                Some(("as", "Table")) => form = Form::Table,
                Some(("as", kind @ ("PartialObjectMetadata" | "PartialObjectMetadataList"))) => {
                    form = Form::Metadata;
                    list_form = kind.ends_with("List");
                }
                Some(("as", _)) => fits = false,
                Some(("g", group)) => fits &= group == "meta.k8s.io",
                Some(("v", version)) => fits &= matches!(version, "v1" | "v1beta1"),
                _ => {}
            }
        }
        if fits {
            return Ok(Accepted {
                form,
                yaml,
                list_form,
            });
        }
    }
    if known {
        return Err(ApiError::new(406, "NotAcceptable", SUPPORTED));
    }
    Err(none_acceptable())
}

/// The ranges of the header, heaviest first; equal ones in their order.
fn by_weight(accept: &str) -> Vec<&str> {
    let weight = |range: &str| {
        range
            .split(';')
            .filter_map(|parameter| parameter.trim().strip_prefix("q="))
            .find_map(|q| q.trim().parse::<f32>().ok())
            .unwrap_or(1.0)
    };
    let mut ranges: Vec<&str> = accept.split(',').filter(|range| weight(range) > 0.0).collect();
    ranges.sort_by(|a, b| weight(b).total_cmp(&weight(a)));
    ranges
}

/// 406 for a form that this answer does not come in.
pub(crate) fn none_acceptable() -> ApiError {
    let mut error = ApiError::new(406, "NotAcceptable", NONE);
    error.details = Some(crate::error::Details::default());
    error
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_range_that_can_be_served_wins() {
        let table =
            negotiate("application/json;as=Table;v=v1;g=meta.k8s.io,application/json").expect("acceptable");
        assert_eq!(table.form, Form::Table);
        let json = negotiate("application/vnd.kubernetes.protobuf,application/json").expect("acceptable");
        assert_eq!(
            json,
            Accepted {
                form: Form::Object,
                yaml: false,
                list_form: false
            }
        );
        assert!(
            negotiate("application/json;q=0.1,application/yaml")
                .expect("acceptable")
                .yaml
        );
        assert!(negotiate("text/html").is_err());
        assert!(negotiate("application/vnd.kubernetes.protobuf").is_err());
    }
}
