// Several small operations as one launch each. Compiled by NVRTC when they are first needed; no header is included, so that
// a machine needs none: for one type at a time (ONLY: its bits, or 0 for bf16), since compiling takes seconds. Arithmetic is in f32; what is
// stored is rounded to the nearest, ties to even.

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

// Neighbours that are read and written at once: N is 1, or 16 bytes' worth where a row is a multiple of that.
template <typename T, unsigned N> struct alignas(N * sizeof(T)) some { T of[N]; };

// The sum over a block of its threads' numbers.
__device__ inline float block_sum(float x) {
  __shared__ float of_warp[32];
  for (int distance = 16; distance > 0; distance /= 2) x += __shfl_xor_sync(0xffffffffu, x, distance);
  if (threadIdx.x % 32 == 0) of_warp[threadIdx.x / 32] = x;
  __syncthreads();
  float total = 0;
  for (unsigned warp = 0; warp < blockDim.x / 32; warp++) total += of_warp[warp];
  return total;
}

// One block a row. `out` holds all sums `x + delta`, then all of their norms.
template <typename T, unsigned N>
__device__ void add_rms_norm(const T *x, const T *delta, const T *weight, T *out, unsigned rows, unsigned width, float eps) {
  using Some = some<T, N>;
  const unsigned long long start = (unsigned long long)blockIdx.x * width;
  T *sum = out + start, *normed = out + (unsigned long long)rows * width + start;
  float squares = 0;
  for (unsigned i = threadIdx.x * N; i < width; i += blockDim.x * N) {
    const Some a = *(const Some *)(x + start + i), b = *(const Some *)(delta + start + i);
    Some y;
#pragma unroll
    for (unsigned j = 0; j < N; j++) {
      narrow(widen(a.of[j]) + widen(b.of[j]), y.of[j]);
      const float rounded = widen(y.of[j]);
      squares += rounded * rounded;
    }
    *(Some *)(sum + i) = y;
  }
  const float scale = 1.0f / sqrtf(block_sum(squares) / width + eps);
  for (unsigned i = threadIdx.x * N; i < width; i += blockDim.x * N) {
    const Some a = *(const Some *)(sum + i), w = *(const Some *)(weight + i);
    Some y;
#pragma unroll
    for (unsigned j = 0; j < N; j++) narrow(widen(a.of[j]) * scale * widen(w.of[j]), y.of[j]);
    *(Some *)(normed + i) = y;
  }
}

// One warp a row. Norms `x` [rows, width], or x + bias + residual where there are such, which then is kept in `sum`.
template <typename T, unsigned N>
__device__ void layer_norm(const T *x, const T *bias, const T *residual, T *sum, const T *weight, const T *shift, T *out,
                           unsigned rows, unsigned width, float eps) {
  using Some = some<T, N>;
  const unsigned row = blockIdx.x * (blockDim.x / 32) + threadIdx.x / 32, lane = threadIdx.x % 32;
  if (row >= rows) return;
  const unsigned long long start = (unsigned long long)row * width;
  // The first pieces of a row stay in registers; what is beyond is read anew.
  constexpr unsigned KEPT = N == 1 ? 1 : 5;
  Some kept[KEPT];
  const auto all_warps = [](float y) {
    for (int distance = 16; distance > 0; distance /= 2) y += __shfl_xor_sync(0xffffffffu, y, distance);
    return y;
  };
  const auto for_all = [&](auto look) {
#pragma unroll
    for (unsigned piece = 0; piece < KEPT; piece++)
      if ((piece * 32 + lane) * N < width) look((piece * 32 + lane) * N, kept[piece]);
    for (unsigned i = (KEPT * 32 + lane) * N; i < width; i += 32 * N) {
      Some y = *(const Some *)((sum ? sum : x) + start + i);
      look(i, y);
    }
  };
  float total = 0;
  const auto take = [&](unsigned i, Some &y) {
    y = *(const Some *)(x + start + i);
    if (sum) {
      Some b, r;
      if (bias) b = *(const Some *)(bias + i);
      if (residual) r = *(const Some *)(residual + start + i);
#pragma unroll
      for (unsigned j = 0; j < N; j++) {
        float z = widen(y.of[j]);
        if (bias) z += widen(b.of[j]);
        if (residual) z += widen(r.of[j]);
        narrow(z, y.of[j]);
      }
      *(Some *)(sum + start + i) = y;
    }
#pragma unroll
    for (unsigned j = 0; j < N; j++) total += widen(y.of[j]);
  };
#pragma unroll
  for (unsigned piece = 0; piece < KEPT; piece++)
    if ((piece * 32 + lane) * N < width) take((piece * 32 + lane) * N, kept[piece]);
  for (unsigned i = (KEPT * 32 + lane) * N; i < width; i += 32 * N) {
    Some y;
    take(i, y);
  }
  const float mean = all_warps(total) / width;
  float squares = 0;
  for_all([&](unsigned, Some &y) {
#pragma unroll
    for (unsigned j = 0; j < N; j++) {
      const float off = widen(y.of[j]) - mean;
      squares += off * off;
    }
  });
  const float scale = 1.0f / sqrtf(all_warps(squares) / width + eps);
  for_all([&](unsigned i, Some &y) {
    const Some w = *(const Some *)(weight + i), b = *(const Some *)(shift + i);
    Some z;
#pragma unroll
    for (unsigned j = 0; j < N; j++) narrow((widen(y.of[j]) - mean) * scale * widen(w.of[j]) + widen(b.of[j]), z.of[j]);
    *(Some *)(out + start + i) = z;
  });
}

// N elements of `out` [rows, width] a thread; `x` [rows, 2 width] holds gates, then ups.
template <typename T, unsigned N>
__device__ void silu_mul(const T *x, T *out, unsigned rows, unsigned width) {
  using Some = some<T, N>;
  const unsigned long long i = ((unsigned long long)blockIdx.x * blockDim.x + threadIdx.x) * N;
  if (i >= (unsigned long long)rows * width) return;
  const unsigned long long row = i / width, column = i % width;
  const Some gates = *(const Some *)(x + 2 * row * width + column), ups = *(const Some *)(x + (2 * row + 1) * width + column);
  Some y;
#pragma unroll
  for (unsigned j = 0; j < N; j++) {
    const float gate = widen(gates.of[j]);
    narrow(__fdividef(gate, 1.0f + __expf(-gate)) * widen(ups.of[j]), y.of[j]);
  }
  *(Some *)(out + i) = y;
}

// What a layer does to what it gave, `x` [rows, width]: adds `bias` [width] where there is one, then `residual` [rows, width] where
// there is one, or takes GELU by tanh where `gelu` is not 0. N elements a thread.
template <typename T, unsigned N>
__device__ void finish_rows(const T *x, const T *bias, const T *residual, T *out, unsigned rows, unsigned width, unsigned gelu) {
  using Some = some<T, N>;
  const unsigned long long i = ((unsigned long long)blockIdx.x * blockDim.x + threadIdx.x) * N;
  if (i >= (unsigned long long)rows * width) return;
  const Some a = *(const Some *)(x + i);
  Some b, r, y;
  if (bias) b = *(const Some *)(bias + i % width);
  if (residual) r = *(const Some *)(residual + i);
#pragma unroll
  for (unsigned j = 0; j < N; j++) {
    float z = widen(a.of[j]);
    if (bias) z += widen(b.of[j]);
    if (residual) z += widen(r.of[j]);
    if (gelu) z = __fdividef(z, 1.0f + __expf(-1.5957691216057308f * (z + 0.044715f * z * z * z)));
    narrow(z, y.of[j]);
  }
  *(Some *)(out + i) = y;
}

// One block a row of `out` [rows, width]: the row of `table` that `ids` names.
template <typename T>
__device__ void gather_rows(const T *table, const unsigned *ids, T *out, unsigned width) {
  const T *from = table + (unsigned long long)ids[blockIdx.x] * width;
  T *to = out + (unsigned long long)blockIdx.x * width;
  for (unsigned i = threadIdx.x; i < width; i += blockDim.x) to[i] = from[i];
}

// One block a row. Adds `bias` to `qkv` [rows, heads + 2 kv_heads, dim] where there is one, and turns queries and keys by the row's
// position in `cos` and `sin` [positions, dim / 2], element i with element i + dim / 2, into `out` of the same shape. Puts the turned keys
// into `keys` [blocks, kv_heads, dim / x, block_size, x], x elements being 16 bytes, and the values into `values` [blocks, kv_heads,
// dim, block_size], at the row's slot; a negative slot is none.
template <typename T>
__device__ void rope_and_cache(const T *qkv, const T *bias, const T *cos, const T *sin, const unsigned *positions,
                               const long long *slots, T *out, T *keys, T *values, unsigned heads, unsigned kv_heads,
                               unsigned dim, unsigned block_size) {
  const unsigned half = dim / 2, turning = heads + kv_heads, x = 16 / sizeof(T);
  const unsigned long long row = blockIdx.x, turn = (unsigned long long)positions[row] * half;
  const T *from = qkv + row * (turning + kv_heads) * dim;
  T *to = out + row * (turning + kv_heads) * dim;
  const long long slot = slots[row];
  const unsigned long long block = slot < 0 ? 0 : slot / block_size, place = slot < 0 ? 0 : slot % block_size;
  for (unsigned i = threadIdx.x; i < turning * half; i += blockDim.x) {
    const unsigned head = i / half, low = i % half, high = low + half;
    float a = widen(from[head * dim + low]), b = widen(from[head * dim + high]);
    if (bias) a += widen(bias[head * dim + low]), b += widen(bias[head * dim + high]);
    const float c = widen(cos[turn + low]), s = widen(sin[turn + low]);
    T turned_low, turned_high;
    narrow(a * c - b * s, turned_low);
    narrow(b * c + a * s, turned_high);
    to[head * dim + low] = turned_low;
    to[head * dim + high] = turned_high;
    if (head < heads || slot < 0) continue;
    T *own = keys + (block * kv_heads + head - heads) * dim * block_size;
    own[((unsigned long long)(low / x) * block_size + place) * x + low % x] = turned_low;
    own[((unsigned long long)(high / x) * block_size + place) * x + high % x] = turned_high;
  }
  for (unsigned i = threadIdx.x; i < kv_heads * dim; i += blockDim.x) {
    const unsigned at = turning * dim + i;
    float value = widen(from[at]);
    if (bias) value += widen(bias[at]);
    narrow(value, to[at]);
    if (slot >= 0) values[(block * kv_heads * dim + i) * block_size + place] = to[at];
  }
}

// Blocks of 32 weights as ggml has them: a scale, and a code each in 8 bits, or in 4: elements 0 to 15 in the low halves, the
// others in the high ones. Aligned to 2 bytes only.
struct q8 { static constexpr unsigned BLOCKS = 1; f16 scale; unsigned short codes[16]; };
struct q4 { static constexpr unsigned BLOCKS = 1; f16 scale; unsigned short codes[8]; };
// Eight of them together, ggml's Q4_K: scales and least weights in 6 bits each, in units of one for all; codes of pairs of blocks, the first
// one's in the low halves.
struct __align__(16) q4k { static constexpr unsigned BLOCKS = 8; f16 scale, least; unsigned char scales[12]; uint2 codes[16]; };

// Eight weights of a row's block, `part` 0 to 3 of it, in fours that begin at the elements `low` and `high`.
__device__ inline void unpack(const q8 *row, unsigned number, unsigned part, float *weights, unsigned &low, unsigned &high) {
  const q8 &block = row[number];
  const float scale = widen(block.scale);
  for (unsigned i = 0; i < 4; i++) {
    const unsigned short two = block.codes[4 * part + i];
    weights[2 * i] = scale * (signed char)(two & 0xff);
    weights[2 * i + 1] = scale * (signed char)(two >> 8);
  }
  low = 8 * part, high = low + 4;
}

__device__ inline void unpack(const q4 *row, unsigned number, unsigned part, float *weights, unsigned &low, unsigned &high) {
  const q4 &block = row[number];
  const float scale = widen(block.scale);
  for (unsigned i = 0; i < 4; i++) {
    const unsigned byte = block.codes[2 * part + i / 2] >> (i % 2 * 8) & 0xff;
    weights[i] = scale * ((int)(byte & 15) - 8);
    weights[4 + i] = scale * ((int)(byte >> 4) - 8);
  }
  low = 4 * part, high = low + 16;
}

__device__ inline void unpack(const q4k *row, unsigned number, unsigned part, float *weights, unsigned &low, unsigned &high) {
  const q4k &all = row[number / 8];
  const unsigned own = number % 8;
  const unsigned char *scales = all.scales;
  // Of the last four the upper two bits are those of the first four's bytes.
  const unsigned factor = own < 4 ? scales[own] & 63 : (scales[own + 4] & 15) | (scales[own - 4] >> 6) << 4;
  const unsigned shift = own < 4 ? scales[own + 4] & 63 : scales[own + 4] >> 4 | (scales[own] >> 6) << 4;
  const float scale = widen(all.scale) * factor, least = widen(all.least) * shift;
  const uint2 codes = all.codes[own / 2 * 4 + part];
  for (unsigned i = 0; i < 8; i++) {
    const unsigned code = (i < 4 ? codes.x : codes.y) >> (i % 4 * 8 + own % 2 * 4) & 15;
    weights[i] = scale * code - least;
  }
  low = 8 * part, high = low + 4;
}

// One warp an output: `out` [rows, outputs] of `x` [rows, inputs] and `weight` [outputs, inputs / 32] blocks, as many together as they are; ROWS >= rows.
template <typename T, typename Block, unsigned ROWS>
__device__ void quant_rows(const Block *weight, const T *x, T *out, unsigned rows, unsigned outputs, unsigned inputs) {
  const unsigned output = blockIdx.x * (blockDim.x / 32) + threadIdx.x / 32, lane = threadIdx.x % 32, blocks = inputs / 32;
  if (output >= outputs) return;
  weight += (unsigned long long)output * (blocks / Block::BLOCKS);
  float sums[ROWS];
#pragma unroll
  for (unsigned row = 0; row < ROWS; row++) sums[row] = 0;
#pragma unroll 4
  for (unsigned block = lane / 4; block < blocks; block += 8) {
    float weights[8];
    unsigned low, high;
    unpack(weight, block, lane % 4, weights, low, high);
#pragma unroll
    for (unsigned row = 0; row < ROWS; row++) {
      if (row >= rows) break;
      const T *own = x + (unsigned long long)row * inputs + block * 32;
      const some<T, 4> a = *(const some<T, 4> *)(own + low), b = *(const some<T, 4> *)(own + high);
#pragma unroll
      for (unsigned i = 0; i < 4; i++) sums[row] += weights[i] * widen(a.of[i]) + weights[4 + i] * widen(b.of[i]);
    }
  }
#pragma unroll
  for (unsigned row = 0; row < ROWS; row++) {
    for (int distance = 16; distance > 0; distance /= 2) sums[row] += __shfl_xor_sync(0xffffffffu, sums[row], distance);
    if (lane == 0 && row < rows) narrow(sums[row], out[(unsigned long long)row * outputs + output]);
  }
}

#define FOR_ROWS(T, name, block, count)                                                                                \
  extern "C" __global__ void quant_rows_##block##_##count##_##name(const block *weight, const T *x, T *out,             \
                                                                   unsigned rows, unsigned outputs, unsigned inputs) { \
    quant_rows<T, block, count>(weight, x, out, rows, outputs, inputs);                                                \
  }

#define FOR_BLOCK(T, name, block) FOR_ROWS(T, name, block, 1) FOR_ROWS(T, name, block, 2) FOR_ROWS(T, name, block, 4) FOR_ROWS(T, name, block, 8)

#define FOR_WIDTH(T, name, N)                                                                                          \
  extern "C" __global__ void add_rms_norm_##name(const T *x, const T *delta, const T *weight, T *out, unsigned rows,   \
                                                 unsigned width, float eps) {                                          \
    add_rms_norm<T, N>(x, delta, weight, out, rows, width, eps);                                                       \
  }                                                                                                                    \
  extern "C" __global__ void layer_norm_##name(const T *x, const T *bias, const T *residual, T *sum, const T *weight,   \
                                               const T *shift, T *out, unsigned rows, unsigned width, float eps) {      \
    layer_norm<T, N>(x, bias, residual, sum, weight, shift, out, rows, width, eps);                                    \
  }                                                                                                                    \
  extern "C" __global__ void silu_mul_##name(const T *x, T *out, unsigned rows, unsigned width) {                      \
    silu_mul<T, N>(x, out, rows, width);                                                                               \
  }                                                                                                                    \
  extern "C" __global__ void finish_rows_##name(const T *x, const T *bias, const T *residual, T *out, unsigned rows,   \
                                                unsigned width, unsigned gelu) {                                       \
    finish_rows<T, N>(x, bias, residual, out, rows, width, gelu);                                                      \
  }

#define FOR(T, name)                                                                                                  \
  FOR_WIDTH(T, name, 1)                                                                                                \
  FOR_WIDTH(T, name##_wide, 16 / sizeof(T))                                                                            \
  extern "C" __global__ void gather_rows_##name(const T *table, const unsigned *ids, T *out, unsigned width) {          \
    gather_rows(table, ids, out, width);                                                                               \
  }                                                                                                                    \
  extern "C" __global__ void rope_and_cache_##name(                                                                    \
      const T *qkv, const T *bias, const T *cos, const T *sin, const unsigned *positions, const long long *slots,       \
      T *out, T *keys, T *values, unsigned heads, unsigned kv_heads, unsigned dim, unsigned block_size) {               \
    rope_and_cache(qkv, bias, cos, sin, positions, slots, out, keys, values, heads, kv_heads, dim, block_size);         \
  }                                                                                                                    \
  FOR_BLOCK(T, name, q8)                                                                                               \
  FOR_BLOCK(T, name, q4)                                                                                               \
  FOR_BLOCK(T, name, q4k)

#ifndef ONLY
FOR(float, f32)
FOR(f16, f16)
FOR(bf16, bf16)
#elif ONLY == 32
FOR(float, f32)
#elif ONLY == 16
FOR(f16, f16)
#else
FOR(bf16, bf16)
#endif
