//! Random numbers: a fixed generator, and exact samplers of the distributions that counts have.

/// xoshiro256++ (D. Blackman and S. Vigna 2019), seeded by SplitMix64 as its authors advise. The stream of a seed is
/// the same on every machine, which is what makes a simulation repeatable.
#[derive(Clone, Debug)]
pub struct Random {
    state: [u64; 4],
}

fn split_mix(state: &mut u64) -> u64 {
    *state = state.wrapping_add(0x9E37_79B9_7F4A_7C15);
    let mut z = *state;
    z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    z ^ (z >> 31)
}

/// A seed from a name and a number: other names give unrelated streams.
pub fn seed(name: &str, number: u64) -> u64 {
    // FNV-1a, then mixed: neighbouring numbers must not give neighbouring seeds.
    let mut hash = name.bytes().fold(0xcbf2_9ce4_8422_2325_u64, |hash, byte| {
        (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3)
    });
    hash ^= number.wrapping_mul(0x9E37_79B9_7F4A_7C15);
    split_mix(&mut hash)
}

impl Random {
    /// The stream of a seed.
    pub fn new(seed: u64) -> Self {
        let mut mixing = seed;
        Self {
            state: std::array::from_fn(|_| split_mix(&mut mixing)),
        }
    }

    fn next(&mut self) -> u64 {
        let [a, b, c, d] = self.state;
        let result = a.wrapping_add(d).rotate_left(23).wrapping_add(a);
        let shifted = b << 17;
        let (c, d) = (c ^ a, d ^ b);
        let (b, a) = (b ^ c, a ^ d);
        self.state = [a, b, c ^ shifted, d.rotate_left(45)];
        result
    }

    /// Uniform in [0, 1), with 53 bits.
    pub fn unit(&mut self) -> f64 {
        (self.next() >> 11) as f64 / (1_u64 << 53) as f64
    }

    /// True with probability `p`.
    pub fn chance(&mut self, p: f64) -> bool {
        self.unit() < p
    }

    /// Standard normal (G. Box and M. Muller 1958; one of the pair is thrown away).
    pub fn normal(&mut self) -> f64 {
        let radius = (-2.0 * (1.0 - self.unit()).ln()).sqrt();
        radius * (std::f64::consts::TAU * self.unit()).cos()
    }

    /// Exponential with mean 1.
    pub fn exponential(&mut self) -> f64 {
        -(1.0 - self.unit()).ln()
    }

    /// At least 1, with mean `mean`: how many attempts a thing takes that succeeds with probability `1 / mean`.
    pub fn geometric(&mut self, mean: f64) -> u64 {
        if mean <= 1.0 {
            return 1;
        }
        1 + (self.exponential() / -(1.0 - 1.0 / mean).ln()).floor() as u64
    }

    /// Poisson. By inversion below 10, by transformed rejection above (W. Hörmann 1993, PTRS): exact, O(1).
    pub fn poisson(&mut self, mean: f64) -> u64 {
        if mean <= 0.0 {
            return 0;
        }
        if mean < 10.0 {
            let mut p = (-mean).exp();
            let mut u = self.unit();
            let mut k = 0;
            while u > p && k < 200 {
                u -= p;
                k += 1;
                p *= mean / k as f64;
            }
            return k;
        }
        let b = 0.931 + 2.53 * mean.sqrt();
        let a = -0.059 + 0.02483 * b;
        let inverse_alpha = 1.1239 + 1.1328 / (b - 3.4);
        let v_r = 0.9277 - 3.6224 / (b - 2.0);
        loop {
            let u = self.unit() - 0.5;
            let v = self.unit();
            let us = 0.5 - u.abs();
            let k = ((2.0 * a / us + b) * u + mean + 0.43).floor();
            if us >= 0.07 && v <= v_r {
                return k as u64;
            }
            if k < 0.0 || (us < 0.013 && v > us) {
                continue;
            }
            let left = (v * inverse_alpha / (a / (us * us) + b)).ln();
            if left <= k * mean.ln() - mean - ln_factorial(k as u64) {
                return k as u64;
            }
        }
    }

    /// Binomial. By inversion while `n·p` is below 10, by transformed rejection above (W. Hörmann 1993, BTRS): exact.
    pub fn binomial(&mut self, n: u64, p: f64) -> u64 {
        if n == 0 || p <= 0.0 {
            return 0;
        }
        if p >= 1.0 {
            return n;
        }
        if p > 0.5 {
            return n - self.binomial(n, 1.0 - p);
        }
        let count = n as f64;
        let q = 1.0 - p;
        if count * p < 10.0 {
            let ratio = p / q;
            let mut f = (count * (-p).ln_1p()).exp();
            let mut u = self.unit();
            let mut k = 0;
            while u > f && k < n {
                u -= f;
                k += 1;
                f *= ratio * (n - k + 1) as f64 / k as f64;
            }
            return k;
        }
        let spread = (count * p * q).sqrt();
        let b = 1.15 + 2.53 * spread;
        let a = -0.0873 + 0.0248 * b + 0.01 * p;
        let c = count * p + 0.5;
        let v_r = 0.92 - 4.2 / b;
        let alpha = (2.83 + 5.1 / b) * spread;
        let log_odds = (p / q).ln();
        let m = ((count + 1.0) * p).floor();
        let h = ln_factorial(m as u64) + ln_factorial((count - m) as u64);
        loop {
            let u = self.unit() - 0.5;
            let v = self.unit();
            let us = 0.5 - u.abs();
            let k = ((2.0 * a / us + b) * u + c).floor();
            if us >= 0.07 && v <= v_r {
                return k as u64;
            }
            if k < 0.0 || k > count {
                continue;
            }
            let left = (v * alpha / (a / (us * us) + b)).ln();
            let right = h - ln_factorial(k as u64) - ln_factorial((count - k) as u64) + (k - m) * log_odds;
            if left <= right {
                return k as u64;
            }
        }
    }
}

/// ln(k!), from a table for small k and by Stirling's series (error below 1e-12 from 16 on).
fn ln_factorial(k: u64) -> f64 {
    const TABLE: [f64; 16] = [
        0.0,
        0.0,
        std::f64::consts::LN_2,
        1.791_759_469_228_055,
        3.178_053_830_347_946,
        4.787_491_742_782_046,
        6.579_251_212_010_101,
        8.525_161_361_065_415,
        10.604_602_902_745_25,
        12.801_827_480_081_469,
        15.104_412_573_075_516,
        17.502_307_845_873_887,
        19.987_214_495_661_885,
        22.552_163_853_123_42,
        25.191_221_182_738_68,
        27.899_271_383_840_89,
    ];
    if let Some(value) = TABLE.get(k as usize) {
        return *value;
    }
    let x = k as f64 + 1.0;
    let x2 = x * x;
    (x - 0.5) * x.ln() - x
        + 0.918_938_533_204_672_8
        + (1.0 / 12.0 - (1.0 / 360.0 - 1.0 / (1260.0 * x2)) / x2) / x
}

#[cfg(test)]
mod tests {
    use super::*;

    fn moments(mut draw: impl FnMut(&mut Random) -> u64) -> (f64, f64) {
        const DRAWS: u32 = 40_000;
        let mut random = Random::new(7);
        let (mut sum, mut squares) = (0.0, 0.0);
        for _ in 0..DRAWS {
            let value = draw(&mut random) as f64;
            sum += value;
            squares += value * value;
        }
        let mean = sum / f64::from(DRAWS);
        (mean, squares / f64::from(DRAWS) - mean * mean)
    }

    #[test]
    fn samplers_have_the_mean_and_the_variance_of_their_distributions() {
        for mean in [0.02, 3.0, 9.9, 10.1, 90.0, 900.0] {
            let (found, variance) = moments(|random| random.poisson(mean));
            // Five standard errors of the mean and of the variance (2 + 1/mean over the draws, relative).
            assert!(
                (found - mean).abs() < 5.0 * (mean / 40_000.0).sqrt(),
                "{mean}: {found}"
            );
            assert!(
                (variance / mean - 1.0).abs() < 5.0 * ((2.0 + 1.0 / mean) / 40_000.0).sqrt(),
                "{mean}: {variance}"
            );
        }
        for (n, p) in [
            (10, 0.3),
            (1000, 0.001),
            (100, 0.1),
            (900, 0.4),
            (90, 0.9),
            (1_000_000, 0.0005),
        ] {
            let (found, variance) = moments(|random| random.binomial(n, p));
            let (mean, expected) = (n as f64 * p, n as f64 * p * (1.0 - p));
            assert!(
                (found - mean).abs() < 5.0 * (expected / 40_000.0).sqrt(),
                "{n} {p}: {found}"
            );
            assert!(
                (variance / expected - 1.0).abs() < 5.0 * ((2.0 + 1.0 / expected) / 40_000.0).sqrt(),
                "{n} {p}: {variance}"
            );
        }
        let (mean, _) = moments(|random| random.geometric(4.0));
        assert!((mean - 4.0).abs() < 0.1, "{mean}");
    }

    #[test]
    fn small_binomials_have_their_exact_probabilities() {
        let mut random = Random::new(3);
        let mut seen = [0.0_f64; 4];
        for _ in 0..80_000 {
            seen[random.binomial(3, 0.25) as usize] += 1.0 / 80_000.0;
        }
        for (found, exact) in seen
            .iter()
            .zip([27.0 / 64.0, 27.0 / 64.0, 9.0 / 64.0, 1.0 / 64.0])
        {
            assert!((found - exact).abs() < 0.01, "{seen:?}");
        }
    }

    #[test]
    fn factorials_agree_where_table_and_series_meet() {
        let mut sum = 0.0;
        for k in 1..60_u64 {
            sum += (k as f64).ln();
            assert!((ln_factorial(k) - sum).abs() < 1e-10, "{k}");
        }
    }

    #[test]
    fn a_seed_is_the_same_everywhere_and_names_give_other_streams() {
        assert_eq!(Random::new(1).next(), Random::new(1).next());
        assert_ne!(seed("a", 1), seed("a", 2));
        assert_ne!(seed("a", 1), seed("b", 1));
    }
}
