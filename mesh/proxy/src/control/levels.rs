//! Levels of the process's own log, changed while it runs (`/logging`).

use std::collections::BTreeMap;
use std::io::IsTerminal;
use std::sync::OnceLock;

use parking_lot::Mutex;
use tracing_subscriber::filter::{EnvFilter, LevelFilter, Targets};
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::util::SubscriberInitExt;
use tracing_subscriber::{Layer, Registry, reload};

/// The modules that have a level of their own, as `/logging` names them.
pub const LOGGERS: [&str; 10] = [
    "bootstrap",
    "config",
    "control",
    "hygiene",
    "intercept",
    "metrics",
    "observe",
    "policy",
    "tls",
    "worker",
];

type Filter = Box<dyn tracing_subscriber::layer::Filter<Registry> + Send + Sync>;

struct Installed {
    handle: reload::Handle<Filter, Registry>,
    levels: Mutex<Levels>,
}

/// The level of everything, and of single loggers.
#[derive(Clone, Debug)]
struct Levels {
    all: LevelFilter,
    own: BTreeMap<&'static str, LevelFilter>,
}

static INSTALLED: OnceLock<Installed> = OnceLock::new();

/// Sends the process's log to standard error, at the levels that `RUST_LOG` says. Later calls do nothing.
pub fn install() {
    let from_environment = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new("info"));
    let all = from_environment.max_level_hint().unwrap_or(LevelFilter::INFO);
    let filter: Filter = Box::new(from_environment);
    let (filter, handle) = reload::Layer::new(filter);
    let lines = tracing_subscriber::fmt::layer()
        .with_ansi(std::io::stderr().is_terminal())
        .with_writer(std::io::stderr)
        // A log that cannot be written loses lines. To say so on the same stream would panic.
        .log_internal_errors(false)
        .with_filter(filter);
    if tracing_subscriber::registry().with(lines).try_init().is_ok() {
        let levels = Mutex::new(Levels {
            all,
            own: BTreeMap::new(),
        });
        // Only one subscriber is ever installed, by this call.
        let _ = INSTALLED.set(Installed { handle, levels });
    }
}

/// Envoy's name of the level of everything that has none of its own.
pub fn default_level() -> &'static str {
    let all = INSTALLED
        .get()
        .map_or(LevelFilter::INFO, |installed| installed.levels.lock().all);
    match all.into_level() {
        None => "off",
        Some(tracing::Level::ERROR) => "error",
        Some(tracing::Level::WARN) => "warning",
        Some(tracing::Level::INFO) => "info",
        Some(tracing::Level::DEBUG) => "debug",
        Some(tracing::Level::TRACE) => "trace",
    }
}

/// A level by Envoy's name of it.
fn level(name: &str) -> Result<LevelFilter, String> {
    Ok(match name {
        "trace" => LevelFilter::TRACE,
        "debug" => LevelFilter::DEBUG,
        "info" => LevelFilter::INFO,
        "warning" | "warn" => LevelFilter::WARN,
        "error" | "critical" => LevelFilter::ERROR,
        "off" => LevelFilter::OFF,
        _ => {
            return Err(format!(
                "{name:?} is no level; use trace, debug, info, warning, error or off"
            ));
        }
    })
}

fn level_name(level: LevelFilter) -> &'static str {
    match level {
        LevelFilter::TRACE => "trace",
        LevelFilter::DEBUG => "debug",
        LevelFilter::INFO => "info",
        LevelFilter::WARN => "warning",
        LevelFilter::ERROR => "error",
        _ => "off",
    }
}

impl Levels {
    /// Does what a query says: `level=debug`, `worker=debug`, `paths=worker:debug,tls:info`.
    fn change<'a>(&mut self, query: impl IntoIterator<Item = (&'a str, &'a str)>) -> Result<(), String> {
        for (key, value) in query {
            match key {
                "level" => {
                    self.all = level(value)?;
                    self.own.clear();
                }
                "paths" => {
                    for pair in value.split(',') {
                        let (name, value) = pair
                            .split_once(':')
                            .ok_or_else(|| format!("{pair:?} is not logger:level"))?;
                        self.change_one(name, value)?;
                    }
                }
                name => self.change_one(name, value)?,
            }
        }
        Ok(())
    }

    fn change_one(&mut self, name: &str, value: &str) -> Result<(), String> {
        let logger = LOGGERS
            .into_iter()
            .find(|logger| *logger == name)
            .ok_or_else(|| format!("there is no logger {name:?}"))?;
        self.own.insert(logger, level(value)?);
        Ok(())
    }

    fn filter(&self) -> Targets {
        self.own
            .iter()
            .fold(Targets::new().with_default(self.all), |targets, (name, level)| {
                targets.with_target(format!("serin_proxy::{name}"), *level)
            })
    }

    fn shown(&self) -> String {
        let mut out = String::from("active loggers:\n");
        for logger in LOGGERS {
            let level = self.own.get(logger).copied().unwrap_or(self.all);
            out.push_str(&format!("  {logger}: {}\n", level_name(level)));
        }
        out
    }
}

/// Changes levels as a query says, all or nothing, and shows them.
pub fn change<'a>(query: impl IntoIterator<Item = (&'a str, &'a str)>) -> Result<String, String> {
    let installed = INSTALLED
        .get()
        .ok_or("the log of this process is not the proxy's to change")?;
    let mut levels = installed.levels.lock();
    let mut changed = levels.clone();
    changed.change(query)?;
    installed
        .handle
        .reload(Box::new(changed.filter()) as Filter)
        .map_err(|error| error.to_string())?;
    *levels = changed;
    Ok(levels.shown())
}

/// The levels as they are.
pub fn shown() -> Result<String, String> {
    INSTALLED
        .get()
        .map(|installed| installed.levels.lock().shown())
        .ok_or_else(|| "the log of this process is not the proxy's to show".to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn levels_are_changed_all_at_once_or_by_logger() {
        let mut levels = Levels {
            all: LevelFilter::INFO,
            own: BTreeMap::new(),
        };
        levels.change([("paths", "worker:debug,tls:off")]).unwrap();
        let shown = levels.shown();
        assert!(
            shown.contains("  worker: debug\n") && shown.contains("  tls: off\n"),
            "{shown}"
        );
        assert!(shown.contains("  config: info\n"), "{shown}");
        let filter = levels.filter();
        assert!(filter.would_enable("serin_proxy::worker::accept", &tracing::Level::DEBUG));
        assert!(!filter.would_enable("serin_proxy::config", &tracing::Level::DEBUG));
        levels.change([("level", "warning")]).unwrap();
        assert!(levels.shown().contains("  worker: warning\n"));
        for wrong in [("level", "loud"), ("nobody", "info"), ("paths", "worker")] {
            assert!(levels.change([wrong]).is_err(), "{wrong:?}");
        }
    }
}
