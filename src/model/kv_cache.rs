//! The paged key/value cache in host memory.
//!
//! Made by the engine, written and read by the attention kernel. A block holds `block_size` tokens of every layer
//! and KV head. Keys are stored transposed within a block, so that scores of `block_size` neighbouring keys are
//! computed together and each in the same order of additions, whatever else is in the step.

use super::ModelShape;

/// Keys and values of one layer.
#[derive(Debug, Clone, Default)]
pub struct LayerCache {
    /// `[num_blocks, num_kv_heads, head_dim, block_size]`
    pub keys: Vec<f32>,
    /// `[num_blocks, num_kv_heads, block_size, head_dim]`
    pub values: Vec<f32>,
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
    pub fn new(shape: &ModelShape, num_blocks: usize, block_size: usize) -> Self {
        assert!(
            block_size.is_multiple_of(16),
            "the attention kernel needs blocks of a multiple of 16 tokens: this is a bug"
        );
        let len = num_blocks * block_size * shape.num_kv_heads * shape.head_dim;
        let layer = || LayerCache { keys: vec![0.0; len], values: vec![0.0; len] };
        KvCache {
            layers: (0..shape.num_layers).map(|_| layer()).collect(),
            block_size,
            num_blocks,
            num_kv_heads: shape.num_kv_heads,
            head_dim: shape.head_dim,
        }
    }

    /// Bytes one block takes over all layers.
    pub fn block_bytes(shape: &ModelShape, block_size: usize) -> usize {
        2 * shape.num_layers * shape.num_kv_heads * shape.head_dim * block_size * size_of::<f32>()
    }
}
