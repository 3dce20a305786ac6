//! Google's access tokens: from a service account's key (RFC 7523: a signed assertion for a token), or from the
//! metadata service of the machine.

use aws_lc_rs::rand::SystemRandom;
use aws_lc_rs::rsa::KeyPair;
use aws_lc_rs::signature::RSA_PKCS1_SHA256;
use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use http::header::{HeaderName, HeaderValue};
use jiff::{SignedDuration, Timestamp};
use reqwest::Url;
use rustls_pki_types::PrivatePkcs8KeyDer;
use rustls_pki_types::pem::PemObject;
use serde::Deserialize;
use serde_json::json;

use crate::credentials::Secret;
use crate::http::{Call, below};
use crate::tokens::file;
use crate::{Connector, Error};

/// What the token may do: read metrics.
const SCOPE: &str = "https://www.googleapis.com/auth/monitoring.read";
const METADATA: &str = "metadata.google.internal";
/// Longest life of an assertion that Google accepts.
const ASSERTION_SECONDS: i64 = 3600;

/// A service account's key file.
#[derive(Deserialize)]
struct Account {
    #[serde(rename = "type")]
    kind: String,
    #[serde(default)]
    client_email: String,
    #[serde(default)]
    private_key: String,
    #[serde(default)]
    token_uri: String,
}

#[derive(Deserialize)]
struct Token {
    access_token: String,
    #[serde(default)]
    expires_in: i64,
}

/// A token for reading metrics; with `key` for that service account, without for the one that this process runs as.
pub(crate) async fn token(
    connector: &Connector,
    provider: &'static str,
    key: Option<&Secret>,
    now: Timestamp,
) -> Result<Secret, Error> {
    let ambient;
    let key = match key {
        Some(key) => Some(key.expose_bytes()),
        None => match connector.environment.get("GOOGLE_APPLICATION_CREDENTIALS") {
            Some(path) => {
                ambient = file(provider, path).await?;
                Some(ambient.as_slice())
            }
            None => None,
        },
    };
    let account = key
        .map(|key| {
            serde_json::from_slice::<Account>(key).map_err(|error| Error::Credentials {
                provider,
                reason: format!("the service account's key is not one: {}", error_kind(&error)),
            })
        })
        .transpose()?;
    let name = account
        .as_ref()
        .map_or_else(|| "metadata".to_owned(), |account| account.client_email.clone());
    if let Some(token) = connector.tokens.google.get(&name, now) {
        return Ok(token);
    }
    let call = match &account {
        Some(account) => exchange(provider, account, now)?,
        None => metadata(connector, provider, "instance/service-accounts/default/token")?,
    };
    let token: Token = connector.http.send(&call).await?.json(provider)?;
    let expires = now
        .checked_add(SignedDuration::from_secs(
            token.expires_in.clamp(0, ASSERTION_SECONDS),
        ))
        .unwrap_or(now);
    let secret = Secret::new(token.access_token);
    connector.tokens.google.put(name, secret.clone(), expires, now);
    Ok(secret)
}

/// The project that this machine belongs to.
pub(crate) async fn project(connector: &Connector, provider: &'static str) -> Result<String, Error> {
    if let Some(project) = connector.environment.get("GOOGLE_CLOUD_PROJECT") {
        return Ok(project.to_owned());
    }
    let call = metadata(connector, provider, "project/project-id")?;
    let answer = connector.http.send(&call).await?;
    Ok(String::from_utf8_lossy(&answer.body).trim().to_owned())
}

/// Where in the file it went wrong, without repeating any of it.
fn error_kind(error: &serde_json::Error) -> String {
    format!("line {} column {}", error.line(), error.column())
}

fn metadata(connector: &Connector, provider: &'static str, path: &str) -> Result<Call, Error> {
    let host = connector.environment.get("GCE_METADATA_HOST").unwrap_or(METADATA);
    let mut call = Call::get(
        provider,
        below(
            provider,
            &format!("http://{host}"),
            &format!("computeMetadata/v1/{path}"),
        )?,
    );
    call.headers.insert(
        HeaderName::from_static("metadata-flavor"),
        HeaderValue::from_static("Google"),
    );
    Ok(call)
}

fn exchange(provider: &'static str, account: &Account, now: Timestamp) -> Result<Call, Error> {
    let bad = |reason: &str| Error::Credentials {
        provider,
        reason: reason.to_owned(),
    };
    if account.kind != "service_account" {
        return Err(bad("only keys of the type service_account are there"));
    }
    let der = PrivatePkcs8KeyDer::from_pem_slice(account.private_key.as_bytes())
        .map_err(|_| bad("the service account's private_key is not PEM (PKCS #8)"))?;
    let key = KeyPair::from_pkcs8(der.secret_pkcs8_der())
        .map_err(|_| bad("the service account's private_key is not an RSA key"))?;
    let issued = now.as_second();
    let part = |value: serde_json::Value| URL_SAFE_NO_PAD.encode(value.to_string());
    let mut assertion = format!(
        "{}.{}",
        part(json!({"alg": "RS256", "typ": "JWT"})),
        part(json!({
            "iss": account.client_email,
            "scope": SCOPE,
            "aud": account.token_uri,
            "iat": issued,
            "exp": issued + ASSERTION_SECONDS,
        }))
    );
    let mut signature = vec![0; key.public_modulus_len()];
    key.sign(
        &RSA_PKCS1_SHA256,
        &SystemRandom::new(),
        assertion.as_bytes(),
        &mut signature,
    )
    .map_err(|_| bad("the assertion cannot be signed"))?;
    assertion.push('.');
    assertion.push_str(&URL_SAFE_NO_PAD.encode(signature));
    let url = Url::parse(&account.token_uri)
        .ok()
        .filter(|url| matches!(url.scheme(), "http" | "https") && url.has_host())
        .ok_or_else(|| bad("the service account's token_uri is not a URL"))?;
    let mut form = url.clone();
    form.query_pairs_mut()
        .clear()
        .append_pair("grant_type", "urn:ietf:params:oauth:grant-type:jwt-bearer")
        .append_pair("assertion", &assertion);
    let body = form.query().unwrap_or_default().to_owned();
    Ok(Call::post(
        provider,
        url,
        "application/x-www-form-urlencoded",
        body,
    ))
}
