// Products of eight rows at most, which are bound by reading the weights: each is read once, by tensor cores whose columns are the rows.
// What stands before a product in a decoder's layer, the residual sum and its norm, and what stands after it, SwiGLU, is computed with it.

struct Product {
  const u16 *weight;  // [outputs, inputs]; gates, then ups, where gated
  const u16 *x;       // [rows, inputs]
  u16 *out;           // [rows, outputs]; half as many where gated
  // Where normed, x + delta is taken, unless delta is null, kept in `sum` [rows, inputs], and normed with `norm` [inputs].
  const u16 *delta, *norm;
  u16 *sum;
  u32 rows, outputs, inputs;
  float eps;
};

constexpr u32 CHUNK = 32, AHEAD = 6, MAX_ROWS = 8;

// A block for every so many tiles of 16 outputs, or of 8 pairs of them where gated; its warps take turns at two `CHUNK`s of inputs and
// add up in the end. A lane reads 16 bytes of two outputs' weights: eight neighbours, that stand for pairs the tensor cores would
// have far apart. The rows do so, too. `AHEAD` chunks are always on their way, the next tile's after the last of one.
template <typename T, u32 WARPS, bool IS_NORMED, bool IS_GATED>
__device__ void product(const Product &p) {
  constexpr u32 TILE = IS_GATED ? 8 : 16;
  extern __shared__ __align__(16) u16 normed[];  // [rows, inputs + 8]
  __shared__ float of_warp[WARPS][MAX_ROWS][17], squares[MAX_ROWS][WARPS];
  const T kind{};
  const u32 warp = threadIdx.x / 32, lane = threadIdx.x % 32, row = lane / 4, column = lane % 4;
  const u32 inputs = p.inputs, rows = p.rows, chunks = inputs / CHUNK, rounds = (chunks + AHEAD * WARPS - 1) / (AHEAD * WARPS);
  const u32 outputs = IS_GATED ? p.outputs / 2 : p.outputs, tiles = outputs / TILE;
  let_next_begin();

  // The second output of a lane: eight further on, or the one the first is the gate of.
  const u64 second = (u64)(IS_GATED ? outputs : 8) * inputs;
  const u16 *weights = nullptr;
  bool is_there = true;
  const auto look_at = [&](u32 tile) {
    is_there = tile < tiles;
    weights = p.weight + (u64)(tile * TILE + row) * inputs + column * 8;
  };
  const auto chunk_of = [&](u32 i) { return i / 2 * 2 * WARPS + warp * 2 + i % 2; };
  uint4 ahead[AHEAD][2];
  const auto fetch = [&](u32 slot, u32 i) {
    const u32 chunk = chunk_of(i);
    const bool is_weight = is_there && chunk < chunks;
#pragma unroll
    for (u32 half = 0; half < 2; half++)
      ahead[slot][half] = is_weight ? __ldcs((const uint4 *)(weights + half * second + chunk * CHUNK)) : make_uint4(0, 0, 0, 0);
  };
  look_at(blockIdx.x);
#pragma unroll
  for (u32 i = 0; i < AHEAD; i++) fetch(i, i);
  await_previous();

  const u16 *x = p.x;
  u32 stride = inputs;
  if (IS_NORMED) {
    // As many warps a row as there are; eight neighbours a lane.
    stride = inputs + 8;
    const u32 helpers = WARPS / (rows > 4 ? 8 : rows > 2 ? 4 : rows), own = warp / helpers, first = (warp % helpers * 32 + lane) * 8;
    const bool is_row = own < rows;
    u32 *mine = (u32 *)(normed + own * stride);
    float sum = 0;
    for (u32 i = first; is_row && i < inputs; i += helpers * 256) {
      const uint4 both = *(const uint4 *)(p.x + (u64)own * inputs + i);
      u32 pairs[4] = {both.x, both.y, both.z, both.w};
      if (p.delta) {
        const uint4 more = *(const uint4 *)(p.delta + (u64)own * inputs + i);
        const u32 others[4] = {more.x, more.y, more.z, more.w};
#pragma unroll
        for (u32 j = 0; j < 4; j++)
          pairs[j] = pack(kind, widen(kind, (u16)pairs[j]) + widen(kind, (u16)others[j]),
                          widen(kind, (u16)(pairs[j] >> 16)) + widen(kind, (u16)(others[j] >> 16)));
        if (blockIdx.x == 0) *(uint4 *)(p.sum + (u64)own * inputs + i) = make_uint4(pairs[0], pairs[1], pairs[2], pairs[3]);
      }
#pragma unroll
      for (u32 j = 0; j < 4; j++) {
        const float low = widen(kind, (u16)pairs[j]), high = widen(kind, (u16)(pairs[j] >> 16));
        sum += low * low + high * high;
      }
      *(uint4 *)(mine + i / 2) = make_uint4(pairs[0], pairs[1], pairs[2], pairs[3]);
    }
    for (u32 distance = 16; distance > 0; distance /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, distance);
    if (lane == 0 && is_row) squares[own][warp % helpers] = sum;
    __syncthreads();
    sum = 0;
    for (u32 other = 0; is_row && other < helpers; other++) sum += squares[own][other];
    const float scale = 1.0f / sqrtf(sum / inputs + p.eps);
    for (u32 i = first; is_row && i < inputs; i += helpers * 256) {
      const uint4 norms = *(const uint4 *)(p.norm + i);
      const u32 norm[4] = {norms.x, norms.y, norms.z, norms.w};
#pragma unroll
      for (u32 j = 0; j < 4; j++) {
        u32 &both = mine[i / 2 + j];
        both = pack(kind, widen(kind, (u16)both) * scale * widen(kind, (u16)norm[j]),
                    widen(kind, (u16)(both >> 16)) * scale * widen(kind, (u16)(norm[j] >> 16)));
      }
    }
    __syncthreads();
    x = normed;
  }

  x += (row < rows ? row : 0) * stride + column * 8;
  for (u32 tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
    float sums[4] = {};
    for (u32 round = 0; round < rounds; round++) {
      const bool is_last = round + 1 == rounds;
      if (is_last) look_at(tile + gridDim.x);
      const u32 next = is_last ? 0 : (round + 1) * AHEAD;
#pragma unroll
      for (u32 i = 0; i < AHEAD; i++) {
        const uint4 low = ahead[i][0], high = ahead[i][1];
        fetch(i, next + i);
        const u32 chunk = min(chunk_of(round * AHEAD + i), chunks - 1);  // past the last the weights are 0
        const uint4 b = row < rows ? *(const uint4 *)(x + chunk * CHUNK) : make_uint4(0, 0, 0, 0);
        const u32 even[4] = {low.x, high.x, low.y, high.y}, odd[4] = {low.z, high.z, low.w, high.w};
        multiply(kind, sums, even, b.x, b.y);
        multiply(kind, sums, odd, b.z, b.w);
      }
    }
#pragma unroll
    for (u32 i = 0; i < 4; i++) of_warp[warp][column * 2 + i % 2][row + i / 2 * 8] = sums[i];
    __syncthreads();
    for (u32 i = threadIdx.x; i < rows * TILE; i += WARPS * 32) {
      const u32 own = i / TILE, output = i % TILE;
      float y = 0, up = 0;
#pragma unroll
      for (u32 other = 0; other < WARPS; other++) {
        y += of_warp[other][own][output];
        if (IS_GATED) up += of_warp[other][own][output + 8];
      }
      if (IS_GATED) {
        // As they would be if they had been written.
        const float gate = widen(kind, narrow(kind, y));
        y = gate / (1.0f + expf(-gate)) * widen(kind, narrow(kind, up));
      }
      p.out[(u64)own * outputs + tile * TILE + output] = narrow(kind, y);
    }
    __syncthreads();
  }
}

#define FOR_PRODUCT(name, T, warps, is_normed, is_gated)                                                      \
  extern "C" __global__ void __launch_bounds__(warps * 32, 16 / warps) name##_##T(const Product p) {           \
    product<T, warps, is_normed, is_gated>(p);                                                                \
  }
#define FOR_PRODUCTS(T)                         \
  FOR_PRODUCT(product, T, 16, false, false)     \
  FOR_PRODUCT(normed_product, T, 8, true, false) \
  FOR_PRODUCT(normed_gated_product, T, 8, true, true)
#if !defined(ONLY) || ONLY == 16
FOR_PRODUCTS(f16)
#endif
#if !defined(ONLY) || ONLY == 0
FOR_PRODUCTS(bf16)
#endif

// One block a row of `out` [rows, width]: the row of `table` that `ids` names.
extern "C" __global__ void look_up(const uint4 *table, const u32 *ids, uint4 *out, u32 width) {
  let_next_begin();
  await_previous();
  for (u32 i = threadIdx.x; i < width; i += blockDim.x) out[(u64)blockIdx.x * width + i] = table[(u64)ids[blockIdx.x] * width + i];
}
