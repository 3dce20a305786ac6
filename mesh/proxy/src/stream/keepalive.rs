//! Whether an HTTP/2 peer still lives (`connection_keepalive`): it is pinged at intervals, or when somebody asks for it, and
//! must answer in time. Whatever else it says meanwhile counts as an answer as long as it says something (Envoy).

use h2::{Ping, PingPong};
use tokio::sync::Notify;

use super::frames::Watched;
use crate::config::http2::Keepalive;

/// Ready when the peer does not answer any more. `asked` is told when a ping is wanted at once; `draw` gives the jitter.
pub async fn until_dead(
    pings: Option<PingPong>,
    rules: &Keepalive,
    watched: &Watched,
    asked: &Notify,
    draw: impl Fn() -> u64,
) {
    let Some(mut pings) = pings else {
        return std::future::pending().await;
    };
    loop {
        match rules.wait(draw()) {
            Some(wait) => {
                tokio::select! {
                    () = tokio::time::sleep(wait) => {}
                    () = asked.notified() => {}
                }
            }
            None => asked.notified().await,
        }
        watched.take_heard();
        let mut answer = std::pin::pin!(pings.ping(Ping::opaque()));
        loop {
            match tokio::time::timeout(rules.timeout, answer.as_mut()).await {
                Ok(Ok(_)) => break,
                // The connection has ended, and its own future says so.
                Ok(Err(_)) => return std::future::pending().await,
                Err(_) if watched.take_heard() => {}
                Err(_) => return,
            }
        }
    }
}
