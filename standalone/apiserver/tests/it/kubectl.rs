//! kubectl as the client, over TLS with a token.

use std::path::Path;
use std::process::Stdio;
use std::sync::Arc;

use bytes::Bytes;
use futures::StreamExt as _;
use futures::stream::{self, BoxStream};
use serde_json::Value;
use serin_apiserver::{ApiServer, Certificates, LogOptions, PodLogs, Tokens, kubeconfig};
use tokio::io::AsyncWriteExt as _;
use tokio::process::Command;

use crate::client::DEADLINE;

struct Lines;

#[async_trait::async_trait]
impl PodLogs for Lines {
    async fn logs(
        &self,
        _: &str,
        _: &Value,
        options: LogOptions,
    ) -> Result<BoxStream<'static, std::io::Result<Bytes>>, String> {
        let text = format!("hello from {}\n", options.container);
        Ok(stream::iter([Ok(Bytes::from(text))]).boxed())
    }
}

struct Kubectl {
    server: ApiServer,
    home: tempfile::TempDir,
}

impl Kubectl {
    /// `None`, said aloud, where there is no kubectl.
    async fn start() -> Option<Self> {
        let version = Command::new("kubectl")
            .args(["version", "--client"])
            .output()
            .await;
        if !version.is_ok_and(|o| o.status.success()) {
            eprintln!("SKIPPED: kubectl as a client: kubectl is not on PATH");
            return None;
        }
        let server = ApiServer::builder()
            .pod_logs(Arc::new(Lines))
            .build()
            .await
            .expect("the server starts");
        let certificates = Certificates::generate("test", &["127.0.0.1".parse().expect("an address")])
            .expect("certificates");
        let address = server
            .serve_tls(
                "127.0.0.1:0".parse().expect("an address"),
                &certificates,
                Tokens::admin("secret"),
            )
            .await
            .expect("listening");
        let home = tempfile::tempdir().expect("a directory");
        std::fs::write(
            home.path().join("config"),
            kubeconfig("test", address, &certificates.authority_pem, "secret"),
        )
        .expect("written");
        Some(Self { server, home })
    }

    async fn run(&self, args: &[&str], input: &str) -> (bool, String, String) {
        let mut child = Command::new("kubectl")
            .args(args)
            .env("KUBECONFIG", self.home.path().join("config"))
            .env("HOME", self.home.path())
            .env("KUBECACHEDIR", cache(self.home.path()))
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .kill_on_drop(true)
            .spawn()
            .expect("kubectl runs");
        let mut stdin = child.stdin.take().expect("stdin");
        stdin.write_all(input.as_bytes()).await.expect("written");
        drop(stdin);
        let output = tokio::time::timeout(DEADLINE * 2, child.wait_with_output())
            .await
            .expect("in time")
            .expect("ended");
        (
            output.status.success(),
            String::from_utf8_lossy(&output.stdout).into_owned(),
            String::from_utf8_lossy(&output.stderr).into_owned(),
        )
    }

    async fn ok(&self, args: &[&str], input: &str) -> String {
        let (ok, out, err) = self.run(args, input).await;
        assert!(ok, "kubectl {}: {out}{err}", args.join(" "));
        out
    }
}

pub(crate) fn cache(home: &Path) -> std::path::PathBuf {
    home.join("cache")
}

const DEPLOYMENT: &str = "
apiVersion: apps/v1
kind: Deployment
metadata: {name: web, labels: {app: web}}
spec:
  replicas: 2
  selector: {matchLabels: {app: web}}
  template:
    metadata: {labels: {app: web}}
    spec: {containers: [{name: c, image: 'nginx:1.25', ports: [{containerPort: 80}]}]}
";

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn kubectl_applies_both_ways_gets_describes_waits_reads_logs_and_deletes() {
    let Some(k) = Kubectl::start().await else { return };
    let out = k.ok(&["apply", "-f", "-"], DEPLOYMENT).await;
    assert!(out.contains("deployment.apps/web created"), "{out}");
    let out = k.ok(&["apply", "-f", "-"], DEPLOYMENT).await;
    assert!(out.contains("unchanged"), "{out}");
    let out = k
        .ok(
            &["apply", "-f", "-"],
            &DEPLOYMENT.replace("nginx:1.25", "nginx:1.26"),
        )
        .await;
    assert!(out.contains("configured"), "{out}");
    let out = k
        .ok(
            &["apply", "--server-side", "-f", "-"],
            &DEPLOYMENT.replace("nginx:1.25", "nginx:1.27"),
        )
        .await;
    assert!(out.contains("serverside-applied"), "{out}");
    let out = k.ok(&["get", "deployments", "-o", "wide"], "").await;
    assert!(
        out.contains("READY") && out.contains("0/2") && out.contains("nginx:1.27"),
        "{out}"
    );
    let out = k.ok(&["describe", "deployment", "web"], "").await;
    assert!(out.contains("nginx:1.27") && out.contains("2 desired"), "{out}");
    let out = k
        .ok(&["create", "configmap", "c", "--from-literal=a=b"], "")
        .await;
    assert!(out.contains("configmap/c created"), "{out}");
    let out = k.ok(&["create", "namespace", "other"], "").await;
    assert!(out.contains("namespace/other created"), "{out}");
    let out = k
        .ok(
            &[
                "create",
                "deployment",
                "made",
                "--image=nginx",
                "--replicas=3",
                "--port=8080",
            ],
            "",
        )
        .await;
    assert!(out.contains("deployment.apps/made created"), "{out}");
    let out = k.ok(&["scale", "deployment", "made", "--replicas=5"], "").await;
    assert!(out.contains("scaled"), "{out}");
    let out = k
        .ok(
            &["get", "deployment", "made", "-o", "jsonpath={.spec.replicas}"],
            "",
        )
        .await;
    assert_eq!(out, "5");
    let pod = "apiVersion: v1\nkind: Pod\nmetadata: {name: p}\nspec: {nodeName: node-1, containers: [{name: main, image: i}]}\n";
    k.ok(&["apply", "-f", "-"], pod).await;
    let out = k.ok(&["logs", "p"], "").await;
    assert_eq!(out, "hello from main\n");
    let ready = r#"{"status":{"phase":"Running","conditions":[{"type":"Ready","status":"True"}]}}"#;
    k.ok(
        &[
            "patch",
            "pod",
            "p",
            "--subresource=status",
            "--type=merge",
            "-p",
            ready,
        ],
        "",
    )
    .await;
    let out = k
        .ok(&["wait", "--for=condition=Ready", "pod/p", "--timeout=15s"], "")
        .await;
    assert!(out.contains("condition met"), "{out}");
    let out = k.ok(&["get", "pods"], "").await;
    assert!(out.contains("Running"), "{out}");
    let out = k.ok(&["delete", "deployment", "web", "made"], "").await;
    assert!(out.contains("\"web\" deleted"), "{out}");
    let out = k
        .ok(&["delete", "pod", "p", "--force", "--grace-period=0"], "")
        .await;
    assert!(out.contains("\"p\" force deleted"), "{out}");
    let out = k.ok(&["delete", "namespace", "other"], "").await;
    assert!(out.contains("deleted"), "{out}");
    let (ok, _, err) = k.run(&["get", "deployment", "web"], "").await;
    assert!(!ok && err.contains("NotFound"), "{err}");
    let (ok, _, err) = k
        .run(
            &["apply", "-f", "-"],
            "apiVersion: v1\nkind: ConfigMap\nmetadata: {name: x}\nbogus: 1\n",
        )
        .await;
    assert!(!ok && err.contains("unknown field \"bogus\""), "{err}");
    k.server.shutdown().await;
}

const KIND: &str = "
apiVersion: apiextensions.k8s.io/v1
kind: CustomResourceDefinition
metadata: {name: birds.example.com}
spec:
  group: example.com
  names: {plural: birds, singular: bird, kind: Bird, shortNames: [bd]}
  scope: Namespaced
  versions:
  - name: v1
    served: true
    storage: true
    subresources: {status: {}}
    additionalPrinterColumns:
    - {name: Song, type: string, jsonPath: .spec.song}
    - {name: Nest, type: string, priority: 1, jsonPath: '.status.conditions[?(@.type==\"Nest\")].message'}
    schema:
      openAPIV3Schema:
        type: object
        properties:
          spec:
            type: object
            description: What a bird is like.
            properties: {song: {type: string, description: What it sings., maxLength: 20}}
          status: {type: object, x-kubernetes-preserve-unknown-fields: true}
";

const BIRD: &str = "apiVersion: example.com/v1\nkind: Bird\nmetadata: {name: serin}\nspec: {song: trill}\n";

/// What is asked of kubectl, whether it is granted, and a part of what kubectl then says.
#[rustfmt::skip]
const COMMANDS: [(&str, bool, &str); 30] = [
    ("wait crd/birds.example.com --for=condition=Established --timeout=10s", true, "condition met"),
    ("apply -f bird.yaml", true, "bird.example.com/serin created"),
    ("patch bird serin --subresource=status --type=merge -p {\"status\":{\"conditions\":[{\"type\":\"Nest\",\"status\":\"True\",\"message\":\"4_eggs\"}]}}", true, "patched"),
    ("get bd", true, "NAME    SONG\nserin   trill"),
    ("get bd -o wide", true, "NAME    SONG    NEST\nserin   trill   4_eggs"),
    ("describe bird serin", true, "Song:  trill"),
    ("explain bird.spec.song", true, "What it sings."),
    ("explain deployment.spec.replicas", true, "How many pods"),
    ("api-resources --api-group=example.com", true, "birds   bd           example.com/v1   true         Bird"),
    ("annotate bird serin reconcile.fluxcd.io/requestedAt=now", true, "annotated"),
    ("diff -f bird.yaml", true, ""),
    ("patch bird serin --type=merge -p {\"spec\":{\"song\":7}}", false, "spec.song in body must be of type string"),
    ("apply -f deployment.yaml", true, "deployment.apps/web created"),
    ("diff -f changed.yaml", false, "+  replicas: 5"),
    ("diff --server-side -f changed.yaml", false, "+  replicas: 5"),
    ("patch deployment web --type=merge -p {\"spec\":{\"replicas\":\"x\"}}", false, "cannot unmarshal string into Go struct field DeploymentSpec.spec.replicas of type int32"),
    ("patch deployment web -p {\"spec\":{\"replicas\":\"x\"}}", false, "patch: Invalid value: \"map[spec:map[replicas:x]]\""),
    ("rollout restart deployment/web", true, "deployment.apps/web restarted"),
    ("rollout pause deployment/web", true, "paused"),
    ("rollout resume deployment/web", true, "resumed"),
    ("scale deployment/web --replicas=3", true, "scaled"),
    ("set image deployment/web c=nginx:2", true, "image updated"),
    ("get events", true, "No resources found"),
    ("auth can-i delete pods", true, "yes"),
    ("auth whoami", true, "admin"),
    ("get pods --as=dave", false, "impersonation (impersonate-user) is not supported by this server"),
    ("top pods", false, "Metrics API not available"),
    ("delete bird serin", true, "\"serin\" deleted"),
    ("delete crd birds.example.com", true, "deleted"),
    ("get bd", false, "could not find the requested resource"),
];

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn kubectl_does_what_an_engineer_asks_of_it_or_says_why_not() {
    let Some(k) = Kubectl::start().await else { return };
    let file = |name: &str, text: &str| std::fs::write(k.home.path().join(name), text).expect("written");
    file("bird.yaml", BIRD);
    file("deployment.yaml", DEPLOYMENT);
    file("changed.yaml", &DEPLOYMENT.replace("replicas: 2", "replicas: 5"));
    k.ok(&["apply", "-f", "-"], KIND).await;
    // As with a real API server: a definition is written first and served once it is established.
    k.ok(&["wait", "--for=condition=Established", "crd", "--all"], "")
        .await;
    for (line, granted, wanted) in COMMANDS {
        let args: Vec<String> = line
            .split(' ')
            .map(|arg| {
                if arg.ends_with(".yaml") {
                    k.home.path().join(arg).display().to_string()
                } else {
                    arg.to_owned()
                }
            })
            .collect();
        let args: Vec<&str> = args.iter().map(String::as_str).collect();
        let (ok, out, err) = k.run(&args, "").await;
        assert_eq!(ok, granted, "kubectl {line}: {out}{err}");
        assert!(
            format!("{out}{err}").contains(wanted),
            "kubectl {line}: {out}{err}"
        );
    }
    k.server.shutdown().await;
}

#[tokio::test]
async fn a_wrong_token_is_refused_and_health_needs_none() {
    let server = ApiServer::builder().build().await.expect("the server starts");
    let certificates =
        Certificates::generate("test", &["127.0.0.1".parse().expect("an address")]).expect("certificates");
    let address = server
        .serve_tls(
            "127.0.0.1:0".parse().expect("an address"),
            &certificates,
            Tokens::admin("secret"),
        )
        .await
        .expect("listening");
    let with = |token: &str| {
        let text = kubeconfig("test", address, &certificates.authority_pem, token);
        let config: kube::config::Kubeconfig = serde_yaml::from_str(&text).expect("a kubeconfig");
        async move {
            let config =
                kube::Config::from_custom_kubeconfig(config, &kube::config::KubeConfigOptions::default())
                    .await
                    .expect("a config");
            kube::Client::try_from(config).expect("a client")
        }
    };
    let version = with("secret").await.apiserver_version().await.expect("answered");
    assert_eq!(version.major, "1");
    let namespaces: kube::Api<k8s_openapi::api::core::v1::Namespace> = kube::Api::all(with("wrong").await);
    let error = namespaces
        .list(&kube::api::ListParams::default())
        .await
        .expect_err("refused");
    assert!(
        matches!(&error, kube::Error::Api(s) if s.code == 401),
        "{error:?}"
    );
    server.shutdown().await;
}
