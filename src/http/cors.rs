//! Which web pages may call the server from a browser.
//!
//! [`parse_origin`] is called by `cli/access.rs`, [`layer`] by the router. Without an origin there is no layer, and
//! browsers keep pages of other origins out.

use std::time::Duration;

use axum::http::{HeaderName, HeaderValue, Method, header};
use tower_http::cors::{AllowHeaders, AllowOrigin, CorsLayer};
use url::Url;

use super::record::REQUEST_ID;

/// Any page.
const ANY: HeaderValue = HeaderValue::from_static("*");
/// How long a browser may remember the answer to a preflight.
const MAX_AGE: Duration = Duration::from_secs(600);
/// What pages may read of a response besides its body.
const EXPOSED: [HeaderName; 2] = [REQUEST_ID, header::RETRY_AFTER];

/// `*`, or an origin as browsers send it.
///
/// # Errors
/// A sentence for whatever is no origin.
pub fn parse_origin(text: &str) -> Result<HeaderValue, String> {
    if text == "*" {
        return Ok(ANY);
    }
    let wrong =
        || format!("\"{text}\" is no origin; write scheme://host or scheme://host:port, or * for any");
    let url = Url::parse(text).map_err(|_| wrong())?;
    let host = url.host_str().filter(|host| !host.is_empty()).ok_or_else(wrong)?;
    // Url leaves out the port that the scheme implies, as browsers do.
    let port = url.port().map(|port| format!(":{port}")).unwrap_or_default();
    let origin = format!("{}://{host}{port}", url.scheme());
    if url.as_str().trim_end_matches('/') != origin {
        return Err(wrong());
    }
    HeaderValue::from_str(&origin).map_err(|_| wrong())
}

/// Answers preflights and marks responses for `origins`.
pub fn layer(origins: &[HeaderValue]) -> Option<CorsLayer> {
    if origins.is_empty() {
        return None;
    }
    let origins = match origins.contains(&ANY) {
        true => AllowOrigin::any(),
        false => AllowOrigin::list(origins.iter().cloned()),
    };
    let layer = CorsLayer::new()
        .allow_origin(origins)
        .allow_methods([Method::GET, Method::POST, Method::DELETE])
        // OpenAI's own client sends a dozen of its own, a new one now and then.
        .allow_headers(AllowHeaders::mirror_request())
        .expose_headers(EXPOSED)
        .max_age(MAX_AGE);
    Some(layer)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn origins_are_written_as_browsers_send_them() {
        for (written, sent) in [
            ("*", "*"),
            ("https://example.org", "https://example.org"),
            ("https://Example.org:443/", "https://example.org"),
            ("http://localhost:3000", "http://localhost:3000"),
            ("http://[::1]:3000", "http://[::1]:3000"),
            ("chrome-extension://abcdef", "chrome-extension://abcdef"),
        ] {
            assert_eq!(parse_origin(written).unwrap(), sent);
        }
        for no_origin in [
            "",
            "example.org",
            "https://",
            "https://a.org/page",
            "https://u@a.org",
            "https://a.org?x",
            "null",
        ] {
            assert!(parse_origin(no_origin).unwrap_err().contains("scheme://host"), "{no_origin}");
        }
    }
}
