//! What a level of load came to: statistics, the row of the table, the JSON.
//!
//! Called by [`super`]; pure arithmetic.

use std::time::Duration;

use serde_json::{Value, json};

use super::{ChatError, Timing};

/// Two lines above the rows of [`Level::row`].
pub(super) const HEADER: &str = concat!(
    "                                    |    time to first token, s    |   inter-token latency, ms    |        end to end, s       
",
    " conc     ok  fail   req/s   tok/s  |   mean median    p90    p99  |   mean median    p90    p99  |   mean median    p90    p99",
);

/// The results of one concurrency.
#[derive(Debug)]
pub(super) struct Level {
    concurrency: usize,
    elapsed: Duration,
    succeeded: Vec<Timing>,
    /// One sentence a failed request.
    pub(super) failures: Vec<String>,
}

/// Of a set of durations, seconds; zero when there are none.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
struct Summary {
    mean: f64,
    median: f64,
    p90: f64,
    p99: f64,
}

impl Summary {
    fn new(durations: impl Iterator<Item = Duration>) -> Self {
        let mut seconds: Vec<f64> = durations.map(|duration| duration.as_secs_f64()).collect();
        seconds.sort_by(f64::total_cmp);
        // The smallest value that at least this share of all values does not exceed.
        let percentile = |share: f64| {
            let rank = (share * seconds.len() as f64).ceil() as usize;
            seconds.get(rank.saturating_sub(1)).copied().unwrap_or_default()
        };
        Summary {
            mean: seconds.iter().sum::<f64>() / seconds.len().max(1) as f64,
            median: percentile(0.5),
            p90: percentile(0.9),
            p99: percentile(0.99),
        }
    }

    fn cells(self, factor: f64, decimals: usize) -> String {
        let cell = |value: f64| format!("{:6.decimals$}", value * factor);
        [self.mean, self.median, self.p90, self.p99].map(cell).join(" ")
    }

    fn to_json(self) -> Value {
        json!({"mean": self.mean, "median": self.median, "p90": self.p90, "p99": self.p99})
    }
}

impl Level {
    pub(super) fn new(
        concurrency: usize,
        elapsed: Duration,
        results: Vec<Result<Timing, ChatError>>,
    ) -> Self {
        let (mut succeeded, mut failures) = (Vec::new(), Vec::new());
        for result in results {
            match result {
                Ok(timing) => succeeded.push(timing),
                Err(error) => failures.push(error.to_string()),
            }
        }
        Level { concurrency, elapsed, succeeded, failures }
    }

    fn first_token(&self) -> Summary {
        Summary::new(self.succeeded.iter().map(|timing| timing.first_token))
    }

    fn inter_token(&self) -> Summary {
        Summary::new(self.succeeded.iter().flat_map(|timing| timing.gaps.iter().copied()))
    }

    fn end_to_end(&self) -> Summary {
        Summary::new(self.succeeded.iter().map(|timing| timing.total))
    }

    fn completion_tokens(&self) -> usize {
        self.succeeded.iter().map(|timing| timing.completion_tokens).sum()
    }

    fn per_second(&self, count: usize) -> f64 {
        count as f64 / self.elapsed.as_secs_f64().max(f64::EPSILON)
    }

    /// One line under [`HEADER`].
    pub(super) fn row(&self) -> String {
        format!(
            "{:5} {:6} {:5} {:7.2} {:7.1}  | {}  | {}  | {}",
            self.concurrency,
            self.succeeded.len(),
            self.failures.len(),
            self.per_second(self.succeeded.len()),
            self.per_second(self.completion_tokens()),
            self.first_token().cells(1.0, 2),
            self.inter_token().cells(1000.0, 1),
            self.end_to_end().cells(1.0, 2),
        )
    }

    pub(super) fn to_json(&self) -> Value {
        json!({
            "concurrency": self.concurrency,
            "succeeded": self.succeeded.len(),
            "failed": self.failures.len(),
            "elapsed_s": self.elapsed.as_secs_f64(),
            "requests_per_second": self.per_second(self.succeeded.len()),
            "tokens_per_second": self.per_second(self.completion_tokens()),
            "prompt_tokens": self.succeeded.iter().map(|timing| timing.prompt_tokens).sum::<usize>(),
            "completion_tokens": self.completion_tokens(),
            "time_to_first_token_s": self.first_token().to_json(),
            "inter_token_latency_s": self.inter_token().to_json(),
            "end_to_end_s": self.end_to_end().to_json(),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percentiles_are_values_that_occurred() {
        let summary = Summary::new((1..=100).rev().map(Duration::from_secs));
        assert_eq!(summary, Summary { mean: 50.5, median: 50.0, p90: 90.0, p99: 99.0 });
        let one = Summary::new([Duration::from_secs(3)].into_iter());
        assert_eq!(one, Summary { mean: 3.0, median: 3.0, p90: 3.0, p99: 3.0 });
        assert_eq!(Summary::new(std::iter::empty()), Summary::default());
    }

    #[test]
    fn a_row_stands_under_its_header() {
        let timing = Timing {
            first_token: Duration::from_millis(250),
            gaps: vec![Duration::from_millis(20); 3],
            total: Duration::from_secs(2),
            prompt_tokens: 7,
            completion_tokens: 4,
        };
        let results = vec![Ok(timing), Err(ChatError::Ended)];
        let level = Level::new(8, Duration::from_secs(2), results);
        let row = "    8      1     1    0.50     2.0  |   0.25   0.25   0.25   0.25  |   20.0   20.0   20.0   20.0  |   2.00   2.00   2.00   2.00";
        assert_eq!(level.row(), row);
        let bars = |line: &str| line.match_indices('|').map(|(at, _)| at).collect::<Vec<_>>();
        for line in HEADER.lines() {
            assert_eq!(bars(line), bars(row), "{line}");
        }
        assert!(HEADER.lines().all(|line| line.len() == row.len()));
        assert_eq!(level.failures, ["the connection ended before the reply did"]);
        assert_eq!(level.to_json()["inter_token_latency_s"]["p99"], 0.02);
        assert_eq!((&level.to_json()["failed"], &level.to_json()["prompt_tokens"]), (&json!(1), &json!(7)));
    }
}
