// Launches on PyTorch's stream, and what a launch has to know of the device.

#pragma once

#include <cooperative_groups.h>
#include <cuda_runtime.h>

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/macros.h>

#include "../tensors.h"

namespace softprompt {

inline torch::stable::accelerator::DeviceGuard on_device_of(const Tensor& tensor) {
  return torch::stable::accelerator::DeviceGuard(tensor.get_device_index());
}

inline cudaStream_t stream_of(const Tensor& tensor) {
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream));
  return static_cast<cudaStream_t>(stream);
}

inline int64_t multiprocessors_of(const Tensor& tensor) {
  int count = 0;
  STD_CUDA_CHECK(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, tensor.get_device_index()));
  return count;
}

// How many blocks of a kernel a multiprocessor holds at a time.
template <class... Parameters>
int64_t blocks_at_once(void (*kernel)(Parameters...), int threads) {
  int count = 0;
  STD_CUDA_CHECK(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&count, kernel, threads, 0));
  return count;
}

// A kernel on the current stream of the device of `where`.
template <class... Parameters>
void launch(
    void (*kernel)(Parameters...), dim3 grid, dim3 block, const Tensor& where, typename Type<Parameters>::type... arguments) {
  kernel<<<grid, block, 0, stream_of(where)>>>(arguments...);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

// The same for a kernel that calls sync_grid(): all its blocks are on the chip at the same time.
template <class Parameter>
void launch_together(void (*kernel)(Parameter), dim3 grid, dim3 block, const Tensor& where, Parameter argument) {
  void* arguments[] = {&argument};
  STD_CUDA_CHECK(cudaLaunchCooperativeKernel(
      reinterpret_cast<const void*>(kernel), grid, block, arguments, 0, stream_of(where)));
}

// Waits for all threads of the grid.
__device__ inline void sync_grid() {
  cooperative_groups::this_grid().sync();
}

}  // namespace softprompt
