// What every implementation shares: tensors as strided views, and the list of floating dtypes.
//
// LibTorch's stable ABI only, so that one binary serves all versions of torch and Python. No argument is a string:
// its conversion (torch 2.13) leaves a copy of it behind at every call. The schemas are declared in Python
// (softprompt/ops/*/native.py), whose functions check the arguments and allocate the outputs.

#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Exception.h>
#include <torch/headeronly/util/Half.h>

#include <cstdint>
#include <optional>

// Of the arguments. softprompt/ops/library.py refuses a module whose number is not its own.
#define SOFTPROMPT_INTERFACE 4

namespace softprompt {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t kIgnoreIndex = -100;
constexpr int32_t kMaskedKey = 2147483647;

// A vector or matrix of any dtype and strides. A vector is a matrix of one row.
struct View {
  const char* data = nullptr;  // nullptr: the tensor was not given
  ScalarType dtype = ScalarType::Byte;
  int64_t itemsize = 1;
  int64_t rows = 0;
  int64_t columns = 0;
  int64_t row_stride = 0;     // in bytes
  int64_t column_stride = 0;  // in bytes

  bool given() const {
    return data != nullptr || rows * columns > 0;
  }
};

inline int64_t size_of(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Bool:
    case ScalarType::Byte:
    case ScalarType::Char:
      return 1;
    case ScalarType::Short:
    case ScalarType::UInt16:
    case ScalarType::Half:
    case ScalarType::BFloat16:
      return 2;
    case ScalarType::Int:
    case ScalarType::UInt32:
    case ScalarType::Float:
      return 4;
    case ScalarType::Long:
    case ScalarType::UInt64:
    case ScalarType::Double:
      return 8;
    default:
      STD_TORCH_CHECK(false, "the native back end has no tensors of scalar type ", static_cast<int>(dtype));
  }
  return 0;
}

inline View view_of(const Tensor& tensor) {
  View view;
  view.data = static_cast<const char*>(tensor.const_data_ptr());
  view.dtype = tensor.scalar_type();
  view.itemsize = size_of(view.dtype);
  const int64_t rank = tensor.dim();
  STD_TORCH_CHECK(rank == 1 || rank == 2, "expected a vector or a matrix, got rank ", rank);
  view.rows = rank == 2 ? tensor.size(0) : 1;
  view.columns = tensor.size(rank - 1);
  view.row_stride = rank == 2 ? tensor.stride(0) * view.itemsize : 0;
  view.column_stride = tensor.stride(rank - 1) * view.itemsize;
  return view;
}

// Matrix number `index` of a tensor of rank 3.
inline View view_of(const Tensor& tensor, int64_t index) {
  View view;
  STD_TORCH_CHECK(tensor.dim() == 3, "expected rank 3, got rank ", tensor.dim());
  view.dtype = tensor.scalar_type();
  view.itemsize = size_of(view.dtype);
  view.data = static_cast<const char*>(tensor.const_data_ptr()) + index * tensor.stride(0) * view.itemsize;
  view.rows = tensor.size(1);
  view.columns = tensor.size(2);
  view.row_stride = tensor.stride(1) * view.itemsize;
  view.column_stride = tensor.stride(2) * view.itemsize;
  return view;
}

inline View view_of(const std::optional<Tensor>& tensor) {
  return tensor.has_value() ? view_of(*tensor) : View{};
}

// The memory of a contiguous tensor that is written.
template <class T>
T* output_of(const Tensor& tensor) {
  STD_TORCH_CHECK(tensor.is_contiguous(), "an output has to be contiguous");
  return static_cast<T*>(tensor.mutable_data_ptr());
}

template <class T>
struct Type {
  using type = T;
};

// Calls `function` with the Type of a floating dtype.
template <class Function>
void with_floating(ScalarType dtype, Function function) {
  switch (dtype) {
    case ScalarType::Float:
      return function(Type<float>{});
    case ScalarType::Double:
      return function(Type<double>{});
    case ScalarType::Half:
      return function(Type<c10::Half>{});
    case ScalarType::BFloat16:
      return function(Type<c10::BFloat16>{});
    default:
      STD_TORCH_CHECK(false, "expected fp16, bf16, fp32 or fp64, got scalar type ", static_cast<int>(dtype));
  }
}

}  // namespace softprompt
