//! Waiting for what seldom happens beside what often does.
//!
//! A task that serves a connection also waits for its end: timers, notifications. Whoever wakes the task, a `select!` looks
//! at all of it, for every message and at the price of several locks. What is wrapped here has a waker of its own and is
//! looked at only when that was called.

use std::pin::Pin;
use std::task::{Context, Poll};

use crate::bell::Ear;

/// See the module.
pub(crate) struct Seldom<F> {
    inner: Pin<Box<F>>,
    ear: Ear,
}

impl<F: Future> Seldom<F> {
    /// Wraps `inner`, which is looked at once at the beginning.
    pub(crate) fn new(inner: F) -> Self {
        Self {
            inner: Box::pin(inner),
            ear: Ear::default(),
        }
    }
}

impl<F: Future> Future for Seldom<F> {
    type Output = F::Output;

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<F::Output> {
        let Self { inner, ear } = self.get_mut();
        ear.poll(cx, |cx| inner.as_mut().poll(cx))
    }
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;
    use std::rc::Rc;

    use tokio::sync::Notify;

    use super::*;

    #[tokio::test]
    async fn what_seldom_happens_is_looked_at_when_it_does_and_not_whenever_its_task_runs() {
        let (happens, looked) = (Rc::new(Notify::new()), Rc::new(Cell::new(0)));
        let inner = {
            let (happens, looked) = (happens.clone(), looked.clone());
            async move {
                for _ in 0..2 {
                    let mut wait = std::pin::pin!(happens.notified());
                    std::future::poll_fn(|cx| {
                        looked.set(looked.get() + 1);
                        wait.as_mut().poll(cx)
                    })
                    .await;
                }
            }
        };
        let mut seldom = Seldom::new(inner);
        for round in 0..2 {
            for _ in 0..10 {
                tokio::select! {
                    biased;
                    () = &mut seldom => panic!("nothing has happened"),
                    () = tokio::task::yield_now() => {}
                }
            }
            // Once at first, then once for what happened and once more for what is waited for next.
            assert_eq!(looked.get(), 1 + 2 * round);
            happens.notify_one();
            if round == 0 {
                tokio::select! {
                    biased;
                    () = &mut seldom => panic!("it has happened once"),
                    () = tokio::task::yield_now() => {}
                }
            }
        }
        tokio::time::timeout(std::time::Duration::from_secs(10), seldom)
            .await
            .expect("it has happened twice");
        assert_eq!(looked.get(), 4);
    }

    #[tokio::test]
    async fn its_task_is_woken_by_it() {
        let happens = Rc::new(Notify::new());
        let local = tokio::task::LocalSet::new();
        let waiting = {
            let happens = happens.clone();
            local.spawn_local(async move { Seldom::new(async move { happens.notified().await }).await })
        };
        local
            .run_until(async move {
                tokio::task::yield_now().await;
                happens.notify_one();
                tokio::time::timeout(std::time::Duration::from_secs(10), waiting)
                    .await
                    .expect("woken")
                    .unwrap();
            })
            .await;
    }
}
