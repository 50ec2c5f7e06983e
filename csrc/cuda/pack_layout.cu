// pack_layout in one launch: every row of the batch belongs to a warp, which counts it, waits for the counts of
// the others, and writes its entries at their places. Scans within a row are votes of the warp.

#include "rows.cuh"

namespace softprompt {
namespace {

constexpr int kMostWarps = 32;            // of a block that is alone
constexpr int kWarpsOfMany = 4;           // of a block among others
constexpr int64_t kAloneEntries = 16384;  // that one multiprocessor reads in a few microseconds

enum Flag : unsigned { kReal = 1, kPacked = 2, kLabelled = 4 };

struct Problem {
  View mask, labels, ids, prompt_of_row;  // [B, L], [B, L], [B, L], [B]; all but the first may be missing
  const int32_t* cu_prompts;              // [K + 1]
  int32_t *token_index, *position_ids, *query_position, *key_position, *segments, *prefix_id;  // [C]
  int32_t *cu_texts, *label_rows, *label_targets, *counts;                    // [B + 1], [R], [R], [5]
  int32_t* of_rows;  // [3, B]: packed, labelled and out of range
  int64_t num_rows, length, num_prompts, vocab_size, capacity, label_capacity;
  bool compact, by_slot;
};

__device__ int sum_of_warp(int value) {
  for (int lane = kWarp / 2; lane > 0; lane /= 2) value += __shfl_xor_sync(kAllLanes, value, lane);
  return value;
}

__device__ int largest_of_warp(int value) {
  for (int lane = kWarp / 2; lane > 0; lane /= 2) value = max(value, __shfl_xor_sync(kAllLanes, value, lane));
  return value;
}

__device__ bool has_label(const Problem& p, int64_t row, int64_t column) {
  return is_given(p.labels) && column < p.length && integer_at(p.labels, row, column) != kIgnoreIndex;
}

__device__ unsigned flags_of(const Problem& p, int64_t row, int64_t column) {
  if (column >= p.length) return 0;
  const bool real = is_set(p.mask, row, column);
  const bool labelled = has_label(p, row, column) && (real || !p.compact);
  const bool packed = real || (!p.compact && has_label(p, row, column + 1));
  return (real ? kReal : 0) | (packed ? kPacked : 0) | (labelled ? kLabelled : 0);
}

__device__ bool is_outside(const View& values, const Problem& p, int64_t row, int64_t column, bool may_ignore) {
  if (!is_given(values) || column >= p.length) return false;
  const int64_t value = integer_at(values, row, column);
  return (value < 0 || value >= p.vocab_size) && !(may_ignore && value == kIgnoreIndex);
}

// The prompt of a row; one that is not there reads as the first, so that nothing is read outside.
__device__ int64_t prompt_of(const Problem& p, int64_t row) {
  const int64_t prompt = is_given(p.prompt_of_row) ? integer_at(p.prompt_of_row, 0, row) : 0;
  return prompt >= 0 && prompt < p.num_prompts ? prompt : 0;
}

__device__ void count_row(const Problem& p, int64_t row, int lane) {
  int packed = 0, labelled = 0, outside = 0;
  for (int64_t start = 0; start < p.length; start += kWarp) {
    const unsigned flags = flags_of(p, row, start + lane);
    packed += (flags & kPacked) != 0;
    labelled += (flags & kLabelled) != 0;
    outside += is_outside(p.ids, p, row, start + lane, false) + is_outside(p.labels, p, row, start + lane, true);
  }
  packed = sum_of_warp(packed);
  labelled = sum_of_warp(labelled);
  outside = sum_of_warp(outside);
  if (lane == 0) {
    p.of_rows[row] = packed;
    p.of_rows[p.num_rows + row] = labelled;
    p.of_rows[2 * p.num_rows + row] = outside;
  }
}

__device__ void write_entry(
    const Problem& p, int64_t at, int64_t index, int64_t position, int64_t slot, int64_t key, int64_t own,
    int64_t other) {
  p.token_index[at] = static_cast<int32_t>(index);
  p.position_ids[at] = static_cast<int32_t>(position);
  p.query_position[at] = static_cast<int32_t>(slot);
  p.key_position[at] = static_cast<int32_t>(key);
  p.segments[at] = static_cast<int32_t>(own);
  p.prefix_id[at] = static_cast<int32_t>(other);
}

__device__ void write_row(const Problem& p, int64_t row, int lane) {
  int packed_before = 0, labelled_before = 0;
  for (int64_t earlier = lane; earlier < row; earlier += kWarp) {
    packed_before += p.of_rows[earlier];
    labelled_before += p.of_rows[p.num_rows + earlier];
  }
  const int64_t prompt = prompt_of(p, row), prompt_end = p.cu_prompts[prompt + 1];
  const int64_t prefix = prompt_end - p.cu_prompts[prompt];
  const int64_t first = p.cu_prompts[p.num_prompts] + sum_of_warp(packed_before);
  int64_t next = first, next_label = sum_of_warp(labelled_before), rank = prefix;
  if (lane == 0) p.cu_texts[row] = static_cast<int32_t>(first);
  const unsigned earlier_lanes = (1u << lane) - 1;
  for (int64_t start = 0; start < p.length; start += kWarp) {
    const int64_t column = start + lane;
    const unsigned flags = flags_of(p, row, column);
    const unsigned real = __ballot_sync(kAllLanes, (flags & kReal) != 0);
    const unsigned packed = __ballot_sync(kAllLanes, (flags & kPacked) != 0);
    const unsigned labelled = __ballot_sync(kAllLanes, (flags & kLabelled) != 0);
    const int64_t at = next + __popc(packed & earlier_lanes);
    if (flags & kPacked) {
      const bool is_real = flags & kReal;
      const int64_t own_rank = rank + __popc(real & earlier_lanes);
      const int64_t slot = p.compact ? own_rank : prefix + column;
      const int64_t position = p.by_slot ? slot : is_real ? own_rank : -1;
      write_entry(
          p, at, row * p.length + column, position, slot, is_real ? slot : kMaskedKey, p.num_prompts + row, prompt);
    }
    if (flags & kLabelled) {
      const int64_t label_at = next_label + __popc(labelled & earlier_lanes);
      p.label_rows[label_at] = static_cast<int32_t>(at > first ? at - 1 : prompt_end - 1);
      p.label_targets[label_at] = static_cast<int32_t>(integer_at(p.labels, row, column));
    }
    next += __popc(packed);
    next_label += __popc(labelled);
    rank += __popc(real);
  }
}

// The prompts, the dummies, and the label rows that nobody uses.
__device__ void write_rest(const Problem& p, int64_t thread, int64_t threads, int64_t num_tokens, int64_t num_labels) {
  const int64_t prompt_tokens = p.cu_prompts[p.num_prompts];
  for (int64_t row = thread; row < prompt_tokens; row += threads) {
    int64_t prompt = 0;
    while (row >= p.cu_prompts[prompt + 1]) ++prompt;
    const int64_t place = row - p.cu_prompts[prompt];
    write_entry(p, row, -1, place, place, place, prompt, prompt);
  }
  for (int64_t row = prompt_tokens + num_tokens + thread; row < p.capacity; row += threads) {
    const int64_t own = p.num_prompts + p.num_rows + row;
    write_entry(p, row, -1, 0, 0, 0, own, own);
  }
  for (int64_t row = num_labels + thread; row < p.label_capacity; row += threads) {
    p.label_rows[row] = 0;
    p.label_targets[row] = kIgnoreIndex;
  }
}

// Grid: blocks of warps, all of them on the chip at once where there are several (a cooperative launch).
// Moves: mask, labels and ids are read (mask and labels twice, the second time from L2), 24 bytes are written
// per packed row and 8 per label row.
template <bool kManyBlocks>
__global__ void __launch_bounds__((kManyBlocks ? kWarpsOfMany : kMostWarps) * kWarp, 1) pack(Problem p) {
  const int lane = threadIdx.x % kWarp;
  const int64_t thread = int64_t{blockIdx.x} * blockDim.x + threadIdx.x, threads = int64_t{gridDim.x} * blockDim.x;
  const int64_t warp = thread / kWarp, warps = threads / kWarp;
  for (int64_t row = warp; row < p.num_rows; row += warps) count_row(p, row, lane);
  if constexpr (kManyBlocks) {
    sync_grid();
  } else {
    __syncthreads();
  }
  for (int64_t row = warp; row < p.num_rows; row += warps) write_row(p, row, lane);

  int packed = 0, labelled = 0, outside = 0, longest_text = 0, longest_context = 0;
  for (int64_t row = lane; row < p.num_rows; row += kWarp) {
    const int64_t prompt = prompt_of(p, row);
    const int own = p.of_rows[row];
    packed += own;
    labelled += p.of_rows[p.num_rows + row];
    outside += p.of_rows[2 * p.num_rows + row];
    longest_text = max(longest_text, own);
    longest_context = max(longest_context, own + p.cu_prompts[prompt + 1] - p.cu_prompts[prompt]);
  }
  packed = sum_of_warp(packed);
  labelled = sum_of_warp(labelled);
  outside = sum_of_warp(outside);
  longest_text = largest_of_warp(longest_text);
  longest_context = largest_of_warp(longest_context);
  if (thread == 0) {
    p.cu_texts[p.num_rows] = p.cu_prompts[p.num_prompts] + packed;
    p.counts[0] = packed;
    p.counts[1] = labelled;
    p.counts[2] = outside;
    p.counts[3] = longest_text;
    p.counts[4] = longest_context;
  }
  write_rest(p, thread, threads, packed, labelled);
}

void pack_layout(
    Tensor attention_mask,                // [B, L]
    std::optional<Tensor> labels,         // [B, L]
    std::optional<Tensor> input_ids,      // [B, L]
    std::optional<Tensor> prompt_of_row,  // [B]
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
  const auto guard = on_device_of(attention_mask);
  const int64_t num_rows = attention_mask.size(0), length = attention_mask.size(1);
  const Tensor of_rows = torch::stable::new_empty(counts, {std::max<int64_t>(1, 3 * num_rows)});
  STD_TORCH_CHECK(cu_prompts.scalar_type() == ScalarType::Int && cu_prompts.is_contiguous(), "cu_prompts: int32");
  const Problem problem{
      view_of(attention_mask),
      view_of(labels),
      view_of(input_ids),
      view_of(prompt_of_row),
      static_cast<const int32_t*>(cu_prompts.const_data_ptr()),
      output_of<int32_t>(token_index),
      output_of<int32_t>(position_ids),
      output_of<int32_t>(query_position),
      output_of<int32_t>(key_position),
      output_of<int32_t>(segments),
      output_of<int32_t>(prefix_id),
      output_of<int32_t>(cu_texts),
      output_of<int32_t>(label_rows),
      output_of<int32_t>(label_targets),
      output_of<int32_t>(counts),
      output_of<int32_t>(of_rows),
      num_rows,
      length,
      cu_prompts.size(0) - 1,
      vocab_size,
      token_index.size(0),
      label_rows.size(0),
      compact,
      by_slot};
  if (num_rows <= kMostWarps && num_rows * length <= kAloneEntries) {
    const auto threads = static_cast<unsigned>(std::max<int64_t>(kWarpsOfMany, num_rows) * kWarp);
    launch(&pack<false>, 1, threads, attention_mask, problem);
    return;
  }
  const int64_t wanted = (num_rows + kWarpsOfMany - 1) / kWarpsOfMany;
  const auto blocks = static_cast<unsigned>(std::min(wanted, multiprocessors_of(attention_mask)));
  launch_together(&pack<true>, blocks, kWarpsOfMany * kWarp, attention_mask, problem);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(softprompt, CUDA, library) {
  library.impl("native_pack_layout", TORCH_BOX(&pack_layout));
}

}  // namespace softprompt
