//! What routes say about the filter.

use std::sync::Arc;

use http::{HeaderName, HeaderValue};
use serin_xds::pb::envoy::extensions::filters::http::ext_proc::v3 as filter;

use super::mode::Mode;
use super::namespaces::Namespaces;
use crate::config::convert::{each, refuse_present};
use crate::config::route::Context;
use crate::error::{Refusal, Within};
use crate::policy::service::{GrpcTarget, header_pair};

/// What a route says (`ExtProcPerRoute`).
#[derive(Debug)]
pub enum PerRouteProc {
    /// Nobody is asked.
    Disabled,
    /// It is asked like this.
    Settings {
        /// What it sees.
        mode: Option<Mode>,
        /// Another service.
        target: Option<Box<GrpcTarget>>,
        /// Another failure mode.
        failure_allows: Option<bool>,
        /// Other metadata.
        namespaces: Option<Arc<Namespaces>>,
        /// Fields of its calls, in place of those of the same name.
        fields: Box<[(HeaderName, HeaderValue)]>,
    },
}

impl PerRouteProc {
    /// Compiles the message.
    pub(crate) fn compile(
        from: &filter::ExtProcPerRoute,
        context: &mut Context<'_>,
    ) -> Result<Self, Refusal> {
        use filter::ext_proc_per_route::Override;
        let from = match &from.r#override {
            Some(Override::Disabled(true)) => return Ok(Self::Disabled),
            Some(Override::Disabled(false)) => return Err(Refusal::new("disabled", "must be true")),
            Some(Override::Overrides(overrides)) => overrides,
            None => return Err(Refusal::new("override", "is missing")),
        };
        Self::settings(from, context).within("overrides")
    }

    fn settings(from: &filter::ExtProcOverrides, context: &mut Context<'_>) -> Result<Self, Refusal> {
        refuse_present(
            &[
                ("async_mode", from.async_mode),
                ("request_attributes", !from.request_attributes.is_empty()),
                ("response_attributes", !from.response_attributes.is_empty()),
                (
                    "processing_request_modifier",
                    from.processing_request_modifier.is_some(),
                ),
            ],
            "not supported",
        )?;
        Ok(Self::Settings {
            mode: from
                .processing_mode
                .as_ref()
                .map(|mode| Mode::compile(Some(mode)).within("processing_mode"))
                .transpose()?,
            target: from
                .grpc_service
                .as_ref()
                .map(|service| GrpcTarget::compile(Some(service), context).map(Box::new))
                .transpose()
                .within("grpc_service")?,
            failure_allows: from.failure_mode_allow.as_ref().map(|value| value.value),
            namespaces: from
                .metadata_options
                .as_ref()
                .map(|options| Namespaces::compile(Some(options)).map(Arc::new))
                .transpose()
                .within("metadata_options")?,
            fields: each(&from.grpc_initial_metadata, "grpc_initial_metadata", header_pair)?,
        })
    }
}
