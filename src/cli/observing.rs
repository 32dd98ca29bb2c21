//! What `serve` tells about itself: the options of logs and traces.

use clap::Args;
use url::Url;

use crate::{config::TracesConfig, telemetry::tracing::LogFormat};

/// Logs and traces.
#[derive(Debug, Clone, Args)]
pub struct ObservingOptions {
    /// pretty or json.
    #[arg(long, default_value = "pretty", env = "TINYLLAVA_LOG_FORMAT")]
    pub log_format: LogFormat,
    /// Write prompts and replies to the log, which is else without them.
    #[arg(long)]
    pub log_content: bool,
    /// Send OpenTelemetry traces to this collector: the base URL of OTLP over HTTP, such as http://localhost:4318.
    /// An empty one is none.
    #[arg(long, value_name = "URL", env = "OTEL_EXPORTER_OTLP_ENDPOINT", value_parser = collector_url)]
    pub otlp_endpoint: Option<Collector>,
    /// Share of the traces that begin here, 0 to 1; a caller that sends a traceparent decides for itself.
    #[arg(long, value_name = "SHARE", default_value_t = 1.0, value_parser = share)]
    pub otlp_sample_ratio: f64,
}

impl ObservingOptions {
    /// The settings of traces.
    pub fn traces(&self) -> TracesConfig {
        TracesConfig {
            endpoint: self.otlp_endpoint.as_ref().and_then(|collector| collector.0.clone()),
            sample_ratio: self.otlp_sample_ratio,
            ..TracesConfig::default()
        }
    }

    /// Nobody should fill a log with conversations by accident.
    pub fn warn_of_content(&self) {
        if self.log_content {
            tracing::warn!(
                "--log-content: the log will hold what users ask and what they are answered; keep it as secret as that"
            );
        }
    }
}

/// Where traces go; nowhere if the text was empty, as OpenTelemetry has it for its variables.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Collector(Option<Url>);

fn collector_url(text: &str) -> Result<Collector, String> {
    if text.trim().is_empty() {
        return Ok(Collector(None));
    }
    let url = Url::parse(text).ok().filter(|url| matches!(url.scheme(), "http" | "https") && url.has_host());
    let url = url.ok_or("give the collector's http or https URL, such as http://localhost:4318")?;
    let is_plain = url.username().is_empty() && url.password().is_none();
    if !is_plain || url.query().is_some() || url.fragment().is_some() {
        return Err("give the collector's URL alone; keys go into OTEL_EXPORTER_OTLP_HEADERS".into());
    }
    Ok(Collector(Some(url)))
}

fn share(text: &str) -> Result<f64, String> {
    let share = text.parse().ok().filter(|share| (0.0..=1.0).contains(share));
    share.ok_or_else(|| "give a number from 0 to 1".into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_no_collector_is_refused_in_one_sentence() {
        assert!(collector_url("http://localhost:4318").is_ok());
        assert_eq!(collector_url(" "), Ok(Collector(None)));
        for bad in ["http://ann:secret@localhost:4318", "http://localhost:4318/?key=1"] {
            assert!(collector_url(bad).unwrap_err().contains("OTEL_EXPORTER_OTLP_HEADERS"), "{bad}");
        }
        for bad in ["localhost:4318", "grpc://localhost:4317"] {
            assert!(collector_url(bad).unwrap_err().contains("http://localhost:4318"), "{bad}");
        }
    }

    #[test]
    fn a_share_is_from_0_to_1() {
        assert_eq!(share("0.25"), Ok(0.25));
        assert!(share("2").is_err() && share("nan").is_err() && share("-0.1").is_err());
    }
}
