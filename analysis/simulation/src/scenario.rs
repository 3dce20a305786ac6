//! What a simulated hour is like.

use crate::latency::Latency;

/// How requests arrive.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Arrivals {
    /// Independent of each other, at a constant rate.
    Poisson,
    /// Two states: for some ten seconds a minute the rate is four times the usual one.
    Bursts,
    /// The rate swings by four fifths around its mean, one day pressed into the hour.
    Diurnal,
}

/// What errors are like on a healthy system. Both arms suffer the same.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Errors {
    /// Each request fails for itself.
    Independent,
    /// A dependency that both share fails for 20 s on average, every five minutes: 30 % of all requests.
    SharedOutage,
    /// A failing client repeats its request `mean` times on average within the second, at the same arm.
    ClientClusters {
        /// Requests of a failing client.
        mean: f64,
    },
    /// Each failure is repeated up to three times, and each repetition goes to either arm by its weight and fails with
    /// this probability.
    RetryStorm {
        /// Probability that a repetition fails too.
        again: f64,
    },
    /// A fresh canary fails this many times as often at first, decaying with a time constant of 20 s.
    ColdCache {
        /// Ratio at the start.
        factor: f64,
    },
    /// One of the primary's ten pods fails this share of its requests.
    BadPrimaryPod {
        /// Share of its requests that fail.
        share: f64,
    },
}

/// Something done about errors that are not exchangeable.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mitigation {
    /// Nothing.
    None,
    /// A client's failures within a second count once: the metric `errors-by-client`.
    ByClient,
    /// What a fresh canary does in its first 120 s does not count.
    WarmUp,
}

/// A scenario.
#[derive(Clone, Debug)]
pub struct Scenario {
    /// Its name; also its seed.
    pub name: String,
    /// Requests per second, both arms.
    pub rps: f64,
    /// Shares of the canary, each from a second on, ascending.
    pub ladder: Vec<(u64, f64)>,
    /// How requests arrive.
    pub arrivals: Arrivals,
    /// Whether clients stay at the arm that they met: then the share is that of 200 clients of unequal weight.
    pub sticky: bool,
    /// Share of failing requests of a healthy release.
    pub base: f64,
    /// What makes them fail.
    pub errors: Errors,
    /// Share of failing requests of this canary.
    pub canary: f64,
    /// How long requests take, where latency is judged.
    pub latency: Option<Latency>,
    /// The canary's durations as a multiple of the primary's.
    pub slower: f64,
    /// What is done about clustered errors.
    pub mitigation: Mitigation,
    /// Every how many seconds the controller dies and goes on from its stored state.
    pub restart_every: Option<u64>,
    /// Seconds.
    pub seconds: u64,
    /// Whether requests of both arms are exchangeable within a second, so that the bound is promised.
    pub exchangeable: bool,
}

impl Scenario {
    /// Healthy, 100 requests a second, a tenth of them to the canary, an hour.
    pub fn healthy(name: &str) -> Self {
        Self {
            name: name.to_owned(),
            rps: 100.0,
            ladder: vec![(0, 0.1)],
            arrivals: Arrivals::Poisson,
            sticky: false,
            base: 0.005,
            errors: Errors::Independent,
            canary: 0.005,
            latency: None,
            slower: 1.0,
            mitigation: Mitigation::None,
            restart_every: None,
            seconds: 3600,
            exchangeable: true,
        }
    }

    /// A canary that fails more than the primary.
    pub fn regression(rps: f64, share: f64, base: f64, canary: f64) -> Self {
        let text = |share: f64| format!("{}", (share * 1e5).round() / 1e3);
        Self {
            rps,
            ladder: vec![(0, share)],
            base,
            canary,
            ..Self::healthy(&format!(
                "errors {} % -> {} %, {rps} rps, {} % share",
                text(base),
                text(canary),
                text(share)
            ))
        }
    }

    /// Whether the canary is as good as the primary.
    pub fn is_healthy(&self) -> bool {
        self.canary <= self.base && self.slower <= 1.0
    }
}

/// The scenarios in which nothing is wrong with the canary.
pub fn healthy() -> Vec<Scenario> {
    let ladder = vec![
        (0, 0.05),
        (300, 0.1),
        (600, 0.2),
        (1200, 0.3),
        (1800, 0.5),
        (2700, 0.8),
    ];
    let named = Scenario::healthy;
    let with_rate = |name: &str, rps: f64, base: f64| Scenario {
        rps,
        base,
        canary: base,
        ..named(name)
    };
    let unequal = |name: &str, errors: Errors, mitigation: Mitigation| Scenario {
        errors,
        mitigation,
        exchangeable: mitigation != Mitigation::None,
        ..named(name)
    };
    vec![
        named("Poisson, independent errors"),
        with_rate("little traffic: 10 rps", 10.0, 0.005),
        with_rate("much traffic: 1,000 rps, 0.1 % errors", 1000.0, 0.001),
        with_rate("many errors: 10 %", 100.0, 0.1),
        Scenario {
            ladder: ladder.clone(),
            ..named("weight ladder 5 to 80 %")
        },
        Scenario {
            arrivals: Arrivals::Bursts,
            ladder: ladder.clone(),
            ..named("bursts, weight ladder")
        },
        Scenario {
            arrivals: Arrivals::Diurnal,
            ..named("diurnal traffic")
        },
        Scenario {
            sticky: true,
            ladder: ladder.clone(),
            ..named("sticky sessions, weight ladder")
        },
        Scenario {
            errors: Errors::SharedOutage,
            ladder,
            ..named("shared dependency outages, weight ladder")
        },
        Scenario {
            errors: Errors::RetryStorm { again: 0.6 },
            ..named("retry storms over both arms")
        },
        Scenario {
            restart_every: Some(37),
            ..named("controller restarts every 37 s")
        },
        Scenario {
            errors: Errors::BadPrimaryPod { share: 0.2 },
            ..named("one bad pod of the primary's ten")
        },
        unequal(
            "clients repeat failures 3 times, counted by client",
            Errors::ClientClusters { mean: 3.0 },
            Mitigation::ByClient,
        ),
        unequal(
            "cold caches x 5, warm-up of 120 s",
            Errors::ColdCache { factor: 5.0 },
            Mitigation::WarmUp,
        ),
        unequal(
            "clients repeat failures 3 times, nothing done",
            Errors::ClientClusters { mean: 3.0 },
            Mitigation::None,
        ),
        unequal(
            "cold caches x 5, nothing done",
            Errors::ColdCache { factor: 5.0 },
            Mitigation::None,
        ),
    ]
}

/// Scenarios of the judges that compare nothing by counts: an absolute guard, and numbers per minute. Their limit is 1 %.
pub fn absolute() -> Vec<Scenario> {
    let of = |name: &str, base: f64, canary: f64| Scenario {
        base,
        canary,
        ..Scenario::healthy(name)
    };
    vec![
        of("at the limit: 1 % errors of both", 0.01, 0.01),
        Scenario {
            arrivals: Arrivals::Diurnal,
            ..of("at the limit, diurnal traffic", 0.01, 0.01)
        },
        Scenario {
            errors: Errors::SharedOutage,
            ..of("0.5 % errors, shared dependency outages", 0.005, 0.005)
        },
        of("both releases fail 5 %", 0.05, 0.05),
        of("the canary fails 5 %, the primary 0.5 %", 0.005, 0.05),
    ]
}

/// The scenarios in which the canary is worse.
pub fn regressions() -> Vec<Scenario> {
    vec![
        Scenario::regression(100.0, 0.1, 0.001, 0.1),
        Scenario::regression(1000.0, 0.1, 0.001, 0.005),
        Scenario::regression(100.0, 0.1, 0.001, 0.005),
        Scenario::regression(100.0, 0.1, 0.001, 0.02),
        Scenario::regression(100.0, 0.05, 0.001, 0.1),
        Scenario::regression(10.0, 0.1, 0.001, 0.1),
        Scenario::regression(100.0, 0.1, 0.005, 0.015),
        Scenario {
            // One of five pods of the canary fails half of its requests.
            name: "one bad pod of the canary's five (50 %), 100 rps, 10 % share".to_owned(),
            ..Scenario::regression(100.0, 0.1, 0.001, 0.2 * 0.5 + 0.8 * 0.001)
        },
    ]
}

/// The scenarios in which latency is judged; the first ones are healthy.
pub fn latencies() -> Vec<Scenario> {
    let log_normal = Latency::LogNormal {
        median_ms: 40.0,
        sigma: 0.6,
    };
    let bimodal = Latency::Bimodal {
        hit_ms: 5.0,
        miss_ms: 200.0,
        misses: 0.1,
    };
    let heavy = Latency::HeavyTail {
        least_ms: 10.0,
        shape: 1.5,
    };
    let of = |name: &str, latency: Latency, slower: f64| Scenario {
        rps: 1000.0,
        latency: Some(latency),
        slower,
        seconds: if slower > 1.0 { 900 } else { 3600 },
        ..Scenario::healthy(name)
    };
    vec![
        of("latency equal, log-normal", log_normal, 1.0),
        of("latency equal, bimodal", bimodal, 1.0),
        of("latency equal, heavy tail", heavy, 1.0),
        Scenario {
            arrivals: Arrivals::Bursts,
            ladder: vec![(0, 0.05), (900, 0.2), (1800, 0.5), (2700, 0.8)],
            restart_every: Some(37),
            ..of(
                "latency equal, log-normal, bursts, weight ladder, restarts every 37 s",
                log_normal,
                1.0,
            )
        },
        of(
            "latency +50 %, log-normal, 1,000 rps, 10 % share",
            log_normal,
            1.5,
        ),
        of("latency +50 %, bimodal, 1,000 rps, 10 % share", bimodal, 1.5),
        of("latency +50 %, heavy tail, 1,000 rps, 10 % share", heavy, 1.5),
    ]
}
