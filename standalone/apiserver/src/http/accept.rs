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

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Accepted {
    pub(crate) form: Form,
    pub(crate) yaml: bool,
}

const SUPPORTED: &str = "only the following media types are accepted: application/json, application/yaml, application/vnd.kubernetes.protobuf";
const NONE: &str = "406: Not Acceptable\n\nAvailable representations: application/json, application/yaml, application/vnd.kubernetes.protobuf";

/// Choose from an Accept header. Protobuf is not written; clients that prefer it name JSON as well.
pub(crate) fn negotiate(accept: &str) -> ApiResult<Accepted> {
    let plain = Accepted {
        form: Form::Object,
        yaml: false,
    };
    if accept.trim().is_empty() {
        return Ok(plain);
    }
    let mut known = false;
    for range in accept.split(',') {
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
        let mut fits = true;
        for parameter in parameters {
            match parameter.split_once('=') {
                Some(("as", "Table")) => form = Form::Table,
                Some(("as", "PartialObjectMetadata" | "PartialObjectMetadataList")) => form = Form::Metadata,
                Some(("as", _)) => fits = false,
                Some(("g", group)) => fits &= group == "meta.k8s.io",
                Some(("v", version)) => fits &= matches!(version, "v1" | "v1beta1"),
                _ => {}
            }
        }
        if fits {
            return Ok(Accepted { form, yaml });
        }
    }
    if known {
        return Err(ApiError::new(406, "NotAcceptable", SUPPORTED));
    }
    Err(none_acceptable())
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
                yaml: false
            }
        );
        assert!(negotiate("text/html").is_err());
        assert!(negotiate("application/vnd.kubernetes.protobuf").is_err());
    }
}
