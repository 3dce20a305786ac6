//! The end of a connection.

use std::cell::RefCell;
use std::future::poll_fn;
use std::pin::Pin;
use std::task::ready;
use std::time::Duration;

use tokio::io::{AsyncRead as _, AsyncWrite as _};

use super::wire::Wire;
use crate::stream::linger::Linger;

/// How long a client may take to take what is still to be written (TLS says goodbye).
const GOODBYE: Duration = Duration::from_secs(1);

/// Closes the connection; where the client is in the middle of something that nobody reads, its answer is not lost to a reset.
pub(super) async fn close(wire: &RefCell<Wire>, owed: bool) {
    let Some(mut io) = wire.borrow_mut().io.take() else {
        return;
    };
    let shutdown = poll_fn(|cx| Pin::new(&mut io).poll_shutdown(cx));
    if !matches!(tokio::time::timeout(GOODBYE, shutdown).await, Ok(Ok(()))) || !owed {
        return;
    }
    let mut linger = Linger::default();
    poll_fn(|cx| {
        let read = ready!(linger.poll(cx, |cx, buf| Pin::new(&mut io).poll_read(cx, buf)));
        // Nobody is left to be told how it went.
        drop(read);
        std::task::Poll::Ready(())
    })
    .await;
}
