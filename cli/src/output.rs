//! Tables for people, JSON and YAML for programs; colour only on a terminal that wants it.

use std::io::IsTerminal as _;

use comfy_table::presets::NOTHING;
use comfy_table::{Attribute, Cell, Color, ContentArrangement, Table};
use serde::Serialize;

/// How to print.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum Format {
    /// For people
    #[default]
    Table,
    /// One JSON document
    Json,
    /// One YAML document
    Yaml,
}

/// Prints a value in a format other than a table. Returns false for tables, which the caller draws.
pub(crate) fn print_structured<T: Serialize>(value: &T, format: Format) -> anyhow::Result<bool> {
    match format {
        Format::Table => return Ok(false),
        Format::Json => println!("{}", serde_json::to_string_pretty(value)?),
        Format::Yaml => print!("{}", serde_yaml::to_string(value)?),
    }
    Ok(true)
}

/// Whether standard output is a terminal that wants colour (`NO_COLOR` is respected).
pub(crate) fn colour() -> bool {
    std::io::stdout().is_terminal() && std::env::var_os("NO_COLOR").is_none_or(|value| value.is_empty())
}

/// A table without frames, as kubectl's.
pub(crate) fn table(header: &[&str]) -> Table {
    let mut table = Table::new();
    table
        .load_style(NOTHING)
        .set_content_arrangement(ContentArrangement::Disabled);
    if !colour() {
        table.force_no_tty();
    }
    table.set_header(
        header
            .iter()
            .map(|name| Cell::new(name).add_attribute(Attribute::Bold)),
    );
    table
}

/// How a fact is to be read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Mood {
    Good,
    Busy,
    Bad,
    Plain,
}

/// A cell in the colour of its mood.
pub(crate) fn cell(text: impl Into<String>, mood: Mood) -> Cell {
    let cell = Cell::new(text.into());
    match mood {
        Mood::Good => cell.fg(Color::Green),
        Mood::Busy => cell.fg(Color::Yellow),
        Mood::Bad => cell.fg(Color::Red),
        Mood::Plain => cell,
    }
}

/// Text in the colour of a mood, if standard output wants colour.
pub(crate) fn paint(text: &str, mood: Mood) -> String {
    let code = match mood {
        Mood::Good => "32",
        Mood::Busy => "33",
        Mood::Bad => "31",
        Mood::Plain => return text.to_owned(),
    };
    if colour() {
        format!("\x1b[{code}m{text}\x1b[0m")
    } else {
        text.to_owned()
    }
}

/// What precedes an error on standard error.
pub(crate) fn error_mark() -> &'static str {
    if std::io::stderr().is_terminal() && std::env::var_os("NO_COLOR").is_none() {
        "\x1b[31merror:\x1b[0m"
    } else {
        "error:"
    }
}
