//! A response that comes no faster than a fault says (`response_rate_limit`).
//!
//! As in Envoy: a second has sixteen slices, and of each so many bytes are sent. What is not used is kept for a second at
//! most; a response begins with one slice, so that it is slow from the start.

use std::pin::Pin;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use bytes::Bytes;
use http_body::{Body as _, Frame, SizeHint};
use tokio::time::{Instant, Sleep};

use super::{BodyError, Observer, ResponseBody};

/// Of a second.
const SLICES: u32 = 16;
const SLICE: Duration = Duration::from_micros(62_500);

/// See the module.
#[derive(Debug)]
pub struct Throttled<O> {
    inner: ResponseBody<O>,
    /// What has come and is not sent yet.
    held: Bytes,
    /// Bytes of a slice.
    slice: usize,
    /// Bytes that may be sent now.
    ready: usize,
    /// When the present slice began.
    since: Instant,
    timer: Option<Pin<Box<Sleep>>>,
}

impl<O> Throttled<O> {
    /// The body at so many KiB a second.
    pub(super) fn new(inner: ResponseBody<O>, kib_per_second: u64) -> Self {
        let slice = usize::try_from(kib_per_second.saturating_mul(1024) / u64::from(SLICES));
        let slice = slice.unwrap_or(usize::MAX).max(1);
        Self {
            inner,
            held: Bytes::new(),
            slice,
            ready: slice,
            since: Instant::now(),
            timer: None,
        }
    }

    /// Takes what the slices since the last time have brought.
    fn refill(&mut self) {
        let passed = self.since.elapsed().as_micros() / SLICE.as_micros();
        let passed = u32::try_from(passed).unwrap_or(u32::MAX);
        if passed > 0 {
            let more = self.slice.saturating_mul(passed.min(SLICES) as usize);
            self.ready = self
                .ready
                .saturating_add(more)
                .min(self.slice.saturating_mul(SLICES as usize));
            self.since += SLICE.saturating_mul(passed);
        }
    }

    /// Waits until there is something to send by.
    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        self.refill();
        while self.ready == 0 {
            let next = self.since + SLICE;
            let timer = self
                .timer
                .get_or_insert_with(|| Box::pin(tokio::time::sleep_until(next)));
            ready!(timer.as_mut().poll(cx));
            self.timer = None;
            self.refill();
        }
        Poll::Ready(())
    }
}

impl<O: Observer + Unpin> Throttled<O> {
    pub(super) fn poll_frame(
        &mut self,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, BodyError>>> {
        while self.held.is_empty() {
            match ready!(Pin::new(&mut self.inner).poll_frame(cx)) {
                Some(Ok(frame)) => match frame.into_data() {
                    Ok(data) => self.held = data,
                    Err(other) => return Poll::Ready(Some(Ok(other))),
                },
                ended => return Poll::Ready(ended),
            }
        }
        ready!(self.poll_ready(cx));
        let sent = self.held.split_to(self.held.len().min(self.ready));
        self.ready -= sent.len();
        Poll::Ready(Some(Ok(Frame::data(sent))))
    }

    pub(super) fn is_end_stream(&self) -> bool {
        self.held.is_empty() && self.inner.is_end_stream()
    }

    pub(super) fn size_hint(&self) -> SizeHint {
        let held = self.held.len() as u64;
        match self.inner.size_hint().exact() {
            Some(rest) => SizeHint::with_exact(held + rest),
            None => SizeHint::default(),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::future::poll_fn;

    use super::*;

    /// Nobody watches.
    #[derive(Debug)]
    struct Nobody;

    impl Observer for Nobody {
        fn frame(&mut self, _: &mut Frame<Bytes>) {}
        fn encoded(&mut self, _: usize) {}
        fn encodes(&mut self) {}
        fn poll_limits(&mut self, _: &mut Context<'_>) -> Poll<BodyError> {
            Poll::Pending
        }
        fn ended(&mut self) {}
        fn failed(&mut self, _: &BodyError) {}
    }

    #[tokio::test(start_paused = true)]
    async fn a_body_is_sent_slice_by_slice_and_is_whole_in_the_end() {
        let content: Bytes = (0..10_000).map(|index| index as u8).collect::<Vec<_>>().into();
        // 2 KiB a slice.
        let body: ResponseBody<Nobody> = ResponseBody::Full(Some(content.clone()));
        let mut body = Throttled::new(body, 32);
        assert_eq!(body.size_hint().exact(), Some(10_000));
        let began = Instant::now();
        let (mut whole, mut times) = (Vec::new(), Vec::new());
        while let Some(frame) = poll_fn(|cx| body.poll_frame(cx)).await {
            let data = frame.unwrap().into_data().unwrap();
            times.push((data.len(), began.elapsed().as_millis() / 60));
            whole.extend_from_slice(&data);
        }
        assert_eq!(whole, content);
        assert!(body.is_end_stream());
        let expected = [(2048, 0), (2048, 1), (2048, 2), (2048, 3), (1808, 4)];
        assert_eq!(times, expected);
    }

    #[tokio::test(start_paused = true)]
    async fn what_is_not_used_is_kept_for_a_second_at_most() {
        let body: ResponseBody<Nobody> = ResponseBody::Full(Some(vec![0; 100_000].into()));
        let mut body = Throttled::new(body, 16);
        tokio::time::advance(Duration::from_secs(60)).await;
        let frame = poll_fn(|cx| body.poll_frame(cx)).await.unwrap().unwrap();
        assert_eq!(frame.data_ref().unwrap().len(), 16 * 1024);
    }
}
