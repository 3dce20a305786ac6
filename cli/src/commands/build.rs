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
    /// yaml, json, a file to write, or a directory for one file per object
    #[arg(short, long, default_value = "yaml")]
    output: Print,
    /// Label each object with app.kubernetes.io/managed-by
    #[arg(long)]
    enable_managedby_label: bool,
    #[command(flatten)]
    foreign: Foreign,
}

/// Flags of `kustomize build` about programs that a build runs. Ours runs none.
#[derive(Debug, Args)]
struct Foreign {
    /// Refused: charts are not rendered during a build
    #[arg(long)]
    enable_helm: bool,
    /// Refused: programs are not run during a build
    #[arg(long)]
    enable_alpha_plugins: bool,
    /// Refused: programs are not run during a build
    #[arg(long)]
    enable_exec: bool,
    /// Refused: containers are not run during a build
    #[arg(long)]
    network: bool,
    /// Refused: containers are not run during a build
    #[arg(long)]
    mount: Vec<String>,
    /// Refused: programs are not run during a build, and a build does not see the environment
    #[arg(short, long)]
    env: Vec<String>,
    /// Accepted for scripts; without containers it has no effect
    #[arg(long)]
    as_current_user: bool,
}

impl Foreign {
    /// What is asked for and cannot be given.
    fn refuse(&self) -> anyhow::Result<()> {
        if self.enable_helm {
            bail!(
                "--enable-helm: charts are not rendered during a build; render them with `helm template` into a file that `resources` lists, or use a HelmRelease"
            );
        }
        let programs = [
            ("--enable-alpha-plugins", self.enable_alpha_plugins),
            ("--enable-exec", self.enable_exec),
            ("--network", self.network),
            ("--mount", !self.mount.is_empty()),
            ("--env", !self.env.is_empty()),
        ];
        if let Some((flag, _)) = programs.iter().find(|(_, given)| *given) {
            bail!(
                "{flag}: no program or container is run during a build; use the built-in generators and transformers, or run the program beforehand and list what it writes in `resources`"
            );
        }
        Ok(())
    }
}

/// Where objects go.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Print {
    /// As `kustomize build` prints them
    Yaml,
    /// A JSON `List`
    Json,
    /// As YAML into a file, or into one file for each object if it is a directory, as `kustomize build -o` does
    To(PathBuf),
}

impl std::str::FromStr for Print {
    type Err = std::convert::Infallible;

    fn from_str(text: &str) -> Result<Print, Self::Err> {
        Ok(match text {
            "yaml" => Print::Yaml,
            "json" => Print::Json,
            path => Print::To(PathBuf::from(path)),
        })
    }
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
    options.foreign.refuse()?;
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
        managed_by: options.enable_managedby_label,
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
        _ => print_objects(&built, &options.output)?,
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

fn print_objects(built: &Build, print: &Print) -> anyhow::Result<()> {
    match print {
        Print::Yaml => print!("{}", built.to_yaml()?),
        Print::To(path) if path.is_dir() => {
            for (name, text) in individual_files(built)? {
                let file = path.join(name);
                std::fs::write(&file, text).with_context(|| format!("write {}", file.display()))?;
            }
        }
        Print::To(path) => {
            std::fs::write(path, built.to_yaml()?).with_context(|| format!("write {}", path.display()))?;
        }
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

/// File names as kustomize makes them: group, version, kind and name, with the namespace in front where there are several.
fn individual_files(built: &Build) -> anyhow::Result<Vec<(String, String)>> {
    let namespaces: std::collections::BTreeSet<&str> = (built.objects.iter())
        .map(serin_manifests::Object::namespace)
        .filter(|namespace| !namespace.is_empty())
        .collect();
    let mut files = Vec::with_capacity(built.objects.len());
    for object in &built.objects {
        let prefix = match object.namespace() {
            "" => "",
            namespace if namespaces.len() > 1 => namespace,
            _ => "",
        };
        let parts = [
            prefix,
            object.group(),
            object.version(),
            object.kind(),
            object.name(),
        ];
        let parts: Vec<&str> = parts.into_iter().filter(|part| !part.is_empty()).collect();
        let name = parts.join("_").to_lowercase().replace('/', "-");
        files.push((format!("{name}.yaml"), object.to_yaml()?));
    }
    Ok(files)
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

    #[derive(Debug, clap::Parser)]
    struct Line {
        #[command(flatten)]
        options: Options,
    }

    fn line(arguments: &[&str]) -> Options {
        use clap::Parser as _;
        Line::try_parse_from(std::iter::once(&"build").chain(arguments))
            .unwrap()
            .options
    }

    #[test]
    fn flags_about_charts_and_programs_are_refused_with_what_to_do_instead() {
        for (flag, remedy) in [
            ("--enable-helm", "helm template"),
            ("--enable-exec", "built-in"),
            ("--enable-alpha-plugins", "built-in"),
            ("--network", "built-in"),
            ("--env=A=b", "built-in"),
        ] {
            let error = run(&line(&["x", flag])).unwrap_err().to_string();
            assert!(error.contains(remedy), "{flag}: {error}");
        }
        assert!(line(&["x", "--as-current-user"]).foreign.refuse().is_ok());
    }

    #[test]
    fn the_output_goes_to_a_file_or_to_one_file_per_object() {
        let dir = tempfile::tempdir().unwrap();
        let path = |name: &str| dir.path().join(name).to_str().unwrap().to_owned();
        std::fs::write(
            path("kustomization.yaml"),
            "resources: [a.yaml]\nnamespace: prod\n",
        )
        .unwrap();
        std::fs::write(
            path("a.yaml"),
            "apiVersion: apps/v1\nkind: Deployment\nmetadata: {name: Web}\n---\napiVersion: v1\nkind: Namespace\nmetadata: {name: prod}\n",
        )
        .unwrap();
        std::fs::create_dir(path("out")).unwrap();
        run(&line(&[&path(""), "-o", &path("out")])).unwrap();
        run(&line(&[&path(""), "-o", &path("all.yaml")])).unwrap();
        let mut names: Vec<String> = std::fs::read_dir(path("out"))
            .unwrap()
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect();
        names.sort();
        assert_eq!(names, ["apps_v1_deployment_web.yaml", "v1_namespace_prod.yaml"]);
        let all = std::fs::read_to_string(path("all.yaml")).unwrap();
        assert!(all.contains("---\n") && all.starts_with("apiVersion: v1\nkind: Namespace"));
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
