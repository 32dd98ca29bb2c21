//! Our own kernels of `kernels/fused.cu` for what stands between products: norms, activations, biases, rows of a table; and of
//! `kernels/largest.cu` for what becomes of logits.
//!
//! Called by [`super::super::ops`], whose plain operations are their reference and stand in where NVRTC is not installed: then
//! each of these gives none.

use candle_core::{D, DType};

use super::{
    super::{
        super::{Result, Tensor},
        exchange::Exchange,
        ops::{Adjustment, Draw, FEW},
    },
    launch::{FUSED, Grid, LARGEST, address, address_or_none, count, ensure, fresh},
};

/// Threads of a block; whole warps, 32 at most.
pub(super) const THREADS: u32 = 256;
/// What a thread reads at once where it can.
const VECTOR_BYTES: usize = 16;

/// `x + delta` and its norm.
pub fn add_rms_norm(
    x: &Tensor,
    delta: &Tensor,
    weight: &Tensor,
    eps: f64,
) -> Result<Option<(Tensor, Tensor)>> {
    if !FUSED.is_there(x.dtype()) {
        return Ok(None);
    }
    let (x, delta) = (x.contiguous()?, delta.contiguous()?);
    let (rows, width) = rows(&x)?;
    ensure_can_add(&x, &[Some(weight)], Some(&delta))?;
    let both = fresh(&[&[2], x.dims()].concat(), x.dtype(), x.device())?;
    let arguments = [
        address(&x)?,
        address(&delta)?,
        address(weight)?,
        address(&both)?,
        rows.into(),
        width.into(),
        (eps as f32).into(),
    ];
    let (name, _) = widest("add_rms_norm", width, &[&x, &delta, weight]);
    // SAFETY: each row of `x`, `delta` and of both halves of `both`, and `weight`, have `width` elements.
    unsafe { FUSED.launch(&name, &x, Grid::rows(rows, THREADS), &arguments) }?;
    Ok(Some((both.get(0)?, both.get(1)?)))
}

/// `x + bias + residual`, and its norm, `(y - mean) / deviation x weight + shift` over the last dimension; of `x` itself without both.
pub fn add_layer_norm(
    x: &Tensor,
    (bias, residual): (Option<&Tensor>, Option<&Tensor>),
    (weight, shift): (&Tensor, &Tensor),
    eps: f64,
) -> Result<Option<(Tensor, Tensor)>> {
    if !FUSED.is_there(x.dtype()) {
        return Ok(None);
    }
    let x = x.contiguous()?;
    let (rows, width) = rows(&x)?;
    let residual = residual.map(Tensor::contiguous).transpose()?;
    ensure_can_add(&x, &[Some(weight), Some(shift), bias], residual.as_ref())?;
    let is_sum = bias.is_some() || residual.is_some();
    let sum = if is_sum { fresh(x.dims(), x.dtype(), x.device())? } else { x.clone() };
    let out = fresh(x.dims(), x.dtype(), x.device())?;
    let arguments = [
        address(&x)?,
        address_or_none(bias)?,
        address_or_none(residual.as_ref())?,
        address_or_none(is_sum.then_some(&sum))?,
        address(weight)?,
        address(shift)?,
        address(&out)?,
        rows.into(),
        width.into(),
        (eps as f32).into(),
    ];
    let tensors = [Some(&x), bias, residual.as_ref(), Some(weight), Some(shift)];
    let (name, _) = widest("layer_norm", width, &tensors.into_iter().flatten().collect::<Vec<_>>());
    // SAFETY: each row of what is there has `width` elements.
    unsafe { FUSED.launch(&name, &x, Grid::rows(rows.div_ceil(THREADS / 32), THREADS), &arguments) }?;
    Ok(Some((sum, out)))
}

/// `[…, 2 width]`, gate then up, to `silu(gate) x up`.
pub fn silu_mul(x: &Tensor) -> Result<Option<Tensor>> {
    if !FUSED.is_there(x.dtype()) {
        return Ok(None);
    }
    let x = x.contiguous()?;
    let (rows, both) = rows(&x)?;
    let mut dims = x.dims().to_vec();
    if let Some(last) = dims.last_mut() {
        *last /= 2;
    }
    let out = fresh(&dims, x.dtype(), x.device())?;
    let arguments = [address(&x)?, address(&out)?, rows.into(), (both / 2).into()];
    let (name, at_once) = widest("silu_mul", both / 2, &[&x]);
    // SAFETY: the kernel looks at the number of elements.
    unsafe { FUSED.launch(&name, &x, elements(&out, at_once)?, &arguments) }?;
    Ok(Some(out))
}

/// The rows of `table` `[n, width]` that `ids` `[rows]` in u32 name: `[rows, width]`.
pub fn gather_rows(table: &Tensor, ids: &Tensor) -> Result<Option<Tensor>> {
    if !FUSED.is_there(table.dtype()) {
        return Ok(None);
    }
    let (rows, width) = (ids.dim(0)?, table.dim(1)?);
    ensure(table.is_contiguous() && ids.is_contiguous(), "rows of a table that is not whole")?;
    let out = fresh(&[rows, width], table.dtype(), table.device())?;
    let arguments = [address(table)?, address(ids)?, address(&out)?, count(width)?.into()];
    // SAFETY: ids are those of tokens and rows that there are; the scheduler and the tokenizer have no others.
    unsafe {
        FUSED.launch(&named("gather_rows", table), table, Grid::rows(count(rows)?, THREADS), &arguments)
    }?;
    Ok(Some(out))
}

/// What a layer does to its product `x` `[…, width]`: adds `bias` `[width]`, then `residual` of the shape of `x`; or takes GELU by
/// tanh of it.
pub fn finish_rows(
    x: &Tensor,
    bias: Option<&Tensor>,
    residual: Option<&Tensor>,
    gelu: bool,
) -> Result<Option<Tensor>> {
    if !FUSED.is_there(x.dtype()) {
        return Ok(None);
    }
    let x = x.contiguous()?;
    let (rows, width) = rows(&x)?;
    let residual = residual.map(Tensor::contiguous).transpose()?;
    ensure_can_add(&x, &[bias], residual.as_ref())?;
    let out = fresh(x.dims(), x.dtype(), x.device())?;
    let arguments = [
        address(&x)?,
        address_or_none(bias)?,
        address_or_none(residual.as_ref())?,
        address(&out)?,
        rows.into(),
        width.into(),
        u32::from(gelu).into(),
    ];
    let tensors = [Some(&x), bias, residual.as_ref()];
    let (name, at_once) = widest("finish_rows", width, &tensors.into_iter().flatten().collect::<Vec<_>>());
    // SAFETY: each row of what is there has `width` elements; the kernel looks at their number.
    unsafe { FUSED.launch(&name, &x, elements(&out, at_once)?, &arguments) }?;
    Ok(Some(out))
}

/// Of each row of `logits` `[rows, vocab]` in f32 the first of the largest of the first `num_ids`, or, where `draws` says how, one that is
/// drawn, if its largest logits decide it: `[2, rows]` in u32, as [`Chosen`](super::super::ops::Chosen) has them.
pub fn tokens(logits: &Tensor, num_ids: usize, draws: &[Option<Draw>]) -> Result<Option<Tensor>> {
    if !LARGEST.is_there(DType::F32) {
        return Ok(None);
    }
    let (rows, vocab) = rows_of_logits(logits, num_ids)?;
    ensure(draws.len() == rows, "draws of other rows")?;
    let out = fresh(&[2, rows], DType::U32, logits.device())?;
    let grid = Grid::rows(count(rows)?, CHOOSING_THREADS);
    let arguments = [address(logits)?, address(&out)?, count(num_ids)?.into(), count(vocab)?.into()];
    // SAFETY: rows are `vocab` wide, and no more than that is looked at.
    unsafe { LARGEST.launch("largest_f32", logits, grid, &arguments) }?;
    if draws.iter().all(Option::is_none) {
        return Ok(Some(out));
    }
    ensure(draws.iter().flatten().all(|draw| draw.top_k <= FEW), "a top-k beyond what is looked at")?;
    let words = draws.iter().flat_map(|draw| draw.as_ref().map_or([0; 6], words_of)).collect();
    let draws = Tensor::from_vec(words, (rows, 6), logits.device())?;
    let arguments = [
        address(logits)?,
        address(&draws)?,
        address(&out)?,
        count(num_ids)?.into(),
        count(vocab)?.into(),
        count(FEW)?.into(),
    ];
    // SAFETY: as above, and there is a draw for each row.
    unsafe { LARGEST.launch("draw_f32", logits, grid, &arguments) }?;
    Ok(Some(out))
}

/// Threads that look at a row: no fewer than [`FEW`].
const CHOOSING_THREADS: u32 = 1024;

/// As the kernel has it.
fn words_of(draw: &Draw) -> [u32; 6] {
    let random = draw.random.to_bits();
    let floats = [draw.temperature, draw.top_p, draw.min_p].map(f32::to_bits);
    [floats[0], floats[1], floats[2], draw.top_k as u32, random as u32, (random >> 32) as u32]
}

/// Leaves of `logits` `[rows, vocab]` in f32, where they lie, what the masks of their rows allow of the first `num_ids`.
pub fn forbid(
    logits: &Tensor,
    num_ids: usize,
    masks: &[(usize, &[u32])],
    exchange: &mut Exchange,
) -> Result<Option<Tensor>> {
    if !LARGEST.is_there(DType::F32) {
        return Ok(None);
    }
    let (rows, vocab) = rows_of_logits(logits, num_ids)?;
    let num_words = num_ids.div_ceil(32);
    let fits = |&(row, mask): &(usize, &[u32])| row < rows && mask.len() == num_words;
    ensure(masks.iter().all(fits), "masks of other rows")?;
    let words = masks.iter().flat_map(|&(row, mask)| std::iter::once(row as u32).chain(mask.iter().copied()));
    let words = exchange.send(&bytes_of(words), logits.device())?;
    let arguments = [
        address(logits)?,
        address(&words)?,
        count(num_ids)?.into(),
        count(vocab)?.into(),
        count(num_words)?.into(),
    ];
    let grid = Grid::of((count(num_ids)?.div_ceil(THREADS), count(masks.len())?, 1), THREADS);
    // SAFETY: every mask has as many words as are looked at, and is of a row that there is.
    unsafe { LARGEST.launch("forbid_f32", logits, grid, &arguments) }?;
    exchange.hold(words);
    Ok(Some(logits.clone()))
}

/// Adjusts `logits` `[rows, vocab]` in f32 where they lie.
pub fn adjust(
    logits: &Tensor,
    of_rows: &[(usize, Adjustment)],
    exchange: &mut Exchange,
) -> Result<Option<Tensor>> {
    if !LARGEST.is_there(DType::F32) {
        return Ok(None);
    }
    let (rows, vocab) = rows_of_logits(logits, 0)?;
    let fits = |(row, one): &(usize, Adjustment)| *row < rows && (one.id as usize) < vocab;
    ensure(of_rows.iter().all(fits), "an adjustment of a logit that there is not")?;
    let words =
        |&(row, one): &(usize, Adjustment)| [row as u32, one.id, one.factor.to_bits(), one.shift.to_bits()];
    // Penalties of long prompts are many: from ordinary memory the copy of more than 64 KB may wait for the device.
    let words = exchange.send(&bytes_of(of_rows.iter().flat_map(words)), logits.device())?;
    let number = count(of_rows.len())?;
    let arguments = [address(logits)?, address(&words)?, number.into(), count(vocab)?.into()];
    // SAFETY: every adjustment is of a logit that there is, as was looked at.
    unsafe {
        LARGEST.launch("adjust_f32", logits, Grid::rows(number.div_ceil(THREADS), THREADS), &arguments)
    }?;
    exchange.hold(words);
    Ok(Some(logits.clone()))
}

fn bytes_of(words: impl Iterator<Item = u32>) -> Vec<u8> {
    words.flat_map(u32::to_le_bytes).collect()
}

/// Unless each of `of_width` is as wide as the rows of `x`, and `residual` of its shape, all of its type, an error.
fn ensure_can_add(x: &Tensor, of_width: &[Option<&Tensor>], residual: Option<&Tensor>) -> Result<()> {
    let width = x.dim(D::Minus1)?;
    let fits = of_width.iter().flatten().all(|y| y.dims() == [width] && y.dtype() == x.dtype())
        && residual.is_none_or(|y| y.dims() == x.dims() && y.dtype() == x.dtype());
    ensure(fits, "a sum of different widths or types")
}

/// Rows and columns of logits as the kernels read them, `num_ids` columns at least.
fn rows_of_logits(logits: &Tensor, num_ids: usize) -> Result<(usize, usize)> {
    let (rows, vocab) = logits.dims2()?;
    let fits = logits.dtype() == DType::F32 && logits.is_contiguous() && num_ids <= vocab;
    ensure(fits, "logits of another shape")?;
    Ok((rows, vocab))
}

/// The kernel of this name for the type of `x`.
pub(super) fn named(kernel: &str, x: &Tensor) -> String {
    format!("{kernel}_{}", x.dtype().as_str())
}

/// The kernel of this name for rows of `width` in these tensors, whose first has the type; and how many elements it takes at once.
fn widest(kernel: &str, width: u32, tensors: &[&Tensor]) -> (String, usize) {
    let name = named(kernel, tensors[0]);
    let most = VECTOR_BYTES / tensors[0].dtype().size_in_bytes();
    let fits = |n: usize| n.is_multiple_of(most);
    match fits(width as usize) && tensors.iter().all(|x| fits(x.layout().start_offset())) {
        true => (format!("{name}_wide"), most),
        false => (name, 1),
    }
}

/// A thread for every so many elements.
fn elements(out: &Tensor, at_once: usize) -> Result<Grid> {
    Ok(Grid::rows(count(out.elem_count().div_ceil(at_once * THREADS as usize))?, THREADS))
}

/// Rows and width of contiguous elements.
fn rows(x: &Tensor) -> Result<(u32, u32)> {
    let width = x.dim(D::Minus1)?.max(1);
    Ok((count(x.elem_count() / width)?, count(width)?))
}

#[cfg(test)]
mod tests {
    use candle_core::Device;

    use super::{
        super::{super::ops, testing},
        *,
    };

    /// Ids and logits of the rows' tokens.
    fn chosen(logits: &Tensor, num_ids: usize, draws: &[Option<Draw>]) -> Vec<(u32, f32)> {
        let rows = tokens(logits, num_ids, draws).unwrap().unwrap().to_vec2::<u32>().unwrap();
        rows[0].iter().zip(&rows[1]).map(|(&id, &bits)| (id, f32::from_bits(bits))).collect()
    }

    #[test]
    fn the_largest_is_the_first_of_them_and_no_nan_where_there_is_a_gpu() {
        let Some(gpu) = testing::gpu() else { return };
        let mut rows = vec![vec![0.0f32; 5000]; 4];
        rows[0][4999] = 9.0;
        (rows[1][70], rows[1][4000]) = (3.0, 3.0);
        (rows[2][5], rows[2][6]) = (f32::NAN, 1.0);
        rows[3] = vec![f32::NAN; 5000];
        let found = chosen(&Tensor::new(rows, &gpu).unwrap(), 4990, &[None; 4]);
        assert_eq!(found, [(0, 0.0), (70, 3.0), (6, 1.0), (0, f32::NEG_INFINITY)]);
    }

    #[test]
    fn adjusted_logits_are_those_of_the_processor_where_there_is_a_gpu() {
        let Some(gpu) = testing::gpu() else { return };
        let values: Vec<f32> = (0..3 * 400).map(|i| ((i * 37) as f32 * 0.7).sin()).collect();
        let logits = Tensor::from_vec(values, (3, 400), &Device::Cpu).unwrap();
        let adjustment = |i: usize| Adjustment {
            id: (i / 3) as u32,
            factor: 1.0 + (i % 5) as f32,
            shift: i as f32 - 450.0,
        };
        let of_rows: Vec<_> = (0..900).map(|i| (i % 3, adjustment(i))).collect();
        let exchange = &mut Exchange::default();
        let there = ops::adjust(&logits.to_device(&gpu).unwrap(), &of_rows, exchange).unwrap();
        let there = there.to_vec2::<f32>().unwrap();
        assert_eq!(there, ops::adjust(&logits, &of_rows, exchange).unwrap().to_vec2::<f32>().unwrap());
        assert_ne!(there, logits.to_vec2::<f32>().unwrap());
    }

    #[test]
    fn what_masks_leave_is_what_they_leave_on_the_processor_where_there_is_a_gpu() {
        let Some(gpu) = testing::gpu() else { return };
        let logits = Tensor::arange(0f32, 4.0 * 700.0, &Device::Cpu).unwrap().reshape((4, 700)).unwrap();
        let mask = |seed: u32| (0..22).map(|i| seed.wrapping_mul(0x9e37_79b9 ^ i << 3)).collect::<Vec<u32>>();
        let (first, second) = (mask(77), mask(12_345));
        let masks = [(3, first.as_slice()), (1, second.as_slice())];
        let exchange = &mut Exchange::default();
        let there = ops::forbid(&logits.to_device(&gpu).unwrap(), 690, &masks, exchange).unwrap();
        let here = ops::forbid(&logits, 690, &masks, exchange).unwrap();
        let here = here.to_vec2::<f32>().unwrap();
        assert_eq!(there.to_vec2::<f32>().unwrap(), here);
        let num_forbidden =
            |row: usize| here[row].iter().filter(|logit| **logit == f32::NEG_INFINITY).count();
        assert!([1, 3].iter().all(|&row| (100..600).contains(&num_forbidden(row))));
        assert!(
            num_forbidden(0) + num_forbidden(2) == 0 && here[3][690..].iter().all(|logit| logit.is_finite())
        );
    }

    #[test]
    fn the_kernels_agree_with_the_plain_operations_where_there_is_a_gpu() {
        let Some(gpu) = testing::gpu() else { return };
        let noise = |len: usize, seed: usize| (0..len).map(move |i| ((i * 37 + seed) as f32 * 0.013).sin());
        let tensor = |rows: usize, width: usize, seed| {
            let values: Vec<f32> = noise(rows * width, seed).collect();
            Tensor::from_vec(values, (rows, width), &Device::Cpu).unwrap()
        };
        let types = [(DType::F32, 1e-5), (DType::F16, 4e-3), (DType::BF16, 3e-2)];
        // Rows that are read in pieces of 16 bytes, and others.
        for ((dtype, tolerance), width) in types.into_iter().flat_map(|kind| [2048, 2050].map(|w| (kind, w)))
        {
            let (x, delta) = (tensor(5, width, 1), tensor(5, width, 2));
            let weight = tensor(1, width, 3).squeeze(0).unwrap();
            let there = |x: &Tensor| x.to_dtype(dtype).unwrap().to_device(&gpu).unwrap();
            let close = |got: &Tensor, expected: &Tensor| {
                testing::assert_close(got, expected, tolerance, &format!("{dtype:?}"));
            };
            for (bias, residual) in [(None, None), (Some(&weight), Some(&delta))] {
                let norm = (&weight, &weight);
                let (plain_sum, plain_normed) =
                    ops::add_layer_norm(&x, (bias, residual), norm, 1e-6).unwrap();
                let (own_bias, own_residual, weight) = (bias.map(there), residual.map(there), there(&weight));
                let added = (own_bias.as_ref(), own_residual.as_ref());
                let (sum, normed) =
                    add_layer_norm(&there(&x), added, (&weight, &weight), 1e-6).unwrap().unwrap();
                close(&sum, &plain_sum);
                close(&normed, &plain_normed);
            }
            let (sum, normed) =
                add_rms_norm(&there(&x), &there(&delta), &there(&weight), 1e-6).unwrap().unwrap();
            let (plain_sum, plain_normed) = ops::add_rms_norm(&x, &delta, &weight, 1e-6).unwrap();
            close(&sum, &plain_sum);
            close(&normed, &plain_normed);
            close(&silu_mul(&there(&x)).unwrap().unwrap(), &ops::silu_mul(&x).unwrap());
            let ids = Tensor::new(&[4u32, 0, 0, 3], &Device::Cpu).unwrap();
            let gathered = gather_rows(&there(&x), &ids.to_device(&gpu).unwrap()).unwrap().unwrap();
            close(&gathered, &ops::gather_rows(&x, &ids).unwrap());
            for (bias, residual, gelu) in [
                (Some(&weight), None, true),
                (Some(&weight), Some(&delta), false),
                (None, Some(&delta), false),
            ] {
                let (own_bias, own_residual) = (bias.map(there), residual.map(there));
                let finished = finish_rows(&there(&x), own_bias.as_ref(), own_residual.as_ref(), gelu);
                close(&finished.unwrap().unwrap(), &ops::finish_rows(&x, bias, residual, gelu).unwrap());
            }
        }
    }
}
