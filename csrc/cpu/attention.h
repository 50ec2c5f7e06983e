// Forward and backward of one key head and some segments. Included once for each instruction set, behind products.h
// and elementary.h.

// The keys that the rows of one segment see: those of its prompt, then its own. Their vectors stand in columns, so
// that neighbouring keys are neighbouring numbers.
template <class Scalar>
class Keys {
 public:
  Keys(const Problem<Scalar>& problem, const Segments& segments, int64_t first, int64_t end)
      : problem_(problem), stride_(1) {
    for (int64_t index = first; index < end; ++index) {
      const Segment segment = segments.at(index);
      stride_ = std::max(stride_, padded(segment.shared() + segment.own()));
    }
    slots.resize(stride_, kMaskedKey);
    positions.resize(stride_);
    branches.resize(stride_);
  }

  static int64_t padded(int64_t count) {
    return (count + kLanes<Scalar> - 1) / kLanes<Scalar> * kLanes<Scalar>;
  }

  int64_t stride() const {
    return stride_;
  }

  // Gathers what the segment sees of keys and, for the backward, of values. Returns nothing new for a prompt that
  // the segment before saw, too.
  void gather(int64_t key_head, const Segment& segment, bool with_values) {
    if (segment.prompt != prompt_ || key_head != key_head_) {
      column(key_head, segment.shared_first, segment.shared(), 0, with_values);
      prompt_ = segment.prompt;
      key_head_ = key_head;
    }
    column(key_head, segment.first, segment.own(), segment.shared(), with_values);
    const int64_t count = segment.shared() + segment.own();
    for (int64_t place = count; place < padded(count); ++place) {
      slots[place] = kMaskedKey;
      positions[place] = 0;
      branches[place] = 0;
      for (int64_t d = 0; d < problem_.head_dim; ++d) keys[d * stride_ + place] = 0;
      for (int64_t d = 0; with_values && d < problem_.value_dim; ++d) values[d * stride_ + place] = 0;
    }
  }

  // How many of the first `count` keys, from the first one on, the window hides from all these rows: whole vectors.
  int64_t hidden(int64_t first_row, int64_t end_row, int64_t count) const {
    if (problem_.window == 0) return 0;
    const int32_t slot = *std::min_element(problem_.query_position + first_row, problem_.query_position + end_row);
    const int64_t oldest = int64_t{slot} - problem_.window + 1;
    int64_t place = 0;
    while (place < count && slots[place] < oldest) ++place;
    return place / kLanes<Scalar> * kLanes<Scalar>;
  }

  std::vector<int32_t> slots, positions, branches;  // [stride]
  std::vector<Scalar> keys, values;                 // [D, stride] and [Dv, stride]

 private:
  void column(int64_t key_head, int64_t row, int64_t count, int64_t place, bool with_values) {
    for (int64_t i = 0; i < count; ++i) {
      slots[place + i] = problem_.key_position[row + i];
      positions[place + i] = problem_.positions[row + i];
      branches[place + i] = problem_.branches == nullptr ? 0 : problem_.branches[row + i];
    }
    transpose(problem_.key.at(key_head, row), problem_.key.row, problem_.head_dim, count, place, keys);
    if (with_values) {
      transpose(problem_.value.at(key_head, row), problem_.value.row, problem_.value_dim, count, place, values);
    }
  }

  void transpose(
      const Scalar* from, int64_t row, int64_t width, int64_t count, int64_t place, std::vector<Scalar>& to) const {
    to.resize(width * stride_);
    constexpr int64_t kTogether = 16;
    for (int64_t first = 0; first < count; first += kTogether) {
      const int64_t last = std::min(first + kTogether, count);
      for (int64_t d = 0; d < width; ++d) {
        Scalar* out = to.data() + d * stride_ + place;
        for (int64_t i = first; i < last; ++i) out[i] = from[i * row + d];
      }
    }
  }

  const Problem<Scalar>& problem_;
  int64_t stride_;
  int64_t prompt_ = -1, key_head_ = -1;
};

// Which of the keys of a segment a block of its rows is multiplied with: all but the `hidden` first ones.
struct SeenKeys {
  int64_t hidden, prompt_first, prompt, own_first, own;

  SeenKeys(const Segment& segment, int64_t end_row, int64_t hidden)
      : hidden(hidden),
        prompt_first(std::min(hidden, segment.shared())),
        prompt(segment.shared() - prompt_first),
        own_first(hidden - prompt_first),
        own(end_row - segment.first - own_first) {}
};

template <class Scalar>
inline Factors<Scalar> factors_of(const Heads<Scalar>& heads, int64_t head, int64_t row) {
  return {heads.at(head, row), heads.row, 1};
}

template <class Scalar>
inline Scalar dot(const Scalar* a, const Scalar* b, int64_t count) {
  Scalar sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < count; ++i) sum += a[i] * b[i];
  return sum;
}

// Turns one row of products, with the keys from `first` on, into scores, minus infinity where a key is not seen. `bend`
// takes the derivative of the softcap, if there is one.
template <class Scalar>
inline void finish_scores(
    const Problem<Scalar>& problem, const Keys<Scalar>& keys, int64_t head, int64_t row, int64_t first, int64_t count,
    Scalar* scores, Scalar* bend) {
  const Scalar scale = problem.scale;
  for (int64_t i = 0; i < count; ++i) scores[i] *= scale;
  if (problem.softcap != 0) {
    const Scalar softcap = problem.softcap, inverse = 1 / softcap;
#pragma omp simd
    for (int64_t i = 0; i < count; ++i) {
      const Scalar bounded = tanh_of(scores[i] * inverse);
      scores[i] = softcap * bounded;
      bend[i] = 1 - bounded * bounded;
    }
  }
  if (problem.slopes != nullptr) {
    const Scalar slope = problem.slopes[head];
    const int32_t* positions = keys.positions.data() + first;
    const int32_t position = problem.positions[row];
    for (int64_t i = 0; i < count; ++i) scores[i] += slope * static_cast<Scalar>(positions[i] - position);
  }
  constexpr Scalar kHidden = -std::numeric_limits<Scalar>::infinity();
  const int32_t* slots = keys.slots.data() + first;
  const int32_t slot = problem.query_position[row];
  // The oldest slot that a window leaves; the difference is an int64, because slots may be anything.
  const int64_t oldest = problem.window == 0 ? std::numeric_limits<int32_t>::min() : int64_t{slot} - problem.window + 1;
  const int32_t lowest = static_cast<int32_t>(std::max<int64_t>(oldest, std::numeric_limits<int32_t>::min()));
  for (int64_t i = 0; i < count; ++i) scores[i] = slots[i] <= slot && slots[i] >= lowest ? scores[i] : kHidden;
  if (problem.branches != nullptr) {
    const int32_t* branches = keys.branches.data() + first;
    const int32_t branch = problem.branches[row];
    for (int64_t i = 0; i < count; ++i) {
      scores[i] = branches[i] == 0 || branches[i] == branch ? scores[i] : kHidden;
    }
  }
}

// Overwrites scores with exp(score - maximum) and returns their log-sum-exp, the sink's share in it; plus infinity
// where nothing is seen. `inverse` is what the exponentials have to be multiplied with.
template <class Scalar>
inline Scalar exponentials(Scalar* scores, int64_t count, const Scalar* sink, Scalar& inverse) {
  constexpr Scalar kNothing = -std::numeric_limits<Scalar>::infinity();
  Scalar largest = kNothing;
#pragma omp simd reduction(max : largest)
  for (int64_t i = 0; i < count; ++i) largest = scores[i] > largest ? scores[i] : largest;
  if (largest == kNothing) {
    // Not a number is larger than nothing, and has to stay visible.
    Scalar sum = 0;
    for (int64_t i = 0; i < count; ++i) {
      scores[i] = scores[i] == kNothing ? 0 : scores[i];
      sum += scores[i];
    }
    inverse = sum == sum ? Scalar(0) : sum;
    return std::numeric_limits<Scalar>::infinity();
  }
  if (sink != nullptr) largest = std::max(largest, *sink);
  Scalar sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < count; ++i) {
    const Scalar value = exp_of(scores[i] - largest);
    scores[i] = value;
    sum += value;
  }
  if (sink != nullptr) sum += std::exp(*sink - largest);
  inverse = 1 / sum;
  return largest + std::log(sum);
}

template <class Scalar>
void attend(const Problem<Scalar>& problem, const Segments& segments, const Task<Scalar>& task, Scalar* out, Scalar* lse) {
  Keys<Scalar> keys(problem, segments, task.first, task.end);
  const int64_t group = problem.num_heads / problem.num_key_heads, out_row = problem.num_heads * problem.value_dim;
  std::vector<Scalar> scores(kQueries * keys.stride()), bend(keys.stride());
  for (int64_t index = task.first; index < task.end; ++index) {
    const Segment segment = segments.at(index);
    if (segment.own() == 0) continue;
    keys.gather(task.key_head, segment, false);
    for (int64_t head = task.key_head * group; head < (task.key_head + 1) * group; ++head) {
      const Scalar* sink = problem.sinks == nullptr ? nullptr : problem.sinks + head;
      for (int64_t first = segment.first; first < segment.end; first += kQueries) {
        const int64_t last = std::min(first + kQueries, segment.end), count = last - first;
        const int64_t visible = segment.shared() + last - segment.first;
        const SeenKeys seen(segment, last, keys.hidden(first, last, visible));
        const int64_t width = Keys<Scalar>::padded(visible) - seen.hidden;
        multiply(
            factors_of(problem.query, head, first), keys.keys.data() + seen.hidden, keys.stride(), count, width,
            problem.head_dim, scores.data(), keys.stride(), false);
        Scalar inverse[kQueries];
        for (int64_t row = first; row < last; ++row) {
          Scalar* own_scores = scores.data() + (row - first) * keys.stride();
          finish_scores(problem, keys, head, row, seen.hidden, width, own_scores, bend.data());
          lse[head * problem.num_rows + row] = exponentials(own_scores, width, sink, inverse[row - first]);
        }
        Scalar* to = out + first * out_row + head * problem.value_dim;
        const Factors<Scalar> of_prompt{scores.data(), keys.stride(), 1};
        multiply(
            of_prompt, problem.value.at(task.key_head, segment.shared_first + seen.prompt_first), problem.value.row,
            count, problem.value_dim, seen.prompt, to, out_row, false);
        multiply(
            of_prompt.at(0, seen.prompt), problem.value.at(task.key_head, segment.first + seen.own_first),
            problem.value.row, count, problem.value_dim, seen.own, to, out_row, true);
        for (int64_t row = 0; row < count; ++row) {
          for (int64_t d = 0; d < problem.value_dim; ++d) to[row * out_row + d] *= inverse[row];
        }
      }
    }
  }
}

template <class Scalar>
void attend_backward(
    const Problem<Scalar>& problem, const Segments& segments, const Task<Scalar>& task, const Gradients<Scalar>& gradients) {
  Keys<Scalar> keys(problem, segments, task.first, task.end);
  const int64_t group = problem.num_heads / problem.num_key_heads;
  const int64_t head_dim = problem.head_dim, value_dim = problem.value_dim, stride = keys.stride();
  const int64_t query_row = problem.num_heads * head_dim, key_row = problem.num_key_heads * head_dim;
  const int64_t value_row = problem.num_key_heads * value_dim;
  std::vector<Scalar> probabilities(kQueries * stride), products(kQueries * stride), bend(stride);
  for (int64_t index = task.first; index < task.end; ++index) {
    const Segment segment = segments.at(index);
    if (segment.own() == 0) continue;
    keys.gather(task.key_head, segment, true);
    Scalar* d_key = gradients.key + segment.first * key_row + task.key_head * head_dim;
    Scalar* d_value = gradients.value + segment.first * value_row + task.key_head * value_dim;
    for (int64_t row = 0; row < segment.own(); ++row) {
      std::fill_n(d_key + row * key_row, head_dim, Scalar(0));
      std::fill_n(d_value + row * value_row, value_dim, Scalar(0));
    }
    for (int64_t head = task.key_head * group; head < (task.key_head + 1) * group; ++head) {
      for (int64_t first = segment.first; first < segment.end; first += kQueries) {
        const int64_t last = std::min(first + kQueries, segment.end), count = last - first;
        const int64_t visible = segment.shared() + last - segment.first;
        const SeenKeys seen(segment, last, keys.hidden(first, last, visible));
        const int64_t width = Keys<Scalar>::padded(visible) - seen.hidden;
        multiply(
            factors_of(problem.query, head, first), keys.keys.data() + seen.hidden, stride, count, width, head_dim,
            probabilities.data(), stride, false);
        multiply(
            factors_of(gradients.out, head, first), keys.values.data() + seen.hidden, stride, count, width, value_dim,
            products.data(), stride, false);
        for (int64_t row = first; row < last; ++row) {
          Scalar* scores = probabilities.data() + (row - first) * stride;
          Scalar* product = products.data() + (row - first) * stride;
          finish_scores(problem, keys, head, row, seen.hidden, width, scores, bend.data());
          const Scalar lse = gradients.lse[head * problem.num_rows + row];
          const Scalar delta = dot(gradients.outputs.at(head, row), gradients.out.at(head, row), value_dim);
          gradients.delta[head * problem.num_rows + row] = delta;
#pragma omp simd
          for (int64_t i = 0; i < width; ++i) {
            const Scalar probability = exp_of(scores[i] - lse);
            scores[i] = probability;
            product[i] = probability * (product[i] - delta) * problem.scale;
          }
          if (problem.softcap != 0) {
            for (int64_t i = 0; i < width; ++i) product[i] *= bend[i];
          }
        }
        Scalar* d_query = gradients.query + first * query_row + head * head_dim;
        const Factors<Scalar> by_query{products.data(), stride, 1}, by_key{products.data(), 1, stride};
        const Factors<Scalar> weights{probabilities.data(), 1, stride};
        const Scalar* query = problem.query.at(head, first);
        const Scalar* d_out = gradients.out.at(head, first);
        multiply(
            by_query, problem.key.at(task.key_head, segment.shared_first + seen.prompt_first), problem.key.row, count,
            head_dim, seen.prompt, d_query, query_row, false);
        multiply(
            by_query.at(0, seen.prompt), problem.key.at(task.key_head, segment.first + seen.own_first), problem.key.row,
            count, head_dim, seen.own, d_query, query_row, true);
        multiply(
            by_key.at(seen.prompt, 0), query, problem.query.row, seen.own, head_dim, count,
            d_key + seen.own_first * key_row, key_row, true);
        multiply(
            weights.at(seen.prompt, 0), d_out, gradients.out.row, seen.own, value_dim, count,
            d_value + seen.own_first * value_row, value_row, true);
        const int64_t prompt_row = segment.shared_first + seen.prompt_first;
        Scalar* of_key = task.key_sums + prompt_row * task.key_row;
        Scalar* of_value = task.value_sums + prompt_row * task.value_row;
        multiply(by_key, query, problem.query.row, seen.prompt, head_dim, count, of_key, task.key_row, true);
        multiply(weights, d_out, gradients.out.row, seen.prompt, value_dim, count, of_value, task.value_row, true);
      }
    }
  }
}
