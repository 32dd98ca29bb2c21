//! Sampled frames of recent videos, so that a second question about a video starts no decoder.
//!
//! Called by `mod.rs`. Requests for the same frames at the same time wait for one decoder; if the request that runs
//! it is dropped, the next one takes over. Must never hold more than its bytes.

use std::{future::Future, sync::Arc};

use moka::future::Cache;

use super::{MediaError, VideoFrames};

/// Frames by digest, least recently and frequently used out first.
#[derive(Debug, Clone)]
pub struct FrameCache {
    cache: Cache<[u8; 32], Arc<VideoFrames>>,
}

impl FrameCache {
    pub fn new(max_bytes: usize) -> Self {
        let weigh = |_: &[u8; 32], frames: &Arc<VideoFrames>| {
            let info = frames.info.sampled_indices.len() * (size_of::<usize>() + size_of::<f64>());
            u32::try_from(frames.rgb.len() + info).unwrap_or(u32::MAX)
        };
        FrameCache { cache: Cache::builder().weigher(weigh).max_capacity(max_bytes as u64).build() }
    }

    /// The frames of `digest`, made by `load` unless they are here or on their way. True: `load` was run by this call.
    pub async fn get_or_load(
        &self,
        digest: [u8; 32],
        load: impl Future<Output = Result<Arc<VideoFrames>, MediaError>>,
    ) -> Result<(Arc<VideoFrames>, bool), MediaError> {
        let entry = self.cache.entry(digest).or_try_insert_with(load).await;
        let entry = entry.map_err(|error| MediaError::clone(&error))?;
        let fresh = entry.is_fresh();
        Ok((entry.into_value(), fresh))
    }
}
