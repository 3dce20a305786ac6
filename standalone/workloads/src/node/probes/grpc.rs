//! gRPC probes: `grpc.health.v1.Health/Check` over HTTP/2 without TLS, as kubelet asks it.
//!
//! Two messages with one field each are written and read by hand: `HealthCheckRequest { string service = 1 }` and
//! `HealthCheckResponse { ServingStatus status = 1 }`.

use bytes::{BufMut as _, Bytes, BytesMut};
use http::{Method, Request};
use http_body_util::{BodyExt as _, Full, Limited};
use hyper_util::rt::{TokioExecutor, TokioIo};
use tokio::net::TcpStream;

/// Longest answer that is read; a real one has seven bytes.
const MAX_ANSWER: usize = 1024;
/// `ServingStatus.SERVING`.
const SERVING: u64 = 1;
/// Longest service name: its length fits one byte of a varint.
const MAX_SERVICE: usize = 127;

/// Asks a service (`""` is the whole server) how it does; fine is `SERVING` and nothing else.
pub(crate) async fn check(host: &str, port: u16, service: &str) -> Result<(), String> {
    if service.len() > MAX_SERVICE {
        return Err(format!("the service name is longer than {MAX_SERVICE} bytes"));
    }
    let stream = TcpStream::connect((host, port))
        .await
        .map_err(|error| super::not_connected(host, port, &error))?;
    let (mut sender, connection) =
        hyper::client::conn::http2::handshake(TokioExecutor::new(), TokioIo::new(stream))
            .await
            .map_err(|error| format!("HTTP/2 with {host}:{port}: {error}"))?;
    let request = Request::builder()
        .method(Method::POST)
        .uri(format!("http://{host}:{port}/grpc.health.v1.Health/Check"))
        .header("content-type", "application/grpc")
        .header("te", "trailers")
        .header("user-agent", "kube-probe/1.33")
        .body(Full::new(message(service)))
        .map_err(|error| error.to_string())?;
    let exchange = async {
        let response = sender
            .send_request(request)
            .await
            .map_err(|error| error.to_string())?;
        let (head, body) = response.into_parts();
        if !head.status.is_success() {
            return Err(format!("unexpected HTTP status {}", head.status));
        }
        let body = Limited::new(body, MAX_ANSWER)
            .collect()
            .await
            .map_err(|error| error.to_string())?;
        // A failure without a message has its status in the first headers.
        let trailers = body.trailers().unwrap_or(&head.headers);
        let text = |name: &str| trailers.get(name).and_then(|value| value.to_str().ok());
        match text("grpc-status") {
            Some("0") => {}
            Some("5") => return Err(format!("service {service:?} is unknown to the server")),
            Some("12") => return Err("the server does not implement the health protocol".to_owned()),
            status => {
                let why = text("grpc-message").unwrap_or("no reason given");
                return Err(format!("gRPC status {}: {why}", status.unwrap_or("missing")));
            }
        }
        match serving_status(&body.to_bytes()) {
            Some(SERVING) => Ok(()),
            Some(status) => Err(format!("service unhealthy (responded with {:?})", name(status))),
            None => Err("the answer is no HealthCheckResponse".to_owned()),
        }
    };
    // The connection only moves while it is polled; whichever ends first decides.
    tokio::select! {
        outcome = exchange => outcome,
        ended = connection => Err(match ended {
            Err(error) => error.to_string(),
            Ok(()) => "the connection was closed without an answer".to_owned(),
        }),
    }
}

/// A request, in gRPC's frame.
fn message(service: &str) -> Bytes {
    let mut field = BytesMut::new();
    if !service.is_empty() {
        field.put_u8(0x0a);
        field.put_u8(service.len() as u8);
        field.put_slice(service.as_bytes());
    }
    let mut frame = BytesMut::with_capacity(5 + field.len());
    frame.put_u8(0);
    frame.put_u32(field.len() as u32);
    frame.put_slice(&field);
    frame.freeze()
}

/// The status in a framed answer; an absent field is 0.
fn serving_status(frame: &[u8]) -> Option<u64> {
    let (head, message) = frame.split_at_checked(5)?;
    let length = u32::from_be_bytes(head.get(1..)?.try_into().ok()?);
    if head.first() != Some(&0) || usize::try_from(length).ok() != Some(message.len()) {
        return None;
    }
    match message {
        [] => Some(0),
        [0x08, status, ..] if *status < 0x80 => Some(u64::from(*status)),
        _ => None,
    }
}

fn name(status: u64) -> &'static str {
    match status {
        1 => "SERVING",
        2 => "NOT_SERVING",
        3 => "SERVICE_UNKNOWN",
        _ => "UNKNOWN",
    }
}

#[cfg(test)]
mod tests {
    use std::convert::Infallible;

    use http::{HeaderMap, HeaderValue, Response};
    use http_body_util::StreamBody;
    use hyper::body::{Frame, Incoming};
    use hyper::service::service_fn;
    use tokio::net::TcpListener;

    use super::*;

    type Answer =
        Response<StreamBody<futures::stream::Iter<std::vec::IntoIter<Result<Frame<Bytes>, Infallible>>>>>;

    fn answer(message: &'static [u8], status: &'static str) -> Answer {
        let mut trailers = HeaderMap::new();
        trailers.insert("grpc-status", HeaderValue::from_static(status));
        let mut frame = BytesMut::new();
        frame.put_u8(0);
        frame.put_u32(message.len() as u32);
        frame.put_slice(message);
        let frames = vec![Ok(Frame::data(frame.freeze())), Ok(Frame::trailers(trailers))];
        Response::new(StreamBody::new(futures::stream::iter(frames)))
    }

    /// A server that knows the service `up`, and `down`, which does not serve.
    async fn server() -> u16 {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = listener.local_addr().unwrap().port();
        tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                let service = service_fn(|request: http::Request<Incoming>| async move {
                    assert_eq!(request.uri().path(), "/grpc.health.v1.Health/Check");
                    assert_eq!(request.headers()["content-type"], "application/grpc");
                    let body = request.into_body().collect().await.unwrap().to_bytes();
                    Ok::<_, Infallible>(match body.get(5..).unwrap() {
                        b"" | b"\x0a\x02up" => answer(&[0x08, 1], "0"),
                        b"\x0a\x04down" => answer(&[0x08, 2], "0"),
                        _ => answer(&[], "5"),
                    })
                });
                tokio::spawn(
                    hyper::server::conn::http2::Builder::new(TokioExecutor::new())
                        .serve_connection(TokioIo::new(stream), service),
                );
            }
        });
        port
    }

    #[tokio::test]
    async fn a_grpc_probe_passes_when_the_service_says_that_it_serves() {
        let port = server().await;
        assert_eq!(check("127.0.0.1", port, "").await, Ok(()));
        assert_eq!(check("127.0.0.1", port, "up").await, Ok(()));
        let down = check("127.0.0.1", port, "down").await.unwrap_err();
        assert!(down.contains("NOT_SERVING"), "{down}");
        let unknown = check("127.0.0.1", port, "other").await.unwrap_err();
        assert!(unknown.contains("unknown to the server"), "{unknown}");
    }

    #[tokio::test]
    async fn a_grpc_probe_of_something_else_fails_with_the_reason() {
        // Nobody listens.
        let free = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = free.local_addr().unwrap().port();
        drop(free);
        let refused = check("127.0.0.1", port, "").await.unwrap_err();
        assert!(refused.starts_with("dial tcp"), "{refused}");
        // Something that is no HTTP/2.
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = listener.local_addr().unwrap().port();
        tokio::spawn(async move {
            use tokio::io::AsyncWriteExt as _;
            while let Ok((mut stream, _)) = listener.accept().await {
                let _ = stream.write_all(b"HTTP/1.1 400 Bad Request\r\n\r\n").await;
            }
        });
        assert!(check("127.0.0.1", port, "").await.is_err());
        let long = check("127.0.0.1", port, &"x".repeat(200)).await.unwrap_err();
        assert!(long.contains("127 bytes"), "{long}");
    }

    #[test]
    fn hostile_answers_are_no_answers() {
        assert_eq!(serving_status(&[0, 0, 0, 0, 2, 0x08, 1]), Some(1));
        assert_eq!(serving_status(&[0, 0, 0, 0, 0]), Some(0));
        for bytes in [
            &[][..],
            &[0, 0, 0],
            &[1, 0, 0, 0, 2, 0x08, 1],
            &[0, 255, 255, 255, 255, 8, 1],
            &[0, 0, 0, 0, 1, 8],
        ] {
            assert_eq!(serving_status(bytes), None, "{bytes:?}");
        }
    }
}
