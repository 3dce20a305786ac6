//! JWT authentication on the worker: finding keys, evaluating what a request must bring, telling it what it lacks.

use std::future::Future;
use std::pin::Pin;
use std::rc::Rc;
use std::sync::{Arc, Weak};
use std::time::{SystemTime, UNIX_EPOCH};

use bytes::Bytes;
use http::request::Parts;
use http::{HeaderValue, Method, Request, StatusCode, Uri, header};

use super::{Passed, Verdict, metadata, state};
use crate::clock;
use crate::config::route::RouteFacts;
use crate::metrics::flags::Flags;
use crate::policy::jwt::jwks::{Need, Remote, Source};
use crate::policy::jwt::keys::KeySet;
use crate::policy::jwt::token::{Failure, Token};
use crate::policy::jwt::{Found, Instead, JwtAuthn, PerRouteJwt, Provider, Requirement};
use crate::policy::per_route::Override;
use crate::random;
use crate::worker::Worker;
use crate::worker::call::call;
use crate::worker::exchange::Exchange;
use crate::worker::local::LocalReply;
use crate::worker::request::view;

/// Bytes of the path in a realm (Envoy).
const MAX_REALM_PATH: usize = 256;

/// One evaluation. Good tokens are told of as they are found, also where the requirement is not met in the end (Envoy).
struct Trial<'a> {
    worker: Rc<Worker>,
    authn: &'a JwtAuthn,
    exchange: &'a mut Exchange,
    parts: &'a mut Parts,
    now_s: u64,
    /// A good token's provider wants the route to be searched again.
    reroute: bool,
}

/// Checks the tokens of a request.
pub(super) async fn authenticate(
    exchange: &mut Exchange,
    authn: &JwtAuthn,
    own: Option<&Override>,
    parts: &mut Parts,
) -> Verdict {
    let worker = exchange.conn.worker.clone();
    // As it came: a provider may take the fields off that say so.
    let preflight = authn.bypass_preflight && is_preflight(parts);
    for provider in &authn.providers {
        provider.sanitize(&mut parts.headers);
    }
    if preflight {
        authn.bypassed.add(worker.id);
        return Ok(Passed::On);
    }
    let requirement = match requirement(exchange, authn, own, parts) {
        Ok(Some(requirement)) => requirement,
        Ok(None) => {
            authn.allowed.add(worker.id);
            return Ok(Passed::On);
        }
        Err(reply) => {
            authn.denied.add(worker.id);
            return Err(reply);
        }
    };
    // As it came: a good token may be taken out of it.
    let asked = parts.uri.clone();
    let mut trial = Trial {
        worker: worker.clone(),
        authn,
        exchange,
        parts,
        now_s: SystemTime::now()
            .duration_since(UNIX_EPOCH)
            .unwrap_or_default()
            .as_secs(),
        reroute: false,
    };
    let result = trial.evaluate(requirement).await;
    let reroute = trial.reroute;
    if let Err(failure) = result {
        authn.denied.add(worker.id);
        return Err(denial(authn, failure, parts, &asked));
    }
    authn.allowed.add(worker.id);
    Ok(Passed::rerouted_if(reroute))
}

fn is_preflight(parts: &Parts) -> bool {
    parts.method == Method::OPTIONS
        && parts.headers.contains_key(header::ORIGIN)
        && parts.headers.contains_key(header::ACCESS_CONTROL_REQUEST_METHOD)
}

/// What a request must bring: as its route names it, or as the filter's rules say.
fn requirement<'a>(
    exchange: &Exchange,
    authn: &'a JwtAuthn,
    own: Option<&Override>,
    parts: &Parts,
) -> Result<Option<&'a Requirement>, LocalReply> {
    match own {
        Some(Override::Jwt(PerRouteJwt::Disabled)) => Ok(None),
        Some(Override::Jwt(PerRouteJwt::Named(name))) => match authn.named(name) {
            Some(requirement) => Ok(Some(requirement)),
            None => Err(LocalReply::new(
                StatusCode::FORBIDDEN,
                Flags::default(),
                "jwt_authn_access_denied{requirement_not_found}",
                "Failed JWT authentication",
            )),
        },
        _ => {
            let facts = RouteFacts {
                tls: exchange.conn.tls.as_deref(),
                metadata: Some(metadata(exchange)),
            };
            Ok(authn.requirement(&view(parts), &facts, &random::next))
        }
    }
}

/// The answer to a request for `asked`, as it came.
fn denial(authn: &JwtAuthn, failure: Failure, parts: &Parts, asked: &Uri) -> LocalReply {
    let status = if failure == Failure::Audience {
        StatusCode::FORBIDDEN
    } else {
        StatusCode::UNAUTHORIZED
    };
    let text = failure.to_string();
    let details = format!("jwt_authn_access_denied{{{}}}", text.replace(' ', "_"));
    let mut reply = LocalReply::new(status, Flags::default(), details, "");
    if authn.strip_failure {
        return reply;
    }
    reply.body = Bytes::from(text);
    // Also with a 403 (Envoy).
    let view = view(parts);
    let error = if failure == Failure::Missing {
        ""
    } else {
        ", error=\"invalid_token\""
    };
    let path = asked.path_and_query().map_or("/", |path| path.as_str());
    let path = path.get(..MAX_REALM_PATH).unwrap_or(path);
    let realm = format!("{}://{}{path}", view.scheme(), view.authority()).replace(['"', '\\'], "");
    if let Ok(value) = HeaderValue::from_str(&format!("Bearer realm=\"{realm}\"{error}")) {
        reply.headers.insert(header::WWW_AUTHENTICATE, value);
    }
    reply
}

impl Trial<'_> {
    fn evaluate<'s>(
        &'s mut self,
        requirement: &'s Requirement,
    ) -> Pin<Box<dyn Future<Output = Result<(), Failure>> + 's>> {
        Box::pin(async move {
            match requirement {
                Requirement::Provider(index, audiences) => self.provider(*index, audiences.as_deref()).await,
                Requirement::All(all) => {
                    for inner in all {
                        self.evaluate(inner).await?;
                    }
                    Ok(())
                }
                Requirement::Any(any, instead) => self.any(any, *instead).await,
                Requirement::AllowMissing => self.every_token().await,
                Requirement::AllowMissingOrFailed => {
                    let _ = self.every_token().await;
                    Ok(())
                }
            }
        })
    }

    /// One of these. A failure that says more than that there is no token for it, or one of somebody else, is the one that
    /// is told.
    async fn any(&mut self, any: &[Requirement], instead: Instead) -> Result<(), Failure> {
        let mut reason = Failure::Missing;
        for inner in any {
            match self.evaluate(inner).await {
                Ok(()) => return Ok(()),
                Err(failure) if !failure.is_missing() || reason == Failure::Missing => reason = failure,
                Err(_) => {}
            }
        }
        match instead {
            Instead::Anything => Ok(()),
            Instead::NoToken if reason == Failure::Missing => Ok(()),
            Instead::NoToken | Instead::Nothing => Err(reason),
        }
    }

    /// Every token that the request brings, for whichever provider, must be good; all are judged, and the failure of the
    /// last one that is judged is told if that fails. Envoy lets requests pass whose last one is good, whatever the others
    /// are; an endpoint may take one of those.
    async fn every_token(&mut self) -> Result<(), Failure> {
        for provider in &self.authn.providers {
            provider.sanitize(&mut self.parts.headers);
        }
        let mut result = Ok(());
        for found in self
            .authn
            .places
            .find(&self.parts.headers, self.parts.uri.query())
            .iter()
            .rev()
        {
            result = self.own(found).await.and(result);
        }
        result
    }

    /// A token of whoever issued it, as long as that provider, or one for any issuer, looks for tokens where it was.
    async fn own(&mut self, found: &Found<'_>) -> Result<(), Failure> {
        let token = Token::parse(&found.text)?;
        let here = |owner: &usize| {
            let issuer = &*self.authn.providers[*owner].issuer;
            issuer.is_empty() || issuer == token.issuer()
        };
        let provider = self
            .authn
            .provider_of(&token)
            .filter(|_| found.owners.iter().any(here));
        let provider = provider.ok_or(Failure::UnknownIssuer)?;
        self.judge(provider, found, None).await
    }

    /// Every token that the request brings for a provider must be good, and there must be one.
    async fn provider(&mut self, index: usize, audiences: Option<&[Box<str>]>) -> Result<(), Failure> {
        let authn = self.authn;
        let provider = &authn.providers[index];
        // Also what another provider's token has made of the request (Envoy).
        provider.sanitize(&mut self.parts.headers);
        let all = provider.places.find(&self.parts.headers, self.parts.uri.query());
        for found in all.iter().rev() {
            self.judge(provider, found, audiences).await?;
        }
        if all.is_empty() {
            Err(Failure::Missing)
        } else {
            Ok(())
        }
    }

    /// Verifies a token, and tells of it by fields and metadata, or of why it is not good.
    async fn judge(
        &mut self,
        provider: &Arc<Provider>,
        found: &Found<'_>,
        audiences: Option<&[Box<str>]>,
    ) -> Result<(), Failure> {
        let verified = self.verify(provider, &found.text, audiences).await;
        let metadata = &mut state(self.exchange).metadata;
        let token = match verified {
            Ok(token) => token,
            Err(failure) => {
                provider.note_failure(failure, metadata);
                return Err(failure);
            }
        };
        self.reroute |= provider.clear_route;
        let uri = &self.parts.uri;
        let query = provider.accept(
            &token,
            found.place,
            &mut self.parts.headers,
            uri.query(),
            metadata,
        );
        let Some(query) = query else { return Ok(()) };
        let target = match &*query {
            "" => uri.path().to_owned(),
            query => format!("{}?{query}", uri.path()),
        };
        if let Ok(uri) = target.parse::<Uri>() {
            self.parts.uri = uri;
        }
        Ok(())
    }

    async fn verify(
        &self,
        provider: &Arc<Provider>,
        text: &str,
        audiences: Option<&[Box<str>]>,
    ) -> Result<Arc<Token>, Failure> {
        let (token, verified) = provider.read(text, audiences, self.now_s)?;
        let keys = match &provider.source {
            Source::Local(keys) => keys.clone(),
            Source::Remote(remote) => fetched(&self.worker, remote, token.key_id.as_deref()).await?,
        };
        provider.verify(text, &token, verified.as_ref(), &keys)?;
        Ok(token)
    }
}

/// The keys behind a URI, fetched if need be.
async fn fetched(
    worker: &Rc<Worker>,
    remote: &Arc<Remote>,
    key_id: Option<&str>,
) -> Result<Arc<KeySet>, Failure> {
    match remote.need(key_id, clock::now_ms()) {
        Need::Nothing(keys) => Ok(keys),
        Need::Refresh(keys) => {
            if remote.begin() {
                start_fetch(worker, remote);
            }
            Ok(keys)
        }
        Need::Failed => Err(Failure::Fetch),
        Need::Wait => {
            if remote.begin() {
                start_fetch(worker, remote);
            }
            remote.wait().await;
            remote.current(clock::now_ms()).ok_or(Failure::Fetch)
        }
    }
}

/// Ends a fetch as failed unless it has ended otherwise: also when the worker goes while it is under way.
struct Fetch(Arc<Remote>, bool);

impl Fetch {
    fn end(&mut self, keys: Option<KeySet>) {
        if !std::mem::replace(&mut self.1, true) {
            self.0.end(keys, clock::now_ms());
        }
    }
}

impl Drop for Fetch {
    fn drop(&mut self) {
        self.end(None);
    }
}

/// A task of its own: the request that needs the keys may be gone before they come.
fn start_fetch(worker: &Rc<Worker>, remote: &Arc<Remote>) {
    let fetch = Fetch(remote.clone(), false);
    let on = worker.clone();
    worker.tasks.spawn_local(async move {
        fetch_keys(&on, fetch).await;
    });
}

/// Fetches keys; whether they came.
async fn fetch_keys(worker: &Worker, mut fetch: Fetch) -> bool {
    let remote = fetch.0.clone();
    for attempt in 0..=remote.retries.count {
        if attempt > 0 {
            tokio::time::sleep(remote.retries.back_off(attempt - 1, random::next())).await;
        }
        let mut request = Request::new(Bytes::new());
        *request.uri_mut() = Uri::from(remote.target.path.clone());
        request
            .headers_mut()
            .insert(header::HOST, remote.target.authority.clone());
        let answer = call(
            worker,
            &remote.target.cluster,
            request,
            false,
            remote.target.timeout,
        )
        .await;
        let keys = match answer {
            Ok(answer) if answer.head.status == StatusCode::OK => KeySet::parse(&answer.body),
            Ok(answer) => Err(format!("the answer is {}", answer.head.status)),
            Err(error) => Err(error.to_string()),
        };
        match keys {
            Ok(keys) => {
                fetch.end(Some(keys));
                return true;
            }
            Err(error) => {
                tracing::warn!(
                    provider = %remote.provider,
                    uri = %remote.target.path,
                    attempt,
                    %error,
                    "cannot fetch the keys"
                );
            }
        }
    }
    fetch.end(None);
    false
}

/// Fetches keys before any request needs them, and again before they are believed no more, until nobody refers to them.
pub(crate) fn fetch_ahead(worker: &Rc<Worker>, remote: Weak<Remote>) {
    let on = worker.clone();
    worker.tasks.spawn_local(async move {
        loop {
            let wait = {
                let Some(remote) = remote.upgrade() else { return };
                let Some(ahead) = remote.ahead else { return };
                // Where a request's fetch is under way, its outcome counts.
                let well = if remote.begin() {
                    fetch_keys(&on, Fetch(remote.clone(), false)).await
                } else {
                    remote.wait().await;
                    remote.current(clock::now_ms()).is_some()
                };
                remote.next_fetch(ahead, well)
            };
            tokio::select! {
                () = tokio::time::sleep(wait) => {}
                () = on.closing() => return,
            }
        }
    });
}
