//! One HTTP client for all providers: deadlines, retries from a budget, bounded concurrency, bounded answers.

use std::collections::HashMap;
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use futures::StreamExt;
use http::header::{AUTHORIZATION, CONTENT_TYPE, HeaderMap, HeaderName, HeaderValue, RETRY_AFTER};
use http::{Method, StatusCode};
use parking_lot::Mutex;
use reqwest::Url;
use reqwest::redirect::Policy;
use tokio::sync::Semaphore;

use crate::credentials::Secret;
use crate::error::{Error, excerpt};
use crate::{Config, TIMEOUT};

/// Longest answer that is read. A query answers with one number; a megabyte is a query that forgot to aggregate.
pub const ANSWER_MAX: usize = 1 << 20;
/// Attempts after the first one.
const RETRIES: u32 = 2;
/// Wait before the first retry; doubled for the second.
const BACKOFF: Duration = Duration::from_millis(200);
/// Retries that a host may be sent in a row; each success earns a tenth of one back.
const BUDGET: f64 = 10.0;
const BUDGET_PER_SUCCESS: f64 = 0.1;
/// Redirects that are followed, within one origin.
const REDIRECTS: usize = 3;
/// Hosts whose budget is remembered.
const HOSTS_MAX: usize = 1024;

/// How much may be going on at once.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Requests to all hosts together.
    pub requests: usize,
    /// Requests to one host.
    pub requests_per_host: usize,
}

impl Default for Limits {
    /// 64 in all, 8 per host: a Prometheus evaluates 20 queries at once by default, for everybody together.
    fn default() -> Self {
        Self {
            requests: 64,
            requests_per_host: 8,
        }
    }
}

/// A request that is safe to repeat.
pub(crate) struct Call {
    pub(crate) provider: &'static str,
    pub(crate) method: Method,
    pub(crate) url: Url,
    pub(crate) headers: HeaderMap,
    pub(crate) body: Bytes,
    pub(crate) insecure: bool,
    /// Deadline over all attempts.
    pub(crate) timeout: Duration,
}

impl Call {
    pub(crate) fn get(provider: &'static str, url: Url) -> Self {
        Self {
            provider,
            method: Method::GET,
            url,
            headers: HeaderMap::new(),
            body: Bytes::new(),
            insecure: false,
            timeout: TIMEOUT,
        }
    }

    pub(crate) fn post(
        provider: &'static str,
        url: Url,
        content: &'static str,
        body: impl Into<Bytes>,
    ) -> Self {
        let mut call = Self::get(provider, url);
        call.method = Method::POST;
        call.headers
            .insert(CONTENT_TYPE, HeaderValue::from_static(content));
        call.body = body.into();
        call
    }

    /// With the configuration's headers and its wish about certificates.
    pub(crate) fn with_config(mut self, config: &Config) -> Result<Self, Error> {
        let bad = |name: &str| {
            Error::config(
                self.provider,
                format!("header {name:?} is not one that HTTP can carry"),
            )
        };
        for (name, values) in &config.headers {
            let header: HeaderName = name.parse().map_err(|_| bad(name))?;
            for value in values {
                self.headers
                    .append(header.clone(), value.parse().map_err(|_| bad(name))?);
            }
        }
        self.insecure = config.insecure_skip_verify;
        Ok(self)
    }

    /// With a header whose value is secret: `prefix` and the secret.
    pub(crate) fn with_secret(
        mut self,
        name: HeaderName,
        prefix: &str,
        secret: &Secret,
    ) -> Result<Self, Error> {
        let unfit = || Error::Credentials {
            provider: self.provider,
            reason: "the secret has characters that a header cannot carry".to_owned(),
        };
        let value = secret.expose().map_err(|_| unfit())?;
        let mut value: HeaderValue = format!("{prefix}{value}").parse().map_err(|_| unfit())?;
        value.set_sensitive(true);
        self.headers.insert(name, value);
        Ok(self)
    }

    /// With a user name and a password (RFC 7617).
    pub(crate) fn with_basic(self, username: &Secret, password: &Secret) -> Result<Self, Error> {
        use base64::Engine;
        let unfit = |_| Error::Credentials {
            provider: self.provider,
            reason: "user name or password are not UTF-8".to_owned(),
        };
        let pair = format!(
            "{}:{}",
            username.expose().map_err(unfit)?,
            password.expose().map_err(unfit)?
        );
        let encoded = Secret::new(base64::engine::general_purpose::STANDARD.encode(pair));
        self.with_secret(AUTHORIZATION, "Basic ", &encoded)
    }

    pub(crate) fn with_timeout(mut self, timeout: Duration) -> Self {
        self.timeout = timeout;
        self
    }

    pub(crate) fn host(&self) -> String {
        host(&self.url)
    }
}

fn host(url: &Url) -> String {
    let name = url.host_str().unwrap_or_default();
    match url.port_or_known_default() {
        Some(port) => format!("{name}:{port}"),
        None => name.to_owned(),
    }
}

/// An answer below 400.
pub(crate) struct Answer {
    pub(crate) body: Bytes,
}

impl Answer {
    pub(crate) fn json<T: serde::de::DeserializeOwned>(&self, provider: &'static str) -> Result<T, Error> {
        serde_json::from_slice(&self.body)
            .map_err(|error| Error::answer(provider, format!("{error}: {}", excerpt(&self.body))))
    }
}

struct Host {
    permits: Semaphore,
    budget: Mutex<f64>,
}

pub(crate) struct Http {
    verifying: reqwest::Client,
    trusting: OnceLock<Option<reqwest::Client>>,
    permits: Semaphore,
    hosts: Mutex<HashMap<String, Arc<Host>>>,
    limits: Limits,
}

fn client(verify: bool) -> Result<reqwest::Client, reqwest::Error> {
    let same_origin = Policy::custom(|attempt| {
        let first = attempt.previous().first();
        let same = first.is_some_and(|first| first.origin() == attempt.url().origin());
        if same && attempt.previous().len() <= REDIRECTS {
            attempt.follow()
        } else {
            // The answer is the redirect then, which is an error that names where it leads to.
            attempt.stop()
        }
    });
    reqwest::Client::builder()
        .redirect(same_origin)
        .user_agent(concat!("serin/", env!("CARGO_PKG_VERSION")))
        .connect_timeout(TIMEOUT)
        .tls_danger_accept_invalid_certs(!verify)
        .build()
}

/// What one attempt came to.
enum Attempt {
    Done(Answer),
    Final(Error),
    /// Worth a retry, after the time that the server asked for.
    Again(Error, Option<Duration>),
}

impl Http {
    pub(crate) fn new(limits: Limits) -> Result<Self, Error> {
        Ok(Self {
            verifying: client(true).map_err(|error| Error::config("http", error.to_string()))?,
            trusting: OnceLock::new(),
            permits: Semaphore::new(limits.requests.max(1)),
            hosts: Mutex::default(),
            limits,
        })
    }

    fn client(&self, call: &Call) -> Result<&reqwest::Client, Error> {
        if !call.insecure {
            return Ok(&self.verifying);
        }
        self.trusting
            .get_or_init(|| client(false).ok())
            .as_ref()
            .ok_or_else(|| Error::config(call.provider, "insecureSkipVerify cannot be honoured here"))
    }

    fn host(&self, name: &str) -> Arc<Host> {
        let mut hosts = self.hosts.lock();
        if hosts.len() >= HOSTS_MAX && !hosts.contains_key(name) {
            hosts.retain(|_, host| Arc::strong_count(host) > 1);
        }
        hosts
            .entry(name.to_owned())
            .or_insert_with(|| {
                Arc::new(Host {
                    permits: Semaphore::new(self.limits.requests_per_host.max(1)),
                    budget: Mutex::new(BUDGET),
                })
            })
            .clone()
    }

    /// Sends a request and reads its answer. Any status of 300 and above is an error.
    pub(crate) async fn send(&self, call: &Call) -> Result<Answer, Error> {
        let host = self.host(&call.host());
        match tokio::time::timeout(call.timeout, self.attempts(call, &host)).await {
            Ok(result) => result,
            Err(_) => Err(Error::Timeout {
                provider: call.provider,
                host: call.host(),
                seconds: call.timeout.as_secs(),
            }),
        }
    }

    async fn attempts(&self, call: &Call, host: &Host) -> Result<Answer, Error> {
        let closed = |_| Error::config(call.provider, "the client is shut down");
        let _one_of_all = self.permits.acquire().await.map_err(closed)?;
        let _one_of_host = host.permits.acquire().await.map_err(closed)?;
        let mut backoff = BACKOFF;
        for retries_left in (0..=RETRIES).rev() {
            match self.attempt(call).await {
                Attempt::Done(answer) => {
                    let mut budget = host.budget.lock();
                    *budget = (*budget + BUDGET_PER_SUCCESS).min(BUDGET);
                    return Ok(answer);
                }
                Attempt::Final(error) => return Err(error),
                Attempt::Again(error, asked) => {
                    if retries_left == 0 || !take(host) {
                        return Err(error);
                    }
                    // A provider tells nobody when it is well again: it is asked again after as long as it asked for, or
                    // ever more rarely, within the retries of the host's budget and the deadline of the whole query.
                    tokio::time::sleep(asked.unwrap_or(backoff)).await;
                    backoff *= 2;
                }
            }
        }
        Err(Error::config(call.provider, "no attempt was made"))
    }

    async fn attempt(&self, call: &Call) -> Attempt {
        let client = match self.client(call) {
            Ok(client) => client,
            Err(error) => return Attempt::Final(error),
        };
        let sent = client
            .request(call.method.clone(), call.url.clone())
            .headers(call.headers.clone())
            .body(call.body.clone())
            .send()
            .await;
        let response = match sent {
            Ok(response) => response,
            Err(error) => return Attempt::Again(unreachable(call, error), None),
        };
        let status = response.status();
        let retry_after = response
            .headers()
            .get(RETRY_AFTER)
            .and_then(|value| value.to_str().ok()?.parse().ok())
            .map(Duration::from_secs);
        let location = response
            .headers()
            .get(http::header::LOCATION)
            .and_then(|value| value.to_str().ok())
            .and_then(|value| Url::parse(value).ok())
            .map(|url| host_of(&url));
        let body = match read(call, response).await {
            Ok(body) => body,
            Err(attempt) => return attempt,
        };
        if status.is_success() {
            return Attempt::Done(Answer { body });
        }
        let error = Error::Status {
            provider: call.provider,
            host: call.host(),
            status: status.as_u16(),
            excerpt: match location {
                Some(location) => {
                    format!("a redirect to {location}, which is not followed; set that address")
                }
                None => excerpt(&body),
            },
        };
        match status {
            StatusCode::TOO_MANY_REQUESTS
            | StatusCode::BAD_GATEWAY
            | StatusCode::SERVICE_UNAVAILABLE
            | StatusCode::GATEWAY_TIMEOUT => Attempt::Again(error, retry_after),
            _ => Attempt::Final(error),
        }
    }
}

fn host_of(url: &Url) -> String {
    format!("{}://{}", url.scheme(), host(url))
}

fn take(host: &Host) -> bool {
    let mut budget = host.budget.lock();
    let enough = *budget >= 1.0;
    if enough {
        *budget -= 1.0;
    }
    enough
}

/// The reason without the URL, whose query may hold what should not be in a log.
fn unreachable(call: &Call, error: reqwest::Error) -> Error {
    let error = error.without_url();
    let mut reason = error.to_string();
    let mut source = std::error::Error::source(&error);
    while let Some(cause) = source {
        reason.push_str(": ");
        reason.push_str(&cause.to_string());
        source = cause.source();
    }
    Error::Unreachable {
        provider: call.provider,
        host: call.host(),
        reason,
    }
}

async fn read(call: &Call, response: reqwest::Response) -> Result<Bytes, Attempt> {
    let mut body = BytesMut::new();
    let mut stream = response.bytes_stream();
    while let Some(chunk) = stream.next().await {
        let chunk = chunk.map_err(|error| Attempt::Again(unreachable(call, error), None))?;
        if body.len() + chunk.len() > ANSWER_MAX {
            return Err(Attempt::Final(Error::answer(
                call.provider,
                format!("the answer is longer than {ANSWER_MAX} bytes; make the query aggregate"),
            )));
        }
        body.extend_from_slice(&chunk);
    }
    Ok(body.freeze())
}

/// `address` with `path` below it, as Go's `path.Join`: no doubled slashes.
pub(crate) fn below(provider: &'static str, address: &str, path: &str) -> Result<Url, Error> {
    let invalid =
        |reason: String| Error::config(provider, format!("spec.provider.address is not a URL: {reason}"));
    let mut url = Url::parse(address).map_err(|error| invalid(error.to_string()))?;
    if !matches!(url.scheme(), "http" | "https") || !url.has_host() {
        return Err(invalid(
            "it must begin with http:// or https:// and name a host".to_owned(),
        ));
    }
    let base = url.path().trim_end_matches('/').to_owned();
    url.set_path(&format!("{base}/{}", path.trim_start_matches('/')));
    Ok(url)
}

/// A query with each run of white space as one space, as Flagger sends it.
pub(crate) fn one_line(query: &str) -> String {
    let mut line = String::with_capacity(query.len());
    let mut space = false;
    for c in query.chars() {
        // Go's \s: ASCII only.
        let is_space = matches!(c, ' ' | '\t' | '\n' | '\r' | '\x0c');
        if !is_space {
            line.push(c);
        } else if !space {
            line.push(' ');
        }
        space = is_space;
    }
    line
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_path_is_put_below_the_address() {
        for (address, expected) in [
            ("http://p:9090", "http://p:9090/api/v1/query"),
            ("http://p:9090/", "http://p:9090/api/v1/query"),
            ("https://p/tenant/a/", "https://p/tenant/a/api/v1/query"),
        ] {
            assert_eq!(
                below("prometheus", address, "api/v1/query").unwrap().as_str(),
                expected
            );
        }
        for address in ["prometheus:9090", "p", "ftp://p", "http://"] {
            assert!(below("prometheus", address, "x").is_err(), "{address}");
        }
    }

    #[test]
    fn each_run_of_white_space_becomes_one_space() {
        assert_eq!(one_line("  a{\n    b=\"c\"\n  }[30s]\n"), " a{ b=\"c\" }[30s] ");
    }
}
