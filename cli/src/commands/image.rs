//! `serin image`: the catalogue of programs that stand for container images.

use std::process::ExitCode;

use anyhow::{Context as _, bail};
use clap::{Args, Subcommand};
use kube::api::{Api, DeleteParams, ListParams, ObjectMeta, Patch, PatchParams};
use kube::{Client, ResourceExt as _};
use serde::Serialize;
use serin_crds::serin_dev::{Image, ImageEnv, ImageSpec};

use super::apply::FIELD_MANAGER;
use crate::cluster::Cluster;
use crate::output::{Format, Mood, cell, print_structured, table};

/// Marks the entries that ship with Serin.
const BUILT_IN: &str = "serin.dev/built-in";

/// Commands of `serin image`.
#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// List the entries
    List(List),
    /// Add or replace an entry
    Add(Add),
    /// Remove an entry
    Remove(Remove),
}

/// Options of `serin image list`.
#[derive(Debug, Args)]
#[command(after_help = "Examples:\n  serin image list\n  serin image list -o json")]
pub(crate) struct List {
    /// How to print it
    #[arg(short, long, value_enum, default_value_t)]
    output: Format,
}

/// Options of `serin image add`.
#[derive(Debug, Args)]
#[command(
    after_help = "`*` in a reference stands for any text. In arguments and values {tag} and {1}, {2}, … stand for the\nreference's tag and for what the wildcards matched.\n\nExamples:\n  serin image add 'example.com/shop:*' /opt/shop/bin/shop -- --port 8080\n  serin image add 'ghcr.io/acme/api:*' ./target/debug/api --env VERSION={tag}"
)]
pub(crate) struct Add {
    /// Pattern of image references
    reference: String,
    /// Path of a program, or its name when it ships with Serin or is in PATH
    program: String,
    /// A variable of its environment, NAME=VALUE; may be repeated
    #[arg(short, long = "env", value_parser = parse_variable)]
    env: Vec<(String, String)>,
    /// Arguments in front of the container's own
    #[arg(last = true)]
    arguments: Vec<String>,
}

/// Options of `serin image remove`.
#[derive(Debug, Args)]
#[command(after_help = "Example:\n  serin image remove 'example.com/shop:*'")]
pub(crate) struct Remove {
    /// Pattern of the entry, as `serin image list` shows it
    reference: String,
}

/// Runs the command.
pub(crate) async fn run(cluster: &Cluster, command: &Command) -> anyhow::Result<ExitCode> {
    let api: Api<Image> = Api::all(cluster.client()?);
    match command {
        Command::List(options) => list(&api, options.output).await?,
        Command::Add(options) => add(&api, options).await?,
        Command::Remove(options) => remove(&api, &options.reference).await?,
    }
    Ok(ExitCode::SUCCESS)
}

#[derive(Serialize)]
struct Entry {
    reference: String,
    program: String,
    arguments: Vec<String>,
    built_in: bool,
}

async fn list(api: &Api<Image>, format: Format) -> anyhow::Result<()> {
    let mut entries: Vec<Entry> = api
        .list(&ListParams::default())
        .await?
        .items
        .into_iter()
        .map(|image| Entry {
            built_in: image.labels().contains_key(BUILT_IN),
            reference: image.spec.reference,
            program: image.spec.program,
            arguments: image.spec.args,
        })
        .collect();
    entries.sort_by(|a, b| a.reference.cmp(&b.reference));
    if !print_structured(&entries, format)? {
        let mut rows = table(&["REFERENCE", "PROGRAM", "ARGUMENTS", "BUILT IN"]);
        for entry in &entries {
            let built_in = if entry.built_in { "yes" } else { "" };
            rows.add_row([
                cell(&entry.reference, Mood::Plain),
                cell(&entry.program, Mood::Plain),
                cell(entry.arguments.join(" "), Mood::Plain),
                cell(built_in, Mood::Plain),
            ]);
        }
        println!("{rows}");
    }
    Ok(())
}

async fn add(api: &Api<Image>, options: &Add) -> anyhow::Result<()> {
    // A relative path means the file beside the person who typed it, not beside the server.
    let program = if options.program.contains('/') {
        let path = std::fs::canonicalize(&options.program)
            .with_context(|| format!("find the program {}", options.program))?;
        path.to_str()
            .context("the program's path is not UTF-8")?
            .to_owned()
    } else {
        // What ships with Serin lies beside this program.
        let beside = std::env::current_exe()?.with_file_name(&options.program);
        if beside.is_file() {
            beside.display().to_string()
        } else {
            options.program.clone()
        }
    };
    let env = options
        .env
        .iter()
        .map(|(name, value)| ImageEnv {
            name: name.clone(),
            value: Some(value.clone()),
        })
        .collect();
    let spec = ImageSpec {
        reference: options.reference.clone(),
        program,
        args: options.arguments.clone(),
        env,
    };
    write(api, spec, false).await?;
    println!("image {} added", options.reference);
    Ok(())
}

async fn remove(api: &Api<Image>, reference: &str) -> anyhow::Result<()> {
    let entries = api.list(&ListParams::default()).await?.items;
    let Some(entry) = entries.iter().find(|image| image.spec.reference == reference) else {
        bail!("there is no entry for {reference}; see: serin image list");
    };
    api.delete(&entry.name_any(), &DeleteParams::default()).await?;
    println!("image {reference} removed");
    Ok(())
}

async fn write(api: &Api<Image>, spec: ImageSpec, built_in: bool) -> anyhow::Result<()> {
    let name = object_name(&spec.reference);
    let labels = built_in.then(|| [(BUILT_IN.to_owned(), "true".to_owned())].into());
    let mut image = Image::new(&name, spec);
    image.metadata = ObjectMeta {
        name: Some(name.clone()),
        labels,
        ..ObjectMeta::default()
    };
    api.patch(
        &name,
        &PatchParams::apply(FIELD_MANAGER).force(),
        &Patch::Apply(&image),
    )
    .await
    .with_context(|| format!("write image {}", image.spec.reference))?;
    Ok(())
}

/// A DNS name that is the same for the same pattern: what can be read of it, and a hash of the whole (FNV-1a).
fn object_name(reference: &str) -> String {
    let readable: String = reference
        .chars()
        .map(|c| {
            if c.is_ascii_lowercase() || c.is_ascii_digit() {
                c
            } else {
                '-'
            }
        })
        .take(48)
        .collect();
    let hash = reference.bytes().fold(0xcbf2_9ce4_8422_2325_u64, |hash, byte| {
        (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3)
    });
    format!("{}-{hash:016x}", readable.trim_matches('-'))
}

/// Writes the entries that ship with Serin: the proxy, Istio's bookinfo, podinfo. Their programs lie beside this one.
pub(crate) async fn write_built_in(client: &Client) -> anyhow::Result<()> {
    let api: Api<Image> = Api::all(client.clone());
    let this = std::env::current_exe().context("find this program")?;
    let beside = |name: &str| this.with_file_name(name).display().to_string();
    let example = |reference: &str, application: &str| ImageSpec {
        reference: reference.to_owned(),
        program: beside("serin-example"),
        args: vec![application.to_owned()],
        env: Vec::new(),
    };
    let proxy = |reference: &str| ImageSpec {
        reference: reference.to_owned(),
        program: beside("serin-proxy"),
        args: Vec::new(),
        env: Vec::new(),
    };
    let entries = [
        proxy("serin.dev/proxy"),
        proxy("serin.dev/proxy:*"),
        example("*/examples-bookinfo-productpage-*", "productpage"),
        example("*/examples-bookinfo-details-*", "details"),
        example("*/examples-bookinfo-reviews-*", "reviews"),
        example("*/examples-bookinfo-ratings-*", "ratings"),
        example("ghcr.io/stefanprodan/podinfo:*", "podinfo"),
        example("docker.io/stefanprodan/podinfo:*", "podinfo"),
        example("serin.dev/examples/podinfo:*", "podinfo"),
    ];
    for entry in entries {
        write(&api, entry, true).await?;
    }
    Ok(())
}

fn parse_variable(text: &str) -> Result<(String, String), String> {
    match text.split_once('=') {
        Some((name, value)) if !name.is_empty() => Ok((name.to_owned(), value.to_owned())),
        Some(_) | None => Err("a variable is written NAME=VALUE".to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_object_of_a_pattern_has_a_valid_name_that_depends_on_the_whole_pattern() {
        let name = object_name("*/istio/examples-bookinfo-reviews-*");
        assert!(
            name.starts_with("istio-examples-bookinfo-reviews-") && name.len() <= 65,
            "{name}"
        );
        assert_ne!(object_name("a:1"), object_name("a-1"));
    }
}
