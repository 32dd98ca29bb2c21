//! For whom a video is loaded: what may be shared with others, what goes along, who hears of it.
//!
//! Made by `http/pipeline.rs`; read by `mod.rs` and `source.rs`.

use std::{fmt, sync::Arc};

use reqwest::header::HeaderMap;

use crate::telemetry::Trail;

/// What lasts until the memory of a source is free again, whoever has left by then: the caller's share of it.
pub type Hold = Option<Arc<dyn Send + Sync>>;

/// Whose downloads may be shared: requests with the same `cache_salt`.
pub type Salt = Option<Arc<str>>;

/// See the module. The default is nobody in particular.
#[derive(Clone, Default)]
pub struct Caller {
    /// Downloads, frames and the digest are shared with callers of the same one only.
    pub salt: Salt,
    /// Digest of the API key, where the server has keys: names of media belong to a key and a salt.
    pub client: Option<[u8; 32]>,
    /// Lasts as long as the memory of the source, also when the load is dropped.
    pub hold: Hold,
    /// Sent along with a download: to what trace it belongs. Who joins a running download sends none.
    pub headers: HeaderMap,
    /// Gets to know of every stage.
    pub trail: Trail,
}

impl fmt::Debug for Caller {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Caller").field("trail", &self.trail).finish_non_exhaustive()
    }
}
