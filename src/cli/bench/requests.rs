//! The bodies of the requests of `tinyllava bench`: the same ones in every run, but for videos that are to be distinct.
//!
//! Called by [`super`]. Never talks to a server.

use std::path::Path;

use anyhow::{Context, ensure};
use base64::{Engine as _, engine::general_purpose::STANDARD};
use serde_json::json;
use uuid::Uuid;

use super::BenchArgs;

/// Largest video that is sent; it travels as base64 inside every request.
const MAX_VIDEO_BYTES: u64 = 64 << 20;

/// Seed of the first request; the next ones count up, so that every run sends the same.
pub(super) const FIRST_SEED: u64 = 1000;

/// Makes the bodies.
#[derive(Debug)]
pub(super) struct Requests {
    args: BenchArgs,
    pub(super) model: String,
    videos: Vec<Video>,
}

#[derive(Debug)]
struct Video {
    bytes: Vec<u8>,
    mime: &'static str,
}

impl Requests {
    /// Reads the videos.
    pub(super) fn new(args: &BenchArgs, model: String) -> anyhow::Result<Self> {
        let videos = args.video.iter().map(|path| Video::read(path, args.distinct_videos));
        Ok(Requests { args: args.clone(), model, videos: videos.collect::<anyhow::Result<_>>()? })
    }

    /// Of request `index`; several videos take turns.
    pub(super) fn body(&self, index: usize) -> Vec<u8> {
        let mut content = vec![json!({"type": "text", "text": self.args.prompt})];
        if let Some(Video { bytes, mime }) = self.videos.get(index % self.videos.len().max(1)) {
            let mut video = bytes.clone();
            if self.args.distinct_videos {
                // A box to be skipped, at the end: the same pictures in bytes that no server has seen before.
                video.extend([&[0, 0, 0, 24], &b"free"[..], Uuid::new_v4().as_bytes()].concat());
            }
            let url = format!("data:{mime};base64,{}", STANDARD.encode(video));
            content.insert(0, json!({"type": "video_url", "video_url": {"url": url}}));
        }
        let mut request = json!({
            "model": self.model,
            "messages": [{"role": "user", "content": content}],
            "max_tokens": self.args.max_tokens.of(FIRST_SEED, index),
            "seed": FIRST_SEED + index as u64,
            "stream": true,
            "stream_options": {"include_usage": true},
        });
        if self.args.ignore_eos {
            request["ignore_eos"] = json!(true);
        }
        if let Some(temperature) = self.args.temperature {
            request["temperature"] = json!(temperature);
        }
        request.to_string().into_bytes()
    }
}

impl Video {
    fn read(path: &Path, distinct: bool) -> anyhow::Result<Self> {
        let failed = || format!("cannot read the video {}", path.display());
        let num_bytes = std::fs::metadata(path).with_context(failed)?.len();
        ensure!(num_bytes <= MAX_VIDEO_BYTES, "{}: more than {MAX_VIDEO_BYTES} bytes", failed());
        let bytes = std::fs::read(path).with_context(failed)?;
        let is_mp4 = bytes.get(4..8) == Some(b"ftyp");
        ensure!(
            !distinct || is_mp4,
            "--distinct-videos needs an mp4 or mov file, and {} is none",
            path.display()
        );
        let extension = path.extension().unwrap_or_default().to_ascii_lowercase();
        let mime = match extension.to_str() {
            Some("webm") => "video/webm",
            Some("mkv") => "video/x-matroska",
            Some("mov") => "video/quicktime",
            Some("avi") => "video/x-msvideo",
            Some("gif") => "image/gif",
            Some("ts") => "video/mp2t",
            _ => "video/mp4",
        };
        Ok(Video { bytes, mime })
    }
}

#[cfg(test)]
mod tests {
    use serde_json::Value;

    use super::{super::tests::args, *};

    #[test]
    fn bodies_differ_in_seed_and_if_asked_in_the_bytes_of_the_video() {
        let file = tempfile::Builder::new().suffix(".mov").tempfile().unwrap();
        std::fs::write(file.path(), b"\0\0\0\x08ftyp").unwrap();
        let path = file.path().to_str().unwrap();
        let body = |options: &[&str], index| -> Value {
            let requests = Requests::new(&args(options).unwrap(), "m".into()).unwrap();
            serde_json::from_slice(&requests.body(index)).unwrap()
        };
        let same = |index| body(&["--video", path], index);
        assert_eq!((&same(0)["seed"], &same(3)["seed"]), (&json!(1000), &json!(1003)));
        assert_eq!(same(0)["messages"], same(1)["messages"]);
        let url = |index| {
            let body = body(&["--video", path, "--distinct-videos"], index);
            body["messages"][0]["content"][0]["video_url"]["url"].as_str().unwrap().to_owned()
        };
        let (first, second) = (url(0), url(1));
        assert_ne!(first, second);
        assert_ne!(first, url(0), "levels and runs must not share videos");
        let base64 = first.strip_prefix("data:video/quicktime;base64,").unwrap();
        let bytes = STANDARD.decode(base64).unwrap();
        assert_eq!((&bytes[..16], bytes.len()), (&b"\0\0\0\x08ftyp\0\0\0\x18free"[..], 32));
        let other = tempfile::Builder::new().suffix(".webm").tempfile().unwrap();
        std::fs::write(other.path(), b"webm").unwrap();
        let turns = |index| {
            let body = body(&["--video", path, "--video", other.path().to_str().unwrap()], index);
            body["messages"][0]["content"][0]["video_url"]["url"].as_str().unwrap()[..10].to_owned()
        };
        assert_eq!((turns(0), turns(1), turns(2)), (turns(2), "data:video".into(), turns(0)));
        let text_only = body(&["--ignore-eos", "--temperature", "0"], 0);
        assert_eq!(text_only["messages"][0]["content"].as_array().unwrap().len(), 1);
        assert_eq!((&text_only["ignore_eos"], text_only["temperature"].as_f64()), (&json!(true), Some(0.0)));
    }

    #[test]
    fn a_video_that_cannot_be_made_distinct_is_refused() {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), b"GIF89a__").unwrap();
        let options = ["--video", file.path().to_str().unwrap(), "--distinct-videos"];
        let error = Requests::new(&args(&options).unwrap(), "m".into()).unwrap_err().to_string();
        assert!(error.contains("needs an mp4"), "{error}");
    }
}
