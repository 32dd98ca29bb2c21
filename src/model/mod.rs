//! The network: from pixels and token ids to logits.
//!
//! Called by [`crate::engine`]. Imports candle and its own kernels only.

pub mod attention;
pub mod checkpoint;
mod checkpoint_writer;
pub mod config;
mod cost;
pub mod device;
pub mod embedded;
pub mod fake;
pub mod hub;
mod kernels;
pub mod kv_cache;
pub mod kv_pool;
pub mod layers;
pub mod layout;
pub mod machine;
pub mod placement;
pub mod presets;
mod pytorch_pickle;
pub mod quantised;
pub mod qwen2;
pub mod resampler;
mod shards;
pub mod siglip;
mod stored;
pub mod synth;
mod tensor_check;
pub mod tinyllava;
pub mod trial;
pub mod variant;
pub mod weights;

use std::{ops::Range, sync::Arc};

pub use candle_core::{Error as ModelError, Result, Tensor};
pub use kv_cache::{KvCache, KvDType};
pub use kv_pool::KvPool;

/// The id that stands for one visual token in [`StepInput::token_ids`]; the scheduler's own.
pub const VISUAL_TOKEN: u32 = u32::MAX;

/// Frames of one video at the model's input size, 8-bit RGB.
#[derive(Clone, PartialEq, Eq)]
pub struct FrameBatch {
    /// `[num_frames, size, size, 3]`, row-major.
    pub rgb: Arc<[u8]>,
    /// Side of the square, pixels.
    pub size: usize,
}

impl FrameBatch {
    /// How many frames there are.
    pub fn num_frames(&self) -> usize {
        self.rgb.len() / (self.size * self.size * 3).max(1)
    }

    /// Whether both are the same frames, and not only such that are equal.
    pub fn is_same(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.rgb, &other.rgb) && self.size == other.size
    }

    /// The bytes of some frames, `[len, size, size, 3]`.
    pub fn frames(&self, range: Range<usize>) -> &[u8] {
        let frame_bytes = self.size * self.size * 3;
        &self.rgb[range.start * frame_bytes..range.end * frame_bytes]
    }
}

impl std::fmt::Debug for FrameBatch {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "FrameBatch({} frames of {}x{})", self.num_frames(), self.size, self.size)
    }
}

/// What the engine must know of a model to feed it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ModelShape {
    /// Columns of the logits. The tokenizer may know fewer ids.
    pub vocab_size: usize,
    /// Width of an embedding.
    pub hidden_size: usize,
    /// Most tokens of prompt and completion.
    pub context: usize,
    /// Side of the square input, pixels.
    pub image_size: usize,
    /// Visual tokens a video becomes.
    pub visual_tokens: usize,
    /// Frames a video is sampled to by default.
    pub num_frames: usize,
    pub num_layers: usize,
    pub num_kv_heads: usize,
    pub head_dim: usize,
}

/// One sequence's part of a step.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SequenceInput {
    /// Its rows in the flat arrays; the last row stands at position `context_len - 1`.
    pub rows: Range<usize>,
    /// Tokens it has in the cache after the step.
    pub context_len: usize,
    /// Its part of [`StepInput::block_tables`].
    pub blocks: Range<usize>,
}

/// Visual embeddings that stand in for token embeddings.
#[derive(Debug, Clone)]
pub struct VisualRows {
    /// Rows in the flat arrays.
    pub rows: Range<usize>,
    /// `[rows.len(), hidden_size]`
    pub embeddings: Tensor,
}

/// A step as flat arrays: the tokens of all its sequences behind one another.
#[derive(Debug, Clone, Default)]
pub struct StepInput {
    /// `[num_rows]`; [`VISUAL_TOKEN`] where `visuals` has the embedding.
    pub token_ids: Vec<u32>,
    /// `[num_rows]`, position of each token in its sequence.
    pub positions: Vec<u32>,
    /// `[num_rows]`, where its key and value go: `block * block_size + offset`.
    pub slot_mapping: Vec<usize>,
    /// Block tables of all sequences behind one another.
    pub block_tables: Vec<u32>,
    pub sequences: Vec<SequenceInput>,
    pub visuals: Vec<VisualRows>,
    /// Rows whose logits are wanted.
    pub logit_rows: Vec<usize>,
    /// `[num_rows]` in u32: the tokens where only the device knows them yet, and `token_ids` has none. For a model that
    /// [`VideoLanguageModel::runs_ahead`].
    pub ids_on_device: Option<Tensor>,
}

impl StepInput {
    /// Whether the logits of all rows are wanted, in order.
    pub fn wants_all_rows(&self) -> bool {
        self.logit_rows.iter().copied().eq(0..self.token_ids.len())
    }
}

/// Looks at intermediate tensors: for `tinyllava trace` and the parity tests.
pub trait Tap: Send {
    /// Whether it looks at all: tensors are not made for nobody.
    fn is_watching(&self) -> bool {
        true
    }

    /// `name` as in the golden files; `index` counts layers.
    fn tensor(&mut self, name: &'static str, index: Option<usize>, tensor: &Tensor);
}

/// Looks at nothing.
impl Tap for () {
    fn is_watching(&self) -> bool {
        false
    }

    fn tensor(&mut self, _: &'static str, _: Option<usize>, _: &Tensor) {}
}

/// A video language model as the engine sees it. Never keeps state between calls but its weights.
pub trait VideoLanguageModel: Send {
    /// Its sizes.
    fn shape(&self) -> &ModelShape;

    /// Bytes one block of its cache takes over all layers. What is `kept` is the choice of the CPU kernels only: on a
    /// device keys and values are what the model computes in.
    fn block_bytes(&self, kept: KvDType, block_size: usize) -> usize;

    /// An empty cache, where and as the model reads it.
    ///
    /// # Errors
    /// When there is no memory for it.
    fn new_pool(&self, kept: KvDType, num_blocks: usize, block_size: usize) -> Result<KvPool>;

    /// Runs the vision tower over some frames of a video.
    /// Returns features `[num_frames x patches, vision_hidden]`.
    fn encode_frames(
        &mut self,
        frames: &FrameBatch,
        range: Range<usize>,
        tap: &mut dyn Tap,
    ) -> Result<Tensor>;

    /// [`Self::encode_frames`] of several videos, where the model likes that at once. Returns the features of each. `next` is what
    /// will probably be encoded after them: a device may copy it meanwhile.
    fn encode_videos(
        &mut self,
        videos: &[(&FrameBatch, Range<usize>)],
        next: &[(&FrameBatch, Range<usize>)],
        tap: &mut dyn Tap,
    ) -> Result<Vec<Tensor>> {
        let _ = next;
        videos.iter().map(|(frames, range)| self.encode_frames(frames, range.clone(), tap)).collect()
    }

    /// Runs the connector over the features of a whole video. Returns `[visual_tokens, hidden_size]`.
    fn connect(&mut self, features: &Tensor, tap: &mut dyn Tap) -> Result<Tensor>;

    /// Whether its logits are on a device, which does what it is told while the host does something else: then tokens are chosen there, and
    /// steps started before the host knows what came of the last one.
    fn runs_ahead(&self) -> bool {
        false
    }

    /// Runs the decoder: writes keys and values of all rows into `pool`, attends, and returns the logits of
    /// `input.logit_rows`, `[logit_rows.len(), vocab_size]` in f32.
    fn forward(&mut self, input: &StepInput, pool: &mut KvPool, tap: &mut dyn Tap) -> Result<Tensor>;
}
