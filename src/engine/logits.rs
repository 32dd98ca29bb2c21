//! The logits of a step, wherever they lie: of rows that need only their largest, or their few largest, a device finds these, and nothing
//! else comes back; the others are copied to host memory.
//!
//! Made by the runner for each step. Chooses nothing but largest logits.

use super::sampler;
use crate::{
    model::{
        Result, Tensor,
        device::{self, Candidates},
    },
    scheduler::TokenId,
};

/// What is needed of a row.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Needed {
    Largest,
    /// What is no smaller than the logit of rank [`sampler::FEW`].
    Few,
    All,
}

/// One row of a step.
#[derive(Debug)]
pub(super) enum Row<'a> {
    /// Logits of the ids that may be sampled.
    Logits(&'a [f32]),
    /// Those of them that are no smaller than the one of rank [`sampler::FEW`], with their ids, and perhaps others.
    Few(&'a [(TokenId, f32)]),
    /// The id with the largest logit.
    Largest(TokenId),
    /// No logit is finite.
    NotFinite,
}

/// All rows of a step.
#[derive(Debug)]
pub(super) struct Logits {
    /// Rows in host memory, `num_ids` each.
    values: Vec<f32>,
    num_ids: usize,
    rows: Vec<Place>,
}

#[derive(Debug, Clone)]
enum Place {
    /// The row of this number in `values`.
    Host(usize),
    Few(Candidates),
    Largest(TokenId),
    NotFinite,
}

impl Logits {
    /// `logits` `[rows, vocab]` in f32, of which ids below `num_ids` may be sampled, and what is needed of each row. What lies in host
    /// memory already is not looked at here.
    pub(super) fn fetch(logits: &Tensor, num_ids: usize, needed: &[Needed]) -> Result<Self> {
        if logits.device().is_cpu() {
            return Ok(Logits {
                values: logits.narrow(1, 0, num_ids)?.flatten_all()?.to_vec1()?,
                num_ids,
                rows: (0..needed.len()).map(Place::Host).collect(),
            });
        }
        Self::fetch_from_device(logits, num_ids, needed)
    }

    fn fetch_from_device(logits: &Tensor, num_ids: usize, needed: &[Needed]) -> Result<Self> {
        let mut rows: Vec<Option<Place>> = vec![None; needed.len()];
        let of_kind = |kind: Needed| (0..needed.len()).filter(move |&row| needed[row] == kind);
        if of_kind(Needed::Largest).next().is_some() {
            let largest = device::largest(logits, num_ids)?;
            for row in of_kind(Needed::Largest) {
                let (id, largest) = largest[row];
                // The largest itself tells whether there is a finite one.
                rows[row] = Some(if largest.is_finite() { Place::Largest(id) } else { Place::NotFinite });
            }
        }
        if of_kind(Needed::Few).next().is_some() {
            let mut few = device::few_largest(logits, num_ids, sampler::FEW)?;
            for row in of_kind(Needed::Few) {
                let place = |few: Candidates| match few.iter().any(|(_, logit)| logit.is_finite()) {
                    true => Place::Few(few),
                    false => Place::NotFinite,
                };
                rows[row] = few[row].take().map(place);
            }
        }
        let mut copied: Vec<u32> = vec![];
        for (row, place) in rows.iter_mut().enumerate().filter(|(_, place)| place.is_none()) {
            *place = Some(Place::Host(copied.len()));
            copied.push(row as u32);
        }
        let values = match copied.len() {
            0 => vec![],
            all if all == needed.len() => logits.narrow(1, 0, num_ids)?.flatten_all()?.to_vec1()?,
            some => {
                let index = Tensor::from_vec(copied, some, logits.device())?;
                logits.index_select(&index, 0)?.narrow(1, 0, num_ids)?.flatten_all()?.to_vec1()?
            }
        };
        Ok(Logits { values, num_ids, rows: rows.into_iter().flatten().collect() })
    }

    /// Row `index`.
    pub(super) fn row(&self, index: usize) -> Row<'_> {
        match &self.rows[index] {
            Place::Largest(id) => Row::Largest(*id),
            Place::Few(few) => Row::Few(few),
            Place::NotFinite => Row::NotFinite,
            Place::Host(place) => {
                let logits = &self.values[place * self.num_ids..][..self.num_ids];
                if logits.iter().any(|logit| logit.is_finite()) {
                    Row::Logits(logits)
                } else {
                    Row::NotFinite
                }
            }
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

    #[test]
    fn in_host_memory_every_row_is_as_it_was_without_the_ids_that_may_not_be_sampled() {
        let needed = [Needed::Largest, Needed::All, Needed::Largest, Needed::Few];
        let fetched = Logits::fetch(&logits(), 3, &needed).unwrap();
        assert!(matches!(fetched.row(0), Row::Logits([1.0, 5.0, 2.0])));
        assert!(matches!(fetched.row(2), Row::NotFinite));
        assert!(matches!(fetched.row(3), Row::Logits([0.0, 1.0, 7.0])));
    }

    #[test]
    fn from_a_device_comes_what_is_needed_of_each_row() {
        let rows = [(1, [1.0, 5.0, 2.0]), (0, [4.0, 3.0, 2.0]), (0, [0.0; 3]), (2, [0.0, 1.0, 7.0])];
        let (largest, few, all) = (Needed::Largest, Needed::Few, Needed::All);
        for needed in
            [[largest, all, largest, all], [largest; 4], [all; 4], [few; 4], [few, largest, few, all]]
        {
            let fetched = Logits::fetch_from_device(&logits(), 3, &needed).unwrap();
            for (row, (id, expected)) in rows.iter().enumerate() {
                match fetched.row(row) {
                    Row::NotFinite => assert_eq!(row, 2),
                    Row::Largest(largest) => assert!(needed[row] == Needed::Largest && largest == *id),
                    Row::Few(candidates) => {
                        let all: Vec<(TokenId, f32)> = (0..).zip(*expected).collect();
                        assert!(needed[row] == Needed::Few && candidates == all);
                    }
                    Row::Logits(values) => assert!(needed[row] == Needed::All && values == expected),
                }
            }
        }
    }
}
