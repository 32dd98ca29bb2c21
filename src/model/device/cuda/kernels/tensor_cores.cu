// What the kernels for tensor cores share: it is compiled before each of their files. For compute capability 8.0 and later; no header is
// included. Elements are f16 or bf16, sums f32.

typedef unsigned u32;
typedef unsigned long long u64;
typedef unsigned short u16;

struct f16 {};
struct bf16 {};

// c += a b for 16 rows, 8 columns and 16 products each, as the tensor cores have them spread over a warp.
__device__ inline void multiply(bf16, float *c, const u32 *a, u32 b0, u32 b1) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
               : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
__device__ inline void multiply(f16, float *c, const u32 *a, u32 b0, u32 b1) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
               : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// Two numbers rounded, the first in the lower half.
__device__ inline u32 pack(bf16, float low, float high) {
  u32 both;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low));
  return both;
}
__device__ inline u32 pack(f16, float low, float high) {
  u32 both;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low));
  return both;
}

__device__ inline u32 shared_address(const void *at) { return (u32)__cvta_generic_to_shared(at); }

// Four matrices of 8 x 8 elements; each lane names a row of one of them.
__device__ inline void load_matrices(u32 *out, const u16 *row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3]) : "r"(shared_address(row)) : "memory");
}
__device__ inline void load_matrices_transposed(u32 *out, const u16 *row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3]) : "r"(shared_address(row)) : "memory");
}

// Kernels of a recorded decode step begin before the one before them has ended, and do what does not depend on it; here they wait for it.
// Where the card or the launch does not know that, there is nothing to wait for.
__device__ inline void await_previous() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
// The next one may begin, as far as there is room.
__device__ inline void let_next_begin() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

__device__ inline float widen(bf16, u16 x) { return __uint_as_float((u32)x << 16); }
__device__ inline float widen(f16, u16 x) {
  float wide;
  asm("cvt.f32.f16 %0, %1;" : "=f"(wide) : "h"(x));
  return wide;
}
template <typename T>
__device__ inline u16 narrow(T kind, float x) { return (u16)pack(kind, x, 0.0f); }

