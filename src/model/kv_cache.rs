//! The paged key/value cache in host memory.
//!
//! Made by the engine, written and read by the attention kernel. A block holds `block_size` tokens of every layer
//! and KV head. Keys are stored transposed within a block, so that scores of `block_size` neighbouring keys are
//! computed together and each in the same order of additions, whatever else is in the step.

use super::ModelShape;

/// What keys and values are kept as.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum KvDType {
    F32,
    /// Half the memory. Not bf16: keys of this family reach hundreds, where its steps are eight times as wide.
    F16,
}

impl KvDType {
    /// By the engine's setting.
    pub fn new(in_16_bits: bool) -> Self {
        if in_16_bits { KvDType::F16 } else { KvDType::F32 }
    }

    fn num_bytes(self) -> usize {
        match self {
            KvDType::F32 => size_of::<f32>(),
            KvDType::F16 => size_of::<u16>(),
        }
    }
}

/// Keys and values of one layer.
#[derive(Debug, Clone)]
pub enum LayerCache {
    F32(Pages<f32>),
    /// The bits of f16 numbers.
    F16(Pages<u16>),
}

/// Blocks of one layer.
#[derive(Debug, Clone)]
pub struct Pages<T> {
    /// `[num_blocks, num_kv_heads, head_dim, block_size]`
    pub keys: Vec<T>,
    /// `[num_blocks, num_kv_heads, block_size, head_dim]`
    pub values: Vec<T>,
}

impl<T: Clone> Pages<T> {
    /// `len` elements of keys and as many of values, all `fill`.
    pub fn new(len: usize, fill: T) -> Self {
        Pages { keys: vec![fill.clone(); len], values: vec![fill; len] }
    }
}

/// The whole cache.
#[derive(Debug, Clone)]
pub struct KvCache {
    pub layers: Vec<LayerCache>,
    pub block_size: usize,
    pub num_blocks: usize,
    pub num_kv_heads: usize,
    pub head_dim: usize,
}

impl KvCache {
    /// Zeroed memory for `num_blocks` blocks. Pages are touched at first use only.
    pub fn new(shape: &ModelShape, dtype: KvDType, num_blocks: usize, block_size: usize) -> Self {
        assert!(
            block_size.is_multiple_of(16),
            "the attention kernel needs blocks of a multiple of 16 tokens: this is a bug"
        );
        let len = num_blocks * block_size * shape.num_kv_heads * shape.head_dim;
        let layer = || match dtype {
            KvDType::F32 => LayerCache::F32(Pages::new(len, 0.0)),
            KvDType::F16 => LayerCache::F16(Pages::new(len, 0)),
        };
        KvCache {
            layers: (0..shape.num_layers).map(|_| layer()).collect(),
            block_size,
            num_blocks,
            num_kv_heads: shape.num_kv_heads,
            head_dim: shape.head_dim,
        }
    }

    /// Bytes one block takes over all layers.
    pub fn block_bytes(shape: &ModelShape, dtype: KvDType, block_size: usize) -> usize {
        2 * shape.num_layers * shape.num_kv_heads * shape.head_dim * block_size * dtype.num_bytes()
    }
}
