//! What happens in which order.

use std::time::{Duration, Instant};

use anyhow::{Context as _, bail};
use http::{HeaderName, HeaderValue};
use kube::Client;
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;

use super::observe::{self, Fact, NAMESPACE, Timeline};
use super::report::{MemoryReport, Outcome, ReleaseReport, Report};
use super::repository::{DemoRepository, Release};
use super::{Options, view};
use crate::cluster::server::Settings;
use crate::cluster::{Cluster, process};
use crate::commands::apply::apply_manifests;
use crate::load::{Load, Plan};

const NAMESPACE_MANIFEST: &str = include_str!("../../../examples/demo/cluster/namespace.yaml");
const SYNC_MANIFEST: &str = include_str!("../../../examples/demo/cluster/sync.yaml");
/// Host that the Canary's VirtualService serves at the gateway.
const HOST: &str = "podinfo.example.com";
/// Response header that carries the version of whoever answered.
const VERSION_HEADER: HeaderName = HeaderName::from_static("x-podinfo-version");
/// Load that runs before the first push, so that the primary has a record.
const WARM_UP: Duration = Duration::from_secs(3);
/// Load that runs after the last verdict, so that a late loss would show.
const COOL_DOWN: Duration = Duration::from_secs(2);

const GOOD: Release = Release {
    version: "2.0.0",
    error_percent: 0,
};
const BAD: Release = Release {
    version: "3.0.0",
    error_percent: 30,
};

/// Plays the story and returns its report. Whatever ends it early is an error that names the point.
pub(super) async fn tell(cluster: &Cluster, options: &Options) -> anyhow::Result<Report> {
    let (timeline, announced) = Timeline::new();
    let screen = view::Screen::start(announced);
    let note = |text: String| timeline.add(Fact::Note { text });

    let port = options.gateway_port.map_or_else(free_port, Ok)?;
    let settings = Settings::with_gateway_port(port);
    let started = Instant::now();
    process::start(cluster, &settings.to_arguments(), |line| note(line.to_owned())).await?;
    let up = started.elapsed().as_secs_f64();
    note(format!(
        "cluster up after {up:.1} s, gateway at http://127.0.0.1:{port}"
    ));

    let repository = DemoRepository::create(&cluster.directory().join("demo"))?;
    let client = cluster.client()?;
    let _watches = observe::start(&client, &timeline);
    begin(&client, &repository).await?;
    let settled = until(
        &timeline,
        options.patience,
        0.0,
        "version 1 to run",
        |fact| matches!(fact, Fact::Phase { phase, .. } if phase == "Initialized"),
    );
    settled.await?;

    let mut plan = Plan::new(format!("http://127.0.0.1:{port}/").parse()?, options.rate)?;
    plan.headers
        .push((http::header::HOST, HeaderValue::from_static(HOST)));
    plan.group_by = Some(VERSION_HEADER);
    wait_for_gateway(&plan, options.patience).await?;
    note(format!("load: {} requests a second to version 1", options.rate));
    let load_started = timeline.now();
    let load = Load::start(plan, CancellationToken::new());
    screen.watch(&load, &timeline);
    // The story's own pace, not a wait for something.
    tokio::time::sleep(WARM_UP).await;

    let good = release(&timeline, &repository, GOOD, options).await?;
    let bad = release(&timeline, &repository, BAD, options).await?;
    tokio::time::sleep(COOL_DOWN).await;
    let memory = MemoryReport::read(cluster);
    let counters = load.stop().await?;
    if let Some(first) = counters
        .groups
        .get(BAD.version)
        .and_then(|group| group.first_failure_us)
    {
        let t = load_started + first as f64 / 1e6;
        timeline.add_at(
            t,
            Fact::FirstBadAnswer {
                version: BAD.version.to_owned(),
            },
        );
    }
    let steps = steps_of(&client).await?;
    screen.finish().await;
    Ok(Report::new(
        up,
        &timeline.events(),
        &counters,
        vec![good, bad],
        steps,
        memory,
    ))
}

/// Applies the namespace and the sync; everything else comes from git.
async fn begin(client: &Client, repository: &DemoRepository) -> anyhow::Result<()> {
    apply_manifests(client, NAMESPACE_MANIFEST, "examples/demo/cluster/namespace.yaml").await?;
    let sync = SYNC_MANIFEST.replace("${REPOSITORY}", &repository.url());
    apply_manifests(client, &sync, "examples/demo/cluster/sync.yaml").await
}

/// Pushes a release and follows it to its end.
async fn release(
    timeline: &Timeline,
    repository: &DemoRepository,
    release: Release,
    options: &Options,
) -> anyhow::Result<ReleaseReport> {
    let pushed = timeline.now();
    let commit = repository.release(release)?;
    timeline.add_at(
        pushed,
        Fact::Pushed {
            version: release.version.to_owned(),
            commit: commit.clone(),
        },
    );
    let what = format!("release {} to start", release.version);
    until(
        timeline,
        options.patience,
        pushed,
        &what,
        |fact| matches!(fact, Fact::Phase { phase, .. } if phase == "Progressing"),
    )
    .await?;
    let what = format!("release {} to end", release.version);
    let end = until(
        timeline,
        options.patience,
        pushed,
        &what,
        |fact| matches!(fact, Fact::Phase { phase, .. } if phase == "Succeeded" || phase == "Failed"),
    )
    .await?;
    let outcome = match &end.fact {
        Fact::Phase { phase, .. } if phase == "Succeeded" => Outcome::Promoted,
        _ => Outcome::RolledBack,
    };
    if outcome == Outcome::RolledBack {
        until(
            timeline,
            options.patience,
            pushed,
            "weight 0 to be live",
            |fact| matches!(fact, Fact::WeightLive { weight: 0, .. }),
        )
        .await?;
    }
    let wanted = if release.error_percent == 0 {
        Outcome::Promoted
    } else {
        Outcome::RolledBack
    };
    Ok(ReleaseReport {
        version: release.version.to_owned(),
        commit,
        error_percent: release.error_percent,
        pushed_at: pushed,
        ended_at: end.t,
        wanted,
        outcome,
    })
}

async fn until(
    timeline: &Timeline,
    patience: Duration,
    since: f64,
    what: &str,
    wanted: impl Fn(&Fact) -> bool,
) -> anyhow::Result<observe::Entry> {
    timeout(patience, timeline.until(since, wanted))
        .await
        .with_context(|| {
            format!(
                "waited {} s in vain for {what}; the story so far:\n{}",
                patience.as_secs(),
                view::so_far(timeline)
            )
        })
}

/// The gateway's route is live when the VirtualService is acknowledged; the first request proves the way through.
async fn wait_for_gateway(plan: &Plan, patience: Duration) -> anyhow::Result<()> {
    const ATTEMPTS: u32 = 200;
    let mut single = plan.clone();
    single.rate = 50.0;
    single.duration = Some(Duration::from_millis(20));
    let tries = async {
        for _ in 0..ATTEMPTS {
            let counters = Load::start(single.clone(), CancellationToken::new())
                .finish()
                .await?;
            if counters.statuses.contains_key(&200) {
                return anyhow::Ok(());
            }
        }
        bail!("the gateway at {} does not reach the application", plan.url)
    };
    timeout(patience, tries).await.context("wait for the gateway")?
}

/// Times between the writing of a weight and its being live everywhere, from the Canary's own history, in seconds.
async fn steps_of(client: &Client) -> anyhow::Result<Vec<f64>> {
    let api: kube::Api<serin_crds::flagger::Canary> = kube::Api::namespaced(client.clone(), NAMESPACE);
    let canary = api.get(observe::APPLICATION).await.context("read the Canary")?;
    let history = canary.status.map(|status| status.history).unwrap_or_default();
    Ok(history
        .iter()
        .filter_map(|step| Some((step.started_at.as_ref()?, step.live_at.as_ref()?)))
        .map(|(written, live)| live.0.duration_since(written.0).as_secs_f64().max(0.0))
        .collect())
}

/// 8080 if nobody has it, any other otherwise.
fn free_port() -> anyhow::Result<u16> {
    for port in [8080, 0] {
        if let Ok(listener) = std::net::TcpListener::bind(("127.0.0.1", port)) {
            return Ok(listener.local_addr()?.port());
        }
    }
    bail!("no port is free for the gateway; say one with --gateway-port")
}
