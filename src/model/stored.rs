//! One tensor as a checkpoint stores it, and how it becomes f32.
//!
//! Made by [`super::weights`], read by the layers' own `load`. Never computes on what it reads.

use std::sync::atomic::{AtomicUsize, Ordering};

use bytes::Bytes;
use half::{bf16, f16, slice::HalfFloatSliceExt};
use rayon::prelude::*;

use super::synth::Noise;

/// Stored element type.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum StoredDType {
    F32,
    F16,
    Bf16,
}

impl StoredDType {
    /// Bytes of one element.
    pub fn num_bytes(self) -> usize {
        match self {
            StoredDType::F32 => 4,
            StoredDType::F16 | StoredDType::Bf16 => 2,
        }
    }

    /// As safetensors files call it.
    pub fn name(self) -> &'static str {
        match self {
            StoredDType::F32 => "F32",
            StoredDType::F16 => "F16",
            StoredDType::Bf16 => "BF16",
        }
    }
}

/// One tensor of floats: little-endian, row-major.
#[derive(Debug, Clone)]
pub struct StoredTensor {
    pub dtype: StoredDType,
    pub shape: Vec<usize>,
    /// Of the mapped file, or made (pickles, synthetic checkpoints). Need not be aligned.
    pub data: Bytes,
}

/// Elements of one parallel task.
const ELEMENTS_A_TASK: usize = 1 << 16;

impl StoredTensor {
    /// The elements as f32, row-major.
    pub fn to_f32(&self) -> Vec<f32> {
        let mut out = vec![0.0; self.shape.iter().product()];
        let tasks = out.par_chunks_mut(ELEMENTS_A_TASK).enumerate();
        tasks.for_each(|(task, out)| self.copy_f32(task * ELEMENTS_A_TASK, out));
        out
    }

    /// Elements `[start, start + out.len())` as f32.
    #[inline(always)]
    pub fn copy_f32(&self, start: usize, out: &mut [f32]) {
        let width = self.dtype.num_bytes();
        let bytes = &self.data[start * width..(start + out.len()) * width];
        match self.dtype {
            StoredDType::F32 => copy(bytes, out, f32::from_le_bytes),
            StoredDType::F16 => copy_f16(bytes, out),
            StoredDType::Bf16 => copy(bytes, out, |bytes| bf16::from_le_bytes(bytes).to_f32()),
        }
    }

    /// Returns whether all elements, as f32, have the bits of those of `other`.
    pub(super) fn has_bits_of(&self, other: &StoredTensor) -> bool {
        if self.shape != other.shape {
            return false;
        }
        let len: usize = self.shape.iter().product();
        (0..len.div_ceil(ELEMENTS_A_TASK)).into_par_iter().all(|task| {
            const PART: usize = 256;
            let end = len.min((task + 1) * ELEMENTS_A_TASK);
            let (mut a, mut b) = ([0.0f32; PART], [0.0f32; PART]);
            (task * ELEMENTS_A_TASK..end).step_by(PART).all(|start| {
                let count = PART.min(end - start);
                self.copy_f32(start, &mut a[..count]);
                other.copy_f32(start, &mut b[..count]);
                a[..count].iter().zip(&b[..count]).all(|(a, b)| a.to_bits() == b.to_bits())
            })
        })
    }

    /// The first element, if any, that is NaN or infinite.
    pub fn first_not_finite(&self) -> Option<usize> {
        let len: usize = self.shape.iter().product();
        let first = AtomicUsize::new(usize::MAX);
        (0..len.div_ceil(ELEMENTS_A_TASK)).into_par_iter().for_each(|task| {
            const PART: usize = 256;
            let end = len.min((task + 1) * ELEMENTS_A_TASK);
            let mut part = [0.0; PART];
            for start in (task * ELEMENTS_A_TASK..end).step_by(PART) {
                let part = &mut part[..PART.min(end - start)];
                self.copy_f32(start, part);
                if let Some(at) = part.iter().position(|x| !x.is_finite()) {
                    first.fetch_min(start + at, Ordering::Relaxed);
                }
            }
        });
        Some(first.into_inner()).filter(|first| *first < len)
    }
}

/// Elements of `N` bytes each, which need not be aligned.
#[inline(always)]
fn copy<const N: usize, T>(bytes: &[u8], out: &mut [T], element: impl Fn([u8; N]) -> T) {
    for (out, bytes) in out.iter_mut().zip(bytes.as_chunks().0) {
        *out = element(*bytes);
    }
}

/// The conversion of a slice asks once for what the CPU can do, that of an element each time.
fn copy_f16(bytes: &[u8], out: &mut [f32]) {
    const PART: usize = 64;
    let mut halves = [f16::ZERO; PART];
    for (out, bytes) in out.chunks_mut(PART).zip(bytes.chunks(2 * PART)) {
        copy(bytes, &mut halves, f16::from_le_bytes);
        halves[..out.len()].convert_to_f32_slice(out);
    }
}

/// A table whose rows are read one at a time where they are stored: nothing of it is copied into memory.
#[derive(Debug)]
pub enum Rows {
    /// In the mapped file.
    Stored(StoredTensor),
    /// Made anew for each use.
    Synthetic(Noise),
}

impl Rows {
    /// Row `index`, exactly as it is stored.
    pub fn copy_row(&self, index: usize, row: &mut [f32]) {
        match self {
            Rows::Stored(tensor) => tensor.copy_f32(index * row.len(), row),
            Rows::Synthetic(noise) => {
                let mut bytes = vec![0; 2 * row.len()];
                noise.fill(index * row.len(), &mut bytes);
                copy(&bytes, row, |bytes| bf16::from_le_bytes(bytes).to_f32());
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn stored(dtype: StoredDType, bytes: Vec<u8>) -> StoredTensor {
        let padded: Vec<u8> = std::iter::once(0).chain(bytes).collect();
        let shape = vec![(padded.len() - 1) / dtype.num_bytes()];
        StoredTensor { dtype, shape, data: Bytes::from(padded).slice(1..) }
    }

    #[test]
    fn conversions_read_unaligned_bytes_of_every_type() {
        let values = [0.0f32, -1.5, 3.25, 65_504.0];
        let bytes = |to: fn(f32) -> Vec<u8>| values.iter().flat_map(|x| to(*x)).collect();
        let f32s = stored(StoredDType::F32, bytes(|x| x.to_le_bytes().to_vec()));
        assert_eq!(f32s.to_f32(), values);
        let f16s = stored(StoredDType::F16, bytes(|x| f16::from_f32(x).to_le_bytes().to_vec()));
        assert_eq!(f16s.to_f32(), values);
        let bf16s = stored(StoredDType::Bf16, bytes(|x| bf16::from_f32(x).to_le_bytes().to_vec()));
        assert_eq!(bf16s.to_f32()[..3], values[..3]);
        let mut row = [0.0; 2];
        Rows::Stored(f16s).copy_row(1, &mut row);
        assert_eq!(row, values[2..]);
    }

    #[test]
    fn tensors_are_compared_by_value_whatever_their_type() {
        for at in [0, 70_000, 140_001] {
            let mut values: Vec<f32> = (0..140_002).map(|i| (i % 251) as f32 / 8.0).collect();
            let wide = stored(StoredDType::F32, values.iter().flat_map(|x| x.to_le_bytes()).collect());
            let narrow = values.iter().flat_map(|x| bf16::from_f32(*x).to_le_bytes()).collect();
            assert!(wide.has_bits_of(&stored(StoredDType::Bf16, narrow)) && wide.has_bits_of(&wide));
            values[at] += 0.125;
            let other = stored(StoredDType::F32, values.iter().flat_map(|x| x.to_le_bytes()).collect());
            assert!(!wide.has_bits_of(&other), "element {at}");
        }
        assert!(!stored(StoredDType::F16, vec![0; 6]).has_bits_of(&stored(StoredDType::F16, vec![0; 4])));
    }

    #[test]
    fn the_first_element_that_is_no_number_is_found() {
        for at in [0, 70_000, 140_001] {
            let mut values = vec![1.0f32; 140_002];
            values[at] = f32::NEG_INFINITY;
            values[140_001] = f32::NAN;
            let bytes = values.iter().flat_map(|x| x.to_le_bytes()).collect();
            assert_eq!(stored(StoredDType::F32, bytes).first_not_finite(), Some(at));
        }
        assert_eq!(stored(StoredDType::F16, vec![0; 6]).first_not_finite(), None);
    }
}
