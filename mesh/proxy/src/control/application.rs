//! An application that the proxy starts itself (`serin-proxy --config FILE -- APPLICATION ARGUMENTS`).
//!
//! It is what a kubelet does for a pod with a native sidecar, for where there is none: the application is held until the proxy has its
//! whole configuration and serves, so that its first connection finds its way; a signal goes to the application first, which has its
//! way out and in until it has ended; and the proxy ends with it, with its exit code. No shell is between: the words are the program
//! and its arguments. Its standard streams and environment are the proxy's own, which reads nothing.
//!
//! Processes that the application leaves behind are not looked after.

use std::ffi::OsString;
use std::io::{self, IsTerminal as _};
use std::os::unix::process::ExitStatusExt as _;
use std::process::ExitStatus;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use tokio::process::{Child, Command};

use crate::error::Error;

/// A program and its arguments.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Application {
    program: OsString,
    arguments: Vec<OsString>,
}

impl Application {
    /// From words; none if there are none.
    pub fn of(words: Vec<OsString>) -> Option<Self> {
        let mut words = words.into_iter();
        Some(Self {
            program: words.next()?,
            arguments: words.collect(),
        })
    }

    /// Starts it.
    pub(super) fn start(&self) -> Result<Running, Error> {
        tracing::info!(program = %self.program.display(), "the proxy serves: starting its application");
        let child = Command::new(&self.program)
            .args(&self.arguments)
            // It does not outlive a proxy that gives up.
            .kill_on_drop(true)
            .spawn()
            .map_err(|source| Error::Application {
                program: self.program.display().to_string(),
                source,
            })?;
        Ok(Running { child })
    }
}

/// An application that was started. It is killed when this is dropped.
#[derive(Debug)]
pub(super) struct Running {
    child: Child,
}

impl Running {
    /// Waits for its end; its exit code, as a shell has it.
    pub(super) async fn ended(&mut self) -> u8 {
        match self.child.wait().await {
            Ok(status) => code(status),
            Err(error) => {
                tracing::error!(%error, "waiting for the application");
                1
            }
        }
    }

    /// Passes a signal on.
    pub(super) fn tell(&self, signal: Signal) {
        // Ctrl-C at a terminal is heard by all programs there, and twice means more than once.
        if signal == Signal::SIGINT && io::stdin().is_terminal() {
            return;
        }
        let Some(id) = self.child.id().and_then(|id| i32::try_from(id).ok()) else {
            return;
        };
        // One that has just ended needs to hear nothing.
        let _ = kill(Pid::from_raw(id), signal);
    }
}

/// What a shell says of an end: the exit code, or 128 and the number of the signal.
fn code(status: ExitStatus) -> u8 {
    let code = match (status.code(), status.signal()) {
        (Some(code), _) => code,
        (None, signal) => 128 + signal.unwrap_or(0),
    };
    u8::try_from(code).unwrap_or(u8::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_end_is_told_as_a_shell_tells_it() {
        let told = |raw| code(ExitStatus::from_raw(raw));
        assert_eq!(told(0), 0);
        assert_eq!(told(7 << 8), 7);
        assert_eq!(told(255 << 8), 255);
        assert_eq!(told(Signal::SIGKILL as i32), 137);
    }

    #[test]
    fn the_first_word_is_the_program() {
        assert_eq!(Application::of(vec![]), None);
        let words = ["a", "--b", "c d"].map(OsString::from);
        let application = Application::of(words.to_vec()).unwrap();
        assert_eq!(application.program, words[0]);
        assert_eq!(application.arguments, words[1..]);
    }
}
