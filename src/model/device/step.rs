//! A step's integers on the device: two copies a step, cut into what the layers need.
//!
//! Made by [`super::DeviceModel`] for each step.

use std::{cell::OnceCell, ops::Range};

use candle_core::Device;

use super::super::{Result, StepInput, Tensor, VISUAL_TOKEN};

/// The sequences that stand at the beginning of a step with one row each.
#[derive(Debug)]
pub struct Decodes {
    /// `[sequences, most blocks]` in u32, padded with 0.
    pub block_tables: Tensor,
    /// `[sequences]` in u32.
    #[cfg_attr(not(feature = "cuda"), allow(dead_code, reason = "for the kernels of CUDA"))]
    pub lens: Tensor,
    /// The same on the host.
    pub context_lens: Vec<usize>,
    pub block_size: usize,
}

impl Decodes {
    /// How many there are.
    pub fn len(&self) -> usize {
        self.context_lens.len()
    }

    /// Tokens of the longest.
    #[cfg_attr(not(feature = "cuda"), allow(dead_code, reason = "for the kernels of CUDA"))]
    pub fn longest(&self) -> usize {
        self.context_lens.iter().copied().max().unwrap_or(0)
    }

    /// The block table of one of them, without padding.
    pub fn blocks_of(&self, index: usize) -> Result<Tensor> {
        self.block_tables.get(index)?.narrow(0, 0, self.context_lens[index].div_ceil(self.block_size))
    }
}

/// A sequence with several rows.
#[derive(Debug)]
pub struct Prefill {
    pub rows: Range<usize>,
    pub context_len: usize,
    /// `[blocks]` in u32.
    pub blocks: Tensor,
    /// `[rows]` in u32.
    positions: Tensor,
    mask: OnceCell<Option<Tensor>>,
}

impl Prefill {
    /// `[rows, context_len]` in f32: what may not be seen is minus infinity. None where all of it may. Made when it is first
    /// asked for.
    pub fn mask(&self) -> Result<&Option<Tensor>> {
        if let Some(mask) = self.mask.get() {
            return Ok(mask);
        }
        let mask = causal_mask(&self.positions, self.context_len)?;
        Ok(self.mask.get_or_init(|| mask))
    }
}

/// See the module.
#[derive(Debug)]
pub struct Step {
    /// `[rows]` in u32, 0 where visual embeddings stand.
    pub token_ids: Tensor,
    /// `[rows]` in u32.
    pub positions: Tensor,
    /// `[rows]` in i64.
    pub slots: Tensor,
    /// `[logit_rows]` in u32; none where all rows are wanted, in order.
    pub logit_rows: Option<Tensor>,
    pub decodes: Option<Decodes>,
    /// All other sequences, in order.
    pub prefills: Vec<Prefill>,
}

impl Step {
    /// Copies `input` to the device.
    pub fn new(input: &StepInput, block_size: usize, device: &Device) -> Result<Self> {
        let num_decodes = input.sequences.iter().take_while(|sequence| sequence.rows.len() == 1).count();
        let (decodes, prefills) = input.sequences.split_at(num_decodes);
        let num_columns = decodes.iter().map(|sequence| sequence.blocks.len()).max().unwrap_or(0);
        let flat = flatten(input, num_decodes, num_columns);
        let len = flat.len();
        let flat = Tensor::from_vec(flat, len, device)?;
        let mut start = 0;
        let mut next = |len: usize| {
            start += len;
            flat.narrow(0, start - len, len)
        };
        let num_rows = input.token_ids.len();
        let (token_ids, positions) = (next(num_rows)?, next(num_rows)?);
        let token_ids = input.ids_on_device.clone().unwrap_or(token_ids);
        let logit_rows = next(input.logit_rows.len())?;
        let decodes = Decodes {
            lens: next(num_decodes)?,
            block_tables: next(num_decodes * num_columns)?.reshape((num_decodes, num_columns))?,
            context_lens: decodes.iter().map(|sequence| sequence.context_len).collect(),
            block_size,
        };
        let prefills = prefills.iter().map(|sequence| {
            Ok(Prefill {
                blocks: next(sequence.blocks.len())?,
                positions: positions.narrow(0, sequence.rows.start, sequence.rows.len())?,
                mask: OnceCell::new(),
                rows: sequence.rows.clone(),
                context_len: sequence.context_len,
            })
        });
        let prefills = prefills.collect::<Result<_>>()?;
        let slots: Vec<i64> = input.slot_mapping.iter().map(|&slot| slot as i64).collect();
        let slots = Tensor::from_vec(slots, num_rows, device)?;
        let decodes = (num_decodes > 0).then_some(decodes);
        let logit_rows = (!input.wants_all_rows()).then_some(logit_rows);
        Ok(Step { token_ids, positions, slots, logit_rows, decodes, prefills })
    }
}

/// Ids, positions, wanted rows, lengths and padded block tables of the decodes, block tables of the others.
fn flatten(input: &StepInput, num_decodes: usize, num_columns: usize) -> Vec<u32> {
    let (decodes, prefills) = input.sequences.split_at(num_decodes);
    let ids = input.token_ids.iter().map(|&id| if id == VISUAL_TOKEN { 0 } else { id });
    let mut flat: Vec<u32> = ids.chain(input.positions.iter().copied()).collect();
    flat.extend(input.logit_rows.iter().map(|&row| row as u32));
    flat.extend(decodes.iter().map(|sequence| sequence.context_len as u32));
    for sequence in decodes {
        let end = flat.len() + num_columns;
        flat.extend(&input.block_tables[sequence.blocks.clone()]);
        flat.resize(end, 0);
    }
    for sequence in prefills {
        flat.extend(&input.block_tables[sequence.blocks.clone()]);
    }
    flat
}

/// Each row sees the keys up to its own position. Made on the device: it would be the largest of a step's inputs.
fn causal_mask(positions: &Tensor, context_len: usize) -> Result<Option<Tensor>> {
    if positions.dim(0)? == 1 {
        return Ok(None);
    }
    let device = positions.device();
    let own = positions.unsqueeze(1)?;
    let keys = Tensor::arange(0, context_len as u32, device)?.unsqueeze(0)?;
    let hidden = keys.broadcast_gt(&own)?;
    let never = Tensor::full(f32::NEG_INFINITY, hidden.shape(), device)?;
    hidden.where_cond(&never, &never.zeros_like()?).map(Some)
}

#[cfg(test)]
mod tests {
    use super::{super::super::SequenceInput, *};

    #[test]
    fn a_mixed_step_is_cut_into_decodes_and_prompts() {
        let sequence = |rows: Range<usize>, context_len, blocks| SequenceInput { rows, context_len, blocks };
        let input = StepInput {
            token_ids: vec![5, 6, VISUAL_TOKEN, 7, 8],
            positions: vec![20, 3, 16, 17, 18],
            slot_mapping: vec![4, 3, 16, 17, 18],
            block_tables: vec![9, 8, 7, 6, 5],
            sequences: vec![sequence(0..1, 21, 0..2), sequence(1..2, 4, 2..3), sequence(2..5, 19, 3..5)],
            logit_rows: vec![0, 1, 4],
            ..StepInput::default()
        };
        let step = Step::new(&input, 16, &Device::Cpu).unwrap();
        assert_eq!(step.token_ids.to_vec1::<u32>().unwrap(), [5, 6, 0, 7, 8]);
        assert_eq!(step.slots.to_vec1::<i64>().unwrap(), [4, 3, 16, 17, 18]);
        assert_eq!(step.logit_rows.unwrap().to_vec1::<u32>().unwrap(), [0, 1, 4]);
        let decodes = step.decodes.unwrap();
        assert_eq!(decodes.block_tables.to_vec2::<u32>().unwrap(), [[9, 8], [7, 0]]);
        assert_eq!(decodes.lens.to_vec1::<u32>().unwrap(), [21, 4]);
        assert_eq!(decodes.blocks_of(1).unwrap().to_vec1::<u32>().unwrap(), [7]);
        let prompt = &step.prefills[0];
        assert_eq!(prompt.blocks.to_vec1::<u32>().unwrap(), [6, 5]);
        let mask = prompt.mask().unwrap().as_ref().unwrap().to_vec2::<f32>().unwrap();
        for (row, seen) in mask.iter().zip([17, 18, 19]) {
            assert_eq!(row.iter().filter(|&&x| x == 0.0).count(), seen);
            assert!(row[..seen].iter().all(|&x| x == 0.0));
        }
    }
}
