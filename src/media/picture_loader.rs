//! The way of pictures through the media stage: content, selection, decode, resize, cache.
//!
//! Part of [`MediaLoader`], called by its `load_for`. Never decodes on an async thread, and keeps to the places and the
//! time of video decoders.

use std::sync::Arc;

use super::{
    Caller, FrameSampling, MediaError, MediaLoader, VideoFrames, VideoInfo, VideoSource, applied,
    content::{self, Content},
    pictures::{Album, CancelOnDrop, PictureDecoder, Pictures},
    repeated,
    selection::{PictureList, Selection},
    source::LocalFile,
};
use crate::telemetry::{Stage, Trail};

impl MediaLoader {
    /// Frames of a list that the client sampled itself.
    pub(super) async fn load_list(
        &self,
        source: VideoSource,
        sampling: FrameSampling,
        caller: &Caller,
    ) -> Result<Arc<VideoFrames>, MediaError> {
        let (source, timestamps) = match source {
            VideoSource::Timed(source, timestamps) => (*source, Some(timestamps)),
            source => (source, None),
        };
        let files = self.fetched(source, caller).await?;
        let list = PictureList { num_pictures: files.len(), timestamps: timestamps.as_deref() };
        let selection = Selection::of_list(sampling, list, &self.config)?;
        self.load_pictures(Album::List(files), selection, caller).await
    }

    pub(super) async fn load_pictures(
        &self,
        album: Album,
        selection: Selection,
        caller: &Caller,
    ) -> Result<Arc<VideoFrames>, MediaError> {
        let digest = self.digest(album.files(), &selection.digest_bytes, &caller.salt);
        let load = self.decode_pictures(album, selection, digest, &caller.trail);
        self.cached(digest, load, &caller.trail).await
    }

    /// What a file is, whatever its sender calls it.
    pub(super) async fn content(&self, file: &LocalFile) -> Result<Content, MediaError> {
        let (file, config) = (file.clone(), self.config.clone());
        let look = tokio::task::spawn_blocking(move || content::of(&file, &config));
        look.await.expect("looking into a file does not panic: this is a bug")
    }

    /// Decodes and resizes pictures on the blocking pool, among the decoders of videos and within their time.
    async fn decode_pictures(
        &self,
        album: Album,
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
        let container = album.container();
        let mut wanted = selection.indices.clone();
        wanted.dedup();
        let work = tokio::task::spawn_blocking(move || {
            // Given back when the work has really ended, whoever still waits for it.
            let _place = place;
            decoder.decode(&album, &wanted)
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
        let Pictures { frames, width, height, codec, resizing } = decoded;
        trail.decoded_frames(frames.len());
        resizing.run(Stage::Resize).into_iter().for_each(|run| trail.push(run));
        let info = VideoInfo {
            source_frames: selection.source_frames,
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
