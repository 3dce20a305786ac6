//! Whether the API server is there, and since when whoever depends on it may be believed to have heard from it.
//!
//! A pod that is deleted serves on until nobody sends to it any more. Who sends is told by controllers and a mesh that live
//! in the server's process: while that is gone nobody is told anything, and for a moment after its return proxies still
//! route as its predecessor said. Pods are stopped after that, not in it.

use std::path::{Path, PathBuf};
use std::time::Duration;

use tokio::io::AsyncReadExt as _;
use tokio::net::UnixStream;
use tokio::sync::watch;
use tokio::time::{Instant, sleep, sleep_until, timeout};
use tokio_util::sync::CancellationToken;

/// Proxies try to connect again at least every two seconds.
const PROXIES_RETURN: Duration = Duration::from_millis(2500);
/// Between two looks at a server that is not there, and between two connections to one that closes idle ones.
const LOOK_AGAIN: Duration = Duration::from_millis(50);

/// The instant from which on everybody has heard from the server; `None` while it is away.
#[derive(Clone, Debug)]
pub(crate) struct Presence(watch::Receiver<Option<Instant>>);

impl Presence {
    /// Follows the server behind a socket, beginning with one that is there. `fresh`: nothing ran before it, so nobody has
    /// to hear from it.
    pub(crate) fn follow(
        socket: PathBuf,
        fresh: bool,
        cancel: CancellationToken,
    ) -> (Self, impl Future<Output = ()>) {
        let now = Instant::now();
        let (known, presence) = watch::channel(Some(if fresh { now } else { now + PROXIES_RETURN }));
        let follow = async move {
            tokio::select! {
                () = cancel.cancelled() => {}
                () = follow(&socket, &known) => {}
            }
        };
        (Self(presence), follow)
    }

    /// Waits `at_least` so long, and until everybody has heard from the server, but not longer than `at_most`.
    pub(crate) async fn everybody_told(mut self, at_least: Duration, at_most: Duration) {
        let begun = Instant::now();
        let told = async {
            loop {
                let heard = *self.0.borrow_and_update();
                let until = heard.map(|heard| heard.max(begun + at_least));
                let reached = async {
                    match until {
                        Some(until) => sleep_until(until).await,
                        None => std::future::pending().await,
                    }
                };
                tokio::select! {
                    () = reached => return,
                    changed = self.0.changed() => if changed.is_err() {
                        return;
                    },
                }
            }
        };
        // Whoever waits has a grace that ends, and after that nothing is left to protect.
        let _ = timeout(at_most, told).await;
    }
}

async fn follow(socket: &Path, known: &watch::Sender<Option<Instant>>) {
    loop {
        match UnixStream::connect(socket).await {
            Ok(mut stream) => {
                known.send_if_modified(|heard| {
                    let returned = heard.is_none();
                    heard.get_or_insert_with(|| Instant::now() + PROXIES_RETURN);
                    returned
                });
                // Nothing is ever sent; this ends with the server.
                let _ = stream.read(&mut [0]).await;
            }
            Err(_) => {
                known.send_if_modified(|heard| heard.take().is_some());
            }
        }
        sleep(LOOK_AGAIN).await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LEAVE: Duration = Duration::from_millis(500);
    const GRACE: Duration = Duration::from_secs(20);

    fn presence(heard: Option<Instant>) -> (watch::Sender<Option<Instant>>, Presence) {
        let (known, presence) = watch::channel(heard);
        (known, Presence(presence))
    }

    #[tokio::test(start_paused = true)]
    async fn with_a_server_that_was_always_there_a_pod_waits_for_its_endpoints_only() {
        let begun = Instant::now();
        let (_known, presence) = presence(Some(begun));
        presence.everybody_told(LEAVE, GRACE).await;
        assert_eq!(begun.elapsed().as_millis(), LEAVE.as_millis());
    }

    #[tokio::test(start_paused = true)]
    async fn a_pod_waits_for_a_server_that_goes_and_for_those_who_must_hear_from_the_next_one() {
        let begun = Instant::now();
        let (known, presence) = presence(Some(begun));
        let server = async {
            sleep(Duration::from_millis(100)).await;
            known.send_replace(None);
            sleep(Duration::from_secs(1)).await;
            known.send_replace(Some(Instant::now() + PROXIES_RETURN));
        };
        tokio::join!(server, presence.everybody_told(LEAVE, GRACE));
        assert_eq!(begun.elapsed().as_millis(), 3600);
    }

    #[tokio::test(start_paused = true)]
    async fn a_server_that_stays_away_is_not_waited_for_beyond_the_grace() {
        let begun = Instant::now();
        let (_known, presence) = presence(None);
        presence.everybody_told(LEAVE, GRACE).await;
        assert_eq!(begun.elapsed().as_millis(), GRACE.as_millis());
    }

    #[tokio::test]
    async fn a_server_is_followed_through_its_end_and_its_return() {
        let directory = tempfile::tempdir().unwrap();
        let socket = directory.path().join("api.sock");
        let listener = tokio::net::UnixListener::bind(&socket).unwrap();
        let cancel = CancellationToken::new();
        let (presence, follow) = Presence::follow(socket.clone(), true, cancel.clone());
        let follow = tokio::spawn(follow);
        let mut known = presence.0.clone();
        let (connection, _) = listener.accept().await.unwrap();
        assert!(known.borrow_and_update().is_some());

        drop((connection, listener));
        known.wait_for(Option::is_none).await.unwrap();
        std::fs::remove_file(&socket).unwrap();
        let _listener = tokio::net::UnixListener::bind(&socket).unwrap();
        known.wait_for(Option::is_some).await.unwrap();
        cancel.cancel();
        follow.await.unwrap();
    }
}
