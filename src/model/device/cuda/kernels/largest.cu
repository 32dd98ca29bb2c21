// What becomes of logits before the host looks at them: `x` [rows, stride], of whose rows the first `width` numbers count. The kernels that
// search have a block a row.

#define NONE __uint_as_float(0xff800000u)
// The bits of what is no number.
#define UNDECIDED 0x7fc00000u

// The first of the largest, and its bits, to `out` [2, rows]; id 0 and minus infinity where there is none. What is no number is not looked at.
extern "C" __global__ void __launch_bounds__(1024) largest_f32(const float *x, unsigned *out, unsigned width, unsigned stride) {
  __shared__ float of_warp[32];
  __shared__ unsigned at_warp[32];
  x += (unsigned long long)blockIdx.x * stride;
  float largest = NONE;
  unsigned at = 0xffffffffu;
  const auto take = [&](float y, unsigned i) {
    if (y > largest || (y == largest && i < at)) largest = y, at = i;
  };
  for (unsigned i = threadIdx.x; i < width; i += blockDim.x) take(x[i], i);
  const auto take_from_lanes = [&]() {
    for (int distance = 16; distance > 0; distance /= 2) {
      const float y = __shfl_xor_sync(0xffffffffu, largest, distance);
      const unsigned i = __shfl_xor_sync(0xffffffffu, at, distance);
      take(y, i);
    }
  };
  take_from_lanes();
  if (threadIdx.x % 32 == 0) of_warp[threadIdx.x / 32] = largest, at_warp[threadIdx.x / 32] = at;
  __syncthreads();
  if (threadIdx.x >= 32) return;
  largest = NONE, at = 0xffffffffu;
  if (threadIdx.x < blockDim.x / 32) largest = of_warp[threadIdx.x], at = at_warp[threadIdx.x];
  take_from_lanes();
  if (threadIdx.x == 0) out[blockIdx.x] = at < width ? at : 0, out[gridDim.x + blockIdx.x] = __float_as_uint(largest);
}

// How the token of a row is drawn. Nothing is drawn of a row whose temperature is 0.
struct Draw {
  float temperature, top_p, min_p;
  unsigned top_k;
  double random;
};

constexpr unsigned ROOM = 512;

// Larger numbers have larger keys.
__device__ unsigned key_of(float y) {
  const unsigned bits = __float_as_uint(y);
  return bits >> 31 ? ~bits : bits | 0x80000000u;
}

__device__ float of_key(unsigned key) { return __uint_as_float(key >> 31 ? key & 0x7fffffffu : ~key); }

// Where the first `number` of `sums`, which do not fall, reach `wanted`; `number` where they do not. All threads of the block come here.
__device__ unsigned first_to_reach(const double *sums, unsigned number, double wanted, unsigned &found) {
  __syncthreads();
  if (threadIdx.x == 0) found = number;
  __syncthreads();
  const unsigned own = threadIdx.x;
  if (own < number && sums[own] >= wanted && (own == 0 || !(sums[own - 1] >= wanted))) found = own;
  __syncthreads();
  return found;
}

// Draws a token for each row of which `draws` says so, by the largest logits: all that are no smaller than the `few`th largest of what each
// thread has found largest, in order, and the sum of exp((y - largest) / temperature) over all. Puts id and bits where `largest_f32` has put
// them, or bits that are no number, and no other id, where these logits do not decide it. `top_k` is 0 or no more than `few`. Threads are a
// power of two, `ROOM` or 1024.
extern "C" __global__ void __launch_bounds__(1024) draw_f32(const float *x, const Draw *draws, unsigned *out, unsigned width, unsigned stride, unsigned few) {
  __shared__ float tops[1024];
  __shared__ float sums[32];
  __shared__ unsigned long long keys[ROOM];
  __shared__ double until[ROOM];
  __shared__ unsigned count, found;
  const unsigned own = threadIdx.x;
  const Draw draw = draws[blockIdx.x];
  if (!(draw.temperature > 0)) return;
  x += (unsigned long long)blockIdx.x * stride;
  unsigned &id = out[blockIdx.x], &bits = out[gridDim.x + blockIdx.x];
  float top = NONE;
  bool is_clear = true;
  for (unsigned i = own; i < width; i += blockDim.x) {
    is_clear = is_clear && x[i] == x[i];
    top = fmaxf(top, x[i]);
  }
  tops[own] = top;
  if (own < ROOM) keys[own] = 0;
  if (own == 0) count = 0;
  __syncthreads();
  if (!is_clear) atomicAdd(&count, ROOM + 1);
  // Sorted, the largest first: a bitonic network.
  const auto sort = [&](auto *values, unsigned number) {
    for (unsigned size = 2; size <= number; size *= 2)
      for (unsigned distance = size / 2; distance > 0; distance /= 2) {
        const unsigned other = own ^ distance;
        if (own < number && other > own) {
          const auto a = values[own], b = values[other];
          if ((own & size) == 0 ? a < b : a > b) values[own] = b, values[other] = a;
        }
        __syncthreads();
      }
  };
  sort(tops, blockDim.x);
  const float least = tops[few - 1], largest = tops[0], scale = 1.44269504f / draw.temperature;
  float sum = 0;
  for (unsigned i = own; i < width; i += blockDim.x) {
    const float y = x[i];
    sum += exp2f((y - largest) * scale);
    if (!(y >= least && y > NONE)) continue;
    const unsigned at = atomicAdd(&count, 1);
    // Of equal ones the first is the larger.
    if (at < ROOM) keys[at] = (unsigned long long)key_of(y) << 32 | ~i;
  }
  for (int distance = 16; distance > 0; distance /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, distance);
  if (own % 32 == 0) sums[own / 32] = sum;
  __syncthreads();
  const unsigned number = count;
  // Without any number `largest_f32` has said so.
  if (number == 0) return;
  if (number > ROOM) {
    if (own == 0) bits = UNDECIDED;
    return;
  }
  float total = 0;
  for (unsigned warp = 0; warp < blockDim.x / 32; warp++) total += sums[warp];
  sort(keys, ROOM);

  // `until` has the sum of all weights up to each; what top-k drops has none.
  const bool has_top_k = draw.top_k > 0 && draw.top_k < number;
  const unsigned floor = has_top_k ? (unsigned)(keys[draw.top_k - 1] >> 32) : 0;
  const auto weight_of = [&](unsigned i) {
    const unsigned key = (unsigned)(keys[i] >> 32);
    return i < number && key >= floor ? exp2f((of_key(key) - largest) * scale) : 0.0f;
  };
  const float weight = own < ROOM ? weight_of(own) : 0;
  if (own < ROOM) until[own] = weight;
  __syncthreads();
  for (unsigned distance = 1; distance < ROOM; distance *= 2) {
    const double before = own < ROOM && own >= distance ? until[own - distance] : 0;
    __syncthreads();
    if (own < ROOM) until[own] += before;
    __syncthreads();
  }
  const double all = draw.top_k > 0 ? until[number - 1] : (double)total;
  unsigned kept = number;
  bool is_decided = draw.top_k > 0;
  if (draw.top_p < 1) {
    const unsigned last = first_to_reach(until, number, draw.top_p * all, found);
    is_decided = is_decided || last < number;
    kept = min(last + 1, number);
  }
  // What weighs less than min-p is not kept, wherever it is.
  is_decided = is_decided || weight_of(number - 1) < draw.min_p;
  const bool is_whole = !is_decided && draw.top_p >= 1 && draw.min_p <= 0;
  __syncthreads();
  if (own == 0) count = 1;
  __syncthreads();
  if (own > 0 && own < kept && weight > 0 && weight >= draw.min_p) atomicAdd(&count, 1);
  __syncthreads();
  kept = count;
  const unsigned at = first_to_reach(until, kept, draw.random * (is_whole ? all : until[kept - 1]), found);
  if (own > 0) return;
  if (!is_decided && !(is_whole && at < kept)) {
    bits = UNDECIDED;
    return;
  }
  const unsigned long long key = keys[min(at, kept - 1)];
  id = ~(unsigned)key, bits = __float_as_uint(of_key((unsigned)(key >> 32)));
}

// A thread for each of `changes`: row, id, and the bits of what a logit is divided by, if it is positive, else multiplied with, and of
// what is added then. `x` has rows of `stride`; none of its logits is changed twice.
extern "C" __global__ void adjust_f32(float *x, const uint4 *changes, unsigned number, unsigned stride) {
  const unsigned i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= number) return;
  const uint4 change = changes[i];
  float &y = x[(unsigned long long)change.x * stride + change.y];
  const float factor = __uint_as_float(change.z);
  y = __fadd_rn(y > 0.0f ? __fdiv_rn(y, factor) : __fmul_rn(y, factor), __uint_as_float(change.w));
}

// Minus infinity for the first `width` ids of rows of `x`, of `stride`, that have no bit in `masks` [number, 1 + words], the number of the row
// before its bits. A thread an id, and a row of blocks a mask.
extern "C" __global__ void forbid_f32(float *x, const unsigned *masks, unsigned width, unsigned stride, unsigned words) {
  const unsigned i = blockIdx.x * blockDim.x + threadIdx.x;
  const unsigned *mask = masks + (unsigned long long)blockIdx.y * (1 + words);
  if (i < width && !(mask[1 + i / 32] >> i % 32 & 1)) x[(unsigned long long)mask[0] * stride + i] = NONE;
}
