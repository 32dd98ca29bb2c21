//! The whole network a second time, as tensor operations of candle: what runs on a GPU.
//!
//! Made by `cli/start.rs` when a device is chosen, and by tests on a CPU, where the same operations run in f32 and f16
//! and are held against the recorded numbers. Nothing here knows which device it is but `attention` and `ops`, which
//! have faster ways on CUDA. Keeps nothing between calls but the weights, recorded steps and frames that were announced.

mod attention;
#[cfg(feature = "cuda")]
pub mod cuda;
mod exchange;
mod layers;
pub mod machine;
mod ops;
pub mod quant;
mod qwen2;
mod resampler;
#[cfg(test)]
mod rope_reference;
mod siglip;
mod step;
mod uploads;

use candle_core::{DType, Device};

use super::{
    FrameBatch, KvDType, KvPool, ModelError, ModelShape, Result, StepInput, Tap, Tensor, VideoLanguageModel,
    config::ModelConfig, layers::Bits, tinyllava, weights::Weights,
};
use attention::{LayerCache, PagedAttention};
pub use exchange::Exchange;
use layers::Loader;
pub use ops::{Adjustment, Choice, Chosen, Draw, FEW, choose, select_rows};

/// Keys and values of all layers, in device memory.
#[derive(Debug, Clone)]
pub struct DeviceCache {
    layers: Vec<LayerCache>,
    pub block_size: usize,
    pub num_blocks: usize,
}

/// Tower, connector and decoder on one device, computing in one type.
#[derive(Debug)]
pub struct DeviceModel {
    shape: ModelShape,
    vision_tower: siglip::VisionTower,
    connector: resampler::Resampler,
    language_model: qwen2::Decoder,
    attention: Box<dyn PagedAttention>,
    #[cfg(feature = "cuda")]
    graphs: cuda::graph::Graphs,
    uploads: uploads::Uploads,
    device: Device,
    dtype: DType,
}

impl DeviceModel {
    /// Reads all weights straight to `device`, to be kept and computed with as `dtype`; the decoder's matrices quantised
    /// to `quant` if that is said.
    ///
    /// # Errors
    /// When the weights cannot be quantised ([`quant::check`]), a tensor cannot be read, or the device has no room for it.
    pub fn load(
        weights: &Weights,
        config: &ModelConfig,
        (device, dtype): (&Device, DType),
        quant: Option<Bits>,
    ) -> Result<Self> {
        quant::check(weights, config, quant).map_err(ModelError::wrap)?;
        #[cfg(feature = "cuda")]
        if device.is_cuda() {
            cuda::launch::prepare(device, dtype)?;
        }
        let loader = Loader::new(weights, device, dtype);
        let vision = loader.pp("vision_tower._vision_tower.vision_model");
        let shape = tinyllava::shape(config);
        Ok(DeviceModel {
            vision_tower: siglip::VisionTower::load(&vision, &config.vision)?,
            connector: resampler::Resampler::load(&loader.pp("connector._connector"), &config.connector)?,
            language_model: qwen2::Decoder::load(
                &loader.pp("language_model").quantised(quant),
                &config.text,
                config.context,
            )?,
            attention: attention::choose((device, dtype), &config.text, config.context)?,
            #[cfg(feature = "cuda")]
            graphs: cuda::graph::Graphs::from_env(),
            uploads: uploads::Uploads::new(device),
            shape,
            device: device.clone(),
            dtype,
        })
    }

    /// The same with its quantised matrices as floats, whose products are what theirs should be.
    ///
    /// # Errors
    /// When the device has no room for them.
    pub fn unpacked(self) -> Result<Self> {
        let language_model = self.language_model.unpacked(&self.device, self.dtype)?;
        Ok(DeviceModel { language_model, ..self })
    }

    /// Bytes of weights that one decode step reads, however many sequences it holds.
    pub fn decode_bytes(&self) -> usize {
        self.language_model.num_bytes()
    }
}

/// Whether an environment variable says that something is not to be used.
pub fn is_switched_off(variable: &str) -> bool {
    std::env::var(variable).is_ok_and(|value| value == "0")
}

/// Whether `error` is the device's and not a request's: after it nothing that runs there can be trusted.
pub fn is_device_failure(error: &ModelError) -> bool {
    match error {
        ModelError::Cuda(_) => true,
        ModelError::Context { inner, .. }
        | ModelError::WithPath { inner, .. }
        | ModelError::WithBacktrace { inner, .. } => is_device_failure(inner),
        _ => false,
    }
}

/// What went wrong, in one sentence, without a backtrace.
pub fn describe(error: &ModelError) -> String {
    match error {
        ModelError::WithBacktrace { inner, .. } => describe(inner),
        ModelError::Cuda(cause) if cause.to_string().contains("OUT_OF_MEMORY") => {
            "the GPU has no memory left: --quant q8 or q4 and a smaller --gpu-memory-utilization take less of it"
                .into()
        }
        other => other.to_string(),
    }
}

impl VideoLanguageModel for DeviceModel {
    fn shape(&self) -> &ModelShape {
        &self.shape
    }

    fn block_bytes(&self, _: KvDType, block_size: usize) -> usize {
        let shape = &self.shape;
        let elements = shape.num_layers * shape.num_kv_heads * shape.head_dim * block_size;
        2 * elements * self.dtype.size_in_bytes()
    }

    fn new_pool(&self, _: KvDType, num_blocks: usize, block_size: usize) -> Result<KvPool> {
        let layer =
            |_| self.attention.new_layer(&self.shape, num_blocks, block_size, (self.dtype, &self.device));
        let layers = (0..self.shape.num_layers).map(layer).collect::<Result<_>>()?;
        Ok(KvPool::Device(DeviceCache { layers, block_size, num_blocks }))
    }

    fn encode_frames(
        &mut self,
        frames: &FrameBatch,
        range: std::ops::Range<usize>,
        tap: &mut dyn Tap,
    ) -> Result<Tensor> {
        Ok(self.encode_videos(&[(frames, range)], &[], tap)?.remove(0))
    }

    fn encode_videos(
        &mut self,
        videos: &[(&FrameBatch, std::ops::Range<usize>)],
        next: &[(&FrameBatch, std::ops::Range<usize>)],
        tap: &mut dyn Tap,
    ) -> Result<Vec<Tensor>> {
        let features = self.vision_tower.forward(&self.uploads.bytes(videos)?, tap)?;
        self.uploads.start(next)?;
        // Otherwise its time and its errors would be the next work's, which belongs to another sequence. A decode step that was started
        // ahead is within that time.
        self.device.synchronize()?;
        self.uploads.release();
        let num_frames: usize = videos.iter().map(|(_, range)| range.len()).sum();
        let patches = features.dim(0)? / num_frames.max(1);
        let mut start = 0;
        let own = |(_, range): &(&FrameBatch, std::ops::Range<usize>)| {
            let rows = range.len() * patches;
            start += rows;
            features.narrow(0, start - rows, rows)
        };
        videos.iter().map(own).collect()
    }

    fn connect(&mut self, features: &Tensor, tap: &mut dyn Tap) -> Result<Tensor> {
        let visual_tokens = self.connector.forward(features, tap)?;
        self.device.synchronize()?;
        Ok(visual_tokens)
    }

    fn runs_ahead(&self) -> bool {
        self.device.is_cuda()
    }

    fn forward(&mut self, input: &StepInput, pool: &mut KvPool, tap: &mut dyn Tap) -> Result<Tensor> {
        let cache: &DeviceCache = pool.device_mut()?;
        let attention = (self.attention.as_ref(), cache);
        #[cfg(feature = "cuda")]
        if self.device.is_cuda()
            && !tap.is_watching()
            && let Some(logits) = self.graphs.run(&self.language_model, attention, input, &self.device)?
        {
            return Ok(logits);
        }
        let step = step::Step::new(input, cache.block_size, &self.device)?;
        self.language_model.forward(&input.visuals, &step, attention, tap)?.to_dtype(DType::F32)
    }
}
