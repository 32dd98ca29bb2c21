//! gzip for replies that are text and not short, when the client takes it.
//!
//! Called by the router. Never for event streams, whose events must not wait for one another, nor for files.

use axum::http::{Extensions, HeaderMap, StatusCode, Version, header};
use tower_http::{
    CompressionLevel,
    compression::{
        CompressionLayer,
        predicate::{And, Predicate, SizeAbove},
    },
};

/// Shorter bodies fit into a packet as they are.
const MIN_BYTES: u64 = 1024;
const TEXT_TYPES: [&str; 2] = ["application/json", "text/plain"];

type IsText = fn(StatusCode, Version, &HeaderMap, &Extensions) -> bool;

/// Compresses as the body is written, a few KiB at a time; the fastest level keeps that off the clock.
pub fn layer() -> CompressionLayer<And<SizeAbove, IsText>> {
    let worth_it = SizeAbove::new(MIN_BYTES).and(is_text as IsText);
    CompressionLayer::new().quality(CompressionLevel::Fastest).compress_when(worth_it)
}

fn is_text(_: StatusCode, _: Version, headers: &HeaderMap, _: &Extensions) -> bool {
    let content_type = headers.get(header::CONTENT_TYPE).and_then(|value| value.to_str().ok());
    content_type.is_some_and(|kind| TEXT_TYPES.iter().any(|text| kind.starts_with(text)))
}
