//! The logits of a step, wherever they lie: a device adjusts them and chooses tokens, and nothing else comes back; whole rows are copied
//! to host memory where that is not enough.
//!
//! Made by the runner for each step. Chooses nothing itself.

use crate::{
    model::{
        Result, Tensor,
        device::{self, Adjustment, Draw, Readback},
    },
    scheduler::TokenId,
};

/// What is needed of a row.
#[derive(Debug, Clone, PartialEq)]
pub(super) enum Needed {
    /// The token, which a device can choose: after what is adjusted the largest logit's, or one that is drawn.
    Token(Vec<Adjustment>, Option<Draw>),
    /// Everything, as the model gave it.
    All,
}

/// One row of a step.
#[derive(Debug)]
pub(super) enum Row<'a> {
    /// Logits of the ids that may be sampled, as the model gave them.
    Logits(&'a [f32]),
    /// The same, adjusted.
    Adjusted(&'a [f32]),
    /// The token.
    Token(TokenId),
    /// No logit is a number above minus infinity.
    Nothing,
}

/// All rows of a step.
#[derive(Debug)]
pub(super) struct Logits {
    /// `[rows, vocab]`
    tensor: Tensor,
    num_ids: usize,
    rows: Vec<Place>,
}

#[derive(Debug, Clone)]
enum Place {
    Host { logits: Vec<f32>, is_adjusted: bool },
    Token(TokenId),
    Nothing,
}

/// Rows whose tokens a device is choosing.
#[derive(Debug)]
pub(super) struct Choosing {
    logits: Logits,
    needed: Vec<Needed>,
    /// `[rows]` in u32.
    token_ids: Tensor,
}

impl Choosing {
    /// Has a device adjust `logits` `[rows, vocab]` in f32, of which ids below `num_ids` may be sampled, and choose; does not wait for it.
    pub(super) fn start(
        logits: &Tensor,
        num_ids: usize,
        needed: Vec<Needed>,
        readback: &mut Readback,
    ) -> Result<Self> {
        let of_rows = needed.iter().enumerate().flat_map(|(row, needed)| {
            let adjustments: &[_] =
                if let Needed::Token(adjustments, _) = needed { adjustments } else { &[] };
            let known = adjustments.iter().filter(|one| (one.id as usize) < num_ids);
            known.map(move |&one| (row, one))
        });
        let tensor = device::adjust(logits, &of_rows.collect::<Vec<_>>())?;
        let draw = |needed: &Needed| if let Needed::Token(_, draw) = needed { *draw } else { None };
        let draws: Vec<_> = needed.iter().map(draw).collect();
        let chosen = device::choose(&tensor, num_ids, &draws)?;
        readback.start(&chosen)?;
        let rows = vec![Place::Nothing; needed.len()];
        Ok(Choosing { logits: Logits { tensor, num_ids, rows }, needed, token_ids: chosen.get(0)? })
    }

    /// The tokens of all rows, `[rows]` in u32, if the device chooses them. They are those of [`Logits::row`] but for rows it cannot decide.
    pub(super) fn token_ids(&self) -> Option<&Tensor> {
        (!self.needed.contains(&Needed::All)).then_some(&self.token_ids)
    }

    /// Waits, and has what was not decided whole.
    pub(super) fn finish(self, readback: &mut Readback) -> Result<Logits> {
        let Choosing { mut logits, needed, .. } = self;
        let chosen = readback.finish()?;
        let (ids, bits) = chosen.split_at(needed.len());
        let mut whole = Vec::new();
        for (row, needed) in needed.iter().enumerate() {
            let logit = f32::from_bits(bits[row]);
            if *needed == Needed::All || logit.is_nan() {
                whole.push(row);
            } else if logit > f32::NEG_INFINITY {
                logits.rows[row] = Place::Token(ids[row]);
            }
        }
        logits.copy(&whole, |row| needed[row] != Needed::All)?;
        Ok(logits)
    }
}

impl Logits {
    /// All of `logits` `[rows, vocab]` in f32, of which ids below `num_ids` may be sampled.
    pub(super) fn whole(logits: &Tensor, num_ids: usize) -> Result<Self> {
        let num_rows = logits.dim(0)?;
        let mut all = Logits { tensor: logits.clone(), num_ids, rows: vec![Place::Nothing; num_rows] };
        all.copy(&(0..num_rows).collect::<Vec<_>>(), |_| false)?;
        Ok(all)
    }

    fn copy(&mut self, rows: &[usize], is_adjusted: impl Fn(usize) -> bool) -> Result<()> {
        if rows.is_empty() {
            return Ok(());
        }
        let wanted = if rows.len() == self.rows.len() {
            self.tensor.clone()
        } else {
            let index: Vec<u32> = rows.iter().map(|&row| row as u32).collect();
            self.tensor.index_select(&Tensor::from_vec(index, rows.len(), self.tensor.device())?, 0)?
        };
        let values = wanted.narrow(1, 0, self.num_ids)?.to_vec2::<f32>()?;
        for (&row, logits) in rows.iter().zip(values) {
            self.rows[row] = match logits.iter().any(|&logit| logit > f32::NEG_INFINITY) {
                true => Place::Host { logits, is_adjusted: is_adjusted(row) },
                false => Place::Nothing,
            };
        }
        Ok(())
    }

    /// Row `index`.
    pub(super) fn row(&self, index: usize) -> Row<'_> {
        match &self.rows[index] {
            Place::Token(id) => Row::Token(*id),
            Place::Nothing => Row::Nothing,
            Place::Host { logits, is_adjusted: false } => Row::Logits(logits),
            Place::Host { logits, is_adjusted: true } => Row::Adjusted(logits),
        }
    }
}

#[cfg(test)]
mod tests {
    use candle_core::Device;

    use super::*;

    fn logits() -> Tensor {
        let rows =
            [[1.0f32, 5.0, 2.0, 9.0], [4.0, 3.0, 2.0, 1.0], [f32::NEG_INFINITY; 4], [0.0, 1.0, 7.0, 8.0]];
        Tensor::new(&rows, &Device::Cpu).unwrap()
    }

    const SHIFT: Adjustment = Adjustment { id: 0, factor: 2.0, shift: 4.0 };
    const DRAW: Option<Draw> = Some(Draw { temperature: 1.0, top_k: 0, top_p: 1.0, min_p: 0.0, random: 0.5 });

    fn choose(needed: &[Needed]) -> Logits {
        let mut readback = Readback::default();
        let choosing = Choosing::start(&logits(), 3, needed.to_vec(), &mut readback).unwrap();
        let expected = (!needed.contains(&Needed::All)).then_some(4);
        assert_eq!(choosing.token_ids().map(|ids| ids.elem_count()), expected);
        choosing.finish(&mut readback).unwrap()
    }

    #[test]
    fn whole_rows_are_as_they_were_without_the_ids_that_may_not_be_sampled() {
        let whole = Logits::whole(&logits(), 3).unwrap();
        assert!(matches!(whole.row(0), Row::Logits([1.0, 5.0, 2.0])));
        assert!(matches!(whole.row(2), Row::Nothing));
        assert!(matches!(whole.row(3), Row::Logits([0.0, 1.0, 7.0])));
    }

    #[test]
    fn a_device_gives_tokens_and_whole_rows_where_they_are_needed_or_it_cannot_decide() {
        let expected = [(1, [1.0, 5.0, 2.0]), (0, [4.0, 3.0, 2.0]), (0, [0.0; 3]), (2, [0.0, 1.0, 7.0])];
        let (largest, drawn) = (Needed::Token(vec![], None), Needed::Token(vec![], DRAW));
        for needed in [
            [&largest, &Needed::All, &largest, &Needed::All],
            [&largest; 4],
            [&Needed::All; 4],
            [&drawn; 4],
            [&drawn, &largest, &drawn, &Needed::All],
        ] {
            let needed = needed.map(Clone::clone);
            let chosen = choose(&needed);
            for (row, (id, logits)) in expected.iter().enumerate() {
                match chosen.row(row) {
                    Row::Nothing => assert_eq!(row, 2),
                    Row::Token(token) => assert!(needed[row] == largest && token == *id),
                    Row::Logits(values) => assert!(needed[row] == Needed::All && values == logits),
                    // Nothing is drawn without a GPU.
                    Row::Adjusted(values) => assert!(needed[row] == drawn && values == logits),
                }
            }
        }
    }

    #[test]
    fn rows_are_adjusted_but_for_those_that_are_needed_as_they_are() {
        let beyond = Adjustment { id: 3, ..SHIFT };
        let chosen = choose(&[
            Needed::Token(vec![SHIFT, beyond], None),
            Needed::Token(vec![SHIFT], DRAW),
            Needed::Token(vec![], None),
            Needed::All,
        ]);
        assert!(matches!(chosen.row(0), Row::Token(1)));
        assert!(matches!(chosen.row(1), Row::Adjusted([6.0, 3.0, 2.0])));
        assert!(matches!(chosen.row(2), Row::Nothing));
        assert!(matches!(chosen.row(3), Row::Logits([0.0, 1.0, 7.0])));
    }
}
