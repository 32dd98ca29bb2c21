//! The cache a model has made for itself, in host memory or on a device.
//!
//! Held by the engine, which knows its blocks only; read and written by the model that made it.

use super::{KvCache, ModelError, Result, device::DeviceCache};

/// Keys and values of all sequences.
#[derive(Debug, Clone)]
pub enum KvPool {
    /// For the CPU kernels.
    Host(KvCache),
    /// For [`super::device::DeviceModel`].
    Device(DeviceCache),
}

impl KvPool {
    /// Tokens a block.
    pub fn block_size(&self) -> usize {
        match self {
            KvPool::Host(cache) => cache.block_size,
            KvPool::Device(cache) => cache.block_size,
        }
    }

    /// Blocks in all.
    pub fn num_blocks(&self) -> usize {
        match self {
            KvPool::Host(cache) => cache.num_blocks,
            KvPool::Device(cache) => cache.num_blocks,
        }
    }

    /// The cache of the CPU kernels.
    ///
    /// # Errors
    /// When another model made it.
    pub fn host_mut(&mut self) -> Result<&mut KvCache> {
        match self {
            KvPool::Host(cache) => Ok(cache),
            KvPool::Device(_) => {
                Err(ModelError::Msg("a cache on a device for the CPU kernels: this is a bug".into()))
            }
        }
    }

    /// The cache on a device.
    ///
    /// # Errors
    /// When another model made it.
    pub fn device_mut(&mut self) -> Result<&mut DeviceCache> {
        match self {
            KvPool::Device(cache) => Ok(cache),
            KvPool::Host(_) => {
                Err(ModelError::Msg("a cache in host memory for a device: this is a bug".into()))
            }
        }
    }
}
