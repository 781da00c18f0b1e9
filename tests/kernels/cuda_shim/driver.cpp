// Runs kernels on the CPU for test_cuda_on_cpu.py: calls from the file argv[1], all their arrays to the file argv[2].
//
// A call is the operation, integers, reals and arrays, all behind their counts. An array is its bytes' number (-1: a
// null pointer), the array it shares memory with (-1: none), how many bytes past a 16-byte boundary it begins, and its
// bytes. What comes back of a call: the error, blocks and threads and cluster of each launch, then every array.
#include <stdio.h>
#include <stdlib.h>

#include "../../../kernels/csrc/sett.h"
#include "cuda_runtime.h"

namespace {

FILE* input;
FILE* output;

int64_t read_integer() {
  int64_t x;
  if (fread(&x, sizeof(x), 1, input) != 1) exit(0);
  return x;
}
void write_integer(int64_t x) { fwrite(&x, sizeof(x), 1, output); }

struct Array {
  int64_t bytes, shares, past;
  std::unique_ptr<unsigned char[]> memory;
  unsigned char* data;
};

int call(int64_t operation, const std::vector<int64_t>& n, const std::vector<double>& reals,
         const std::vector<Array>& arrays) {
  size_t next = 0;
  auto take = [&](auto& pointer) {
    pointer = reinterpret_cast<std::remove_reference_t<decltype(pointer)>>(arrays.at(next++).data);
  };
  if (operation == 0) {
    sett::SegmentArgs a = {};
    a.storage = sett::Storage(n.at(0));
    a.elements = n.at(1), a.segments = n.at(2), a.longest = n.at(3), a.z_loss = reals.at(0);
    take(a.x), take(a.y), take(a.offsets), take(a.target), take(a.weight), take(a.kl_weight), take(a.smoothing);
    take(a.loss), take(a.kl), take(a.grad_x), take(a.grad_y), take(a.fault);
    return sett::segment_losses_cuda(a, nullptr);
  }
  if (operation == 1) {
    sett::SumArgs a = {};
    a.wide = int32_t(n.at(0)), a.count = n.at(1), a.tasks = n.at(2);
    take(a.loss), take(a.weight), take(a.task), take(a.more), take(a.more_weight), take(a.total), take(a.by_task);
    take(a.fault);
    return sett::sum_losses_cuda(a, nullptr);
  }
  if (operation == 2) {
    sett::HeadArgs a = {};
    a.storage = sett::Storage(n.at(0));
    a.feature_count = n.at(1), a.hidden = n.at(2), a.row_count = n.at(3), a.segments = n.at(4);
    a.scores_count = n.at(5), a.points = n.at(6), a.tasks = n.at(7), a.z_loss = reals.at(0);
    take(a.features), take(a.weight), take(a.bias), take(a.segment), take(a.offsets), take(a.target);
    take(a.loss_weight), take(a.smoothing), take(a.point), take(a.value), take(a.task), take(a.scores);
    take(a.grad_scores), take(a.loss), take(a.total), take(a.by_task), take(a.grad_features), take(a.grad_weight);
    take(a.grad_bias), take(a.fault);
    return sett::head_losses_cuda(a, nullptr);
  }
  void* x;
  const void* scale;
  take(x), take(scale);
  return sett::scale_cuda(sett::Storage(n.at(0)), x, n.at(1), scale, nullptr);
}

}  // namespace

int main(int, char** argv) {
  input = fopen(argv[1], "rb");
  output = fopen(argv[2], "wb");
  while (true) {
    const int64_t operation = read_integer();
    shim::capability_major = int(read_integer());
    std::vector<int64_t> integers(static_cast<size_t>(read_integer()));
    for (int64_t& x : integers) x = read_integer();
    std::vector<double> reals(static_cast<size_t>(read_integer()));
    for (double& x : reals) x = shim_bits<double>(read_integer());
    std::vector<Array> arrays(static_cast<size_t>(read_integer()));
    for (Array& a : arrays) {
      a.bytes = read_integer(), a.shares = read_integer(), a.past = read_integer();
      if (a.bytes < 0) continue;
      if (a.shares >= 0) {
        a.data = arrays[size_t(a.shares)].data;
        continue;
      }
      a.memory.reset(new unsigned char[size_t(a.past + a.bytes)]);
      a.data = a.memory.get() + a.past;
      if (a.bytes > 0 && fread(a.data, 1, size_t(a.bytes), input) != size_t(a.bytes)) return 2;
    }
    shim::launches.clear();
    write_integer(call(operation, integers, reals, arrays));
    write_integer(int64_t(shim::launches.size()));
    for (const cudaLaunchConfig_t& launch : shim::launches) {
      write_integer(launch.gridDim.x);
      write_integer(launch.blockDim.x);
      write_integer(launch.numAttrs == 0 ? 1 : launch.attrs[0].val.clusterDim.x);
    }
    for (const Array& a : arrays) {
      if (a.bytes > 0) fwrite(a.data, 1, size_t(a.bytes), output);
    }
    fflush(output);
  }
}
