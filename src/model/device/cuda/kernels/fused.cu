// Several small operations as one launch each. Compiled by NVRTC when they are first needed; no header is included, so that
// a machine needs none. Arithmetic is in f32; what is stored is rounded to the nearest, ties to even.

struct f16 { unsigned short bits; };
struct bf16 { unsigned short bits; };

__device__ inline float widen(float x) { return x; }
__device__ inline float widen(bf16 x) { return __uint_as_float((unsigned)x.bits << 16); }
__device__ inline float widen(f16 x) {
  float wide;
  asm("cvt.f32.f16 %0, %1;" : "=f"(wide) : "h"(x.bits));
  return wide;
}

__device__ inline void narrow(float x, float &out) { out = x; }
__device__ inline void narrow(float x, f16 &out) { asm("cvt.rn.f16.f32 %0, %1;" : "=h"(out.bits) : "f"(x)); }
__device__ inline void narrow(float x, bf16 &out) {
  unsigned bits = __float_as_uint(x);
  // A NaN must not become infinite by rounding.
  out.bits = x != x ? 0x7fc0 : (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
}

// One block a row. `out` holds all sums `x + delta`, then all of their norms.
template <typename T>
__device__ void add_rms_norm(const T *x, const T *delta, const T *weight, T *out, unsigned rows, unsigned width, float eps) {
  const unsigned long long start = (unsigned long long)blockIdx.x * width;
  T *sum = out + start, *normed = out + (unsigned long long)rows * width + start;
  float squares = 0;
  for (unsigned i = threadIdx.x; i < width; i += blockDim.x) {
    narrow(widen(x[start + i]) + widen(delta[start + i]), sum[i]);
    const float rounded = widen(sum[i]);
    squares += rounded * rounded;
  }
  for (int distance = 16; distance > 0; distance /= 2) squares += __shfl_xor_sync(0xffffffffu, squares, distance);
  __shared__ float of_warp[32];
  if (threadIdx.x % 32 == 0) of_warp[threadIdx.x / 32] = squares;
  __syncthreads();
  float total = 0;
  for (unsigned warp = 0; warp < blockDim.x / 32; warp++) total += of_warp[warp];
  const float scale = 1.0f / sqrtf(total / width + eps);
  for (unsigned i = threadIdx.x; i < width; i += blockDim.x) narrow(widen(sum[i]) * scale * widen(weight[i]), normed[i]);
}

// One thread an element of `out` [rows, width]; `x` [rows, 2 width] holds gates, then ups.
template <typename T>
__device__ void silu_mul(const T *x, T *out, unsigned rows, unsigned width) {
  const unsigned long long i = (unsigned long long)blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= (unsigned long long)rows * width) return;
  const unsigned long long row = i / width, column = i % width;
  const float gate = widen(x[2 * row * width + column]), up = widen(x[(2 * row + 1) * width + column]);
  narrow(gate / (1.0f + expf(-gate)) * up, out[i]);
}

#define FOR(T, name)                                                                                                  \
  extern "C" __global__ void add_rms_norm_##name(const T *x, const T *delta, const T *weight, T *out, unsigned rows,   \
                                                 unsigned width, float eps) {                                          \
    add_rms_norm(x, delta, weight, out, rows, width, eps);                                                             \
  }                                                                                                                    \
  extern "C" __global__ void silu_mul_##name(const T *x, T *out, unsigned rows, unsigned width) {                      \
    silu_mul(x, out, rows, width);                                                                                     \
  }

FOR(float, f32)
FOR(f16, f16)
FOR(bf16, bf16)
