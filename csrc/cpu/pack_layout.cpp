// pack_layout on a CPU: the rows are counted, the counts are summed up, and every row writes its own entries.

#include <vector>

#include "rows.h"

namespace softprompt {
namespace {

enum Flag : uint8_t { kReal = 1, kPacked = 2, kLabelled = 4 };

struct RowCounts {
  int64_t packed = 0;
  int64_t labelled = 0;
  int64_t out_of_range = 0;
};

// Which columns of a row are tokens, which are packed, and which have a label that is predicted.
RowCounts flag_row(
    const View& mask,
    const View& labels,
    const View& input_ids,
    int64_t row,
    int64_t vocab_size,
    bool compact,
    int64_t* scratch,  // [L + 1]
    uint8_t* flags) {  // [L]
  const int64_t length = mask.columns;
  RowCounts counts;
  read_mask(mask, row, flags, [](auto value) {
    return static_cast<uint8_t>(value != decltype(value)(0) ? kReal | kPacked : 0);
  });
  int64_t out_of_range = 0, packed = 0, labelled = 0;
  if (labels.given()) {
    read_integers(labels, row, scratch);
    scratch[length] = kIgnoreIndex;
    for (int64_t column = 0; column < length; ++column) {
      const int64_t label = scratch[column];
      out_of_range += (label != kIgnoreIndex) & ((label < 0) | (label >= vocab_size));
    }
    for (int64_t column = 0; column < length; ++column) {
      const uint8_t is_labelled = scratch[column] != kIgnoreIndex, before_label = scratch[column + 1] != kIgnoreIndex;
      const uint8_t real = flags[column] & kReal;
      flags[column] |= compact ? is_labelled * real * kLabelled : is_labelled * kLabelled | before_label * kPacked;
    }
  }
  if (input_ids.given()) {
    read_integers(input_ids, row, scratch);
    for (int64_t column = 0; column < length; ++column) {
      out_of_range += (scratch[column] < 0) | (scratch[column] >= vocab_size);
    }
  }
  for (int64_t column = 0; column < length; ++column) {
    packed += (flags[column] & kPacked) != 0;
    labelled += (flags[column] & kLabelled) != 0;
  }
  counts.packed = packed;
  counts.labelled = labelled;
  counts.out_of_range = out_of_range;
  return counts;
}

struct Outputs {
  int32_t *token_index, *position_ids, *query_position, *key_position, *segments, *prefix_id;  // [C]
  int32_t *cu_texts, *label_rows, *label_targets, *counts;

  void write(int64_t at, int64_t index, int64_t position, int64_t slot, int64_t key, int64_t own, int64_t other) {
    token_index[at] = static_cast<int32_t>(index);
    position_ids[at] = static_cast<int32_t>(position);
    query_position[at] = static_cast<int32_t>(slot);
    key_position[at] = static_cast<int32_t>(key);
    segments[at] = static_cast<int32_t>(own);
    prefix_id[at] = static_cast<int32_t>(other);
  }

  // `size` neighbours, whose numbers count up; positions where `counts_up`, keys where `is_key`.
  void write_run(
      int64_t at,
      int64_t size,
      int64_t index,
      int64_t position,
      int64_t slot,
      int64_t own,
      int64_t other,
      bool counts_up,
      bool is_key) {
    const auto fill = [size](int32_t* to, int64_t first, int32_t step) {
      const int32_t start = static_cast<int32_t>(first), count = static_cast<int32_t>(size);
      for (int32_t place = 0; place < count; ++place) to[place] = start + place * step;
    };
    fill(token_index + at, index, 1);
    fill(position_ids + at, position, counts_up ? 1 : 0);
    fill(query_position + at, slot, 1);
    fill(key_position + at, is_key ? slot : kMaskedKey, is_key ? 1 : 0);
    fill(segments + at, own, 0);
    fill(prefix_id + at, other, 0);
  }
};

void pack_layout(
    Tensor attention_mask,                // [B, L]
    std::optional<Tensor> labels_given,   // [B, L]
    std::optional<Tensor> ids_given,      // [B, L]
    std::optional<Tensor> prompts_given,  // [B]
    Tensor cu_prompts,                    // [K + 1] int32
    int64_t vocab_size,
    bool compact,
    bool by_slot,
    Tensor token_index,
    Tensor position_ids,
    Tensor query_position,
    Tensor key_position,
    Tensor segments,
    Tensor prefix_id,
    Tensor cu_texts,
    Tensor label_rows,
    Tensor label_targets,
    Tensor counts) {
  const View mask = view_of(attention_mask), labels = view_of(labels_given), ids = view_of(ids_given);
  const int64_t num_rows = mask.rows, length = mask.columns;
  const int64_t num_prompts = cu_prompts.size(0) - 1;
  const int64_t capacity = token_index.size(0), label_capacity = label_rows.size(0);
  Outputs out{
      output_of<int32_t>(token_index),
      output_of<int32_t>(position_ids),
      output_of<int32_t>(query_position),
      output_of<int32_t>(key_position),
      output_of<int32_t>(segments),
      output_of<int32_t>(prefix_id),
      output_of<int32_t>(cu_texts),
      output_of<int32_t>(label_rows),
      output_of<int32_t>(label_targets),
      output_of<int32_t>(counts)};

  std::vector<int64_t> prompt_of_row(num_rows, 0);
  if (prompts_given.has_value()) read_integers(view_of(*prompts_given), 0, prompt_of_row.data());
  for (const int64_t prompt : prompt_of_row) {
    STD_TORCH_CHECK(prompt >= 0 && prompt < num_prompts, "prompt_of_row holds ", prompt);
  }
  std::vector<int64_t> offsets(num_prompts + 1);
  read_integers(view_of(cu_prompts), 0, offsets.data());
  const int64_t prompt_tokens = offsets[num_prompts];
  STD_TORCH_CHECK(
      capacity >= prompt_tokens + num_rows * length && label_capacity >= num_rows * length,
      "the outputs have no room for the batch");
  const auto length_of = [&](int64_t prompt) { return offsets[prompt + 1] - offsets[prompt]; };
  for (int64_t prompt = 0; prompt < num_prompts; ++prompt) {
    for (int64_t place = 0; place < length_of(prompt); ++place) {
      out.write(offsets[prompt] + place, -1, place, place, place, prompt, prompt);
    }
  }

  std::vector<uint8_t> flags(num_rows * length);
  std::vector<RowCounts> of_row(num_rows);
  const int64_t grain = grain_of_rows(8 * length);
  torch::stable::parallel_for(0, num_rows, grain, [&](int64_t begin, int64_t end) {
    std::vector<int64_t> scratch(length + 1);
    for (int64_t row = begin; row < end; ++row) {
      of_row[row] = flag_row(
          mask, labels, ids, row, vocab_size, compact, scratch.data(), flags.data() + row * length);
    }
  });

  std::vector<int64_t> first_of_row(num_rows), first_label(num_rows);
  int64_t rows_used = prompt_tokens, labels_used = 0, out_of_range = 0, longest_text = 0, longest_context = 0;
  for (int64_t row = 0; row < num_rows; ++row) {
    const RowCounts& found = of_row[row];
    out.cu_texts[row] = static_cast<int32_t>(first_of_row[row] = rows_used);
    first_label[row] = labels_used;
    rows_used += found.packed;
    labels_used += found.labelled;
    out_of_range += found.out_of_range;
    longest_text = std::max(longest_text, found.packed);
    longest_context = std::max(longest_context, found.packed + length_of(prompt_of_row[row]));
  }
  out.cu_texts[num_rows] = static_cast<int32_t>(rows_used);
  const int64_t totals[] = {
      rows_used - prompt_tokens, labels_used, out_of_range, longest_text, longest_context};
  for (int number = 0; number < 5; ++number) out.counts[number] = static_cast<int32_t>(totals[number]);

  torch::stable::parallel_for(0, num_rows, grain, [&](int64_t begin, int64_t end) {
    std::vector<int64_t> targets(labels.given() ? length : 0);
    for (int64_t row = begin; row < end; ++row) {
      const uint8_t* own = flags.data() + row * length;
      const int64_t prompt = prompt_of_row[row], prefix = length_of(prompt);
      int64_t at = first_of_row[row], label_at = first_label[row], rank = prefix;
      const bool labelled = of_row[row].labelled > 0;
      if (labelled) read_integers(labels, row, targets.data());
      // Texts and pads come in runs, whose entries count up: no entry waits for the one before.
      for (int64_t column = 0, end_of_run; column < length; column = end_of_run) {
        const uint8_t kind = own[column] & (kReal | kPacked);
        end_of_run = column + 1;
        while (end_of_run < length && (own[end_of_run] & (kReal | kPacked)) == kind) ++end_of_run;
        const int64_t size = end_of_run - column, packed = kind & kPacked ? size : 0;
        if (labelled) {
          for (int64_t place = 0; place < size; ++place) {
            if (!(own[column + place] & kLabelled)) continue;
            const int64_t next = at + std::min(place, packed);  // where a token in this place would stand
            out.label_rows[label_at] =
                static_cast<int32_t>(next > first_of_row[row] ? next - 1 : offsets[prompt + 1] - 1);
            out.label_targets[label_at++] = static_cast<int32_t>(targets[column + place]);
          }
        }
        if (packed > 0) {
          const bool real = kind & kReal;
          const int64_t slot = compact ? rank : prefix + column, position = by_slot ? slot : rank;
          out.write_run(at, size, row * length + column, real || by_slot ? position : -1, slot, num_prompts + row,
                        prompt, real || by_slot, real);
        }
        at += packed;
        rank += kind & kReal ? size : 0;
      }
    }
  });

  torch::stable::parallel_for(rows_used, capacity, kGrain / 8, [&](int64_t begin, int64_t end) {
    for (int64_t dummy = begin; dummy < end; ++dummy) {
      const int64_t own = num_prompts + num_rows + dummy;
      out.write(dummy, -1, 0, 0, 0, own, own);
    }
  });
  std::fill(out.label_rows + labels_used, out.label_rows + label_capacity, 0);
  std::fill(out.label_targets + labels_used, out.label_targets + label_capacity, kIgnoreIndex);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(softprompt, CPU, library) {
  library.impl("native_pack_layout", TORCH_BOX(&pack_layout));
}

}  // namespace softprompt
