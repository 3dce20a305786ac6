//! The kustomization file: every field of kustomize 5.7, with the deprecated ones.

use serin_manifests::yaml::{ReadOptions, parse_document};
use serin_manifests::{Dialect, Limits, Map, Place, Value};

use crate::config::{NameReference, TransformerConfig};
use crate::decode::{Context, Fields};
use crate::error::{Cause, Error, Result};
use crate::field_spec::FieldSpec;
use crate::id::{Gvk, ResId};
use crate::selector::Selector;

/// The file names, in the order in which they are looked for.
pub const FILE_NAMES: [&str; 3] = ["kustomization.yaml", "kustomization.yml", "Kustomization"];

const KUSTOMIZATION_VERSION: &str = "kustomize.config.k8s.io/v1beta1";
const COMPONENT_VERSION: &str = "kustomize.config.k8s.io/v1alpha1";

/// A string of the file with its place.
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct Located {
    pub text: String,
    pub place: Option<Place>,
}

#[derive(Clone, Debug, Default)]
pub(crate) struct Patch {
    pub path: String,
    pub patch: String,
    pub target: Option<Selector>,
    pub allow_name_change: bool,
    pub allow_kind_change: bool,
    pub place: Option<Place>,
}

#[derive(Clone, Debug, Default)]
pub(crate) struct Image {
    pub name: String,
    pub new_name: String,
    pub tag_suffix: String,
    pub new_tag: String,
    pub digest: String,
}

#[derive(Clone, Debug, Default)]
pub(crate) struct Label {
    pub pairs: Vec<(String, String)>,
    pub include_selectors: bool,
    pub include_templates: bool,
    pub fields: Vec<FieldSpec>,
}

#[derive(Clone, Debug, Default)]
pub(crate) struct Replica {
    pub name: String,
    pub count: i64,
}

#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct GeneratorOptions {
    pub labels: Option<Vec<(String, String)>>,
    pub annotations: Option<Vec<(String, String)>>,
    pub disable_name_suffix_hash: bool,
    pub immutable: bool,
}

#[derive(Clone, Debug, Default)]
pub(crate) struct GeneratorArgs {
    pub name: String,
    pub namespace: String,
    pub behavior: String,
    pub literals: Vec<String>,
    pub files: Vec<String>,
    pub envs: Vec<String>,
    pub options: Option<GeneratorOptions>,
    /// Of secrets.
    pub kind: String,
    pub place: Option<Place>,
}

#[derive(Clone, Debug, Default)]
pub(crate) struct FieldOptions {
    pub delimiter: String,
    pub index: i64,
    pub create: bool,
}

#[derive(Clone, Debug, Default)]
pub(crate) struct ReplacementSource {
    pub id: ResId,
    pub field_path: String,
    pub options: Option<FieldOptions>,
}

#[derive(Clone, Debug, Default)]
pub(crate) struct ReplacementTarget {
    pub select: Option<Selector>,
    pub reject: Vec<Selector>,
    pub field_paths: Vec<String>,
    pub options: Option<FieldOptions>,
}

#[derive(Clone, Debug, Default)]
pub(crate) struct Replacement {
    pub path: String,
    pub source: Option<ReplacementSource>,
    pub source_value: Option<String>,
    pub targets: Option<Vec<ReplacementTarget>>,
    pub place: Option<Place>,
}

#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct Var {
    pub name: String,
    pub gvk: Gvk,
    pub object_name: String,
    pub object_namespace: String,
    pub field_path: String,
}

#[derive(Clone, Debug, Default)]
pub(crate) struct SortOptions {
    pub order: String,
    pub legacy: Option<(Vec<String>, Vec<String>)>,
    pub place: Option<Place>,
}

/// A kustomization with its deprecated fields fixed up.
#[derive(Clone, Debug, Default)]
pub(crate) struct Kustomization {
    pub is_component: bool,
    pub openapi: Option<Vec<(String, String)>>,
    pub name_prefix: String,
    pub name_suffix: String,
    pub namespace: String,
    pub common_labels: Vec<(String, String)>,
    pub labels: Vec<Label>,
    pub common_annotations: Vec<(String, String)>,
    pub patches_strategic_merge: Vec<Located>,
    pub patches_json6902: Vec<Patch>,
    pub patches: Vec<Patch>,
    pub images: Vec<Image>,
    pub replacements: Vec<Replacement>,
    pub replicas: Vec<Replica>,
    pub vars: Vec<Var>,
    pub sort_options: Option<SortOptions>,
    pub resources: Vec<Located>,
    pub components: Vec<Located>,
    pub crds: Vec<Located>,
    pub config_map_generator: Vec<GeneratorArgs>,
    pub secret_generator: Vec<GeneratorArgs>,
    pub helm_charts: Vec<String>,
    pub generator_options: Option<GeneratorOptions>,
    pub configurations: Vec<Located>,
    pub generators: Vec<Located>,
    pub transformers: Vec<Located>,
    pub validators: Vec<Located>,
    pub build_metadata: Vec<String>,
    /// Deprecated fields in use, with what replaces them.
    pub warnings: Vec<&'static str>,
}

/// Reads a kustomization file.
pub(crate) fn read(text: &str, file: &str, limits: &Limits) -> Result<Kustomization> {
    let options = ReadOptions {
        file,
        line_offset: 0,
        dialect: Dialect::Kubectl,
        limits,
    };
    let invalid = |e: serin_manifests::Error| {
        let place = e.place().cloned();
        let message = match &e {
            serin_manifests::Error::Syntax { message, .. } => format!("yaml: {message}"),
            other => return Error::from(other.clone()),
        };
        Error::new(Cause::InvalidKustomization(message)).at_option(place)
    };
    let ctx = Context {
        file,
        text,
        what: "Kustomization",
        strict: true,
    };
    match parse_document(text, &options).map_err(invalid)? {
        None => Err(Cause::EmptyKustomization.into()),
        Some(Value::Map(map)) => decode(&ctx, &map),
        Some(other) => Err(ctx.wrong_type("", "object", &other)),
    }
}

fn located(fields: &mut Fields<'_, '_>, name: &'static str) -> Result<Vec<Located>> {
    let ctx = fields.ctx;
    let strings = fields.strings_with_values(name)?;
    Ok(strings
        .into_iter()
        .map(|(text, v)| Located {
            text,
            place: Some(ctx.place(v)),
        })
        .collect())
}

fn decode(ctx: &Context<'_>, map: &Map) -> Result<Kustomization> {
    let mut f = Fields::new(ctx, "", map);
    let api_version = f.string("apiVersion")?;
    let kind = f.string("kind")?;
    let has_metadata = f.get("metadata").is_some();
    f.object("metadata", |m| {
        m.string("name")?;
        m.string("namespace")?;
        m.string_map("labels")?;
        m.string_map("annotations")?;
        Ok(())
    })?;
    let mut k = Kustomization {
        is_component: kind == "Component",
        openapi: f.string_map("openapi")?,
        name_prefix: f.string("namePrefix")?,
        name_suffix: f.string("nameSuffix")?,
        namespace: f.string("namespace")?,
        common_labels: f.string_map("commonLabels")?.unwrap_or_default(),
        labels: f.list("labels", label)?,
        common_annotations: f.string_map("commonAnnotations")?.unwrap_or_default(),
        patches_strategic_merge: located(&mut f, "patchesStrategicMerge")?,
        patches_json6902: f.list("patchesJson6902", patch)?,
        patches: f.list("patches", patch)?,
        images: f.list("images", image)?,
        replacements: f.list("replacements", replacement)?,
        replicas: f.list("replicas", replica)?,
        vars: f.list("vars", var)?,
        sort_options: f.object("sortOptions", sort_options)?,
        resources: located(&mut f, "resources")?,
        components: located(&mut f, "components")?,
        crds: located(&mut f, "crds")?,
        config_map_generator: f.list("configMapGenerator", |g| generator_args(g, false))?,
        secret_generator: f.list("secretGenerator", |g| generator_args(g, true))?,
        helm_charts: Vec::new(),
        generator_options: f.object("generatorOptions", generator_options)?,
        configurations: located(&mut f, "configurations")?,
        generators: located(&mut f, "generators")?,
        transformers: located(&mut f, "transformers")?,
        validators: located(&mut f, "validators")?,
        build_metadata: f.strings("buildMetadata")?,
        warnings: Vec::new(),
    };
    // Order of the output is sorted by key wherever kustomize keeps a map.
    k.common_labels.sort();
    k.common_annotations.sort();
    let image_tags = f.list("imageTags", image)?;
    let bases = located(&mut f, "bases")?;
    let helm = helm_charts(&mut f)?;
    let deprecated: [(bool, &'static str); 6] = [
        (!bases.is_empty(), "'bases' is deprecated; use 'resources'"),
        (
            !k.common_labels.is_empty(),
            "'commonLabels' is deprecated; use 'labels'",
        ),
        (!image_tags.is_empty(), "'imageTags' is deprecated; use 'images'"),
        (
            !k.patches_json6902.is_empty(),
            "'patchesJson6902' is deprecated; use 'patches'",
        ),
        (
            !k.patches_strategic_merge.is_empty(),
            "'patchesStrategicMerge' is deprecated; use 'patches'",
        ),
        (!k.vars.is_empty(), "'vars' is deprecated; use 'replacements'"),
    ];
    k.warnings = deprecated
        .iter()
        .filter(|(used, _)| *used)
        .map(|(_, text)| *text)
        .collect();
    k.resources.extend(bases);
    k.images.extend(image_tags);
    k.helm_charts = helm;
    f.finish()?;
    if is_nothing(map, has_metadata) {
        return Err(Cause::EmptyKustomization.into());
    }
    check_type(&kind, &api_version, ctx)?;
    Ok(k)
}

/// Whether the file says nothing but what it is. Empty lists count as something, as in kustomize; nulls do not.
fn is_nothing(map: &Map, has_metadata: bool) -> bool {
    !has_metadata
        && map.entries.iter().all(|e| {
            let key = e.key.text.to_ascii_lowercase();
            e.value.is_null()
                || key == "apiversion"
                || key == "kind"
                || matches!(&e.value, Value::Scalar(s) if s.text.is_empty())
        })
}

fn check_type(kind: &str, api_version: &str, ctx: &Context<'_>) -> Result<()> {
    let place = Place::in_text(ctx.file, ctx.text, 0, 0);
    if !matches!(kind, "" | "Kustomization" | "Component") {
        let message = "kind should be Kustomization or Component".to_owned();
        return Err(Error::new(Cause::InvalidKustomization(message)).at(place));
    }
    let required = if kind == "Component" {
        COMPONENT_VERSION
    } else {
        KUSTOMIZATION_VERSION
    };
    if !api_version.is_empty() && api_version != required {
        let kind = if kind.is_empty() { "Kustomization" } else { kind };
        let message = format!("apiVersion for {kind} should be {required}");
        return Err(Error::new(Cause::InvalidKustomization(message)).at(place));
    }
    Ok(())
}

fn label(f: &mut Fields<'_, '_>) -> Result<Label> {
    let mut pairs = f.string_map("pairs")?.unwrap_or_default();
    pairs.sort();
    Ok(Label {
        pairs,
        include_selectors: f.bool("includeSelectors")?,
        include_templates: f.bool("includeTemplates")?,
        fields: f.list("fields", field_spec)?,
    })
}

pub(crate) fn field_spec(f: &mut Fields<'_, '_>) -> Result<FieldSpec> {
    Ok(FieldSpec {
        gvk: gvk(f)?,
        path: f.string("path")?,
        create: f.bool("create")?,
    })
}

fn gvk(f: &mut Fields<'_, '_>) -> Result<Gvk> {
    Ok(Gvk {
        group: f.string("group")?,
        version: f.string("version")?,
        kind: f.string("kind")?,
    })
}

pub(crate) fn selector(f: &mut Fields<'_, '_>) -> Result<Selector> {
    Ok(Selector {
        gvk: gvk(f)?,
        name: f.string("name")?,
        namespace: f.string("namespace")?,
        label_selector: f.string("labelSelector")?,
        annotation_selector: f.string("annotationSelector")?,
    })
}

pub(crate) fn patch(f: &mut Fields<'_, '_>) -> Result<Patch> {
    let options = f.object("options", |o| {
        let flags = (o.bool("allowNameChange")?, o.bool("allowKindChange")?);
        o.ignore_rest();
        Ok(flags)
    })?;
    let (allow_name_change, allow_kind_change) = options.unwrap_or_default();
    Ok(Patch {
        path: f.string("path")?,
        patch: f.string("patch")?,
        target: f.object("target", selector)?,
        allow_name_change,
        allow_kind_change,
        place: Some(f.place()),
    })
}

pub(crate) fn image(f: &mut Fields<'_, '_>) -> Result<Image> {
    Ok(Image {
        name: f.string("name")?,
        new_name: f.string("newName")?,
        tag_suffix: f.string("tagSuffix")?,
        new_tag: f.string("newTag")?,
        digest: f.string("digest")?,
    })
}

pub(crate) fn replica(f: &mut Fields<'_, '_>) -> Result<Replica> {
    Ok(Replica {
        name: f.string("name")?,
        count: f.int("count")?,
    })
}

pub(crate) fn generator_options(f: &mut Fields<'_, '_>) -> Result<GeneratorOptions> {
    Ok(GeneratorOptions {
        labels: f.string_map("labels")?,
        annotations: f.string_map("annotations")?,
        disable_name_suffix_hash: f.bool("disableNameSuffixHash")?,
        immutable: f.bool("immutable")?,
    })
}

pub(crate) fn generator_args(f: &mut Fields<'_, '_>, secret: bool) -> Result<GeneratorArgs> {
    let mut args = GeneratorArgs {
        name: f.string("name")?,
        namespace: f.string("namespace")?,
        behavior: f.string("behavior")?,
        literals: f.strings("literals")?,
        files: f.strings("files")?,
        envs: f.strings("envs")?,
        options: f.object("options", generator_options)?,
        kind: if secret { f.string("type")? } else { String::new() },
        place: Some(f.place()),
    };
    let env = f.string("env")?;
    if !env.is_empty() {
        args.envs.push(env);
    }
    Ok(args)
}

fn field_options(f: &mut Fields<'_, '_>) -> Result<FieldOptions> {
    // `encoding` is accepted and, as in kustomize, has no effect.
    f.string("encoding")?;
    Ok(FieldOptions {
        delimiter: f.string("delimiter")?,
        index: f.int("index")?,
        create: f.bool("create")?,
    })
}

pub(crate) fn replacement(f: &mut Fields<'_, '_>) -> Result<Replacement> {
    let source = f.object("source", |s| {
        Ok(ReplacementSource {
            id: ResId {
                gvk: gvk(s)?,
                name: s.string("name")?,
                namespace: s.string("namespace")?,
                cluster_scoped: false,
            },
            field_path: s.string("fieldPath")?,
            options: s.object("options", field_options)?,
        })
    })?;
    let has_targets = f.get("targets").is_some();
    let targets = f.list("targets", |t| {
        Ok(ReplacementTarget {
            select: t.object("select", selector)?,
            reject: t.list("reject", selector)?,
            field_paths: t.strings("fieldPaths")?,
            options: t.object("options", field_options)?,
        })
    })?;
    Ok(Replacement {
        path: f.string("path")?,
        source,
        source_value: f.optional_string("sourceValue")?,
        targets: has_targets.then_some(targets),
        place: Some(f.place()),
    })
}

fn var(f: &mut Fields<'_, '_>) -> Result<Var> {
    let name = f.string("name")?;
    let object = f.object("objref", |o| {
        let api_version = o.string("apiVersion")?;
        let mut gvk = gvk(o)?;
        match api_version.split('/').collect::<Vec<_>>()[..] {
            [""] => {}
            [version] => version.clone_into(&mut gvk.version),
            [group, version] => {
                group.clone_into(&mut gvk.group);
                version.clone_into(&mut gvk.version);
            }
            _ => {}
        }
        Ok((gvk, o.string("name")?, o.string("namespace")?))
    })?;
    let (gvk, object_name, object_namespace) = object.unwrap_or_default();
    let field_path = f
        .object("fieldref", |r| r.string("fieldPath"))?
        .unwrap_or_default();
    let field_path = if field_path.is_empty() {
        "metadata.name".to_owned()
    } else {
        field_path
    };
    Ok(Var {
        name,
        gvk,
        object_name,
        object_namespace,
        field_path,
    })
}

fn sort_options(f: &mut Fields<'_, '_>) -> Result<SortOptions> {
    Ok(SortOptions {
        order: f.string("order")?,
        legacy: f.object("legacySortOptions", |l| {
            Ok((l.strings("orderFirst")?, l.strings("orderLast")?))
        })?,
        place: Some(f.place()),
    })
}

/// The names of the charts; they are refused, but a kustomization that only mentions `helmGlobals` is not.
fn helm_charts(f: &mut Fields<'_, '_>) -> Result<Vec<String>> {
    let mut names = Vec::new();
    f.object("helmGlobals", |g| {
        g.ignore_rest();
        Ok(())
    })?;
    for chart in f.list("helmCharts", |c| {
        c.ignore_rest();
        c.string("name")
    })? {
        names.push(chart);
    }
    for chart in f.list("helmChartInflationGenerator", |c| {
        c.ignore_rest();
        c.string("chartName")
    })? {
        names.push(chart);
    }
    Ok(names)
}

/// Reads a file of `configurations`.
pub(crate) fn read_configuration(text: &str, file: &str, limits: &Limits) -> Result<TransformerConfig> {
    let options = ReadOptions {
        file,
        line_offset: 0,
        dialect: Dialect::Kubectl,
        limits,
    };
    let ctx = Context {
        file,
        text,
        what: "TransformerConfig",
        strict: true,
    };
    let mut config = TransformerConfig::default();
    let Some(value) = parse_document(text, &options)? else {
        return Ok(config);
    };
    let Some(map) = ctx.map("", &value)? else {
        return Ok(config);
    };
    let mut f = Fields::new(&ctx, "", map);
    for (name, list) in config.lists_mut() {
        *list = f.list(name, field_spec)?;
    }
    config.name_reference = f.list("nameReference", |r| {
        Ok(NameReference {
            target: gvk(r)?,
            referrers: r.list("fieldSpecs", field_spec)?,
        })
    })?;
    f.finish()?;
    config.sort();
    Ok(config)
}
