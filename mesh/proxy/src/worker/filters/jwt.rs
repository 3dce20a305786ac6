//! JWT authentication on the worker: finding keys, evaluating what a request must bring, telling it what it lacks.

use std::cell::RefCell;
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
use crate::policy::jwt::{Found, JwtAuthn, PerRouteJwt, Place, Provider, Requirement};
use crate::policy::per_route::Override;
use crate::random;
use crate::worker::Worker;
use crate::worker::call::call;
use crate::worker::exchange::Exchange;
use crate::worker::local::LocalReply;
use crate::worker::request::view;

/// Bytes of the path in a realm (Envoy).
const MAX_REALM_PATH: usize = 256;

struct Accepted {
    provider: Arc<Provider>,
    token: Arc<Token>,
    place: Place,
}

/// One evaluation.
struct Trial<'a> {
    worker: &'a Rc<Worker>,
    authn: &'a JwtAuthn,
    parts: &'a Parts,
    now_s: u64,
    accepted: RefCell<Vec<Accepted>>,
    failures: RefCell<Vec<(Arc<Provider>, Failure)>>,
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
    let trial = Trial {
        worker: &worker,
        authn,
        parts,
        now_s: SystemTime::now()
            .duration_since(UNIX_EPOCH)
            .unwrap_or_default()
            .as_secs(),
        accepted: RefCell::default(),
        failures: RefCell::default(),
    };
    let result = trial.evaluate(requirement).await;
    let (accepted, failures) = (trial.accepted.into_inner(), trial.failures.into_inner());
    for (provider, failure) in failures {
        provider.note_failure(failure, &mut state(exchange).metadata);
    }
    // Good tokens have been told of also where the requirement is not met (Envoy).
    let asked = result.is_err().then(|| parts.uri.clone());
    let mut reroute = false;
    for accepted in accepted {
        reroute |= accepted.provider.clear_route;
        accepted.tell(exchange, parts);
    }
    if let Err(failure) = result {
        authn.denied.add(worker.id);
        let asked = asked.as_ref().unwrap_or(&parts.uri);
        return Err(denial(authn, failure, parts, asked));
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

impl Accepted {
    /// Tells of a good token by fields and metadata, and takes it off where the provider says so.
    fn tell(self, exchange: &mut Exchange, parts: &mut Parts) {
        let query = self.provider.accept(
            &self.token,
            &self.place,
            &mut parts.headers,
            parts.uri.query(),
            &mut state(exchange).metadata,
        );
        let Some(query) = query else { return };
        let target = match &*query {
            "" => parts.uri.path().to_owned(),
            query => format!("{}?{query}", parts.uri.path()),
        };
        if let Ok(uri) = target.parse::<Uri>() {
            parts.uri = uri;
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
    fn evaluate<'a>(
        &'a self,
        requirement: &'a Requirement,
    ) -> Pin<Box<dyn Future<Output = Result<(), Failure>> + 'a>> {
        Box::pin(async move {
            match requirement {
                Requirement::Provider(index, audiences) => {
                    self.provider(&self.authn.providers[*index], audiences.as_deref())
                        .await
                }
                Requirement::All(all) => {
                    for inner in all {
                        self.evaluate(inner).await?;
                    }
                    Ok(())
                }
                Requirement::Any(any) => self.any(any).await,
                Requirement::AllowMissing => self.every_token(&[], false).await,
                Requirement::AllowMissingOrFailed => self.every_token(&[], true).await,
            }
        })
    }

    /// One of these. What a request without a token meets comes last, since it judges every token that there is; it looks
    /// where the providers beside it do (Envoy).
    async fn any(&self, any: &[Requirement]) -> Result<(), Failure> {
        let mut reason = Failure::Missing;
        let mut only_missing = true;
        let mut note = |failure: Failure| {
            if !failure.is_missing() {
                only_missing = false;
                reason = failure;
            } else if only_missing && reason == Failure::Missing {
                reason = failure;
            }
        };
        for inner in any.iter().filter(|inner| !inner.is_lenient()) {
            match self.evaluate(inner).await {
                Ok(()) => return Ok(()),
                Err(failure) => note(failure),
            }
        }
        let pardoned = any
            .iter()
            .any(|inner| matches!(inner, Requirement::AllowMissingOrFailed));
        if pardoned || (reason.is_missing() && any.iter().any(Requirement::is_lenient)) {
            let mut beside = Vec::new();
            for inner in any {
                inner.providers(&mut beside);
            }
            return self.every_token(&beside, pardoned).await;
        }
        Err(reason)
    }

    /// Every token that the request brings for these providers must be good, unless those that are not are `pardoned`.
    async fn every_token(&self, only: &[usize], pardoned: bool) -> Result<(), Failure> {
        let query = self.parts.uri.query();
        let tokens = self.authn.tokens(only, &self.parts.headers, query);
        for (found, owners) in tokens.iter().filter(|(found, _)| !self.is_taken(&found.place)) {
            match self.own(found, owners).await {
                Ok(accepted) => self.accepted.borrow_mut().push(accepted),
                Err(_) if pardoned => {}
                Err(failure) => return Err(failure),
            }
        }
        Ok(())
    }

    /// Whether the token that was here has been used, and does not stay in the request.
    fn is_taken(&self, place: &Place) -> bool {
        let accepted = self.accepted.borrow();
        let mut taken = accepted.iter().filter(|accepted| !accepted.provider.forward);
        *place != Place::Cookie && taken.any(|accepted| accepted.place == *place)
    }

    /// A token of whoever issued it, as long as that provider, or one for any issuer, looks for tokens where it was.
    async fn own(&self, found: &Found, owners: &[&Arc<Provider>]) -> Result<Accepted, Failure> {
        let token = Token::parse(&found.text)?;
        let here = |owner: &&Arc<Provider>| owner.issuer.is_empty() || *owner.issuer == *token.issuer();
        let provider = self.authn.provider_of(&token).filter(|_| owners.iter().any(here));
        let provider = provider.ok_or(Failure::UnknownIssuer)?;
        match self.verify(provider, &found.text, None).await {
            Ok(token) => Ok(Accepted {
                provider: provider.clone(),
                token,
                place: found.place.clone(),
            }),
            Err(failure) => {
                self.failures.borrow_mut().push((provider.clone(), failure));
                Err(failure)
            }
        }
    }

    /// Every token that the request brings for a provider must be good, and there must be one.
    async fn provider(
        &self,
        provider: &Arc<Provider>,
        audiences: Option<&[Box<str>]>,
    ) -> Result<(), Failure> {
        let mut found = provider.extract(&self.parts.headers, self.parts.uri.query());
        found.retain(|found| !self.is_taken(&found.place));
        let mut good = Vec::with_capacity(found.len());
        for found in found {
            match self.verify(provider, &found.text, audiences).await {
                Ok(token) => good.push(Accepted {
                    provider: provider.clone(),
                    token,
                    place: found.place,
                }),
                Err(failure) => {
                    self.failures.borrow_mut().push((provider.clone(), failure));
                    return Err(failure);
                }
            }
        }
        if good.is_empty() {
            return Err(Failure::Missing);
        }
        self.accepted.borrow_mut().extend(good);
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
            Source::Remote(remote) => fetched(self.worker, remote, token.key_id.as_deref()).await?,
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
