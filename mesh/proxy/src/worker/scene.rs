//! What the variables of header templates stand for while a request is on its way.

use http::request::Parts;
use http::{HeaderMap, Uri};

use super::exchange::Exchange;
use super::logging::{self, LogState};
use crate::config::headers::Scene;
use crate::config::matchers::RequestView;
use crate::metrics::flags::Flags;
use crate::observe::record::{Record, Wants};
use crate::policy::metadata::Metadata;

/// A request whose fields are being changed.
pub(super) struct RequestScene<'a> {
    /// The request.
    pub exchange: &'a Exchange,
    /// Path and query as they are now.
    pub uri: &'a Uri,
    /// The cluster, where the exchange does not know it yet.
    pub cluster: Option<&'a str>,
}

/// A response whose fields are being changed.
pub(super) struct ResponseScene<'a> {
    /// The request that it is for.
    pub exchange: &'a Exchange,
    /// The fields of the request as they are now.
    pub request: &'a HeaderMap,
    /// Path and query of the request as they are now.
    pub uri: &'a Uri,
    /// What filters have told each other, where the exchange does not know it at this moment.
    pub metadata: Option<&'a Metadata>,
}

/// Trailers of a response that are being changed.
pub(super) struct TrailerScene<'a> {
    /// The response that they end.
    pub of: ResponseScene<'a>,
    /// The fields of its head.
    pub response: &'a HeaderMap,
}

impl<'a> ResponseScene<'a> {
    /// Of a request that is at hand.
    pub(super) fn of(exchange: &'a Exchange, parts: &'a Parts) -> Self {
        Self {
            exchange,
            request: &parts.headers,
            uri: &parts.uri,
            metadata: None,
        }
    }

    fn show(&self, state: &LogState, to: &mut dyn FnMut(&Record<'_>)) {
        show(self.exchange, None, state, &mut |record| match self.metadata {
            Some(metadata) => to(&Record { metadata, ..*record }),
            None => to(record),
        });
    }
}

fn show(exchange: &Exchange, cluster: Option<&str>, state: &LogState, to: &mut dyn FnMut(&Record<'_>)) {
    logging::with_record(exchange, state, |record| {
        // The log names a cluster that is not there, since it is what one looks for; fields do not.
        let named = record.upstream_cluster.or(cluster);
        let upstream_cluster = named.filter(|_| !exchange.flags.has(Flags::NO_CLUSTER));
        to(&Record {
            upstream_cluster,
            ..*record
        });
    });
}

fn state_of(exchange: &Exchange, wants: &Wants, request: &HeaderMap, uri: &Uri) -> LogState {
    let view = RequestView {
        method: exchange.method.as_str(),
        path: uri.path(),
        query: uri.query(),
        authority: None,
        scheme: None,
        headers: request,
    };
    logging::meanwhile(wants, exchange, &view, uri)
}

impl Scene for RequestScene<'_> {
    fn show(&self, wants: &Wants, headers: &HeaderMap, to: &mut dyn FnMut(&Record<'_>)) {
        let state = state_of(self.exchange, wants, headers, self.uri);
        show(self.exchange, self.cluster, &state, to);
    }
}

impl Scene for ResponseScene<'_> {
    fn show(&self, wants: &Wants, headers: &HeaderMap, to: &mut dyn FnMut(&Record<'_>)) {
        let mut state = state_of(self.exchange, wants, self.request, self.uri);
        state.keep_response(wants, headers);
        ResponseScene::show(self, &state, to);
    }
}

impl Scene for TrailerScene<'_> {
    fn show(&self, wants: &Wants, headers: &HeaderMap, to: &mut dyn FnMut(&Record<'_>)) {
        let mut state = state_of(self.of.exchange, wants, self.of.request, self.of.uri);
        state.keep_response(wants, self.response);
        state.keep_trailers(wants, headers);
        ResponseScene::show(&self.of, &state, to);
    }
}
