// The rows of linear_cross_entropy in one launch: a row of logits becomes its loss and, in place, its gradient.
//
// Many rows: a block each. Few rows: the blocks that fit on the chip share them, each block owns a share of one
// row, and the blocks wait for each other once (a cooperative launch), between the sums and the gradient.

#include <limits>

#include "rows.cuh"

namespace softprompt {
namespace {

constexpr int kThreads = 512;
constexpr int kWarps = kThreads / kWarp;

template <class Logit, class Sum>
struct Problem {
  Logit* logits;  // [m, row_stride]
  const Sum* bias;  // [V] or nullptr
  const int64_t* targets;  // [m]
  Sum* losses;  // [m]
  const Sum* grad_losses;  // [m] or nullptr
  Sum* partials;  // [m, splits, 3], of split rows
  int64_t row_stride, vocab_size, share, ignore_index;  // share: columns of a block, a multiple of a piece
  Sum softcap;  // 0: none
  Sum logit_scale, label_smoothing;
  bool pieces, gradient;  // pieces: rows and shares begin at multiples of 16 bytes
};

template <class Sum>
struct Sums {
  Sum maximum = std::numeric_limits<Sum>::lowest();
  Sum total = 0;  // of exponentials below the maximum
  Sum plain = 0;

  __device__ void add(const Sums& other) {
    const Sum largest = max(maximum, other.maximum);
    total = total * exp(maximum - largest) + other.total * exp(other.maximum - largest);
    maximum = largest;
    plain += other.plain;
  }
};

// Bias, scale and softcap of a logit.
template <class Logit, class Sum>
__device__ Sum transformed(const Problem<Logit, Sum>& p, Logit logit, int64_t column) {
  Sum value = static_cast<Sum>(logit);
  if (p.bias != nullptr) value += p.bias[column];
  value *= p.logit_scale;
  return p.softcap == 0 ? value : p.softcap * tanh(value / p.softcap);
}

// Calls visit(values, first column, count) for the columns first .. end of a row that are this thread's: 16
// bytes at a time where the row allows it, then what is left over one by one.
template <class Logit, class Visit>
__device__ void for_columns(Logit* row, bool pieces, int64_t first, int64_t end, Visit visit) {
  constexpr int kEntries = kPieceBytes / static_cast<int>(sizeof(Logit));
  int64_t start = first;
  if (pieces) {
    const int64_t count = (end - first) / kEntries;
    for (int64_t number = threadIdx.x; number < count; number += kThreads) {
      Piece<Logit, kEntries> piece;
      int4* place = reinterpret_cast<int4*>(row + first + number * kEntries);
      piece.whole = *place;
      if (visit(piece.entries, first + number * kEntries, kEntries)) *place = piece.whole;
    }
    start = first + count * kEntries;
  }
  for (int64_t column = start + threadIdx.x; column < end; column += kThreads) {
    Logit value = row[column];
    if (visit(&value, column, 1)) row[column] = value;
  }
}

// The sums of a block, in every thread. Always in the same order.
template <class Sum>
__device__ Sums<Sum> of_block(Sums<Sum> own) {
  __shared__ Sum shared[3 * kWarps];
  for (int lane = kWarp / 2; lane > 0; lane /= 2) {
    Sums<Sum> other;
    other.maximum = __shfl_xor_sync(kAllLanes, own.maximum, lane);
    other.total = __shfl_xor_sync(kAllLanes, own.total, lane);
    other.plain = __shfl_xor_sync(kAllLanes, own.plain, lane);
    own.add(other);
  }
  const int warp = threadIdx.x / kWarp;
  if (threadIdx.x % kWarp == 0) {
    shared[3 * warp] = own.maximum;
    shared[3 * warp + 1] = own.total;
    shared[3 * warp + 2] = own.plain;
  }
  __syncthreads();
  Sums<Sum> sums;
  for (int number = 0; number < kWarps; ++number) {
    Sums<Sum> other;
    other.maximum = shared[3 * number];
    other.total = shared[3 * number + 1];
    other.plain = shared[3 * number + 2];
    sums.add(other);
  }
  return sums;
}

template <class Logit, class Sum>
__device__ Sums<Sum> sums_of(const Problem<Logit, Sum>& p, Logit* row, int64_t first, int64_t end) {
  Sums<Sum> own;
  for_columns(row, p.pieces, first, end, [&](Logit* values, int64_t column, int count) {
    Sum logits[kPieceBytes / sizeof(Logit)];
    Sum largest = own.maximum;
    for (int entry = 0; entry < count; ++entry) {
      logits[entry] = transformed(p, values[entry], column + entry);
      largest = max(largest, logits[entry]);
    }
    own.total *= exp(own.maximum - largest);
    own.maximum = largest;
    for (int entry = 0; entry < count; ++entry) {
      own.total += exp(logits[entry] - largest);
      own.plain += logits[entry];
    }
    return false;
  });
  return of_block(own);
}

template <class Logit, class Sum>
__device__ void write_gradient(
    const Problem<Logit, Sum>& p, Logit* row, int64_t first, int64_t end, int64_t target, const Sums<Sum>& sums,
    Sum grad_loss) {
  const Sum factor = p.logit_scale * grad_loss, inverse = 1 / sums.total;
  const Sum uniform = p.label_smoothing / static_cast<Sum>(p.vocab_size), share = 1 - p.label_smoothing;
  for_columns(row, p.pieces, first, end, [&](Logit* values, int64_t column, int count) {
    for (int entry = 0; entry < count; ++entry) {
      const Sum logit = transformed(p, values[entry], column + entry);
      Sum gradient = exp(logit - sums.maximum) * inverse - uniform;
      if (column + entry == target) gradient -= share;
      if (p.softcap != 0) gradient *= 1 - (logit / p.softcap) * (logit / p.softcap);
      values[entry] = static_cast<Logit>(gradient * factor);
    }
    return true;
  });
}

// Grid: (rows, shares of a row). A block owns a share: it reads it twice (the second time mostly from the cache)
// and writes it once. An ignored row is only written.
template <class Logit, class Sum, bool kSplit>
__global__ void __launch_bounds__(kThreads) rows_loss_and_gradient(Problem<Logit, Sum> p) {
  const int64_t row = blockIdx.x, split = blockIdx.y;
  Logit* logits = p.logits + row * p.row_stride;
  const int64_t first = min(p.vocab_size, split * p.share), end = min(p.vocab_size, first + p.share);
  const int64_t target = p.targets[row];
  const bool ignored = target == p.ignore_index, known = target >= 0 && target < p.vocab_size;
  // Read before any block writes its gradient: every block of the row waits below.
  const Sum picked = !ignored && known ? transformed(p, logits[target], target) : Sum(0);

  Sums<Sum> sums;
  if (!ignored) sums = sums_of(p, logits, first, end);
  if constexpr (kSplit) {
    Sum* own = p.partials + (row * gridDim.y + split) * 3;
    if (threadIdx.x == 0) {
      own[0] = sums.maximum;
      own[1] = sums.total;
      own[2] = sums.plain;
    }
    sync_grid();
    sums = Sums<Sum>();
    for (int64_t number = 0; number < gridDim.y && !ignored; ++number) {
      const Sum* other = p.partials + (row * gridDim.y + number) * 3;
      Sums<Sum> part;
      part.maximum = other[0];
      part.total = other[1];
      part.plain = other[2];
      sums.add(part);
    }
  }
  if (split == 0 && threadIdx.x == 0) {
    Sum loss = (1 - p.label_smoothing) * (sums.maximum - picked) + log(sums.total);
    if (p.label_smoothing > 0) {
      loss += p.label_smoothing * (sums.maximum - sums.plain / static_cast<Sum>(p.vocab_size));
    }
    p.losses[row] = ignored ? Sum(0) : known ? loss : std::numeric_limits<Sum>::quiet_NaN();
  }
  if (!p.gradient) return;
  if (ignored) {
    for_columns(logits, p.pieces, first, end, [](Logit* values, int64_t, int count) {
      for (int entry = 0; entry < count; ++entry) values[entry] = static_cast<Logit>(0.0f);
      return true;
    });
    return;
  }
  const Sum grad_loss = p.grad_losses == nullptr ? Sum(1) : p.grad_losses[row];
  write_gradient(p, logits, first, end, known ? target : -1, sums, grad_loss);
}

template <class T>
const T* input_of(const std::optional<Tensor>& tensor) {
  if (!tensor.has_value()) return nullptr;
  STD_TORCH_CHECK(tensor->is_contiguous(), "bias, targets and factors have to be contiguous");
  return static_cast<const T*>(tensor->const_data_ptr());
}

template <class Logit, class Sum>
void run(Problem<Logit, Sum> problem, const Tensor& logits, const Tensor& losses) {
  const int64_t num_rows = logits.size(0), vocab_size = logits.size(1);
  const auto split_kernel = &rows_loss_and_gradient<Logit, Sum, true>;
  const int64_t resident = blocks_at_once(split_kernel, kThreads) * multiprocessors_of(logits);
  const int64_t round = kThreads * (kPieceBytes / static_cast<int64_t>(sizeof(Logit)));  // what a block reads at once
  const int64_t splits = std::min(resident / num_rows, (vocab_size + round - 1) / round);
  if (splits <= 1) {
    problem.share = vocab_size;
    launch(
        &rows_loss_and_gradient<Logit, Sum, false>, static_cast<unsigned>(num_rows), kThreads, logits, problem);
    return;
  }
  problem.share = (vocab_size + splits * round - 1) / (splits * round) * round;
  const int64_t used = (vocab_size + problem.share - 1) / problem.share;
  const Tensor partials = torch::stable::new_empty(losses, {num_rows, used, 3});
  problem.partials = output_of<Sum>(partials);
  const dim3 grid(static_cast<unsigned>(num_rows), static_cast<unsigned>(used));
  launch_together(split_kernel, grid, kThreads, logits, problem);
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
  const auto guard = on_device_of(logits);
  const int64_t num_rows = logits.size(0), vocab_size = logits.size(1);
  STD_TORCH_CHECK(vocab_size > 0 && logits.stride(1) == 1, "rows of logits have to be dense");
  if (num_rows == 0) return;
  with_floating(logits.scalar_type(), [&](auto type) {
    using Logit = typename decltype(type)::type;
    using Sum = std::conditional_t<std::is_same_v<Logit, double>, double, float>;
    const bool wide = losses.scalar_type() == ScalarType::Double;
    STD_TORCH_CHECK((std::is_same_v<Sum, double>) == wide, "losses have to be fp32, or fp64 for fp64 logits");
    Problem<Logit, Sum> problem{};
    problem.logits = static_cast<Logit*>(logits.mutable_data_ptr());
    problem.bias = input_of<Sum>(bias);
    problem.targets = input_of<int64_t>(targets);
    problem.losses = output_of<Sum>(losses);
    problem.grad_losses = input_of<Sum>(grad_losses);
    problem.row_stride = logits.stride(0);
    problem.vocab_size = vocab_size;
    problem.ignore_index = ignore_index;
    problem.softcap = static_cast<Sum>(softcap.value_or(0));
    problem.logit_scale = static_cast<Sum>(logit_scale);
    problem.label_smoothing = static_cast<Sum>(label_smoothing);
    problem.pieces = is_aligned(problem.logits) && logits.stride(0) * sizeof(Logit) % kPieceBytes == 0;
    problem.gradient = gradient;
    run(problem, logits, losses);
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(softprompt, CUDA, library) {
  library.impl("native_cross_entropy_rows", TORCH_BOX(&cross_entropy_rows));
}

}  // namespace softprompt
