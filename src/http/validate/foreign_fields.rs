//! Tables of request fields that other servers know and this one does not act on.
//!
//! Read by `fields.rs`, which checks requests against them, and by the OpenAPI document. Routers
//! that parse a request and serialize it again send all their fields with default values: those
//! defaults must be accepted. `docs/fields.md` shows the same tables, and a test compares them.
//! Never holds a field that has an effect on every endpoint.

/// A field without effect, and the values at which that is what the client asks for.
#[derive(Debug, Clone, Copy)]
pub struct ForeignField {
    pub name: &'static str,
    pub accepted: Accepted,
    /// The reason for refusing other values and what to do instead; follows "must be … or left
    /// out: ".
    pub otherwise: &'static str,
}

/// Values at which a field changes nothing. `null` is always one of them.
#[derive(Debug, Clone, Copy)]
pub enum Accepted {
    Any,
    /// JSON texts. Numbers are compared by value: `1` is `1.0`.
    Only(&'static [&'static str]),
    /// The values of [`Accepted::Only`]; any value if the request has `"tool_choice": "none"` or
    /// `"function_call": "none"`.
    UnlessTools(&'static [&'static str]),
}

const fn ignored(name: &'static str) -> ForeignField {
    ForeignField { name, accepted: Accepted::Any, otherwise: "" }
}

const fn only(name: &'static str, values: &'static [&'static str], otherwise: &'static str) -> ForeignField {
    ForeignField { name, accepted: Accepted::Only(values), otherwise }
}

const fn tools(name: &'static str) -> ForeignField {
    let otherwise = "the model does not choose tools; send \"tool_choice\": \"none\" to ignore them";
    ForeignField { name, accepted: Accepted::UnlessTools(&["[]"]), otherwise }
}

const NO_TOOLS: &str = "tools are not supported; remove it";
const NOT_RETURNED: &str = "replies do not carry this; remove it";
const SPECIAL_TOKENS: &str = "special tokens are never part of the text; remove it";
const GUIDE: &str = "use structured_outputs or response_format on /v1/chat/completions instead";
const ONE_WORKER: &str = "prefill and decode are not split here; remove it";
const NO_TEMPLATES: &str = "the prompt has the model's own template; remove it";
const OTHER_SAMPLER: &str = "this sampler is not supported; use temperature, top_p, top_k or min_p";

/// Top-level fields of requests to all endpoints. An endpoint reads the fields it acts on before
/// this table is looked at.
pub const TOP_LEVEL: &[ForeignField] = &[
    ignored("add_special_tokens"),
    ignored("cache_prompt"),
    ignored("custom_labels"),
    ignored("guided_decoding_backend"),
    ignored("max_tool_calls"),
    ignored("metadata"),
    ignored("parallel_tool_calls"),
    ignored("prompt_cache_key"),
    ignored("prompt_cache_retention"),
    ignored("request_id"),
    ignored("return_mm_kwargs"),
    ignored("rid"),
    ignored("safety_identifier"),
    ignored("service_tier"),
    ignored("session_id"),
    ignored("store"),
    ignored("truncation_side"),
    ignored("user"),
    ignored("verbosity"),
    only(
        "add_generation_prompt",
        &["true"],
        "the prompt always ends with the beginning of the reply; remove it",
    ),
    only("allowed_token_ids", &[], GUIDE),
    only("annotations", &["[]"], NOT_RETURNED),
    only("audio", &["{}"], "replies are text; remove it"),
    only("background", &["false"], "responses are not generated in the background; send \"stream\": true"),
    only("bad_words", &["[]"], "words cannot be banned; use logit_bias"),
    only("best_of", &["1"], "this endpoint gives one reply; remove it"),
    only("bootstrap_host", &[], ONE_WORKER),
    only("bootstrap_port", &[], ONE_WORKER),
    only("bootstrap_room", &[], ONE_WORKER),
    only("chat_template", &[], NO_TEMPLATES),
    only("chat_template_kwargs", &["{}"], "this endpoint has no template; use /v1/chat/completions"),
    only("context_management", &["[]"], "the conversation is never shortened; send a shorter one"),
    only("continue_final_message", &["false"], "replies are always new messages; end with a user message"),
    only("conversation", &[], "conversations are not stored; send previous_response_id or the messages"),
    only("custom_logit_processor", &["\"\"", "[]"], OTHER_SAMPLER),
    only("custom_params", &["{}"], OTHER_SAMPLER),
    only("data_parallel_rank", &["0"], ONE_WORKER),
    only("detokenize", &["true"], "replies are always text; remove it"),
    only("disagg_prefill_dp_rank", &["0"], ONE_WORKER),
    only("documents", &["[]"], "put the documents into the text of a message"),
    only("dry_multiplier", &["0"], OTHER_SAMPLER),
    only("dynatemp_range", &["0"], OTHER_SAMPLER),
    only("ebnf", &["\"\""], GUIDE),
    only("ec_transfer_params", &["{}"], ONE_WORKER),
    only("echo", &["false"], "the reply never repeats the conversation; remove it"),
    only("enable_response_messages", &["false"], NOT_RETURNED),
    only("enable_thinking", &[], "send it within chat_template_kwargs"),
    only("extra_key", &["\"\"", "[]"], "use cache_salt, which separates what is cached"),
    only("function_call", &["\"none\"", "\"auto\""], NO_TOOLS),
    tools("functions"),
    only("greed_sampling", &["false"], "send \"temperature\": 0 instead"),
    only("guided_whitespace_pattern", &["\"\""], "use a grammar in structured_outputs for this"),
    only("images_config", &["{}"], "use media_io_kwargs"),
    only("include_reasoning", &["true"], "this endpoint does not separate thinking from the text; remove it"),
    only("include_stop_str_in_output", &["false"], "stop strings are never part of the reply; remove it"),
    only("input_ids", &["[]"], "send token ids as prompt to /v1/completions"),
    only("json_schema", &["\"\""], GUIDE),
    only("kv_transfer_params", &["{}"], ONE_WORKER),
    only("length_penalty", &["1"], "it applies to beam search only, which is not supported; remove it"),
    only("logits_processors", &["[]"], OTHER_SAMPLER),
    only("logprob_token_ids", &["[]"], "use top_logprobs or answer_logprobs"),
    only("logprobs", &["false"], "include \"message.output_text.logprobs\" instead"),
    only("lora_path", &["\"\"", "[]"], "adapters are not supported; remove it"),
    only("max_dynamic_patch", &[], "pictures are never cut into patches; remove it"),
    only("max_new_tokens", &[], "call it max_tokens"),
    only("max_output_tokens", &[], "call it max_tokens"),
    only("min_dynamic_patch", &[], "pictures are never cut into patches; remove it"),
    only("min_tokens", &["0"], "a reply may end at any token; remove it"),
    only("mirostat", &["0"], OTHER_SAMPLER),
    only("mm_processor_kwargs", &["{}"], "use media_io_kwargs"),
    only("modalities", &["[]", "[\"text\"]"], "replies are text; remove it"),
    only("models", &["[]"], "one model is served; send its name as model"),
    only("n", &["1"], "this endpoint gives one reply; use /v1/chat/completions"),
    only("ngram_corpus_id", &["\"\""], "speculative decoding is not supported; remove it"),
    only("no_stop_trim", &["false"], "stop strings are never part of the reply; remove it"),
    only("nvext", &["{}"], "put its fields at the top level of the request"),
    only("plugins", &["[]"], "plugins are not supported; remove it"),
    only("prediction", &["{}"], "predicted output is not supported; remove it"),
    only("previous_input_messages", &["[]"], "send the whole conversation as input"),
    only("priority", &["0"], "requests run in the order of their arrival; remove it"),
    only("prompt", &[], "stored prompts are not supported; send the text itself"),
    only("prompt_embeds", &["[]"], "send the prompt as text or token ids"),
    only("prompt_logprobs", &["0", "false"], NOT_RETURNED),
    only("provider", &["{}"], "requests are not routed to providers; remove it"),
    only("reasoning", &["{}"], "use reasoning_effort and include_reasoning"),
    only("regex", &["\"\""], GUIDE),
    only("repeat_penalty", &["1"], "call it repetition_penalty"),
    only("repetition_detection", &["{}"], "repetition does not end a reply; use repetition_penalty"),
    only("response_format", &["{\"type\": \"text\"}"], "use it on /v1/chat/completions"),
    only("return_assistant_tokens_mask", &["false"], NOT_RETURNED),
    only("return_audio", &["false"], "replies are text; remove it"),
    only("return_cached_tokens_details", &["false"], NOT_RETURNED),
    only("return_hidden_states", &["false"], NOT_RETURNED),
    only("return_input_ids_in_sglext", &["false"], NOT_RETURNED),
    only("return_meta_info", &["false"], NOT_RETURNED),
    only("return_output_ids_in_sglext", &["false"], NOT_RETURNED),
    only("return_progress", &["false"], NOT_RETURNED),
    only("return_prompt_text", &["false"], NOT_RETURNED),
    only("return_prompt_token_ids", &["false"], NOT_RETURNED),
    only("return_routed_experts", &["false"], NOT_RETURNED),
    only("return_spec_tokens_details", &["false"], NOT_RETURNED),
    only("return_token_ids", &["false"], "use logprobs, which have the bytes of each token"),
    only("return_token_offsets", &["false"], NOT_RETURNED),
    only("return_tokens_as_token_ids", &["false"], "use logprobs, which have the bytes of each token"),
    only("routed_dp_rank", &["0"], ONE_WORKER),
    only("routed_experts_prompt_start", &["0"], NOT_RETURNED),
    only("routed_experts_start_len", &["0"], NOT_RETURNED),
    only("sampling_seed", &[], "call it seed"),
    only(
        "separate_reasoning",
        &["true"],
        "send \"reasoning_format\": \"none\" for thinking within the content",
    ),
    only("session_params", &["{}"], "sessions are not supported; send the whole conversation"),
    only("skip_special_tokens", &["true"], SPECIAL_TOKENS),
    only("spaces_between_special_tokens", &["true"], SPECIAL_TOKENS),
    only("stop_regex", &["\"\"", "[]"], "use stop"),
    only("stream_interval", &["1"], "every piece of text is sent as soon as it is there; remove it"),
    only(
        "stream_reasoning",
        &["true"],
        "thinking is streamed as it comes; hide it by \"include_reasoning\": false",
    ),
    only("suffix", &["\"\""], "the model only continues a text; remove it"),
    only("task", &["\"\""], "tasks are not supported; ask for it in a message"),
    only("thinking", &["{}"], "use reasoning_effort and thinking_token_budget"),
    only("thinking_budget", &[], "call it thinking_token_budget"),
    only("timings_per_token", &["false"], NOT_RETURNED),
    only("tool_choice", &["\"none\"", "\"auto\""], NO_TOOLS),
    tools("tools"),
    only("transforms", &["[]"], "the conversation is never shortened; send a shorter one"),
    only("truncate_prompt_tokens", &[], "prompts are never cut; send a shorter one"),
    only("truncation", &["\"disabled\""], "the conversation is never shortened; send a shorter one"),
    only("typical_p", &["1"], OTHER_SAMPLER),
    only("usage", &["{}", "{\"include\": false}"], "send \"stream_options\": {\"include_usage\": true}"),
    only("use_audio_in_video", &["false"], "the model does not hear; remove it"),
    only("use_beam_search", &["false"], "beam search is not supported; use n with vote"),
    only("use_raw_prompt", &["false"], "send a prompt without template to /v1/completions"),
    only("vllm_xargs", &["{}"], "put its fields at the top level of the request"),
    only("watermarking", &["false"], "replies carry no watermark; remove it"),
    only("web_search_options", &[], "the model cannot search the web; remove it"),
];

/// Fields of a message, other than `role` and `content`. Empty values of unlisted fields are
/// ignored too.
pub const IN_MESSAGES: &[ForeignField] = &[
    ignored("annotations"),
    ignored("cache_control"),
    ignored("id"),
    ignored("name"),
    ignored("provider_specific_fields"),
    ignored("reasoning"),
    ignored("reasoning_content"),
    ignored("reasoning_details"),
    ignored("reasoning_items"),
    ignored("refusal"),
    ignored("segment"),
    ignored("thinking_blocks"),
    only("audio", &[], "audio is not supported; send its text as content"),
    only("function_call", &[], NO_TOOLS),
    only("partial", &["false"], "replies are always new messages; end with a user message"),
    only("prefix", &["false"], "replies are always new messages; end with a user message"),
    only("tool_call_id", &[], NO_TOOLS),
    only("tool_calls", &["[]"], NO_TOOLS),
    only("tools", &["[]"], NO_TOOLS),
];

/// Fields of a content part, of any type.
pub const IN_PARTS: &[ForeignField] =
    &[ignored("annotations"), ignored("cache_control"), ignored("logprobs")];
