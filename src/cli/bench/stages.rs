//! Time that the server spent in each stage of its work during a level: what its `/metrics` counted after, less before.
//!
//! Called by [`super`]; pure. A server without these metrics has no stages: that is no error.

use std::collections::BTreeMap;

use crate::telemetry::metrics::STAGE_SECONDS;

/// Seconds and how often, of one stage.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub(super) struct Stage {
    pub(super) seconds: f64,
    pub(super) count: f64,
}

/// By the name of the stage.
pub(super) type Stages = BTreeMap<String, Stage>;

/// Reads the text that `/metrics` answers with; lines of other metrics are passed over.
pub(super) fn read(metrics: &str) -> Stages {
    let mut stages = Stages::new();
    for line in metrics.lines() {
        let Some((kind, name, value)) = sample(line) else { continue };
        match kind {
            // Samples that differ in other labels belong to the same stage.
            "sum" => stages.entry(name.to_owned()).or_default().seconds += value,
            "count" => stages.entry(name.to_owned()).or_default().count += value,
            _ => {}
        }
    }
    stages
}

fn sample(line: &str) -> Option<(&str, &str, f64)> {
    let (kind, rest) = line.strip_prefix(STAGE_SECONDS)?.strip_prefix('_')?.split_once('{')?;
    let (labels, value) = rest.split_once('}')?;
    let name = labels.split(',').find_map(|label| label.trim().strip_prefix("stage=\""))?;
    let value = value.split_whitespace().next()?.parse().ok()?;
    Some((kind, name.strip_suffix('"')?, value))
}

/// What came in between. A server that has restarted counts from zero again: its stage is left out.
pub(super) fn difference(before: &Stages, after: &Stages) -> Stages {
    let between = after.iter().filter_map(|(name, after)| {
        let before = before.get(name).copied().unwrap_or_default();
        let stage = Stage { seconds: after.seconds - before.seconds, count: after.count - before.count };
        (stage.count > 0.0 && stage.seconds >= 0.0).then(|| (name.clone(), stage))
    });
    between.collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    const BEFORE: &str = "# TYPE tinyllava_stage_seconds histogram\n\
        tinyllava_stage_seconds_bucket{stage=\"encode\",le=\"0.1\"} 2\n\
        tinyllava_stage_seconds_sum{stage=\"encode\"} 1.5\n\
        tinyllava_stage_seconds_count{stage=\"encode\"} 2\n\
        tinyllava_requests_total 9\n";

    #[test]
    fn a_stage_has_the_time_between_two_readings() {
        let after = "tinyllava_stage_seconds_sum{stage=\"encode\"} 4\n\
            tinyllava_stage_seconds_count{stage=\"encode\"} 7 1700000000\n\
            tinyllava_stage_seconds_sum{model=\"m\",stage=\"fetch\"} 0.5\n\
            tinyllava_stage_seconds_count{model=\"m\",stage=\"fetch\"} 1\n";
        let between = difference(&read(BEFORE), &read(after));
        let expected = [("encode", 2.5, 5.0), ("fetch", 0.5, 1.0)];
        let expected = expected.map(|(name, seconds, count)| (name.to_owned(), Stage { seconds, count }));
        assert_eq!(between, Stages::from(expected));
    }

    #[test]
    fn stages_that_did_nothing_or_began_anew_are_left_out() {
        let (before, none) = (read(BEFORE), Stages::new());
        assert_eq!(difference(&before, &before), none);
        let restarted = "tinyllava_stage_seconds_sum{stage=\"encode\"} 0.5\n\
            tinyllava_stage_seconds_count{stage=\"encode\"} 1\n";
        assert_eq!(difference(&before, &read(restarted)), none);
    }

    #[test]
    fn other_servers_have_no_stages() {
        for text in ["", "vllm:e2e_seconds_sum{a=\"b\"} 3", "tinyllava_stage_seconds_sum", "<html>{}</html>"]
        {
            assert!(read(text).is_empty(), "{text}");
        }
    }
}
