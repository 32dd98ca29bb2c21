//! A GPU that is played by the processor, so that what runs on one is tested where there is none.
//!
//! The library has the functions that the server calls of CUDA's driver ([`driver`]), of cuBLAS ([`blas`]) and cuBLASLt ([`lt`]), and is loaded in their
//! place (`scripts/test-cuda.sh`). Kernels come as PTX, as they come to the real driver: [`ptx`] reads them, [`block`] runs them, warp by
//! warp, 32 lanes at once. The numbers are a real card's but for the last bits; of its times nothing can be learnt here.
//!
//! In return it sees what a card keeps to itself, and fails the kernel with the line at fault:
//!
//! - an access to memory that is nobody's, was freed, or begins where it must not for its size ([`memory`]);
//! - two warps at the same byte of shared memory, one of them writing, with no barrier between ([`shared`]);
//! - a barrier, a shuffle or a product that some lanes of a warp do not reach;
//! - a kernel that begins before the one before it has ended, and until it waits reads what is still being written ([`early`]).
//!
//! Memory that nobody has written holds no number of any floating type; nor does the place to which an asynchronous copy goes, until that
//! was waited for, nor the host's memory that the device writes by itself ([`host`]). What compilers write that is not known here is an error when the kernel is asked for.
//!
//! From the environment it takes `GPU_MIB`, its memory; `GPU_COUNT`, how many there are; `GPU_CAPABILITY`, as in 90; `GPU_FAILS_AFTER`,
//! kernels until it is lost; `GPU_CANNOT_RECORD`, that recordings of its work fail; `GPU_TRACE`, a line a call; `GPU_COUNTS`, a line for
//! each kernel when the program ends.

mod blas;
mod block;
mod device;
mod driver;
mod early;
mod graph;
mod host;
mod lanes;
mod lt;
mod matrix;
mod memory;
mod ptx;
mod shared;
#[cfg(test)]
mod tests;
