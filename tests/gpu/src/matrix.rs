//! Tensor cores: how matrices are spread over the lanes of a warp (PTX ISA, "Matrix Fragments for mma.m16n8k16").

use half::{bf16, f16};

use super::block::{LANES, Row};

fn wide(bits: u64, is_bf16: bool) -> f32 {
    let bits = bits as u16;
    if is_bf16 { bf16::from_bits(bits).to_f32() } else { f16::from_bits(bits).to_f32() }
}

/// `a b + c` of `a` `[16, 16]`, `b` `[16, 8]` and `c` `[16, 8]`, in registers.
pub fn multiply(a: &[Row], b: &[Row], c: &[Row], is_bf16: bool) -> [Row; 4] {
    let (mut left, mut right) = ([[0.0; 16]; 16], [[0.0; 16]; 8]);
    for lane in 0..LANES {
        let (row, pair) = (lane / 4, lane % 4 * 2);
        for i in 0..2 {
            let half = |row: &Row| wide(row[lane] >> (16 * i), is_bf16);
            for (number, a) in a.iter().enumerate() {
                left[row + number % 2 * 8][pair + number / 2 * 8 + i] = half(a);
            }
            for (number, b) in b.iter().enumerate() {
                right[row][pair + number * 8 + i] = half(b);
            }
        }
    }
    std::array::from_fn(|i| {
        std::array::from_fn(|lane| {
            let (row, column) = (lane / 4 + i / 2 * 8, lane % 4 * 2 + i % 2);
            let sum: f32 = left[row].iter().zip(&right[column]).map(|(x, y)| x * y).sum();
            u64::from((f32::from_bits(c[i][lane] as u32) + sum).to_bits())
        })
    })
}

/// A matrix of 8 x 8 elements: a lane has two neighbours.
pub fn spread(elements: &[[u16; 8]; 8], is_transposed: bool) -> Row {
    std::array::from_fn(|lane| {
        let (i, j) = (lane / 4, lane % 4 * 2);
        let at = |i: usize, j: usize| u64::from(if is_transposed { elements[j][i] } else { elements[i][j] });
        at(i, j) | at(i, j + 1) << 16
    })
}
