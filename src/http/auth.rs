//! API keys: who may use the server.
//!
//! [`require_key`] is a middleware of the router; keys are read by `cli/access.rs`. Only digests are kept: no key can
//! get into a log, and comparing tells nothing of a key, not even its length.

use axum::{
    extract::{MatchedPath, Request, State},
    http::{HeaderMap, header},
    middleware::Next,
    response::Response,
};
use sha2::{Digest, Sha256};
use subtle::{Choice, ConstantTimeEq};

use super::{error::ApiError, state::AppState};

/// What needs no key: probes, metrics and the contract. Every other route does.
const OPEN_ROUTES: [&str; 5] = ["/health", "/ready", "/metrics", "/version", "/openapi.json"];
/// Longer ones are not hashed.
const MAX_KEY_BYTES: usize = 512;

/// Why a request is not let in.
#[derive(Debug, thiserror::Error)]
pub enum AuthError {
    #[error("this server asks for an API key; send it in the header \"Authorization: Bearer KEY\"")]
    Missing,
    #[error("the API key is not one of this server's; check it, or ask whoever runs the server for one")]
    Unknown,
}

/// The digest of a key.
#[derive(Clone)]
pub struct ApiKey([u8; 32]);

impl std::fmt::Debug for ApiKey {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("ApiKey")
    }
}

impl ApiKey {
    /// `None` for what can be no key: nothing, spaces or control characters in it, or over 512 bytes.
    pub fn new(text: &str) -> Option<Self> {
        let fits = (1..=MAX_KEY_BYTES).contains(&text.len()) && text.bytes().all(|b| b.is_ascii_graphic());
        fits.then(|| ApiKey(Sha256::digest(text).into()))
    }
}

/// The client that a request comes from, as an extension of it, where keys are asked for.
#[derive(Debug, Clone, Copy)]
pub struct ClientKey(pub [u8; 32]);

/// Admits a request that names one of `keys`, or any request if there are none. Returns the key
/// that the request names.
///
/// # Errors
/// No key, or another one.
fn admit(keys: &[ApiKey], headers: &HeaderMap) -> Result<Option<ClientKey>, AuthError> {
    if keys.is_empty() {
        return Ok(None);
    }
    let sent = bearer(headers).ok_or(AuthError::Missing)?;
    let sent = ApiKey::new(sent).ok_or(AuthError::Unknown)?;
    // All of them, so that the time does not tell which one it was.
    let equal = keys.iter().fold(Choice::from(0), |equal, key| equal | key.0.ct_eq(&sent.0));
    if bool::from(equal) { Ok(Some(ClientKey(sent.0))) } else { Err(AuthError::Unknown) }
}

/// What follows "Bearer" in the header; the word may be in any case.
fn bearer(headers: &HeaderMap) -> Option<&str> {
    let (scheme, key) = headers.get(header::AUTHORIZATION)?.to_str().ok()?.trim().split_once(' ')?;
    scheme.eq_ignore_ascii_case("bearer").then_some(key.trim())
}

/// Answers 401 before a byte of the body is read. Paths without a route go on to their 404.
///
/// # Errors
/// No key, or another one.
pub async fn require_key(
    State(state): State<AppState>,
    mut request: Request,
    next: Next,
) -> Result<Response, ApiError> {
    let route = request.extensions().get::<MatchedPath>();
    let is_open = route.is_none_or(|route| OPEN_ROUTES.contains(&route.as_str()));
    if !is_open && let Some(client) = admit(&state.access().keys, request.headers())? {
        request.extensions_mut().insert(client);
    }
    Ok(next.run(request).await)
}

#[cfg(test)]
mod tests {
    use axum::http::HeaderValue;

    use super::*;

    fn keys(texts: &[&str]) -> Vec<ApiKey> {
        texts.iter().map(|text| ApiKey::new(text).unwrap()).collect()
    }

    fn sent(authorization: &str) -> HeaderMap {
        HeaderMap::from_iter([(header::AUTHORIZATION, HeaderValue::from_str(authorization).unwrap())])
    }

    #[test]
    fn any_of_several_keys_is_let_in_and_nothing_else() {
        let keys = keys(&["first-key", "second-key"]);
        for good in ["Bearer first-key", "bearer second-key", "BEARER  second-key "] {
            assert!(admit(&keys, &sent(good)).is_ok(), "{good}");
        }
        for bad in ["Bearer first-ke", "Bearer first-keyy", "Bearer x", "Bearer first-key second-key"] {
            assert!(matches!(admit(&keys, &sent(bad)), Err(AuthError::Unknown)), "{bad}");
        }
        for none in ["first-key", "Basic first-key", "Bearer", ""] {
            assert!(matches!(admit(&keys, &sent(none)), Err(AuthError::Missing)), "{none}");
        }
        assert!(matches!(admit(&keys, &HeaderMap::new()), Err(AuthError::Missing)));
        assert!(admit(&[], &HeaderMap::new()).is_ok());
    }

    #[test]
    fn what_is_printed_of_a_key_says_nothing() {
        assert_eq!(format!("{:?}", keys(&["secret"])), "[ApiKey]");
        for no_key in ["", "a b", "a\n", "ä", &"a".repeat(MAX_KEY_BYTES + 1)] {
            assert!(ApiKey::new(no_key).is_none(), "{no_key}");
        }
    }
}
