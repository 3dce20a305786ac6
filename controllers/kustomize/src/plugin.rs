//! Transformers and generators that are configured by resources: the built-in kinds of `apiVersion: builtin`.

use serin_manifests::yaml::{ReadOptions, parse_document, write_map};
use serin_manifests::{Dialect, Map, Scalar, Value};

use crate::decode::{Context, Fields};
use crate::error::{Cause, Error, Result};
use crate::field_spec::FieldSpec;
use crate::generate::Generator;
use crate::image::ImageRule;
use crate::json_patch;
use crate::kustomization::{self, GeneratorArgs, Image, Located, Patch, Replacement, Replica};
use crate::loader::Loader;
use crate::options::EncryptedUse;
use crate::replacement;
use crate::resource::Resource;
use crate::selector::{Matcher, Selector};
use crate::transform::{Env, PatchBody, SubjectMode, Transformer, ValueTarget};

/// Makes transformers and generators for one kustomization directory.
pub(crate) struct Workshop<'l, 't, 'e> {
    pub loader: &'l Loader<'t>,
    pub root: &'l str,
    pub env: &'l Env<'e>,
}

impl Workshop<'_, '_, '_> {
    fn max_regex(&self) -> usize {
        self.env.budget.max_regex_bytes
    }

    /// An entry of `patches`.
    pub(crate) fn patch(&self, entry: &Patch) -> Result<Transformer> {
        let fail = |message: String| Error::new(Cause::Patch(message)).at_option(entry.place.clone());
        let inline = entry.patch.trim();
        let (text, file, source) = match (inline.is_empty(), entry.path.is_empty()) {
            (true, true) => return Err(fail("must specify one of patch and path".into())),
            (false, false) => return Err(fail("patch and path can't be set at the same time".into())),
            (false, true) => (
                inline.as_bytes().to_vec(),
                "inline patch".to_owned(),
                format!("[patch: {inline:?}]"),
            ),
            (true, false) => {
                let (content, file) = self
                    .loader
                    .load_opened(self.root, &entry.path, EncryptedUse::Patch)
                    .map_err(|e| e.at_option(entry.place.clone()))?;
                (content.to_vec(), file, format!("[path: {:?}]", entry.path))
            }
        };
        let limits = self.env.limits();
        let as_resources = crate::read::resources(&text, &file, limits);
        let text = crate::read::utf8(&text, &file)?;
        let body = match as_resources {
            Ok(mut patches) if !patches.is_empty() => {
                for patch in &mut patches {
                    patch.allow_name_change = entry.allow_name_change;
                    patch.allow_kind_change = entry.allow_kind_change;
                }
                PatchBody::Merge(patches)
            }
            Ok(_) => PatchBody::Json(Vec::new()),
            Err(as_resource) => match json_patch::parse(text, &file, limits) {
                Ok(operations) if !text.trim().is_empty() => PatchBody::Json(operations),
                _ => {
                    let detail = as_resource.to_string();
                    return Err(
                        fail(format!("unable to parse SM or JSON patch from {source}")).help(format!(
                            "as a strategic merge patch: {}",
                            detail.lines().next().unwrap_or("")
                        )),
                    );
                }
            },
        };
        let target = entry
            .target
            .as_ref()
            .map(|t| self.matcher(t).map(|m| (t.clone(), Box::new(m))))
            .transpose();
        let target = target.map_err(|e| e.at_option(entry.place.clone()))?;
        Ok(Transformer::Patch { body, target, source })
    }

    fn matcher(&self, selector: &Selector) -> Result<Matcher> {
        Matcher::new(selector, self.max_regex())
    }

    /// All of `patchesStrategicMerge`: each is a path or the patch itself.
    pub(crate) fn strategic_merge(&self, entries: &[Located]) -> Result<Transformer> {
        let limits = self.env.limits();
        let mut patches = Vec::new();
        for entry in entries {
            match crate::read::resources(entry.text.as_bytes(), "inline patch", limits) {
                Ok(inline) => patches.extend(inline),
                Err(_) => {
                    let (content, file) = self
                        .loader
                        .load_opened(self.root, &entry.text, EncryptedUse::Patch)
                        .map_err(|e| e.at_option(entry.place.clone()))?;
                    patches.extend(crate::read::resources(&content, &file, limits)?);
                }
            }
        }
        if patches.is_empty() {
            return Err(Cause::Patch("patch appears to be empty".into()).into());
        }
        Ok(Transformer::StrategicMerge(patches))
    }

    /// An entry of `patchesJson6902`.
    pub(crate) fn json6902(&self, entry: &Patch) -> Result<Transformer> {
        let fail =
            |message: &str| Error::new(Cause::Patch(message.to_owned())).at_option(entry.place.clone());
        let target = entry
            .target
            .as_ref()
            .filter(|t| !t.name.is_empty())
            .ok_or_else(|| fail("must specify the target name"))?;
        let (text, file) = match (entry.path.is_empty(), entry.patch.is_empty()) {
            (true, true) => return Err(fail("empty file path and empty jsonOp")),
            (false, false) => return Err(fail("must specify a file path or jsonOp, not both")),
            (false, true) => {
                let (content, file) = self
                    .loader
                    .load_opened(self.root, &entry.path, EncryptedUse::Patch)
                    .map_err(|e| e.at_option(entry.place.clone()))?;
                (crate::read::utf8(&content, &file)?.to_owned(), file)
            }
            (true, false) => (entry.patch.clone(), "inline patch".to_owned()),
        };
        let patch = json_patch::parse(&text, &file, self.env.limits())?;
        if patch.is_empty() {
            return Err(fail("patch appears to be empty"));
        }
        Ok(Transformer::Json6902 {
            target: Box::new(self.matcher(target)?),
            patch,
        })
    }

    pub(crate) fn image(&self, image: Image, specs: Vec<FieldSpec>) -> Result<Transformer> {
        Ok(Transformer::Image {
            rule: Box::new(ImageRule::new(image, self.max_regex())?),
            specs,
        })
    }

    /// All of `replacements`; files are read here.
    pub(crate) fn replacements(&self, entries: &[Replacement]) -> Result<Transformer> {
        let mut prepared = Vec::new();
        for entry in entries {
            if entry.path.is_empty() {
                prepared.push(replacement::prepare(entry.clone())?);
                continue;
            }
            if entry.source.is_some() || entry.targets.as_ref().is_some_and(|t| !t.is_empty()) {
                let message = "cannot specify both path and inline replacement".to_owned();
                return Err(Error::new(Cause::Replacement(message)).at_option(entry.place.clone()));
            }
            let (content, file) = self
                .loader
                .load(self.root, &entry.path)
                .map_err(|e| e.at_option(entry.place.clone()))?;
            let text = crate::read::utf8(&content, &file)?;
            for replacement in self.replacement_file(text, &file)? {
                prepared.push(replacement::prepare(replacement)?);
            }
        }
        Ok(Transformer::Replacements(prepared))
    }

    fn replacement_file(&self, text: &str, file: &str) -> Result<Vec<Replacement>> {
        let options = ReadOptions {
            file,
            line_offset: 0,
            dialect: Dialect::Kubectl,
            limits: self.env.limits(),
        };
        let ctx = Context {
            file,
            text,
            what: "Replacement",
            strict: false,
        };
        let items = match parse_document(text, &options)? {
            Some(Value::Seq(seq)) => seq.items,
            Some(map @ Value::Map(_)) => vec![map],
            other => {
                let found = other.map_or("null", |v| v.type_name());
                let message =
                    format!("unsupported replacement type encountered within replacement path: {found}");
                return Err(Cause::Replacement(message).into());
            }
        };
        items
            .iter()
            .map(|item| match ctx.map("", item)? {
                Some(map) => kustomization::replacement(&mut Fields::new(&ctx, "", map)),
                None => Ok(Replacement::default()),
            })
            .collect()
    }

    /// The configuration as its plugin sees it: written out and read again by the rules of kubectl.
    fn with_config<T>(
        &self,
        config: &Resource,
        read: impl FnOnce(&mut Fields<'_, '_>) -> Result<T>,
    ) -> Result<T> {
        let mut text = String::new();
        let file = config
            .source
            .as_ref()
            .map_or_else(|| "inline configuration".to_owned(), |s| s.file.to_string());
        write_map(&config.root, &mut text).map_err(|message| {
            Error::new(Cause::Transformer(format!(
                "{}: {message}",
                config.id(self.env.schemas)
            )))
        })?;
        let options = ReadOptions {
            file: &file,
            line_offset: 0,
            dialect: Dialect::Kubectl,
            limits: self.env.limits(),
        };
        let ctx = Context {
            file: &file,
            text: &text,
            what: config.kind(),
            strict: false,
        };
        let value = parse_document(&text, &options)?.unwrap_or_else(|| Value::Map(Map::new()));
        let empty = Map::new();
        let map = value.as_map().unwrap_or(&empty);
        read(&mut Fields::new(&ctx, "", map)).map_err(|e| {
            e.help(format!(
                "in the configuration of {} in {file}",
                config.id(self.env.schemas)
            ))
        })
    }

    fn check_builtin(&self, config: &Resource) -> Result<()> {
        if config.api_version() == "builtin" {
            return Ok(());
        }
        let kind = config.kind().to_owned();
        Err(Error::new(Cause::ExternalPlugin(kind)).help(
            "programs and containers are not run during a build; use a built-in transformer, or commit the result of the plugin",
        ))
    }

    /// The transformer that a resource of `transformers` or `validators` configures.
    pub(crate) fn transformer(&self, config: &Resource) -> Result<Transformer> {
        self.check_builtin(config)?;
        let kind = config.kind().to_owned();
        self.with_config(config, |f| {
            let pairs = |f: &mut Fields<'_, '_>, name| -> Result<Vec<(String, String)>> {
                let mut pairs = f.string_map(name)?.unwrap_or_default();
                pairs.sort();
                Ok(pairs)
            };
            Ok(match kind.as_str() {
                "AnnotationsTransformer" => {
                    Transformer::Annotations { pairs: pairs(f, "annotations")?, specs: specs(f)? }
                }
                "LabelTransformer" => Transformer::Labels { pairs: pairs(f, "labels")?, specs: specs(f)? },
                "NamespaceTransformer" => {
                    let namespace = f.object("metadata", |m| m.string("namespace"))?.unwrap_or_default();
                    let mode = f.string("setRoleBindingSubjects")?;
                    let subjects = match mode.as_str() {
                        "" | "defaultOnly" => SubjectMode::DefaultOnly,
                        "allServiceAccounts" => SubjectMode::AllServiceAccounts,
                        "none" => SubjectMode::None,
                        _ => {
                            return Err(Cause::Transformer(format!(
                                "invalid value \"{mode}\" for setRoleBindingSubjects: must be one of \"defaultOnly\", \"none\" or \"allServiceAccounts\""
                            ))
                            .into());
                        }
                    };
                    Transformer::Namespace { namespace, specs: specs(f)?, unset_only: f.bool("unsetOnly")?, subjects }
                }
                "PrefixTransformer" => Transformer::Prefix { text: f.string("prefix")?, specs: required_specs(f)? },
                "SuffixTransformer" => Transformer::Suffix { text: f.string("suffix")?, specs: required_specs(f)? },
                "PrefixSuffixTransformer" => Transformer::Several(vec![
                    Transformer::Prefix { text: f.string("prefix")?, specs: required_specs(f)? },
                    Transformer::Suffix { text: f.string("suffix")?, specs: required_specs(f)? },
                ]),
                "ImageTagTransformer" => {
                    let image = f.object("imageTag", kustomization::image)?.unwrap_or_default();
                    self.image(image, specs(f)?)?
                }
                "ReplicaCountTransformer" => Transformer::Replicas {
                    replica: f.object("replica", kustomization::replica)?.unwrap_or_else(Replica::default),
                    specs: specs(f)?,
                },
                "PatchTransformer" => self.patch(&kustomization::patch(f)?)?,
                "PatchJson6902Transformer" => {
                    let mut patch = kustomization::patch(f)?;
                    patch.patch = f.string("jsonOp")?;
                    self.json6902(&patch)?
                }
                "PatchStrategicMergeTransformer" => self.strategic_merge_plugin(f)?,
                "ReplacementTransformer" => {
                    let list = f.list("replacements", kustomization::replacement)?;
                    self.replacements(&list)?
                }
                "HashTransformer" => Transformer::Hash,
                "ValueAddTransformer" => self.value_add(f)?,
                "ConfigMapGenerator" | "SecretGenerator" | "IAMPolicyGenerator" => {
                    return Err(Cause::Transformer(format!("plugin {kind} is not a transformer; list it in `generators`")).into());
                }
                _ => return Err(unknown_builtin(&kind)),
            })
        })
    }

    fn strategic_merge_plugin(&self, f: &mut Fields<'_, '_>) -> Result<Transformer> {
        let paths: Vec<Located> = f
            .strings("paths")?
            .into_iter()
            .map(|text| Located { text, place: None })
            .collect();
        let inline = f.string("patches")?;
        if paths.is_empty() && inline.is_empty() {
            return Err(Cause::Patch("empty file path and empty patch content".into()).into());
        }
        let mut patches = if paths.is_empty() {
            Vec::new()
        } else {
            match self.strategic_merge(&paths)? {
                Transformer::StrategicMerge(patches) => patches,
                _ => Vec::new(),
            }
        };
        patches.extend(crate::read::resources(
            inline.as_bytes(),
            "inline patch",
            self.env.limits(),
        )?);
        if patches.is_empty() {
            return Err(Cause::Patch("patch appears to be empty".into()).into());
        }
        Ok(Transformer::StrategicMerge(patches))
    }

    fn value_add(&self, f: &mut Fields<'_, '_>) -> Result<Transformer> {
        let mut value = f.string("value")?.trim().to_owned();
        if value.is_empty() {
            // The directory of the kustomization is the default value.
            value = self.root.rsplit('/').next().unwrap_or("").to_owned();
        }
        let mut targets = f.list("targets", |t| self.value_target(t))?;
        let path = f.string("targetFilePath")?;
        if !path.is_empty() {
            let (content, file) = self.loader.load(self.root, &path)?;
            let text = crate::read::utf8(&content, &file)?;
            let options = ReadOptions {
                file: &file,
                line_offset: 0,
                dialect: Dialect::Kubectl,
                limits: self.env.limits(),
            };
            let ctx = Context {
                file: &file,
                text,
                what: "ValueAddTransformer",
                strict: false,
            };
            if let Some(Value::Map(map)) = parse_document(text, &options)? {
                targets.extend(Fields::new(&ctx, "", &map).list("targets", |t| self.value_target(t))?);
            }
        }
        if targets.is_empty() {
            return Err(Cause::Transformer("must specify at least one target".into()).into());
        }
        Ok(Transformer::ValueAdd { value, targets })
    }

    fn value_target(&self, t: &mut Fields<'_, '_>) -> Result<ValueTarget> {
        let selector = t.object("selector", kustomization::selector)?;
        let field_path = t.string("fieldPath")?;
        let position = t.int("filePathPosition")?;
        if field_path.is_empty() {
            return Err(Cause::Transformer("fieldPath cannot be empty".into()).into());
        }
        let position = usize::try_from(position).map_err(|_| {
            Error::new(Cause::Transformer(format!(
                "value of FilePathPosition ({position}) cannot be negative"
            )))
        })?;
        let matcher = selector.map(|s| self.matcher(&s).map(Box::new)).transpose()?;
        Ok(ValueTarget {
            matcher,
            field_path,
            position,
        })
    }

    /// What a resource of `generators` makes.
    pub(crate) fn generate(&self, config: &Resource) -> Result<Vec<Resource>> {
        self.check_builtin(config)?;
        let kind = config.kind().to_owned();
        self.with_config(config, |f| match kind.as_str() {
            "ConfigMapGenerator" | "SecretGenerator" => {
                let secret = kind == "SecretGenerator";
                let metadata = f.object("metadata", |m| Ok((m.string("name")?, m.string("namespace")?)))?;
                let (name, namespace) = metadata.unwrap_or_default();
                let mut args: GeneratorArgs = kustomization::generator_args(f, secret)?;
                if args.name.is_empty() {
                    args.name = name;
                }
                if args.namespace.is_empty() {
                    args.namespace = namespace;
                }
                args.place = None;
                let generator = Generator {
                    loader: self.loader,
                    root: self.root,
                    secret,
                };
                Ok(vec![generator.generate(&args, None)?])
            }
            "IAMPolicyGenerator" => iam_policy(f),
            "HelmChartInflationGenerator" => Err(helm_refused(&f.string("name")?)),
            _ => Err(unknown_builtin(&kind)),
        })
    }
}

/// Charts are not rendered here: it would mean to run a program and to reach for the network.
pub(crate) fn helm_refused(chart: &str) -> Error {
    Error::new(Cause::Helm(chart.to_owned()))
        .help("render the chart with `helm template` and commit the result, or let a HelmRelease install it")
}

fn unknown_builtin(kind: &str) -> Error {
    Cause::Transformer(format!("unable to load builtin {kind}.builtin.[noGrp]")).into()
}

fn specs(f: &mut Fields<'_, '_>) -> Result<Vec<FieldSpec>> {
    f.list("fieldSpecs", kustomization::field_spec)
}

fn required_specs(f: &mut Fields<'_, '_>) -> Result<Vec<FieldSpec>> {
    if f.get("fieldSpecs").is_none() {
        return Err(Cause::Transformer("fieldSpecs is not expected to be nil".into()).into());
    }
    specs(f)
}

fn iam_policy(f: &mut Fields<'_, '_>) -> Result<Vec<Resource>> {
    let cloud = f.string("cloud")?;
    if cloud != "gke" {
        return Err(Cause::Generator(format!("cloud provider {cloud} not supported yet")).into());
    }
    let service = f
        .object("kubernetesService", |s| {
            Ok((s.string("name")?, s.string("namespace")?))
        })?
        .unwrap_or_default();
    let account = f
        .object("serviceAccount", |s| {
            Ok((s.string("name")?, s.string("projectId")?))
        })?
        .unwrap_or_default();
    let mut metadata = Map::new();
    let address = format!("{}@{}.iam.gserviceaccount.com", account.0, account.1);
    metadata.push(
        "annotations",
        Value::string_map([("iam.gke.io/gcp-service-account", address)]),
    );
    metadata.push("name", Value::Scalar(Scalar::untyped(service.0)));
    if !service.1.is_empty() {
        metadata.push("namespace", Value::Scalar(Scalar::untyped(service.1)));
    }
    let mut root = Map::new();
    root.push("apiVersion", Value::string("v1"));
    root.push("kind", Value::string("ServiceAccount"));
    root.push("metadata", Value::Map(metadata));
    Ok(vec![Resource::new(root, None)])
}
