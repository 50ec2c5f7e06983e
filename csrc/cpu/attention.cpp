// shared_prompt_attention on a CPU: each text attends to [its prompt | itself], each prompt to itself.
//
// The rows of a text are packed already, so keys and values are multiplied where they stand; only a transposed copy
// of the keys (backward: and of the values) is made, which all query heads of a key head and all texts of a prompt
// share. Scores of some queries at a time stay in the cache, and only as many keys are visited as the last of them
// sees. A key head and some segments are one task, without atomics: the sums depend on the number of threads only.

#include <limits>

#include "lanes.h"

namespace softprompt {
namespace {

constexpr int64_t kQueries = 24;                      // whose scores are computed together
constexpr int64_t kSumBytes = int64_t{64} << 20;  // of the prompts' gradients in all shares

// Heads of dense vectors: [heads, rows, width].
template <class Scalar>
struct Heads {
  const Scalar* data = nullptr;
  int64_t head = 0;  // strides
  int64_t row = 0;

  const Scalar* at(int64_t head_index, int64_t row_index) const {
    return data + head_index * head + row_index * row;
  }
};

template <class Scalar>
struct Problem {
  Heads<Scalar> query, key, value;
  int64_t num_heads, num_key_heads, num_rows, head_dim, value_dim;
  const int32_t* query_position;
  const int32_t* positions;
  const int32_t* key_position;
  const int32_t* branches;  // nullptr: none
  const Scalar* slopes;     // [Hq] or nullptr
  const Scalar* sinks;      // [Hq] or nullptr
  Scalar scale;
  Scalar softcap;  // 0: none
  int64_t window;  // 0: none
};

// A prompt or a text: its rows, and those of the prompt that it sees.
struct Segment {
  int64_t first, end;
  int64_t prompt;  // -1: sees none
  int64_t shared_first, shared_end;

  int64_t own() const {
    return end - first;
  }

  int64_t shared() const {
    return shared_end - shared_first;
  }
};

struct Segments {
  const int32_t* cu_prompts;
  int64_t num_prompts;
  const int32_t* cu_texts;
  int64_t num_texts;
  const int64_t* prompt_of_row;

  int64_t count() const {
    return num_prompts + num_texts;
  }

  Segment at(int64_t index) const {
    if (index < num_prompts) return {cu_prompts[index], cu_prompts[index + 1], -1, 0, 0};
    const int64_t text = index - num_prompts, prompt = prompt_of_row[text];
    return {cu_texts[text], cu_texts[text + 1], prompt, cu_prompts[prompt], cu_prompts[prompt + 1]};
  }
};

// What one thread does in one go. The sums are where it adds up the gradient of the prompts' keys and values.
template <class Scalar>
struct Task {
  int64_t key_head;
  int64_t first, end;  // segments
  Scalar* key_sums = nullptr;    // [ΣP, D] at the strides below
  Scalar* value_sums = nullptr;  // [ΣP, Dv]
  int64_t key_row = 0, value_row = 0;
};

template <class Scalar>
struct Gradients {
  Heads<Scalar> outputs;  // of the forward
  Heads<Scalar> out;      // their gradient
  const Scalar* lse;      // [Hq, T]
  Scalar* delta;          // [Hq, T] the sums of outputs * out
  Scalar* query;          // [T, Hq, D]
  Scalar* key;            // [T, Hkv, D]
  Scalar* value;          // [T, Hkv, Dv]
};

namespace baseline {
constexpr int kVectorBytes = 16, kTileRows = 3, kTileColumns = 4;
#include "products.h"
#include "elementary.h"
#include "attention.h"
}  // namespace baseline

#if defined(SOFTPROMPT_TARGETS)
#pragma GCC push_options
#pragma GCC target("avx2,fma")
namespace avx2 {
constexpr int kVectorBytes = 32, kTileRows = 3, kTileColumns = 4;
#include "products.h"
#include "elementary.h"
#include "attention.h"
}  // namespace avx2
#pragma GCC pop_options
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,prefer-vector-width=512")
namespace avx512 {
constexpr int kVectorBytes = 64, kTileRows = 6, kTileColumns = 4;
#include "products.h"
#include "elementary.h"
#include "attention.h"
}  // namespace avx512
#pragma GCC pop_options
#endif

template <class Scalar>
struct Passes {
  decltype(&baseline::attend<Scalar>) attend = &baseline::attend<Scalar>;
  decltype(&baseline::attend_backward<Scalar>) attend_backward = &baseline::attend_backward<Scalar>;
};

template <class Scalar>
Passes<Scalar> passes_of(int64_t instructions) {
  switch (instructions_of(instructions)) {
#if defined(SOFTPROMPT_TARGETS)
    case Instructions::kAvx512:
      return {&avx512::attend<Scalar>, &avx512::attend_backward<Scalar>};
    case Instructions::kAvx2:
      return {&avx2::attend<Scalar>, &avx2::attend_backward<Scalar>};
#endif
    default:
      return {};
  }
}

template <class Scalar>
Heads<Scalar> heads_of(const Tensor& tensor) {
  STD_TORCH_CHECK(
      tensor.dim() == 3 && (tensor.size(2) < 2 || tensor.stride(2) == 1), "expected heads of dense vectors");
  return {static_cast<const Scalar*>(tensor.const_data_ptr()), tensor.stride(0), tensor.stride(1)};
}

template <class T>
const T* values_of(const Tensor& tensor) {
  STD_TORCH_CHECK(tensor.is_contiguous(), "vectors have to be contiguous");
  return static_cast<const T*>(tensor.const_data_ptr());
}

template <class T>
const T* values_of(const std::optional<Tensor>& tensor) {
  return tensor.has_value() ? values_of<T>(*tensor) : nullptr;
}

// What forward and backward have in common.
template <class Scalar>
struct Call {
  Problem<Scalar> problem;
  Segments segments;
  int64_t first_dummy;

  int64_t prompt_rows() const {
    return segments.cu_prompts[segments.num_prompts];
  }

  // Of the sums of one share.
  int64_t bytes_of_sums() const {
    const int64_t width = problem.head_dim + problem.value_dim;
    return problem.num_key_heads * prompt_rows() * width * static_cast<int64_t>(sizeof(Scalar));
  }

  // Shares of the segments, of about as many (query, key) pairs each: key heads alone may be fewer than threads. No
  // more than `allowed`.
  std::vector<int64_t> shares(int64_t allowed) const {
    const int64_t threads = torch::stable::get_num_threads(), heads = std::max<int64_t>(1, problem.num_key_heads);
    const int64_t wanted = std::min((2 * threads + heads - 1) / heads, allowed);
    const int64_t most = std::max<int64_t>(1, std::min(segments.count(), wanted));
    std::vector<int64_t> pairs{0};
    for (int64_t index = 0; index < segments.count(); ++index) {
      const Segment segment = segments.at(index);
      const int64_t keys = segment.shared() + segment.own();
      const int64_t seen = problem.window == 0 ? keys : std::min(keys, problem.window + std::min(keys, kQueries));
      pairs.push_back(pairs.back() + segment.own() * seen + 1);
    }
    std::vector<int64_t> bounds{0};
    for (int64_t share = 1; share < most; ++share) {
      const auto place = std::lower_bound(pairs.begin(), pairs.end(), pairs.back() * share / most);
      bounds.push_back(std::max<int64_t>(bounds.back(), place - pairs.begin()));
    }
    bounds.push_back(segments.count());
    return bounds;
  }

  // Calls `visit(key_head, share, first segment, end)` for all tasks, on all threads.
  template <class Visit>
  void for_tasks(const std::vector<int64_t>& bounds, Visit visit) const {
    const int64_t count = static_cast<int64_t>(bounds.size()) - 1;
    torch::stable::parallel_for(0, problem.num_key_heads * count, 1, [&](int64_t begin, int64_t end) {
      for (int64_t task = begin; task < end; ++task) {
        const int64_t share = task % count;
        visit(task / count, share, bounds[share], bounds[share + 1]);
      }
    });
  }
};

template <class Scalar>
Call<Scalar> call_of(
    const Tensor& query, const Tensor& key, const Tensor& value, const Tensor& query_position, const Tensor& position_ids,
    const Tensor& key_position, const Tensor& cu_prompts, const Tensor& cu_texts, const Tensor& prompt_of_row,
    double scale, std::optional<int64_t> sliding_window, std::optional<double> softcap,
    const std::optional<Tensor>& alibi_slopes, const std::optional<Tensor>& sinks,
    const std::optional<Tensor>& branches) {
  const Problem<Scalar> problem{
      heads_of<Scalar>(query), heads_of<Scalar>(key), heads_of<Scalar>(value),
      query.size(0), key.size(0), query.size(1), query.size(2), value.size(2),
      values_of<int32_t>(query_position), values_of<int32_t>(position_ids), values_of<int32_t>(key_position),
      values_of<int32_t>(branches), values_of<Scalar>(alibi_slopes), values_of<Scalar>(sinks),
      static_cast<Scalar>(scale), static_cast<Scalar>(softcap.value_or(0)), sliding_window.value_or(0)};
  const Segments segments{
      values_of<int32_t>(cu_prompts), cu_prompts.size(0) - 1, values_of<int32_t>(cu_texts), cu_texts.size(0) - 1,
      values_of<int64_t>(prompt_of_row)};
  const int64_t first_dummy = segments.cu_texts[segments.num_texts];
  STD_TORCH_CHECK(
      key.size(1) == problem.num_rows && value.size(1) == problem.num_rows && first_dummy <= problem.num_rows &&
          prompt_of_row.size(0) == segments.num_texts,
      "sizes do not fit");
  return {problem, segments, first_dummy};
}

template <class Function>
void with_fp32_or_fp64(const Tensor& tensor, Function function) {
  const ScalarType dtype = tensor.scalar_type();
  if (dtype == ScalarType::Float) return function(Type<float>{});
  if (dtype == ScalarType::Double) return function(Type<double>{});
  STD_TORCH_CHECK(false, "expected fp32 or fp64, got scalar type ", static_cast<int>(dtype));
}

void shared_prompt_attention(
    Tensor query,          // [Hq, T, D] fp32 or fp64, dense vectors
    Tensor key,            // [Hkv, T, D]
    Tensor value,          // [Hkv, T, Dv]
    Tensor query_position,          // [T] int32, as the next two
    Tensor position_ids,
    Tensor key_position,
    Tensor cu_prompts,     // [K + 1] int32
    Tensor cu_texts,       // [B + 1] int32
    Tensor prompt_of_row,  // [B] int64
    double scale,
    std::optional<int64_t> sliding_window,
    std::optional<double> softcap,
    std::optional<Tensor> alibi_slopes,  // [Hq] in the dtype of query, as sinks
    std::optional<Tensor> sinks,
    std::optional<Tensor> branches,  // [T] int32
    Tensor out,                      // [T, Hq, Dv]
    Tensor lse,                      // [Hq, T]
    int64_t instructions) {
  with_fp32_or_fp64(query, [&](auto type) {
    using Scalar = typename decltype(type)::type;
    const Call<Scalar> call = call_of<Scalar>(
        query, key, value, query_position, position_ids, key_position, cu_prompts, cu_texts, prompt_of_row, scale, sliding_window,
        softcap, alibi_slopes, sinks, branches);
    const Problem<Scalar>& problem = call.problem;
    const Passes<Scalar> passes = passes_of<Scalar>(instructions);
    Scalar* to = output_of<Scalar>(out);
    Scalar* sums = output_of<Scalar>(lse);
    call.for_tasks(call.shares(call.segments.count()), [&](int64_t key_head, int64_t, int64_t first, int64_t end) {
      passes.attend(problem, call.segments, {key_head, first, end}, to, sums);
    });
    // A dummy sees only itself: its output is its value, in which a sink, however large, has no share.
    const int64_t group = problem.num_heads / problem.num_key_heads;
    for (int64_t row = call.first_dummy; row < problem.num_rows; ++row) {
      for (int64_t head = 0; head < problem.num_heads; ++head) {
        sums[head * problem.num_rows + row] = std::numeric_limits<Scalar>::infinity();
        std::copy_n(
            problem.value.at(head / group, row), problem.value_dim,
            to + (row * problem.num_heads + head) * problem.value_dim);
      }
    }
  });
}

void shared_prompt_attention_backward(
    Tensor grad_out,  // [Hq, T, Dv], dense vectors
    Tensor query,
    Tensor key,
    Tensor value,
    Tensor out,  // [Hq, T, Dv]
    Tensor lse,  // [Hq, T]
    Tensor query_position,
    Tensor position_ids,
    Tensor key_position,
    Tensor cu_prompts,
    Tensor cu_texts,
    Tensor prompt_of_row,
    double scale,
    std::optional<int64_t> sliding_window,
    std::optional<double> softcap,
    std::optional<Tensor> alibi_slopes,
    std::optional<Tensor> sinks,
    std::optional<Tensor> branches,
    Tensor grad_query,  // [T, Hq, D]
    Tensor grad_key,    // [T, Hkv, D]
    Tensor grad_value,  // [T, Hkv, Dv]
    Tensor delta,       // [Hq, T] sum of out * grad_out
    int64_t instructions) {
  with_fp32_or_fp64(query, [&](auto type) {
    using Scalar = typename decltype(type)::type;
    const Call<Scalar> call = call_of<Scalar>(
        query, key, value, query_position, position_ids, key_position, cu_prompts, cu_texts, prompt_of_row, scale, sliding_window,
        softcap, alibi_slopes, sinks, branches);
    const Problem<Scalar>& problem = call.problem;
    const Passes<Scalar> passes = passes_of<Scalar>(instructions);
    const Gradients<Scalar> gradients{
        heads_of<Scalar>(out), heads_of<Scalar>(grad_out), values_of<Scalar>(lse), output_of<Scalar>(delta),
        output_of<Scalar>(grad_query), output_of<Scalar>(grad_key), output_of<Scalar>(grad_value)};
    const int64_t heads = problem.num_key_heads, key_dim = problem.head_dim, value_dim = problem.value_dim;
    const int64_t prompt_rows = call.prompt_rows(), width = key_dim + value_dim;
    const std::vector<int64_t> bounds = call.shares(kSumBytes / std::max<int64_t>(1, call.bytes_of_sums()));
    const int64_t shares = static_cast<int64_t>(bounds.size()) - 1;
    // One share adds to the gradients themselves, to which its prompts have added before; several have sums of their
    // own, which are added in a fixed order.
    std::vector<Scalar> sums(shares > 1 ? shares * heads * prompt_rows * width : 0);
    call.for_tasks(bounds, [&](int64_t key_head, int64_t share, int64_t first, int64_t end) {
      Task<Scalar> task{key_head, first, end};
      if (shares == 1) {
        task.key_sums = gradients.key + key_head * key_dim;
        task.value_sums = gradients.value + key_head * value_dim;
        task.key_row = heads * key_dim;
        task.value_row = heads * value_dim;
      } else {
        task.key_sums = sums.data() + (share * heads + key_head) * prompt_rows * width;
        task.value_sums = task.key_sums + key_dim;
        task.key_row = task.value_row = width;
      }
      passes.attend_backward(problem, call.segments, task, gradients);
    });
    torch::stable::parallel_for(0, shares > 1 ? heads : 0, 1, [&](int64_t begin, int64_t end) {
      for (int64_t head = begin; head < end; ++head) {
        for (int64_t share = 0; share < shares; ++share) {
          const Scalar* from = sums.data() + (share * heads + head) * prompt_rows * width;
          for (int64_t row = 0; row < prompt_rows; ++row, from += width) {
            Scalar* d_key = gradients.key + (row * heads + head) * key_dim;
            Scalar* d_value = gradients.value + (row * heads + head) * value_dim;
            for (int64_t d = 0; d < key_dim; ++d) d_key[d] += from[d];
            for (int64_t d = 0; d < value_dim; ++d) d_value[d] += from[key_dim + d];
          }
        }
      }
    });
    const int64_t group = problem.num_heads / heads;
    for (int64_t row = call.first_dummy; row < problem.num_rows; ++row) {
      std::fill_n(gradients.query + row * problem.num_heads * key_dim, problem.num_heads * key_dim, Scalar(0));
      std::fill_n(gradients.key + row * heads * key_dim, heads * key_dim, Scalar(0));
      std::fill_n(gradients.value + row * heads * value_dim, heads * value_dim, Scalar(0));
      for (int64_t head = 0; head < problem.num_heads; ++head) {
        gradients.delta[head * problem.num_rows + row] = 0;
        Scalar* to = gradients.value + (row * heads + head / group) * value_dim;
        for (int64_t d = 0; d < value_dim; ++d) to[d] += gradients.out.at(head, row)[d];
      }
    }
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(softprompt, CPU, library) {
  library.impl("native_shared_prompt_attention", TORCH_BOX(&shared_prompt_attention));
  library.impl("native_shared_prompt_attention_backward", TORCH_BOX(&shared_prompt_attention_backward));
}

}  // namespace softprompt
