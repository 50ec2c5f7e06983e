// Rows of integers, masks and embeddings on a CPU.

#pragma once

#include <algorithm>
#include <atomic>
#include <cstring>

#include "../tensors.h"

#if defined(__SSE2__)
#include <emmintrin.h>
#endif

namespace softprompt {

// Work of one thread at the least, in entries or bytes: starting a thread costs some microseconds.
constexpr int64_t kGrain = 16384;

inline int64_t grain_of_rows(int64_t row_size) {
  return std::max<int64_t>(1, kGrain / std::max<int64_t>(1, row_size));
}

template <class Source, class Target, class Convert>
void convert_entries(const View& view, int64_t row, Target* to, Convert convert) {
  const char* from = view.data + row * view.row_stride;
  if (view.column_stride == static_cast<int64_t>(sizeof(Source))) {
    const Source* entries = reinterpret_cast<const Source*>(from);
    for (int64_t column = 0; column < view.columns; ++column) to[column] = convert(entries[column]);
  } else {
    for (int64_t column = 0; column < view.columns; ++column) {
      to[column] = convert(*reinterpret_cast<const Source*>(from + column * view.column_stride));
    }
  }
}

// One row of integers of any dtype.
inline void read_integers(const View& view, int64_t row, int64_t* to) {
  const auto widen = [](auto value) { return static_cast<int64_t>(value); };
  switch (view.dtype) {
    case ScalarType::Byte:
      return convert_entries<uint8_t>(view, row, to, widen);
    case ScalarType::Char:
      return convert_entries<int8_t>(view, row, to, widen);
    case ScalarType::Short:
      return convert_entries<int16_t>(view, row, to, widen);
    case ScalarType::UInt16:
      return convert_entries<uint16_t>(view, row, to, widen);
    case ScalarType::Int:
      return convert_entries<int32_t>(view, row, to, widen);
    case ScalarType::UInt32:
      return convert_entries<uint32_t>(view, row, to, widen);
    case ScalarType::Long:
      return convert_entries<int64_t>(view, row, to, widen);
    case ScalarType::UInt64:
      return convert_entries<uint64_t>(view, row, to, widen);
    default:
      STD_TORCH_CHECK(false, "expected integers, got scalar type ", static_cast<int>(view.dtype));
  }
}

// One row of a mask of any dtype as numbers, the way PyTorch converts it to `To`.
template <class To, class Convert>
void read_mask(const View& view, int64_t row, To* to, Convert convert) {
  switch (view.dtype) {
    case ScalarType::Bool:
    case ScalarType::Byte:
      return convert_entries<uint8_t>(view, row, to, convert);
    case ScalarType::Char:
      return convert_entries<int8_t>(view, row, to, convert);
    case ScalarType::Short:
      return convert_entries<int16_t>(view, row, to, convert);
    case ScalarType::UInt16:
      return convert_entries<uint16_t>(view, row, to, convert);
    case ScalarType::Int:
      return convert_entries<int32_t>(view, row, to, convert);
    case ScalarType::UInt32:
      return convert_entries<uint32_t>(view, row, to, convert);
    case ScalarType::Long:
      return convert_entries<int64_t>(view, row, to, convert);
    case ScalarType::UInt64:
      return convert_entries<uint64_t>(view, row, to, convert);
    case ScalarType::Half:
      return convert_entries<c10::Half>(view, row, to, convert);
    case ScalarType::BFloat16:
      return convert_entries<c10::BFloat16>(view, row, to, convert);
    case ScalarType::Float:
      return convert_entries<float>(view, row, to, convert);
    case ScalarType::Double:
      return convert_entries<double>(view, row, to, convert);
    default:
      STD_TORCH_CHECK(false, "a mask cannot have scalar type ", static_cast<int>(view.dtype));
  }
}

// To 16 bits by way of fp32, as PyTorch does it from fp64.
template <class To, class From>
To cast(From value) {
  if constexpr (std::is_same_v<To, From>) {
    return value;
  } else if constexpr (std::is_same_v<To, double>) {
    return static_cast<double>(static_cast<float>(value));
  } else {
    return static_cast<To>(static_cast<float>(value));
  }
}

// Writes rows of embeddings, each from the table, from the prompts, or zero.
class RowWriter {
 public:
  RowWriter(const View& table, const View& prompts, void* out, int64_t num_rows)
      : table_(table), prompts_(prompts), out_(static_cast<char*>(out)) {
    row_bytes_ = table.columns * table.itemsize;
    dense_ = table.column_stride == table.itemsize;
#if defined(__SSE2__)
    // What does not stay in the cache is written around it: a usual store would read the line first.
    streams_ = dense_ && num_rows * row_bytes_ >= kStreamedBytes && row_bytes_ % 16 == 0 &&
        reinterpret_cast<uintptr_t>(out) % 16 == 0;
#else
    (void)num_rows;
#endif
  }

  int64_t row_bytes() const {
    return row_bytes_;
  }

  void token(int64_t out_row, int64_t id) const {
    char* to = out_ + out_row * row_bytes_;
    if (id < 0 || id >= table_.rows) {
      std::memset(to, 0, row_bytes_);
      return;
    }
    const char* from = table_.data + id * table_.row_stride;
    if (!dense_) {
      for (int64_t column = 0; column < table_.columns; ++column) {
        std::memcpy(to + column * table_.itemsize, from + column * table_.column_stride, table_.itemsize);
      }
#if defined(__SSE2__)
    } else if (streams_) {
      for (int64_t byte = 0; byte < row_bytes_; byte += 16) {
        const __m128i value = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from + byte));
        _mm_stream_si128(reinterpret_cast<__m128i*>(to + byte), value);
      }
#endif
    } else {
      std::memcpy(to, from, row_bytes_);
    }
  }

  void prompt(int64_t out_row, int64_t prompt_row) const {
    char* to = out_ + out_row * row_bytes_;
    if (prompt_row < 0 || prompt_row >= prompts_.rows) {
      std::memset(to, 0, row_bytes_);
      return;
    }
    with_floating(table_.dtype, [&](auto target) {
      using Target = typename decltype(target)::type;
      with_floating(prompts_.dtype, [&](auto source) {
        using Source = typename decltype(source)::type;
        convert_entries<Source>(
            prompts_, prompt_row, reinterpret_cast<Target*>(to), [](Source value) { return cast<Target>(value); });
      });
    });
  }

  // Asks for the beginning of a token's row, which no hardware foresees.
  void expect(int64_t id) const {
#if defined(__GNUC__)
    if (id < 0 || id >= table_.rows) return;
    const char* from = table_.data + id * table_.row_stride;
    for (int64_t byte = 0; byte < std::min<int64_t>(row_bytes_, kForeseenBytes); byte += 64) {
      __builtin_prefetch(from + byte);
    }
#else
    (void)id;
#endif
  }

  // What was streamed is ordered before anything that the next reader does.
  void finish() const {
#if defined(__SSE2__)
    if (streams_) _mm_sfence();
#endif
  }

 private:
  static constexpr int64_t kForeseenBytes = 1024;
  static constexpr int64_t kStreamedBytes = int64_t{32} << 20;

  View table_;
  View prompts_;
  char* out_;
  int64_t row_bytes_ = 0;
  bool dense_ = false;
  bool streams_ = false;
};

}  // namespace softprompt
