//! A decode step that a device computes while the host still waits for the tokens of the step before it.
//!
//! The runner starts it: the same sequences once more, with the tokens that the device has chosen and the host has not seen. What the
//! scheduler plans next is held against it: rows that it has are taken from there, all others are computed as ever. So nothing but time
//! depends on what was guessed. A row that is not planned, for its sequence has ended, has written behind everything its blocks are known for,
//! and before whatever is written by those who get them next.

use std::collections::HashMap;

use crate::{
    model::{
        Result, Tensor,
        device::{is_switched_off, select_rows},
    },
    scheduler::{ComputeWork, Scheduler, SequenceId, TokenId},
};

/// What was started, and whether it is worth while.
#[derive(Debug, Default)]
pub(super) struct Ahead {
    is_off: bool,
    started: Option<Started>,
    /// How many steps nothing is started, and how many after the next wrong guess.
    pause: u32,
    next_pause: u32,
}

/// Set to 0, nothing is started ahead.
const VARIABLE: &str = "TINYLLAVA_RUN_AHEAD";
/// Most steps for which nothing is started after a wrong guess.
const LONGEST_PAUSE: u32 = 64;

/// A step that was started.
#[derive(Debug)]
pub(super) struct Started {
    pub rows: HashMap<StartedRow, usize>,
    /// `[rows, vocab]`
    pub logits: Tensor,
}

/// One of its rows.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) struct StartedRow {
    pub sequence: SequenceId,
    pub position: usize,
    /// None where the token turned out to be another.
    pub token: Option<TokenId>,
}

impl Ahead {
    /// As the environment asks for it.
    pub(super) fn from_env() -> Self {
        Ahead { is_off: is_switched_off(VARIABLE), ..Ahead::default() }
    }

    /// Whether a step may be started; to be asked once for each that could be.
    pub(super) fn may_start(&mut self) -> bool {
        self.pause = self.pause.saturating_sub(1);
        self.pause == 0 && !self.is_off
    }

    /// Keeps a step, of which the host knows the tokens by now.
    pub(super) fn keep(&mut self, started: Started) {
        let is_right = started.rows.keys().all(|row| row.token.is_some());
        self.pause = if is_right { 0 } else { self.next_pause + 1 };
        self.next_pause = if is_right { 1 } else { (self.next_pause * 2).clamp(1, LONGEST_PAUSE) };
        self.started = Some(started);
    }

    /// What was kept. From then on there is none.
    pub(super) fn take(&mut self) -> Option<Started> {
        self.started.take()
    }
}

impl Started {
    /// Which of the rows is what `work` wants computed.
    pub(super) fn row_of(&self, work: &ComputeWork, scheduler: &Scheduler) -> Option<usize> {
        if !work.samples || work.positions.len() != 1 {
            return None;
        }
        let (sequence, position) = (work.sequence, work.positions.start);
        let token = scheduler.sequence(sequence)?.token_ids().get(position).copied();
        self.rows.get(&StartedRow { sequence, position, token }).copied()
    }

    /// The logits of works that have these rows here, or none and are then the next ones of `others`.
    pub(super) fn merge(self, rows: &[Option<usize>], others: Option<Tensor>) -> Result<Tensor> {
        let num_own = self.logits.dim(0)?;
        let mut next = num_own..;
        let order: Vec<usize> = rows.iter().filter_map(|row| row.or_else(|| next.next())).collect();
        let all = match others {
            Some(others) => Tensor::cat(&[self.logits, others], 0)?,
            None => self.logits,
        };
        select_rows(&all, &order)
    }
}

#[cfg(test)]
mod tests {
    use candle_core::Device;

    use super::*;

    fn started(tokens: &[Option<TokenId>]) -> Started {
        let rows =
            (0..).zip(tokens).map(|(i, &token)| StartedRow { sequence: SequenceId(i), position: 7, token });
        let logits: Vec<f32> = (0..tokens.len()).map(|i| i as f32).collect();
        Started {
            rows: rows.zip(0..).collect(),
            logits: Tensor::from_vec(logits, (tokens.len(), 1), &Device::Cpu).unwrap(),
        }
    }

    #[test]
    fn after_wrong_guesses_nothing_is_started_for_longer_and_longer() {
        let mut ahead = Ahead::default();
        let mut steps_until_next = |is_right: bool| {
            ahead.keep(started(&[Some(1), is_right.then_some(2)]));
            1 + (0..).take_while(|_| !ahead.may_start()).count()
        };
        assert_eq!([(); 3].map(|()| steps_until_next(true)), [1, 1, 1]);
        assert_eq!([(); 9].map(|()| steps_until_next(false)), [2, 3, 5, 9, 17, 33, 65, 65, 65]);
        assert_eq!([true, true, false].map(steps_until_next), [1, 1, 2]);
    }

    #[test]
    fn logits_come_from_where_they_are_in_the_order_of_the_works() {
        let merged = |rows: &[Option<usize>], others: Option<&[f32]>| {
            let others =
                others.map(|values| Tensor::from_slice(values, (values.len(), 1), &Device::Cpu).unwrap());
            let merged = started(&[Some(1); 3]).merge(rows, others).unwrap();
            merged.flatten_all().unwrap().to_vec1::<f32>().unwrap()
        };
        assert_eq!(merged(&[Some(0), Some(1), Some(2)], None), [0.0, 1.0, 2.0]);
        assert_eq!(merged(&[Some(2), Some(1)], None), [2.0, 1.0]);
        assert_eq!(merged(&[None, Some(2), None], Some(&[10.0, 11.0])), [10.0, 2.0, 11.0]);
    }
}
