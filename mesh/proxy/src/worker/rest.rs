//! When a downstream connection that is served should end.

use std::time::Duration;

use super::DrainPhase;
use super::http::Downstream;
use crate::metrics::events::HttpEvent;

/// How often a connection of a retired chain, or with an age limit, is looked at.
const LOOK: Duration = Duration::from_secs(1);
/// Looked at at least this often without an idle limit.
const HOUR: Duration = Duration::from_secs(3600);

/// What should become of a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum End {
    /// Finish what runs, then close.
    Finish,
    /// Close now.
    Abort,
}

/// Waits until the connection should end: idle for too long, drained, replaced, too old.
pub(super) async fn wait_for_end(conn: &Downstream) -> End {
    loop {
        let told = conn.finishing.get();
        if conn.worker.phase() == DrainPhase::Closing && !told {
            conn.finishing.set(true);
            return End::Finish;
        }
        // Looked at when it may be due, so that an active connection costs few timers.
        let mut wait = idle_left(conn).max(LOOK);
        if let Some(left) = conn.age_left().filter(|left| !left.is_zero()) {
            wait = wait.min(left);
        }
        tokio::select! {
            () = conn.worker.phase_changed() => {
                // While clients are only discouraged they are told with the next response; idle connections are left
                // alone, because a request may already be on its way. The closing phase is looked at above.
            }
            () = conn.finish.notified() => return End::Finish,
            () = tokio::time::sleep(wait) => {
                if conn.running.get() > 0 {
                    continue;
                }
                if !told && conn.age_left().is_some_and(|left| left.is_zero()) {
                    conn.note_end();
                    conn.finishing.set(true);
                    return End::Finish;
                }
                let quiet = conn.last_used.get().elapsed();
                if conn.manager.idle_timeout.is_some_and(|idle| quiet >= idle) {
                    if !told {
                        conn.note(HttpEvent::CxIdleTimeout);
                    }
                    return if told { End::Abort } else {
                        conn.finishing.set(true);
                        End::Finish
                    };
                }
            }
        }
    }
}

/// How long the connection may still be idle.
fn idle_left(conn: &Downstream) -> Duration {
    match conn.manager.idle_timeout {
        Some(idle) if conn.running.get() == 0 => idle.saturating_sub(conn.last_used.get().elapsed()),
        Some(idle) => idle,
        None => HOUR,
    }
}
