// What the CUDA kernels share: entries of any dtype, and rows of embeddings.

#pragma once

#include <algorithm>

#include "launch.cuh"

namespace softprompt {

constexpr int kWarp = 32;
constexpr unsigned kAllLanes = 0xffffffffu;
constexpr int kPieceBytes = 16;  // the widest access of one thread

template <class T>
__device__ T at(const View& view, int64_t row, int64_t column) {
  return *reinterpret_cast<const T*>(view.data + row * view.row_stride + column * view.column_stride);
}

__device__ inline bool is_given(const View& view) {
  return view.data != nullptr;
}

// An entry of any integer dtype.
__device__ inline int64_t integer_at(const View& view, int64_t row, int64_t column) {
  switch (view.dtype) {
    case ScalarType::Byte:
      return at<uint8_t>(view, row, column);
    case ScalarType::Char:
      return at<int8_t>(view, row, column);
    case ScalarType::Short:
      return at<int16_t>(view, row, column);
    case ScalarType::UInt16:
      return at<uint16_t>(view, row, column);
    case ScalarType::Int:
      return at<int32_t>(view, row, column);
    case ScalarType::UInt32:
      return at<uint32_t>(view, row, column);
    default:
      return at<int64_t>(view, row, column);
  }
}

// To 16 bits by way of fp32, as PyTorch does it from fp64.
template <class To, class From>
__device__ To cast(From value) {
  if constexpr (std::is_same_v<To, From>) {
    return value;
  } else if constexpr (std::is_same_v<To, double>) {
    return static_cast<double>(static_cast<float>(value));
  } else {
    return static_cast<To>(static_cast<float>(value));
  }
}

// An entry of any floating dtype.
template <class To>
__device__ To floating_at(const View& view, int64_t row, int64_t column) {
  switch (view.dtype) {
    case ScalarType::Half:
      return cast<To>(at<c10::Half>(view, row, column));
    case ScalarType::BFloat16:
      return cast<To>(at<c10::BFloat16>(view, row, column));
    case ScalarType::Double:
      return cast<To>(at<double>(view, row, column));
    default:
      return cast<To>(at<float>(view, row, column));
  }
}

// An entry of a mask of any dtype, as fp32.
__device__ inline float mask_at(const View& view, int64_t row, int64_t column) {
  switch (view.dtype) {
    case ScalarType::Half:
    case ScalarType::BFloat16:
    case ScalarType::Double:
    case ScalarType::Float:
      return floating_at<float>(view, row, column);
    case ScalarType::Bool:
      return at<uint8_t>(view, row, column);
    case ScalarType::UInt64:
      return static_cast<float>(at<uint64_t>(view, row, column));
    default:
      return static_cast<float>(integer_at(view, row, column));
  }
}

// Whether an entry of a mask is not 0, in its own dtype: an fp64 below the smallest fp32 is not 0.
__device__ inline bool is_set(const View& view, int64_t row, int64_t column) {
  switch (view.dtype) {
    case ScalarType::Half:
    case ScalarType::BFloat16:
    case ScalarType::Float:
      return floating_at<float>(view, row, column) != 0;
    case ScalarType::Double:
      return at<double>(view, row, column) != 0;
    case ScalarType::Bool:
      return at<uint8_t>(view, row, column) != 0;
    default:
      return integer_at(view, row, column) != 0;
  }
}

template <class T, int kEntries>
union Piece {
  int4 whole;
  T entries[kEntries];
  __device__ Piece() {}
};

// Where rows of embeddings come from and go to.
struct Embeddings {
  View table;
  View prompts;
  char* out;  // [rows, H], contiguous
  int64_t width;
};

// Writes the entries of an output row that are this thread's; a row that has neither prompt nor id is zero.
//
// With kEntries = 16 bytes' worth every access of the table and of the output is 16 bytes wide; with 1 any
// width, alignment and stride is right.
template <class T, int kEntries>
__device__ void write_row(
    const Embeddings& rows, int64_t out_row, bool is_prompt, int64_t source, int first_lane, int lanes) {
  const int64_t pieces = rows.width / kEntries;
  const bool known = source >= 0 && source < (is_prompt ? rows.prompts.rows : rows.table.rows);
  T* to = reinterpret_cast<T*>(rows.out) + out_row * rows.width;
  for (int64_t number = first_lane; number < pieces; number += lanes) {
    const int64_t column = number * kEntries;
    Piece<T, kEntries> piece;
    if (is_prompt || !known) {
#pragma unroll
      for (int entry = 0; entry < kEntries; ++entry) {
        piece.entries[entry] = known ? floating_at<T>(rows.prompts, source, column + entry) : T(0.0f);
      }
    } else if constexpr (kEntries > 1) {
      piece.whole = *reinterpret_cast<const int4*>(
          rows.table.data + source * rows.table.row_stride + column * static_cast<int64_t>(sizeof(T)));
    } else {
      piece.entries[0] = at<T>(rows.table, source, column);
    }
    if constexpr (kEntries > 1) {
      *reinterpret_cast<int4*>(to + column) = piece.whole;
    } else {
      to[column] = piece.entries[0];
    }
  }
}

inline bool is_aligned(const void* pointer) {
  return reinterpret_cast<uintptr_t>(pointer) % kPieceBytes == 0;
}

// Whether all rows of the table and of the output begin at multiples of 16 bytes.
inline bool in_pieces(const Embeddings& rows) {
  const int64_t bytes = rows.width * rows.table.itemsize;
  return rows.table.column_stride == rows.table.itemsize && bytes % kPieceBytes == 0 &&
      rows.table.row_stride % kPieceBytes == 0 && is_aligned(rows.table.data) && is_aligned(rows.out);
}

// Threads along a row and rows of a block: 128 threads, as few along the row as it has pieces.
inline dim3 block_of_rows(int64_t pieces) {
  unsigned along = 1;
  while (along < pieces && along < 128) along *= 2;
  return dim3(along, 128 / along);
}

inline unsigned grid_of_rows(int64_t rows, const dim3& block) {
  return static_cast<unsigned>((rows + block.y - 1) / block.y);
}

}  // namespace softprompt
