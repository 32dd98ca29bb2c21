//! What a level of load came to: statistics, the row of the table, the JSON.
//!
//! Called by [`super`]; pure arithmetic.

use std::time::Duration;

use serde_json::{Value, json};

use super::{
    goodput::Goodput,
    load::{Load, Timing},
    stages::Stages,
};
use crate::cli::chat_client::ChatError;

/// Two lines above the rows of [`Level::row`].
pub(super) const HEADER: &str = concat!(
    "                                    |    time to first token, s    |   inter-token latency, ms    |        end to end, s       
",
    " load     ok  fail   req/s   tok/s  |   mean median    p90    p99  |   mean median    p90    p99  |   mean median    p90    p99",
);

/// The results of one load.
#[derive(Debug)]
pub(super) struct Level {
    load: Load,
    elapsed: Duration,
    /// Where the server spent its time, if it says so.
    pub(super) stages: Option<Stages>,
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
    pub(super) fn new(load: Load, elapsed: Duration, results: Vec<Result<Timing, ChatError>>) -> Self {
        let (mut succeeded, mut failures) = (Vec::new(), Vec::new());
        for result in results {
            match result {
                Ok(timing) => succeeded.push(timing),
                Err(error) => failures.push(error.to_string()),
            }
        }
        Level { load, elapsed, stages: None, succeeded, failures }
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
        let load = match self.load {
            Load::Closed(clients) => clients.to_string(),
            Load::Open(rate) => format!("{rate}/s"),
        };
        format!(
            "{:>5} {:6} {:5} {:7.2} {:7.1}  | {}  | {}  | {}",
            load,
            self.succeeded.len(),
            self.failures.len(),
            self.per_second(self.succeeded.len()),
            self.per_second(self.completion_tokens()),
            self.first_token().cells(1.0, 2),
            self.inter_token().cells(1000.0, 1),
            self.end_to_end().cells(1.0, 2),
        )
    }

    fn first_answer(&self) -> Summary {
        Summary::new(self.succeeded.iter().filter_map(|timing| timing.first_answer))
    }

    fn output_token(&self) -> Summary {
        Summary::new(self.succeeded.iter().filter_map(Timing::output_token))
    }

    /// Requests that kept the limits.
    fn num_good(&self, goodput: &Goodput) -> usize {
        let good = |timing: &&Timing| goodput.is_met(timing.first_token, timing.output_token(), timing.total);
        self.succeeded.iter().filter(good).count()
    }

    /// What has no place in the row, a line each.
    pub(super) fn details(&self, goodput: Option<&Goodput>) -> Vec<String> {
        let mut lines = vec![format!(
            "      first answer token, s: {} | time per output token, ms: {}",
            self.first_answer().cells(1.0, 2),
            self.output_token().cells(1000.0, 1),
        )];
        if let Some(goodput) = goodput {
            let good = self.num_good(goodput);
            let all = self.succeeded.len() + self.failures.len();
            lines.push(format!(
                "      goodput: {good} of {all} requests, {:.2} a second",
                self.per_second(good)
            ));
        }
        if let Some(stages) = self.stages.as_ref().filter(|stages| !stages.is_empty()) {
            let stage = |(name, stage): (&String, &super::stages::Stage)| {
                format!("{name} {:.2} s ({})", stage.seconds, stage.count)
            };
            lines.push(format!(
                "      the server: {}",
                stages.iter().map(stage).collect::<Vec<_>>().join(", ")
            ));
        }
        lines
    }

    pub(super) fn to_json(&self, goodput: Option<&Goodput>) -> Value {
        let (concurrency, request_rate) = match self.load {
            Load::Closed(clients) => (Some(clients), None),
            Load::Open(rate) => (None, Some(rate)),
        };
        let stages = self.stages.iter().flatten();
        let stages: serde_json::Map<String, Value> = stages
            .map(|(name, stage)| (name.clone(), json!({"seconds": stage.seconds, "count": stage.count})))
            .collect();
        json!({
            "concurrency": concurrency,
            "request_rate": request_rate,
            "good": goodput.map(|goodput| self.num_good(goodput)),
            "first_answer_token_s": self.first_answer().to_json(),
            "time_per_output_token_s": self.output_token().to_json(),
            "server_stages": stages,
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
            first_answer: Some(Duration::from_millis(500)),
            gaps: vec![Duration::from_millis(20); 3],
            total: Duration::from_secs(2),
            prompt_tokens: 7,
            completion_tokens: 4,
        };
        let results = vec![Ok(timing), Err(ChatError::Ended)];
        let level = Level::new(Load::Closed(8), Duration::from_secs(2), results);
        let row = "    8      1     1    0.50     2.0  |   0.25   0.25   0.25   0.25  |   20.0   20.0   20.0   20.0  |   2.00   2.00   2.00   2.00";
        assert_eq!(level.row(), row);
        let bars = |line: &str| line.match_indices('|').map(|(at, _)| at).collect::<Vec<_>>();
        for line in HEADER.lines() {
            assert_eq!(bars(line), bars(row), "{line}");
        }
        assert!(HEADER.lines().all(|line| line.len() == row.len()));
        let goodput = "ttft:300ms,tpot:1s".parse().unwrap();
        let details = level.details(Some(&goodput));
        assert_eq!(details[1], "      goodput: 1 of 2 requests, 0.50 a second");
        assert!(details[0].contains("0.50   0.50"), "{details:?}");
        assert_eq!(level.to_json(Some(&"e2e:1s".parse().unwrap()))["good"], 0);
        assert_eq!(level.failures, ["the connection ended before the reply did"]);
        assert_eq!(level.to_json(None)["inter_token_latency_s"]["p99"], 0.02);
        assert_eq!(
            (&level.to_json(None)["failed"], &level.to_json(None)["prompt_tokens"]),
            (&json!(1), &json!(7))
        );
    }
}
