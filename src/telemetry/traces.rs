//! OpenTelemetry traces: a server span for each request, and under it a span for each of its stages.
//!
//! Started by `cli/serve.rs`, used by `http/record.rs`. Spans are made when a request is over, from its [`StageRun`]s, and
//! handed to a bounded queue: a slow or dead collector costs spans, never time. Off, everything here is free.

use std::time::{Duration, Instant, SystemTime};

use axum::http::{HeaderMap, header, uri::Authority};
use opentelemetry::{
    Context, InstrumentationScope, KeyValue,
    propagation::TextMapPropagator,
    trace::{SpanBuilder, SpanKind, Status, TraceContextExt, TracerProvider},
};
use opentelemetry_http::{HeaderExtractor, HeaderInjector};
use opentelemetry_otlp::{WithExportConfig, WithHttpConfig};
use opentelemetry_sdk::{
    Resource,
    propagation::TraceContextPropagator,
    trace::{BatchConfigBuilder, BatchSpanProcessor, Sampler, SdkTracer, SdkTracerProvider},
};

use super::{GenerationRecord, Outcome, Stage, StageRun, collector::Collector};
use crate::config::TracesConfig;

/// What the service is called unless the environment says otherwise.
const SERVICE_NAME: &str = "tinyllava";
/// Longest value of an attribute that a client chose.
const MAX_VALUE_BYTES: usize = 256;

/// Why traces cannot be sent.
#[derive(Debug, thiserror::Error)]
pub enum TracesError {
    #[error("traces cannot be sent: {0}; check --otlp-endpoint and the OTEL_* variables")]
    Exporter(String),
}

/// Where spans go; cheap to clone. The default is off.
#[derive(Debug, Clone, Default)]
pub struct Traces(Option<On>);

#[derive(Debug, Clone)]
struct On {
    provider: SdkTracerProvider,
    tracer: SdkTracer,
    model_name: String,
    shutdown_timeout: Duration,
}

/// A request as it arrives.
#[derive(Debug, Clone, Copy)]
pub struct RequestStart<'a> {
    /// One of the usual ones, or `other`.
    pub method: &'static str,
    /// Without the query, which may hold secrets.
    pub path: &'a str,
    pub headers: &'a HeaderMap,
    /// The router's pattern.
    pub route: &'a str,
    /// `chat` or `text_completion`, if it generates.
    pub operation: Option<&'static str>,
    pub is_secure: bool,
}

impl Traces {
    /// Starts the thread that sends spans; it needs the runtime this is called on.
    ///
    /// # Errors
    /// When an `OTEL_*` variable asks for what there is not.
    pub fn start(config: &TracesConfig, model_name: &str) -> Result<Self, TracesError> {
        let Some(endpoint) = &config.endpoint else { return Ok(Traces::default()) };
        let failed = |error: &dyn std::error::Error| TracesError::Exporter(error.to_string());
        let collector = Collector::new(config.export_timeout).map_err(|error| failed(&error))?;
        let exporter = opentelemetry_otlp::SpanExporter::builder()
            .with_http()
            .with_protocol(opentelemetry_otlp::Protocol::HttpBinary)
            .with_endpoint(traces_url(endpoint))
            .with_timeout(config.export_timeout)
            .with_http_client(collector)
            .build()
            .map_err(|error| failed(&error))?;
        let batches = BatchConfigBuilder::default()
            .with_max_queue_size(config.max_queued_spans)
            .with_max_export_batch_size(config.max_batch_spans)
            .with_scheduled_delay(config.batch_delay)
            .build();
        let sampler = Sampler::ParentBased(Box::new(Sampler::TraceIdRatioBased(config.sample_ratio)));
        let provider = SdkTracerProvider::builder()
            .with_span_processor(BatchSpanProcessor::builder(exporter).with_batch_config(batches).build())
            .with_sampler(sampler)
            .with_resource(resource())
            .build();
        let scope = InstrumentationScope::builder(SERVICE_NAME).with_version(env!("CARGO_PKG_VERSION"));
        Ok(Traces(Some(On {
            tracer: provider.tracer_with_scope(scope.build()),
            provider,
            model_name: model_name.to_owned(),
            shutdown_timeout: config.shutdown_timeout,
        })))
    }

    /// The span of a request that has just arrived, under the caller's if it says so.
    pub fn begin(&self, request: RequestStart<'_>) -> Option<RequestTrace> {
        let on = self.0.as_ref()?;
        let parent = TraceContextPropagator::new()
            .extract_with_context(&Context::new(), &HeaderExtractor(request.headers));
        let clock = (Instant::now(), SystemTime::now());
        let mut attributes = request_attributes(&request);
        if let Some(operation) = request.operation {
            attributes.extend([
                KeyValue::new("gen_ai.operation.name", operation),
                KeyValue::new("gen_ai.provider.name", SERVICE_NAME),
                KeyValue::new("gen_ai.request.model", on.model_name.clone()),
                KeyValue::new("gen_ai.response.model", on.model_name.clone()),
            ]);
        }
        let span = SpanBuilder::from_name(format!("{} {}", request.method, request.route))
            .with_kind(SpanKind::Server)
            .with_start_time(clock.1)
            .with_attributes(attributes)
            .start_with_context(&on.tracer, &parent);
        Some(RequestTrace { tracer: on.tracer.clone(), context: parent.with_span(span), clock })
    }

    /// Sends what is left, for a bounded time. Blocks.
    pub fn shut_down(&self) {
        let Some(on) = &self.0 else { return };
        if let Err(error) = on.provider.shutdown_with_timeout(on.shutdown_timeout) {
            tracing::warn!(%error, "the last traces were not sent");
        }
    }
}

/// The trace of one request.
#[derive(Debug)]
pub struct RequestTrace {
    tracer: SdkTracer,
    /// With the server span.
    context: Context,
    /// The same moment by both clocks: spans are dated, stages are timed.
    clock: (Instant, SystemTime),
}

impl RequestTrace {
    /// For the log.
    pub fn trace_id(&self) -> String {
        self.context.span().span_context().trace_id().to_string()
    }

    /// `traceparent` and `tracestate`, for whoever is asked on the way.
    pub fn headers(&self) -> HeaderMap {
        let mut headers = HeaderMap::new();
        TraceContextPropagator::new().inject_context(&self.context, &mut HeaderInjector(&mut headers));
        headers
    }

    /// Ends the server span, with the spans of its stages under it.
    pub fn end(self, status: u16, stages: &[StageRun], generation: Option<&GenerationRecord>) {
        let span = self.context.span();
        if !span.is_recording() {
            return;
        }
        for run in stages {
            self.stage_span(run, generation);
        }
        span.set_attribute(KeyValue::new("http.response.status_code", i64::from(status)));
        let failed = generation.is_some_and(|generation| generation.outcome == Outcome::Failed);
        if status >= 500 || failed {
            let kind = generation.map_or_else(|| status.to_string(), |generation| generation.detail.into());
            span.set_attribute(KeyValue::new("error.type", kind.clone()));
            span.set_status(Status::error(kind));
        }
        if let Some(generation) = generation {
            span.set_attributes(generation_attributes(generation));
        }
        span.end_with_timestamp(SystemTime::now());
    }

    fn stage_span(&self, run: &StageRun, generation: Option<&GenerationRecord>) {
        let builder = SpanBuilder::from_name(span_name(run.stage))
            .with_kind(SpanKind::Internal)
            .with_start_time(self.at(run.started))
            .with_attributes([KeyValue::new("tinyllava.spent_seconds", run.spent.as_secs_f64())]);
        let context = self.context.with_span(builder.start_with_context(&self.tracer, &self.context));
        let span = context.span();
        if run.failed {
            let kind = generation.map_or("", |generation| generation.detail);
            let kind = if kind.is_empty() { Outcome::ClientLeft.name() } else { kind };
            span.set_attribute(KeyValue::new("error.type", kind));
            span.set_status(Status::error(kind));
        }
        span.end_with_timestamp(self.at(run.ended));
    }

    fn at(&self, moment: Instant) -> SystemTime {
        let (instant, date) = self.clock;
        match moment.checked_duration_since(instant) {
            Some(later) => date + later,
            None => date - (instant - moment),
        }
    }
}

fn span_name(stage: Stage) -> &'static str {
    match stage {
        Stage::Fetch => "media.fetch",
        Stage::DecodeWait => "media.decode_wait",
        Stage::Probe => "media.probe",
        Stage::Decode => "media.decode",
        Stage::Resize => "media.resize",
        Stage::Prompt => "prompt",
        Stage::Queue => "engine.queue",
        Stage::Encode => "engine.encode",
        Stage::Prefill => "engine.prefill",
        Stage::Generate => "engine.decode",
    }
}

/// The semantic conventions' names for an HTTP server.
fn request_attributes(request: &RequestStart<'_>) -> Vec<KeyValue> {
    let text = |name: &header::HeaderName| {
        let value = request.headers.get(name).and_then(|value| value.to_str().ok());
        value.map(|value| value[..value.floor_char_boundary(MAX_VALUE_BYTES)].to_owned())
    };
    let path = &request.path[..request.path.floor_char_boundary(MAX_VALUE_BYTES)];
    let scheme = if request.is_secure { "https" } else { "http" };
    let method = if request.method == "other" { "_OTHER" } else { request.method };
    let mut attributes = vec![
        KeyValue::new("http.request.method", method),
        KeyValue::new("http.route", request.route.to_owned()),
        KeyValue::new("url.path", path.to_owned()),
        KeyValue::new("url.scheme", scheme),
    ];
    if let Some(host) = text(&header::HOST).and_then(|host| host.parse::<Authority>().ok()) {
        attributes.push(KeyValue::new("server.address", host.host().to_owned()));
        attributes.extend(host.port_u16().map(|port| KeyValue::new("server.port", i64::from(port))));
    }
    attributes.extend(text(&header::USER_AGENT).map(|agent| KeyValue::new("user_agent.original", agent)));
    attributes
}

/// The semantic conventions' names for generative models, and our own for what they have none.
fn generation_attributes(generation: &GenerationRecord) -> Vec<KeyValue> {
    let count = |name: &'static str, count: usize| KeyValue::new(name, count as i64);
    let tokens = &generation.tokens;
    let mut attributes = vec![
        count("gen_ai.usage.input_tokens", tokens.prompt),
        count("gen_ai.usage.output_tokens", tokens.completion),
        count("gen_ai.usage.cache_read.input_tokens", tokens.cached),
        count("gen_ai.usage.reasoning.output_tokens", tokens.reasoning),
        count("gen_ai.request.choice.count", generation.num_choices),
        count("tinyllava.video_tokens", tokens.video),
        count("tinyllava.video_frames", generation.num_frames),
        KeyValue::new("gen_ai.request.stream", generation.stream),
        KeyValue::new("tinyllava.outcome", generation.outcome.name()),
    ];
    if generation.outcome == Outcome::Completed {
        let reasons: Vec<opentelemetry::StringValue> = vec![generation.detail.into()];
        attributes.push(KeyValue::new(
            "gen_ai.response.finish_reasons",
            opentelemetry::Value::Array(reasons.into()),
        ));
    }
    if let Some(first_token) = generation.first_token {
        attributes.push(KeyValue::new("tinyllava.time_to_first_token", first_token.as_secs_f64()));
    }
    attributes
}

/// Who we are: the environment decides, where it says something.
fn resource() -> Resource {
    let named = |variable: &str, has_name: fn(&str) -> bool| {
        std::env::var(variable).is_ok_and(|value| has_name(&value))
    };
    let is_named = named("OTEL_SERVICE_NAME", |name| !name.is_empty())
        || named("OTEL_RESOURCE_ATTRIBUTES", |list| {
            list.split(',').any(|pair| pair.trim().starts_with("service.name="))
        });
    let version = KeyValue::new("service.version", env!("CARGO_PKG_VERSION"));
    let builder = Resource::builder().with_attribute(version);
    if is_named { builder } else { builder.with_service_name(SERVICE_NAME) }.build()
}

/// `endpoint` is the collector's base, as every exporter reads `OTEL_EXPORTER_OTLP_ENDPOINT`.
fn traces_url(endpoint: &url::Url) -> String {
    format!("{}/v1/traces", endpoint.as_str().trim_end_matches('/'))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_collector_is_named_by_its_base() {
        let url = |text: &str| traces_url(&text.parse().unwrap());
        assert_eq!(url("http://otel:4318"), "http://otel:4318/v1/traces");
        assert_eq!(url("https://otel/base/"), "https://otel/base/v1/traces");
    }

    #[test]
    fn off_nothing_is_begun() {
        let headers = HeaderMap::new();
        let request = RequestStart {
            method: "GET",
            path: "/v1/models",
            headers: &headers,
            route: "/v1/models",
            operation: None,
            is_secure: false,
        };
        assert!(Traces::default().begin(request).is_none());
    }
}
