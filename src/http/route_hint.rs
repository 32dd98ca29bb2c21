//! Answers requests that have no handler: suggests a route, or lists the methods of the route.
//!
//! Called by `mod.rs` as the fallbacks of the router. Must never repeat more than the start of a
//! path.

use std::sync::Arc;

use axum::http::Method;

use super::{error::ApiError, validate::shorten};

/// Segments of a path that are looked at, from its end.
const MAX_SEGMENTS: usize = 16;

/// Methods and patterns of a router's routes; cheap to clone.
#[derive(Debug, Clone)]
pub struct RouteTable(Arc<[(Method, &'static str)]>);

impl RouteTable {
    pub fn new(routes: impl IntoIterator<Item = (Method, &'static str)>) -> Self {
        RouteTable(routes.into_iter().collect())
    }

    /// The error for a path without a route.
    pub fn unknown_path(&self, method: &Method, path: &str) -> ApiError {
        let asked = format!("{} {}", shorten(method.as_str()), shorten(path));
        ApiError::UnknownRoute(match self.nearest(path) {
            Some(nearest) => format!("no route for {asked}; did you mean {nearest}?"),
            None => format!("no route for {asked}; see /openapi.json"),
        })
    }

    /// The error for a path whose route (`pattern`) does not take `method`.
    pub fn wrong_method(&self, method: &Method, pattern: &str) -> ApiError {
        let of_route = self.0.iter().filter(|(_, known)| *known == pattern);
        let methods: Vec<&str> = of_route.map(|(method, _)| method.as_str()).collect();
        let methods = methods.join(" or ");
        let method = shorten(method.as_str());
        ApiError::MethodNotAllowed(format!("{pattern} does not take {method}; send {methods}"))
    }

    /// Finds the route that `path` matches without its first segments, or with `/v1` before it.
    fn nearest(&self, path: &str) -> Option<String> {
        let segments: Vec<&str> = path.split('/').filter(|segment| !segment.is_empty()).collect();
        let segments = &segments[segments.len().saturating_sub(MAX_SEGMENTS)..];
        for start in 0..segments.len() {
            let rest = &segments[start..];
            for candidate in [[&["v1"], rest].concat(), rest.to_vec()] {
                if let Some((_, pattern)) = self.0.iter().find(|(_, pattern)| matches(pattern, &candidate)) {
                    return Some(filled(pattern, &candidate));
                }
            }
        }
        None
    }
}

/// Returns the path of a pattern that fits `segments`.
fn filled(pattern: &str, segments: &[&str]) -> String {
    let mut path = String::new();
    for (position, wanted) in pattern.split('/').skip(1).enumerate() {
        path.push('/');
        match segments.get(position) {
            Some(_) if wanted.starts_with("{*") => path.push_str(&shorten(&segments[position..].join("/"))),
            Some(segment) if wanted.starts_with('{') => path.push_str(&shorten(segment)),
            _ => path.push_str(wanted),
        }
    }
    path
}

/// Returns true if a pattern of the router fits `segments`, ignoring case.
fn matches(pattern: &str, segments: &[&str]) -> bool {
    let mut segments = segments.iter();
    for wanted in pattern.split('/').skip(1) {
        if wanted.starts_with("{*") {
            return segments.next().is_some();
        }
        let fits = |segment: &&str| wanted.starts_with('{') || wanted.eq_ignore_ascii_case(segment);
        if !segments.next().is_some_and(fits) {
            return false;
        }
    }
    segments.next().is_none()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn table() -> RouteTable {
        RouteTable::new([
            (Method::POST, "/v1/chat/completions"),
            (Method::POST, "/v1/completions"),
            (Method::GET, "/v1/files/{id}"),
            (Method::DELETE, "/v1/files/{id}"),
            (Method::GET, "/v1/models/{*id}"),
            (Method::POST, "/tokenize"),
        ])
    }

    #[test]
    fn near_paths_lead_to_their_route() {
        for (path, route) in [
            ("/chat/completions", Some("/v1/chat/completions")),
            ("/v1/v1/chat/completions", Some("/v1/chat/completions")),
            ("/v1/chat/completions/", Some("/v1/chat/completions")),
            ("//v1//chat/completions", Some("/v1/chat/completions")),
            ("/V1/Chat/Completions", Some("/v1/chat/completions")),
            ("/api/v1/chat/completions", Some("/v1/chat/completions")),
            ("/openai/deployments/m/chat/completions", Some("/v1/chat/completions")),
            ("/completions", Some("/v1/completions")),
            ("/files/file-1", Some("/v1/files/file-1")),
            ("/models/org/name", Some("/v1/models/org/name")),
            ("/v1/tokenize", Some("/tokenize")),
            ("/v1/embeddings", None),
            ("/v1", None),
            ("/", None),
            ("", None),
        ] {
            assert_eq!(table().nearest(path).as_deref(), route, "{path}");
        }
    }

    #[test]
    fn the_start_of_a_path_is_repeated_at_most() {
        let error = table().unknown_path(&Method::GET, &format!("/{}", "x/".repeat(5000)));
        assert!(error.to_string().len() < 150, "{error}");
        let method = Method::from_bytes("X".repeat(3000).as_bytes()).unwrap();
        for error in [table().unknown_path(&method, "/"), table().wrong_method(&method, "/tokenize")] {
            assert!(error.to_string().len() < 150, "{error}");
        }
    }

    #[test]
    fn a_wrong_method_is_told_the_right_ones() {
        let error = table().wrong_method(&Method::PUT, "/v1/files/{id}");
        assert_eq!(error.to_string(), "/v1/files/{id} does not take PUT; send GET or DELETE");
    }
}
