// Attention: no score is ever written to memory. The order of things is that of FlashAttention-2 (arXiv 2307.08691): keys and values
// come in tiles, and what was summed is scaled anew when a larger score appears.

// 16 bytes to shared memory while the threads go on; zeros where `is_there` is false.
__device__ inline void copy_async(u16 *to, const u16 *from, bool is_there) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(to)), "l"(from), "r"(is_there ? 16 : 0) : "memory");
}
__device__ inline void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }
__device__ inline void await_copies() { asm volatile("cp.async.wait_group 0;" ::: "memory"); }

// Largest or sum over the four lanes that share a row.
__device__ inline float row_max(float x) {
  x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 1));
  return fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 2));
}
__device__ inline float row_sum(float x) {
  x += __shfl_xor_sync(0xffffffffu, x, 1);
  return x + __shfl_xor_sync(0xffffffffu, x, 2);
}

// Elements from one batch, head and row to the next.
struct Strides { u32 batch, head, row; };
// `m` queries and `n` keys of `d` elements. `group` query heads share a KV head. `scale` is that of the scores, times log2(e). Where
// `causal`, the last query sees the last key.
struct Sizes { Strides q, k, v, out; u32 m, n, d, group, causal; float scale; };

constexpr u32 TILE = 64, WARPS = 4, NONE = 0xff800000;  // NONE: the bits of minus infinity

// One tile of rows, `TILE` x `d`, to shared memory; rows from `end` on are zeros.
template <u32 D>
__device__ inline void load_tile(u16 *tile, const u16 *from, u32 stride, u32 start, u32 end, u32 d) {
  const u32 pieces = d / 8;
  for (u32 i = threadIdx.x; i < TILE * pieces; i += WARPS * 32) {
    const u32 row = i / pieces, piece = i % pieces;
    const bool is_there = start + row < end;
    copy_async(tile + row * (D + 8) + piece * 8, from + (u64)(is_there ? start + row : 0) * stride + piece * 8, is_there);
  }
}

// A block for `TILE` x STACK queries of one head, a warp for 16 x STACK of them: what it loads of keys and values serves all of these. D is
// the next width there is for `d`.
template <typename T, u32 D, u32 STACK>
__device__ void attend(const u16 *q, const u16 *k, const u16 *v, u16 *out, const Sizes &sizes) {
  __shared__ __align__(16) u16 keys[TILE * (D + 8)], values[TILE * (D + 8)];
  const T kind{};
  const u32 warp = threadIdx.x / 32, lane = threadIdx.x % 32, head = blockIdx.y, kv_head = head / sizes.group;
  const u32 m = sizes.m, n = sizes.n, d = sizes.d, first = blockIdx.x * TILE * STACK;
  q += (u64)blockIdx.z * sizes.q.batch + (u64)head * sizes.q.head;
  k += (u64)blockIdx.z * sizes.k.batch + (u64)kv_head * sizes.k.head;
  v += (u64)blockIdx.z * sizes.v.batch + (u64)kv_head * sizes.v.head;
  out += (u64)blockIdx.z * sizes.out.batch + (u64)head * sizes.out.head;

  for (u32 i = threadIdx.x; i < TILE * (D - d); i += WARPS * 32) {
    const u32 at = i / (D - d) * (D + 8) + d + i % (D - d);
    keys[at] = values[at] = 0;
  }
  // The queries pass through the keys' place.
  u32 queries[STACK][D / 16][4];
#pragma unroll
  for (u32 part = 0; part < STACK; part++) {
    load_tile<D>(keys, q, sizes.q.row, first + part * TILE, m, d);
    commit_copies();
    await_copies();
    __syncthreads();
#pragma unroll
    for (u32 step = 0; step < D / 16; step++)
      load_matrices(queries[part][step], keys + (warp * 16 + lane % 16) * (D + 8) + step * 16 + lane / 16 * 8);
    __syncthreads();
  }

  // A thread has columns of two rows of each part: `row` and `row + 8`.
  const u32 row = first + warp * 16 + lane / 4;
  const u32 end = sizes.causal ? min(n, n - m + first + TILE * STACK) : n;
  float sums[STACK][D / 8][4] = {}, totals[STACK][2] = {}, largest[STACK][2];
#pragma unroll
  for (u32 part = 0; part < STACK; part++) largest[part][0] = largest[part][1] = __uint_as_float(NONE);
  load_tile<D>(keys, k, sizes.k.row, 0, n, d);
  commit_copies();
  for (u32 start = 0; start < end; start += TILE) {
    await_copies();
    __syncthreads();
    load_tile<D>(values, v, sizes.v.row, start, n, d);
    commit_copies();

    float scores[STACK][TILE / 8][4] = {};
#pragma unroll
    for (u32 step = 0; step < D / 16; step++) {
#pragma unroll
      for (u32 column = 0; column < TILE / 8; column += 2) {
        u32 b[4];
        load_matrices(b, keys + (column * 8 + lane / 16 * 8 + lane % 8) * (D + 8) + step * 16 + lane / 8 % 2 * 8);
#pragma unroll
        for (u32 part = 0; part < STACK; part++) {
          multiply(kind, scores[part][column], queries[part][step], b[0], b[1]);
          multiply(kind, scores[part][column + 1], queries[part][step], b[2], b[3]);
        }
      }
    }

    const bool at_edge = start + TILE > n || (sizes.causal && start + TILE > n - m + first + 1);
#pragma unroll
    for (u32 part = 0; part < STACK; part++) {
      if (at_edge) {
#pragma unroll
        for (u32 column = 0; column < TILE / 8; column++)
#pragma unroll
          for (u32 i = 0; i < 4; i++) {
            const u32 key = start + column * 8 + lane % 4 * 2 + i % 2;
            if (key >= n || (sizes.causal && key > n - m + row + part * TILE + i / 2 * 8))
              scores[part][column][i] = __uint_as_float(NONE);
          }
      }
#pragma unroll
      for (u32 half = 0; half < 2; half++) {
        float top = largest[part][half];
#pragma unroll
        for (u32 column = 0; column < TILE / 8; column++)
          top = fmaxf(top, fmaxf(scores[part][column][2 * half], scores[part][column][2 * half + 1]));
        top = row_max(top);
        const float shrink = exp2f((largest[part][half] - top) * sizes.scale), shift = top * sizes.scale;
        largest[part][half] = top;
        float total = 0;
#pragma unroll
        for (u32 column = 0; column < TILE / 8; column++)
#pragma unroll
          for (u32 i = 2 * half; i < 2 * half + 2; i++) {
            scores[part][column][i] = exp2f(scores[part][column][i] * sizes.scale - shift);
            total += scores[part][column][i];
          }
        totals[part][half] = totals[part][half] * shrink + total;
#pragma unroll
        for (u32 column = 0; column < D / 8; column++)
#pragma unroll
          for (u32 i = 2 * half; i < 2 * half + 2; i++) sums[part][column][i] *= shrink;
      }
    }

    await_copies();
    __syncthreads();
    if (start + TILE < end) load_tile<D>(keys, k, sizes.k.row, start + TILE, n, d);
    commit_copies();
#pragma unroll
    for (u32 step = 0; step < TILE / 16; step++) {
      u32 a[STACK][4];
#pragma unroll
      for (u32 part = 0; part < STACK; part++) {
        const float *low = scores[part][2 * step], *high = scores[part][2 * step + 1];
        a[part][0] = pack(kind, low[0], low[1]), a[part][1] = pack(kind, low[2], low[3]);
        a[part][2] = pack(kind, high[0], high[1]), a[part][3] = pack(kind, high[2], high[3]);
      }
#pragma unroll
      for (u32 column = 0; column < D / 8; column += 2) {
        u32 b[4];
        load_matrices_transposed(b, values + (step * 16 + lane % 16) * (D + 8) + column * 8 + lane / 16 * 8);
#pragma unroll
        for (u32 part = 0; part < STACK; part++) {
          multiply(kind, sums[part][column], a[part], b[0], b[1]);
          multiply(kind, sums[part][column + 1], a[part], b[2], b[3]);
        }
      }
    }
  }

#pragma unroll
  for (u32 i = 0; i < 2 * STACK; i++) {
    const u32 part = i / 2, half = i % 2, own = row + part * TILE + half * 8;
    const float inverse = 1.0f / row_sum(totals[part][half]);
    if (own >= m) continue;
    u16 *to = out + (u64)own * sizes.out.row + lane % 4 * 2;
#pragma unroll
    for (u32 column = 0; column < D / 8; column++)
      if (column * 8 < d)
        *(u32 *)(to + column * 8) = pack(kind, sums[part][column][2 * half] * inverse, sums[part][column][2 * half + 1] * inverse);
  }
}

// A step's queries over a paged cache: keys [blocks, kv_heads, D / 8, block_size, 8], values [blocks, kv_heads, D, block_size]. A
// sequence's context is cut into `parts` of `partition` tokens.
struct Paged { u32 q_row, kv_heads, group, columns, block_size, partition, parts; float scale; };

// Where queries, keys and values come as a product gave them, `q` being all three: what is to be done to them before. Bias [heads + 2
// kv_heads, D], cosines and sines [positions, D / 2]; the last token of each sequence goes to its slot, unless that is negative.
struct Fresh { const u16 *bias, *cos, *sin; const long long *slots; u16 *keys, *values; };

constexpr u32 MAX_GROUP = 8, STEP = 16, MAX_PARTS = 128;

// Element `i` of D / 2 of a head, and the one it is turned with, biased and turned.
template <typename T, u32 D>
__device__ inline void turn(T kind, const u16 *from, const u16 *bias, const u16 *cos, const u16 *sin, u32 i, u16 &low, u16 &high) {
  float a = widen(kind, from[i]), b = widen(kind, from[i + D / 2]);
  if (bias) a += widen(kind, bias[i]), b += widen(kind, bias[i + D / 2]);
  const float c = widen(kind, cos[i]), s = widen(kind, sin[i]);
  low = narrow(kind, a * c - b * s);
  high = narrow(kind, b * c + a * s);
}

// A block for one part of one sequence's context and one KV head, whose query heads, 8 at most, are the rows of its products. Warps take
// turns at `STEP` tokens and read keys and values as they lie: which product of a matrix stands for which element is of no
// account, as long as both sides agree. So a lane takes four neighbours where the tensor cores would have two pairs.
// What the parts give is joined by the block that ends last. `counters` [sequences, kv_heads] are 0 before and after.
template <typename T, u32 D, bool IS_FRESH>
__device__ void attend_paged(const u16 *q, const u16 *keys, const u16 *values, const u32 *tables, const u32 *lens, u16 *out,
                             float *partial, u32 *counters, const Paged &sizes, const Fresh &fresh) {
  __shared__ __align__(16) float of_warp[WARPS][MAX_GROUP][D];
  __shared__ float tops[WARPS][MAX_GROUP], weights[WARPS][MAX_GROUP];
  __shared__ float shares[MAX_PARTS][MAX_GROUP + 1];
  __shared__ __align__(16) u16 turned[MAX_GROUP][D];
  __shared__ u32 is_last;
  const T kind{};
  const u32 warp = threadIdx.x / 32, lane = threadIdx.x % 32, row = lane / 4, column = lane % 4;
  const u32 part = blockIdx.x, kv_head = blockIdx.y, sequence = blockIdx.z, block_size = sizes.block_size, group = sizes.group;
  let_next_begin();
  const u32 len = lens[sequence], first = part * sizes.partition;
  if (first >= len) return;
  const u32 end = min(len, first + sizes.partition);
  const u32 *table = tables + (u64)sequence * sizes.columns;
  out += ((u64)sequence * sizes.kv_heads + kv_head) * group * D;
  uint2 low[D / 16], high[D / 16], of_step[D / 8];
  const auto load = [&](u32 start) {
    // Fours of tokens lie in one block; those past the end are read from the last one, and count for nothing.
    const u32 of_keys = start + row / 2 * 4, of_values = start + column * 4;
    const u64 key_block = table[min(of_keys, len - 1) / block_size], value_block = table[min(of_values, len - 1) / block_size];
    const u16 *k = keys + (key_block * sizes.kv_heads + kv_head) * D * block_size +
                   (column / 2 * block_size + of_keys % block_size + row % 2) * 8 + column % 2 * 4;
    const u16 *v = values + (value_block * sizes.kv_heads + kv_head) * D * block_size + row * block_size + of_values % block_size;
#pragma unroll
    for (u32 step = 0; step < D / 16; step++) {
      low[step] = *(const uint2 *)(k + step * 16 * block_size);
      high[step] = *(const uint2 *)(k + step * 16 * block_size + 16);
    }
#pragma unroll
    for (u32 i = 0; i < D / 8; i++) of_step[i] = *(const uint2 *)(v + i * 8 * block_size);
  };
  // What the cache has from earlier steps does not depend on the kernel before.
  u32 start = first + warp * STEP;
  if (start < end) load(start);
  await_previous();

  uint2 queries[D / 16];
  const u16 *own = q + (u64)sequence * sizes.q_row + (u64)kv_head * group * D;
  if (IS_FRESH) {
    const u64 turning = (u64)(len - 1) * (D / 2), heads = (u64)sizes.kv_heads * group;
    const u16 *cos = fresh.cos + turning, *sin = fresh.sin + turning, *bias = fresh.bias;
    for (u32 i = threadIdx.x; i < group * (D / 2); i += WARPS * 32) {
      const u32 head = i / (D / 2), element = i % (D / 2);
      turn<T, D>(kind, own + head * D, bias ? bias + (kv_head * group + head) * D : nullptr, cos, sin, element,
                 turned[head][element], turned[head][element + D / 2]);
    }
    // The part that ends with the new token puts it into the cache first.
    const long long slot = fresh.slots[sequence];
    if (end == len && slot >= 0) {
      const u64 at = ((u64)slot / block_size * sizes.kv_heads + kv_head) * D * block_size, place = (u64)slot % block_size;
      const u16 *key = q + (u64)sequence * sizes.q_row + (heads + kv_head) * D, *value = key + (u64)sizes.kv_heads * D;
      const u16 *key_bias = bias ? bias + (heads + kv_head) * D : nullptr;
      for (u32 i = threadIdx.x; i < D / 2; i += WARPS * 32) {
        u16 low, high;
        turn<T, D>(kind, key, key_bias, cos, sin, i, low, high);
        fresh.keys[at + (i / 8 * block_size + place) * 8 + i % 8] = low;
        fresh.keys[at + ((i + D / 2) / 8 * block_size + place) * 8 + i % 8] = high;
      }
      const u16 *value_bias = bias ? bias + (heads + sizes.kv_heads + kv_head) * D : nullptr;
      for (u32 i = threadIdx.x; i < D; i += WARPS * 32)
        fresh.values[at + i * block_size + place] =
            bias ? narrow(kind, widen(kind, value[i]) + widen(kind, value_bias[i])) : value[i];
    }
    __syncthreads();
    own = turned[0];
    if (start < len && start + STEP >= len) load(start);
  }
#pragma unroll
  for (u32 step = 0; step < D / 16; step++)
    queries[step] = row < group ? *(const uint2 *)(own + row * D + step * 16 + column * 4) : make_uint2(0, 0);

  float sums[D / 8][4] = {}, total = 0, largest = __uint_as_float(NONE);
  for (; start < end; start += WARPS * STEP) {
    const u32 of_values = start + column * 4;
    float scores[2][4] = {};
#pragma unroll
    for (u32 step = 0; step < D / 16; step++) {
      const u32 a[4] = {queries[step].x, 0, queries[step].y, 0};
      multiply(kind, scores[0], a, low[step].x, low[step].y);
      multiply(kind, scores[1], a, high[step].x, high[step].y);
    }
    float top = largest;
#pragma unroll
    for (u32 i = 0; i < 4; i++) {
      if (of_values + i >= end) scores[i / 2][i % 2] = __uint_as_float(NONE);
      top = fmaxf(top, scores[i / 2][i % 2]);
    }
    top = row_max(top);
    const float shrink = exp2f((largest - top) * sizes.scale), shift = top * sizes.scale;
    largest = top;
    total *= shrink;
#pragma unroll
    for (u32 i = 0; i < 4; i++) {
      float &score = scores[i / 2][i % 2];
      score = exp2f(score * sizes.scale - shift);
      total += score;
    }
#pragma unroll
    for (u32 i = 0; i < D / 8; i++) sums[i][0] *= shrink, sums[i][1] *= shrink;
    const u32 a[4] = {pack(kind, scores[0][0], scores[0][1]), 0, pack(kind, scores[1][0], scores[1][1]), 0};
    // What lies past the end may be anything, and nothing times that must be nothing.
    const auto is_there = [&](u32 i) { return of_values + i < end; };
    const uint2 mask = make_uint2((is_there(0) ? 0xffff : 0) | (is_there(1) ? 0xffff0000 : 0),
                                  (is_there(2) ? 0xffff : 0) | (is_there(3) ? 0xffff0000 : 0));
#pragma unroll
    for (u32 i = 0; i < D / 8; i++) multiply(kind, sums[i], a, of_step[i].x & mask.x, of_step[i].y & mask.y);
    if (start + WARPS * STEP < end) load(start + WARPS * STEP);
  }

  total = row_sum(total);
#pragma unroll
  for (u32 i = 0; i < D / 8; i++) *(float2 *)&of_warp[warp][row][i * 8 + column * 2] = make_float2(sums[i][0], sums[i][1]);
  if (column == 0) tops[warp][row] = largest, weights[warp][row] = total;
  __syncthreads();
  const u32 active = (len + sizes.partition - 1) / sizes.partition;
  // Of each part and head D sums, the largest score, and the weight; padded to whole pieces of 16 bytes.
  constexpr u32 PART = D + 4;
  partial += ((u64)sequence * sizes.kv_heads + kv_head) * sizes.parts * MAX_GROUP * PART;
  for (u32 i = threadIdx.x; i < group * D; i += WARPS * 32) {
    const u32 head = i / D, element = i % D;
    float top = tops[0][head], sum = 0, weight = 0;
#pragma unroll
    for (u32 other = 1; other < WARPS; other++) top = fmaxf(top, tops[other][head]);
#pragma unroll
    for (u32 other = 0; other < WARPS; other++) {
      const float share = exp2f((tops[other][head] - top) * sizes.scale);
      sum += share * of_warp[other][head][element];
      weight += share * weights[other][head];
    }
    if (active == 1) {
      out[i] = narrow(kind, sum / weight);
    } else {
      float *to = partial + ((u64)part * MAX_GROUP + head) * PART;
      to[element] = sum;
      if (element == 0) *(float2 *)(to + D) = make_float2(top, weight);
    }
  }
  if (active == 1) return;
  __threadfence();
  __syncthreads();
  u32 *counter = counters + sequence * sizes.kv_heads + kv_head;
  if (threadIdx.x == 0) is_last = atomicAdd(counter, 1) == active - 1;
  __syncthreads();
  if (!is_last) return;
  __threadfence();
  // How much each part counts, for each head, by the lanes that share it.
  constexpr u32 HELPERS = WARPS * 32 / MAX_GROUP;
  const u32 head = threadIdx.x / HELPERS, helper = threadIdx.x % HELPERS;
  float top = __uint_as_float(NONE), weight = 0;
  for (u32 other = helper; other < active; other += HELPERS) {
    const float2 its = __ldcg((const float2 *)(partial + ((u64)other * MAX_GROUP + head) * PART + D));
    const float shrink = weight == 0 ? 0 : exp2f((top - fmaxf(top, its.x)) * sizes.scale);
    top = fmaxf(top, its.x);
    weight = weight * shrink + its.y * exp2f((its.x - top) * sizes.scale);
    shares[other][head] = its.x;
  }
#pragma unroll
  for (u32 distance = HELPERS / 2; distance > 0; distance /= 2) {
    const float its_top = __shfl_xor_sync(0xffffffffu, top, distance), its_weight = __shfl_xor_sync(0xffffffffu, weight, distance);
    const float both = fmaxf(top, its_top);
    // Of a lane that had no part, the weight is 0.
    weight = (weight == 0 ? 0 : weight * exp2f((top - both) * sizes.scale)) + (its_weight == 0 ? 0 : its_weight * exp2f((its_top - both) * sizes.scale));
    top = both;
  }
  for (u32 other = helper; other < active; other += HELPERS) shares[other][head] = exp2f((shares[other][head] - top) * sizes.scale) / weight;
  __syncwarp();
  // The same lanes add up their head.
  if (head < group) {
    for (u32 element = helper * 4; element < D; element += HELPERS * 4) {
      const float *from = partial + (u64)head * PART + element;
      float4 sum = make_float4(0, 0, 0, 0);
#pragma unroll 8
      for (u32 other = 0; other < active; other++) {
        const float4 its = __ldcg((const float4 *)(from + (u64)other * MAX_GROUP * PART));
        const float share = shares[other][head];
        sum.x += share * its.x, sum.y += share * its.y, sum.z += share * its.z, sum.w += share * its.w;
      }
      *(uint2 *)(out + head * D + element) = make_uint2(pack(kind, sum.x, sum.y), pack(kind, sum.z, sum.w));
    }
  }
  if (threadIdx.x == 0) *counter = 0;
}

#define FOR(T, D, stack)                                                                                                \
  extern "C" __global__ void __launch_bounds__(WARPS * 32) attend_##T##_##D(const u16 *q, const u16 *k, const u16 *v,    \
                                                                            u16 *out, const Sizes sizes) {               \
    attend<T, D, stack>(q, k, v, out, sizes);                                                                            \
  }
#define FOR_PAGED(name, T, D, is_fresh)                                                                                  \
  extern "C" __global__ void __launch_bounds__(WARPS * 32)                                                               \
  name##_##T##_##D(const u16 *q, const u16 *keys, const u16 *values, const u32 *tables, const u32 *lens, u16 *out,       \
                   float *partial, u32 *counters, const Paged sizes, const Fresh fresh) {                                \
    attend_paged<T, D, is_fresh>(q, keys, values, tables, lens, out, partial, counters, sizes, fresh);                   \
  }
// Wide heads leave no registers for more than one row of tiles.
#define FOR_ALL(T, D, stack) FOR(T, D, stack) FOR_PAGED(attend_paged, T, D, false) FOR_PAGED(attend_fresh, T, D, true)
#if !defined(ONLY) || ONLY == 16
FOR_ALL(f16, 32, 2) FOR_ALL(f16, 64, 2) FOR_ALL(f16, 80, 2) FOR_ALL(f16, 128, 1)
#endif
#if !defined(ONLY) || ONLY == 0
FOR_ALL(bf16, 32, 2) FOR_ALL(bf16, 64, 2) FOR_ALL(bf16, 80, 2) FOR_ALL(bf16, 128, 1)
#endif
