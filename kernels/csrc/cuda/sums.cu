// sum_losses_cuda, scale_cuda, error_name_cuda.
//
// Owns: the launches of the sums (sums.h), and multiplying a tensor by a scalar that is on the device.
#include "sums.h"

#include "../sett.h"
#include "device.h"
#include "format.h"

namespace sett {
namespace cuda {
namespace {

__global__ void __launch_bounds__(kSumThreads) sum_kernel(const SumArgs args) {
  if (args.wide) sum_part<double>(args, blockIdx.x);
  else sum_part<float>(args, blockIdx.x);
}

constexpr int kScaleThreads = 256;
constexpr int kScaleBlocks = 1024;  // several for each multiprocessor of any device

// Each element has one owner, so no two threads touch the same bytes.
template <typename S>
__global__ void __launch_bounds__(kScaleThreads) scale_kernel(S* x, const int64_t elements, const void* scale) {
  using F = Format<S>;
  using Real = typename F::Real;
  const Real by = *static_cast<const Real*>(scale);
  if (by == Real(1)) return;
  const Span<S> span(x, elements, false);
  uint4* vectors = reinterpret_cast<uint4*>(x + span.head);
  const int64_t thread = int64_t(blockIdx.x) * blockDim.x + threadIdx.x, threads = int64_t(gridDim.x) * blockDim.x;
  for (int64_t i = thread; i < span.vectors; i += threads) {
    const uint4 v = vectors[i];
    Real scaled[F::kWidth];
#pragma unroll
    for (int j = 0; j < F::kWidth; ++j) scaled[j] = F::get(v, j) * by;
    vectors[i] = F::pack(scaled);
  }
  for (int64_t i = thread; i < span.edges(elements); i += threads) {
    S& edge = x[span.edge(i)];
    edge = F::stored(F::real(edge) * by);
  }
}

}  // namespace
}  // namespace cuda

int sum_losses_cuda(const SumArgs& args, void* stream) {
  return cuda::launch(cuda::sum_kernel, cuda::sum_parts(args), 1, cuda::kSumThreads, cuda::kSumShared, stream, args);
}

int scale_cuda(Storage storage, void* x, int64_t elements, const void* scale, void* stream) {
  return cuda::with_format(storage, [&](auto s) {
    using S = decltype(s);
    const int64_t whole = (elements + cuda::kScaleThreads - 1) / cuda::kScaleThreads;
    return cuda::launch(cuda::scale_kernel<S>, std::min<int64_t>(whole, cuda::kScaleBlocks), 1, cuda::kScaleThreads, 0,
                        stream, static_cast<S*>(x), elements, scale);
  });
}

const char* error_name_cuda(int error) { return cudaGetErrorName(static_cast<cudaError_t>(error)); }

}  // namespace sett
