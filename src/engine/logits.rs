//! The logits of a step, wherever they lie: rows that only need their largest are decided on the device, and only their
//! ids come back; the others are copied to host memory.
//!
//! Made by the runner for each step. Chooses nothing but largest logits.

use crate::{
    model::{Result, Tensor, device},
    scheduler::TokenId,
};

/// One row of a step.
#[derive(Debug)]
pub(super) enum Row<'a> {
    /// Logits of the ids that may be sampled.
    Logits(&'a [f32]),
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

#[derive(Debug, Clone, Copy)]
enum Place {
    /// The row of this number in `values`.
    Host(usize),
    Largest(TokenId),
    NotFinite,
}

impl Logits {
    /// `logits` `[rows, vocab]` in f32, of which ids below `num_ids` may be sampled. `largest_only` says of each row
    /// whether its largest is all that is wanted. What lies in host memory already is not looked at here.
    pub(super) fn fetch(logits: &Tensor, num_ids: usize, largest_only: &[bool]) -> Result<Self> {
        if logits.device().is_cpu() {
            return Ok(Logits {
                values: logits.narrow(1, 0, num_ids)?.flatten_all()?.to_vec1()?,
                num_ids,
                rows: (0..largest_only.len()).map(Place::Host).collect(),
            });
        }
        Self::fetch_from_device(logits, num_ids, largest_only)
    }

    fn fetch_from_device(logits: &Tensor, num_ids: usize, largest_only: &[bool]) -> Result<Self> {
        let mut copied: Vec<u32> = vec![];
        for (row, _) in largest_only.iter().enumerate().filter(|(_, largest_only)| !**largest_only) {
            copied.push(row as u32);
        }
        let mut rows: Vec<Place> = vec![];
        if copied.len() < largest_only.len() {
            // The largest itself tells whether there is a finite one.
            let place = |(id, largest): (u32, f32)| match largest.is_finite() {
                true => Place::Largest(id),
                false => Place::NotFinite,
            };
            rows = device::largest(logits, num_ids)?.into_iter().map(place).collect();
        }
        rows.resize(largest_only.len(), Place::NotFinite);
        for (place, &row) in copied.iter().enumerate() {
            rows[row as usize] = Place::Host(place);
        }
        let values = match copied.len() {
            0 => vec![],
            all if all == largest_only.len() => logits.narrow(1, 0, num_ids)?.flatten_all()?.to_vec1()?,
            some => {
                let index = Tensor::from_vec(copied, some, logits.device())?;
                logits.index_select(&index, 0)?.narrow(1, 0, num_ids)?.flatten_all()?.to_vec1()?
            }
        };
        Ok(Logits { values, num_ids, rows })
    }

    /// Row `index`.
    pub(super) fn row(&self, index: usize) -> Row<'_> {
        match self.rows[index] {
            Place::Largest(id) => Row::Largest(id),
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
        let fetched = Logits::fetch(&logits(), 3, &[true, false, true, false]).unwrap();
        assert!(matches!(fetched.row(0), Row::Logits([1.0, 5.0, 2.0])));
        assert!(matches!(fetched.row(2), Row::NotFinite));
        assert!(matches!(fetched.row(3), Row::Logits([0.0, 1.0, 7.0])));
    }

    #[test]
    fn from_a_device_come_ids_where_only_the_largest_is_wanted_and_logits_elsewhere() {
        for largest_only in [[true, false, true, false], [true; 4], [false; 4]] {
            let fetched = Logits::fetch_from_device(&logits(), 3, &largest_only).unwrap();
            for (row, (largest, expected)) in
                [(1, [1.0, 5.0, 2.0]), (0, [4.0, 3.0, 2.0]), (0, [0.0; 3]), (2, [0.0, 1.0, 7.0])]
                    .iter()
                    .enumerate()
            {
                match fetched.row(row) {
                    Row::NotFinite => assert_eq!(row, 2),
                    Row::Largest(id) => assert!(largest_only[row] && id == *largest),
                    Row::Logits(values) => assert!(!largest_only[row] && values == expected),
                }
            }
        }
    }
}
