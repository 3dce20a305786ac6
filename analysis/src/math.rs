//! The few special functions that the judges need, in forms that stay accurate for counts up to 10^12.

use statrs::function::erf::{erfc, erfc_inv};
use statrs::function::gamma::ln_gamma;

/// Arguments from which Stirling's series is exact to the last digit.
const STIRLING_FROM: f64 = 10.0;

/// `ln Σ w_i e^(l_i)` without overflow; the weights must not be negative. Negative infinity for no terms.
pub(crate) fn log_sum_exp(terms: impl Iterator<Item = (f64, f64)> + Clone) -> f64 {
    let highest = terms
        .clone()
        .filter(|(weight, _)| *weight > 0.0)
        .map(|(_, log)| log)
        .fold(f64::NEG_INFINITY, f64::max);
    if !highest.is_finite() {
        return highest;
    }
    let sum: f64 = terms.map(|(weight, log)| weight * (log - highest).exp()).sum();
    highest + sum.ln()
}

/// The distribution function of the standard normal distribution.
pub(crate) fn normal_cdf(z: f64) -> f64 {
    0.5 * erfc(-z / std::f64::consts::SQRT_2)
}

/// The density of the standard normal distribution.
pub(crate) fn normal_pdf(z: f64) -> f64 {
    (-0.5 * z * z).exp() / (2.0 * std::f64::consts::PI).sqrt()
}

/// The quantile of the standard normal distribution for a probability between 0 and 1.
pub(crate) fn normal_quantile(p: f64) -> f64 {
    -std::f64::consts::SQRT_2 * erfc_inv(2.0 * p)
}

/// `ln Γ(x) − ((x − 1/2) ln x − x + ln √(2π))`, for `x` at least [`STIRLING_FROM`].
fn stirling_rest(x: f64) -> f64 {
    let y = 1.0 / (x * x);
    (1.0 / 12.0 - y * (1.0 / 360.0 - y * (1.0 / 1260.0 - y * (1.0 / 1680.0 - y / 1188.0)))) / x
}

/// `ln Γ(a + b) − ln Γ(a)` for `a > 0`, `b ≥ 0`: the logarithm of a rising factorial, without the cancellation that a
/// difference of two large logarithms has.
pub(crate) fn ln_rising(a: f64, b: f64) -> f64 {
    if b == 0.0 {
        return 0.0;
    }
    if a < STIRLING_FROM {
        let steps = (STIRLING_FROM - a).ceil();
        if b <= steps {
            return ln_gamma(a + b) - ln_gamma(a);
        }
        // Γ(a+b)/Γ(a) = [Γ(a+s)/Γ(a)] · [Γ(a+b)/Γ(a+s)]
        return ln_gamma(a + steps) - ln_gamma(a) + ln_rising(a + steps, b - steps);
    }
    let sum = a + b;
    (a - 0.5) * (b / a).ln_1p() + b * (sum.ln() - 1.0) + stirling_rest(sum) - stirling_rest(a)
}

/// Brent's method: a root of `f` between `low` and `high`, where it has opposite signs (R. Brent, "Algorithms for
/// Minimization without Derivatives", 1973, chapter 4). Stops when the bracket is below `tolerance`.
pub(crate) fn brent(f: impl Fn(f64) -> f64, low: f64, high: f64, tolerance: f64) -> f64 {
    /// Bisection alone would need some 1,100 halvings at most; Brent's bound is its square, never met in practice.
    const ITERATIONS: usize = 1000;
    let (mut a, mut b) = (low, high);
    let (mut fa, mut fb) = (f(a), f(b));
    let (mut c, mut fc) = (a, fa);
    let mut step = b - a;
    let mut previous = step;
    for _ in 0..ITERATIONS {
        if fc.abs() < fb.abs() {
            (a, b, c) = (b, c, b);
            (fa, fb, fc) = (fb, fc, fb);
        }
        let limit = 2.0 * f64::EPSILON * b.abs() + 0.5 * tolerance;
        let middle = 0.5 * (c - b);
        if middle.abs() <= limit || fb == 0.0 {
            return b;
        }
        if previous.abs() >= limit && fa.abs() > fb.abs() {
            let s = fb / fa;
            let (mut p, mut q) = if a == c {
                (2.0 * middle * s, 1.0 - s)
            } else {
                let (q, r) = (fa / fc, fb / fc);
                (
                    s * (2.0 * middle * q * (q - r) - (b - a) * (r - 1.0)),
                    (q - 1.0) * (r - 1.0) * (s - 1.0),
                )
            };
            if p > 0.0 {
                q = -q;
            }
            p = p.abs();
            if 2.0 * p < (3.0 * middle * q - (limit * q).abs()).min((previous * q).abs()) {
                (previous, step) = (step, p / q);
            } else {
                (previous, step) = (middle, middle);
            }
        } else {
            (previous, step) = (middle, middle);
        }
        (a, fa) = (b, fb);
        b += if step.abs() > limit {
            step
        } else {
            limit.copysign(middle)
        };
        fb = f(b);
        if (fb > 0.0) == (fc > 0.0) {
            (c, fc) = (a, fa);
            previous = b - a;
            step = previous;
        }
    }
    b
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_normal_distribution_has_its_tabulated_values() {
        assert!((normal_cdf(1.959_963_984_540_054) - 0.975).abs() < 1e-9);
        assert!((normal_quantile(0.99) - 2.326_347_874_040_841).abs() < 1e-9);
        assert!((normal_quantile(0.5)).abs() < 1e-12);
        assert!((normal_pdf(0.0) - 0.398_942_280_401_432_7).abs() < 1e-15);
    }

    #[test]
    fn a_rising_factorial_agrees_with_products_and_survives_a_trillion() {
        let product: f64 = (0..25).map(|i| (0.5 + f64::from(i)).ln()).sum();
        assert!((ln_rising(0.5, 25.0) - product).abs() < 1e-10);
        let product: f64 = (0..40).map(|i| (1e12 + f64::from(i)).ln()).sum();
        assert!((ln_rising(1e12, 40.0) - product).abs() < 1e-9);
        assert!(ln_rising(1.0, 1e12).is_finite());
    }

    #[test]
    fn brent_finds_the_root_of_a_cubic() {
        let root = brent(|x| (x + 3.0) * (x - 1.0) * (x - 1.0), -4.0, 4.0 / 3.0, 1e-12);
        assert!((root + 3.0).abs() < 1e-9, "{root}");
    }
}
