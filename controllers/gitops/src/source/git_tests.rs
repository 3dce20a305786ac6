use super::*;
use serin_crds::flux::source::GitRepositoryRef;

/// Commits `files` onto `branch` of the repository and returns the commit id.
fn commit(repo: &Repository, branch: &str, files: &[(&str, &str)]) -> String {
    let mut index = git2::Index::new().unwrap();
    for (path, content) in files {
        let id = repo.blob(content.as_bytes()).unwrap();
        let time = git2::IndexTime::new(0, 0);
        index
            .add(&git2::IndexEntry {
                ctime: time,
                mtime: time,
                dev: 0,
                ino: 0,
                mode: 0o100_644,
                uid: 0,
                gid: 0,
                file_size: 0,
                id,
                flags: 0,
                flags_extended: 0,
                path: path.as_bytes().to_vec(),
            })
            .unwrap();
    }
    let tree = repo.find_tree(index.write_tree_to(repo).unwrap()).unwrap();
    let name = format!("refs/heads/{branch}");
    let parent = repo
        .find_reference(&name)
        .ok()
        .map(|r| r.peel_to_commit().unwrap());
    let parents: Vec<&git2::Commit<'_>> = parent.iter().collect();
    let who = git2::Signature::now("Ada", "ada@example.com").unwrap();
    repo.commit(
        Some(&name),
        &who,
        &who,
        "a change\n\nwith a body",
        &tree,
        &parents,
    )
    .unwrap()
    .to_string()
}

fn request(source: &Path, cache: &Path, reference: &GitRepositoryRef) -> Request {
    Request {
        place: Place::Local(source.to_path_buf()),
        auth: Auth::default(),
        wanted: Wanted::from_spec(Some(reference)).unwrap(),
        cache: cache.join("cache"),
    }
}

fn branch(name: &str) -> GitRepositoryRef {
    GitRepositoryRef {
        branch: Some(name.into()),
        ..Default::default()
    }
}

#[test]
fn a_local_repository_is_copied_incrementally_and_an_unchanged_tip_transfers_nothing() {
    let (source, cache) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let repo = Repository::init_bare(source.path()).unwrap();
    let first = commit(&repo, "main", &[("a/x.yaml", "1"), ("b/y.yaml", "2")]);
    let request = request(source.path(), cache.path(), &branch("main"));
    let got = sync(&request, &Stop::default()).unwrap();
    assert_eq!(got.revision, format!("main@sha1:{first}"));
    assert_eq!(
        (got.author.as_str(), got.subject.as_str(), got.transferred),
        ("Ada", "a change", true)
    );
    assert!(!sync(&request, &Stop::default()).unwrap().transferred);

    let second = commit(&repo, "main", &[("a/x.yaml", "changed"), ("b/y.yaml", "2")]);
    let got = sync(&request, &Stop::default()).unwrap();
    assert_eq!(got.commit, second);
    let opened = Repository::open_bare(&request.cache).unwrap();
    let mut objects = 0;
    opened
        .odb()
        .unwrap()
        .foreach(|_| {
            objects += 1;
            true
        })
        .unwrap();
    // Two commits; of the second only root, a/ and x.yaml are new: 2 + 5 + 3.
    assert_eq!(objects, 2 + 5 + 3);
    assert_eq!(from_cache(&request.cache, &got.revision).unwrap().tree, got.tree);
    assert!(from_cache(&request.cache, &format!("main@sha1:{}", "0".repeat(40))).is_none());
}

#[test]
fn annotated_tags_lead_to_their_commit() {
    let (source, cache) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let repo = Repository::init_bare(source.path()).unwrap();
    let id = commit(&repo, "main", &[("x.yaml", "1")]);
    let target = repo.find_object(Oid::from_str(&id).unwrap(), None).unwrap();
    let who = git2::Signature::now("Ada", "ada@example.com").unwrap();
    repo.tag("v1.0.0", &target, &who, "first", false).unwrap();
    let reference = GitRepositoryRef {
        semver: Some(">=1.0".into()),
        ..Default::default()
    };
    let got = sync(
        &request(source.path(), cache.path(), &reference),
        &Stop::default(),
    )
    .unwrap();
    assert_eq!(got.revision, format!("v1.0.0@sha1:{id}"));
}

#[test]
fn an_empty_or_missing_repository_and_a_missing_branch_are_told_apart() {
    let (source, cache) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let error = sync(
        &request(&source.path().join("nowhere"), cache.path(), &branch("main")),
        &Stop::default(),
    )
    .unwrap_err();
    assert!(matches!(error, Error::Git { action: "open", .. }), "{error}");
    let repo = Repository::init_bare(source.path()).unwrap();
    let error = sync(
        &request(source.path(), cache.path(), &branch("main")),
        &Stop::default(),
    )
    .unwrap_err();
    assert!(error.to_string().contains("empty"), "{error}");
    commit(&repo, "main", &[("x.yaml", "1")]);
    let error = sync(
        &request(source.path(), cache.path(), &branch("prod")),
        &Stop::default(),
    )
    .unwrap_err();
    assert!(
        error
            .to_string()
            .contains("branch 'prod' not found; there is main"),
        "{error}"
    );
}

#[test]
fn a_damaged_cache_starts_anew() {
    let (source, cache) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let repo = Repository::init_bare(source.path()).unwrap();
    commit(&repo, "main", &[("x.yaml", "1")]);
    let request = request(source.path(), cache.path(), &branch("main"));
    sync(&request, &Stop::default()).unwrap();
    std::fs::write(request.cache.join("HEAD"), "garbage").unwrap();
    std::fs::remove_dir_all(request.cache.join("objects")).unwrap();
    assert!(sync(&request, &Stop::default()).unwrap().transferred);
}

#[test]
fn a_cache_that_has_grown_too_large_starts_anew() {
    let (source, cache) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let repo = Repository::init_bare(source.path()).unwrap();
    commit(&repo, "main", &[("x.yaml", "1")]);
    let request = request(source.path(), cache.path(), &branch("main"));
    sync(&request, &Stop::default()).unwrap();
    for i in 0..=PACKS_MAX * 3 {
        std::fs::write(request.cache.join(format!("objects/pack/x{i}")), "").unwrap();
    }
    assert!(sync(&request, &Stop::default()).unwrap().transferred);
    assert!(!sync(&request, &Stop::default()).unwrap().transferred);
}
