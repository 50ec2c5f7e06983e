// Products of a few rows with a large fp32 matrix on a CPU, which BLAS leaves slower than memory and arithmetic allow:
// the label rows of a batch and the frozen head.

#include "lanes.h"

namespace softprompt {
namespace {

constexpr int64_t kBlockBytes = int64_t{128} << 10;    // of weights: two blocks fit the second-level cache
constexpr int64_t kSummedWeights = 64;                 // in registers; a tile's share of them fits the first-level cache
constexpr int64_t kSummed = 64 * kSummedWeights;       // before they are added to the total
constexpr int64_t kPartialBytes = int64_t{64} << 20;   // of all threads' sums
constexpr int64_t kSmallestShare = int64_t{1} << 18;   // multiplications that are worth a thread

// Dense rows at any distance from each other.
struct Rows {
  const float* data;
  int64_t stride;
  int64_t count;

  const float* at(int64_t row) const {
    return data + row * stride;
  }
};

inline int64_t weights_of_a_block(int64_t width, int64_t multiple) {
  const int64_t fitting = kBlockBytes / (std::max<int64_t>(1, width) * static_cast<int64_t>(sizeof(float)));
  return std::max(multiple, fitting / multiple * multiple);
}

// A tile's sums and what they are made of fit the registers: 16 of them, or 32 with AVX-512.
namespace baseline {
constexpr int kVectorBytes = 16, kTileRows = 3, kTileColumns = 4;
#include "products.h"
#include "few_rows.h"
}  // namespace baseline

#if defined(SOFTPROMPT_TARGETS)
#pragma GCC push_options
#pragma GCC target("avx2,fma")
namespace avx2 {
constexpr int kVectorBytes = 32, kTileRows = 3, kTileColumns = 4;
#include "products.h"
#include "few_rows.h"
}  // namespace avx2
#pragma GCC pop_options
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,prefer-vector-width=512")
namespace avx512 {
constexpr int kVectorBytes = 64, kTileRows = 6, kTileColumns = 4;
#include "products.h"
#include "few_rows.h"
}  // namespace avx512
#pragma GCC pop_options
#endif

struct Products {
  decltype(&baseline::dot_rows) dot_rows = &baseline::dot_rows;
  decltype(&baseline::add_weighted) add_weighted = &baseline::add_weighted;
};

Products products_of(int64_t instructions) {
  switch (instructions_of(instructions)) {
#if defined(SOFTPROMPT_TARGETS)
    case Instructions::kAvx512:
      return {&avx512::dot_rows, &avx512::add_weighted};
    case Instructions::kAvx2:
      return {&avx2::dot_rows, &avx2::add_weighted};
#endif
    default:
      return {};
  }
}

Rows rows_of(const Tensor& tensor) {
  STD_TORCH_CHECK(
      tensor.dim() == 2 && tensor.scalar_type() == ScalarType::Float && (tensor.size(1) < 2 || tensor.stride(1) == 1),
      "expected a matrix of dense fp32 rows");
  return {static_cast<const float*>(tensor.const_data_ptr()), tensor.stride(0), tensor.size(0)};
}

// Into how many shares of the vocabulary the work is split: one for each thread, as far as that pays.
int64_t shares_of(int64_t num_rows, int64_t vocab_size, int64_t width) {
  const int64_t products = num_rows * vocab_size * width;
  const int64_t most = std::max<int64_t>(1, std::min(vocab_size, products / kSmallestShare));
  return std::min<int64_t>(torch::stable::get_num_threads(), most);
}

void few_rows_logits(
    Tensor rows,      // [m, H] fp32, dense rows
    Tensor weight,    // [V, H] fp32, dense rows
    Tensor logits,    // [m, V] fp32, dense rows: rows @ weight.T
    int64_t instructions) {
  const Rows from = rows_of(rows), weights = rows_of(weight), out = rows_of(logits);
  const int64_t width = weight.size(1), vocab_size = weights.count;
  STD_TORCH_CHECK(
      rows.size(1) == width && out.count == from.count && logits.size(1) == vocab_size, "sizes do not fit");
  float* to = static_cast<float*>(logits.mutable_data_ptr());
  const Products products = products_of(instructions);
  const int64_t shares = shares_of(from.count, vocab_size, width);
  torch::stable::parallel_for(0, shares, 1, [&](int64_t begin, int64_t end) {
    for (int64_t share = begin; share < end; ++share) {
      const int64_t first = vocab_size * share / shares, last = vocab_size * (share + 1) / shares;
      products.dot_rows(from, {weights.at(first), weights.stride, last - first}, width, to + first, out.stride);
    }
  });
}

void few_rows_d_rows(
    Tensor d_logits,  // [m, V] fp32, dense rows
    Tensor weight,    // [V, H] fp32, dense rows
    Tensor d_rows,    // [m, H] fp32, contiguous: d_logits @ weight
    int64_t instructions) {
  const Rows factors = rows_of(d_logits), weights = rows_of(weight);
  const int64_t width = weight.size(1), vocab_size = weights.count, size = factors.count * width;
  STD_TORCH_CHECK(
      d_logits.size(1) == vocab_size && d_rows.size(0) == factors.count && d_rows.size(1) == width,
      "sizes do not fit");
  float* to = output_of<float>(d_rows);
  const Products products = products_of(instructions);
  const int64_t fitting = kPartialBytes / (2 * static_cast<int64_t>(sizeof(float)) * std::max<int64_t>(1, size));
  const int64_t shares = std::min(shares_of(factors.count, vocab_size, width), std::max<int64_t>(1, fitting));
  std::vector<float> totals(shares * size);
  torch::stable::parallel_for(0, shares, 1, [&](int64_t begin, int64_t end) {
    std::vector<float> sums(size);
    for (int64_t share = begin; share < end; ++share) {
      float* total = totals.data() + share * size;
      const int64_t last = vocab_size * (share + 1) / shares;
      for (int64_t first = vocab_size * share / shares; first < last; first += kSummed) {
        std::fill(sums.begin(), sums.end(), 0.0f);
        products.add_weighted(factors, weights, first, std::min(first + kSummed, last), width, sums.data());
        for (int64_t i = 0; i < size; ++i) total[i] += sums[i];
      }
    }
  });
  for (int64_t i = 0; i < size; ++i) {
    float total = 0;
    for (int64_t share = 0; share < shares; ++share) total += totals[share * size + i];
    to[i] = total;
  }
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(softprompt, CPU, library) {
  library.impl("native_few_rows_logits", TORCH_BOX(&few_rows_logits));
  library.impl("native_few_rows_d_rows", TORCH_BOX(&few_rows_d_rows));
}

}  // namespace softprompt
