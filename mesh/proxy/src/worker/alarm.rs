//! Timers that are kept from request to request.
//!
//! Nearly every request has a limit and nearly none reaches it. A timer made for each would be entered into the runtime's
//! wheel and taken out again, and would make the request's future large and oddly aligned. These are armed once and left
//! alone: one that fires for a limit of the past is armed again for the present one.

use std::cell::RefCell;
use std::future::poll_fn;
use std::pin::{Pin, pin};
use std::task::{Context, Poll, ready};

use tokio::time::{Instant, Sleep};

/// Timers that a connection keeps at most: as many requests as usually run at a time.
const KEPT: usize = 16;

/// The timers of a connection that nobody waits on.
#[derive(Debug, Default)]
pub(super) struct Alarms(RefCell<Vec<Pin<Box<Sleep>>>>);

/// One of them, in use; it goes back when dropped.
struct Alarm<'a> {
    home: &'a Alarms,
    timer: Option<Pin<Box<Sleep>>>,
}

impl Alarms {
    /// Waits for `work`, but not beyond `limit`: then nothing.
    pub(super) async fn within<T>(&self, limit: Instant, work: impl Future<Output = T>) -> Option<T> {
        let mut work = pin!(work);
        let mut alarm = Alarm {
            home: self,
            timer: None,
        };
        poll_fn(|cx| match work.as_mut().poll(cx) {
            Poll::Ready(value) => Poll::Ready(Some(value)),
            Poll::Pending => alarm.poll(limit, cx).map(|()| None),
        })
        .await
    }
}

impl Alarm<'_> {
    fn poll(&mut self, limit: Instant, cx: &mut Context<'_>) -> Poll<()> {
        let home = self.home;
        let timer = self.timer.get_or_insert_with(|| {
            let kept = home.0.borrow_mut().pop();
            kept.unwrap_or_else(|| Box::pin(tokio::time::sleep_until(limit)))
        });
        if timer.deadline() > limit {
            timer.as_mut().reset(limit);
        }
        loop {
            ready!(timer.as_mut().poll(cx));
            if timer.deadline() >= limit {
                return Poll::Ready(());
            }
            // It was armed for an earlier request.
            timer.as_mut().reset(limit);
        }
    }
}

impl Drop for Alarm<'_> {
    fn drop(&mut self) {
        if let Some(timer) = self.timer.take() {
            let mut kept = self.home.0.borrow_mut();
            if kept.len() < KEPT {
                kept.push(timer);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    async fn never() {
        std::future::pending().await
    }

    /// Work that is done when it is looked at a second time.
    async fn soon() {
        tokio::task::yield_now().await;
    }

    #[tokio::test]
    async fn a_kept_timer_serves_limits_before_and_after_the_one_that_it_was_armed_for() {
        let alarms = Alarms::default();
        let start = Instant::now();
        let after = |millis| start + Duration::from_millis(millis);
        assert_eq!(alarms.within(after(600_000), soon()).await, Some(()));
        assert_eq!(alarms.0.borrow().len(), 1, "kept, armed for ten minutes from now");
        // An earlier limit, a later one, one that has passed.
        assert_eq!(alarms.within(after(3), never()).await, None);
        assert!(Instant::now() >= after(3));
        assert_eq!(alarms.within(after(6), never()).await, None);
        assert!(Instant::now() >= after(6));
        assert_eq!(alarms.within(start, never()).await, None);
        // Armed for a limit that passes while later work runs.
        assert_eq!(
            alarms
                .within(Instant::now() + Duration::from_millis(2), soon())
                .await,
            Some(())
        );
        let work = tokio::time::sleep(Duration::from_millis(10));
        assert_eq!(alarms.within(after(600_000), work).await, Some(()));
        assert_eq!(alarms.0.borrow().len(), 1, "one timer did all this");
    }

    #[tokio::test]
    async fn as_many_timers_are_kept_as_requests_usually_run() {
        let alarms = Alarms::default();
        let limit = Instant::now() + Duration::from_millis(5);
        let waits = (0..KEPT + 5).map(|_| alarms.within(limit, never()));
        assert!(futures::future::join_all(waits).await.iter().all(Option::is_none));
        assert_eq!(alarms.0.borrow().len(), KEPT);
    }
}
