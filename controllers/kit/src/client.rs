//! A `kube::Client` without a TCP connection: over a service in this process, or over a Unix socket.

use std::future::Future;
use std::path::{Path, PathBuf};
use std::pin::Pin;
use std::task::{Context, Poll};

use bytes::Bytes;
use http::{HeaderValue, Request, Response, Uri, header::AUTHORIZATION};
use hyper_util::client::legacy::connect::{Connected, Connection};
use hyper_util::rt::{TokioExecutor, TokioIo};
use kube::client::{Body, middleware::BaseUriLayer};
use tokio::net::UnixStream;
use tower::{BoxError, Service, ServiceBuilder};

use crate::Error;

/// The namespace that namespaced requests without one go to.
const DEFAULT_NAMESPACE: &str = "default";

/// A client whose requests are answered by a service in this process: no socket, no TLS, no token.
///
/// Must be called inside a tokio runtime.
pub fn over_service<S, B>(service: S) -> kube::Client
where
    S: Service<Request<Body>, Response = Response<B>> + Send + 'static,
    S::Future: Send + 'static,
    S::Error: Into<BoxError>,
    B: http_body::Body<Data = Bytes> + Send + 'static,
    B::Error: Into<BoxError>,
{
    kube::Client::new(service, DEFAULT_NAMESPACE)
}

/// A client that speaks HTTP/1.1 over a Unix socket, which crosses network namespaces. With a token it presents
/// itself as a bearer. Must be called inside a tokio runtime.
pub fn over_unix(path: impl AsRef<Path>, token: Option<&str>) -> Result<kube::Client, Error> {
    let path = path.as_ref().to_owned();
    let refused = |reason: String| Error::Socket {
        path: path.display().to_string(),
        reason,
    };
    let authorization = token
        .map(|token| HeaderValue::from_str(&format!("Bearer {token}")))
        .transpose()
        .map_err(|error| refused(error.to_string()))?
        .map(|mut value| {
            value.set_sensitive(true);
            value
        });
    let transport = hyper_util::client::legacy::Client::builder(TokioExecutor::new())
        .build::<_, Body>(UnixConnector { path: path.clone() });
    let service = ServiceBuilder::new()
        .layer(BaseUriLayer::new(Uri::from_static("http://serin.local")))
        .map_request(move |mut request: Request<Body>| {
            if let Some(value) = &authorization {
                request.headers_mut().insert(AUTHORIZATION, value.clone());
            }
            request
        })
        .service(transport);
    Ok(kube::Client::new(service, DEFAULT_NAMESPACE))
}

#[derive(Clone)]
struct UnixConnector {
    path: PathBuf,
}

impl Service<Uri> for UnixConnector {
    type Response = UnixConnection;
    type Error = std::io::Error;
    type Future = Pin<Box<dyn Future<Output = std::io::Result<UnixConnection>> + Send>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Self::Error>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, _: Uri) -> Self::Future {
        let path = self.path.clone();
        Box::pin(async move { Ok(UnixConnection(TokioIo::new(UnixStream::connect(path).await?))) })
    }
}

struct UnixConnection(TokioIo<UnixStream>);

impl Connection for UnixConnection {
    fn connected(&self) -> Connected {
        Connected::new()
    }
}

impl hyper::rt::Read for UnixConnection {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: hyper::rt::ReadBufCursor<'_>,
    ) -> Poll<std::io::Result<()>> {
        Pin::new(&mut self.0).poll_read(context, buffer)
    }
}

impl hyper::rt::Write for UnixConnection {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<std::io::Result<usize>> {
        Pin::new(&mut self.0).poll_write(context, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<std::io::Result<()>> {
        Pin::new(&mut self.0).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<std::io::Result<()>> {
        Pin::new(&mut self.0).poll_shutdown(context)
    }
}

#[cfg(test)]
mod tests {
    use std::convert::Infallible;

    use http_body_util::Full;
    use hyper::body::Incoming;
    use hyper::service::service_fn;
    use k8s_openapi::api::core::v1::ConfigMap;
    use kube::Api;
    use tokio::net::UnixListener;

    use super::*;

    fn config_map() -> Full<Bytes> {
        Full::new(Bytes::from_static(
            br#"{"apiVersion":"v1","kind":"ConfigMap","metadata":{"name":"a"},"data":{"k":"v"}}"#,
        ))
    }

    #[tokio::test]
    async fn a_client_reads_an_object_through_a_service_in_the_same_process() {
        let service = tower::service_fn(|request: Request<Body>| async move {
            assert_eq!(request.uri().path(), "/api/v1/namespaces/default/configmaps/a");
            Ok::<_, Infallible>(Response::new(config_map()))
        });
        let api: Api<ConfigMap> = Api::default_namespaced(over_service(service));
        let found = api.get("a").await.unwrap();
        assert_eq!(found.data.unwrap()["k"], "v");
    }

    #[tokio::test]
    async fn a_client_reads_an_object_through_a_unix_socket_with_its_token() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("api.sock");
        let listener = UnixListener::bind(&path).unwrap();
        let server = tokio::spawn(async move {
            let (stream, _) = listener.accept().await.unwrap();
            let service = service_fn(|request: Request<Incoming>| async move {
                assert_eq!(request.headers()[AUTHORIZATION], "Bearer secret");
                Ok::<_, Infallible>(Response::new(config_map()))
            });
            let _ = hyper::server::conn::http1::Builder::new()
                .serve_connection(TokioIo::new(stream), service)
                .await;
        });
        let client = over_unix(&path, Some("secret")).unwrap();
        let api: Api<ConfigMap> = Api::default_namespaced(client);
        assert_eq!(api.get("a").await.unwrap().data.unwrap()["k"], "v");
        server.abort();
    }

    #[tokio::test]
    async fn a_token_that_cannot_be_a_header_is_refused_with_the_socket_named() {
        let error = over_unix("/nowhere", Some("line\nbreak")).err().unwrap();
        assert!(error.to_string().contains("/nowhere"));
    }
}
