//! A scripted model for tests: answers by a function of its prompt, and checks the paging on the way.
//!
//! It keeps each token in the slot the engine names, reads the whole sequence back through the block table at
//! every step, and panics when that is not what a sequence must look like. Used with the byte tokenizer.

use std::{
    ops::Range,
    sync::{
        Arc, Mutex,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use candle_core::Device;

use super::{
    FrameBatch, KvCache, KvPool, ModelError, ModelShape, Result, StepInput, Tap, Tensor, VISUAL_TOKEN,
    VideoLanguageModel, kv_cache::KvDType,
};

/// End token of the byte tokenizer.
pub const END: u32 = 256;

/// The reply to a prompt, as byte tokens; the end token is added.
pub type Reply = Arc<dyn Fn(&[u32]) -> Vec<u32> + Send + Sync>;

/// See the module.
pub struct FakeModel {
    shape: ModelShape,
    reply: Reply,
    /// What every prompt ends with.
    prompt_end: Vec<u32>,
    /// Token and position each slot holds.
    slots: Vec<Option<(u32, u32)>>,
    /// Whether it pretends to be on a device, and is to be told the next step before the last one was looked at.
    pub runs_ahead: bool,
    /// Rows it was given so far.
    pub num_rows: Arc<AtomicUsize>,
    /// Frames encoded so far, `[num_frames, image_size, image_size, 3]`, RGB; `None`: not
    /// recorded.
    pub encoded: Option<Arc<Mutex<Vec<u8>>>>,
    /// Whether its next token depends on all tokens there are, as the slots have them, and not only on the prompt.
    pub reads_all: bool,
    /// Sleep of every call.
    pub step_delay: Duration,
    /// A step whose rows hold this token fails, and so does the encoding of frames that begin with it.
    pub poison: Option<u32>,
    /// A step whose rows hold this token loses the device.
    pub device_poison: Option<u32>,
}

impl std::fmt::Debug for FakeModel {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("FakeModel").field("shape", &self.shape).finish_non_exhaustive()
    }
}

impl FakeModel {
    /// A model that answers `reply(prompt)` to every prompt; prompts must end with `prompt_end`.
    pub fn new(prompt_end: &str, reply: Reply) -> Self {
        let shape = ModelShape {
            vocab_size: END as usize + 1,
            hidden_size: 4,
            context: 4096,
            image_size: 28,
            visual_tokens: 8,
            num_frames: 4,
            num_layers: 1,
            num_kv_heads: 1,
            head_dim: 4,
        };
        let prompt_end = prompt_end.bytes().map(u32::from).collect();
        FakeModel {
            shape,
            reply,
            prompt_end,
            slots: Vec::new(),
            runs_ahead: false,
            num_rows: Arc::default(),
            encoded: None,
            reads_all: false,
            step_delay: Duration::ZERO,
            poison: None,
            device_poison: None,
        }
    }

    /// Always the same reply, to prompts of the chat template.
    pub fn saying(text: &str) -> Self {
        let reply: Vec<u32> = text.bytes().map(u32::from).collect();
        FakeModel::new("ASSISTANT:", Arc::new(move |_| reply.clone()))
    }

    /// The token after `sequence`; none where that is amid a prompt.
    fn next_token(&self, sequence: &[u32]) -> Option<u32> {
        if self.reads_all {
            let next = sequence.iter().fold(7, |hash, token| (hash * 31 + token) % u32::from(b'z'));
            return Some(next);
        }
        let windows = sequence.windows(self.prompt_end.len());
        let ends = windows.enumerate().filter(|(_, window)| *window == self.prompt_end);
        let starts: Vec<usize> = ends.map(|(start, _)| start + self.prompt_end.len()).collect();
        let start = *starts.last()?;
        Some((self.reply)(&sequence[..start]).get(sequence.len() - start).copied().unwrap_or(END))
    }
}

impl VideoLanguageModel for FakeModel {
    fn shape(&self) -> &ModelShape {
        &self.shape
    }

    fn block_bytes(&self, kept: KvDType, block_size: usize) -> usize {
        KvCache::block_bytes(&self.shape, kept, block_size)
    }

    fn new_pool(&self, kept: KvDType, num_blocks: usize, block_size: usize) -> Result<KvPool> {
        Ok(KvPool::Host(KvCache::new(&self.shape, kept, num_blocks, block_size)))
    }

    fn encode_frames(&mut self, frames: &FrameBatch, range: Range<usize>, _: &mut dyn Tap) -> Result<Tensor> {
        std::thread::sleep(self.step_delay);
        if self.poison.is_some_and(|poison| u32::from(frames.frames(range.clone())[0]) == poison) {
            return Err(ModelError::Msg("a poisoned pixel".into()));
        }
        if let Some(encoded) = &self.encoded {
            let mut encoded = encoded.lock().expect("no test panics while it holds the lock: this is a bug");
            encoded.extend_from_slice(frames.frames(range.clone()));
        }
        // One feature a frame: its mean.
        let means: Vec<f32> = range
            .map(|frame| {
                let bytes = frames.frames(frame..frame + 1);
                bytes.iter().map(|&byte| f32::from(byte)).sum::<f32>() / bytes.len() as f32
            })
            .collect();
        let rows = means.len();
        Tensor::from_vec(means, (rows, 1), &Device::Cpu)
    }

    fn connect(&mut self, features: &Tensor, _: &mut dyn Tap) -> Result<Tensor> {
        features.mean_all()?.broadcast_as((self.shape.visual_tokens, self.shape.hidden_size))?.contiguous()
    }

    fn runs_ahead(&self) -> bool {
        self.runs_ahead
    }

    fn forward(&mut self, input: &StepInput, pool: &mut KvPool, _: &mut dyn Tap) -> Result<Tensor> {
        std::thread::sleep(self.step_delay);
        self.num_rows.fetch_add(input.token_ids.len(), Ordering::Relaxed);
        let block_size = pool.block_size();
        let token_ids = match &input.ids_on_device {
            Some(ids) => ids.to_vec1()?,
            None => input.token_ids.clone(),
        };
        if self.poison.is_some_and(|poison| token_ids.contains(&poison)) {
            return Err(ModelError::Msg("a poisoned token".into()));
        }
        if self.device_poison.is_some_and(|poison| token_ids.contains(&poison)) {
            return Err(ModelError::Cuda("an illegal memory access".into()));
        }
        self.slots.resize(pool.num_blocks() * block_size, None);
        for (row, &slot) in input.slot_mapping.iter().enumerate() {
            self.slots[slot] = Some((token_ids[row], input.positions[row]));
        }
        for visual in &input.visuals {
            assert!(
                token_ids[visual.rows.clone()].iter().all(|&id| id == VISUAL_TOKEN),
                "embeddings over text"
            );
            assert_eq!(visual.embeddings.dims(), [visual.rows.len(), self.shape.hidden_size]);
        }
        let mut logits = Vec::with_capacity(input.logit_rows.len() * self.shape.vocab_size);
        for &row in &input.logit_rows {
            let sequence = input.sequences.iter().find(|sequence| sequence.rows.contains(&row));
            let sequence = sequence.expect("a row without sequence");
            let table = &input.block_tables[sequence.blocks.clone()];
            let tokens: Vec<u32> = (0..=input.positions[row] as usize)
                .map(|position| {
                    let slot = table[position / block_size] as usize * block_size + position % block_size;
                    let (token, at) = self.slots[slot].expect("a slot was never written");
                    assert_eq!(at as usize, position, "a slot holds another position");
                    token
                })
                .collect();
            let next = self.next_token(&tokens).unwrap_or(END);
            logits
                .extend((0..self.shape.vocab_size).map(|id| if id == next as usize { 10.0f32 } else { 0.0 }));
        }
        Tensor::from_vec(logits, (input.logit_rows.len(), self.shape.vocab_size), &Device::Cpu)
    }
}
