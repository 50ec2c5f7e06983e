// rms_norm, glu and rotary on a CPU, with their gradients: rows are read once or twice, while they are in the cache,
// and computed in fp32 (fp64 for fp64).

#include "lanes.h"

namespace softprompt {
namespace {

constexpr int64_t kGrain = 16384;  // numbers that are worth a thread

namespace baseline {
#include "conversions.h"
#include "elementary.h"
#include "elementwise.h"
}

#if defined(SOFTPROMPT_TARGETS)
#pragma GCC push_options
#pragma GCC target("avx2,fma")
namespace avx2 {
#include "conversions.h"
#include "elementary.h"
#include "elementwise.h"
}
#pragma GCC pop_options
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,prefer-vector-width=512")
namespace avx512 {
#include "conversions.h"
#include "elementary.h"
#include "elementwise.h"
}
#pragma GCC pop_options
#endif

// The function of the instruction set, of three that were compiled from the same lines.
template <class Function>
Function chosen(int64_t instructions, Function baseline, Function avx2, Function avx512) {
  switch (instructions_of(instructions)) {
    case Instructions::kAvx512:
      return avx512;
    case Instructions::kAvx2:
      return avx2;
    default:
      return baseline;
  }
}

#if defined(SOFTPROMPT_TARGETS)
#define SOFTPROMPT_CHOSEN(instructions, ...) \
  chosen(instructions, &baseline::__VA_ARGS__, &avx2::__VA_ARGS__, &avx512::__VA_ARGS__)
#else
#define SOFTPROMPT_CHOSEN(instructions, ...) \
  chosen(instructions, &baseline::__VA_ARGS__, &baseline::__VA_ARGS__, &baseline::__VA_ARGS__)
#endif

template <class Value>
using SumOf = std::conditional_t<std::is_same_v<Value, double>, double, float>;

template <class Function>
void for_rows(int64_t num_rows, int64_t width, Function function) {
  const int64_t grain = std::max<int64_t>(1, kGrain / std::max<int64_t>(1, width));
  torch::stable::parallel_for(0, num_rows, grain, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) function(row);
  });
}

// Dense rows at any distance from each other.
template <class Value>
class Dense {
 public:
  explicit Dense(const Tensor& tensor) : data_(static_cast<Value*>(const_cast<void*>(tensor.const_data_ptr()))) {
    STD_TORCH_CHECK(
        tensor.dim() == 2 && (tensor.size(1) < 2 || tensor.stride(1) == 1), "expected a matrix of dense rows");
    stride_ = tensor.stride(0);
  }

  Value* at(int64_t row) const {
    return data_ + row * stride_;
  }

 private:
  Value* data_;
  int64_t stride_;
};

template <class Sum>
std::vector<Sum> numbers_of(const Tensor& vector, double offset) {
  std::vector<Sum> numbers(vector.size(0));
  with_floating(vector.scalar_type(), [&](auto type) {
    using Value = typename decltype(type)::type;
    STD_TORCH_CHECK(vector.dim() == 1 && vector.is_contiguous(), "expected a contiguous vector");
    const Value* from = static_cast<const Value*>(vector.const_data_ptr());
    for (size_t i = 0; i < numbers.size(); ++i) {
      numbers[i] = static_cast<Sum>(static_cast<SumOf<Value>>(from[i])) + static_cast<Sum>(offset);
    }
  });
  return numbers;
}

void rms_norm(
    Tensor x,        // [N, H]
    Tensor weight,   // [H]
    double eps,
    double offset,   // of the weight
    Tensor out,      // [N, H]
    Tensor inverse,  // [N] fp32, or fp64 for fp64: what x was multiplied with
    int64_t instructions) {
  with_floating(x.scalar_type(), [&](auto type) {
    using Value = typename decltype(type)::type;
    using Sum = SumOf<Value>;
    const auto row_of = SOFTPROMPT_CHOSEN(instructions, normalise<Value, Sum>);
    const Dense<Value> from(x), to(out);
    const std::vector<Sum> scale = numbers_of<Sum>(weight, offset);
    Sum* factors = output_of<Sum>(inverse);
    const int64_t width = x.size(1);
    for_rows(x.size(0), width, [&](int64_t row) {
      factors[row] = row_of(from.at(row), scale.data(), width, eps, to.at(row));
    });
  });
}

void rms_norm_backward(
    Tensor grad,     // [N, H]
    Tensor x,        // [N, H]
    Tensor weight,   // [H]
    Tensor inverse,  // [N]
    double offset,
    Tensor d_x,  // [N, H]
    int64_t instructions) {
  with_floating(x.scalar_type(), [&](auto type) {
    using Value = typename decltype(type)::type;
    using Sum = SumOf<Value>;
    const auto row_of = SOFTPROMPT_CHOSEN(instructions, normalise_backward<Value, Sum>);
    const Dense<Value> given(grad), from(x), to(d_x);
    const std::vector<Sum> scale = numbers_of<Sum>(weight, offset);
    const Sum* factors = static_cast<const Sum*>(inverse.const_data_ptr());
    const int64_t width = x.size(1);
    for_rows(x.size(0), width, [&](int64_t row) {
      row_of(given.at(row), from.at(row), scale.data(), width, factors[row], to.at(row));
    });
  });
}

void glu(
    Tensor gate,  // [N, I]
    Tensor up,    // [N, I]
    int64_t activation,
    Tensor out,  // [N, I]
    int64_t instructions) {
  with_floating(gate.scalar_type(), [&](auto type) {
    using Value = typename decltype(type)::type;
    const auto row_of = SOFTPROMPT_CHOSEN(instructions, gate_row<Value, SumOf<Value>>);
    const Dense<Value> gates(gate), ups(up), to(out);
    const int64_t width = gate.size(1);
    for_rows(gate.size(0), width, [&](int64_t row) {
      row_of(activation, gates.at(row), ups.at(row), width, to.at(row));
    });
  });
}

void glu_backward(
    Tensor grad,  // [N, I]
    Tensor gate,  // [N, I]
    Tensor up,    // [N, I]
    int64_t activation,
    Tensor d_gate,  // [N, I]
    Tensor d_up,    // [N, I]
    int64_t instructions) {
  with_floating(gate.scalar_type(), [&](auto type) {
    using Value = typename decltype(type)::type;
    const auto row_of = SOFTPROMPT_CHOSEN(instructions, gate_row_backward<Value, SumOf<Value>>);
    const Dense<Value> given(grad), gates(gate), ups(up), to_gate(d_gate), to_up(d_up);
    const int64_t width = gate.size(1);
    for_rows(gate.size(0), width, [&](int64_t row) {
      row_of(activation, given.at(row), gates.at(row), ups.at(row), width, to_gate.at(row), to_up.at(row));
    });
  });
}

// Heads of dense vectors [N, heads, D].
template <class Value>
struct Heads {
  Value* data;
  int64_t row_stride, head_stride, count;

  explicit Heads(const Tensor& tensor)
      : data(static_cast<Value*>(const_cast<void*>(tensor.const_data_ptr()))),
        row_stride(tensor.stride(0)),
        head_stride(tensor.stride(1)),
        count(tensor.size(1)) {
    STD_TORCH_CHECK(
        tensor.dim() == 3 && (tensor.size(2) < 2 || tensor.stride(2) == 1), "expected heads of dense vectors");
  }

  Value* at(int64_t row, int64_t head) const {
    return data + row * row_stride + head * head_stride;
  }
};

void rotary(
    Tensor query,  // [N, Hq, D]
    Tensor key,    // [N, Hkv, D]
    Tensor cos,    // [N, R], in any floating dtype
    Tensor sin,    // [N, R], in the dtype of cos
    bool interleaved,
    bool transposed,   // by the negative angle, which is the gradient
    Tensor out_query,  // [N, Hq, D]
    Tensor out_key,    // [N, Hkv, D]
    int64_t instructions) {
  const int64_t num_rows = query.size(0), width = query.size(2), rotated = cos.size(1), half = rotated / 2;
  STD_TORCH_CHECK(rotated <= width && rotated % 2 == 0, "an even share of a head is rotated");
  with_floating(query.scalar_type(), [&](auto type) {
    using Value = typename decltype(type)::type;
    using Sum = SumOf<Value>;
    const auto row_of = SOFTPROMPT_CHOSEN(instructions, rotate_row<Value, Sum>);
    const Heads<Value> from[] = {Heads<Value>(query), Heads<Value>(key)};
    const Heads<Value> to[] = {Heads<Value>(out_query), Heads<Value>(out_key)};
    const auto with_angles = [&](int64_t begin, int64_t end, auto read) {
      std::vector<Sum> angles(2 * rotated);
      Sum *cosines = angles.data(), *sines = cosines + rotated;
      for (int64_t row = begin; row < end; ++row) {
        read(row, cosines, sines);
        for (int part = 0; part < 2; ++part) {
          for (int64_t head = 0; head < from[part].count; ++head) {
            row_of(from[part].at(row, head), cosines, sines, rotated, width, interleaved, to[part].at(row, head));
          }
        }
      }
    };
    with_floating(cos.scalar_type(), [&](auto angle) {
      using Angle = typename decltype(angle)::type;
      const Dense<Angle> cos_rows(cos), sin_rows(sin);
      const auto read = [&](int64_t row, Sum* cosines, Sum* sines) {
        for (int64_t i = 0; i < rotated; ++i) {
          // The number that it is paired with, whose sine the gradient takes.
          const int64_t other = interleaved ? i ^ 1 : (i < half ? i + half : i - half);
          cosines[i] = static_cast<Sum>(static_cast<SumOf<Angle>>(cos_rows.at(row)[i]));
          sines[i] = static_cast<Sum>(static_cast<SumOf<Angle>>(sin_rows.at(row)[transposed ? other : i]));
          if (transposed) sines[i] = -sines[i];
        }
      };
      const int64_t row_size = std::max<int64_t>(1, (from[0].count + from[1].count) * width);
      torch::stable::parallel_for(
          0, num_rows, std::max<int64_t>(1, kGrain / row_size),
          [&](int64_t begin, int64_t end) { with_angles(begin, end, read); });
    });
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(softprompt, CPU, library) {
  library.impl("native_rms_norm", TORCH_BOX(&rms_norm));
  library.impl("native_rms_norm_backward", TORCH_BOX(&rms_norm_backward));
  library.impl("native_glu", TORCH_BOX(&glu));
  library.impl("native_glu_backward", TORCH_BOX(&glu_backward));
  library.impl("native_rotary", TORCH_BOX(&rotary));
}

}  // namespace softprompt
