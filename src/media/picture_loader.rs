//! The path of pictures through the media stage: detect, select, decode, resize, cache.
//!
//! Methods of [`MediaLoader`] for its `load_for`. Must never decode on an async thread, nor outside
//! the limits on decoders (their number and their time).

use std::sync::Arc;

use super::{
    Caller, MediaError, MediaLoader, VideoFrames, VideoInfo,
    content::{self, Content},
    local_file::LocalFile,
    pictures::{CancelOnDrop, PictureDecoder, PictureSource, Pictures},
    repeated,
    selection::Selection,
    video_info::applied,
};
use crate::telemetry::{Stage, Trail};

impl MediaLoader {
    /// Loads `selection` out of pictures.
    pub(super) async fn load_pictures(
        &self,
        source: PictureSource,
        selection: Selection,
        caller: &Caller,
    ) -> Result<Arc<VideoFrames>, MediaError> {
        let digest = self.digest(source.files(), &selection.digest_bytes, &caller.salt);
        let load = self.decode_pictures(source, selection, digest, &caller.trail);
        self.cached(digest, load, &caller.trail).await
    }

    /// Detects the kind of a file, whatever media type its sender names.
    pub(super) async fn content(&self, file: &LocalFile) -> Result<Content, MediaError> {
        let (file, config) = (file.clone(), self.config.clone());
        let look = tokio::task::spawn_blocking(move || content::of(&file, &config));
        look.await.expect("looking into a file does not panic: this is a bug")
    }

    /// Decodes and resizes pictures on the blocking pool, within the limits of video decoders.
    async fn decode_pictures(
        &self,
        source: PictureSource,
        selection: Selection,
        digest: [u8; 32],
        trail: &Trail,
    ) -> Result<VideoFrames, MediaError> {
        let place = self.place(trail).await?;
        let guard = CancelOnDrop::default();
        let decoder = PictureDecoder {
            image_size: self.image_size,
            config: self.config.clone(),
            cancelled: guard.0.clone(),
        };
        let container = source.container();
        let mut wanted = selection.indices.clone();
        wanted.dedup();
        let work = tokio::task::spawn_blocking(move || {
            // Given back when the work has really ended, also if no one waits for it.
            let _place = place;
            decoder.decode(&source, &wanted)
        });
        let timeout = self.config.decode_timeout;
        let decode = async {
            let decoded = tokio::time::timeout(timeout, work).await;
            let decoded = decoded.map_err(|_| MediaError::DecodeTimeout { seconds: timeout.as_secs() })?;
            decoded.map_err(|error| {
                tracing::error!(%error, "decoding pictures failed");
                MediaError::Undecodable("a picture could not be decoded; send it in another format".into())
            })?
        };
        let decoded = trail.time(Stage::Decode, decode).await?;
        let Pictures { frames, width, height, codec, decoded_share, resizing } = decoded;
        trail.decoded_frames(frames.len());
        resizing.run(Stage::Resize).into_iter().for_each(|run| trail.push(run));
        let info = VideoInfo {
            source_frames: selection.source_frames,
            promised_frames: selection.source_frames,
            decoded_frames: selection.source_frames,
            decoded_share,
            duration: selection.duration,
            width,
            height,
            container: container.into(),
            codec: codec.into(),
            sampled_timestamps: selection.times,
            ..applied(selection.applied, selection.indices)
        };
        let rgb = repeated(&frames, &info.sampled_indices);
        Ok(VideoFrames { rgb, size: self.image_size, info, digest })
    }
}
