//! libgit2 at work: list what a remote offers, fetch the one commit that is wanted into a bare cache.
//!
//! Runs on the threads of [`super::threads`] and blocks. A remote is fetched one commit deep where its transport can
//! (http, ssh) and incrementally against what the cache has. A repository on this machine is not fetched with
//! libgit2's local transport, which packs history: the objects of the wanted commit that are missing are copied,
//! children before parents, so that a tree that is there is always complete and copying costs what changed.

use std::path::{Path, PathBuf};

use git2::{
    AutotagOption, CertificateCheckStatus, Cred, CredentialType, Direction, FetchOptions, Oid, ProxyOptions,
    RemoteCallbacks, Repository,
};

use super::credentials::{Auth, Place, without_credentials};
use super::known_hosts;
use super::reference::{Head, Selected, Wanted, revision};
use super::threads::Stop;
use crate::error::Error;

/// Below this namespace the cache remembers fetched tips, as a base for incremental fetches.
const TIPS: &str = "refs/serin/tips/";

/// A cache with more packs, or about as many loose objects, starts anew: it then costs one fetch of one commit.
const PACKS_MAX: usize = 64;
const LOOSE_MAX: usize = 100_000;

/// What to fetch, from where, into which cache.
#[derive(Debug, Clone)]
pub(crate) struct Request {
    pub(crate) place: Place,
    pub(crate) auth: Auth,
    pub(crate) wanted: Wanted,
    pub(crate) cache: PathBuf,
}

/// The commit that is wanted, complete in the cache.
#[derive(Debug, Clone)]
pub(crate) struct Fetched {
    pub(crate) revision: String,
    pub(crate) commit: String,
    pub(crate) tree: Oid,
    /// Whether anything was transferred.
    #[cfg_attr(not(test), expect(dead_code, reason = "tests tell a fetch from a look"))]
    pub(crate) transferred: bool,
    /// Author, subject: for messages and events.
    pub(crate) author: String,
    pub(crate) subject: String,
}

/// Brings the cache to the wanted commit.
pub(crate) fn sync(request: &Request, stop: &Stop) -> Result<Fetched, Error> {
    crate::sys::init_libgit2();
    let cache = open_cache(&request.cache)?;
    let url = without_credentials(&request.place.url());
    let (selected, transferred) = match &request.place {
        Place::Local(_) if !stop.may_write() => return Err(Error::Stopping),
        Place::Local(path) => sync_local(&cache, path, &request.wanted, &url)?,
        Place::Http { .. } | Place::Ssh { .. } => sync_remote(&cache, request, stop, &url)?,
    };
    describe(&cache, &selected, transferred, &url)
}

/// A commit that an earlier process fetched, if it is still in the cache: for a start while the server is away.
pub(crate) fn from_cache(cache: &Path, known_revision: &str) -> Option<Fetched> {
    crate::sys::init_libgit2();
    let repo = Repository::open_bare(cache).ok()?;
    let (label, commit) = match known_revision.split_once("@sha1:") {
        Some((label, commit)) => (label, commit),
        None => ("", known_revision.strip_prefix("sha1:")?),
    };
    let selected = Selected {
        full_name: None,
        label: label.to_string(),
        id: commit.to_string(),
    };
    describe(&repo, &selected, false, "the cache").ok()
}

fn describe(cache: &Repository, selected: &Selected, transferred: bool, url: &str) -> Result<Fetched, Error> {
    let failed = |e: git2::Error| Error::Git {
        action: "read the commit fetched from",
        url: url.into(),
        reason: e.message().into(),
    };
    let id = Oid::from_str(&selected.id).map_err(failed)?;
    let commit = cache
        .find_object(id, None)
        .and_then(|o| o.peel_to_commit())
        .map_err(failed)?;
    let hex = commit.id().to_string();
    Ok(Fetched {
        revision: revision(&selected.label, &hex),
        tree: commit.tree_id(),
        transferred,
        author: commit.author().name().unwrap_or_default().to_string(),
        subject: commit
            .summary()
            .ok()
            .flatten()
            .unwrap_or_default()
            .chars()
            .take(200)
            .collect(),
        commit: hex,
    })
}

fn open_cache(path: &Path) -> Result<Repository, Error> {
    let failed = |reason: String| Error::Git {
        action: "open the cache of",
        url: path.display().to_string(),
        reason,
    };
    if path.exists() {
        match Repository::open_bare(path) {
            Ok(_) if is_overgrown(path) => {
                std::fs::remove_dir_all(path).map_err(|e| failed(e.to_string()))?;
            }
            Ok(repo) => return Ok(repo),
            Err(error) => {
                tracing::warn!(path = %path.display(), %error, "the git cache is damaged and starts anew");
                std::fs::remove_dir_all(path).map_err(|e| failed(e.to_string()))?;
            }
        }
    }
    Repository::init_bare(path).map_err(|e| failed(e.message().to_string()))
}

/// Every fetch adds a pack or loose objects, and nothing here is ever collected one by one.
fn is_overgrown(path: &Path) -> bool {
    let count = |below: &str| std::fs::read_dir(path.join("objects").join(below)).map_or(0, Iterator::count);
    // A pack has two or three files. Loose objects are spread evenly over 256 directories.
    count("pack") > PACKS_MAX * 3 || count("17") * 256 > LOOSE_MAX
}

fn is_complete(cache: &Repository, id: Oid) -> bool {
    cache
        .find_object(id, None)
        .and_then(|o| o.peel_to_commit())
        .is_ok_and(|c| cache.odb().is_ok_and(|odb| odb.exists(c.tree_id())))
}

fn remember(cache: &Repository, selected: &Selected) -> Result<(), git2::Error> {
    let Some(name) = &selected.full_name else {
        return Ok(());
    };
    let id = Oid::from_str(&selected.id)?;
    cache
        .reference(
            &format!("{TIPS}{}", name.trim_start_matches("refs/")),
            id,
            true,
            "fetched",
        )
        .map(drop)
}

// ---- repositories on this machine ----

fn sync_local(
    cache: &Repository,
    path: &Path,
    wanted: &Wanted,
    url: &str,
) -> Result<(Selected, bool), Error> {
    let failed = |action: &'static str| {
        move |e: git2::Error| Error::Git {
            action,
            url: url.to_string(),
            reason: remedy(&e),
        }
    };
    let source = Repository::open(path).map_err(failed("open"))?;
    let mut heads = Vec::new();
    for reference in source.references().map_err(failed("list references of"))? {
        let reference = reference.map_err(failed("list references of"))?;
        let (Ok(name), Ok(target)) = (reference.name(), reference.resolve()) else {
            continue;
        };
        if let Some(id) = target.target() {
            heads.push(Head {
                name: name.to_string(),
                id: id.to_string(),
            });
        }
    }
    let selected = wanted.select(&heads).map_err(|reason| Error::Reference {
        url: url.to_string(),
        reason,
    })?;
    let copy = failed("copy objects of");
    let id = Oid::from_str(&selected.id).map_err(copy)?;
    let copy = failed("copy objects of");
    if is_complete(cache, id) {
        return Ok((selected, false));
    }
    copy_missing(&source, cache, id).map_err(copy)?;
    Ok((selected, true))
}

/// Copies a commit (or a tag and its commit), its tree and blobs. Parents are left out: nothing reads history here.
fn copy_missing(source: &Repository, cache: &Repository, id: Oid) -> Result<(), git2::Error> {
    let from = source.odb()?;
    let to = cache.odb()?;
    let copy = |id: Oid| -> Result<(), git2::Error> {
        let object = from.read(id)?;
        to.write(object.kind(), object.data()).map(drop)
    };
    let object = source.find_object(id, None)?;
    let commit = object.peel_to_commit()?;
    /// Depth first, a directory only after everything in it. The stack holds ids and whether the children are done.
    enum Step {
        Enter(Oid),
        Leave(Oid),
    }
    let mut steps = vec![Step::Enter(commit.tree_id())];
    while let Some(step) = steps.pop() {
        match step {
            Step::Leave(tree) => copy(tree)?,
            Step::Enter(tree) if to.exists(tree) => {}
            Step::Enter(tree) => {
                steps.push(Step::Leave(tree));
                for entry in &source.find_tree(tree)? {
                    match entry.kind() {
                        Some(git2::ObjectType::Tree) => steps.push(Step::Enter(entry.id())),
                        Some(git2::ObjectType::Blob) if !to.exists(entry.id()) => copy(entry.id())?,
                        _ => {}
                    }
                }
            }
        }
    }
    copy(commit.id())?;
    if commit.id() != id { copy(id) } else { Ok(()) }
}

// ---- remotes ----

fn sync_remote(
    cache: &Repository,
    request: &Request,
    stop: &Stop,
    url: &str,
) -> Result<(Selected, bool), Error> {
    let refusal = Refusal::default();
    let failed = |action: &'static str| {
        let refusal = &refusal;
        move |e: git2::Error| Error::Git {
            action,
            url: url.to_string(),
            reason: refusal.0.lock().take().unwrap_or_else(|| remedy(&e)),
        }
    };
    if let Wanted::Commit { id, branch } = &request.wanted {
        let oid = Oid::from_str(id).map_err(failed("read the commit id for"))?;
        let selected = Selected {
            full_name: None,
            label: branch.clone().unwrap_or_default(),
            id: id.clone(),
        };
        if is_complete(cache, oid) {
            return Ok((selected, false));
        }
    }
    let mut remote = cache
        .remote_anonymous(&request.place.url())
        .map_err(failed("address"))?;
    let writing = || {
        if stop.may_write() {
            Ok(())
        } else {
            Err(Error::Stopping)
        }
    };
    let heads = if request.auth.bearer.is_some() {
        writing()?;
        // libgit2 takes headers only for a fetch; an empty refspec list there still lists the references.
        let mut options = options(request, stop, &refusal, Some(1));
        remote
            .fetch(&["+HEAD:refs/serin/head"], Some(&mut options), None)
            .map_err(failed("fetch"))?;
        heads_of(remote.list().map_err(failed("list references of"))?)
    } else {
        let connection = remote
            .connect_auth(
                Direction::Fetch,
                Some(callbacks(request, stop, &refusal)),
                proxy(request),
            )
            .map_err(failed("list references of"))?;
        heads_of(connection.list().map_err(failed("list references of"))?)
    };
    let selected = request.wanted.select(&heads).map_err(|reason| Error::Reference {
        url: url.to_string(),
        reason,
    })?;
    let id = Oid::from_str(&selected.id).map_err(failed("read references of"))?;
    if is_complete(cache, id) {
        return Ok((selected, false));
    }
    writing()?;
    let refspec = match &selected.full_name {
        Some(name) => format!("+{name}:{TIPS}{}", name.trim_start_matches("refs/")),
        None => selected.id.clone(),
    };
    let shallow = remote.fetch(
        &[refspec.as_str()],
        Some(&mut options(request, stop, &refusal, Some(1))),
        None,
    );
    if !is_complete(cache, id) {
        if selected.full_name.is_some() {
            shallow.map_err(failed("fetch"))?;
            return Err(Error::Git {
                action: "fetch",
                url: url.to_string(),
                reason: format!(
                    "the server did not send {}; it may have moved while it was fetched",
                    selected.id
                ),
            });
        }
        // A server that does not serve single commits: everything that a reference reaches, with history.
        let branches = match &request.wanted {
            Wanted::Commit {
                branch: Some(branch), ..
            } => format!("+refs/heads/{branch}:{TIPS}heads/{branch}"),
            _ => format!("+refs/heads/*:{TIPS}heads/*"),
        };
        remote
            .fetch(
                &[branches.as_str()],
                Some(&mut options(request, stop, &refusal, None)),
                None,
            )
            .map_err(failed("fetch"))?;
        if !is_complete(cache, id) {
            return Err(Error::Reference {
                url: url.to_string(),
                reason: format!("commit '{}' not found on any branch", selected.id),
            });
        }
    }
    remember(cache, &selected).map_err(failed("remember the tip of"))?;
    Ok((selected, true))
}

/// Why a server was not trusted, in our words: for ssh libgit2 replaces them by its own.
#[derive(Default)]
struct Refusal(parking_lot::Mutex<Option<String>>);

fn heads_of(list: &[git2::RemoteHead<'_>]) -> Vec<Head> {
    list.iter()
        .map(|h| Head {
            name: h.name().to_string(),
            id: h.oid().to_string(),
        })
        .collect()
}

fn options<'a>(
    request: &'a Request,
    stop: &'a Stop,
    refusal: &'a Refusal,
    depth: Option<i32>,
) -> FetchOptions<'a> {
    let mut options = FetchOptions::new();
    options
        .remote_callbacks(callbacks(request, stop, refusal))
        .download_tags(AutotagOption::None)
        .update_fetchhead(false);
    if let Some(depth) = depth {
        options.depth(depth);
    }
    if let Some(proxy) = proxy(request) {
        options.proxy_options(proxy);
    }
    if let Some(token) = &request.auth.bearer {
        options.custom_headers(&[&format!("Authorization: Bearer {}", token.0)]);
    }
    options
}

fn proxy<'a>(request: &Request) -> Option<ProxyOptions<'a>> {
    request.auth.proxy.as_ref().map(|p| {
        let mut options = ProxyOptions::new();
        options.url(&p.0.0);
        options
    })
}

fn callbacks<'a>(request: &'a Request, stop: &'a Stop, refusal: &'a Refusal) -> RemoteCallbacks<'a> {
    let mut callbacks = RemoteCallbacks::new();
    callbacks.transfer_progress(|_| !stop.requested());
    callbacks.sideband_progress(|_| !stop.requested());
    let mut asked = 0;
    callbacks.credentials(move |_, _, allowed| {
        asked += 1;
        // libgit2 asks again for as long as the server refuses.
        if asked > 3 || stop.requested() {
            return Err(git2::Error::from_str(
                "the server refuses the credentials of spec.secretRef",
            ));
        }
        credentials(request, allowed)
    });
    callbacks.certificate_check(move |certificate, host| {
        check_certificate(request, certificate, host).inspect_err(|error| {
            *refusal.0.lock() = Some(error.message().to_string());
        })
    });
    callbacks
}

fn credentials(request: &Request, allowed: CredentialType) -> Result<Cred, git2::Error> {
    if let (Place::Ssh { user, .. }, Some(key)) = (&request.place, &request.auth.ssh) {
        if allowed.contains(CredentialType::USERNAME) {
            return Cred::username(user);
        }
        let passphrase = key.passphrase.as_ref().map(|p| p.0.as_str());
        return Cred::ssh_key_from_memory(user, None, &key.identity.0, passphrase);
    }
    match &request.auth.basic {
        Some((user, password)) => Cred::userpass_plaintext(user, &password.0),
        None => Err(git2::Error::from_str(
            "the server asks for credentials (or hides that the repository does not exist); name a Secret in spec.secretRef",
        )),
    }
}

fn check_certificate(
    request: &Request,
    certificate: &git2::cert::Cert<'_>,
    host: &str,
) -> Result<CertificateCheckStatus, git2::Error> {
    if let Place::Ssh { host, port, .. } = &request.place {
        let key = certificate.as_hostkey().and_then(|k| k.hostkey());
        let known = request.auth.ssh.as_ref().map_or("", |k| k.known_hosts.as_str());
        let words = match key.map(|key| known_hosts::check(known, host, *port, key)) {
            Some(Ok(())) => return Ok(CertificateCheckStatus::CertificateOk),
            Some(Err(known_hosts::Refusal::UnknownHost)) => {
                format!("known_hosts of spec.secretRef does not list {host} (port {port})")
            }
            Some(Err(known_hosts::Refusal::Mismatch)) => format!(
                "the server's key is not the one that known_hosts lists for {host}: somebody may be in between, or the key changed"
            ),
            Some(Err(known_hosts::Refusal::OtherTypes { shown, listed })) => format!(
                "the server shows a key of type {shown}, and known_hosts of spec.secretRef lists only {listed} for {host}; add the line for it (ssh-keyscan {host} prints all)"
            ),
            Some(Err(known_hosts::Refusal::Revoked)) => {
                format!("known_hosts marks the server's key of {host} as revoked")
            }
            None => format!("{host} presented no host key that can be compared"),
        };
        return Err(git2::Error::from_str(&words));
    }
    match (&request.auth.ca, certificate.as_x509()) {
        (Some(ca), Some(leaf)) => super::certificate::check(ca, leaf.data(), host)
            .map(|()| CertificateCheckStatus::CertificateOk)
            .map_err(|reason| git2::Error::from_str(&reason)),
        _ => Ok(CertificateCheckStatus::CertificatePassthrough),
    }
}

/// libgit2's words, with what to do about the common ones.
fn remedy(error: &git2::Error) -> String {
    let words = error.message().trim_end_matches(['\n', '.']).to_string();
    let lower = words.to_ascii_lowercase();
    if error.code() == git2::ErrorCode::Owner {
        return format!("{words}; the repository belongs to another user of this machine");
    }
    if lower.contains("no space left") {
        return format!("{words}; the disk that holds the git cache is full, free some space");
    }
    if lower.contains("self-signed") || lower.contains("certificate") && !lower.contains("ca.crt") {
        return format!("{words}; put the authority's certificate into the key ca.crt of spec.secretRef");
    }
    words
}

#[cfg(test)]
#[path = "git_tests.rs"]
mod tests;
