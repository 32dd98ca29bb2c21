//! Reads checkpoints: which tensors there are, where their bytes lie, and whether all of them fit the config.
//!
//! Called when a model is loaded. Never converts or computes: that is the layers' own `load`.

use std::borrow::Cow;

/// Stored element type.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum StoredDType {
    F32,
    F16,
    Bf16,
}

/// One tensor as stored: little-endian, row-major.
#[derive(Debug)]
pub struct StoredTensor<'a> {
    pub dtype: StoredDType,
    pub shape: Vec<usize>,
    /// Borrowed from the mapped file, or made (synthetic checkpoints).
    pub data: Cow<'a, [u8]>,
}
