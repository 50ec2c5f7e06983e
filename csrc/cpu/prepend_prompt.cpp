// prepend_prompt on a CPU: embeddings, mask, labels and positions of a padded batch, and the prompts' gradient.

#include <vector>

#include "rows.h"

namespace softprompt {
namespace {

void prepend_prompt(
    Tensor table,                         // [V, H]
    Tensor input_ids,                     // [B, L]
    Tensor prompts,                       // [ΣP, H]
    std::optional<Tensor> mask_given,     // [B, L]
    std::optional<Tensor> labels_given,   // [B, L]
    std::optional<Tensor> prompts_given,  // [B]
    int64_t prompt_length,
    Tensor embeds,        // [B, P + L, H]
    Tensor out_mask,      // [B, P + L] fp32
    Tensor out_labels,    // [B, P + L] int64
    Tensor position_ids,  // [B, P + L] int64
    Tensor counts) {      // [3] int32
  const View ids = view_of(input_ids), mask = view_of(mask_given), labels = view_of(labels_given);
  const int64_t num_rows = ids.rows, columns = ids.columns, length = prompt_length + columns;
  const int64_t vocab_size = table.size(0);
  const RowWriter rows(view_of(table), view_of(prompts), output_of<char>(embeds), num_rows * length);
  float* masks = output_of<float>(out_mask);
  int64_t* targets = output_of<int64_t>(out_labels);
  int64_t* places = output_of<int64_t>(position_ids);
  std::vector<int64_t> prompt_of_row(num_rows, 0);
  if (prompts_given.has_value()) read_integers(view_of(*prompts_given), 0, prompt_of_row.data());

  std::atomic<int64_t> scored{0}, wrong_ids{0}, wrong_labels{0};
  std::vector<int64_t> flat_ids(num_rows * columns);
  torch::stable::parallel_for(0, num_rows, grain_of_rows(4 * length), [&](int64_t begin, int64_t end) {
    int64_t own_scored = 0, own_wrong_ids = 0, own_wrong_labels = 0;
    for (int64_t row = begin; row < end; ++row) {
      int64_t* own_ids = flat_ids.data() + row * columns;
      read_integers(ids, row, own_ids);
      for (int64_t column = 0; column < columns; ++column) {
        own_wrong_ids += (own_ids[column] < 0) | (own_ids[column] >= vocab_size);
      }
      float* own_mask = masks + row * length;
      std::fill(own_mask, own_mask + (mask.given() ? prompt_length : length), 1.0f);
      if (mask.given()) {
        read_mask(mask, row, own_mask + prompt_length, [](auto value) { return static_cast<float>(value); });
      }
      int64_t* own_targets = targets + row * length;
      std::fill(own_targets, own_targets + (labels.given() ? prompt_length : length), kIgnoreIndex);
      if (labels.given()) {
        read_integers(labels, row, own_targets + prompt_length);
        for (int64_t place = prompt_length; place < length; ++place) {
          const int64_t label = own_targets[place];
          const bool is_scored = label != kIgnoreIndex;
          own_scored += is_scored;
          own_wrong_labels += is_scored & ((label < 0) | (label >= vocab_size));
        }
      }
      for (int64_t place = 0; place < length; ++place) places[row * length + place] = place;
    }
    scored += own_scored;
    wrong_ids += own_wrong_ids;
    wrong_labels += own_wrong_labels;
  });
  int32_t* found = output_of<int32_t>(counts);
  found[0] = static_cast<int32_t>(scored);
  found[1] = static_cast<int32_t>(wrong_ids);
  found[2] = static_cast<int32_t>(wrong_labels);

  const int64_t grain = grain_of_rows(rows.row_bytes() / 4);
  torch::stable::parallel_for(0, num_rows * length, grain, [&](int64_t begin, int64_t end) {
    for (int64_t at = begin; at < end; ++at) {
      const int64_t row = at / length, place = at % length;
      if (place < prompt_length) {
        rows.prompt(at, prompt_of_row[row] * prompt_length + place);
      } else {
        const int64_t entry = row * columns + place - prompt_length;
        if (place + 1 < length) rows.expect(flat_ids[entry + 1]);
        rows.token(at, flat_ids[entry]);
      }
    }
    rows.finish();
  });
}

// Every prompt row sums its own gradients, in the order of the batch: the same bits for any number of threads.
void prepend_prompt_backward(
    Tensor grad,                          // [B, P + L, H], any strides
    std::optional<Tensor> prompts_given,  // [B]
    int64_t prompt_length,
    Tensor d_prompts) {  // [ΣP, H]
  const int64_t num_rows = grad.size(0), width = grad.size(2);
  std::vector<View> from(num_rows);
  for (int64_t row = 0; row < num_rows; ++row) from[row] = view_of(grad, row);
  std::vector<int64_t> prompt_of_row(num_rows, 0);
  if (prompts_given.has_value()) read_integers(view_of(*prompts_given), 0, prompt_of_row.data());
  with_floating(d_prompts.scalar_type(), [&](auto target) {
    using Target = typename decltype(target)::type;
    Target* to = output_of<Target>(d_prompts);
    with_floating(grad.scalar_type(), [&](auto source) {
      using Source = typename decltype(source)::type;
      constexpr bool wide = std::is_same_v<Source, double> || std::is_same_v<Target, double>;
      using Sum = std::conditional_t<wide, double, float>;
      const int64_t grain = grain_of_rows(width * (1 + num_rows));
      torch::stable::parallel_for(0, d_prompts.size(0), grain, [&](int64_t begin, int64_t end) {
        std::vector<Sum> sum(width);
        std::vector<Source> term(width);
        for (int64_t prompt_row = begin; prompt_row < end; ++prompt_row) {
          const int64_t prompt = prompt_row / prompt_length, place = prompt_row % prompt_length;
          std::fill(sum.begin(), sum.end(), Sum(0));
          for (int64_t row = 0; row < num_rows; ++row) {
            if (prompt_of_row[row] != prompt) continue;
            convert_entries<Source>(from[row], place, term.data(), [](Source value) { return value; });
            for (int64_t column = 0; column < width; ++column) sum[column] += cast<Sum>(term[column]);
          }
          for (int64_t column = 0; column < width; ++column) {
            to[prompt_row * width + column] = cast<Target>(sum[column]);
          }
        }
      });
    });
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(softprompt, CPU, library) {
  library.impl("native_prepend_prompt", TORCH_BOX(&prepend_prompt));
  library.impl("native_prepend_prompt_backward", TORCH_BOX(&prepend_prompt_backward));
}

}  // namespace softprompt
