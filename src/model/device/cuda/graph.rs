//! Decode steps that were recorded: the host starts one of them at once, instead of its several hundred kernels one by one.
//!
//! Called by [`super::super::DeviceModel`] for steps of nothing but decodes. A recording is for so many sequences and for contexts of
//! so many tokens at most; a step takes the next larger one and fills it with sequences that are none. What cannot be recorded is
//! computed as any other step.

use std::collections::HashMap;

use candle_core::{
    CudaDevice, DType, Device, TensorId,
    cuda::cudarc::driver::{
        CudaGraph,
        sys::{self, CUgraphInstantiate_flags, CUgraphNode, CUgraphNodeType, CUstreamCaptureMode},
    },
};

use super::{
    super::{
        super::{ModelError, Result, StepInput, Tensor},
        DeviceCache,
        attention::PagedAttention,
        is_switched_off,
        qwen2::Decoder,
        step::{Decodes, Step},
    },
    failure,
    launch::overwrite,
};

/// Most sequences of a recording: beyond it the kernels take longer than it takes to start them.
const MAX_SEQUENCES: usize = 128;
/// Contexts are rounded up to a multiple of so many tokens.
const CONTEXT_STEP: usize = 512;
/// Most recordings that are kept.
const MAX_RECORDED: usize = 64;
/// Set to 0, nothing is recorded.
const VARIABLE: &str = "TINYLLAVA_CUDA_GRAPHS";

/// See the module.
#[derive(Debug, Default)]
pub struct Graphs {
    recorded: HashMap<Size, Recorded>,
    /// The cache they write to: for another one they are worth nothing.
    cache: Option<TensorId>,
    /// `[MAX_SEQUENCES, vocab]`: where all of them put what they compute.
    logits: Option<Tensor>,
    is_off: bool,
}

/// What a recording is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
struct Size {
    sequences: usize,
    /// Columns of the block tables.
    columns: usize,
}

#[derive(Debug)]
struct Recorded {
    replay: Replay,
    inputs: Inputs,
}

struct Replay(CudaGraph);

impl std::fmt::Debug for Replay {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Replay")
    }
}

// SAFETY: the driver allows calls from any thread, one at a time; whoever owns this is the only one to call.
unsafe impl Send for Replay {}

impl Graphs {
    /// As the environment asks for them.
    pub fn from_env() -> Self {
        Graphs { is_off: is_switched_off(VARIABLE), ..Graphs::default() }
    }

    /// The logits of all sequences, `[sequences, vocab]` in f32; none for a step that is not of decodes alone.
    ///
    /// # Errors
    /// When the device fails.
    pub fn run(
        &mut self,
        decoder: &Decoder,
        (paged, cache): (&dyn PagedAttention, &DeviceCache),
        input: &StepInput,
        device: &Device,
    ) -> Result<Option<Tensor>> {
        let Some(size) = Size::of(input, cache.block_size) else { return Ok(None) };
        if self.is_off || !paged.can_be_recorded() {
            return Ok(None);
        }
        let own = cache.layers.first().map(|layer| layer.keys.id());
        if self.cache != own {
            self.forget_all(device)?;
            self.cache = own;
        }
        if let (Some(recorded), Some(logits)) = (self.recorded.get(&size), &self.logits) {
            recorded.inputs.fill(input, size)?;
            recorded.replay.0.launch().map_err(failure)?;
            let logits = logits.narrow(0, 0, input.token_ids.len())?;
            // What is returned must outlive the next step.
            let logits =
                if logits.dtype() == DType::F32 { logits.copy() } else { logits.to_dtype(DType::F32) };
            return logits.map(Some);
        }
        let inputs = Inputs::new(size, cache.block_size, device)?;
        inputs.fill(input, size)?;
        let step = || decoder.forward(&[], &inputs.step, (paged, cache), &mut ());
        // As any other step: it makes ready what cannot be made while a step is recorded.
        let logits = step()?;
        match self.record(device, size, &logits, step) {
            Ok(replay) => {
                tracing::debug!(size.sequences, size.columns, "decode step recorded");
                self.recorded.insert(size, Recorded { replay, inputs });
            }
            Err(error) => {
                tracing::warn!(%error, "decode steps cannot be recorded: their kernels are started one by one");
                self.is_off = true;
                self.forget_all(device)?;
            }
        }
        logits.narrow(0, 0, input.token_ids.len())?.to_dtype(DType::F32).map(Some)
    }

    /// Records `step`, whose logits are as `like`.
    fn record(
        &mut self,
        device: &Device,
        size: Size,
        like: &Tensor,
        step: impl Fn() -> Result<Tensor>,
    ) -> Result<Replay> {
        if self.recorded.len() >= MAX_RECORDED
            && let Some(other) = self.recorded.keys().next().copied()
        {
            device.synchronize()?;
            self.recorded.remove(&other);
        }
        let all = match self.logits.take() {
            Some(logits) => logits,
            None => Tensor::zeros((MAX_SEQUENCES, like.dim(1)?), like.dtype(), device)?,
        };
        let own = self.logits.insert(all).narrow(0, 0, size.sequences)?;
        record(device.as_cuda_device()?, || own.slice_set(&step()?, 0, 0))
    }

    fn forget_all(&mut self, device: &Device) -> Result<()> {
        device.synchronize()?;
        self.recorded.clear();
        self.logits = None;
        Ok(())
    }
}

impl Size {
    /// The next larger one; none where there is none, or rows that are no decodes.
    fn of(input: &StepInput, block_size: usize) -> Option<Self> {
        let sequences = input.sequences.len();
        let is_decode = (1..=MAX_SEQUENCES).contains(&sequences)
            && input.token_ids.len() == sequences
            && input.visuals.is_empty()
            && input.wants_all_rows();
        let longest = input.sequences.iter().map(|sequence| sequence.context_len).max()?;
        is_decode.then(|| Size {
            sequences: match sequences {
                0..=4 => sequences.next_power_of_two(),
                5..=64 => sequences.next_multiple_of(8),
                _ => sequences.next_multiple_of(32),
            },
            columns: longest.next_multiple_of(CONTEXT_STEP).div_ceil(block_size),
        })
    }
}

/// A step whose integers stay where they are.
#[derive(Debug)]
struct Inputs {
    /// Ids, positions, lengths, block tables.
    flat: Tensor,
    slots: Tensor,
    /// Parts of both.
    step: Step,
}

impl Inputs {
    fn new(size: Size, block_size: usize, device: &Device) -> Result<Self> {
        let Size { sequences, columns } = size;
        let flat = Tensor::zeros(sequences * (3 + columns), DType::U32, device)?;
        let slots = Tensor::zeros(sequences, DType::I64, device)?;
        let part = |index: usize| flat.narrow(0, index * sequences, sequences);
        let step = Step {
            token_ids: part(0)?,
            positions: part(1)?,
            slots: slots.clone(),
            logit_rows: None,
            decodes: Some(Decodes {
                lens: part(2)?,
                block_tables: flat
                    .narrow(0, 3 * sequences, sequences * columns)?
                    .reshape((sequences, columns))?,
                context_lens: vec![columns * block_size; sequences],
                block_size,
            }),
            prefills: vec![],
        };
        Ok(Inputs { flat, slots, step })
    }

    /// Puts a step there.
    fn fill(&self, input: &StepInput, size: Size) -> Result<()> {
        let (flat, slots) = laid_out(input, size);
        overwrite(&self.flat, &flat)?;
        overwrite(&self.slots, &slots)?;
        match &input.ids_on_device {
            Some(ids) => self.step.token_ids.slice_set(ids, 0, 0),
            None => Ok(()),
        }
    }
}

/// A step's integers and slots. Sequences that are none have one token, which is written nowhere and looks at block 0.
fn laid_out(input: &StepInput, size: Size) -> (Vec<u32>, Vec<i64>) {
    let Size { sequences, columns } = size;
    let mut flat = Vec::with_capacity(sequences * (3 + columns));
    let mut pad = |part: &mut dyn Iterator<Item = u32>, end: usize, value: u32| {
        flat.extend(part);
        flat.resize(end * sequences, value);
    };
    pad(&mut input.token_ids.iter().copied(), 1, 0);
    pad(&mut input.positions.iter().copied(), 2, 0);
    pad(&mut input.sequences.iter().map(|sequence| sequence.context_len as u32), 3, 1);
    for sequence in &input.sequences {
        let end = flat.len() + columns;
        flat.extend(&input.block_tables[sequence.blocks.clone()]);
        flat.resize(end, 0);
    }
    flat.resize(sequences * (3 + columns), 0);
    let mut slots: Vec<i64> = input.slot_mapping.iter().map(|&slot| slot as i64).collect();
    slots.resize(sequences, -1);
    (flat, slots)
}

/// Records what `step` starts, which then has not run.
fn record(device: &CudaDevice, step: impl Fn() -> Result<()>) -> Result<Replay> {
    let stream = device.cuda_stream();
    stream.begin_capture(CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_RELAXED).map_err(failure)?;
    let outcome = step();
    // Whatever came of it, the stream must run again: errors of tensors that were dropped meanwhile are those of the recording, and must not
    // keep it from being ended, nor be taken for the device's afterwards.
    let forget_errors = || stream.context().check_err().unwrap_or_default();
    forget_errors();
    let graph = stream.end_capture(CUgraphInstantiate_flags(0)).map_err(failure);
    if graph.is_err() {
        forget_errors();
    }
    outcome?;
    let Some(graph) = graph? else { return Err(ModelError::Msg("nothing was recorded".into())) };
    // A copy from the host would read memory that is gone by then.
    if let Some(kind) = kinds(&graph)?.into_iter().find(|kind| !can_be_replayed(*kind)) {
        return Err(ModelError::Msg(format!("the step is more than kernels: {kind:?}")));
    }
    Ok(Replay(graph))
}

fn can_be_replayed(kind: CUgraphNodeType) -> bool {
    use CUgraphNodeType as Kind;
    matches!(
        kind,
        Kind::CU_GRAPH_NODE_TYPE_KERNEL
            | Kind::CU_GRAPH_NODE_TYPE_MEMSET
            | Kind::CU_GRAPH_NODE_TYPE_EMPTY
            | Kind::CU_GRAPH_NODE_TYPE_MEM_ALLOC
            | Kind::CU_GRAPH_NODE_TYPE_MEM_FREE
    )
}

/// What a graph is made of.
fn kinds(graph: &CudaGraph) -> Result<Vec<CUgraphNodeType>> {
    let mut count = 0;
    // SAFETY: without room for nodes only their number is written.
    unsafe { sys::cuGraphGetNodes(graph.cu_graph(), std::ptr::null_mut(), &raw mut count) }
        .result()
        .map_err(failure)?;
    let mut nodes: Vec<CUgraphNode> = vec![std::ptr::null_mut(); count];
    // SAFETY: there is room for as many.
    unsafe { sys::cuGraphGetNodes(graph.cu_graph(), nodes.as_mut_ptr(), &raw mut count) }
        .result()
        .map_err(failure)?;
    let kind = |node| {
        let mut kind = CUgraphNodeType::CU_GRAPH_NODE_TYPE_EMPTY;
        // SAFETY: the node is the graph's.
        unsafe { sys::cuGraphNodeGetType(node, &raw mut kind) }.result().map_err(failure)?;
        Ok(kind)
    };
    nodes.into_iter().map(kind).collect()
}

#[cfg(test)]
mod tests {
    use super::{super::super::super::SequenceInput, *};

    fn step(sequences: usize, context_len: usize) -> StepInput {
        let blocks = context_len.div_ceil(16);
        StepInput {
            token_ids: (1..=sequences as u32).collect(),
            positions: vec![context_len as u32 - 1; sequences],
            slot_mapping: (0..sequences).map(|i| i * blocks * 16).collect(),
            block_tables: (0..(sequences * blocks) as u32).collect(),
            sequences: (0..sequences)
                .map(|i| SequenceInput { rows: i..i + 1, context_len, blocks: i * blocks..(i + 1) * blocks })
                .collect(),
            logit_rows: (0..sequences).collect(),
            ..StepInput::default()
        }
    }

    #[test]
    fn a_step_takes_the_next_larger_recording() {
        for (sequences, context_len, expected) in [
            (1, 1, (1, 32)),
            (3, 512, (4, 32)),
            (5, 513, (8, 64)),
            (65, 600, (96, 64)),
            (128, 8192, (128, 512)),
        ] {
            let size = Size::of(&step(sequences, context_len), 16).unwrap();
            assert_eq!((size.sequences, size.columns), expected);
        }
        assert_eq!(Size::of(&step(129, 5), 16), None);
        assert_eq!(Size::of(&StepInput::default(), 16), None);
        let mut prompt = step(2, 20);
        prompt.token_ids.push(7);
        assert_eq!(Size::of(&prompt, 16), None);
        let unsampled = StepInput { logit_rows: vec![1], ..step(2, 20) };
        assert_eq!(Size::of(&unsampled, 16), None);
    }

    #[test]
    fn what_fills_a_recording_up_is_written_nowhere() {
        let (flat, slots) = laid_out(&step(3, 20), Size { sequences: 4, columns: 3 });
        assert_eq!(flat[..12], [1, 2, 3, 0, 19, 19, 19, 0, 20, 20, 20, 1]);
        assert_eq!(flat[12..], [0, 1, 0, 2, 3, 0, 4, 5, 0, 0, 0, 0]);
        assert_eq!(slots, [0, 32, 64, -1]);
    }
}
