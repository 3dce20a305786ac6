//! Interim answers (1xx) of endpoints, passed on to HTTP/1.1 clients where `proxy_100_continue` asks for it (RFC 9110
//! section 15.2).
//!
//! hyper's client tells of interim answers over HTTP/1 ([`hyper::ext::on_informational`]); what it tells goes to the
//! connection's [`Interims`](crate::hygiene::interim::Interims), which write it below hyper's server. A client that
//! expects `100 Continue` gets the endpoint's: its head goes on with `Expect`, its body is not asked for (hyper says 100
//! when it is) until the endpoint has said 100, or has said nothing for [`PATIENCE`].
//!
//! Over HTTP/2 neither is possible with hyper 1.12: its server keeps `h2`'s `SendResponse` to itself, whose
//! `send_informational` would be needed, and its client never asks `ResponseFuture::poll_informational`. There the proxy
//! itself says 100 to clients over HTTP/1.1, and HTTP/2 clients, who do not wait for it, get none.

use std::cell::RefCell;
use std::future::poll_fn;
use std::pin::pin;
use std::rc::Rc;
use std::task::Poll;
use std::time::Duration;

use http::{Request, Version, header};

use super::body::{RequestSource, UpstreamBody};
use super::http::Downstream;
use super::upstream::Plan;
use crate::upstream::pool::Lease;

/// A client that expects 100 is told to go on after this time, as if its endpoint had said so: many never do, and a
/// client need not wait for longer either (RFC 9110 section 10.1.1).
const PATIENCE: Duration = Duration::from_secs(1);

/// Whether interim answers to this request reach its client.
pub(super) fn pass(plan: &Plan<'_>, downstream: Version, lease: &Lease) -> bool {
    plan.conn.manager.interim_answers && downstream == Version::HTTP_11 && !lease.is_http2()
}

/// Prepares a request whose interim answers are passed on, or not.
pub(super) fn prepare(
    plan: &Plan<'_>,
    request: &mut Request<UpstreamBody>,
    source: Option<&Rc<RefCell<RequestSource>>>,
    passes: bool,
) {
    let expects = request
        .headers()
        .get(header::EXPECT)
        .is_some_and(|value| value.as_bytes().eq_ignore_ascii_case(b"100-continue"));
    let held = passes && expects && source.is_some_and(|source| source.borrow_mut().hold());
    if !held {
        // hyper answers it when the body is read.
        request.headers_mut().remove(header::EXPECT);
    }
    if passes {
        let (gate, number) = (plan.conn.gate.clone(), plan.conn.request_number());
        hyper::ext::on_informational(request, move |answer| {
            gate.interims
                .offer(number, answer.status(), answer.headers(), held);
        });
    }
}

/// Closes the door behind the final answer, or behind an attempt that was given up.
struct Open<'a>(&'a Downstream);

impl Drop for Open<'_> {
    fn drop(&mut self) {
        self.0.gate.interims.close();
    }
}

/// Waits for the final answer, and lets interim ones pass meanwhile.
pub(super) async fn watch<T>(
    conn: &Downstream,
    source: Option<&Rc<RefCell<RequestSource>>>,
    answer: impl Future<Output = T>,
) -> T {
    let _open = Open(conn);
    let number = conn.request_number();
    let held = source.filter(|source| source.borrow().is_held());
    let mut patience = held.map(|_| Box::pin(tokio::time::sleep(PATIENCE)));
    let mut answer = pin!(answer);
    poll_fn(|cx| {
        let continued = conn.gate.interims.expect(number, cx.waker());
        if let Some(timer) = &mut patience
            && (continued || timer.as_mut().poll(cx).is_ready())
        {
            patience = None;
            if let Some(source) = held {
                source.borrow_mut().go_on();
            }
        }
        match answer.as_mut().poll(cx) {
            Poll::Ready(answer) => Poll::Ready(answer),
            Poll::Pending => Poll::Pending,
        }
    })
    .await
}
