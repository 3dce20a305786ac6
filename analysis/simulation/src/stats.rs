//! Small statistics of results.

use statrs::function::beta::beta_reg;

/// The two-sided 95 % confidence interval of a probability (C. Clopper and E. Pearson 1934), in 0 to 1.
pub fn confidence(hits: u64, runs: u64) -> (f64, f64) {
    let (x, n) = (hits as f64, runs as f64);
    let solve = |a: f64, b: f64, target: f64| {
        let (mut low, mut high) = (0.0, 1.0);
        for _ in 0..60 {
            let middle: f64 = f64::midpoint(low, high);
            if beta_reg(a, b, middle) < target {
                low = middle;
            } else {
                high = middle;
            }
        }
        f64::midpoint(low, high)
    };
    let lower = if hits == 0 {
        0.0
    } else {
        solve(x, n - x + 1.0, 0.025)
    };
    let upper = if hits == runs {
        1.0
    } else {
        solve(x + 1.0, n - x, 0.975)
    };
    (lower, upper)
}

/// The `q`-quantile of sorted times out of `runs`, of which those that are missing took longer: `None` when the quantile
/// is among them.
pub fn quantile(sorted: &[u32], runs: u64, q: f64) -> Option<u32> {
    let rank = (q * runs as f64).ceil().max(1.0) as usize;
    sorted.get(rank - 1).copied()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// 0 of 10: 1 - 0.025^(1/10); 5 of 10: the tables' 18.7 to 81.3 %.
    #[test]
    fn confidence_intervals_are_those_of_the_tables() {
        assert!((confidence(0, 10).1 - 0.3085).abs() < 1e-4);
        let (lower, upper) = confidence(5, 10);
        assert!((lower - 0.1871).abs() < 1e-4 && (upper - 0.8129).abs() < 1e-4);
        assert_eq!(confidence(10, 10).1, 1.0);
    }

    #[test]
    fn a_quantile_beyond_what_was_found_is_not_made_up() {
        assert_eq!(quantile(&[3, 5, 9], 4, 0.5), Some(5));
        assert_eq!(quantile(&[3, 5, 9], 4, 0.95), None);
    }
}
