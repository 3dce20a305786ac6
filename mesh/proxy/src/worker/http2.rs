//! HTTP/2 towards clients: `h2` itself.
//!
//! The connection's task reads, writes and accepts; each stream has a task of its own, which serves the request, sends
//! interim answers while it is served, and then sends the answer, its body and trailers. A stream that its client resets
//! ends its task, and with it whatever was done for it.
//!
//! What `h2` sees to: frames, windows, limits of streams and heads, floods of resets (Rapid Reset, MadeYouReset),
//! `content-length` of requests, `RST_STREAM` with `NO_ERROR` after an answer to a request that was not read
//! to its end. What is left to its user is here and in [`super::streams`]: `date`, `content-length`, which fields may be
//! sent, answers without content, CONNECT, and the order of the end (GOAWAY, then what runs, then nothing). Below it, what
//! clients send is counted ([`crate::stream::frames`]); whether they live is asked where the listener says so.

use std::future::poll_fn;
use std::pin::{Pin, pin};
use std::rc::Rc;
use std::sync::Arc;
use std::task::Poll;
use std::time::Duration;

use bytes::Bytes;
use h2::server::{Connection, SendResponse};
use h2::{Reason, RecvStream};
use http::request::Parts;
use http::{HeaderValue, Method, Response, StatusCode, Uri, Version, header};
use http_body::Body as _;
use tokio::time::Sleep;

use super::date;
use super::exchange::Exchange;
use super::http::Downstream;
use super::incoming::Incoming;
use super::interim::Waiting;
use super::io;
use super::local::Body;
use super::request;
use super::rest::{End, wait_for_end};
use super::seldom::Seldom;
use super::streams::{Pump, Pumped, Received, TunnelIo, content_length, strip};
use super::tunnel::Later;
use crate::bell::Ear;
use crate::metrics::events::{CodecEvent, HttpEvent};
use crate::random;
use crate::stream::Layer;
use crate::stream::frames::{Frames, LATE_BODY, Verdict, Watched};
use crate::stream::keepalive::until_dead;
use crate::stream::last_words::{Ending, LastWords};
use crate::stream::linger::Lingering;
use crate::stream::traces::Traced;
use crate::tls::rewind::Rewind;

/// Largest frame that is taken.
const MAX_FRAME: u32 = 16 * 1024;
/// Bytes of an answer that may wait to be written for one stream.
const SEND_BUFFER: usize = 400 * 1024;
/// How long a client may take to hear that its connection ends because of what it sent.
const GOODBYE: Duration = Duration::from_secs(1);

/// The bytes of a connection.
type Io = Frames<LastWords<Lingering<Stream>>>;
/// The connection itself. h2 asks for bytes whenever it is woken, for whatever it was: the ear knows better.
pub(super) type Stream = Layer<Rewind<Traced<io::Io>>, Ear>;

/// Serves the connection to its end.
pub(super) async fn serve(conn: Rc<Downstream>, io: Stream) {
    let options = &conn.manager.http2;
    let mut builder = h2::server::Builder::new();
    builder
        .max_concurrent_streams(conn.manager.max_streams)
        .initial_window_size(conn.manager.stream_window)
        .initial_connection_window_size(conn.manager.connection_window)
        .max_frame_size(MAX_FRAME)
        .max_header_list_size(conn.manager.max_head as u32)
        .max_send_buffer_size(SEND_BUFFER)
        .max_pending_accept_reset_streams(options.max_pending_resets)
        .max_local_error_reset_streams(Some(options.max_errors));
    if let Some(size) = options.table_size {
        builder.header_table_size(size);
    }
    if conn.manager.extended_connect {
        builder.enable_connect_protocol();
    }
    let ending = Ending::default();
    let watched = Rc::new(Watched::default());
    let io = LastWords::new(Lingering::new(io), ending.clone());
    let io = Frames::of_client(io, options.frames, conn.manager.headers_timeout, watched.clone());
    let mut handshake = pin!(builder.handshake::<_, Bytes>(io));
    let mut finishing = false;
    let mut connection = loop {
        tokio::select! {
            biased;
            made = handshake.as_mut() => match made {
                Ok(connection) => break connection,
                Err(error) => return note_error(&conn, &error),
            },
            end = Seldom::new(wait_for_end(&conn)) => match end {
                End::Finish => finishing = true,
                End::Abort => return,
            },
        }
    };
    ending.hold();
    let leave = |connection: &mut Connection<_, _>| {
        conn.note_codec(CodecEvent::Http2Goaway, 1);
        connection.graceful_shutdown();
    };
    if finishing {
        leave(&mut connection);
    }
    let pings = options.keepalive.and_then(|_| connection.ping_pong());
    let asked = tokio::sync::Notify::new();
    // How long a client that is told to go may take to hear it.
    let mut goodbye = None;
    let mut dead = pin!(Seldom::new(async {
        match &options.keepalive {
            Some(rules) => until_dead(pings, rules, &watched, &asked, random::next).await,
            None => std::future::pending().await,
        }
    }));
    loop {
        tokio::select! {
            biased;
            () = accept(&conn, &mut connection, &ending, &watched, &mut goodbye) => return,
            () = dead.as_mut() => {
                conn.note_codec(CodecEvent::Http2Keepalive, 1);
                return;
            }
            end = Seldom::new(wait_for_end(&conn)) => match end {
                End::Finish => leave(&mut connection),
                End::Abort => return,
            },
        }
    }
}

/// Accepts streams until the connection has ended: those that came before its end as well, each of which may be the client's
/// last word. An error means that the client broke off or broke the protocol; its requests have been recorded.
async fn accept(
    conn: &Rc<Downstream>,
    connection: &mut Connection<Io, Bytes>,
    ending: &Ending,
    watched: &Watched,
    goodbye: &mut Option<Pin<Box<Sleep>>>,
) {
    poll_fn(|cx| {
        loop {
            if goodbye
                .as_mut()
                .is_some_and(|wait| wait.as_mut().poll(cx).is_ready())
            {
                return Poll::Ready(());
            }
            match connection.poll_accept(cx) {
                Poll::Pending if goodbye.is_none() && watched.verdict().is_some() => {
                    if let Some(verdict) = watched.verdict() {
                        note_verdict(conn, verdict);
                    }
                    connection.abrupt_shutdown(Reason::ENHANCE_YOUR_CALM);
                    *goodbye = Some(Box::pin(tokio::time::sleep(GOODBYE)));
                }
                // Nothing more is to be taken; if the end has come, the connection learns it now.
                Poll::Pending if ending.release() => {}
                Poll::Pending => return Poll::Pending,
                Poll::Ready(None) => return Poll::Ready(()),
                Poll::Ready(Some(Err(error))) => {
                    note_error(conn, &error);
                    return Poll::Ready(());
                }
                Poll::Ready(Some(Ok((request, respond)))) => {
                    let (head, received) = request.into_parts();
                    // Boxed, both of them: a task is moved several times until it runs and once more when it ends.
                    let stream = stream(conn.clone(), Box::new(head), received, respond);
                    conn.worker.tasks.spawn_local(Box::pin(stream));
                }
            }
        }
    })
    .await;
}

/// Counts why a client's connection is ended, and logs the request that never came to be.
fn note_verdict(conn: &Rc<Downstream>, verdict: Verdict) {
    tracing::debug!(reason = verdict.details(), "a client's connection is ended");
    let flood = match verdict {
        Verdict::LateHeaders => return note_late_headers(conn),
        Verdict::Resets => return conn.note(HttpEvent::RqTooManyResets),
        Verdict::EmptyFrames => CodecEvent::Http2EmptyFlood,
        Verdict::Priority => CodecEvent::Http2PriorityFlood,
        Verdict::WindowUpdates => CodecEvent::Http2WindowFlood,
    };
    conn.note_codec(flood, 1);
    conn.note(HttpEvent::CxProtocolError);
}

fn note_late_headers(conn: &Rc<Downstream>) {
    conn.note(HttpEvent::RqHeaderTimeout);
    conn.request_began(true);
    let mut exchange = Exchange::new(conn.clone(), Method::GET, Uri::from_static("/"), Version::HTTP_2);
    exchange.headless = true;
    exchange.code = StatusCode::REQUEST_TIMEOUT.as_u16();
    exchange.details = Verdict::LateHeaders.details().into();
    exchange.sent = LATE_BODY.len() as u64;
    exchange.finish();
}

/// Counts a connection that did not end in good order.
fn note_error(conn: &Downstream, error: &h2::Error) {
    // Of our own finding: what the client says of us is not the client's fault, nor is a broken socket.
    if error.is_remote() || error.is_io() {
        return;
    }
    match error.reason() {
        None | Some(Reason::NO_ERROR) => {}
        Some(Reason::ENHANCE_YOUR_CALM) => conn.note(HttpEvent::RqTooManyResets),
        Some(_) => conn.note(HttpEvent::CxProtocolError),
    }
}

/// Whether a stream that has ended for this reason was reset by its client, and not with the connection or for what is wrong
/// with it: `h2` tells the reason only.
fn is_of_client(reason: Reason) -> bool {
    !matches!(
        reason,
        Reason::PROTOCOL_ERROR
            | Reason::ENHANCE_YOUR_CALM
            | Reason::FLOW_CONTROL_ERROR
            | Reason::FRAME_SIZE_ERROR
            | Reason::COMPRESSION_ERROR
    )
}

/// Serves one request.
async fn stream(
    conn: Rc<Downstream>,
    mut head: Box<Parts>,
    received: RecvStream,
    mut respond: SendResponse<Bytes>,
) {
    let bodiless = head.method == Method::HEAD;
    let expects = !received.is_end_stream() && head.headers.contains_key(header::EXPECT);
    let interims = (conn.manager.interim_answers || expects).then(|| Arc::new(Waiting::default()));
    let mut tunnel = None;
    let incoming = if head.method == Method::CONNECT {
        if content_length(&head.headers).is_some_and(|length| length != 0) {
            reset(&conn, &mut respond, Reason::PROTOCOL_ERROR);
            return;
        }
        let (granted, later) = Later::new();
        head.extensions.insert(later);
        tunnel = Some((granted, received));
        Incoming::Empty
    } else {
        let expected = interims.clone().filter(|_| expects);
        Incoming::Http2(Received::of_request(
            received,
            &head.headers,
            expected,
            conn.clone(),
        ))
    };
    let Some(response) = answer(&conn, head, incoming, &mut respond, interims).await else {
        return;
    };
    let (mut head, body) = response.into_parts();
    strip(&mut head.headers, false);
    head.headers.entry(header::DATE).or_insert_with(date::value);
    if let Some((granted, received)) = tunnel
        && head.status.is_success()
    {
        // After the head there is no message any more.
        head.headers.remove(header::CONTENT_LENGTH);
        match respond.send_response(Response::from_parts(head, ()), false) {
            // The tunnel's task may be gone; then the stream is reset with what is dropped here.
            Ok(send) => drop(granted.send(TunnelIo::new(send, received))),
            Err(_) => reset(&conn, &mut respond, Reason::INTERNAL_ERROR),
        }
        return;
    }
    let ended = body.is_end_stream();
    if !ended && let Some(length) = body.size_hint().exact() {
        head.headers
            .entry(header::CONTENT_LENGTH)
            .or_insert_with(|| HeaderValue::from(length));
    }
    let ended = ended || bodiless || matches!(head.status, StatusCode::NO_CONTENT | StatusCode::NOT_MODIFIED);
    match respond.send_response(Response::from_parts(head, ()), ended) {
        Ok(_) if ended => {}
        Ok(send) => {
            let mut pump = Pump::new(send, body);
            match poll_fn(|cx| pump.poll(cx)).await {
                Pumped::Whole | Pumped::Lost => {}
                Pumped::Reset => conn.note_codec(CodecEvent::Http2RxReset, 1),
                Pumped::Failed => conn.note_codec(CodecEvent::Http2TxReset, 1),
            }
        }
        Err(_) => reset(&conn, &mut respond, Reason::INTERNAL_ERROR),
    }
}

/// Resets a stream.
fn reset(conn: &Downstream, respond: &mut SendResponse<Bytes>, reason: Reason) {
    conn.note_codec(CodecEvent::Http2TxReset, 1);
    respond.send_reset(reason);
}

/// The answer to a request, unless its client has given it up.
async fn answer(
    conn: &Rc<Downstream>,
    head: Box<Parts>,
    incoming: Incoming,
    respond: &mut SendResponse<Bytes>,
    interims: Option<Arc<Waiting>>,
) -> Option<Response<Body>> {
    let mut service = pin!(request::handle(conn.clone(), head, incoming, interims.clone()));
    let mut told = false;
    poll_fn(|cx| {
        if let Some(interims) = &interims
            && !std::mem::replace(&mut told, true)
        {
            interims.tell(cx.waker());
        }
        let served = service.as_mut().poll(cx);
        let waiting = interims.as_ref().filter(|interims| interims.any());
        if served.is_pending() || waiting.is_some() {
            if let Poll::Ready(outcome) = respond.poll_reset(cx) {
                // Else the connection is gone.
                conn.note_codec(
                    CodecEvent::Http2RxReset,
                    u64::from(outcome.is_ok_and(is_of_client)),
                );
                return Poll::Ready(None);
            }
            if let Some(waiting) = waiting {
                waiting.send(respond);
            }
        }
        served.map(|response| {
            if response.is_err() {
                reset(conn, respond, Reason::INTERNAL_ERROR);
            }
            response.ok()
        })
    })
    .await
}
