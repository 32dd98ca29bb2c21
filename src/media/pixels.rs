//! Resizes one RGB frame to the model's square input, byte for byte as Pillow's 8-bit bicubic does.
//!
//! Called by `decode.rs` for every frame that comes out of the decoder, and by `tinyllava trace`.
//! Must run on the blocking pool, and must never use floating point on pixels: the model was trained on the
//! rounding of this integer arithmetic, and other implementations of "bicubic" differ from it by several levels.

/// Fraction bits of a weight: 32 bits, less 8 of a pixel, less 2 for weights outside 0..1.
const PRECISION_BITS: u32 = 32 - 8 - 2;
/// Half a level, added before the shift so that it rounds.
const ROUNDING: i32 = 1 << (PRECISION_BITS - 1);
const CHANNELS: usize = 3;

/// The weights of one axis: every output position is a weighted sum of `taps` consecutive inputs.
#[derive(Debug)]
struct AxisWeights {
    /// Where each output position starts reading, and how many inputs it reads.
    windows: Vec<(usize, usize)>,
    /// `[output, max_taps]`, zero-padded, fixed point.
    weights: Vec<i32>,
    max_taps: usize,
}

impl AxisWeights {
    fn new(input: usize, output: usize) -> Self {
        let scale = input as f64 / output as f64;
        // Shrinking widens the filter over all the inputs an output covers; growing keeps it at 2 each side.
        let filter_scale = scale.max(1.0);
        let support = 2.0 * filter_scale;
        let max_taps = support.ceil() as usize * 2 + 1;
        let mut windows = Vec::with_capacity(output);
        let mut weights = vec![0i32; output * max_taps];
        let mut exact = Vec::with_capacity(max_taps);
        for position in 0..output {
            let center = (position as f64 + 0.5) * scale;
            let first = (center - support + 0.5).max(0.0) as usize;
            let end = ((center + support + 0.5) as usize).min(input);
            exact.clear();
            exact.extend((first..end).map(|x| bicubic((x as f64 - center + 0.5) * (1.0 / filter_scale))));
            let sum: f64 = exact.iter().sum();
            let row = &mut weights[position * max_taps..][..exact.len()];
            for (fixed, weight) in row.iter_mut().zip(&exact) {
                // Half away from zero, with the original's own order of operations.
                let scaled = weight / sum * f64::from(1 << PRECISION_BITS);
                *fixed = if scaled < 0.0 { scaled - 0.5 } else { scaled + 0.5 } as i32;
            }
            windows.push((first, end - first));
        }
        AxisWeights { windows, weights, max_taps }
    }

    fn of(&self, position: usize) -> (usize, &[i32]) {
        let (first, taps) = self.windows[position];
        (first, &self.weights[position * self.max_taps..][..taps])
    }
}

/// The cubic convolution kernel with a = -0.5.
fn bicubic(x: f64) -> f64 {
    const A: f64 = -0.5;
    let x = x.abs();
    if x < 1.0 {
        ((A + 2.0) * x - (A + 3.0)) * x * x + 1.0
    } else if x < 2.0 {
        (((x - 5.0) * x + 8.0) * x - 4.0) * A
    } else {
        0.0
    }
}

fn to_level(sum: i32) -> u8 {
    (sum >> PRECISION_BITS).clamp(0, 255) as u8
}

/// Resizes frames of one size; the weights are computed once for all of them.
#[derive(Debug)]
pub struct Resizer {
    width: usize,
    height: usize,
    size: usize,
    /// None: this axis has the right length already, and its pass is skipped.
    horizontal: Option<AxisWeights>,
    vertical: Option<AxisWeights>,
}

impl Resizer {
    /// From `width` x `height` to `size` x `size` (the aspect ratio is not kept, nothing is cropped).
    pub fn new(width: usize, height: usize, size: usize) -> Self {
        assert!(width > 0 && height > 0 && size > 0, "empty frames are refused before: this is a bug");
        let axis = |input| (input != size).then(|| AxisWeights::new(input, size));
        Resizer { width, height, size, horizontal: axis(width), vertical: axis(height) }
    }

    /// One frame `[height, width, 3]` to `[size, size, 3]`.
    pub fn resize(&self, frame: &[u8]) -> Vec<u8> {
        assert_eq!(frame.len(), self.width * self.height * CHANNELS, "frame of another size: this is a bug");
        let narrowed = match &self.horizontal {
            Some(weights) => self.horizontal_pass(frame, weights),
            None => frame.to_vec(),
        };
        match &self.vertical {
            Some(weights) => self.vertical_pass(&narrowed, weights),
            None => narrowed,
        }
    }

    /// `[height, width, 3]` -> `[height, size, 3]`.
    fn horizontal_pass(&self, frame: &[u8], weights: &AxisWeights) -> Vec<u8> {
        let mut out = vec![0u8; self.height * self.size * CHANNELS];
        let rows = frame.chunks_exact(self.width * CHANNELS);
        for (row, out_row) in rows.zip(out.chunks_exact_mut(self.size * CHANNELS)) {
            for (position, pixel) in out_row.chunks_exact_mut(CHANNELS).enumerate() {
                let (first, taps) = weights.of(position);
                let inputs = row[first * CHANNELS..][..taps.len() * CHANNELS].chunks_exact(CHANNELS);
                let mut sums = [ROUNDING; CHANNELS];
                for (input, &weight) in inputs.zip(taps) {
                    for channel in 0..CHANNELS {
                        sums[channel] += i32::from(input[channel]) * weight;
                    }
                }
                for channel in 0..CHANNELS {
                    pixel[channel] = to_level(sums[channel]);
                }
            }
        }
        out
    }

    /// `[height, size, 3]` -> `[size, size, 3]`, whole rows at a time so that it vectorises.
    fn vertical_pass(&self, frame: &[u8], weights: &AxisWeights) -> Vec<u8> {
        let stride = self.size * CHANNELS;
        let mut out = vec![0u8; self.size * stride];
        let mut sums = vec![0i32; stride];
        for (position, out_row) in out.chunks_exact_mut(stride).enumerate() {
            let (first, taps) = weights.of(position);
            sums.fill(ROUNDING);
            for (row, &weight) in frame[first * stride..].chunks_exact(stride).zip(taps) {
                for (sum, &level) in sums.iter_mut().zip(row) {
                    *sum += i32::from(level) * weight;
                }
            }
            for (level, &sum) in out_row.iter_mut().zip(&sums) {
                *level = to_level(sum);
            }
        }
        out
    }
}

/// Frames `[t, height, width, 3]` to `[t, size, size, 3]`; for tools that hold whole clips.
pub fn resize(frames: &[u8], height: usize, width: usize, size: usize) -> Vec<u8> {
    let resizer = Resizer::new(width, height, size);
    frames.chunks_exact(width * height * CHANNELS).flat_map(|frame| resizer.resize(frame)).collect()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use safetensors::SafeTensors;

    use super::*;

    fn reference() -> Vec<u8> {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/golden/preprocess_cases.safetensors");
        std::fs::read(path).unwrap()
    }

    #[test]
    fn resize_equals_pillow_byte_for_byte() {
        let file = reference();
        let tensors = SafeTensors::deserialize(&file).unwrap();
        for case in ["a", "c", "d"] {
            let frame = tensors.tensor(&format!("{case}_in_u8")).unwrap();
            let expected = tensors.tensor(&format!("{case}_resized_u8")).unwrap();
            let (height, width) = (frame.shape()[0], frame.shape()[1]);
            let resized = resize(frame.data(), height, width, expected.shape()[0]);
            assert_eq!(resized, expected.data(), "case {case}");
        }
    }

    #[test]
    fn a_frame_of_the_right_size_is_untouched() {
        let frame: Vec<u8> = (0..12 * 12 * 3).map(|i| (i * 7 % 256) as u8).collect();
        assert_eq!(resize(&frame, 12, 12, 12), frame);
    }

    proptest! {
        #[test]
        fn a_flat_frame_stays_flat(width in 1usize..80, height in 1usize..80, size in 1usize..60, level: u8) {
            let frame = vec![level; width * height * 3];
            let resized = resize(&frame, height, width, size);
            prop_assert_eq!(resized, vec![level; size * size * 3]);
        }

        #[test]
        fn weights_never_read_outside_the_frame(input in 1usize..5000, output in 1usize..500) {
            let weights = AxisWeights::new(input, output);
            for position in 0..output {
                let (first, taps) = weights.of(position);
                prop_assert!(!taps.is_empty() && first + taps.len() <= input);
                // Accumulators are 32 bits: the worst sum must fit.
                let worst: i64 = taps.iter().map(|&w| i64::from(w).abs() * 255).sum();
                prop_assert!(worst + i64::from(ROUNDING) <= i64::from(i32::MAX));
            }
        }
    }
}
