// One block a row: the first of the largest of `x` [rows, stride]'s first `width` numbers, and its bits, to `out` [rows, 2]. What is no number is
// not looked at.
extern "C" __global__ void largest_f32(const float *x, unsigned *out, unsigned width, unsigned stride) {
  __shared__ float of_warp[32];
  __shared__ unsigned at_warp[32];
  x += (unsigned long long)blockIdx.x * stride;
  float largest = __uint_as_float(0xff800000u);
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
  largest = __uint_as_float(0xff800000u), at = 0xffffffffu;
  if (threadIdx.x < blockDim.x / 32) largest = of_warp[threadIdx.x], at = at_warp[threadIdx.x];
  take_from_lanes();
  if (threadIdx.x == 0) out[2 * blockIdx.x] = at, out[2 * blockIdx.x + 1] = __float_as_uint(largest);
}
