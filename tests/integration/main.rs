mod media_clips;
mod media_frames;
mod media_limits;
mod media_seeking;
mod media_sources;
