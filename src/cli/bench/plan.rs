//! What a run of load will do, decided before it starts: when each request is sent and how long each reply may be.
//!
//! Called by [`super`]; pure arithmetic. It must give the same plan for the same seed on every machine: no clock, no
//! randomness of the system.

use std::{fmt, ops::RangeInclusive, str::FromStr, time::Duration};

/// A stream of numbers from a fixed seed (SplitMix64): small, the same everywhere, good enough to space requests.
#[derive(Debug, Clone)]
struct Numbers(u64);

impl Numbers {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mixed = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }

    /// Above 0, at most 1: its logarithm is finite.
    fn unit(&mut self) -> f64 {
        ((self.next() >> 11) + 1) as f64 / (1u64 << 53) as f64
    }
}

/// When each of `num_requests` is sent, from the start: a Poisson process of `rate` requests a second.
///
/// `rate` is above zero and finite: [`request_rate`] lets no other through.
pub(super) fn arrivals(seed: u64, rate: f64, num_requests: usize) -> Vec<Duration> {
    let (mut numbers, mut at) = (Numbers(seed), 0.0);
    let gap = |numbers: &mut Numbers| -numbers.unit().ln() / rate;
    (0..num_requests)
        .map(|_| {
            at += gap(&mut numbers);
            Duration::from_secs_f64(at)
        })
        .collect()
}

/// Reads `--request-rate`.
pub(super) fn request_rate(text: &str) -> Result<f64, String> {
    match text.trim().parse::<f64>() {
        // Slower than one in a quarter of an hour is no load, and its times would leave what a duration holds.
        Ok(rate) if (0.001..=1e6).contains(&rate) => Ok(rate),
        Ok(_) => Err("must be from 0.001 to 1000000 requests a second".into()),
        Err(error) => Err(error.to_string()),
    }
}

/// `64`, or `32..256` for a length drawn evenly from 32 to 256, both included.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Lengths(RangeInclusive<usize>);

impl Lengths {
    /// The length of request `index`, whatever was asked of the others.
    pub(super) fn of(&self, seed: u64, index: usize) -> usize {
        let (low, high) = (*self.0.start(), *self.0.end());
        let width = (high - low) as u128 + 1;
        let mut numbers = Numbers(seed ^ (index as u64).wrapping_mul(0xd134_2543_de82_ef95));
        low + ((u128::from(numbers.next()) * width) >> 64) as usize
    }
}

impl fmt::Display for Lengths {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0.start() == self.0.end() {
            true => write!(f, "{}", self.0.start()),
            false => write!(f, "{}..{}", self.0.start(), self.0.end()),
        }
    }
}

impl FromStr for Lengths {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let number = |text: &str| match text.trim().parse::<usize>() {
            Ok(0) => Err("a reply has at least 1 token".to_owned()),
            Ok(number) => Ok(number),
            Err(error) => Err(format!("{text:?} is no number of tokens: {error}")),
        };
        let (low, high) = match text.split_once("..") {
            Some((low, high)) => (number(low)?, number(high)?),
            None => (number(text)?, number(text)?),
        };
        match low <= high {
            true => Ok(Lengths(low..=high)),
            false => Err(format!("{low}..{high} is empty: write the smaller number first")),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn arrivals_are_the_same_for_a_seed_and_come_at_the_rate() {
        let times = arrivals(7, 20.0, 20_000);
        assert_eq!(times, arrivals(7, 20.0, 20_000));
        assert_ne!(times, arrivals(8, 20.0, 20_000));
        assert!(times.is_sorted());
        let mean = times[19_999].as_secs_f64() / 20_000.0;
        assert!((mean * 20.0 - 1.0).abs() < 0.03, "{mean}");
        // Gaps of a Poisson process spread as far as they are long.
        let gaps = times.windows(2).map(|pair| (pair[1] - pair[0]).as_secs_f64());
        let variance = gaps.map(|gap| (gap - mean).powi(2)).sum::<f64>() / 19_999.0;
        assert!((variance.sqrt() / mean - 1.0).abs() < 0.05, "{variance}");
    }

    #[test]
    fn a_shorter_run_is_the_beginning_of_a_longer_one() {
        assert_eq!(arrivals(3, 5.0, 10), arrivals(3, 5.0, 100)[..10]);
    }

    #[test]
    fn rates_that_are_no_load_are_refused() {
        assert_eq!(request_rate("2.5"), Ok(2.5));
        for text in ["0", "-1", "inf", "nan", "1e9", "fast", ""] {
            assert!(request_rate(text).is_err(), "{text}");
        }
    }

    #[test]
    fn lengths_reach_both_ends_evenly() {
        let lengths: Lengths = "3..6".parse().unwrap();
        let mut counts = [0; 8];
        (0..40_000).for_each(|index| counts[lengths.of(1, index)] += 1);
        assert_eq!((counts[..3].iter().sum::<i32>(), counts[7]), (0, 0));
        assert!(counts[3..7].iter().all(|count| (9_500..10_500).contains(count)), "{counts:?}");
        assert_eq!("64".parse::<Lengths>().unwrap().of(9, 5), 64);
    }

    #[test]
    fn lengths_that_mean_nothing_are_refused() {
        for text in ["", "0", "0..3", "6..3", "1..", "..4", "a", "-1"] {
            assert!(text.parse::<Lengths>().is_err(), "{text}");
        }
        let widest: Lengths = format!("1..{}", usize::MAX).parse().unwrap();
        assert!(widest.of(0, 0) >= 1);
    }
}
