// What becomes of logits before the host looks at them: `x` [rows, stride], of whose rows the first `width` numbers count. The kernels that
// search have a block a row.

#define NONE __uint_as_float(0xff800000u)

// The first of the largest, and its bits, to `out` [rows, 2]. What is no number is not looked at.
extern "C" __global__ void largest_f32(const float *x, unsigned *out, unsigned width, unsigned stride) {
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
  if (threadIdx.x == 0) out[2 * blockIdx.x] = at, out[2 * blockIdx.x + 1] = __float_as_uint(largest);
}

// All that are no smaller than the `few`th largest, ids and bits, after their number and the bits of the sum of exp((y - largest) /
// temperature) over all: `out` [rows, 2 + 2 room]. It may be a few more: the limit is the `few`th largest of what each thread has found
// largest. Where the number exceeds `room`, some are missing; so it is where one is no number, for then it is not clear what is largest.
// Threads are a power of two, whole warps, 1024 at most, and no fewer than `few`.
extern "C" __global__ void few_largest_f32(const float *x, const float *temperatures, unsigned *out, unsigned width, unsigned stride,
                                           unsigned few, unsigned room) {
  __shared__ float tops[1024];
  __shared__ float sums[32];
  __shared__ unsigned count;
  const unsigned own = threadIdx.x;
  x += (unsigned long long)blockIdx.x * stride;
  out += (unsigned long long)blockIdx.x * (2 + 2 * room);
  float top = NONE;
  bool is_clear = true;
  for (unsigned i = own; i < width; i += blockDim.x) {
    is_clear = is_clear && x[i] == x[i];
    top = fmaxf(top, x[i]);
  }
  tops[own] = top;
  if (own == 0) count = 0;
  __syncthreads();
  if (!is_clear) atomicAdd(&count, room + 1);
  // Sorted, the largest first: a bitonic network.
  for (unsigned size = 2; size <= blockDim.x; size *= 2)
    for (unsigned distance = size / 2; distance > 0; distance /= 2) {
      const unsigned other = own ^ distance;
      if (other > own) {
        const float a = tops[own], b = tops[other];
        if ((own & size) == 0 ? a < b : a > b) tops[own] = b, tops[other] = a;
      }
      __syncthreads();
    }
  const float least = tops[few - 1], largest = tops[0], scale = 1.44269504f / temperatures[blockIdx.x];
  float sum = 0;
  for (unsigned i = own; i < width; i += blockDim.x) {
    const float y = x[i];
    sum += exp2f((y - largest) * scale);
    if (!(y >= least && y > NONE)) continue;
    const unsigned at = atomicAdd(&count, 1);
    if (at < room) out[2 + 2 * at] = i, out[3 + 2 * at] = __float_as_uint(y);
  }
  for (int distance = 16; distance > 0; distance /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, distance);
  if (own % 32 == 0) sums[own / 32] = sum;
  __syncthreads();
  if (own > 0) return;
  float total = 0;
  for (unsigned warp = 0; warp < blockDim.x / 32; warp++) total += sums[warp];
  out[0] = count, out[1] = __float_as_uint(total);
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
