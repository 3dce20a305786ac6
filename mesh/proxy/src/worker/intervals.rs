//! Lines of the access log about requests that go on, at intervals (`access_log_flush_interval`).
//!
//! A request has one task, so whoever waits on its behalf looks at the time as well: the attempts until there is an answer,
//! [`super::watch`] while it is sent, and tunnels. While filters hold a request no line is written.

use std::future::poll_fn;
use std::pin::{Pin, pin};
use std::task::{Context, Poll};
use std::time::Duration;

use tokio::time::{Instant, Sleep};

use super::exchange::Exchange;
use super::logging;
use crate::observe::record::LogType;

/// When the next line of a request is due.
#[derive(Debug)]
pub struct Intervals {
    interval: Duration,
    timer: Pin<Box<Sleep>>,
}

impl Intervals {
    /// From now on.
    pub fn every(interval: Duration) -> Self {
        Self {
            interval,
            timer: Box::pin(tokio::time::sleep(interval)),
        }
    }

    /// Whether a line is due; the task is woken for the next one.
    pub fn is_due(&mut self, cx: &mut Context<'_>) -> bool {
        let mut due = false;
        // The new time has to be asked for, or nobody is woken for it.
        while self.timer.as_mut().poll(cx).is_ready() {
            due = true;
            self.timer.as_mut().reset(Instant::now() + self.interval);
        }
        due
    }

    /// Waits until a line is due.
    pub async fn due(&mut self) {
        poll_fn(|cx| {
            if self.is_due(cx) {
                Poll::Ready(())
            } else {
                Poll::Pending
            }
        })
        .await;
    }
}

/// Writes the line of a request that goes on.
pub(super) fn write(exchange: &Exchange) {
    logging::write_meanwhile(exchange, LogType::DownstreamPeriodic);
}

/// Waits for a line to be due; for ever where none are written.
pub(super) async fn due(intervals: Option<&mut Intervals>) {
    match intervals {
        Some(intervals) => intervals.due().await,
        None => std::future::pending().await,
    }
}

/// Does the work, and writes lines of the request meanwhile.
pub(super) async fn meanwhile<T>(
    exchange: &Exchange,
    intervals: &mut Intervals,
    work: impl Future<Output = T>,
) -> T {
    let mut work = pin!(work);
    poll_fn(|cx| {
        let polled = work.as_mut().poll(cx);
        if polled.is_pending() && intervals.is_due(cx) {
            write(exchange);
        }
        polled
    })
    .await
}
