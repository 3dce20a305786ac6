//! Services that policies ask, played over real sockets.

use std::net::SocketAddr;
use std::sync::Arc;

use parking_lot::Mutex;
use serin_xds::pb::envoy::service::auth::v3 as auth;
use serin_xds::pb::envoy::service::ratelimit::v3 as ratelimit;
use tokio::net::TcpListener;
use tonic::transport::server::{Router, TcpIncoming};
use tonic::{Request, Response, Status};

use crate::fixture::*;
use serin_xds::ResourceType;

/// A gRPC server that ends with its test.
pub(crate) struct Served(tokio::task::JoinHandle<()>);

impl Drop for Served {
    fn drop(&mut self) {
        self.0.abort();
    }
}

pub(crate) async fn serve(router: Router) -> (SocketAddr, Served) {
    let socket = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let at = socket.local_addr().unwrap();
    let task = tokio::spawn(async move {
        router
            .serve_with_incoming(TcpIncoming::from(socket))
            .await
            .unwrap();
    });
    (at, Served(task))
}

type Answer<Q, A> = dyn Fn(&Q) -> Result<A, Status> + Send + Sync;

/// Answers as told and keeps what it was asked.
pub(crate) struct Asked<Q, A> {
    pub(crate) seen: Arc<Mutex<Vec<Q>>>,
    answer: Box<Answer<Q, A>>,
}

impl<Q, A> Asked<Q, A> {
    pub(crate) fn new(answer: impl Fn(&Q) -> Result<A, Status> + Send + Sync + 'static) -> Self {
        Self {
            seen: Arc::default(),
            answer: Box::new(answer),
        }
    }

    fn take(&self, question: Q) -> Result<Response<A>, Status> {
        let answer = (self.answer)(&question);
        self.seen.lock().push(question);
        answer.map(Response::new)
    }
}

#[tonic::async_trait]
impl auth::authorization_server::Authorization for Asked<auth::CheckRequest, auth::CheckResponse> {
    async fn check(
        &self,
        request: Request<auth::CheckRequest>,
    ) -> Result<Response<auth::CheckResponse>, Status> {
        self.take(request.into_inner())
    }
}

#[tonic::async_trait]
impl ratelimit::rate_limit_service_server::RateLimitService
    for Asked<ratelimit::RateLimitRequest, ratelimit::RateLimitResponse>
{
    async fn should_rate_limit(
        &self,
        request: Request<ratelimit::RateLimitRequest>,
    ) -> Result<Response<ratelimit::RateLimitResponse>, Status> {
        self.take(request.into_inner())
    }
}

/// A cluster "svc" that speaks HTTP/2 to that address.
pub(crate) async fn service_cluster(harness: &Harness, at: SocketAddr) {
    harness
        .put(ResourceType::Cluster, "svc", &speaking_h2(eds_cluster("svc")))
        .await;
    harness.endpoints("svc", &[at]).await;
}
