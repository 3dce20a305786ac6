//! The fuzz harness over mutated corpora, a bounded number of runs each, so that the suite keeps what fuzzing has shown.
//!
//! `SERIN_FUZZ_CASES` asks for more runs than the suite makes. A failing run prints its input.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};

use super::harness;
use super::shared;

/// Runs of each target in the suite.
const CASES: u64 = 600;

/// A small generator, so that a run can be repeated.
struct Random(u64);

impl Random {
    fn below(&mut self, bound: usize) -> usize {
        self.0 = self
            .0
            .wrapping_mul(6364136223846793005)
            .wrapping_add(1442695040888963407);
        (self.0 >> 33) as usize % bound.max(1)
    }
}

/// Words that mean something to a reader of YAML or to kustomize.
const WORDS: [&str; 24] = [
    "$patch: delete\n",
    "$patch: replace\n",
    "- ",
    "&a ",
    "*a",
    "<<: *a\n",
    "---\n",
    "null",
    "{",
    "]",
    ": ",
    "|\n",
    ">-\n",
    "!!binary ",
    "\t",
    "\u{feff}",
    "'",
    "\"",
    "'*'",
    "'.*'",
    "999999999999999999999",
    "../..",
    "${a:=${b}}",
    "[name=a]",
];

fn mutate(seed: &str, other: &str, random: &mut Random) -> Vec<u8> {
    let mut lines: Vec<String> = seed.split_inclusive('\n').map(str::to_owned).collect();
    let others: Vec<&str> = other.split_inclusive('\n').collect();
    for _ in 0..=random.below(4) {
        if lines.is_empty() {
            break;
        }
        let at = random.below(lines.len());
        match random.below(9) {
            0 => drop(lines.remove(at)),
            1 => lines.insert(at, lines[random.below(lines.len())].clone()),
            2 => {
                let taken = others.get(random.below(others.len())).copied().unwrap_or("x\n");
                lines.insert(at, taken.to_owned());
            }
            3 => {
                let to = random.below(lines.len());
                lines.swap(at, to);
            }
            4 => lines[at] = format!("{}{}", " ".repeat(random.below(8)), lines[at].trim_start()),
            5 | 6 => {
                let line = &mut lines[at];
                let place = (0..=line.len())
                    .rev()
                    .find(|i| line.is_char_boundary(*i) && *i <= random.below(64));
                line.insert_str(place.unwrap_or(0), WORDS[random.below(WORDS.len())]);
            }
            7 => {
                let line = &mut lines[at];
                let cut = random.below(line.len());
                if line.is_char_boundary(cut) {
                    line.truncate(cut);
                }
            }
            _ => {
                let from = others.get(random.below(others.len())).unwrap_or(&"x").trim();
                if let Some((key, _)) = lines[at].split_once(':') {
                    lines[at] = format!("{key}: {}\n", from.rsplit(": ").next().unwrap_or("x"));
                }
            }
        }
    }
    let mut bytes = lines.concat().into_bytes();
    if random.below(8) == 0 && !bytes.is_empty() {
        let at = random.below(bytes.len());
        bytes[at] = random.below(256) as u8;
    }
    bytes
}

fn corpus(name: &str) -> Vec<String> {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("fuzz/corpus")
        .join(name);
    let mut paths: Vec<PathBuf> = std::fs::read_dir(dir)
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .collect();
    paths.sort();
    paths
        .iter()
        .map(|path| std::fs::read_to_string(path).unwrap())
        .collect()
}

/// The tiny directories of the shared data as texts of the harness.
fn shared_trees() -> Vec<String> {
    let Some(root) = shared("kustomize") else {
        return Vec::new();
    };
    let mut trees = Vec::new();
    for set in ["tiny", "tiny-fail"] {
        let Ok(entries) = std::fs::read_dir(root.join(set)) else {
            continue;
        };
        let mut dirs: Vec<PathBuf> = entries.map(|entry| entry.unwrap().path()).collect();
        dirs.sort();
        for dir in dirs {
            let mut text = String::new();
            collect(&dir, &dir, &mut text);
            trees.push(text);
        }
    }
    trees
}

fn collect(root: &Path, dir: &Path, text: &mut String) {
    let Ok(entries) = std::fs::read_dir(dir) else {
        return;
    };
    let mut paths: Vec<PathBuf> = entries.map(|entry| entry.unwrap().path()).collect();
    paths.sort();
    for path in paths {
        if path.is_dir() {
            collect(root, &path, text);
        } else if let Ok(content) = std::fs::read_to_string(&path) {
            let name = path.strip_prefix(root).unwrap().to_str().unwrap();
            text.push_str(&format!("=== {name}\n{content}"));
            if !content.ends_with('\n') {
                text.push('\n');
            }
        }
    }
}

fn run(seeds: &[String], start: u64, target: fn(&[u8])) {
    let cases = std::env::var("SERIN_FUZZ_CASES")
        .ok()
        .and_then(|n| n.parse().ok())
        .unwrap_or(CASES);
    for seed in seeds {
        target(seed.as_bytes());
    }
    for case in 0..cases {
        let mut random = Random((start + case).wrapping_mul(0x9e37_79b9_7f4a_7c15));
        let (seed, other) = (random.below(seeds.len()), random.below(seeds.len()));
        let input = mutate(&seeds[seed], &seeds[other], &mut random);
        let outcome = catch_unwind(AssertUnwindSafe(|| target(&input)));
        assert!(
            outcome.is_ok(),
            "case {case} fails for this input:\n{}",
            String::from_utf8_lossy(&input)
        );
    }
}

#[test]
fn mutated_trees_are_built_or_refused_without_a_panic_and_always_alike() {
    let mut seeds = corpus("kustomization");
    seeds.extend(shared_trees());
    run(&seeds, 1, harness::build_tree);
}

#[test]
fn mutated_documents_are_read_or_refused_and_read_back_as_they_were() {
    let mut seeds = corpus("yaml");
    seeds.extend(shared_trees());
    run(&seeds, 2, harness::read_document);
}

#[test]
fn mutated_texts_are_substituted_or_refused() {
    run(&corpus("substitute"), 3, harness::substitute);
}

/// What lies outside of the read set may change at will.
#[test]
fn a_change_outside_of_the_read_set_never_changes_the_result() {
    use serin_kustomize::{MemoryTree, Options, build};
    let mut seeds = corpus("kustomization");
    seeds.extend(shared_trees());
    for (number, seed) in seeds.iter().enumerate() {
        let mut random = Random(number as u64 + 17);
        let files = harness::files(seed);
        let mut tree = MemoryTree::new();
        let plain: Vec<&(String, String)> = files.iter().filter(|(_, c)| !c.starts_with("-> ")).collect();
        for (path, content) in &files {
            match content.strip_prefix("-> ") {
                Some(target) => tree.link(path, target.trim()),
                None => tree.add(path, content),
            };
        }
        let Ok(built) = build(&tree, "", &Options::default()) else {
            continue;
        };
        let read = &built.read_set;
        let mut changed = tree.clone();
        for (path, _) in &plain {
            if !read.files.contains(path) {
                changed.add(path.as_str(), "changed: [");
            }
        }
        for _ in 0..8 {
            let beside = plain[random.below(plain.len())]
                .0
                .rsplit_once('/')
                .map_or("", |(dir, _)| dir);
            let name = ["kustomization.yml", "Kustomization", "new.yaml", "base", "README"][random.below(5)];
            let path = if beside.is_empty() {
                name.to_owned()
            } else {
                format!("{beside}/{name}")
            };
            let known = read.files.contains(&path)
                || read.missing.contains(&path)
                || read.directories.contains(&path)
                || read.links.contains(&path)
                || files
                    .iter()
                    .any(|(p, _)| *p == path || p.starts_with(&format!("{path}/")));
            if !known {
                changed.add(path, "resources: [nowhere]\n");
            }
        }
        let after = build(&changed, "", &Options::default()).map(|b| b.to_yaml());
        assert_eq!(after, Ok(built.to_yaml()), "{seed}");
    }
}
