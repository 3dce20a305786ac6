//! Amazon's request signature (Signature Version 4) and where its keys come from.
//!
//! The chain is that of Amazon's own libraries: environment variables, a web identity (a pod's service account), the
//! shared credentials file, the container's or pod's agent, the instance's metadata service.

use aws_lc_rs::{digest, hmac};
use http::Method;
use http::header::{ACCEPT, AUTHORIZATION, HeaderName, HeaderValue};
use jiff::{SignedDuration, Timestamp};
use reqwest::Url;
use serde::Deserialize;

use crate::credentials::Secret;
use crate::http::{Call, below};
use crate::tokens::file;
use crate::{Connector, Error};

const METADATA: &str = "http://169.254.169.254";
/// Address of a container's agent, when only a path is given (Amazon's constant).
const CONTAINER: &str = "http://169.254.170.2";
/// How long keys without an end of their own are kept.
const KEPT: SignedDuration = SignedDuration::from_mins(15);

/// An access key.
#[derive(Clone, Debug)]
pub(crate) struct Keys {
    pub(crate) id: String,
    pub(crate) secret: Secret,
    pub(crate) session: Option<Secret>,
}

pub(crate) fn hex(bytes: &[u8]) -> String {
    use std::fmt::Write;
    bytes.iter().fold(String::new(), |mut text, byte| {
        // Writing to a String does not fail.
        let _ = write!(text, "{byte:02x}");
        text
    })
}

fn sha256(bytes: &[u8]) -> String {
    hex(digest::digest(&digest::SHA256, bytes).as_ref())
}

fn keyed(key: &[u8], data: &str) -> Vec<u8> {
    let key = hmac::Key::new(hmac::HMAC_SHA256, key);
    hmac::sign(&key, data.as_bytes()).as_ref().to_vec()
}

/// What of a request is signed. `headers` by lower-case name, sorted.
struct Canonical<'a> {
    method: &'a str,
    path: &'a str,
    query: &'a str,
    headers: &'a [(String, String)],
    body: &'a [u8],
}

/// The `Authorization` header for a request at `at`.
fn authorization(request: &Canonical<'_>, keys: &Keys, region: &str, service: &str, at: &str) -> String {
    let names: Vec<&str> = request.headers.iter().map(|(name, _)| name.as_str()).collect();
    let names = names.join(";");
    let headers = request.headers.iter();
    let headers = headers.fold(String::new(), |text, (name, value)| {
        text + name + ":" + value + "\n"
    });
    let canonical = format!(
        "{}\n{}\n{}\n{headers}\n{names}\n{}",
        request.method,
        request.path,
        request.query,
        sha256(request.body)
    );
    let day = &at[..8];
    let scope = format!("{day}/{region}/{service}/aws4_request");
    let to_sign = format!(
        "AWS4-HMAC-SHA256\n{at}\n{scope}\n{}",
        sha256(canonical.as_bytes())
    );
    let signature = keyed(&signing_key(keys, day, region, service), &to_sign);
    format!(
        "AWS4-HMAC-SHA256 Credential={}/{scope}, SignedHeaders={names}, Signature={}",
        keys.id,
        hex(&signature)
    )
}

fn signing_key(keys: &Keys, day: &str, region: &str, service: &str) -> Vec<u8> {
    let first = [b"AWS4", keys.secret.expose_bytes()].concat();
    let dated = keyed(&first, day);
    let regional = keyed(&dated, region);
    let of_service = keyed(&regional, service);
    keyed(&of_service, "aws4_request")
}

/// Signs a call to the root of a service: adds `x-amz-date`, `x-amz-security-token` and `authorization`.
pub(crate) fn sign(
    call: &mut Call,
    keys: &Keys,
    region: &str,
    service: &str,
    now: Timestamp,
) -> Result<(), Error> {
    let provider = call.provider;
    let unfit = |_| Error::Credentials {
        provider,
        reason: "the access key has characters that a header cannot carry".to_owned(),
    };
    let at = now.strftime("%Y%m%dT%H%M%SZ").to_string();
    call.headers.insert(
        HeaderName::from_static("x-amz-date"),
        HeaderValue::from_str(&at).map_err(unfit)?,
    );
    if let Some(session) = &keys.session {
        let mut value = HeaderValue::from_bytes(session.expose_bytes()).map_err(unfit)?;
        value.set_sensitive(true);
        call.headers
            .insert(HeaderName::from_static("x-amz-security-token"), value);
    }
    let host = match call.url.port() {
        Some(port) => format!("{}:{port}", call.url.host_str().unwrap_or_default()),
        None => call.url.host_str().unwrap_or_default().to_owned(),
    };
    let mut headers = vec![("host".to_owned(), host)];
    headers.extend(call.headers.iter().map(|(name, value)| {
        let value = String::from_utf8_lossy(value.as_bytes()).trim().to_owned();
        (name.as_str().to_owned(), value)
    }));
    headers.sort();
    let canonical = Canonical {
        method: call.method.as_str(),
        path: call.url.path(),
        query: call.url.query().unwrap_or_default(),
        headers: &headers,
        body: &call.body,
    };
    let value = authorization(&canonical, keys, region, service, &at);
    let mut value = HeaderValue::from_str(&value).map_err(unfit)?;
    value.set_sensitive(true);
    call.headers.insert(AUTHORIZATION, value);
    Ok(())
}

/// Keys as the container's agent and the instance's metadata service tell them.
#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Told {
    access_key_id: String,
    secret_access_key: String,
    token: Option<String>,
    expiration: Option<Timestamp>,
}

impl Told {
    fn into_keys(self, now: Timestamp) -> (Keys, Timestamp) {
        let expires = self
            .expiration
            .or_else(|| now.checked_add(KEPT).ok())
            .unwrap_or(now);
        let keys = Keys {
            id: self.access_key_id,
            secret: Secret::new(self.secret_access_key),
            session: self.token.map(Secret::new),
        };
        (keys, expires)
    }
}

/// The keys that this process has.
pub(crate) async fn ambient(
    connector: &Connector,
    provider: &'static str,
    region: &str,
    now: Timestamp,
) -> Result<Keys, Error> {
    let environment = &connector.environment;
    if let (Some(id), Some(secret)) = (
        environment.get("AWS_ACCESS_KEY_ID"),
        environment.get("AWS_SECRET_ACCESS_KEY"),
    ) {
        return Ok(Keys {
            id: id.to_owned(),
            secret: Secret::new(secret),
            session: environment.get("AWS_SESSION_TOKEN").map(Secret::new),
        });
    }
    const NAME: &str = "ambient";
    if let Some(keys) = connector.tokens.aws.get(NAME, now) {
        return Ok(keys);
    }
    let (keys, expires) = fetched(connector, provider, region, now).await?;
    connector
        .tokens
        .aws
        .put(NAME.to_owned(), keys.clone(), expires, now);
    Ok(keys)
}

async fn fetched(
    connector: &Connector,
    provider: &'static str,
    region: &str,
    now: Timestamp,
) -> Result<(Keys, Timestamp), Error> {
    let environment = &connector.environment;
    if let (Some(token), Some(role)) = (
        environment.get("AWS_WEB_IDENTITY_TOKEN_FILE"),
        environment.get("AWS_ROLE_ARN"),
    ) {
        return web_identity(connector, provider, region, token, role, now).await;
    }
    let credentials_file = environment
        .get("AWS_SHARED_CREDENTIALS_FILE")
        .map(str::to_owned)
        .or_else(|| Some(format!("{}/.aws/credentials", environment.get("HOME")?)));
    if let Some(path) = credentials_file
        && let Ok(text) = file(provider, &path).await
        && let Some(keys) = profile(
            &String::from_utf8_lossy(&text),
            environment.get("AWS_PROFILE").unwrap_or("default"),
        )
    {
        return Ok((keys, now.checked_add(KEPT).unwrap_or(now)));
    }
    let agent = environment
        .get("AWS_CONTAINER_CREDENTIALS_FULL_URI")
        .map(str::to_owned)
        .or_else(|| {
            let path = environment.get("AWS_CONTAINER_CREDENTIALS_RELATIVE_URI")?;
            Some(format!("{CONTAINER}{path}"))
        });
    match agent {
        Some(agent) => container(connector, provider, &agent, now).await,
        None => instance(connector, provider, now).await,
    }
}

async fn web_identity(
    connector: &Connector,
    provider: &'static str,
    region: &str,
    token: &str,
    role: &str,
    now: Timestamp,
) -> Result<(Keys, Timestamp), Error> {
    let environment = &connector.environment;
    let token = file(provider, token).await?;
    let address = environment.get("AWS_ENDPOINT_URL_STS").map_or_else(
        || format!("https://sts.{region}.{}", domain(region)),
        str::to_owned,
    );
    let mut form = below(provider, &address, "")?;
    form.query_pairs_mut()
        .append_pair("Action", "AssumeRoleWithWebIdentity")
        .append_pair("Version", "2011-06-15")
        .append_pair("RoleArn", role)
        .append_pair(
            "RoleSessionName",
            environment.get("AWS_ROLE_SESSION_NAME").unwrap_or("serin"),
        )
        .append_pair("WebIdentityToken", String::from_utf8_lossy(&token).trim());
    let body = form.query().unwrap_or_default().to_owned();
    let call = Call::post(
        provider,
        below(provider, &address, "")?,
        "application/x-www-form-urlencoded",
        body,
    );
    let answer = connector.http.send(&call).await?;
    let xml = String::from_utf8_lossy(&answer.body).into_owned();
    let tag = |name: &str| {
        let (_, rest) = xml.split_once(&format!("<{name}>"))?;
        let (value, _) = rest.split_once(&format!("</{name}>"))?;
        Some(value.trim().to_owned())
    };
    let (Some(id), Some(secret), Some(session)) =
        (tag("AccessKeyId"), tag("SecretAccessKey"), tag("SessionToken"))
    else {
        return Err(Error::Credentials {
            provider,
            reason: "the token service answered without keys".to_owned(),
        });
    };
    let expires = tag("Expiration").and_then(|text| text.parse().ok());
    let keys = Keys {
        id,
        secret: Secret::new(secret),
        session: Some(Secret::new(session)),
    };
    Ok((
        keys,
        expires.or_else(|| now.checked_add(KEPT).ok()).unwrap_or(now),
    ))
}

async fn container(
    connector: &Connector,
    provider: &'static str,
    agent: &str,
    now: Timestamp,
) -> Result<(Keys, Timestamp), Error> {
    let environment = &connector.environment;
    let url = Url::parse(agent).map_err(|error| Error::config(provider, format!("{agent}: {error}")))?;
    let mut call = Call::get(provider, url);
    let token = match environment.get("AWS_CONTAINER_AUTHORIZATION_TOKEN_FILE") {
        Some(path) => Some(Secret::new(file(provider, path).await?)),
        None => environment
            .get("AWS_CONTAINER_AUTHORIZATION_TOKEN")
            .map(Secret::new),
    };
    if let Some(token) = token {
        call = call.with_secret(AUTHORIZATION, "", &token)?;
    }
    let told: Told = connector.http.send(&call).await?.json(provider)?;
    Ok(told.into_keys(now))
}

/// The instance's metadata service, version 2: a session first.
async fn instance(
    connector: &Connector,
    provider: &'static str,
    now: Timestamp,
) -> Result<(Keys, Timestamp), Error> {
    let environment = &connector.environment;
    if environment.get("AWS_EC2_METADATA_DISABLED") == Some("true") {
        return Err(Error::Credentials {
            provider,
            reason: "there are no AWS keys in the environment, and the instance metadata service is disabled"
                .to_owned(),
        });
    }
    let address = environment
        .get("AWS_EC2_METADATA_SERVICE_ENDPOINT")
        .unwrap_or(METADATA);
    let mut call = Call::get(provider, below(provider, address, "latest/api/token")?);
    call.method = Method::PUT;
    call.headers.insert(
        HeaderName::from_static("x-aws-ec2-metadata-token-ttl-seconds"),
        HeaderValue::from_static("300"),
    );
    let session = Secret::new(connector.http.send(&call).await?.body.to_vec());
    let get = async |path: &str| {
        let mut call = Call::get(provider, below(provider, address, path)?).with_secret(
            HeaderName::from_static("x-aws-ec2-metadata-token"),
            "",
            &session,
        )?;
        call.headers.insert(ACCEPT, HeaderValue::from_static("*/*"));
        connector.http.send(&call).await
    };
    const PATH: &str = "latest/meta-data/iam/security-credentials/";
    let roles = get(PATH).await?;
    let role = String::from_utf8_lossy(&roles.body)
        .lines()
        .next()
        .unwrap_or_default()
        .trim()
        .to_owned();
    let told: Told = get(&format!("{PATH}{role}")).await?.json(provider)?;
    Ok(told.into_keys(now))
}

/// The keys of a profile in a shared credentials file.
fn profile(text: &str, wanted: &str) -> Option<Keys> {
    let (mut id, mut secret, mut session) = (None, None, None);
    let mut here = false;
    for line in text.lines().map(str::trim) {
        if let Some(section) = line.strip_prefix('[') {
            here = section.trim_end_matches(']').trim() == wanted;
        } else if here && let Some((key, value)) = line.split_once('=') {
            let value = value.trim().to_owned();
            match key.trim() {
                "aws_access_key_id" => id = Some(value),
                "aws_secret_access_key" => secret = Some(value),
                "aws_session_token" => session = Some(value),
                _ => {}
            }
        }
    }
    Some(Keys {
        id: id?,
        secret: Secret::new(secret?),
        session: session.map(Secret::new),
    })
}

/// The domain of a region's services.
pub(crate) fn domain(region: &str) -> &'static str {
    if region.starts_with("cn-") {
        "amazonaws.com.cn"
    } else {
        "amazonaws.com"
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn keys() -> Keys {
        Keys {
            id: "AKIDEXAMPLE".to_owned(),
            secret: Secret::new("wJalrXUtnFEMI/K7MDENG+bPxRfiCYEXAMPLEKEY"),
            session: None,
        }
    }

    /// The derived key of Amazon's documentation ("Deriving the signing key").
    #[test]
    fn the_signing_key_is_the_one_in_amazons_documentation() {
        assert_eq!(
            hex(&signing_key(&keys(), "20120215", "us-east-1", "iam")),
            "f4780e2d9f65fa895f9c67b32ce1baf0b0d8a43505a000a1a9e090d414db404d"
        );
    }

    /// Cases `get-vanilla` and `post-vanilla` of Amazon's signature test suite.
    #[test]
    fn signatures_are_those_of_amazons_test_suite() {
        let headers = [
            ("host".to_owned(), "example.amazonaws.com".to_owned()),
            ("x-amz-date".to_owned(), "20150830T123600Z".to_owned()),
        ];
        for (method, signature) in [
            (
                "GET",
                "5fa00fa31553b73ebf1942676e86291e8372ff2a2260956d9b8aae1d763fbf31",
            ),
            (
                "POST",
                "5da7c1a2acd57cee7505fc6676e4e544621c30862966e37dddb68e92efbe5d6b",
            ),
        ] {
            let request = Canonical {
                method,
                path: "/",
                query: "",
                headers: &headers,
                body: b"",
            };
            assert_eq!(
                authorization(&request, &keys(), "us-east-1", "service", "20150830T123600Z"),
                format!(
                    "AWS4-HMAC-SHA256 Credential=AKIDEXAMPLE/20150830/us-east-1/service/aws4_request, \
                     SignedHeaders=host;x-amz-date, Signature={signature}"
                )
            );
        }
    }

    #[test]
    fn a_profile_is_found_among_others() {
        let text = "[other]\naws_access_key_id=A\naws_secret_access_key=B\n\n[ci]\naws_access_key_id = C\naws_secret_access_key = D\naws_session_token = E\n";
        let keys = profile(text, "ci").unwrap();
        assert_eq!((keys.id.as_str(), keys.session), ("C", Some(Secret::new("E"))));
        assert!(profile(text, "default").is_none());
    }
}
