//! Responses on their way back through the chain.

use http::HeaderMap;
use http::request::Parts;
use http::response::Parts as Head;

use super::{Encode, PolicyState, ext_proc};
use crate::policy::compressor::{Encoder, vary};
use crate::policy::ext_authz::apply;
use crate::worker::exchange::Exchange;
use crate::worker::local::LocalReply;
use crate::worker::scene::{ResponseScene, TrailerScene};

impl PolicyState {
    /// The encoding that the client wants most; of equals the first in the chain.
    fn best(&self) -> Option<usize> {
        self.encode
            .iter()
            .enumerate()
            .filter_map(|(index, encode)| match encode {
                Encode::Compress(_, quality) if *quality > 0 => Some((*quality, std::cmp::Reverse(index))),
                _ => None,
            })
            .max()
            .map(|(_, std::cmp::Reverse(index))| index)
    }

    /// Lets a response pass one filter. `best` says whether its encoding is wanted most; what encodes is returned.
    fn pass(
        &self,
        index: usize,
        best: bool,
        exchange: &Exchange,
        head: &mut Head,
        has_body: bool,
    ) -> Option<Encoder> {
        match self.encode.get(index)? {
            Encode::Compress(compressor, _) => {
                if !compressor.applies(head.status, &head.headers) {
                    return None;
                }
                // An encoder that cannot be made leaves the response as it is.
                let encoder = (best && has_body)
                    .then(|| compressor.begin(&mut head.headers).ok())
                    .flatten();
                vary(&mut head.headers);
                return encoder;
            }
            Encode::Cors(cors, origin) => cors.decorate(origin.clone(), &mut head.headers),
            Encode::Mutate(mutation) => {
                let none = HeaderMap::new();
                let scene = self.scene(exchange, &none);
                mutation.response(&mut head.headers, &scene);
            }
            Encode::Fields(fields) => apply(fields, &mut head.headers),
            // Shown to services where there is time for that.
            Encode::Process(_) => {}
        }
        None
    }

    /// A response whose fields are being changed; `none` are the request's where nobody wanted them.
    fn scene<'a>(&'a self, exchange: &'a Exchange, none: &'a HeaderMap) -> ResponseScene<'a> {
        ResponseScene {
            exchange,
            request: self.request.as_ref().unwrap_or(none),
            uri: self.uri.as_ref().unwrap_or(&exchange.uri),
            // The state has been taken out of the exchange.
            metadata: Some(&self.metadata),
        }
    }

    /// Whether trailers are changed by values that name fields of the response's head.
    fn trailers_name_the_head(&self) -> bool {
        self.encode.iter().any(|encode| match encode {
            Encode::Mutate(mutation) => mutation.trailers_name_the_head(),
            _ => false,
        })
    }

    /// Lets the trailers of a response pass the filters.
    fn pass_trailers(&self, exchange: &Exchange, trailers: &mut HeaderMap) {
        let none = HeaderMap::new();
        let scene = TrailerScene {
            of: self.scene(exchange, &none),
            response: self.response.as_ref().unwrap_or(&none),
        };
        for encode in self.encode.iter().rev() {
            if let Encode::Mutate(mutation) = encode {
                mutation.response_trailers(trailers, &scene);
            }
        }
    }

    /// Lets a response pass the filters. What encodes its body is returned.
    fn respond(&self, exchange: &Exchange, head: &mut Head, has_body: bool) -> Option<Encoder> {
        let best = self.best();
        let mut encoder = None;
        for index in (0..self.encode.len()).rev() {
            let passed = self.pass(index, best == Some(index), exchange, head, has_body);
            encoder = passed.or(encoder);
        }
        encoder
    }
}

/// Takes note of what a request is by now, where a change of the response may name it.
pub(in crate::worker) fn keep_request(exchange: &mut Exchange, parts: &Parts) {
    if let Some(state) = &mut exchange.policy
        && let Some(request) = &mut state.request
    {
        request.clone_from(&parts.headers);
        state.uri = Some(parts.uri.clone());
    }
}

/// Whether a response must wait for a service before it goes on.
pub(in crate::worker) fn waits(exchange: &Exchange) -> bool {
    exchange.policy.as_ref().is_some_and(|state| {
        state
            .encode
            .iter()
            .any(|encode| matches!(encode, Encode::Process(Some(_))))
    })
}

/// Like [`encode`], for responses that must wait. A reply goes to the client instead, as it is.
pub(in crate::worker) async fn encode_waiting(
    exchange: &mut Exchange,
    head: &mut Head,
    has_body: bool,
) -> Result<Option<Encoder>, LocalReply> {
    let (count, best) = match &exchange.policy {
        Some(state) => (state.encode.len(), state.best()),
        None => return Ok(None),
    };
    let mut encoder = None;
    for index in (0..count).rev() {
        let Some(mut state) = exchange.policy.take() else {
            return Ok(encoder);
        };
        let processing = match state.encode.get_mut(index) {
            Some(Encode::Process(processing)) => processing.take(),
            _ => None,
        };
        if processing.is_none() {
            let passed = state.pass(index, best == Some(index), exchange, head, has_body);
            encoder = passed.or(encoder);
        }
        exchange.policy = Some(state);
        if let Some(processing) = processing
            && let Err(reply) = ext_proc::response(exchange, processing, head, has_body).await
        {
            // It has passed the filters behind this one in another shape; those before it see it.
            if let Some(state) = &mut exchange.policy {
                state.encode.truncate(index);
            }
            return Err(reply);
        }
    }
    Ok(encoder)
}

/// Keeps the head of a response as the client gets it, where a change of its trailers names its fields.
pub(in crate::worker) fn keep_head(exchange: &mut Exchange, head: &HeaderMap) {
    if let Some(state) = &mut exchange.policy
        && state.trailers_name_the_head()
    {
        state.response = Some(head.clone());
    }
}

/// Lets the trailers of a response pass the chain.
pub(in crate::worker) fn encode_trailers(exchange: &mut Exchange, trailers: &mut HeaderMap) {
    if let Some(state) = exchange.policy.take() {
        state.pass_trailers(exchange, trailers);
        exchange.policy = Some(state);
    }
}

/// Lets the head of a response pass the chain that its request passed. What encodes its body is returned.
pub(in crate::worker) fn encode(exchange: &mut Exchange, head: &mut Head, has_body: bool) -> Option<Encoder> {
    let state = exchange.policy.take()?;
    let encoder = state.respond(exchange, head, has_body);
    exchange.policy = Some(state);
    encoder
}
