// prepend_prompt in one launch, and the gradient of its prompts in another.

#include "rows.cuh"

namespace softprompt {
namespace {

constexpr int kThreads = 128;

struct Batch {
  View ids, mask, labels, prompt_of_row;  // [B, L], [B, L], [B, L], [B]; all but the first may be missing
  float* out_mask;                        // [B, P + L]
  int64_t* out_labels;                    // [B, P + L]
  int64_t* position_ids;                  // [B, P + L]
  int32_t* counts;                        // [3]
  int64_t num_rows, columns, prompt_length, vocab_size;
};

// Sum over a block of kThreads, in thread 0.
__device__ int sum_of_block(int value) {
  __shared__ int of_warps[kThreads / kWarp];
  const int thread = threadIdx.y * blockDim.x + threadIdx.x;
  for (int lane = kWarp / 2; lane > 0; lane /= 2) value += __shfl_xor_sync(kAllLanes, value, lane);
  if (thread % kWarp == 0) of_warps[thread / kWarp] = value;
  __syncthreads();
  int total = 0;
  for (int warp = 0; warp < kThreads / kWarp; ++warp) total += of_warps[warp];
  __syncthreads();
  return total;
}

__device__ void count(const Batch& batch) {
  const int thread = threadIdx.y * blockDim.x + threadIdx.x;
  int scored = 0, wrong_ids = 0, wrong_labels = 0;
  for (int64_t entry = thread; entry < batch.num_rows * batch.columns; entry += kThreads) {
    const int64_t row = entry / batch.columns, column = entry % batch.columns;
    const int64_t id = integer_at(batch.ids, row, column);
    wrong_ids += id < 0 || id >= batch.vocab_size;
    if (is_given(batch.labels)) {
      const int64_t label = integer_at(batch.labels, row, column);
      const bool is_scored = label != kIgnoreIndex;
      scored += is_scored;
      wrong_labels += is_scored && (label < 0 || label >= batch.vocab_size);
    }
  }
  scored = sum_of_block(scored);
  wrong_ids = sum_of_block(wrong_ids);
  wrong_labels = sum_of_block(wrong_labels);
  if (thread == 0) {
    batch.counts[0] = scored;
    batch.counts[1] = wrong_ids;
    batch.counts[2] = wrong_labels;
  }
}

// Grid: 1 + blocks of rows. Block 0 counts, so that no counter has to be set to zero before the launch.
template <class T, int kEntries>
__global__ void prepend_rows(Embeddings rows, Batch batch) {
  if (blockIdx.x == 0) {
    count(batch);
    return;
  }
  const int64_t length = batch.prompt_length + batch.columns;
  const int64_t out_row = (int64_t{blockIdx.x} - 1) * blockDim.y + threadIdx.y;
  if (out_row >= batch.num_rows * length) return;
  const int64_t row = out_row / length, place = out_row % length, column = place - batch.prompt_length;
  const bool is_prompt = column < 0;
  int64_t source;
  if (is_prompt) {
    const int64_t prompt = is_given(batch.prompt_of_row) ? integer_at(batch.prompt_of_row, 0, row) : 0;
    source = prompt * batch.prompt_length + place;
  } else {
    source = integer_at(batch.ids, row, column);
  }
  write_row<T, kEntries>(rows, out_row, is_prompt, source, threadIdx.x, blockDim.x);
  if (threadIdx.x == 0) {
    const bool masked = !is_prompt && is_given(batch.mask), labelled = !is_prompt && is_given(batch.labels);
    batch.out_mask[out_row] = masked ? mask_at(batch.mask, row, column) : 1.0f;
    batch.out_labels[out_row] = labelled ? integer_at(batch.labels, row, column) : kIgnoreIndex;
    batch.position_ids[out_row] = place;
  }
}

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
  const auto guard = on_device_of(embeds);
  const Embeddings rows{view_of(table), view_of(prompts), output_of<char>(embeds), table.size(1)};
  const Batch batch{
      view_of(input_ids),
      view_of(mask_given),
      view_of(labels_given),
      view_of(prompts_given),
      output_of<float>(out_mask),
      output_of<int64_t>(out_labels),
      output_of<int64_t>(position_ids),
      output_of<int32_t>(counts),
      input_ids.size(0),
      input_ids.size(1),
      prompt_length,
      table.size(0)};
  with_floating(rows.table.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    constexpr int kEntries = kPieceBytes / static_cast<int>(sizeof(T));
    const bool pieces = in_pieces(rows);
    const dim3 block = block_of_rows(pieces ? rows.width / kEntries : rows.width);
    const unsigned grid = 1 + grid_of_rows(batch.num_rows * (prompt_length + batch.columns), block);
    const auto kernel = pieces ? &prepend_rows<T, kEntries> : &prepend_rows<T, 1>;
    launch(kernel, grid, block, embeds, rows, batch);
  });
}

// Grid: (prompt rows, blocks of columns). A thread sums one entry of one prompt row over the rows of the batch
// that use the prompt, in their order: deterministic, and in fp32 (fp64 where one side is fp64).
template <class T, class Sum>
__global__ void sum_prompts(
    View grad,  // [B, (P + L) H]: the rows of the batch
    int64_t place_stride,
    int64_t entry_stride,
    View prompt_of_row,
    T* d_prompts,
    int64_t prompt_length,
    int64_t width) {
  const int64_t column = int64_t{blockIdx.y} * blockDim.x + threadIdx.x;
  if (column >= width) return;
  const int64_t prompt = blockIdx.x / prompt_length, place = blockIdx.x % prompt_length;
  grad.column_stride = 1;
  const int64_t offset = place * place_stride + column * entry_stride;
  Sum sum = 0;
  for (int64_t row = 0; row < grad.rows; ++row) {
    const int64_t own = is_given(prompt_of_row) ? integer_at(prompt_of_row, 0, row) : 0;
    if (own == prompt) sum += floating_at<Sum>(grad, row, offset);
  }
  d_prompts[int64_t{blockIdx.x} * width + column] = cast<T>(sum);
}

void prepend_prompt_backward(
    Tensor grad,                          // [B, P + L, H], any strides
    std::optional<Tensor> prompts_given,  // [B]
    int64_t prompt_length,
    Tensor d_prompts) {  // [ΣP, H]
  const auto guard = on_device_of(grad);
  const int64_t num_rows = d_prompts.size(0), width = d_prompts.size(1);
  if (num_rows == 0 || width == 0) return;
  View from;
  from.data = static_cast<const char*>(grad.const_data_ptr());
  from.dtype = grad.scalar_type();
  from.itemsize = size_of(from.dtype);
  from.rows = grad.size(0);
  from.row_stride = grad.stride(0) * from.itemsize;
  const View prompt_of_row = view_of(prompts_given);
  with_floating(d_prompts.scalar_type(), [&](auto type) {
    using T = typename decltype(type)::type;
    const bool wide = std::is_same_v<T, double> || from.dtype == ScalarType::Double;
    const auto kernel = wide ? &sum_prompts<T, double> : &sum_prompts<T, float>;
    const dim3 grid(static_cast<unsigned>(num_rows), static_cast<unsigned>((width + kThreads - 1) / kThreads));
    const int64_t place_stride = grad.stride(1) * from.itemsize, entry_stride = grad.stride(2) * from.itemsize;
    T* to = output_of<T>(d_prompts);
    launch(
        kernel, grid, kThreads, grad, from, place_stride, entry_stride, prompt_of_row, to, prompt_length, width);
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(softprompt, CUDA, library) {
  library.impl("native_prepend_prompt", TORCH_BOX(&prepend_prompt));
  library.impl("native_prepend_prompt_backward", TORCH_BOX(&prepend_prompt_backward));
}

}  // namespace softprompt
