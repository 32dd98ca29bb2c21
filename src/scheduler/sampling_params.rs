//! How the next token is chosen: the validated form, integers and floats only.

use super::TokenId;

/// Sampling of one sequence. Order of the stages: penalties, bias, temperature, top-k, top-p, min-p.
#[derive(Debug, Clone, PartialEq)]
pub struct SamplingParams {
    /// 0 means greedy.
    pub temperature: f32,
    /// 0 means no limit.
    pub top_k: usize,
    /// 1 means no limit.
    pub top_p: f32,
    /// 0 means no limit.
    pub min_p: f32,
    /// 1 means none; over prompt and completion, as in the original's `generate`.
    pub repetition_penalty: f32,
    /// Subtracted per occurrence in the completion.
    pub frequency_penalty: f32,
    /// Subtracted once for a token of the completion.
    pub presence_penalty: f32,
    /// Added to the logits of these tokens.
    pub logit_bias: Vec<(TokenId, f32)>,
    /// The random stream depends on this and the token's position alone.
    pub seed: u64,
    /// Most tokens of the completion.
    pub max_tokens: usize,
    /// Fewest tokens of the completion: before, no id of `ending_ids` is sampled, unless a grammar
    /// allows nothing else.
    pub min_tokens: usize,
    /// Go on after an end token (benchmarks).
    pub ignore_eos: bool,
    /// Further ids that end the sequence.
    pub stop_token_ids: Vec<TokenId>,
    /// All ids that end the sequence. The engine sets them, and only where there are `min_tokens`.
    pub ending_ids: Vec<TokenId>,
    /// How many of the most probable tokens are reported beside each chosen one; `None`: nothing is reported.
    pub top_logprobs: Option<usize>,
    /// The prompt's tokens are reported too, and the token that ends the sequence. Needs
    /// `top_logprobs`.
    pub scores_prompt: bool,
    /// Ids whose log probabilities are reported at each step, chosen or not.
    pub watched: Vec<TokenId>,
}

/// Log probabilities at one step: of the model's own distribution, before penalties, bias and temperature.
#[derive(Debug, Clone, PartialEq)]
pub struct TokenLogprobs {
    /// Of the token that was chosen.
    pub chosen: f32,
    /// Of the most probable ones, the most probable first.
    pub top: Vec<(TokenId, f32)>,
    /// Of [`SamplingParams::watched`], in that order.
    pub watched: Vec<f32>,
}

impl SamplingParams {
    /// Greedy decoding of at most `max_tokens` tokens.
    pub fn greedy(max_tokens: usize) -> Self {
        SamplingParams {
            temperature: 0.0,
            top_k: 0,
            top_p: 1.0,
            min_p: 0.0,
            repetition_penalty: 1.0,
            frequency_penalty: 0.0,
            presence_penalty: 0.0,
            logit_bias: Vec::new(),
            seed: 0,
            max_tokens,
            min_tokens: 0,
            ignore_eos: false,
            stop_token_ids: Vec::new(),
            ending_ids: Vec::new(),
            top_logprobs: None,
            scores_prompt: false,
            watched: Vec::new(),
        }
    }

    /// The same for the choice `index` of several: only the seed differs, and that of choice 0 stays as it is.
    pub fn for_choice(&self, index: usize) -> Self {
        // A large odd step, so that the choices of neighbouring seeds do not meet.
        let seed = self.seed.wrapping_add((index as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15));
        SamplingParams { seed, ..self.clone() }
    }
}
