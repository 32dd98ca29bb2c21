//! Makes test videos whose every frame shows its own number, and reads the number back from sampled frames.
//!
//! Used by the other media tests. The number is burnt in as a grid of black and white cells, so that it survives
//! any codec, any resize and any rotation.

use std::{
    io::Write,
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use tinyllava::{
    config::MediaConfig,
    media::{FrameSampling, MediaLoader, VideoFrames, VideoSource},
};

/// Cells of the grid: 16 bits of the number, row by row, then the lower 8 bits inverted as a check.
pub const COLUMNS: usize = 6;
pub const ROWS: usize = 4;
/// Side of the frames that tests ask for, pixels.
pub const SIZE: usize = 96;

/// A raw video to be encoded.
#[derive(Clone, Copy)]
pub struct Clip {
    pub frames: usize,
    pub fps: &'static str,
    pub width: usize,
    pub height: usize,
}

impl Default for Clip {
    fn default() -> Self {
        Clip { frames: 97, fps: "25", width: 96, height: 64 }
    }
}

impl Clip {
    /// Encodes to `directory/name` with ffmpeg's output options `options` (separated by spaces).
    pub fn encode(&self, directory: &Path, name: &str, options: &str) -> PathBuf {
        let path = directory.join(name);
        let mut child = Command::new("ffmpeg")
            .args(["-loglevel", "error", "-y", "-f", "rawvideo", "-pix_fmt", "gray", "-r", self.fps])
            .args(["-s", &format!("{}x{}", self.width, self.height), "-i", "pipe:0"])
            .args(options.split_whitespace())
            .arg(&path)
            .stdin(Stdio::piped())
            .spawn()
            .unwrap();
        let mut stdin = child.stdin.take().unwrap();
        for number in 0..self.frames {
            stdin.write_all(&self.frame(number)).unwrap();
        }
        drop(stdin);
        assert!(child.wait().unwrap().success(), "ffmpeg could not make {name}");
        path
    }

    fn frame(&self, number: usize) -> Vec<u8> {
        let mut frame = Vec::with_capacity(self.width * self.height);
        for y in 0..self.height {
            for x in 0..self.width {
                let cell = y * ROWS / self.height * COLUMNS + x * COLUMNS / self.width;
                frame.push(if bit_of(number, cell) { 235 } else { 16 });
            }
        }
        frame
    }
}

fn bit_of(number: usize, cell: usize) -> bool {
    if cell < 16 { number >> cell & 1 == 1 } else { number >> (cell - 16) & 1 == 0 }
}

/// Encodes a file into another with ffmpeg (stream copies, edit lists, metadata).
pub fn remux(from: &Path, name: &str, input_options: &str, output_options: &str) -> PathBuf {
    let path = from.with_file_name(name);
    let status = Command::new("ffmpeg")
        .args(["-loglevel", "error", "-y"])
        .args(input_options.split_whitespace())
        .arg("-i")
        .arg(from)
        .args(output_options.split_whitespace())
        .arg(&path)
        .status()
        .unwrap();
    assert!(status.success(), "ffmpeg could not make {name}");
    path
}

/// The number in a frame `[size, size, 3]` whose point (x, y) in 0..1 is taken from `place(x, y)`.
pub fn number_at(frame: &[u8], size: usize, place: impl Fn(f64, f64) -> (f64, f64)) -> Option<usize> {
    let white = |cell: usize| {
        let x = ((cell % COLUMNS) as f64 + 0.5) / COLUMNS as f64;
        let y = ((cell / COLUMNS) as f64 + 0.5) / ROWS as f64;
        let (x, y) = place(x, y);
        let pixel = (y * size as f64) as usize * size + (x * size as f64) as usize;
        frame[pixel * 3] > 128
    };
    let number = (0..16).filter(|&cell| white(cell)).map(|cell| 1 << cell).sum();
    (16..24).all(|cell| white(cell) == bit_of(number, cell)).then_some(number)
}

/// The numbers in sampled frames; a frame that cannot be read fails the test.
pub fn numbers(frames: &VideoFrames) -> Vec<usize> {
    let bytes = frames.size * frames.size * 3;
    let number = |frame| number_at(frame, frames.size, |x, y| (x, y)).expect("an unreadable frame");
    frames.rgb.chunks_exact(bytes).map(number).collect()
}

pub fn loader() -> MediaLoader {
    loader_with(MediaConfig::default())
}

pub fn loader_with(config: MediaConfig) -> MediaLoader {
    MediaLoader::new(config, SIZE).unwrap()
}

/// Default sampling of a local file.
pub async fn sample(path: &Path) -> std::sync::Arc<VideoFrames> {
    let source = VideoSource::LocalFile(path.to_owned());
    let name = path.display().to_string();
    loader().load(source, FrameSampling::default()).await.unwrap_or_else(|error| panic!("{name}: {error}"))
}
