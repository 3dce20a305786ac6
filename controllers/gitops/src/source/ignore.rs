//! Which files of a repository belong to the artifact: `.gitignore` syntax with the rules of Flux.
//!
//! The last pattern that matches a file decides, looked at from the file and not from its directories: so
//! `!` can bring back one file out of an excluded directory, which git itself does not do.

use serin_kustomize::substitute::glob;

/// Never part of an artifact.
const VERSION_CONTROL: &str = ".git/\n.gitignore\n.gitmodules\n.gitattributes\n";
/// Left out unless `spec.ignore` replaces this list: media and archives, pipelines, tool configuration.
const DEFAULTS: &str = "*.jpg\n*.jpeg\n*.gif\n*.png\n*.wmv\n*.flv\n*.tar.gz\n*.zip\n\
.github/\n.circleci/\n.travis.yml\n.gitlab-ci.yml\nappveyor.yml\n.drone.yml\ncloudbuild.yaml\ncodeship-services.yml\ncodeship-steps.yml\n\
**/.goreleaser.yml\n**/.sops.yaml\n**/.flux.yaml\n";

/// The file in which a repository lists what does not belong to the artifact.
pub(crate) const SOURCE_IGNORE: &str = ".sourceignore";

/// An ordered list of patterns; later ones win.
#[derive(Debug, Clone, Default)]
pub(crate) struct Rules(Vec<Pattern>);

#[derive(Debug, Clone)]
struct Pattern {
    /// Directory that the pattern lives in, as path elements.
    domain: Vec<String>,
    include: bool,
    directories_only: bool,
    /// One element: matches any element of a path. More: anchored at the domain.
    elements: Vec<String>,
    anchored: bool,
}

impl Rules {
    /// What holds before any `.sourceignore`: version control, and the defaults unless `spec.ignore` is set.
    pub(crate) fn base(replaced: bool) -> Self {
        let mut rules = Self::parse(VERSION_CONTROL, "");
        if !replaced {
            rules.0.extend(Self::parse(DEFAULTS, "").0);
        }
        rules
    }

    /// Reads the lines of a pattern file that lies in `directory` (empty for the root).
    pub(crate) fn parse(text: &str, directory: &str) -> Self {
        let domain: Vec<String> = elements(directory).map(str::to_string).collect();
        Self(
            text.lines()
                .filter_map(|line| Pattern::parse(line, &domain))
                .collect(),
        )
    }

    /// What the last pattern that matches the file at `path` says: left out (`true`), kept (`false`), or nothing.
    pub(crate) fn excludes(&self, path: &str) -> Option<bool> {
        let path: Vec<&str> = elements(path).collect();
        self.0.iter().rev().find(|p| p.matches(&path)).map(|p| !p.include)
    }
}

fn elements(path: &str) -> impl Iterator<Item = &str> {
    path.split('/').filter(|e| !e.is_empty() && *e != ".")
}

impl Pattern {
    fn parse(line: &str, domain: &[String]) -> Option<Self> {
        let mut line = line.trim_end_matches('\r');
        if !line.ends_with("\\ ") {
            line = line.trim_end_matches(' ');
        }
        if line.is_empty() || line.starts_with('#') {
            return None;
        }
        let include = line.starts_with('!');
        if include {
            line = &line[1..];
        }
        let directories_only = line.ends_with('/');
        let line = line.strip_suffix('/').unwrap_or(line);
        let anchored = line.contains('/');
        let parts: Vec<String> = line
            .split('/')
            .filter(|e| !e.is_empty())
            .map(str::to_string)
            .collect();
        if parts.is_empty() {
            return None;
        }
        Some(Self {
            domain: domain.to_vec(),
            include,
            directories_only,
            elements: parts,
            anchored,
        })
    }

    fn matches(&self, path: &[&str]) -> bool {
        let Some(path) = strip(path, &self.domain) else {
            return false;
        };
        if path.is_empty() {
            return false;
        }
        if self.anchored {
            return self.anchored_match(path);
        }
        let pattern = &self.elements[0];
        match path.iter().position(|e| glob::matches(pattern, e) == Ok(true)) {
            Some(at) => !self.directories_only || at + 1 < path.len(),
            None => false,
        }
    }

    /// Element by element; `**` spans any number of them. What lies below a match is matched too.
    fn anchored_match(&self, path: &[&str]) -> bool {
        fn walk(patterns: &[String], path: &[&str], directories_only: bool) -> bool {
            match patterns.split_first() {
                None => !directories_only || !path.is_empty(),
                Some((first, rest)) if first == "**" => {
                    if rest.is_empty() {
                        return !path.is_empty();
                    }
                    (0..path.len()).any(|skip| walk(rest, &path[skip..], directories_only))
                }
                Some((first, rest)) => match path.split_first() {
                    Some((element, below)) if glob::matches(first, element) == Ok(true) => {
                        walk(rest, below, directories_only)
                    }
                    _ => false,
                },
            }
        }
        walk(&self.elements, path, self.directories_only)
    }
}

fn strip<'a, 'b>(path: &'a [&'b str], domain: &[String]) -> Option<&'a [&'b str]> {
    if path.len() <= domain.len() || !path.iter().zip(domain).all(|(a, b)| a == b) {
        return None;
    }
    Some(&path[domain.len()..])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_pattern_that_matches_a_file_decides() {
        let cases: &[(&str, &str, bool)] = &[
            ("/*\n!/deploy\n/deploy/**/*.md", "readme.txt", true),
            ("/*\n!/deploy\n/deploy/**/*.md", "deploy/app.yaml", false),
            ("/*\n!/deploy\n/deploy/**/*.md", "deploy/a/b/notes.md", true),
            ("*.txt", "a/b/c.txt", true),
            ("build/", "build", false),
            ("build/", "build/x.yaml", true),
            ("build/", "a/build/x.yaml", true),
            ("/build", "a/build/x.yaml", false),
            ("a/**/z.yaml", "a/z.yaml", true),
            ("a/**/z.yaml", "a/b/c/z.yaml", true),
            ("secret\n!secret/keep.yaml", "secret/keep.yaml", false),
            ("# note\n\n", "note", false),
        ];
        for (rules, path, excluded) in cases {
            assert_eq!(
                Rules::parse(rules, "").excludes(path).unwrap_or(false),
                *excluded,
                "{rules:?} on {path}"
            );
        }
    }

    #[test]
    fn a_pattern_file_speaks_only_of_its_own_directory() {
        let rules = Rules::parse("*.yaml", "apps/web");
        assert_eq!(rules.excludes("apps/web/deployment.yaml"), Some(true));
        assert_eq!(rules.excludes("apps/api/deployment.yaml"), None);
    }

    #[test]
    fn defaults_give_way_to_spec_ignore_but_version_control_never_does() {
        assert_eq!(Rules::base(false).excludes("docs/logo.png"), Some(true));
        assert_eq!(Rules::base(true).excludes("docs/logo.png"), None);
        assert_eq!(Rules::base(true).excludes("a/.gitignore"), Some(true));
        assert_eq!(
            Rules::base(false).excludes(".github/workflows/ci.yaml"),
            Some(true)
        );
        assert_eq!(Rules::base(false).excludes("a/b/.sops.yaml"), Some(true));
    }
}
