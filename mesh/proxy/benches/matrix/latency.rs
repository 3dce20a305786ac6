//! What one hop adds at half load: the 99th percentile through a proxy less that without one, from an open loop.
//!
//! Load, backend and proxy share two processors, and whoever else is on the machine disturbs all of them, so nothing is
//! measured once: `SERIN_BENCH_SLICES` rounds (15) of slices of two seconds each, one slice without a proxy and one per proxy
//! in each round, in random order. A proxy's figure is the median over the rounds of what it added in that round; the interval
//! beside it is the middle 95 % of 2,000 bootstrap samples of the rounds, and so is that of the ratio to Envoy. Everybody gets
//! the same rate: half of what the slowest one reaches with the same connections. The proxies are on the first processor, the
//! load and the backend on the second.

use crate::configs::Kind;
use crate::measure::{Sample, median};
use crate::mesh::{Down, Mesh, Up};
use crate::number;
use crate::openloop::Job;
use crate::peers::{Backend, Peer, Tools};

/// One slice.
const SLICE: f64 = 2.3;
/// Samples of the rounds.
const SAMPLES: usize = 2_000;
/// The goal for the ratio to Envoy.
const GOAL: f64 = 0.6;

struct Case {
    name: &'static str,
    mesh: Mesh,
    load: &'static [&'static str],
    connections: usize,
    http2: bool,
}

const CASES: &[Case] = &[
    Case {
        name: "HTTP/1.1",
        mesh: Mesh::new(Down::Plain, Up::Http1),
        load: &["--h1", "-c", "32"],
        connections: 32,
        http2: false,
    },
    Case {
        name: "HTTP/2 → HTTP/2",
        mesh: Mesh::new(Down::Plain, Up::Http2),
        load: &["-c", "8", "-m", "10"],
        connections: 8,
        http2: true,
    },
    Case {
        name: "TCP",
        mesh: Mesh::new(Down::Plain, Up::Bytes),
        load: &["--h1", "-c", "32"],
        connections: 32,
        http2: false,
    },
];

/// p50, p99 and p99.9 in milliseconds.
type Figures = [f64; 3];

async fn slice(backend: &Backend, job: Job) -> anyhow::Result<Figures> {
    let text = backend.load(job).await?;
    let numbers: Vec<f64> = text
        .split_whitespace()
        .filter_map(|one| one.parse().ok())
        .collect();
    let [p50, p99, p999, _] = numbers[..] else {
        anyhow::bail!("the load said {text:?}");
    };
    Ok([p50, p99, p999].map(|micros| micros / 1_000.0))
}

/// A cheap sequence for orders and samples: xorshift, not the same in each run.
struct Dice(u64);

impl Dice {
    fn below(&mut self, end: usize) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 % end as u64) as usize
    }
}

/// The middle 95 % of a figure over samples of the rounds, with replacement.
fn interval(rounds: usize, dice: &mut Dice, figure: impl Fn(&[usize]) -> f64) -> (f64, f64) {
    let mut figures: Vec<f64> = (0..SAMPLES)
        .map(|_| {
            let sample: Vec<usize> = (0..rounds).map(|_| dice.below(rounds)).collect();
            figure(&sample)
        })
        .collect();
    figures.sort_by(f64::total_cmp);
    let at = |share: f64| figures[((SAMPLES - 1) as f64 * share) as usize];
    (at(0.025), at(0.975))
}

/// Time that a neighbour on the host had while we wanted it, and all time, in ticks.
fn stolen() -> Option<(f64, f64)> {
    let text = std::fs::read_to_string("/proc/stat").ok()?;
    let fields: Vec<f64> = text
        .lines()
        .next()?
        .split_whitespace()
        .skip(1)
        .filter_map(|field| field.parse().ok())
        .collect();
    Some((*fields.get(7)?, fields.iter().sum()))
}

pub(crate) async fn run(tools: &Tools, backend: &Backend) -> anyhow::Result<()> {
    let load = std::fs::read_to_string("/proc/loadavg").unwrap_or_default();
    println!(
        "\nLatency; load average before: {}",
        load.split_whitespace().next().unwrap_or("unknown")
    );
    println!(
        "\n| open loop at half of the slowest one's rate, sidecar | p50 ms | p99 ms | p99.9 ms | p99 added ms [95 %] | × Envoy [95 %] | goal {GOAL} |\n|---|---|---|---|---|---|---|"
    );
    let before = stolen();
    for case in CASES {
        one(case, tools, backend).await?;
    }
    if let (Some(before), Some(after)) = (before, stolen()) {
        let share = (after.0 - before.0) / (after.1 - before.1).max(1.0) * 100.0;
        println!("\nTime stolen by the host's other guests meanwhile: {share:.1} %.");
    }
    Ok(())
}

async fn one(case: &Case, tools: &Tools, backend: &Backend) -> anyhow::Result<()> {
    let mut peers = Vec::new();
    let mut rate = f64::MAX;
    for kind in crate::MESH {
        if let Some(peer) = Peer::start_mesh(tools, *kind, &case.mesh, backend, Some("0")).await? {
            Sample::take(&peer, case.load, 2_000, &peer.url("/")).await?;
            let sample = Sample::take(&peer, case.load, 20_000, &peer.url("/")).await?;
            rate = rate.min(sample.rate / 2.0);
            peers.push(peer);
        }
    }
    let seed = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH)?;
    let mut dice = Dice(seed.as_nanos() as u64 | 1);
    let rounds = number("SERIN_BENCH_SLICES", 15).max(1);
    // The first is the way without a proxy.
    let direct = backend.port_of(case.mesh.up);
    let ports: Vec<u16> = std::iter::once(direct)
        .chain(peers.iter().map(|peer| peer.port))
        .collect();
    let mut figures: Vec<Vec<Figures>> = vec![Vec::new(); ports.len()];
    for _ in 0..rounds {
        let mut order: Vec<usize> = (0..ports.len()).collect();
        for index in (1..order.len()).rev() {
            order.swap(index, dice.below(index + 1));
        }
        for index in order {
            let job = Job {
                port: ports[index],
                rate,
                seconds: SLICE,
                connections: case.connections,
                http2: case.http2,
            };
            figures[index].push(slice(backend, job).await?);
        }
    }
    let added = |index: usize, sample: &[usize]| {
        median(
            sample
                .iter()
                .map(|round| figures[index][*round][1] - figures[0][*round][1]),
        )
    };
    let all: Vec<usize> = (0..rounds).collect();
    let envoy = peers
        .iter()
        .position(|peer| peer.kind == Kind::Envoy)
        .map(|at| at + 1);
    for (index, list) in figures.iter().enumerate() {
        let middle = |at: usize| median(list.iter().map(|three| three[at]));
        let who = match index {
            0 => "no proxy",
            _ => peers[index - 1].kind.name(),
        };
        let (mut hop, mut ratio, mut verdict) = ("-".to_owned(), "-".to_owned(), "-");
        if index > 0 {
            let (low, high) = interval(rounds, &mut dice, |sample| added(index, sample));
            hop = format!("{:.2} [{low:.2}, {high:.2}]", added(index, &all));
        }
        if let Some(envoy) = envoy.filter(|envoy| index > 0 && index != *envoy) {
            // What is added may come out as nothing, or less, which no share can be taken of.
            let share = |sample: &[usize]| match added(envoy, sample) {
                whole if whole > 0.0 => added(index, sample) / whole,
                _ => f64::INFINITY,
            };
            let (low, high) = interval(rounds, &mut dice, share);
            ratio = format!("{:.2} [{low:.2}, {high:.2}]", share(&all));
            verdict = match () {
                () if high <= GOAL => "met",
                () if low > GOAL => "missed",
                () => "not decided: the interval is too wide",
            };
        }
        println!(
            "| {}, {rate:.0}/s, {who} | {:.2} | {:.2} | {:.2} | {hop} | {ratio} | {verdict} |",
            case.name,
            middle(0),
            middle(1),
            middle(2),
        );
    }
    Ok(())
}
