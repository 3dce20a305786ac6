//! What watches a response from the upstream on its way to the client: its time limits, and what is told when it ends.

use std::borrow::Cow;
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use bytes::Bytes;
use http_body::Frame;
use tokio::time::Sleep;

use super::body::{BodyError, Observer};
use super::exchange::Exchange;
use super::failure;
use super::filters;
use super::intervals;
use super::local::LocalReply;
use super::logging;
use crate::metrics::events::{ClusterEvent, HttpEvent};
use crate::metrics::flags::Flags;
use crate::upstream::cluster::Active;
use crate::upstream::pool::Lease;

/// Limits of the response's time. Timers are made when there is something to wait for: most responses are there whole.
#[derive(Default)]
pub struct Limits {
    deadline: Option<(tokio::time::Instant, Flags, &'static str)>,
    idle: Option<Duration>,
    timers: Option<Box<Timers>>,
    /// Frames have come since this was waited for last.
    moved: bool,
    /// When frames that had come were first waited after.
    last_frame: Option<Instant>,
}

struct Timers {
    deadline: Option<Pin<Box<Sleep>>>,
    idle: Option<Pin<Box<Sleep>>>,
}

impl Limits {
    /// Up to `deadline` in all (with the flag for when it passes) and `idle` between frames.
    pub fn new(
        deadline: Option<(tokio::time::Instant, Flags, &'static str)>,
        idle: Option<Duration>,
    ) -> Self {
        Self {
            deadline,
            idle,
            timers: None,
            moved: false,
            last_frame: None,
        }
    }

    /// The limit that has been passed, if one has.
    /// `sent` is when the client sent something last, which counts as well.
    fn poll(&mut self, cx: &mut Context<'_>, sent: Option<Instant>) -> Poll<(Flags, &'static str)> {
        if self.deadline.is_none() && self.idle.is_none() {
            return Poll::Pending;
        }
        // The clock is read where there is something to wait for: most responses are there whole.
        if std::mem::take(&mut self.moved) {
            self.last_frame = Some(Instant::now());
        }
        let timers = self.timers.get_or_insert_with(|| {
            Box::new(Timers {
                deadline: self
                    .deadline
                    .map(|(at, ..)| Box::pin(tokio::time::sleep_until(at))),
                idle: self.idle.map(|idle| Box::pin(tokio::time::sleep(idle))),
            })
        });
        if let (Some((_, flag, details)), Some(sleep)) = (self.deadline, &mut timers.deadline)
            && sleep.as_mut().poll(cx).is_ready()
        {
            return Poll::Ready((flag, details));
        }
        if let (Some(idle), Some(sleep)) = (self.idle, &mut timers.idle) {
            while sleep.as_mut().poll(cx).is_ready() {
                // The timer is armed once and looked at when it fires, not moved for every frame.
                let quiet = self.last_frame.max(sent).map_or(idle, |at| at.elapsed());
                if quiet >= idle {
                    return Poll::Ready((Flags::STREAM_IDLE, "stream_idle_timeout"));
                }
                sleep
                    .as_mut()
                    .reset(tokio::time::Instant::now() + idle.saturating_sub(quiet));
            }
        }
        Poll::Pending
    }
}

/// Watches a response from the upstream to its end.
pub struct Watch {
    exchange: Box<Exchange>,
    limits: Limits,
    lease: Option<Lease>,
    max_requests: u32,
    active: Option<Active>,
    /// Whether the client gets another encoding than what comes.
    encoded: bool,
}

impl Watch {
    /// Of `exchange`, whose response comes over `lease`.
    pub fn new(
        exchange: Box<Exchange>,
        limits: Limits,
        lease: Lease,
        max_requests: u32,
        active: Active,
    ) -> Self {
        Self {
            exchange,
            limits,
            lease: Some(lease),
            max_requests,
            active: Some(active),
            encoded: false,
        }
    }

    fn broken(&mut self, flag: Flags, details: impl Into<Cow<'static, str>>) {
        self.exchange.flags.add(flag);
        self.exchange.details = details.into();
        self.lease = None;
        self.active = None;
        self.exchange.finish();
    }
}

impl Observer for Watch {
    fn frame(&mut self, frame: &mut Frame<Bytes>) {
        if let Some(data) = frame.data_ref() {
            if !self.encoded {
                self.exchange.sent += data.len() as u64;
            }
            filters::saw_data(&mut self.exchange, data);
            if let Some(tap) = &mut self.exchange.tap {
                tap.answer().data(data);
            }
        } else if let Some(trailers) = frame.trailers_mut() {
            if let (Some(cluster), Some(host)) = (&self.exchange.cluster, &self.exchange.host) {
                cluster.note_load(host, trailers);
            }
            if self.exchange.policy.is_some() {
                filters::encode_trailers(&mut self.exchange, trailers);
            }
            self.exchange.note_grpc_status(trailers);
            logging::keep_trailers(&mut self.exchange, trailers);
            if let Some(tap) = &mut self.exchange.tap {
                tap.answer().trailers(trailers);
            }
        }
        self.limits.moved = true;
    }

    fn encoded(&mut self, bytes: usize) {
        self.exchange.sent += bytes as u64;
    }

    fn encodes(&mut self) {
        self.encoded = true;
    }

    fn poll_limits(&mut self, cx: &mut Context<'_>) -> Poll<BodyError> {
        if let Some(intervals) = &mut self.exchange.intervals
            && intervals.is_due(cx)
        {
            intervals::write(&self.exchange);
        }
        let source = self.exchange.source.as_ref();
        let sent = source.and_then(|source| source.borrow().last_frame);
        let (flag, details) = std::task::ready!(self.limits.poll(cx, sent));
        let conn = &self.exchange.conn;
        if flag.has(Flags::STREAM_IDLE) {
            conn.note(HttpEvent::RqIdleTimeout);
        } else if flag.has(Flags::MAX_STREAM_DURATION) {
            conn.note(HttpEvent::RqMaxDuration);
        }
        if let Some(cluster) = &self.exchange.cluster {
            if flag.has(Flags::UPSTREAM_TIMEOUT) {
                cluster.cells(&conn.worker.recorder).timeouts.add(1);
            } else if flag.has(Flags::MAX_STREAM_DURATION) {
                cluster.slot.counted.note(ClusterEvent::RqMaxDuration);
            }
            if self.lease.as_ref().is_some_and(Lease::is_http2) {
                cluster.slot.counted.note(ClusterEvent::RqTxReset);
            }
        }
        conn.note(HttpEvent::RqTxReset);
        self.broken(flag, details);
        Poll::Ready(details.into())
    }

    fn ended(&mut self) {
        let source = self.exchange.source.as_ref();
        if source.is_some_and(|source| !source.borrow().is_whole()) {
            self.exchange.conn.note(HttpEvent::RqEarlyAnswer);
        }
        let now = Instant::now();
        if let Some(lease) = self.lease.take() {
            lease.release(self.max_requests, now);
        }
        self.active = None;
        self.exchange.finish_at(now);
    }

    fn failed(&mut self, error: &BodyError) {
        // A client that breaks off its request takes the upstream's connection with it.
        let client = self.exchange.source.as_ref();
        let fault = client.and_then(|source| source.borrow().fault);
        let (flags, details) = match fault {
            Some(fault) => {
                let reply = LocalReply::of_fault(fault);
                (reply.flags, reply.details)
            }
            None => failure::after_start(error),
        };
        if fault.is_none() {
            self.exchange.conn.note(HttpEvent::ResetAfterStart);
            self.exchange.conn.note(HttpEvent::RqTxReset);
            if let Some(cluster) = &self.exchange.cluster {
                let http2 = self.lease.as_ref().is_some_and(Lease::is_http2);
                // Over HTTP/1 a message that ends early is a broken one.
                cluster.slot.counted.note(if http2 {
                    ClusterEvent::RqRxReset
                } else {
                    ClusterEvent::CxProtocolError
                });
            }
        }
        self.broken(flags, details);
    }
}
