//! cuBLASLt: products that are finished before they are written, as far as they are called: what is multiplied first is turned, and what is
//! added lies as the result does.
#![allow(non_snake_case, clippy::missing_safety_doc, clippy::too_many_arguments)]

use std::{
    ffi::{c_int, c_uint, c_void},
    sync::Arc,
};

use super::{
    blas::{Kind, Matrix, NOT_SUPPORTED, SUCCESS, dot},
    block::read,
    device::device,
    graph::{Node, State},
};

/// `cublasStatus_t`
const INVALID_VALUE: c_int = 7;

#[derive(Debug, Clone, Copy)]
pub struct Layout {
    kind: c_uint,
    rows: u64,
    columns: u64,
    stride: i64,
}

#[derive(Debug, Clone, Copy, Default)]
pub struct Description {
    is_first_turned: bool,
    epilogue: u32,
    bias: u64,
}

/// What was promised of the places of a product's matrices.
#[derive(Debug, Clone, Copy)]
pub struct Wish {
    alignment: [u32; 4],
}

/// `cublasLtMatmulHeuristicResult_t`
#[repr(C)]
pub struct Found {
    /// Here the alignments that were promised.
    algorithm: [u32; 16],
    workspace: usize,
    state: c_int,
    waves: f32,
    reserved: [c_int; 4],
}

unsafe fn create<T>(place: *mut *mut T, value: T) -> c_int {
    // SAFETY: the caller has a place for it.
    unsafe { place.write(Box::into_raw(Box::new(value))) };
    SUCCESS
}

unsafe fn destroy<T>(value: *mut T) -> c_int {
    // SAFETY: it is from `create`.
    drop(unsafe { Box::from_raw(value) });
    SUCCESS
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cublasLtMatrixLayoutCreate(
    layout: *mut *mut Layout,
    kind: c_uint,
    rows: u64,
    columns: u64,
    stride: i64,
) -> c_int {
    // SAFETY: the caller's.
    unsafe { create(layout, Layout { kind, rows, columns, stride }) }
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cublasLtMatrixLayoutDestroy(layout: *mut Layout) -> c_int {
    // SAFETY: the caller's.
    unsafe { destroy(layout) }
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cublasLtMatmulDescCreate(
    description: *mut *mut Description,
    sums: c_uint,
    scale: c_uint,
) -> c_int {
    // CUBLAS_COMPUTE_32F, CUDA_R_32F
    if (sums, scale) != (68, 0) {
        return NOT_SUPPORTED;
    }
    // SAFETY: the caller's.
    unsafe { create(description, Description::default()) }
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cublasLtMatmulDescDestroy(description: *mut Description) -> c_int {
    // SAFETY: the caller's.
    unsafe { destroy(description) }
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cublasLtMatmulDescSetAttribute(
    description: *mut Description,
    attribute: c_uint,
    value: *const c_void,
    bytes: usize,
) -> c_int {
    // SAFETY: the description is ours, and the value has so many bytes.
    unsafe {
        let description = &mut *description;
        match (attribute, bytes) {
            (3, 4) => description.is_first_turned = value.cast::<i32>().read() == 1,
            (7, 4) => description.epilogue = value.cast::<u32>().read(),
            (8, 8) => description.bias = value.cast::<u64>().read(),
            _ => return INVALID_VALUE,
        }
    }
    SUCCESS
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cublasLtMatmulPreferenceCreate(wish: *mut *mut Wish) -> c_int {
    // SAFETY: the caller's.
    unsafe { create(wish, Wish { alignment: [256; 4] }) }
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cublasLtMatmulPreferenceDestroy(wish: *mut Wish) -> c_int {
    // SAFETY: the caller's.
    unsafe { destroy(wish) }
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cublasLtMatmulPreferenceSetAttribute(
    wish: *mut Wish,
    attribute: c_uint,
    value: *const c_void,
    bytes: usize,
) -> c_int {
    match (attribute, bytes) {
        // Bytes of the workspace.
        (1, 8) => SUCCESS,
        (5..=8, 4) => {
            // SAFETY: the wish is ours, and the value has so many bytes.
            unsafe { (*wish).alignment[attribute as usize - 5] = value.cast::<u32>().read() };
            SUCCESS
        }
        _ => INVALID_VALUE,
    }
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cublasLtMatmulAlgoGetHeuristic(
    _handle: *const c_void,
    _description: *const Description,
    _a: *const Layout,
    _b: *const Layout,
    _c: *const Layout,
    _d: *const Layout,
    wish: *const Wish,
    wanted: c_int,
    found: *mut Found,
    count: *mut c_int,
) -> c_int {
    if wanted < 1 {
        return INVALID_VALUE;
    }
    let mut algorithm = [0; 16];
    // SAFETY: the wish is ours; the caller has a place for what is found.
    unsafe {
        algorithm[..4].copy_from_slice(&(*wish).alignment);
        found.write(Found { algorithm, workspace: 0, state: SUCCESS, waves: 1.0, reserved: [0; 4] });
        count.write(1);
    }
    SUCCESS
}

/// `CUBLASLT_EPILOGUE_…`
mod epilogue {
    pub const DEFAULT: u32 = 1;
    pub const BIAS: u32 = 4;
    pub const GELU: u32 = 32;
    pub const GELU_BIAS: u32 = 36;
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cublasLtMatmul(
    _handle: *const c_void,
    description: *const Description,
    alpha: *const f32,
    a: u64,
    of_a: *const Layout,
    b: u64,
    of_b: *const Layout,
    beta: *const f32,
    c: u64,
    of_c: *const Layout,
    d: u64,
    of_d: *const Layout,
    algorithm: *const [u32; 16],
    workspace: u64,
    workspace_bytes: usize,
    stream: usize,
) -> c_int {
    // SAFETY: all of them are ours.
    let (description, layouts, alpha, beta, promised) =
        unsafe { (*description, [of_a, of_b, of_c, of_d].map(|layout| *layout), *alpha, *beta, *algorithm) };
    let Description { is_first_turned, epilogue, bias } = description;
    let [of_a, of_b, of_c, of_d] = layouts;
    let (inputs, outputs, rows) = (of_a.rows, of_a.columns, of_b.columns);
    let fits = is_first_turned
        && of_b.rows == inputs
        && [of_c, of_d].iter().all(|layout| (layout.rows, layout.columns) == (outputs, rows))
        && layouts.iter().all(|layout| layout.kind == of_a.kind && layout.stride >= layout.rows as i64);
    let is_known =
        [epilogue::DEFAULT, epilogue::BIAS, epilogue::GELU, epilogue::GELU_BIAS].contains(&epilogue);
    let has_bias = [epilogue::BIAS, epilogue::GELU_BIAS].contains(&epilogue);
    let (Some(kind), true, true, true) = (Kind::of(of_a.kind), fits, is_known, !has_bias || bias != 0) else {
        return INVALID_VALUE;
    };
    let places = [a, b, c, d];
    if let Some(at) = places.iter().zip(promised).find(|(at, bytes)| !at.is_multiple_of(u64::from(*bytes))) {
        eprintln!("gpu: a matrix at {:#x}, of which a multiple of {} was promised", at.0, at.1);
        return INVALID_VALUE;
    }
    let [inputs, outputs, rows] = [inputs, outputs, rows].map(|size| size as usize);
    let matrix = |at, layout: Layout| Matrix { at, kind, stride: layout.stride as usize, of_batch: 0 };
    let (a, b, c, d) = (matrix(a, of_a), matrix(b, of_b), matrix(c, of_c), matrix(d, of_d));
    let work = move |state: &mut State| {
        state.unfinished.begin(false);
        state.memory.check(workspace, workspace_bytes)?;
        let left = a.of(0, inputs, outputs, state)?.load(inputs, outputs, true);
        let right = b.of(0, inputs, rows, state)?.load(inputs, rows, true);
        let added = c.of(0, outputs, rows, state)?;
        let out = d.of(0, outputs, rows, state)?;
        if has_bias {
            state.memory.check(bias, outputs * kind.bytes())?;
        }
        let wide = |at: *const u8| {
            // SAFETY: all of it is there, as was looked at.
            kind.wide(unsafe { read(at, kind.bytes()) })
        };
        out.fill([outputs, rows], |output, row| {
            let mut sum = alpha * dot(&left[output * inputs..][..inputs], &right[row * inputs..][..inputs]);
            if beta != 0.0 {
                sum += beta * wide(added.place(output, row));
            }
            if has_bias {
                sum += wide((bias as usize + output * kind.bytes()) as *const u8);
            }
            if [epilogue::GELU, epilogue::GELU_BIAS].contains(&epilogue) {
                sum *= 0.5 * (1.0 + (0.797_884_6 * (sum + 0.044_715 * sum * sum * sum)).tanh());
            }
            sum
        });
        Ok(())
    };
    device().enqueue(stream, Node::Kernel(Arc::new(work)))
}
