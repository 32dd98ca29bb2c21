//! Elementwise functions and norms, one row or element at a time.
//!
//! Written without branches over short arrays of lanes, so that the compiler turns the loops into vector code.

use pulp::Arch;
use rayon::prelude::*;

use super::MIN_PARALLEL_WORK;

/// Partial sums of a reduction; a fixed number, so that the order of additions is fixed.
const LANES: usize = 16;

/// e^x, within 2 units in the last place; 0 far below zero, never NaN for finite input.
#[inline(always)]
pub fn exp(x: f32) -> f32 {
    const LN2_HIGH: f32 = 0.693_359_4;
    const LN2_LOW: f32 = -2.121_944_4e-4;
    // Adding and taking away 1.5 * 2^23 rounds to an integer.
    const ROUND: f32 = 12_582_912.0;
    let clamped = x.clamp(-87.0, 88.0);
    let shifted = clamped * std::f32::consts::LOG2_E + ROUND;
    let n = shifted - ROUND;
    let r = clamped - n * LN2_HIGH - n * LN2_LOW;
    let p = 1.987_569_1e-4;
    let p = p * r + 1.398_199_9e-3;
    let p = p * r + 8.333_452e-3;
    let p = p * r + 4.166_579_6e-2;
    let p = p * r + 1.666_666_5e-1;
    let p = p * r + 0.5;
    let p = p * r * r + r + 1.0;
    let scale = f32::from_bits((shifted.to_bits() << 23).wrapping_add(1.0f32.to_bits()));
    if x < -87.0 { 0.0 } else { p * scale }
}

#[inline(always)]
fn gelu_tanh(x: f32) -> f32 {
    // 0.5 x (1 + tanh u) = x / (1 + e^-2u)
    let u = 0.797_884_6 * (x + 0.044_715 * x * x * x);
    x / (1.0 + exp(-2.0 * u))
}

/// Rows that are worth a task of their own.
fn rows_a_task(width: usize) -> usize {
    (MIN_PARALLEL_WORK / 8 / width).max(1)
}

/// Runs `row` over rows of `width`, in parallel when it pays.
fn for_rows(values: &mut [f32], width: usize, row: impl Fn(&mut [f32]) + Sync) {
    if values.len() < MIN_PARALLEL_WORK / 4 {
        Arch::new().dispatch(|| values.chunks_mut(width).for_each(&row));
    } else {
        let rows = values.par_chunks_mut(width).with_min_len(rows_a_task(width));
        rows.for_each(|values| Arch::new().dispatch(|| row(values)));
    }
}

/// GELU by its tanh approximation, as in the vision tower.
pub fn gelu_tanh_in_place(values: &mut [f32]) {
    for_rows(values, 4096, |row| row.iter_mut().for_each(|x| *x = gelu_tanh(*x)));
}

/// erf(x) within 3e-7: a rational function, since beyond 4 it is 1 to f32's rounding.
#[inline(always)]
fn erf(x: f32) -> f32 {
    const ODD: [f32; 7] = [
        -2.726_142_3e-10,
        2.770_681_4e-8,
        -2.101_024e-6,
        -5.692_506_4e-5,
        -7.349_906e-4,
        -2.954_6e-3,
        -1.609_603_3e-2,
    ];
    const EVEN: [f32; 5] = [-1.456_607_2e-5, -2.133_740_5e-4, -1.682_827e-3, -7.373_329e-3, -1.426_473_9e-2];
    let x = x.clamp(-4.0, 4.0);
    let square = x * x;
    let polynomial = |terms: &[f32]| terms.iter().fold(0.0, |sum, term| sum * square + term);
    x * polynomial(&ODD) / polynomial(&EVEN)
}

/// Exact GELU, as in the connector.
pub fn gelu_erf_in_place(values: &mut [f32]) {
    let gelu = |x: f32| 0.5 * x * (1.0 + erf(x * std::f32::consts::FRAC_1_SQRT_2));
    for_rows(values, 1024, |row| row.iter_mut().for_each(|x| *x = gelu(*x)));
}

/// `silu(gate) * up` of rows `[gate | up]`, each half `width` wide: `[rows, width]`.
pub fn silu_mul(gates_and_ups: &[f32], width: usize) -> Vec<f32> {
    let mut out = vec![0.0; gates_and_ups.len() / 2];
    let work = |(out, row): (&mut [f32], &[f32])| {
        let (gates, ups) = row.split_at(width);
        Arch::new().dispatch(|| {
            for ((out, gate), up) in out.iter_mut().zip(gates).zip(ups) {
                *out = *gate / (1.0 + exp(-*gate)) * up;
            }
        });
    };
    if out.len() < MIN_PARALLEL_WORK / 4 {
        out.chunks_mut(width).zip(gates_and_ups.chunks(2 * width)).for_each(work);
    } else {
        out.par_chunks_mut(width).zip(gates_and_ups.par_chunks(2 * width)).for_each(work);
    }
    out
}

/// `to += x`.
pub fn add(to: &mut [f32], x: &[f32]) {
    const CHUNK: usize = 16 * 1024;
    let work = |(to, x): (&mut [f32], &[f32])| {
        Arch::new().dispatch(|| to.iter_mut().zip(x).for_each(|(to, x)| *to += x));
    };
    if to.len() < MIN_PARALLEL_WORK {
        work((to, x));
    } else {
        to.par_chunks_mut(CHUNK).zip(x.par_chunks(CHUNK)).for_each(work);
    }
}

#[inline(always)]
fn sum(values: &[f32], term: impl Fn(f32) -> f32) -> f32 {
    let mut lanes = [0.0f32; LANES];
    let chunks = values.chunks_exact(LANES);
    let rest = chunks.remainder();
    for chunk in chunks {
        for lane in 0..LANES {
            lanes[lane] += term(chunk[lane]);
        }
    }
    lanes.iter().sum::<f32>() + rest.iter().map(|&x| term(x)).sum::<f32>()
}

/// Runs `row` from rows of `x` to rows of a new buffer of the same size, in parallel when it pays.
fn map_rows(x: &[f32], width: usize, row: impl Fn(&[f32], &mut [f32]) + Sync) -> Vec<f32> {
    let mut out = vec![0.0; x.len()];
    if x.len() < MIN_PARALLEL_WORK / 4 {
        Arch::new().dispatch(|| x.chunks(width).zip(out.chunks_mut(width)).for_each(|(x, out)| row(x, out)));
    } else {
        let rows = x.par_chunks(width).zip(out.par_chunks_mut(width)).with_min_len(rows_a_task(width));
        rows.for_each(|(x, out)| Arch::new().dispatch(|| row(x, out)));
    }
    out
}

/// LayerNorm over rows of `weight.len()`.
pub fn layer_norm(x: &[f32], weight: &[f32], bias: &[f32], eps: f32) -> Vec<f32> {
    let width = weight.len();
    map_rows(x, width, |row, out| {
        let mean = sum(row, |x| x) / width as f32;
        let variance = sum(row, |x| (x - mean) * (x - mean)) / width as f32;
        let scale = 1.0 / (variance + eps).sqrt();
        for (((out, x), weight), bias) in out.iter_mut().zip(row).zip(weight).zip(bias) {
            *out = (x - mean) * scale * weight + bias;
        }
    })
}

/// RMSNorm over rows of `weight.len()`.
pub fn rms_norm(x: &[f32], weight: &[f32], eps: f32) -> Vec<f32> {
    let width = weight.len();
    map_rows(x, width, |row, out| {
        let scale = 1.0 / (sum(row, |x| x * x) / width as f32 + eps).sqrt();
        for ((out, x), weight) in out.iter_mut().zip(row).zip(weight) {
            *out = x * scale * weight;
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exp_is_close_over_the_whole_range() {
        for i in -8700..8800 {
            let x = i as f32 / 100.0;
            let (got, expected) = (f64::from(exp(x)), f64::from(x).exp());
            assert!((got / expected - 1.0).abs() < 3e-7, "exp({x}) = {got}, not {expected}");
        }
        assert_eq!(exp(f32::NEG_INFINITY), 0.0);
        assert_eq!(exp(-1000.0), 0.0);
        assert_eq!(exp(0.0), 1.0);
    }

    #[test]
    fn erf_is_close_over_the_whole_range() {
        for i in -6000..6000 {
            let x = i as f32 / 1000.0;
            let expected = candle_core::cpu::erf::erf_f64(f64::from(x));
            assert!((f64::from(erf(x)) - expected).abs() < 3e-7, "erf({x}) = {}, not {expected}", erf(x));
        }
    }

    #[test]
    fn activations_match_their_definitions() {
        let xs: Vec<f32> = (-80..80).map(|i| i as f32 / 10.0).collect();
        let (mut tanh, mut erf) = (xs.clone(), xs.clone());
        gelu_tanh_in_place(&mut tanh);
        gelu_erf_in_place(&mut erf);
        let halves: Vec<f32> = xs.iter().copied().chain(xs.iter().map(|_| 2.0)).collect();
        let gated = silu_mul(&halves, xs.len());
        for (i, &x) in xs.iter().enumerate() {
            let x = f64::from(x);
            let by_tanh =
                0.5 * x * (1.0 + ((2.0 / std::f64::consts::PI).sqrt() * (x + 0.044715 * x.powi(3))).tanh());
            assert!((f64::from(tanh[i]) - by_tanh).abs() < 2e-6, "{x}");
            assert!((f64::from(erf[i]) - by_tanh).abs() < 1e-3, "{x}");
            assert!((f64::from(gated[i]) - 2.0 * x / (1.0 + (-x).exp())).abs() < 4e-6, "{x}");
        }
    }

    #[test]
    fn norms_have_the_moments_they_promise() {
        let values: Vec<f32> = (0..3 * 50).map(|i| ((i * 37 % 101) as f32).sin() + 2.0).collect();
        let (ones, zeros) = (vec![1.0; 50], vec![0.0; 50]);
        for row in layer_norm(&values, &ones, &zeros, 1e-6).chunks(50) {
            let mean = row.iter().sum::<f32>() / 50.0;
            assert!(mean.abs() < 1e-5 && (row.iter().map(|x| x * x).sum::<f32>() / 50.0 - 1.0).abs() < 1e-4);
        }
        for row in rms_norm(&values, &ones, 1e-6).chunks(50) {
            assert!((row.iter().map(|x| x * x).sum::<f32>() / 50.0 - 1.0).abs() < 1e-4);
        }
    }
}
