//! What generated policies need around them: clients with certificates, and services that answer as what they are asked
//! decides, and say in their answers what that was, so that it is compared with everything else.

use std::collections::HashMap;
use std::future::pending;
use std::net::SocketAddr;

use serde_json::{Value, json};
use serin_xds::pb::envoy::config::core::v3 as core;
use serin_xds::pb::envoy::service::auth::v3 as auth;
use serin_xds::pb::envoy::service::ratelimit::v3 as ratelimit;
use serin_xds::pb::google::protobuf as google;
use tonic::transport::Server;
use tonic::{Request, Response, Status};

use super::Tls;
use super::client::Who;
use super::random::Rng;
use crate::certificates::{Authority, Issued};
use crate::policies::services::{Served, serve};

/// Who asks, and who believes whom.
pub(crate) struct World {
    authority: Authority,
    server: Issued,
    people: Vec<Who>,
}

impl World {
    pub(crate) fn new() -> Self {
        let authority = Authority::new("world");
        let named = |name: &'static str| {
            authority.issue_with(&[], |params| {
                params.distinguished_name.push(rcgen::DnType::CommonName, name);
            })
        };
        let identities = [
            None,
            Some(authority.issue(&["spiffe://cluster.local/ns/a/sa/one", "one.example"])),
            Some(authority.issue(&["two.example", "also.example"])),
            Some(named("three")),
        ];
        let people = identities
            .iter()
            .enumerate()
            .map(|(index, identity)| {
                let client = authority.client();
                let client = match identity {
                    Some(issued) => client.identity(issued),
                    None => client,
                };
                Who {
                    config: client.build_unverified(),
                    server_name: if index % 2 == 0 { "a.example" } else { "b.example" },
                }
            })
            .collect();
        let server = authority.issue(&["a.example", "b.example"]);
        Self {
            authority,
            server,
            people,
        }
    }

    pub(crate) fn people(&self) -> &[Who] {
        &self.people
    }

    /// Asks for a certificate, and takes none as well.
    pub(crate) fn tls(&self) -> Tls {
        let text = |text: &str| json!({ "inline_string": text });
        let socket = json!({ "name": "tls", "typed_config": {
            "@type": "type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.DownstreamTlsContext",
            "require_client_certificate": false,
            "common_tls_context": {
                "tls_certificates": [ { "certificate_chain": text(&self.server.chain), "private_key": text(&self.server.key) } ],
                "validation_context": { "trusted_ca": text(&self.authority.pem) },
            },
        } });
        Tls {
            socket,
            people: self.people.clone(),
        }
    }
}

type Answers<Q, A> = dyn Fn(&Q) -> Option<Result<A, Status>> + Send + Sync;

/// Answers as told; `None` never answers.
pub(crate) struct Played<Q, A>(Box<Answers<Q, A>>);

impl<Q, A> Played<Q, A> {
    async fn answer(&self, question: Request<Q>) -> Result<Response<A>, Status> {
        match (self.0)(question.get_ref()) {
            Some(answer) => answer.map(Response::new),
            None => pending().await,
        }
    }
}

#[tonic::async_trait]
impl auth::authorization_server::Authorization for Played<auth::CheckRequest, auth::CheckResponse> {
    async fn check(
        &self,
        question: Request<auth::CheckRequest>,
    ) -> Result<Response<auth::CheckResponse>, Status> {
        self.answer(question).await
    }
}

#[tonic::async_trait]
impl ratelimit::rate_limit_service_server::RateLimitService
    for Played<ratelimit::RateLimitRequest, ratelimit::RateLimitResponse>
{
    async fn should_rate_limit(
        &self,
        question: Request<ratelimit::RateLimitRequest>,
    ) -> Result<Response<ratelimit::RateLimitResponse>, Status> {
        self.answer(question).await
    }
}

/// An authorization service.
pub(crate) async fn authorization(
    answer: impl Fn(&auth::CheckRequest) -> Option<Result<auth::CheckResponse, Status>> + Send + Sync + 'static,
) -> (SocketAddr, Served) {
    let service = auth::authorization_server::AuthorizationServer::new(Played(Box::new(answer)));
    serve(Server::builder().add_service(service)).await
}

/// A rate limit service.
pub(crate) async fn limits(
    answer: impl Fn(&ratelimit::RateLimitRequest) -> Option<Result<ratelimit::RateLimitResponse, Status>>
    + Send
    + Sync
    + 'static,
) -> (SocketAddr, Served) {
    let service = ratelimit::rate_limit_service_server::RateLimitServiceServer::new(Played(Box::new(answer)));
    serve(Server::builder().add_service(service)).await
}

/// A cluster that speaks HTTP/2 to that address.
pub(crate) fn grpc_cluster(name: &str, at: SocketAddr) -> Value {
    let mut out = super::cluster(name, at);
    out["typed_extension_protocol_options"] = json!({
        "envoy.extensions.upstreams.http.v3.HttpProtocolOptions": {
            "@type": "type.googleapis.com/envoy.extensions.upstreams.http.v3.HttpProtocolOptions",
            "explicit_http_config": { "http2_protocol_options": {} },
        },
    });
    out
}

/// Choices that follow from a text.
pub(crate) fn chosen_by(text: &str) -> Rng {
    // FNV-1a.
    let hash = text.bytes().fold(0xcbf2_9ce4_8422_2325u64, |hash, byte| {
        (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3)
    });
    Rng::new(hash)
}

/// Says what a service was asked and answers, where `SERIN_GENERATED_TELL` names a part of it.
pub(crate) fn tell(told: &str, answer: &dyn std::fmt::Debug) {
    if let Ok(part) = std::env::var("SERIN_GENERATED_TELL")
        && told.contains(&part)
    {
        eprintln!("asked {told}\nanswers {answer:?}\n");
    }
}

/// A text that a field may hold.
pub(crate) fn field_text(text: &str) -> String {
    text.chars().flat_map(char::escape_default).collect()
}

/// Fields in an order of their own, without what differs from one proxy to the other for a reason that is listed.
pub(crate) fn fields<'a>(all: impl Iterator<Item = (&'a str, String)>) -> String {
    let mut lines: Vec<String> = all
        .filter(|(name, _)| !name.starts_with("x-envoy-peer-metadata"))
        .filter(|(name, value)| {
            *name != "x-envoy-expected-rq-timeout-ms" && !(*name == "content-length" && value == "0")
        })
        .map(|(name, value)| match name {
            "x-request-id" => format!("{name}=(id)"),
            // The last one is the client's address, or that of the machine.
            "x-forwarded-for" => {
                let before = value.rsplit_once(',').map_or("", |(before, _)| before);
                format!("{name}={before},*")
            }
            _ => format!("{name}={value}"),
        })
        .collect();
    lines.sort_unstable();
    lines.join("&")
}

/// Metadata, in an order of its own.
pub(crate) fn metadata(from: Option<&core::Metadata>) -> String {
    let Some(from) = from else {
        return "none".into();
    };
    let mut out: Vec<String> = from
        .filter_metadata
        .iter()
        .map(|(name, fields)| format!("{name}:{}", of_struct(fields)))
        .collect();
    out.sort_unstable();
    out.join(",")
}

pub(crate) fn of_struct(from: &google::Struct) -> String {
    let mut out: Vec<String> = from
        .fields
        .iter()
        .map(|(name, value)| format!("{name}:{}", of_value(value)))
        .collect();
    out.sort_unstable();
    format!("[{}]", out.join(","))
}

fn of_value(from: &google::Value) -> String {
    use google::value::Kind;
    match &from.kind {
        Some(Kind::StructValue(fields)) => of_struct(fields),
        Some(Kind::StringValue(text)) => text.clone(),
        Some(Kind::NumberValue(number)) => number.to_string(),
        Some(Kind::BoolValue(truth)) => truth.to_string(),
        Some(Kind::ListValue(list)) => format!("{:?}", list.values.iter().map(of_value).collect::<Vec<_>>()),
        Some(Kind::NullValue(_)) | None => "null".into(),
    }
}

/// A map, in an order of its own.
pub(crate) fn sorted(map: &HashMap<String, String>) -> String {
    let mut out: Vec<String> = map
        .iter()
        .map(|(name, value)| format!("{name}:{value}"))
        .collect();
    out.sort_unstable();
    out.join(",")
}
