//! Commands of kubectl as they were recorded with a real kube-apiserver, given to the kubectl of this machine and our server.
//!
//! Exit code and standard output are compared, standard error where the command failed. What differs is listed in
//! `expected-kubectl.tsv` with its reason; a command that is listed and agrees fails the test, and so does one that differs and is
//! not listed. Where another client acted while a command ran, the same is done here once the command watches. Left out: scenarios
//! that need kube-controller-manager.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::Stdio;
use std::time::Duration;

use regex::Regex;
use serde_json::{Value, json};
use serin_apiserver::{Certificates, Tokens, kubeconfig};
use tokio::io::AsyncWriteExt as _;
use tokio::process::Command;

use crate::client::DEADLINE;
use crate::kubectl::cache;
use crate::recording::{Reply, Run, data, set_up};

/// The recordings show runs of spaces as two.
fn tidy(text: &str) -> String {
    let spaces = Regex::new(" {2,}").expect("a pattern");
    let lines: Vec<String> = text
        .lines()
        .map(|line| spaces.replace_all(line, "  ").trim_end().to_owned())
        .collect();
    lines.join("\n")
}

/// What the other client did while a command ran, which the recordings do not show.
fn meanwhile(scenario: &str, namespace: &str, args: &[String]) -> Option<Value> {
    let configmaps = format!("/api/v1/namespaces/{namespace}/configmaps");
    let merge = json!({"Content-Type": "application/merge-patch+json"});
    let args: Vec<&str> = args.iter().map(String::as_str).collect();
    match (scenario, args.as_slice()) {
        ("kubectl/wait", ["wait", "--for=condition=Available", ..]) => Some(json!({
            "method": "PATCH", "path": format!("/apis/apps/v1/namespaces/{namespace}/deployments/d/status"), "headers": merge,
            "body": {"status": {"conditions": [{"type": "Available", "status": "True"}]}},
        })),
        ("kubectl/wait", ["wait", "--for=delete", ..]) => {
            Some(json!({"method": "DELETE", "path": format!("{configmaps}/c")}))
        }
        ("kubectl/wait", ["wait", "--for=create", ..]) => {
            Some(json!({"method": "POST", "path": configmaps, "body": {"metadata": {"name": "later"}}}))
        }
        ("kubectl/delete-wait", ["delete", "cm", "a"]) => Some(json!({
            "method": "PATCH", "path": format!("{configmaps}/a"), "headers": merge, "body": {"metadata": {"finalizers": null}},
        })),
        _ => None,
    }
}

/// Returns once somebody watches, or once nobody does.
async fn until_watched(run: &Run, watched: bool) {
    let metrics = json!({"method": "GET", "path": "/metrics"});
    loop {
        let Reply::Whole { body, .. } = run.send(&metrics).await;
        if String::from_utf8_lossy(&body).contains("apiserver_watchers 0\n") != watched {
            return;
        }
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

/// Acts as another client as soon as somebody watches; what is waited for until it exists is asked for again and again instead.
async fn act(run: &Run, request: &Value) {
    if request["method"] != "POST" {
        until_watched(run, true).await;
    }
    run.send(request).await;
}

async fn command(
    run: &mut Run,
    home: &Path,
    scenario: &str,
    namespace: &str,
    recorded: &Value,
) -> Result<(), String> {
    let place = tempfile::tempdir().expect("a directory");
    for (name, content) in recorded["files"].as_object().into_iter().flatten() {
        let path = place.path().join(name);
        let content = run.substitute_text(content.as_str().unwrap_or_default());
        std::fs::write(&path, &content).expect("written");
        if content.starts_with("#!") {
            std::fs::set_permissions(&path, PermissionsExt::from_mode(0o755)).expect("executable");
        }
    }
    let args = recorded["args"].as_array().expect("arguments");
    let args: Vec<String> = args
        .iter()
        .map(|a| run.substitute_text(a.as_str().expect("text")))
        .collect();
    let mut kubectl = Command::new("kubectl");
    kubectl
        .args(["--namespace", namespace])
        .args(&args)
        .current_dir(place.path())
        .env("KUBECONFIG", home.join("config"))
        .env("HOME", home)
        .env("KUBECACHEDIR", cache(home))
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .kill_on_drop(true);
    for (name, value) in recorded["env"].as_object().into_iter().flatten() {
        kubectl.env(name, value.as_str().unwrap_or_default());
    }
    let other = recorded
        .get("meanwhile")
        .map(|_| meanwhile(scenario, namespace, &args).expect("an action of the other client"));
    if other.is_some() {
        // The server may not have noticed yet that the watch of the command before has ended; taken for this command's, the
        // other client would act before this one has looked.
        tokio::time::timeout(DEADLINE, until_watched(run, false))
            .await
            .map_err(|_| "the watch of an ended command lasts".to_owned())?;
    }
    let mut child = kubectl.spawn().expect("kubectl starts");
    let mut stdin = child.stdin.take().expect("piped");
    let input = run.substitute_text(recorded["stdin"].as_str().unwrap_or_default());
    // A command that reads nothing closes it.
    let _ = stdin.write_all(input.as_bytes()).await;
    drop(stdin);
    let both = async {
        let acting = async {
            if let Some(request) = &other {
                act(run, request).await;
            }
            // The command's end is what counts.
            std::future::pending::<()>().await;
        };
        tokio::select! {
            output = child.wait_with_output() => output,
            () = acting => unreachable!("it never ends"),
        }
    };
    let output = tokio::time::timeout(DEADLINE, both)
        .await
        .map_err(|_| "no end in time".to_owned())?
        .expect("it ran");
    let (out, err) = (
        String::from_utf8_lossy(&output.stdout).into_owned(),
        String::from_utf8_lossy(&output.stderr).into_owned(),
    );
    let wanted = recorded["exit"].as_i64().unwrap_or(0);
    if output.status.code().map(i64::from) != Some(wanted) {
        return Err(format!(
            "exit code: wanted {wanted}, found {:?}: {out}{err}",
            output.status.code()
        ));
    }
    let wanted = tidy(recorded["stdout"].as_str().unwrap_or_default());
    run.compare_text(&wanted, &json!(tidy(&out)), "stdout")?;
    if wanted.is_empty() && !output.status.success() {
        let wanted = tidy(recorded["stderr"].as_str().unwrap_or_default());
        run.compare_text(&wanted, &json!(tidy(&err)), "stderr")?;
    }
    Ok(())
}

/// Replays a scenario; returns how many commands there were and which differ.
async fn replay(scenario: &Value) -> (usize, Vec<(usize, String)>) {
    let mut run = set_up(scenario).await;
    let scenario_name = scenario["name"].as_str().unwrap_or_default();
    let namespace = scenario["namespace"].as_str().unwrap_or("default").to_owned();
    let certificates =
        Certificates::generate("test", &["127.0.0.1".parse().expect("an address")]).expect("certificates");
    let address = "127.0.0.1:0".parse().expect("an address");
    let address = run
        .server
        .serve_tls(address, &certificates, Tokens::admin("secret"))
        .await
        .expect("listening");
    let home = tempfile::tempdir().expect("a directory");
    let config = kubeconfig("test", address, &certificates.authority_pem, "secret");
    std::fs::write(home.path().join("config"), config).expect("written");
    let mut commands = 0;
    let mut differing = std::mem::take(&mut run.failures);
    for (i, step) in scenario["steps"].as_array().into_iter().flatten().enumerate() {
        match step.get("kubectl") {
            Some(recorded) => {
                commands += 1;
                if let Err(difference) =
                    command(&mut run, home.path(), scenario_name, &namespace, recorded).await
                {
                    let what = format!("kubectl {}", recorded["args"]);
                    differing.push((i + 1, format!("{what}\n    {difference}")));
                }
            }
            None => run.step(i + 1, step).await,
        }
    }
    run.server.shutdown().await;
    (commands, differing)
}

/// `scenario step<TAB>reason` per line.
fn expected() -> BTreeMap<String, String> {
    include_str!("expected-kubectl.tsv")
        .lines()
        .filter(|l| !l.starts_with('#') && !l.trim().is_empty())
        .map(|l| {
            let (name, reason) = l.split_once('\t').expect("a command and its reason");
            (name.to_owned(), reason.to_owned())
        })
        .collect()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn kubectl_says_what_it_said_of_a_real_kube_apiserver() {
    let Some(root) = data() else {
        eprintln!("SKIPPED: recorded commands of kubectl: ../shared is not here");
        return;
    };
    let version = Command::new("kubectl")
        .args(["version", "--client"])
        .output()
        .await;
    if !version.is_ok_and(|o| o.status.success()) {
        eprintln!("SKIPPED: recorded commands of kubectl: kubectl is not on PATH");
        return;
    }
    let mut files: Vec<_> = std::fs::read_dir(root.join("kubectl"))
        .expect("a group")
        .map(|e| e.expect("an entry").path())
        .collect();
    files.sort();
    let mut replays = tokio::task::JoinSet::new();
    for file in files {
        let scenario: Value =
            serde_json::from_slice(&std::fs::read(&file).expect("a scenario")).expect("JSON");
        let name = scenario["name"].as_str().expect("a name").to_owned();
        if scenario["server"] == "controllers" {
            continue;
        }
        replays.spawn(async move { (name, replay(&scenario).await) });
    }
    let mut differing = BTreeMap::new();
    let mut all = 0;
    while let Some(replayed) = replays.join_next().await {
        let (name, (commands, failures)) = replayed.expect("it ran");
        all += commands;
        differing.extend(
            failures
                .into_iter()
                .map(|(step, text)| (format!("{name} {step}"), text)),
        );
    }
    let expected = expected();
    let mut complaints = String::new();
    for (name, text) in differing.iter().filter(|(name, _)| !expected.contains_key(*name)) {
        writeln!(complaints, "{name}: {text}").expect("written");
    }
    for name in expected.keys().filter(|name| !differing.contains_key(*name)) {
        writeln!(
            complaints,
            "{name} is listed as differing and agrees: take it off the list"
        )
        .expect("written");
    }
    eprintln!(
        "kubectl: {} of {all} commands agree",
        all - differing.len().min(all)
    );
    assert!(complaints.is_empty(), "{complaints}");
}
