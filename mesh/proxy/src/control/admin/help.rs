//! What the admin port can do, as `/help` tells it: in Envoy's form, one command a line with its parameters below.

use std::fmt::Write as _;

/// A command.
struct Command {
    path: &'static str,
    /// It changes something.
    post: bool,
    help: &'static str,
    parameters: &'static [(&'static str, &'static str)],
}

const fn shows(
    path: &'static str,
    help: &'static str,
    parameters: &'static [(&'static str, &'static str)],
) -> Command {
    Command {
        path,
        post: false,
        help,
        parameters,
    }
}

const fn changes(
    path: &'static str,
    help: &'static str,
    parameters: &'static [(&'static str, &'static str)],
) -> Command {
    Command {
        post: true,
        ..shows(path, help, parameters)
    }
}

const USED: (&str, &str) = ("usedonly", "only what is not zero");

/// In the order of their paths.
const COMMANDS: &[Command] = &[
    shows("/", "this list", &[]),
    shows("/certs", "certificates in use", &[]),
    shows(
        "/clusters",
        "clusters and the state of their endpoints",
        &[("format", "One of (text, json)")],
    ),
    shows(
        "/config_dump",
        "the configuration in use",
        &[
            ("resource", "one list of the dump, such as dynamic_listeners"),
            (
                "mask",
                "fields, as a google.protobuf.FieldMask; of each entry where resource is given",
            ),
            ("name_regex", "only what has a name that matches"),
            ("include_eds", "endpoints as well"),
        ],
    ),
    changes(
        "/drain_listeners",
        "closes listeners",
        &[
            (
                "graceful",
                "after the drain time, in which clients are told to go elsewhere",
            ),
            ("skip_exit", "with graceful: tells clients, and closes nothing"),
            ("inboundonly", "listeners with traffic_direction INBOUND only"),
        ],
    ),
    changes("/healthcheck/fail", "says not to be ready", &[]),
    changes("/healthcheck/ok", "takes that back", &[]),
    shows("/help", "this list", &[]),
    shows(
        "/hot_restart_version",
        "which processes can take over from this one",
        &[],
    ),
    shows(
        "/init_dump",
        "what is waited for before the proxy is ready",
        &[("mask", "a component; everything is waited for by server")],
    ),
    shows(
        "/listeners",
        "listeners and their addresses",
        &[("format", "One of (text, json)")],
    ),
    changes(
        "/logging",
        "shows the levels of the log (GET as well), or changes them",
        &[
            (
                "level",
                "of all loggers; One of (trace, debug, info, warning, error, critical, off)",
            ),
            ("paths", "logger:level, several with commas"),
        ],
    ),
    shows("/memory", "memory of the process", &[]),
    changes("/quitquitquit", "ends the process", &[]),
    shows("/ready", "200 if the proxy serves, 503 and why if not", &[]),
    changes("/reopen_logs", "opens access logs anew", &[]),
    changes("/reset_counters", "shows counters from zero from now on", &[]),
    shows("/runtime", "values of the runtime", &[]),
    changes(
        "/runtime_modify",
        "changes values of the admin layer: ?key1=value1&key2=value2; an empty value removes the key",
        &[],
    ),
    shows(
        "/server_info",
        "version, state, node and options of the process",
        &[],
    ),
    shows(
        "/stats",
        "statistics",
        &[
            USED,
            ("filter", "only names that match"),
            ("format", "One of (text, json, prometheus)"),
            ("type", "One of (All, Counters, Gauges, Histograms)"),
            (
                "histogram_buckets",
                "One of (none, cumulative, disjoint, detailed)",
            ),
        ],
    ),
    shows(
        "/stats/prometheus",
        "statistics as Prometheus, OpenMetrics or protobuf, as the client accepts",
        &[USED, ("filter", "only families that match")],
    ),
    changes(
        "/tap",
        "looks at requests: an envoy.admin.v3.TapRequest as YAML or JSON",
        &[],
    ),
];

/// The list.
pub(super) fn text() -> String {
    let mut out = String::from("admin commands are:\n");
    for command in COMMANDS {
        let post = if command.post { " (POST)" } else { "" };
        // Writing to a String cannot fail.
        let _ = writeln!(out, "  {}{post}: {}", command.path, command.help);
        for (name, help) in command.parameters {
            let _ = writeln!(out, "      {name}: {help}");
        }
    }
    out
}

/// Whether a path changes something.
pub(super) fn takes_post(path: &str) -> bool {
    COMMANDS
        .iter()
        .any(|command| command.post && command.path == path)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn commands_are_listed_once_and_in_order() {
        assert!(COMMANDS.is_sorted_by(|one, other| one.path < other.path));
        assert!(text().contains("  /quitquitquit (POST): ends the process\n"));
        assert!(takes_post("/tap") && !takes_post("/stats"));
    }
}
