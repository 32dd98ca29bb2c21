//! What `deploy/` and `docs/metrics.md` say of metrics and alerts, held against what the server exports.

use std::{collections::BTreeSet, path::Path};

use serde_json::Value;
use tinyllava::telemetry::Metrics;

/// What stands in PromQL without being a metric.
const WORDS: [&str; 11] =
    ["by", "without", "on", "ignoring", "group_left", "and", "or", "unless", "le", "bool", "offset"];
const ALERTS: &str = "deploy/prometheus/alerts.yml";

fn read(path: &str) -> String {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join(path);
    std::fs::read_to_string(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

fn yaml(path: &str) -> Value {
    yaml_serde::from_str(&read(path)).unwrap()
}

/// Name and type of every metric, as a scrape tells.
fn exported() -> Vec<(String, String)> {
    let metrics = Metrics::new("m");
    metrics.set_cache_config(16, 1);
    metrics.expect_responses("POST", "/", &[200]);
    let text = metrics.render();
    let types = text.lines().filter_map(|line| line.strip_prefix("# TYPE ")?.split_once(' '));
    let all: Vec<_> = types.map(|(name, kind)| (name.to_owned(), kind.to_owned())).collect();
    assert!(all.len() > 25, "{all:?}");
    all
}

/// Every name under which a sample may be asked for.
fn samples() -> BTreeSet<String> {
    let names = exported().into_iter().flat_map(|(name, kind)| match kind.as_str() {
        "histogram" => ["_bucket", "_sum", "_count"].map(|suffix| format!("{name}{suffix}")).to_vec(),
        _ => vec![name],
    });
    names.chain(["up".to_owned()]).collect()
}

/// Values of `field` of every rule of a file that has it.
fn rules(path: &str, field: &str) -> Vec<String> {
    let file = yaml(path);
    let groups = file["groups"].as_array().unwrap();
    let rules = groups.iter().flat_map(|group| group["rules"].as_array().unwrap());
    rules.filter_map(|rule| rule[field].as_str().map(str::to_owned)).collect()
}

/// All strings under the key `expr`, and the queries of variables.
fn dashboard_queries(value: &Value, found: &mut Vec<String>) {
    match value {
        Value::Object(fields) => {
            for (key, value) in fields {
                match value {
                    Value::String(text) if key == "expr" => found.push(text.clone()),
                    Value::String(text) if key == "query" && text.starts_with("label_values(") => {
                        let (metric, _) = text["label_values(".len()..].rsplit_once(',').unwrap();
                        found.push(metric.to_owned());
                    }
                    value => dashboard_queries(value, found),
                }
            }
        }
        Value::Array(values) => values.iter().for_each(|value| dashboard_queries(value, found)),
        _ => {}
    }
}

/// The metrics that a query names: what is left of it without label matchers, durations, groupings and functions.
fn metrics_of(query: &str) -> Vec<String> {
    let (mut names, mut rest) = (vec![], query);
    while let Some(c) = rest.chars().next() {
        let is_name = |c: char| c.is_ascii_alphanumeric() || c == '_' || c == ':';
        if let Some(close) =
            [('{', '}'), ('[', ']')].iter().find_map(|(open, close)| (*open == c).then_some(*close))
        {
            rest = rest.split_once(close).unwrap_or_else(|| panic!("{query}: no {close}")).1;
        } else if c.is_ascii_digit() {
            rest = rest.trim_start_matches(|c: char| is_name(c) || c == '.');
        } else if is_name(c) {
            let end = rest.find(|c| !is_name(c)).unwrap_or(rest.len());
            let (name, after) = rest.split_at(end);
            rest = after.trim_start();
            if WORDS.contains(&name) {
                // A list of labels may follow.
                if matches!(name, "by" | "without" | "on" | "ignoring" | "group_left")
                    && rest.starts_with('(')
                {
                    rest = rest.split_once(')').unwrap().1;
                }
            } else if !["(", "by (", "without ("].iter().any(|call| rest.starts_with(call)) {
                names.push(name.to_owned());
            }
        } else {
            rest = &rest[c.len_utf8()..];
        }
    }
    names
}

#[test]
fn names_are_found_in_queries() {
    let query = r#"sum by (job, le) (rate(a_bucket{x=~"b|c"}[5m])) / ignoring (y) (vllm:d > 0.5) and on (z) e:f:p95 unless time() - g"#;
    assert_eq!(metrics_of(query), ["a_bucket", "vllm:d", "e:f:p95", "g"]);
}

#[test]
fn dashboard_rules_and_alerts_ask_for_what_is_there() {
    let mut known = samples();
    known.extend(rules("deploy/prometheus/rules.yml", "record"));
    let mut dashboard = vec![];
    dashboard_queries(&serde_json::from_str(&read("deploy/grafana/dashboard.json")).unwrap(), &mut dashboard);
    assert!(dashboard.len() > 40, "{dashboard:?}");
    let recorded = rules("deploy/prometheus/rules.yml", "expr");
    for query in dashboard.iter().chain(&recorded).chain(&rules(ALERTS, "expr")) {
        let names = metrics_of(query);
        assert!(!names.is_empty(), "{query}");
        for name in names {
            assert!(known.contains(&name), "{query}: the server has no {name}");
        }
    }
}

#[test]
fn every_metric_and_every_alert_is_explained_and_nothing_else() {
    let docs = read("docs/metrics.md");
    let is_metric = |name: &&str| {
        let prefixed = ["tinyllava_", "vllm:", "process_"].iter().any(|prefix| name.starts_with(prefix));
        prefixed && name.chars().all(|c| c.is_ascii_alphanumeric() || c == '_' || c == ':')
    };
    let quoted: BTreeSet<&str> = docs.split('`').skip(1).step_by(2).filter(is_metric).collect();
    let exported = exported();
    let exported: BTreeSet<&str> = exported.iter().map(|(name, _)| name.as_str()).collect();
    assert_eq!(quoted, exported);
    let headings: BTreeSet<&str> = docs
        .lines()
        .filter_map(|line| line.strip_prefix("### "))
        .filter(|h| h.starts_with("Tinyllava"))
        .collect();
    let alerts = rules(ALERTS, "alert");
    assert_eq!(headings, alerts.iter().map(String::as_str).collect());
}

#[test]
fn every_alert_says_how_bad_it_is_and_where_to_read_on_and_is_tested() {
    let (file, tests) = (yaml(ALERTS), read("deploy/prometheus/alerts_test.yml"));
    for rule in file["groups"][0]["rules"].as_array().unwrap() {
        let alert = rule["alert"].as_str().unwrap();
        assert!(["critical", "warning"].contains(&rule["labels"]["severity"].as_str().unwrap()), "{alert}");
        assert!(rule["annotations"]["summary"].as_str().is_some_and(|text| text.len() > 10), "{alert}");
        let runbook = format!("docs/metrics.md#{}", alert.to_lowercase());
        assert_eq!(rule["annotations"]["runbook_url"], runbook, "{alert}");
        let (fires, silent) = (format!("- alertname: {alert}\n"), format!("{{alertname: {alert}, "));
        assert!(tests.contains(&fires) && tests.contains(&silent), "{alert} is not tested");
    }
}
