//! A waker that remembers whether it was called.
//!
//! A task waits for several things, and whoever wakes it makes it look at all of them, at the price of locks and of
//! entering its waker again. What is looked at through an [`Ear`] has a waker of its own, and is looked at only when that
//! was called.

use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Context, Poll, Wake, Waker};

use parking_lot::Mutex;
use tokio::io::{AsyncRead, ReadBuf};

use crate::stream::Hooks;

#[derive(Debug, Default)]
struct Bell {
    rung: AtomicBool,
    /// Who is woken. It stays, so that a look enters it only when it is another one.
    task: Mutex<Option<Waker>>,
}

impl Wake for Bell {
    fn wake(self: Arc<Self>) {
        self.wake_by_ref();
    }

    fn wake_by_ref(self: &Arc<Self>) {
        self.rung.store(true, Ordering::Release);
        if let Some(task) = &*self.task.lock() {
            task.wake_by_ref();
        }
    }
}

/// Who hears the bell: see the module.
#[derive(Debug)]
pub(crate) struct Ear {
    bell: Arc<Bell>,
    waker: Waker,
    /// The task that the bell wakes, to be compared without its lock.
    task: Option<Waker>,
}

impl Default for Ear {
    /// The first look is taken without a bell.
    fn default() -> Self {
        let bell = Arc::new(Bell::default());
        bell.rung.store(true, Ordering::Relaxed);
        Self {
            waker: Waker::from(bell.clone()),
            bell,
            task: None,
        }
    }
}

impl Ear {
    /// Looks, if the bell was rung since a look found nothing. Everything that `look` may wait for must be looked at through
    /// this ear: it is this ear's waker that is called.
    pub(crate) fn poll<T>(
        &mut self,
        cx: &mut Context<'_>,
        look: impl FnOnce(&mut Context<'_>) -> Poll<T>,
    ) -> Poll<T> {
        // Before the bell is looked at: one that is rung from now on wakes this task.
        if !self.task.as_ref().is_some_and(|task| task.will_wake(cx.waker())) {
            *self.bell.task.lock() = Some(cx.waker().clone());
            self.task = Some(cx.waker().clone());
        }
        if !self.bell.rung.load(Ordering::Relaxed) {
            return Poll::Pending;
        }
        self.bell.rung.swap(false, Ordering::Acquire);
        let outcome = look(&mut Context::from_waker(&self.waker));
        if outcome.is_ready() {
            // There may be more of it, of which nobody will tell.
            self.bell.rung.store(true, Ordering::Relaxed);
        }
        outcome
    }
}

/// What lies below is read through the ear, always.
impl<S> Hooks<S> for Ear {
    fn poll_read(
        &mut self,
        below: Pin<&mut S>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>>
    where
        S: AsyncRead,
    {
        self.poll(cx, |cx| below.poll_read(cx, buf))
    }
}

#[cfg(test)]
mod tests {

    use tokio::io::AsyncWriteExt;

    use super::*;

    /// Reads a byte if there is one, and counts the looks.
    fn read(ear: &mut Ear, from: &mut tokio::io::DuplexStream, looks: &mut u32) -> Option<u8> {
        let mut cx = Context::from_waker(Waker::noop());
        let mut byte = [0];
        let mut buf = ReadBuf::new(&mut byte);
        let outcome = ear.poll(&mut cx, |cx| {
            *looks += 1;
            Pin::new(from).poll_read(cx, &mut buf)
        });
        outcome.is_ready().then_some(byte[0])
    }

    #[tokio::test]
    async fn all_that_has_come_is_found_and_nothing_is_looked_for_before_something_comes() {
        let (mut near, mut far) = tokio::io::duplex(16);
        let (mut ear, mut looks) = (Ear::default(), 0);
        for round in 0..3 {
            for _ in 0..5 {
                assert_eq!(read(&mut ear, &mut near, &mut looks), None);
            }
            // Of five looks one was taken, and with what came before two bytes and the end of them.
            assert_eq!(looks, 1 + 3 * round);
            far.write_all(b"ab").await.unwrap();
            assert_eq!(read(&mut ear, &mut near, &mut looks), Some(b'a'));
            assert_eq!(read(&mut ear, &mut near, &mut looks), Some(b'b'));
        }
    }

    #[tokio::test]
    async fn a_task_that_takes_over_is_woken_in_place_of_the_one_before() {
        let (mut near, mut far) = tokio::io::duplex(16);
        let mut ear = Ear::default();
        assert_eq!(read(&mut ear, &mut near, &mut 0), None);
        let task = tokio::spawn(async move {
            let mut byte = [0];
            let mut buf = ReadBuf::new(&mut byte);
            std::future::poll_fn(|cx| ear.poll(cx, |cx| Pin::new(&mut near).poll_read(cx, &mut buf)))
                .await
                .unwrap();
            byte[0]
        });
        tokio::task::yield_now().await;
        far.write_all(b"x").await.unwrap();
        let byte = tokio::time::timeout(std::time::Duration::from_secs(10), task);
        assert_eq!(byte.await.expect("woken").unwrap(), b'x');
    }
}
