//! The build: kustomizations below each other, each accumulating resources and transforming them; then what is done once
//! at the root.

mod transformers;

use std::cell::Cell;
use std::rc::Rc;

use serde_json::Value as Json;
use serin_manifests::yaml::{ReadOptions, parse_document};
use serin_manifests::{Dialect, Object};

use crate::accumulator::Accumulator;
use crate::config::TransformerConfig;
use crate::crds;
use crate::error::{Cause, Error, Result, nearest};
use crate::finish::{check_identity, drop_local, finish, sort};
use crate::generate::{Generator, combine};
use crate::kustomization::{self, FILE_NAMES, Kustomization, Located};
use crate::loader::{Loader, ReadSet, Resolved, display_dir};
use crate::name_reference;
use crate::options::Options;
use crate::origin::Origin;
use crate::plugin::{Workshop, helm_refused};
use crate::resmap::ResMap;
use crate::resource::{Behavior, Resource};
use crate::schema::{BUILTIN_VERSION, Schema, Schemas};
use crate::trace::{Trace, Tracer};
use crate::transform::{Env, add_hashes};
use crate::tree::{FileTree, is_in, is_remote};
use crate::vars;
use transformers::{place_of, plugin_origin};

/// What a build took.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Stats {
    /// Kustomization files built, counted as often as they were built.
    pub kustomizations: usize,
    /// Different files read.
    pub files: usize,
    /// Bytes read.
    pub bytes: usize,
    /// Objects in the result.
    pub objects: usize,
    /// Fields visited and values compared.
    pub steps: u64,
}

/// The result of a build.
#[derive(Clone, Debug)]
pub struct Build {
    /// The objects in order.
    pub objects: Vec<Object>,
    /// What influenced the result.
    pub read_set: ReadSet,
    /// What it took.
    pub stats: Stats,
    /// Deprecated fields in use, with the file that uses them.
    pub warnings: Vec<String>,
    /// Who changed what, if [`Options::trace`] was set.
    pub trace: Option<Trace>,
}

impl Build {
    /// All objects as YAML, as `kustomize build` prints them.
    pub fn to_yaml(&self) -> std::result::Result<String, serin_manifests::Error> {
        let mut out = String::new();
        for (i, object) in self.objects.iter().enumerate() {
            if i > 0 {
                out.push_str("---\n");
            }
            object.write_yaml(&mut out)?;
        }
        Ok(out)
    }
}

/// Builds the kustomization in a directory of a tree.
///
/// `root` is relative to the tree; empty is its top.
pub fn build(tree: &dyn FileTree, root: &str, options: &Options<'_>) -> Result<Build> {
    let loader = Loader::new(tree, options);
    let dir = match loader.resolve("", root)? {
        Resolved::Dir(dir) => dir,
        Resolved::File(path) => {
            return Err(Cause::WrongEntry {
                path,
                expected: "a directory",
                found: "a file",
            }
            .into());
        }
        Resolved::Missing => {
            return Err(Cause::Missing {
                path: root.to_owned(),
            }
            .into());
        }
    };
    let mut builder = Builder {
        loader: &loader,
        options,
        schemas: Schemas::default(),
        steps: Cell::new(0),
        kustomizations: 0,
        serial: 0,
        visited: Vec::new(),
        warnings: Vec::new(),
        with_origin: false,
        tracer: options.trace.then(Tracer::default),
        defaults: Rc::new(TransformerConfig::defaults().clone()),
    };
    let resources = builder.run(&dir)?;
    let mut objects = Vec::with_capacity(resources.len());
    let mut tracer = builder.tracer.take();
    for resource in resources {
        if let Some(tracer) = &mut tracer {
            tracer.finish(&resource);
        }
        objects.push(Object::new(resource.root).with_source(resource.source));
    }
    let (kustomizations, steps, warnings) = (builder.kustomizations, builder.steps.get(), builder.warnings);
    let (read_set, bytes) = loader.into_read_set();
    let stats = Stats {
        kustomizations,
        files: read_set.files.len(),
        bytes,
        objects: objects.len(),
        steps,
    };
    Ok(Build {
        objects,
        read_set,
        stats,
        warnings,
        trace: tracer.map(Tracer::into_trace),
    })
}

/// A kustomization that is being built.
struct Target {
    dir: String,
    /// The file in the tree.
    file: String,
    /// Its name alone.
    file_name: &'static str,
    k: Kustomization,
    origin: Option<Origin>,
}

struct Builder<'a> {
    loader: &'a Loader<'a>,
    options: &'a Options<'a>,
    schemas: Schemas,
    steps: Cell<u64>,
    kustomizations: usize,
    serial: u32,
    /// The directories that are being built, the outermost first.
    visited: Vec<String>,
    warnings: Vec<String>,
    with_origin: bool,
    tracer: Option<Tracer>,
    defaults: Rc<TransformerConfig>,
}

impl Builder<'_> {
    fn env(&self) -> Env<'_> {
        Env {
            schemas: &self.schemas,
            budget: &self.options.budget,
            steps: &self.steps,
        }
    }

    fn run(&mut self, dir: &str) -> Result<Vec<Resource>> {
        let mut target = self.load(dir)?;
        let result = self.run_root(&mut target);
        result.map_err(|e| e.inside(&target.file))
    }

    fn run_root(&mut self, target: &mut Target) -> Result<Vec<Resource>> {
        self.set_schema(target, true)?;
        let wants = |option: &str| target.k.build_metadata.iter().any(|o| o == option);
        let origins = wants("originAnnotations") || self.options.origin;
        let transformations = wants("transformerAnnotations");
        self.with_origin = !target.k.build_metadata.is_empty() || self.options.origin;
        target.origin = self.with_origin.then(Origin::default);
        let managed_by = wants("managedByLabel") || self.options.managed_by;

        let dir = target.dir.clone();
        self.visited.push(dir);
        let mut acc = self.accumulate(target, Accumulator::default())?;
        self.visited.pop();

        let config = acc.config.clone();
        let config = config.as_deref().unwrap_or_else(|| TransformerConfig::defaults());
        self.traced("HashTransformer", &target.file, &mut acc.map, |map, env| {
            add_hashes(map, env)
        })?;
        self.traced(
            "NameReferenceTransformer",
            &target.file,
            &mut acc.map,
            |map, env| name_reference::fix(map, &config.name_reference, env),
        )?;
        let vars = std::mem::take(&mut acc.vars);
        self.traced("RefVarTransformer", &target.file, &mut acc.map, |map, env| {
            vars::resolve(map, &vars, &config.var_reference, env)
        })?;
        drop_local(&mut acc.map);
        // A JSON patch may have given one resource the name of another.
        acc.map.check_unique(&self.schemas)?;
        sort(
            &mut acc.map,
            target.k.sort_options.as_ref(),
            self.options.reorder,
            &self.schemas,
        )?;
        let mut resources = acc.map.into_resources();
        for r in &mut resources {
            check_identity(r)?;
            finish(r, managed_by, origins, transformations);
        }
        Ok(resources)
    }

    /// Runs a step, noting what it changes if a trace is wanted.
    fn traced(
        &mut self,
        kind: &'static str,
        file: &str,
        map: &mut ResMap,
        step: impl FnOnce(&mut ResMap, &Env<'_>) -> Result<()>,
    ) -> Result<()> {
        match self.tracer.take() {
            None => step(map, &self.env()),
            Some(mut tracer) => {
                tracer.before(map);
                let result = step(map, &self.env());
                tracer.after(kind, file, map);
                self.tracer = Some(tracer);
                result
            }
        }
    }

    fn load(&mut self, dir: &str) -> Result<Target> {
        let mut found: Vec<(&'static str, String, std::sync::Arc<[u8]>)> = Vec::new();
        for name in FILE_NAMES {
            match self.loader.load(dir, name) {
                Ok((content, file)) => found.push((name, file, content)),
                Err(e) if matches!(*e.cause, Cause::Budget { .. } | Cause::Tree { .. }) => return Err(e),
                Err(_) => {}
            }
        }
        let (file_name, file, content) = match found.len() {
            0 => return Err(Cause::NoKustomization(display_dir(dir)).into()),
            1 => found.remove(0),
            _ => {
                let files: Vec<&str> = found.iter().map(|f| f.0).collect();
                return Err(Error::new(Cause::MultipleKustomizations {
                    dir: display_dir(dir),
                    files: files.join(", "),
                })
                .help("keep one of them"));
            }
        };
        self.kustomizations += 1;
        let budget = &self.options.budget;
        if self.kustomizations > budget.max_kustomizations {
            let what = format!("{} kustomizations built", self.kustomizations);
            return Err(Cause::Budget {
                budget: "kustomizations",
                what,
                limit: budget.max_kustomizations,
            }
            .into());
        }
        let read = || -> Result<Kustomization> {
            let text = crate::read::utf8(&content, &file)?;
            kustomization::read(text, &file, &budget.document)
        };
        let k = read().map_err(|e| e.inside(&file))?;
        self.warnings
            .extend(k.warnings.iter().map(|w| format!("{file}: {w}")));
        Ok(Target {
            dir: dir.to_owned(),
            file,
            file_name,
            k,
            origin: None,
        })
    }

    /// Takes note of `openapi`. The root decides; below it the first one that says something.
    fn set_schema(&mut self, target: &Target, is_root: bool) -> Result<()> {
        let field = |name: &str| {
            let pairs = target.k.openapi.as_ref()?;
            pairs.iter().find(|(k, _)| k == name).map(|(_, v)| v.clone())
        };
        let path = field("path");
        let document = match &path {
            Some(path) => Some(self.loader.load(&target.dir, path)?),
            None => None,
        };
        if self.schemas.is_set() && !is_root {
            return Ok(());
        }
        let version = field("version");
        if let Some((content, file)) = document {
            if version.is_some() {
                let message = "builtin version and custom schema provided, cannot use both";
                return Err(Cause::OpenApi(message.into()).into());
            }
            let text = crate::read::utf8(&content, &file)?;
            let options = ReadOptions {
                file: &file,
                line_offset: 0,
                dialect: Dialect::Kubectl,
                limits: &self.options.budget.document,
            };
            let json = parse_document(text, &options)?.map_or(Ok(Json::Null), |v| v.to_json());
            let json = json.map_err(|e| Cause::OpenApi(format!("invalid schema file '{file}': {e}")))?;
            self.schemas.set_custom(Schema::from_openapi(&json));
            return Ok(());
        }
        match version.as_deref() {
            None | Some("") => Ok(()),
            Some(BUILTIN_VERSION) => {
                self.schemas.set_builtin();
                Ok(())
            }
            Some(other) => Err(Error::new(Cause::OpenApi(
                "the specified OpenAPI version is not built in".into(),
            ))
            .help(format!(
                "'{other}' is not known; '{BUILTIN_VERSION}' is, and needs no mention"
            ))),
        }
    }

    /// Everything that one kustomization does. For a component `acc` holds what its parent has so far.
    fn accumulate(&mut self, target: &mut Target, mut acc: Accumulator) -> Result<Accumulator> {
        let resources = std::mem::take(&mut target.k.resources);
        for path in &resources {
            self.accumulate_path(target, &mut acc, path)?;
        }
        self.configure(target, &mut acc)?;
        self.run_generators(target, &mut acc)?;
        let components = std::mem::take(&mut target.k.components);
        for path in &components {
            let dir = self
                .loader
                .base(&target.dir, &path.text)
                .map_err(|e| e.at_option(path.place.clone()))?;
            let parent = std::mem::take(&mut acc);
            acc = self
                .directory(target, &dir, &path.text, Some(parent))
                .map_err(|e| e.at_option(path.place.clone()))?;
        }
        self.run_transformers(target, &mut acc)?;
        self.run_validators(target, &mut acc)?;
        let new_vars = std::mem::take(&mut target.k.vars);
        vars::merge(&mut acc.vars, &new_vars, &mut acc.map, &self.env())?;
        let limit = self.options.budget.max_resources;
        if acc.map.len() > limit {
            let what = format!("{} resources", acc.map.len());
            return Err(Cause::Budget {
                budget: "resources",
                what,
                limit,
            }
            .into());
        }
        Ok(acc)
    }

    fn configure(&mut self, target: &Target, acc: &mut Accumulator) -> Result<()> {
        let limits = &self.options.budget.document;
        let mut custom: Option<TransformerConfig> = None;
        for path in &target.k.configurations {
            let at = |e: Error| e.at_option(path.place.clone());
            let (content, file) = self.loader.load(&target.dir, &path.text).map_err(at)?;
            let text = crate::read::utf8(&content, &file)?;
            let config = kustomization::read_configuration(text, &file, limits)?;
            custom
                .get_or_insert_with(TransformerConfig::default)
                .merge(config)
                .map_err(|m| at(Cause::Transformer(m).into()))?;
        }
        let own = match custom {
            None => self.defaults.clone(),
            Some(custom) => {
                let mut own = (*self.defaults).clone();
                own.merge(custom).map_err(Cause::Transformer)?;
                Rc::new(own)
            }
        };
        acc.merge_config(own, &self.defaults)?;
        for path in &target.k.crds {
            let at = |e: Error| e.at_option(path.place.clone());
            let (content, file) = self.loader.load(&target.dir, &path.text).map_err(at)?;
            let text = crate::read::utf8(&content, &file)?;
            let options = ReadOptions {
                file: &file,
                line_offset: 0,
                dialect: Dialect::Kubectl,
                limits,
            };
            let json = parse_document(text, &options)?.map_or(Ok(Json::Null), |v| v.to_json());
            let json = json.map_err(|e| {
                Cause::OpenApi(format!("unable to parse open API definition from '{file}': {e}"))
            })?;
            let config = crds::config_of(&json).map_err(|m| at(Cause::OpenApi(m).into()))?;
            acc.merge_config(Rc::new(config), &self.defaults)?;
        }
        Ok(())
    }

    /// A file of resources, or a base.
    fn accumulate_path(&mut self, target: &Target, acc: &mut Accumulator, path: &Located) -> Result<()> {
        // What went wrong inside of a base is not the fault of the line that lists it: the chain tells the way.
        let at = |e: Error| {
            let inside = e.chain.len() > 1 && !matches!(*e.cause, Cause::InvalidKustomization(_));
            if inside {
                e
            } else {
                e.at_option(path.place.clone())
            }
        };
        let text = &path.text;
        if text.starts_with('/') {
            return Err(at(Cause::AbsolutePath { path: text.clone() }.into()));
        }
        let http = text.starts_with("http://") || text.starts_with("https://");
        let resolved = if http {
            Resolved::Missing
        } else {
            self.loader.resolve(&target.dir, text).map_err(at)?
        };
        match resolved {
            Resolved::File(_) => self.accumulate_file(target, acc, path),
            Resolved::Dir(dir) => {
                let sub = self.directory(target, &dir, text, None).map_err(at)?;
                acc.merge(sub, &self.schemas, &self.defaults).map_err(at)
            }
            Resolved::Missing if http && self.loader.load(&target.dir, text).is_ok() => {
                self.accumulate_file(target, acc, path)
            }
            Resolved::Missing if is_remote(text) => {
                let dir = self.loader.base(&target.dir, text).map_err(at)?;
                let sub = self.directory(target, &dir, text, None).map_err(at)?;
                acc.merge(sub, &self.schemas, &self.defaults).map_err(at)
            }
            Resolved::Missing => {
                let full = crate::tree::join(&target.dir, text).unwrap_or_else(|| text.clone());
                Err(at(Cause::Missing { path: full }.into()))
            }
        }
    }

    fn accumulate_file(&mut self, target: &Target, acc: &mut Accumulator, path: &Located) -> Result<()> {
        let at = |e: Error| e.at_option(path.place.clone());
        let (content, file) = self.loader.load(&target.dir, &path.text).map_err(at)?;
        let resources = crate::read::resources(&content, &file, &self.options.budget.document)?;
        for mut r in resources {
            r.origin = target.origin.as_ref().map(|o| o.append(&path.text));
            self.number(&mut r);
            acc.map.append(r, &self.schemas).map_err(at)?;
        }
        Ok(())
    }

    fn number(&mut self, r: &mut Resource) {
        self.serial += 1;
        r.serial = self.serial;
    }

    /// A kustomization below another. `parent` is given for a component, which works on what its parent has.
    fn directory(
        &mut self,
        from: &Target,
        dir: &str,
        path: &str,
        parent: Option<Accumulator>,
    ) -> Result<Accumulator> {
        for visited in self.visited.iter().rev() {
            if is_in(visited, dir) {
                let mut cycle: Vec<String> = self.visited.iter().map(|v| display_dir(v)).collect();
                cycle.push(display_dir(dir));
                return Err(Error::new(Cause::Cycle {
                    root: display_dir(dir),
                    visited: display_dir(visited),
                })
                .help(format!("the cycle is {}", cycle.join(" -> "))));
            }
        }
        let limit = self.options.budget.max_kustomization_depth;
        if self.visited.len() >= limit {
            let what = format!(
                "'{}' is {} kustomizations deep",
                display_dir(dir),
                self.visited.len() + 1
            );
            return Err(Cause::Budget {
                budget: "depth",
                what,
                limit,
            }
            .into());
        }
        let mut target = self.load(dir)?;
        target.origin = from.origin.as_ref().map(|o| o.append(path));
        let file = target.file.clone();
        let result = self.directory_inner(&mut target, parent);
        result
            .map_err(|e| e.inside(&file))
            .map_err(|e| e.inside(&from.file))
    }

    fn directory_inner(&mut self, target: &mut Target, parent: Option<Accumulator>) -> Result<Accumulator> {
        self.set_schema(target, false)?;
        let dir = display_dir(&target.dir);
        match (parent.is_some(), target.k.is_component) {
            (true, false) => {
                let message = format!("expected kind 'Component' for path '{dir}' but got 'Kustomization'");
                return Err(Error::new(Cause::InvalidKustomization(message)).help("list it in `resources`"));
            }
            (false, true) => {
                let message = format!("expected kind != 'Component' for path '{dir}'");
                return Err(Error::new(Cause::InvalidKustomization(message)).help("list it in `components`"));
            }
            _ => {}
        }
        self.visited.push(target.dir.clone());
        let result = self.accumulate(target, parent.unwrap_or_default());
        self.visited.pop();
        result
    }

    fn run_generators(&mut self, target: &Target, acc: &mut Accumulator) -> Result<()> {
        let k = &target.k;
        for (secret, list) in [(false, &k.config_map_generator), (true, &k.secret_generator)] {
            let generator = Generator {
                loader: self.loader,
                root: &target.dir,
                secret,
            };
            let kind = if secret {
                "SecretGenerator"
            } else {
                "ConfigMapGenerator"
            };
            for args in list {
                let mut r = generator.generate(args, k.generator_options.as_ref())?;
                r.origin = target.origin.as_ref().map(|o| o.builtin(target.file_name, kind));
                r.source = args.place.as_ref().map(|p| serin_manifests::Source {
                    file: p.file.as_str().into(),
                    line: p.line,
                });
                self.absorb(acc, r).map_err(|e| e.at_option(args.place.clone()))?;
            }
        }
        if let Some(chart) = k.helm_charts.first() {
            return Err(helm_refused(chart));
        }
        if k.generators.is_empty() {
            return Ok(());
        }
        for config in self.plugin_configs(target, &k.generators)? {
            let at = |e: Error| e.at_option(place_of(&config));
            let made = self.with_workshop(target, |w| w.generate(&config)).map_err(at)?;
            for mut r in made {
                r.origin = plugin_origin(&config);
                self.absorb(acc, r).map_err(at)?;
            }
        }
        Ok(())
    }

    fn with_workshop<T>(
        &self,
        target: &Target,
        f: impl FnOnce(&Workshop<'_, '_, '_>) -> Result<T>,
    ) -> Result<T> {
        let env = self.env();
        f(&Workshop {
            loader: self.loader,
            root: &target.dir,
            env: &env,
        })
    }

    /// A generated resource is added, or takes the place of one, or is merged with one.
    fn absorb(&mut self, acc: &mut Accumulator, mut new: Resource) -> Result<()> {
        self.number(&mut new);
        let id = new.id(&self.schemas);
        let behavior = new.behavior.unwrap_or_default();
        match (&acc.map.by_any_id(&id, &self.schemas)[..], behavior) {
            ([], Behavior::Merge | Behavior::Replace) => {
                let verb = if behavior == Behavior::Merge {
                    "merge"
                } else {
                    "replace"
                };
                let error = Error::new(Cause::Generator(format!(
                    "id {id} does not exist; cannot merge or replace"
                )));
                let names = acc
                    .map
                    .resources()
                    .iter()
                    .filter(|r| r.kind() == new.kind())
                    .map(Resource::name);
                Err(match nearest(new.name(), names) {
                    Some(name) => error.help(format!("did you mean to {verb} '{name}'?")),
                    None => error.help(format!(
                        "nothing with this name comes from `resources`; leave out `behavior: {verb}`"
                    )),
                })
            }
            ([], _) => acc.map.append(new, &self.schemas),
            ([index], Behavior::Merge | Behavior::Replace) => {
                let index = *index;
                let combined = combine(new, &acc.map.resources()[index]);
                acc.map.replace(index, combined);
                Ok(())
            }
            ([_], _) => Err(Error::new(Cause::Generator(format!(
                "id {id} exists; behavior must be merge or replace"
            )))
            .help("set `behavior: merge` or `behavior: replace`, or choose another name")),
            _ => Err(
                Cause::Generator(format!("found multiple objects that could accept merge of {id}")).into(),
            ),
        }
    }

    /// The resources that configure plugins: inline, or in files and directories.
    fn plugin_configs(&mut self, target: &Target, entries: &[Located]) -> Result<Vec<Resource>> {
        let mut acc = Accumulator::default();
        let mut paths = Vec::new();
        for entry in entries {
            match crate::read::resources(entry.text.as_bytes(), &target.file, &self.options.budget.document) {
                Ok(inline) => {
                    for mut r in inline {
                        r.origin = target.origin.as_ref().map(|o| o.append(target.file_name));
                        r.source = None;
                        acc.map.append(r, &self.schemas)?;
                    }
                }
                Err(_) => paths.push(entry),
            }
        }
        for path in paths {
            self.accumulate_path(target, &mut acc, path)?;
        }
        Ok(acc.map.into_resources())
    }
}
