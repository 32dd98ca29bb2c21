//! The tile unit of newer Intel processors (AMX): whether this process may use it, and the shapes of its tiles.
//!
//! Used by the products (`dot/amx.rs`) and by attention. Rust has no stable intrinsics for it, so the kernels name its
//! instructions in assembly. A tile is a register of up to 16 rows of 64 bytes.

use std::sync::OnceLock;
#[cfg(target_arch = "x86_64")]
use std::{arch::asm, marker::PhantomData};

/// Rows of a tile.
pub(super) const ROWS: usize = 16;
/// Bytes of a tile's row.
pub(super) const ROW_BYTES: usize = 64;

/// Whether this processor has the unit, with products of 8-bit integers and of bf16, and the system lends it.
pub fn is_available() -> bool {
    static AVAILABLE: OnceLock<bool> = OnceLock::new();
    *AVAILABLE.get_or_init(|| has_instructions() && is_permitted())
}

#[cfg(not(target_arch = "x86_64"))]
fn has_instructions() -> bool {
    false
}

#[cfg(target_arch = "x86_64")]
fn has_instructions() -> bool {
    // Intel's manual, volume 2, CPUID leaf 7: bits 22 (bf16), 24 (tiles) and 25 (8-bit integers) of EDX.
    const BITS: u32 = 1 << 22 | 1 << 24 | 1 << 25;
    // Every processor with tiles has these as well; the kernels use them around the tiles, and for few rows.
    is_x86_feature_detected!("avx512f")
        && is_x86_feature_detected!("avx512bw")
        && is_x86_feature_detected!("avx512vnni")
        && is_x86_feature_detected!("avx512bf16")
        && std::arch::x86_64::__cpuid_count(7, 0).edx & BITS == BITS
}

/// Linux lends the unit to processes that ask for it, for its registers make the frame of a signal 8 KB larger. It refuses
/// where an alternate signal stack is too small for that.
#[cfg(all(target_arch = "x86_64", target_os = "linux"))]
fn is_permitted() -> bool {
    const ARCH_REQ_XCOMP_PERM: libc::c_long = 0x1023;
    const XFEATURE_XTILEDATA: libc::c_long = 18;
    // SAFETY: this call reads and writes no memory of ours.
    unsafe { libc::syscall(libc::SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA) == 0 }
}

#[cfg(not(all(target_arch = "x86_64", target_os = "linux")))]
fn is_permitted() -> bool {
    false
}

/// The tiles of this thread, until they are dropped. What a kernel leaves in them, it finds there later: neither the
/// compiler nor the standard library uses any.
#[cfg(target_arch = "x86_64")]
pub(super) struct Tiles(PhantomData<*const ()>);

#[cfg(target_arch = "x86_64")]
impl Tiles {
    /// Rows of tiles 0 to 7, each of 64 bytes; all are zeroed.
    ///
    /// # Safety
    /// The unit must be [available](is_available), this thread must have no other tiles, and no row count be 0.
    pub unsafe fn new(rows: [u8; 8]) -> Self {
        #[repr(C, align(64))]
        struct Shapes {
            palette: u8,
            start_row: u8,
            reserved: [u8; 14],
            row_bytes: [u16; 16],
            rows: [u8; 16],
        }
        let mut shapes =
            Shapes { palette: 1, start_row: 0, reserved: [0; 14], row_bytes: [0; 16], rows: [0; 16] };
        shapes.rows[..8].copy_from_slice(&rows);
        shapes.row_bytes[..8].fill(ROW_BYTES as u16);
        // SAFETY: the unit is there by the caller's promise; the instruction reads 64 bytes.
        unsafe {
            asm!("ldtilecfg [{}]", in(reg) &raw const shapes, options(nostack, preserves_flags, readonly))
        };
        Tiles(PhantomData)
    }
}

#[cfg(target_arch = "x86_64")]
impl Drop for Tiles {
    fn drop(&mut self) {
        // SAFETY: tiles exist, so the unit does.
        unsafe { asm!("tilerelease", options(nomem, nostack, preserves_flags)) };
    }
}
