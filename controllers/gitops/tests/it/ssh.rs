//! git over ssh: a real OpenSSH server on a port of this machine. Skipped where sshd is not installed.

use std::io::{BufRead as _, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use serde_json::{Value, json};
use serin_crds::flux::source::GitRepository;

use crate::cluster::{Cluster, NS, condition, config_map};

const SSHD: &str = "/usr/sbin/sshd";
/// Where a privileged sshd wants an empty directory; the package's service makes it.
const PRIVILEGE_SEPARATION: &str = "/run/sshd";

/// An ssh server that lets one key in, as the user of the test.
struct Server {
    child: Child,
    dir: tempfile::TempDir,
    port: u16,
    user: String,
    made: bool,
}

fn run(program: &str, arguments: &[&str]) -> Option<String> {
    let output = Command::new(program).args(arguments).output().ok()?;
    output
        .status
        .success()
        .then(|| String::from_utf8_lossy(&output.stdout).trim().to_string())
}

fn key(path: &Path, kind: &str, passphrase: &str) {
    let path = path.to_str().unwrap();
    run("ssh-keygen", &["-q", "-t", kind, "-N", passphrase, "-f", path]).expect("ssh-keygen makes a key");
}

impl Server {
    fn start() -> Option<Self> {
        if !Path::new(SSHD).exists() || run("git", &["--version"]).is_none() {
            eprintln!("SKIPPED: git over ssh, sshd (package openssh-server) or git is not here");
            return None;
        }
        let made =
            !Path::new(PRIVILEGE_SEPARATION).exists() && std::fs::create_dir(PRIVILEGE_SEPARATION).is_ok();
        let dir = tempfile::tempdir().unwrap();
        let at = |name: &str| dir.path().join(name);
        key(&at("host"), "ed25519", "");
        key(&at("deploy"), "ed25519", "");
        key(&at("locked"), "rsa", "open sesame");
        key(&at("stranger"), "ed25519", "");
        key(&at("impostor"), "ed25519", "");
        let allowed = ["deploy.pub", "locked.pub"].map(|name| std::fs::read_to_string(at(name)).unwrap());
        std::fs::write(at("authorized_keys"), allowed.concat()).unwrap();
        // sshd cannot choose a port by itself.
        let port = std::net::TcpListener::bind("127.0.0.1:0")
            .unwrap()
            .local_addr()
            .unwrap()
            .port();
        let config = format!(
            "ListenAddress 127.0.0.1:{port}\nHostKey {}\nAuthorizedKeysFile {}\nPidFile none\nStrictModes no\nUsePAM no\n\
             PasswordAuthentication no\nKbdInteractiveAuthentication no\nPermitRootLogin prohibit-password\n",
            at("host").display(),
            at("authorized_keys").display(),
        );
        std::fs::write(at("config"), config).unwrap();
        let mut child = Command::new(SSHD)
            .args(["-D", "-e", "-f"])
            .arg(at("config"))
            .stdin(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let mut said = BufReader::new(child.stderr.take().unwrap());
        let mut all = String::new();
        while !all.contains("listening on") {
            assert!(said.read_line(&mut all).unwrap() > 0, "sshd ended: {all}");
        }
        // What it says later must not block it.
        std::thread::spawn(move || std::io::copy(&mut said, &mut std::io::sink()));
        Some(Self {
            child,
            dir,
            port,
            user: run("id", &["-un"]).unwrap(),
            made,
        })
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn text(&self, name: &str) -> String {
        std::fs::read_to_string(self.path(name)).unwrap()
    }

    /// The line of known_hosts that vouches for a key.
    fn known(&self, host: &str, key: &str) -> String {
        format!("[{host}]:{} {}", self.port, self.text(key))
    }

    fn url(&self, repository: &Path) -> String {
        format!(
            "ssh://{}@127.0.0.1:{}{}",
            self.user,
            self.port,
            repository.display()
        )
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        if self.made {
            let _ = std::fs::remove_dir(PRIVILEGE_SEPARATION);
        }
    }
}

/// A GitRepository with a secret of its own.
async fn source(cluster: &Cluster, name: &str, url: &str, secret: Value) {
    cluster
        .create(json!({"apiVersion": "v1", "kind": "Secret", "metadata": {"name": name, "namespace": NS}, "stringData": secret}))
        .await;
    let spec = json!({"url": url, "interval": "10m", "ref": {"branch": "main"}, "secretRef": {"name": name}});
    cluster
        .create(json!({"apiVersion": "source.toolkit.fluxcd.io/v1", "kind": "GitRepository", "metadata": {"name": name, "namespace": NS}, "spec": spec}))
        .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_repository_behind_ssh_is_opened_by_the_identity_and_followed() {
    let Some(server) = Server::start() else { return };
    let cluster = Cluster::start().await;
    let repo = cluster.repository("app");
    let first = repo.push(&[("deploy/a.yaml", &config_map("a", "1"))]);
    let url = server.url(repo.path());
    let identity =
        json!({"identity": server.text("deploy"), "known_hosts": server.known("127.0.0.1", "host.pub")});
    source(&cluster, "app", &url, identity).await;
    cluster.kustomization("app", json!({})).await;
    cluster.applied("app", &first).await;

    let second = repo.push(&[("deploy/a.yaml", &config_map("a", "2"))]);
    let ask = json!({"metadata": {"annotations": {"reconcile.fluxcd.io/requestedAt": "1"}}});
    cluster.merge::<GitRepository>(NS, "app", ask).await;
    cluster.applied("app", &second).await;

    let locked = json!({"identity": server.text("locked"), "password": "open sesame",
        "known_hosts": server.known("127.0.0.1", "host.pub")});
    source(&cluster, "locked", &url, locked).await;
    let revision = second.clone();
    let at = move |g: &GitRepository| {
        let artifact = g.status.as_ref().and_then(|s| s.artifact.as_ref());
        artifact.is_some_and(|a| a.revision == revision)
    };
    cluster.git("locked", "opened with a passphrase", at).await;
    cluster.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_ssh_server_with_another_key_and_a_stranger_are_refused_in_words() {
    let Some(server) = Server::start() else { return };
    let cluster = Cluster::start().await;
    let repo = cluster.repository("app");
    repo.push(&[("deploy/a.yaml", &config_map("a", "1"))]);
    let url = server.url(repo.path());
    let known = |host: &str, key: &str| server.known(host, key);
    for (name, identity, known_hosts, words) in [
        (
            "impostor",
            "deploy",
            known("127.0.0.1", "impostor.pub"),
            "somebody may be in between",
        ),
        (
            "unknown",
            "deploy",
            known("example.com", "host.pub"),
            "does not list 127.0.0.1",
        ),
        (
            "other-type",
            "deploy",
            known("127.0.0.1", "locked.pub"),
            "lists only ssh-rsa",
        ),
        (
            "stranger",
            "stranger",
            known("127.0.0.1", "host.pub"),
            "authenticat",
        ),
    ] {
        let secret = json!({"identity": server.text(identity), "known_hosts": known_hosts});
        source(&cluster, name, &url, secret).await;
        let refused = cluster
            .git(name, "refused", |g| condition(g, "FetchFailed").is_some())
            .await;
        let message = condition(&refused, "Ready").unwrap().2;
        assert!(message.contains(words), "{name}: {message}");
        assert!(!message.contains("PRIVATE KEY"), "{message}");
    }
    cluster.stop().await;
}
