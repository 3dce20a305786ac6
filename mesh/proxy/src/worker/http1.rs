//! HTTP/1 towards clients: hyper while requests come, a bare socket while none do.
//!
//! hyper keeps two buffers of 8 KiB for a connection, used or not. Most connections of a sidecar are idle at any moment,
//! so one that has been quiet for two seconds is taken back from hyper (nothing of it is in flight then) and waits as a
//! socket with a few hundred bytes of state; its next byte makes hyper's state anew.

use std::future::poll_fn;
use std::pin::Pin;
use std::rc::Rc;

use http::Request;
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::io::{AsyncRead, AsyncWrite};

use super::http::Downstream;
use super::incoming::Incoming;
use super::rest::{End, idle_left, wait_for_end};
use super::seldom::Seldom;
use super::{DrainPhase, request};
use crate::hygiene::strict::StrictIo;
use crate::metrics::events::HttpEvent;

/// Fields that hyper has room for without being told. Being told, it clears room for them for each request.
const HYPERS_FIELDS: usize = 100;

/// Serves the connection to its end.
pub(super) async fn serve<S>(conn: Rc<Downstream>, mut io: StrictIo<S>)
where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    // Boxed, so that the box is given back while the connection rests.
    while let Some(resting) = Box::pin(active(conn.clone(), io)).await {
        io = resting;
        conn.alarms.clear();
        conn.worker.recorder.counters().connections_parked.add(1);
        if !rest(&conn, &mut io).await {
            return;
        }
    }
}

/// Serves requests; the IO if the connection rests, nothing if it has ended.
async fn active<S>(conn: Rc<Downstream>, io: StrictIo<S>) -> Option<StrictIo<S>>
where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let mut builder = http1::Builder::new();
    builder
        .timer(TokioTimer::new())
        .max_buf_size((conn.manager.max_head + 4096).max(8192))
        // Heads come whole, or not at all: see `hygiene::strict`.
        .header_read_timeout(None);
    if conn.manager.max_header_count != HYPERS_FIELDS {
        builder.max_headers(conn.manager.max_header_count);
    }
    let service = {
        let conn = conn.clone();
        service_fn(move |request: Request<hyper::body::Incoming>| {
            let (head, incoming) = request.into_parts();
            request::handle(conn.clone(), Box::new(head), Incoming::Http1(incoming), None)
        })
    };
    let mut connection = builder
        .serve_connection(TokioIo::new(io), service)
        .with_upgrades();
    let mut may_park = true;
    loop {
        let end = tokio::select! {
            biased;
            // An error means that the client broke off or broke the protocol; its requests have been recorded.
            _ = &mut connection => return None,
            end = Seldom::new(wait_for_end(&conn, may_park)) => end,
        };
        match end {
            End::Finish => {
                may_park = false;
                Pin::new(&mut connection).graceful_shutdown();
            }
            End::Abort => return None,
            End::Park => {
                // None after an upgrade, whose bytes are no longer hyper's.
                let parts = connection.into_parts()?;
                let mut io = parts.io.into_inner();
                io.unread(&parts.read_buf);
                return Some(io);
            }
        }
    }
}

/// Waits for the next bytes; false when the connection is over.
async fn rest<S>(conn: &Downstream, io: &mut StrictIo<S>) -> bool
where
    S: AsyncRead + Unpin,
{
    loop {
        if conn.worker.phase() == DrainPhase::Closing {
            return false;
        }
        tokio::select! {
            arrived = poll_fn(|cx| io.poll_arrival(cx)) => return matches!(arrived, Ok(true)),
            () = conn.worker.phase_changed() => {}
            () = tokio::time::sleep(idle_left(conn)) => {
                if idle_left(conn).is_zero() {
                    conn.note(HttpEvent::CxIdleTimeout);
                    return false;
                }
            }
        }
    }
}
