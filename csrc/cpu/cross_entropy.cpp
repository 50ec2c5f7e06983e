// The rows of linear_cross_entropy on a CPU: a row of logits becomes its loss and, in place, its gradient.
//
// A row is read twice and written once; where a row fits the second-level cache the second read comes from
// there. Rows are shared out to threads, and where there are fewer rows than threads, shares of rows.

#include <limits>

#include "lanes.h"

namespace softprompt {
namespace {

constexpr int64_t kBlock = 1024;  // columns that are loaded and transformed together
constexpr int64_t kPart = 128;    // columns that are summed in the narrow dtype; their sums are added in fp64

template <class Sum>
struct Options {
  Sum softcap;  // 0: none
  Sum logit_scale;
  Sum label_smoothing;
  Sum uniform;  // share of the target probability that every token gets
};

template <class Sum>
struct Sums {
  Sum maximum = std::numeric_limits<Sum>::lowest();
  double total = 0;
  double plain = 0;

  void add(const Sums& other) {
    const Sum largest = std::max(maximum, other.maximum);
    const auto share = [&](const Sums& sums) {
      return sums.total * std::exp(static_cast<double>(sums.maximum) - static_cast<double>(largest));
    };
    total = share(*this) + share(other);
    maximum = largest;
    plain += other.plain;
  }
};

namespace baseline {
#include "conversions.h"
#include "elementary.h"
#include "cross_entropy_rows.h"
}

#if defined(SOFTPROMPT_TARGETS)
#pragma GCC push_options
#pragma GCC target("avx2,fma")
namespace avx2 {
#include "conversions.h"
#include "elementary.h"
#include "cross_entropy_rows.h"
}
#pragma GCC pop_options
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,prefer-vector-width=512")
namespace avx512 {
#include "conversions.h"
#include "elementary.h"
#include "cross_entropy_rows.h"
}
#pragma GCC pop_options
#endif

template <class Logit, class Sum>
struct Passes {
  decltype(&baseline::sums_of<Logit, Sum>) sums_of = &baseline::sums_of<Logit, Sum>;
  decltype(&baseline::write_gradient<Logit, Sum>) write_gradient = &baseline::write_gradient<Logit, Sum>;

  Passes() {
#if defined(SOFTPROMPT_TARGETS)
    const Instructions instructions = instructions_of(static_cast<int64_t>(Instructions::kBest));
    if (instructions == Instructions::kAvx512) {
      sums_of = &avx512::sums_of<Logit, Sum>;
      write_gradient = &avx512::write_gradient<Logit, Sum>;
    } else if (instructions == Instructions::kAvx2) {
      sums_of = &avx2::sums_of<Logit, Sum>;
      write_gradient = &avx2::write_gradient<Logit, Sum>;
    }
#endif
  }
};

template <class Logit, class Sum>
class Rows {
 public:
  Rows(
      Logit* logits,  // [m, row_stride]
      int64_t row_stride,
      int64_t num_rows,
      int64_t vocab_size,
      const Sum* bias,  // [V] or nullptr
      const int64_t* targets,  // [m]
      Sum* losses,  // [m]
      const Sum* grad_losses,  // [m] or nullptr
      int64_t ignore_index,
      Options<Sum> options)
      : logits_(logits),
        row_stride_(row_stride),
        num_rows_(num_rows),
        vocab_size_(vocab_size),
        bias_(bias),
        targets_(targets),
        losses_(losses),
        grad_losses_(grad_losses),
        ignore_index_(ignore_index),
        options_(options) {}

  void run(bool gradient) const {
    const int64_t threads = torch::stable::get_num_threads();
    if (num_rows_ >= threads) {
      torch::stable::parallel_for(0, num_rows_, 1, [&](int64_t begin, int64_t end) {
        for (int64_t row = begin; row < end; ++row) {
          const Sums<Sum> sums = ignored(row) ? Sums<Sum>{} : sums_of(row, 0, vocab_size_);
          const Sum picked = target_logit(row);
          if (gradient) write_gradient(row, 0, vocab_size_, sums);
          write_loss(row, picked, sums);
        }
      });
      return;
    }
    const int64_t most = (vocab_size_ + kBlock - 1) / kBlock;
    const int64_t splits = std::max<int64_t>(1, std::min(most, threads / std::max<int64_t>(1, num_rows_)));
    const int64_t share = (most + splits - 1) / splits * kBlock;
    std::vector<Sums<Sum>> parts(num_rows_ * splits);
    const auto of_shares = [&](auto visit) {
      torch::stable::parallel_for(0, num_rows_ * splits, 1, [&](int64_t begin, int64_t end) {
        for (int64_t part = begin; part < end; ++part) {
          const int64_t row = part / splits, first = std::min(vocab_size_, part % splits * share);
          visit(part, row, first, std::min(vocab_size_, first + share));
        }
      });
    };
    of_shares([&](int64_t part, int64_t row, int64_t first, int64_t end) {
      if (!ignored(row)) parts[part] = sums_of(row, first, end);
    });
    std::vector<Sums<Sum>> sums(num_rows_);
    for (int64_t row = 0; row < num_rows_; ++row) {
      for (int64_t split = 0; split < splits; ++split) sums[row].add(parts[row * splits + split]);
      write_loss(row, target_logit(row), sums[row]);
    }
    if (gradient) {
      of_shares([&](int64_t, int64_t row, int64_t first, int64_t end) {
        write_gradient(row, first, end, sums[row]);
      });
    }
  }

 private:
  bool ignored(int64_t row) const {
    return targets_[row] == ignore_index_;
  }

  bool known(int64_t row) const {
    return targets_[row] >= 0 && targets_[row] < vocab_size_;
  }

  const Sum* bias_at(int64_t column) const {
    return bias_ == nullptr ? nullptr : bias_ + column;
  }

  Sums<Sum> sums_of(int64_t row, int64_t first, int64_t end) const {
    return passes_.sums_of(logits_ + row * row_stride_ + first, bias_at(first), end - first, options_);
  }

  // Read before the gradient takes its place.
  Sum target_logit(int64_t row) const {
    if (ignored(row) || !known(row)) return 0;
    Sum value;
    const int64_t target = targets_[row];
    baseline::load(logits_ + row * row_stride_ + target, bias_at(target), 1, options_, &value);
    return value;
  }

  void write_loss(int64_t row, Sum picked, const Sums<Sum>& sums) const {
    if (ignored(row)) {
      losses_[row] = 0;
      return;
    }
    if (!known(row)) {
      losses_[row] = std::numeric_limits<Sum>::quiet_NaN();
      return;
    }
    const double maximum = sums.maximum, smoothing = options_.label_smoothing;
    const double mean = sums.plain / static_cast<double>(vocab_size_);
    double loss = std::log(sums.total) + (1 - smoothing) * (maximum - static_cast<double>(picked));
    if (smoothing > 0) loss += smoothing * (maximum - mean);
    losses_[row] = static_cast<Sum>(loss);
  }

  void write_gradient(int64_t row, int64_t first, int64_t end, const Sums<Sum>& sums) const {
    Logit* to = logits_ + row * row_stride_;
    if (ignored(row)) {
      std::fill(to + first, to + end, Logit(0.0f));
      return;
    }
    const Sum factor = options_.logit_scale * (grad_losses_ == nullptr ? Sum(1) : grad_losses_[row]);
    const int64_t target = known(row) ? targets_[row] - first : -1;
    passes_.write_gradient(
        to + first, bias_at(first), end - first, target, sums.maximum, static_cast<Sum>(1 / sums.total), factor,
        options_);
  }

  Logit* logits_;
  int64_t row_stride_, num_rows_, vocab_size_;
  const Sum* bias_;
  const int64_t* targets_;
  Sum* losses_;
  const Sum* grad_losses_;
  int64_t ignore_index_;
  Options<Sum> options_;
  Passes<Logit, Sum> passes_;
};

template <class T>
const T* input_of(const std::optional<Tensor>& tensor) {
  if (!tensor.has_value()) return nullptr;
  STD_TORCH_CHECK(tensor->is_contiguous(), "bias, targets and factors have to be contiguous");
  return static_cast<const T*>(tensor->const_data_ptr());
}

void cross_entropy_rows(
    Tensor logits,                      // [m, V], dense rows, overwritten with the gradient
    std::optional<Tensor> bias,         // [V] in the dtype of the losses
    Tensor targets,                     // [m] int64
    Tensor losses,                      // [m] fp32, or fp64 for fp64 logits
    std::optional<Tensor> grad_losses,  // [m] in the dtype of the losses
    std::optional<double> softcap,
    double logit_scale,
    double label_smoothing,
    int64_t ignore_index,
    bool gradient) {
  const int64_t num_rows = logits.size(0), vocab_size = logits.size(1);
  STD_TORCH_CHECK(vocab_size > 0 && logits.stride(1) == 1, "rows of logits have to be dense");
  with_floating(logits.scalar_type(), [&](auto type) {
    using Logit = typename decltype(type)::type;
    using Sum = std::conditional_t<std::is_same_v<Logit, double>, double, float>;
    const bool wide = losses.scalar_type() == ScalarType::Double;
    STD_TORCH_CHECK((std::is_same_v<Sum, double>) == wide, "losses have to be fp32, or fp64 for fp64 logits");
    const Options<Sum> options{
        static_cast<Sum>(softcap.value_or(0)),
        static_cast<Sum>(logit_scale),
        static_cast<Sum>(label_smoothing),
        static_cast<Sum>(label_smoothing / static_cast<double>(vocab_size))};
    const Rows<Logit, Sum> rows(
        static_cast<Logit*>(logits.mutable_data_ptr()), logits.stride(0), num_rows, vocab_size,
        input_of<Sum>(bias), input_of<int64_t>(targets), output_of<Sum>(losses), input_of<Sum>(grad_losses),
        ignore_index, options);
    rows.run(gradient);
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(softprompt, CPU, library) {
  library.impl("native_cross_entropy_rows", TORCH_BOX(&cross_entropy_rows));
}

}  // namespace softprompt
