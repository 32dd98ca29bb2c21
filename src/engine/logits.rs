//! The logits of a step, wherever they lie: a device adjusts them and chooses tokens, and nothing else comes back; whole rows are copied
//! to host memory where that is not enough.
//!
//! Made by the runner for each step. Chooses nothing itself.

use crate::{
    model::{
        Result, Tensor,
        device::{self, Choice, Chosen, Exchange, select_rows},
    },
    scheduler::TokenId,
};

/// One row of a step.
#[derive(Debug)]
pub(super) enum Row<'a> {
    /// Logits as the model gave them: of the ids that may be sampled, and of the `others` it has.
    Logits { logits: &'a [f32], others: &'a [f32] },
    /// The same, adjusted, and without what its mask does not allow.
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
    /// How each row was changed, to choose from it.
    choices: Vec<Option<Choice>>,
    rows: Vec<Place>,
}

#[derive(Debug, Clone)]
enum Place {
    Host(Vec<f32>),
    Token(TokenId),
    Nothing,
}

/// Rows whose tokens a device is choosing. Those without choice are needed whole, as they are.
#[derive(Debug)]
pub(super) struct Choosing {
    chosen: Chosen,
    num_ids: usize,
    choices: Vec<Option<Choice>>,
    /// `[rows]` in u32.
    token_ids: Tensor,
}

impl Choosing {
    /// Has a device choose from `logits` `[rows, vocab]` in f32, of which ids below `num_ids` may be sampled; does not wait for it.
    pub(super) fn start(
        logits: &Tensor,
        num_ids: usize,
        choices: Vec<Option<Choice>>,
        exchange: &mut Exchange,
    ) -> Result<Self> {
        let chosen = device::choose(logits, num_ids, &choices, exchange)?;
        exchange.start_reading(&chosen.tokens)?;
        let token_ids = chosen.tokens.get(0)?;
        Ok(Choosing { chosen, num_ids, choices, token_ids })
    }

    /// The tokens of all rows, `[rows]` in u32, if the device chooses them. They are those of [`Logits::row`] but for rows it cannot decide.
    pub(super) fn token_ids(&self) -> Option<&Tensor> {
        self.choices.iter().all(Option::is_some).then_some(&self.token_ids)
    }

    /// Waits, and has what was not decided whole.
    pub(super) fn finish(self, exchange: &mut Exchange) -> Result<Logits> {
        let Choosing { chosen, num_ids, choices, .. } = self;
        let read = exchange.finish_reading()?;
        let (ids, bits) = read.split_at(choices.len());
        let mut rows = vec![Place::Nothing; choices.len()];
        let mut whole = Vec::new();
        for (row, choice) in choices.iter().enumerate() {
            let logit = f32::from_bits(bits[row]);
            match choice {
                Some(_) if logit > f32::NEG_INFINITY => rows[row] = Place::Token(ids[row]),
                Some(Choice { mask: None, .. }) if !logit.is_nan() => {}
                _ => whole.push(row),
            }
        }
        let mut logits = Logits { tensor: chosen.logits, num_ids, choices, rows };
        logits.fetch_whole(&whole)?;
        Ok(logits)
    }
}

impl Logits {
    /// All of `logits` `[rows, vocab]` in f32, of which ids below `num_ids` may be sampled.
    pub(super) fn whole(logits: &Tensor, num_ids: usize) -> Result<Self> {
        let num_rows = logits.dim(0)?;
        let (choices, rows) = (vec![None; num_rows], vec![Place::Nothing; num_rows]);
        let mut all = Logits { tensor: logits.clone(), num_ids, choices, rows };
        all.fetch_whole(&(0..num_rows).collect::<Vec<_>>())?;
        Ok(all)
    }

    /// Has these rows whole.
    pub(super) fn fetch_whole(&mut self, rows: &[usize]) -> Result<()> {
        if rows.is_empty() {
            return Ok(());
        }
        let values = select_rows(&self.tensor, rows)?.to_vec2::<f32>()?;
        for (&row, all) in rows.iter().zip(values) {
            let logits = &all[..self.num_ids];
            let is_any = logits.iter().any(|&logit| logit > f32::NEG_INFINITY);
            // That a mask leaves nothing is not the model's fault: what it allows first is taken.
            let is_masked = self.choices[row].as_ref().is_some_and(|choice| choice.mask.is_some());
            let is_ruled_out = is_masked && !logits.iter().any(|logit| logit.is_nan());
            self.rows[row] = if is_any || is_ruled_out { Place::Host(all) } else { Place::Nothing };
        }
        Ok(())
    }

    /// Row `index`.
    pub(super) fn row(&self, index: usize) -> Row<'_> {
        match &self.rows[index] {
            Place::Token(id) => Row::Token(*id),
            Place::Nothing => Row::Nothing,
            Place::Host(all) => {
                let (logits, others) = all.split_at(self.num_ids);
                if self.choices[index].is_none() {
                    Row::Logits { logits, others }
                } else {
                    Row::Adjusted(logits)
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use candle_core::Device;

    use super::*;
    use crate::model::device::{Adjustment, Draw};

    fn logits() -> Tensor {
        let rows =
            [[1.0f32, 5.0, 2.0, 9.0], [4.0, 3.0, 2.0, 1.0], [f32::NEG_INFINITY; 4], [0.0, 1.0, 7.0, 8.0]];
        Tensor::new(&rows, &Device::Cpu).unwrap()
    }

    const SHIFT: Adjustment = Adjustment { id: 0, factor: 2.0, shift: 4.0 };
    const DRAW: Draw = Draw { temperature: 1.0, top_k: 0, top_p: 1.0, min_p: 0.0, random: 0.5 };

    fn largest() -> Option<Choice> {
        Some(Choice::default())
    }

    fn drawn() -> Option<Choice> {
        Some(Choice { draw: Some(DRAW), ..Choice::default() })
    }

    fn choose(choices: &[Option<Choice>]) -> Logits {
        let mut exchange = Exchange::default();
        let choosing = Choosing::start(&logits(), 3, choices.to_vec(), &mut exchange).unwrap();
        assert_eq!(choosing.token_ids().is_some(), choices.iter().all(Option::is_some));
        choosing.finish(&mut exchange).unwrap()
    }

    #[test]
    fn whole_rows_are_as_they_were_without_the_ids_that_may_not_be_sampled() {
        let whole = Logits::whole(&logits(), 3).unwrap();
        assert!(matches!(whole.row(0), Row::Logits { logits: [1.0, 5.0, 2.0], others: [9.0] }));
        assert!(matches!(whole.row(2), Row::Nothing));
        assert!(matches!(whole.row(3), Row::Logits { logits: [0.0, 1.0, 7.0], others: [8.0] }));
    }

    #[test]
    fn a_device_gives_tokens_and_whole_rows_where_they_are_needed_or_it_cannot_decide() {
        let expected = [(1, [1.0, 5.0, 2.0]), (0, [4.0, 3.0, 2.0]), (0, [0.0; 3]), (2, [0.0, 1.0, 7.0])];
        for choices in [
            [largest(), None, largest(), None],
            [(); 4].map(|()| largest()),
            [(); 4].map(|()| None),
            [(); 4].map(|()| drawn()),
            [drawn(), largest(), largest(), None],
        ] {
            let chosen = choose(&choices);
            for (row, (id, logits)) in expected.iter().enumerate() {
                match chosen.row(row) {
                    Row::Nothing => assert_eq!(row, 2),
                    Row::Token(token) => assert!(choices[row] == largest() && token == *id),
                    Row::Logits { logits: values, .. } => {
                        assert!(choices[row].is_none() && values == logits);
                    }
                    // Nothing is drawn without a GPU.
                    Row::Adjusted(values) => {
                        assert!(choices[row] == drawn() && values == logits)
                    }
                }
            }
        }
    }

    #[test]
    fn rows_are_adjusted_and_masked_but_for_those_that_are_needed_as_they_are() {
        let adjustments = vec![SHIFT, Adjustment { id: 3, ..SHIFT }];
        let mask = Some(vec![0b1101]);
        let mut chosen = choose(&[
            Some(Choice { adjustments: adjustments.clone(), ..Choice::default() }),
            Some(Choice { adjustments: adjustments.clone(), mask: mask.clone(), draw: Some(DRAW) }),
            Some(Choice { mask: mask.clone(), ..Choice::default() }),
            None,
        ]);
        assert!(matches!(chosen.row(0), Row::Token(1)));
        assert!(matches!(chosen.row(1), Row::Adjusted([6.0, f32::NEG_INFINITY, 2.0])));
        // A mask leaves nothing of it: the host chooses.
        assert!(matches!(
            chosen.row(2),
            Row::Adjusted([f32::NEG_INFINITY, f32::NEG_INFINITY, f32::NEG_INFINITY])
        ));
        assert!(matches!(chosen.row(3), Row::Logits { logits: [0.0, 1.0, 7.0], .. }));
        chosen.fetch_whole(&[0]).unwrap();
        assert!(matches!(chosen.row(0), Row::Adjusted([4.5, 5.0, 2.0])));
        let masked = choose(&[None, None, None, Some(Choice { adjustments, mask, draw: None })]);
        assert!(matches!(masked.row(3), Row::Token(2)));
    }

    #[test]
    fn a_model_that_gives_no_number_is_told_however_its_tokens_are_chosen() {
        let mask = Some(vec![0b11]);
        let choices = [
            Some(Choice::default()),
            drawn(),
            Some(Choice { mask: mask.clone(), ..Choice::default() }),
            Some(Choice { mask, draw: Some(DRAW), ..Choice::default() }),
            None,
        ];
        let nothing = Tensor::full(f32::NAN, (5, 3), &Device::Cpu).unwrap();
        let mut exchange = Exchange::default();
        let choosing = Choosing::start(&nothing, 3, choices.to_vec(), &mut exchange).unwrap();
        let chosen = choosing.finish(&mut exchange).unwrap();
        assert!((0..5).all(|row| matches!(chosen.row(row), Row::Nothing)));
    }
}
