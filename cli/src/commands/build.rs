//! `serin build`: prints what a kustomization builds, as `kustomize build` prints it.

use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Instant;

use anyhow::{Context as _, bail};
use clap::Args;
use serin_kustomize::dir::DirTree;
use serin_kustomize::{Build, LoadRestrictor, Options as BuildOptions, Reorder, Trace, build};
use serin_manifests::diff::Change;

/// Options of `serin build`.
#[derive(Debug, Args)]
#[command(
    after_help = "Files are read below the enclosing git repository, or below --root; links that lead out of it are refused.\n\nExamples:\n  serin build overlays/production\n  serin build . --load-restrictor LoadRestrictionsNone -o json\n  serin build . --explain Deployment/shop:spec.replicas\n  serin build . --origin --stats > all.yaml"
)]
pub(crate) struct Options {
    /// Directory with a kustomization file
    #[arg(default_value = ".")]
    directory: PathBuf,
    /// Nothing above this directory exists for the build [default: the enclosing git repository, else /]
    #[arg(long)]
    root: Option<PathBuf>,
    /// LoadRestrictionsRootOnly, or LoadRestrictionsNone as Flux does
    #[arg(long, default_value = "LoadRestrictionsRootOnly")]
    load_restrictor: LoadRestrictor,
    /// Order of the objects: legacy (namespaces and definitions first) or none (as read)
    #[arg(long, value_parser = parse_order, default_value = "legacy")]
    reorder: Reorder,
    /// Annotate each object with the file it came from
    #[arg(long)]
    origin: bool,
    /// Tell which files and transformers gave a field its value: KIND/NAME[:FIELD.PATH]
    #[arg(long, value_name = "PATH")]
    explain: Option<String>,
    /// Say on standard error what the build read and how long it took
    #[arg(long)]
    stats: bool,
    /// How to print the objects
    #[arg(short, long, value_enum, default_value_t = Print::Yaml)]
    output: Print,
}

/// How to print objects.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
enum Print {
    /// As `kustomize build` does
    Yaml,
    /// A JSON `List`
    Json,
}

fn parse_order(text: &str) -> Result<Reorder, String> {
    match text {
        "legacy" => Ok(Reorder::Legacy),
        "none" => Ok(Reorder::None),
        _ => Err("say legacy or none".to_owned()),
    }
}

/// Builds and prints.
pub(crate) fn run(options: &Options) -> anyhow::Result<ExitCode> {
    let directory = std::fs::canonicalize(&options.directory)
        .with_context(|| format!("find the directory {}", options.directory.display()))?;
    let root = match &options.root {
        Some(root) => {
            std::fs::canonicalize(root).with_context(|| format!("find the root {}", root.display()))?
        }
        None => enclosing_repository(&directory),
    };
    let Ok(relative) = directory.strip_prefix(&root) else {
        bail!("{} is not below the root {}", directory.display(), root.display());
    };
    let relative = relative.to_str().context("the directory's path is not UTF-8")?;
    let settings = BuildOptions {
        load_restrictor: options.load_restrictor,
        reorder: options.reorder,
        origin: options.origin,
        trace: options.explain.is_some(),
        ..BuildOptions::default()
    };
    let started = Instant::now();
    let built = build(&DirTree::new(&root), relative, &settings)?;
    if options.stats {
        let stats = &built.stats;
        eprintln!(
            "{} objects from {} files ({} bytes) and {} kustomizations in {:.1} ms",
            stats.objects,
            stats.files,
            stats.bytes,
            stats.kustomizations,
            started.elapsed().as_secs_f64() * 1000.0
        );
    }
    for warning in &built.warnings {
        eprintln!("warning: {warning}");
    }
    match (&options.explain, &built.trace) {
        (Some(target), Some(trace)) => print!("{}", explain(trace, target)?),
        _ => print_objects(&built, options.output)?,
    }
    Ok(ExitCode::SUCCESS)
}

/// The nearest directory upwards that is a git repository; the file system's root if there is none.
fn enclosing_repository(directory: &Path) -> PathBuf {
    directory
        .ancestors()
        .find(|ancestor| ancestor.join(".git").exists())
        .map_or_else(|| PathBuf::from("/"), Path::to_path_buf)
}

fn print_objects(built: &Build, print: Print) -> anyhow::Result<()> {
    match print {
        Print::Yaml => print!("{}", built.to_yaml()?),
        Print::Json => {
            let items = built
                .objects
                .iter()
                .map(serin_manifests::Object::to_json)
                .collect::<Result<Vec<_>, _>>()?;
            let list = serde_json::json!({ "apiVersion": "v1", "kind": "List", "items": items });
            println!("{}", serde_json::to_string_pretty(&list)?);
        }
    }
    Ok(())
}

/// The life of a field: where the object was read, and every step that touched the field.
fn explain(trace: &Trace, target: &str) -> anyhow::Result<String> {
    use std::fmt::Write as _;
    let (object, path) = target.split_once(':').unwrap_or((target, ""));
    let Some((kind, name)) = object.split_once('/') else {
        bail!("--explain {target}: say KIND/NAME or KIND/NAME:FIELD.PATH");
    };
    let found = trace
        .objects
        .iter()
        .find(|candidate| candidate.id.kind.eq_ignore_ascii_case(kind) && candidate.id.name == name);
    let Some((found, steps)) = found.and_then(|found| trace.explain(&found.id, path)) else {
        let known: Vec<String> = trace
            .objects
            .iter()
            .map(|object| format!("{}/{}", object.id.kind, object.id.name))
            .collect();
        bail!(
            "--explain {target}: the build has no such object; it has {}",
            known.join(", ")
        );
    };
    let mut text = format!("{} {}\n", found.id.kind, found.id.name);
    match &found.source {
        Some((file, line)) => {
            let _ = writeln!(text, "  read from {file}:{line}");
        }
        None => text.push_str("  generated\n"),
    }
    for step in steps {
        let _ = writeln!(text, "  {} of {}", step.transformer, step.kustomization);
        for change in step.changes.iter().filter(|change| touches(&change.path, path)) {
            let _ = writeln!(text, "    {}", describe(change)?);
        }
    }
    Ok(text)
}

fn touches(changed: &str, wanted: &str) -> bool {
    wanted.is_empty() || changed.starts_with(wanted) || wanted.starts_with(changed)
}

fn describe(change: &Change) -> anyhow::Result<String> {
    let shown = |value: &Option<serin_manifests::Value>| -> anyhow::Result<String> {
        Ok(match value {
            Some(value) => value.to_json().map_err(anyhow::Error::msg)?.to_string(),
            None => "nothing".to_owned(),
        })
    };
    Ok(format!(
        "{}: {} → {}",
        change.path,
        shown(&change.before)?,
        shown(&change.after)?
    ))
}

#[cfg(test)]
mod tests {
    use serin_kustomize::MemoryTree;

    use super::*;

    fn traced() -> Trace {
        let tree = MemoryTree::from_iter([
            ("kustomization.yaml", "resources: [a.yaml]\nnamePrefix: x-\n"),
            (
                "a.yaml",
                "apiVersion: v1\nkind: ConfigMap\nmetadata:\n  name: a\n",
            ),
        ]);
        let options = BuildOptions {
            trace: true,
            ..BuildOptions::default()
        };
        build(&tree, "", &options).unwrap().trace.unwrap()
    }

    #[test]
    fn an_explanation_names_the_file_and_the_transformer() {
        let text = explain(&traced(), "configmap/x-a:metadata.name").unwrap();
        assert!(text.contains("read from a.yaml:1"), "{text}");
        assert!(text.contains("\"a\" → \"x-a\""), "{text}");
    }

    #[test]
    fn an_object_that_is_not_there_is_said_to_be_missing_with_those_that_are() {
        assert!(
            explain(&traced(), "configmap/b")
                .unwrap_err()
                .to_string()
                .contains("ConfigMap/x-a")
        );
    }
}
