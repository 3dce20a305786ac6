//! The timeline on the terminal: one line per fact, and under them a line that lives: weights wanted and live, the
//! success rate, requests a second.

use std::io::{IsTerminal as _, Write as _};
use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;
use tokio::sync::mpsc;
use tokio::task::JoinHandle;

use super::observe::{Entry, Fact, Timeline};
use crate::load::{Counters, Load};
use crate::output::{Mood, paint};

/// How often the live line is drawn anew. Only a display: nothing waits for it.
const REDRAW: Duration = Duration::from_millis(250);

/// The screen of the demo.
pub(super) struct Screen {
    state: Arc<Mutex<State>>,
    printer: JoinHandle<()>,
    redraw: Mutex<Option<JoinHandle<()>>>,
}

#[derive(Default)]
struct State {
    /// Whether a live line stands on the last row.
    drawn: bool,
    wanted: i32,
    live: i32,
    acked: i32,
    needed: i32,
    phase: String,
}

impl Screen {
    /// Prints facts as they are announced.
    pub(super) fn start(mut announced: mpsc::Receiver<Entry>) -> Self {
        let state: Arc<Mutex<State>> = Arc::default();
        let shared = state.clone();
        let printer = tokio::spawn(async move {
            while let Some(event) = announced.recv().await {
                let mut state = shared.lock();
                state.take_in(&event.fact);
                state.clear();
                println!("{}", line(&event));
            }
        });
        Self {
            state,
            printer,
            redraw: Mutex::new(None),
        }
    }

    /// Draws the live line while a load runs. Only on a terminal; a log gets the facts alone.
    pub(super) fn watch(&self, load: &Load, timeline: &Timeline) {
        if !std::io::stdout().is_terminal() {
            return;
        }
        let (counters, state, started) = (load.shared(), self.state.clone(), timeline.started());
        let task = tokio::spawn(async move {
            let mut before = Counters::default();
            let mut ticks = tokio::time::interval(REDRAW);
            loop {
                ticks.tick().await;
                let now = counters.lock().clone();
                let text = live_line(&state.lock(), &before, &now, started.elapsed());
                let mut state = state.lock();
                state.clear();
                print!("{text}");
                let _ = std::io::stdout().flush();
                state.drawn = true;
                drop(state);
                before = now;
            }
        });
        *self.redraw.lock() = Some(task);
    }

    /// Removes the live line and prints what is still to be printed.
    pub(super) async fn finish(self) {
        if let Some(task) = self.redraw.lock().take() {
            task.abort();
        }
        tokio::task::yield_now().await;
        self.printer.abort();
        self.state.lock().clear();
    }
}

impl State {
    fn take_in(&mut self, fact: &Fact) {
        match fact {
            Fact::WeightWanted { weight } => self.wanted = *weight,
            Fact::WeightLive {
                weight,
                acked,
                needed,
            } => {
                (self.live, self.acked, self.needed) = (*weight, *acked, *needed);
            }
            Fact::Phase { phase, .. } => self.phase.clone_from(phase),
            Fact::Pushed { .. }
            | Fact::Seen { .. }
            | Fact::Applied { .. }
            | Fact::ImageChanged { .. }
            | Fact::CanaryRequested
            | Fact::CanaryReady
            | Fact::Verdict { .. }
            | Fact::FirstBadAnswer { .. }
            | Fact::Note { .. } => {}
        }
    }

    fn clear(&mut self) {
        if self.drawn {
            print!("\r\x1b[2K");
            self.drawn = false;
        }
    }
}

fn live_line(state: &State, before: &Counters, now: &Counters, elapsed: Duration) -> String {
    let answered = now.answered - before.answered;
    let failed = now.failed_by_app - before.failed_by_app;
    let rate = answered as f64 / REDRAW.as_secs_f64();
    let success = 100.0 * (answered - failed.min(answered)) as f64 / (answered.max(1)) as f64;
    let bar: String = (0..20)
        .map(|cell| if cell * 5 < state.live { '█' } else { '░' })
        .collect();
    let lost = now.failed_by_system_total();
    let lost = paint(
        &format!("{lost} lost"),
        if lost == 0 { Mood::Good } else { Mood::Bad },
    );
    format!(
        "{:7.1}s  {bar} canary {:3} % wanted, {:3} % live ({}/{})  {rate:5.0} rps  {success:6.2} % good  {lost}  {}",
        elapsed.as_secs_f64(),
        state.wanted,
        state.live,
        state.acked,
        state.needed,
        state.phase
    )
}

/// One line of the timeline.
fn line(event: &Entry) -> String {
    format!("{:7.2}s  {}", event.t, describe(&event.fact))
}

fn describe(fact: &Fact) -> String {
    let short = |commit: &str| commit.get(..8).unwrap_or(commit).to_owned();
    match fact {
        Fact::Pushed { version, commit } => paint(
            &format!("push       version {version} ({})", short(commit)),
            Mood::Busy,
        ),
        Fact::Seen { commit } => format!("source     revision {} seen", short(commit)),
        Fact::Applied { commit } => format!("apply      revision {} applied", short(commit)),
        Fact::ImageChanged { image } => format!("deployment {image}"),
        Fact::CanaryRequested => "canary     pods asked for".to_owned(),
        Fact::CanaryReady => "canary     pods ready".to_owned(),
        Fact::Phase { phase, message } => {
            let mood = match phase.as_str() {
                "Succeeded" | "Initialized" => Mood::Good,
                "Failed" => Mood::Bad,
                _ => Mood::Busy,
            };
            let text = if message.is_empty() {
                phase.clone()
            } else {
                format!("{phase}: {message}")
            };
            format!("rollout    {}", paint(&text, mood))
        }
        Fact::WeightWanted { weight } => format!("weight     {weight} % wanted"),
        Fact::WeightLive {
            weight,
            acked,
            needed,
        } => {
            format!("weight     {weight} % live in {acked} of {needed} proxies")
        }
        Fact::Verdict {
            metric,
            verdict,
            message,
        } => paint(&format!("verdict    {metric} is {verdict}: {message}"), Mood::Bad),
        Fact::FirstBadAnswer { version } => format!("client     first bad answer of version {version}"),
        Fact::Note { text } => text.clone(),
    }
}

/// The timeline so far, for an error.
pub(super) fn so_far(timeline: &Timeline) -> String {
    let events = timeline.events();
    events.iter().map(line).collect::<Vec<_>>().join("\n")
}
