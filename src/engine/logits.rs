//! The logits of a step, wherever they lie: a device adjusts them and finds what is needed of each row, the largest or the few largest, and
//! nothing else comes back; whole rows are copied to host memory where that is not enough.
//!
//! Made by the runner for each step. Chooses nothing but largest logits.

use super::sampler::{self, Few};
use crate::{
    model::{
        Result, Tensor,
        device::{self, Adjustment},
    },
    scheduler::TokenId,
};

/// What is needed of a row, after what was adjusted.
#[derive(Debug, Clone, PartialEq)]
pub(super) enum Needed {
    Largest(Vec<Adjustment>),
    /// What is no smaller than the logit of rank [`sampler::FEW`], and the sum of all at a temperature.
    Few(f32, Vec<Adjustment>),
    /// Everything, as the model gave it.
    All,
}

impl Needed {
    fn adjustments(&self) -> &[Adjustment] {
        match self {
            Needed::Largest(adjustments) | Needed::Few(_, adjustments) => adjustments,
            Needed::All => &[],
        }
    }
}

/// One row of a step.
#[derive(Debug)]
pub(super) enum Row<'a> {
    /// Logits of the ids that may be sampled, as the model gave them.
    Logits(&'a [f32]),
    /// The same, adjusted.
    Adjusted(&'a [f32]),
    Few(&'a Few),
    /// The id with the largest logit.
    Largest(TokenId),
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
    Few(Few),
    Largest(TokenId),
    Nothing,
}

impl Logits {
    /// `logits` `[rows, vocab]` in f32, of which ids below `num_ids` may be sampled, and what is needed of each row. What lies in host
    /// memory already is neither looked at nor adjusted here.
    pub(super) fn fetch(logits: &Tensor, num_ids: usize, needed: &[Needed]) -> Result<Self> {
        if logits.device().is_cpu() {
            let mut all =
                Logits { tensor: logits.clone(), num_ids, rows: vec![Place::Nothing; needed.len()] };
            all.copy(&(0..needed.len()).collect::<Vec<_>>(), |_| false)?;
            return Ok(all);
        }
        Self::fetch_from_device(logits, num_ids, needed)
    }

    fn fetch_from_device(logits: &Tensor, num_ids: usize, needed: &[Needed]) -> Result<Self> {
        let of_rows = needed.iter().enumerate().flat_map(|(row, needed)| {
            let known = needed.adjustments().iter().filter(|one| (one.id as usize) < num_ids);
            known.map(move |&one| (row, one))
        });
        let tensor = device::adjust(logits, &of_rows.collect::<Vec<_>>())?;
        let (mut largest, mut few) = (vec![], vec![]);
        if needed.iter().any(|needed| matches!(needed, Needed::Largest(_))) {
            largest = device::largest(&tensor, num_ids)?;
        }
        if needed.iter().any(|needed| matches!(needed, Needed::Few(..))) {
            let temperature =
                |needed: &Needed| if let Needed::Few(degrees, _) = needed { *degrees } else { 1.0 };
            let temperatures: Vec<f32> = needed.iter().map(temperature).collect();
            few = device::few_largest(&tensor, num_ids, sampler::FEW, &temperatures)?;
        }
        let place = |(row, needed): (usize, &Needed)| match needed {
            // The largest itself tells whether there is one.
            Needed::Largest(_) if largest[row].1 > f32::NEG_INFINITY => Some(Place::Largest(largest[row].0)),
            Needed::Largest(_) => Some(Place::Nothing),
            Needed::Few(..) => {
                let (logits, total) = few[row].take()?;
                let is_any = logits.iter().any(|&(_, logit)| logit > f32::NEG_INFINITY);
                let few = Few { logits, total: f64::from(total) };
                Some(if is_any { Place::Few(few) } else { Place::Nothing })
            }
            Needed::All => None,
        };
        let rows: Vec<Option<Place>> = needed.iter().enumerate().map(place).collect();
        let whole: Vec<usize> = (0..rows.len()).filter(|&row| rows[row].is_none()).collect();
        let rows = rows.into_iter().map(|row| row.unwrap_or(Place::Nothing)).collect();
        let mut all = Logits { tensor, num_ids, rows };
        all.copy(&whole, |row| needed[row] != Needed::All)?;
        Ok(all)
    }

    /// Has these rows whole, adjusted as they were.
    pub(super) fn fetch_whole(&mut self, rows: &[usize]) -> Result<()> {
        self.copy(rows, |_| true)
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
            Place::Largest(id) => Row::Largest(*id),
            Place::Few(few) => Row::Few(few),
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

    #[test]
    fn in_host_memory_every_row_is_as_it_was_without_the_ids_that_may_not_be_sampled() {
        let needed =
            [Needed::Largest(vec![]), Needed::All, Needed::Largest(vec![]), Needed::Few(1.0, vec![SHIFT])];
        let fetched = Logits::fetch(&logits(), 3, &needed).unwrap();
        assert!(matches!(fetched.row(0), Row::Logits([1.0, 5.0, 2.0])));
        assert!(matches!(fetched.row(2), Row::Nothing));
        assert!(matches!(fetched.row(3), Row::Logits([0.0, 1.0, 7.0])));
    }

    #[test]
    fn from_a_device_comes_what_is_needed_of_each_row() {
        let rows = [(1, [1.0, 5.0, 2.0]), (0, [4.0, 3.0, 2.0]), (0, [0.0; 3]), (2, [0.0, 1.0, 7.0])];
        let (largest, few, all) = (Needed::Largest(vec![]), Needed::Few(1.0, vec![]), Needed::All);
        for needed in [
            [&largest, &all, &largest, &all],
            [&largest; 4],
            [&all; 4],
            [&few; 4],
            [&few, &largest, &few, &all],
        ] {
            let needed = needed.map(Clone::clone);
            let fetched = Logits::fetch_from_device(&logits(), 3, &needed).unwrap();
            for (row, (id, expected)) in rows.iter().enumerate() {
                match fetched.row(row) {
                    Row::Nothing => assert_eq!(row, 2),
                    Row::Largest(largest) => {
                        assert!(needed[row] == Needed::Largest(vec![]) && largest == *id)
                    }
                    Row::Few(candidates) => {
                        let all: Vec<(TokenId, f32)> = (0..).zip(*expected).collect();
                        assert!(needed[row] == few && candidates.logits == all);
                        let weight = |logit: &f32| f64::from(logit - expected[*id as usize]).exp();
                        assert!((candidates.total - expected.iter().map(weight).sum::<f64>()).abs() < 1e-6);
                    }
                    Row::Logits(values) => assert!(needed[row] == Needed::All && values == expected),
                    Row::Adjusted(_) => panic!("nothing was adjusted"),
                }
            }
        }
    }

    #[test]
    fn on_a_device_rows_are_adjusted_but_for_those_that_are_needed_as_they_are() {
        let beyond = Adjustment { id: 3, ..SHIFT };
        let needed = [
            Needed::Largest(vec![SHIFT, beyond]),
            Needed::Few(2.0, vec![SHIFT]),
            Needed::Few(1.0, vec![]),
            Needed::All,
        ];
        let mut fetched = Logits::fetch_from_device(&logits(), 3, &needed).unwrap();
        assert!(matches!(fetched.row(0), Row::Largest(1)));
        let Row::Few(few) = fetched.row(1) else { panic!("the few were asked for") };
        assert_eq!(few.logits, [(0, 6.0), (1, 3.0), (2, 2.0)]);
        let expected = 1.0 + (-1.5f64).exp() + (-2.0f64).exp();
        assert!((few.total - expected).abs() < 1e-6);
        assert!(matches!(fetched.row(3), Row::Logits([0.0, 1.0, 7.0])));
        fetched.fetch_whole(&[0, 1]).unwrap();
        assert!(matches!(fetched.row(0), Row::Adjusted([4.5, 5.0, 2.0])));
        assert!(matches!(fetched.row(1), Row::Adjusted([6.0, 3.0, 2.0])));
    }
}
