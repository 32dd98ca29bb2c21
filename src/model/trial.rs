//! One request run on a model in all the ways the engine may run it: at once, in chunks, beside others, after a prefix
//! hit. What comes out must agree, within the accuracy of the device.
//!
//! Called by `tinyllava check`. Plans its own steps: the engine is not needed.

use std::ops::Range;

use super::{
    FrameBatch, KvDType, KvPool, Result, SequenceInput, StepInput, Tensor, VISUAL_TOKEN, VideoLanguageModel,
    VisualRows,
};

const BLOCK_SIZE: usize = 16;
/// Rows of a chunk, and tokens of the prompts that are run beside.
const CHUNK: usize = 37;

/// What is asked.
#[derive(Debug, Clone)]
pub struct Case {
    /// The prompt, [`VISUAL_TOKEN`] where the video stands.
    pub token_ids: Vec<u32>,
    pub frames: FrameBatch,
    /// Tokens that follow the prompt, whatever the model would say: so all runs see the same.
    pub completion: Vec<u32>,
}

/// What came out. Logits are those after the last token of the prompt and of each further token.
#[derive(Debug, Clone)]
pub struct Outcome {
    pub features: Tensor,
    pub visual_tokens: Tensor,
    /// The prompt at once, then token after token.
    pub whole: Vec<Vec<f32>>,
    /// The prompt in chunks.
    pub chunked: Vec<Vec<f32>>,
    /// Each step beside other sequences.
    pub beside_others: Vec<Vec<f32>>,
    /// A second sequence on the blocks of the first.
    pub after_a_hit: Vec<Vec<f32>>,
}

impl Case {
    /// A question about noise for a model of this shape.
    pub fn made_up(model: &dyn VideoLanguageModel, text_tokens: usize, completion: usize) -> Self {
        let shape = model.shape();
        let bytes = shape.num_frames * shape.image_size * shape.image_size * 3;
        let noise = |i: u64| (i.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 32) as u8;
        let word = |i: usize| (i * 31 % 251.min(shape.vocab_size)) as u32;
        let text = (0..text_tokens).map(word);
        Case {
            token_ids: std::iter::repeat_n(VISUAL_TOKEN, shape.visual_tokens).chain(text).collect(),
            frames: FrameBatch { rgb: (0..bytes as u64).map(noise).collect(), size: shape.image_size },
            completion: (0..completion).map(|i| word(i + 7)).collect(),
        }
    }
}

/// Runs `case` in all ways.
///
/// # Errors
/// When the model fails.
pub fn run(model: &mut dyn VideoLanguageModel, case: &Case) -> Result<Outcome> {
    let features = model.encode_frames(&case.frames, 0..case.frames.num_frames(), &mut ())?;
    let visual_tokens = model.connect(&features, &mut ())?;
    let tokens: Vec<u32> = case.token_ids.iter().chain(&case.completion).copied().collect();
    let (prompt, num_blocks) = (case.token_ids.len(), tokens.len().div_ceil(BLOCK_SIZE));
    let pool = model.new_pool(KvDType::F32, 3 * num_blocks + 8, BLOCK_SIZE)?;
    let visuals = &visual_tokens;
    let mut runs = Runs { model, pool, tokens, prompt, visuals, beside: vec![] };
    // Every second block, from the end.
    let first: Vec<u32> = (0..num_blocks as u32).map(|i| 2 * (num_blocks as u32 - i)).collect();
    let whole = runs.reply(&first, [0, prompt])?;
    let cuts: Vec<usize> = (0..prompt).step_by(CHUNK).chain([prompt]).collect();
    let chunked = runs.reply(&first, cuts.iter().copied())?;
    let hit = (prompt - 1) / BLOCK_SIZE;
    let second: Vec<u32> = (0..num_blocks)
        .map(|i| if i < hit { first[i] } else { (2 * num_blocks + 1 + i - hit) as u32 })
        .collect();
    let after_a_hit = runs.reply(&second, [hit * BLOCK_SIZE, prompt])?;
    runs.beside = vec![5, CHUNK.min(prompt)];
    let beside_others = runs.reply(&first, cuts)?;
    Ok(Outcome { features, visual_tokens: visual_tokens.clone(), whole, chunked, beside_others, after_a_hit })
}

struct Runs<'a> {
    model: &'a mut dyn VideoLanguageModel,
    pool: KvPool,
    tokens: Vec<u32>,
    /// Tokens of the prompt.
    prompt: usize,
    visuals: &'a Tensor,
    /// Lengths of text prompts that are run in every step as well.
    beside: Vec<usize>,
}

impl Runs<'_> {
    /// The prompt from cut to cut, then one token a step. Gives the logits from the prompt's last token on.
    fn reply(&mut self, blocks: &[u32], cuts: impl IntoIterator<Item = usize>) -> Result<Vec<Vec<f32>>> {
        let mut cuts: Vec<usize> = cuts.into_iter().collect();
        cuts.extend(self.prompt + 1..=self.tokens.len());
        let mut logits = vec![];
        for range in cuts.windows(2) {
            let last = self.step(blocks, range[0]..range[1])?;
            if range[1] >= self.prompt {
                logits.push(last);
            }
        }
        Ok(logits)
    }

    /// The tokens at `range`; their last logits.
    fn step(&mut self, blocks: &[u32], range: Range<usize>) -> Result<Vec<f32>> {
        let mut input = StepInput::default();
        // Others first and last. Their blocks are the last ones of the cache.
        let mut free = self.pool.num_blocks() as u32;
        for (index, &len) in self.beside.clone().iter().enumerate() {
            if index > 0 {
                self.add(&mut input, blocks, range.clone());
            }
            let count = len.div_ceil(BLOCK_SIZE) as u32;
            free -= count;
            let own: Vec<u32> = (free..free + count).collect();
            add_sequence(&mut input, &vec![index as u32 + 1; len], 0, &own);
        }
        if self.beside.is_empty() {
            self.add(&mut input, blocks, range.clone());
        }
        let place = usize::from(!self.beside.is_empty());
        let logits = self.model.forward(&input, &mut self.pool, &mut ())?;
        logits.get(place)?.to_vec1::<f32>()
    }

    /// The sequence itself, with its visual tokens.
    fn add(&self, input: &mut StepInput, blocks: &[u32], range: Range<usize>) {
        let first_row = input.token_ids.len();
        add_sequence(input, &self.tokens[range.clone()], range.start, blocks);
        let is_visual = |position: &usize| self.tokens[*position] == VISUAL_TOKEN;
        let start = self.tokens.iter().position(|&id| id == VISUAL_TOKEN).unwrap_or(0);
        let seen: Vec<usize> = range.clone().filter(is_visual).collect();
        if let (Some(&first), Some(&last)) = (seen.first(), seen.last()) {
            let rows = first_row + first - range.start..first_row + last + 1 - range.start;
            let embeddings = self.visuals.narrow(0, first - start, last + 1 - first);
            input.visuals.push(VisualRows {
                rows,
                embeddings: embeddings.expect("more places than visual tokens: this is a bug"),
            });
        }
    }
}

/// Appends rows of one sequence that begin at position `start`; the logits of the last are wanted.
fn add_sequence(input: &mut StepInput, tokens: &[u32], start: usize, blocks: &[u32]) {
    let (first_row, first_block) = (input.token_ids.len(), input.block_tables.len());
    let context_len = start + tokens.len();
    input.token_ids.extend(tokens);
    for position in start..context_len {
        input.positions.push(position as u32);
        let block = blocks[position / BLOCK_SIZE] as usize;
        input.slot_mapping.push(block * BLOCK_SIZE + position % BLOCK_SIZE);
    }
    input.block_tables.extend(&blocks[..context_len.div_ceil(BLOCK_SIZE)]);
    input.logit_rows.push(input.token_ids.len() - 1);
    input.sequences.push(SequenceInput {
        rows: first_row..input.token_ids.len(),
        context_len,
        blocks: first_block..input.block_tables.len(),
    });
}

/// Root of the mean square of the difference, relative to the spread of what is expected.
pub fn relative_error(got: &[f32], expected: &[f32]) -> f64 {
    assert_eq!(got.len(), expected.len(), "different numbers of elements: this is a bug");
    let mean = expected.iter().map(|&x| f64::from(x)).sum::<f64>() / expected.len() as f64;
    let square = |values: &mut dyn Iterator<Item = f64>| values.map(|x| x * x).sum::<f64>();
    let error = square(&mut got.iter().zip(expected).map(|(a, b)| f64::from(*a) - f64::from(*b)));
    (error / square(&mut expected.iter().map(|&x| f64::from(x) - mean))).sqrt()
}

#[cfg(test)]
mod tests {
    use super::{
        super::{config::ModelConfig, layers::WeightFormat, tinyllava::TinyLlava, weights::Weights},
        *,
    };

    #[test]
    fn the_cpu_kernels_give_the_same_bits_in_all_ways() {
        let mut config = ModelConfig::tiny_test();
        // Heads of 16: the CPU kernels know multiples of that.
        config.text.num_attention_heads = 2;
        let weights = Weights::synthetic(&config, 1);
        let mut model = TinyLlava::load(&weights, &config, WeightFormat::AsStored).unwrap();
        let case = Case::made_up(&model, 50, 3);
        let outcome = run(&mut model, &case).unwrap();
        assert_eq!(outcome.whole.len(), 4);
        for other in [&outcome.chunked, &outcome.beside_others, &outcome.after_a_hit] {
            assert_eq!(other, &outcome.whole);
        }
        assert_ne!(outcome.whole[0], outcome.whole[1]);
    }

    #[test]
    fn errors_are_relative_to_the_spread() {
        assert_eq!(relative_error(&[1.0, 3.0], &[1.0, 3.0]), 0.0);
        assert!((relative_error(&[102.0, 98.0], &[101.0, 99.0]) - 1.0).abs() < 1e-9);
    }
}
