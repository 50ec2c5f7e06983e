// embed_prompt in one launch: a row of the packed row is read once and written once, 16 bytes at a time.

#include "rows.cuh"

namespace softprompt {
namespace {

// Grid: blocks of rows. A block is (threads along a row, rows).
template <class T, int kEntries>
__global__ void embed_rows(Embeddings rows, View ids, View index, int64_t num_rows, int64_t num_prompt_rows) {
  const int64_t row = int64_t{blockIdx.x} * blockDim.y + threadIdx.y;
  if (row >= num_rows) return;
  const bool is_prompt = row < num_prompt_rows;
  int64_t source = row;
  if (!is_prompt) {
    const int64_t place = integer_at(index, 0, row);
    const bool known = place >= 0 && place < ids.rows * ids.columns;
    source = known ? integer_at(ids, place / ids.columns, place % ids.columns) : -1;
  }
  write_row<T, kEntries>(rows, row, is_prompt, source, threadIdx.x, blockDim.x);
}

void embed_prompt(
    Tensor table,        // [V, H]
    Tensor input_ids,    // [B, L]
    Tensor token_index,  // [T]
    Tensor prompts,      // [ΣP, H]
    Tensor out) {        // [1, T, H]
  const auto guard = on_device_of(out);
  const Embeddings rows{view_of(table), view_of(prompts), output_of<char>(out), table.size(1)};
  const View ids = view_of(input_ids), index = view_of(token_index);
  const int64_t num_rows = index.columns;
  if (num_rows == 0 || rows.width == 0) return;
  with_floating(rows.table.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    constexpr int kEntries = kPieceBytes / static_cast<int>(sizeof(T));
    const bool pieces = in_pieces(rows);
    const dim3 block = block_of_rows(pieces ? rows.width / kEntries : rows.width);
    const auto kernel = pieces ? &embed_rows<T, kEntries> : &embed_rows<T, 1>;
    launch(kernel, grid_of_rows(num_rows, block), block, out, rows, ids, index, num_rows, rows.prompts.rows);
  });
}

// Grid: blocks of rows, as above.
template <class T>
__global__ void copy_rows(View from, T* to, int64_t num_rows, int64_t width) {
  const int64_t row = int64_t{blockIdx.x} * blockDim.y + threadIdx.y;
  if (row >= num_rows) return;
  for (int64_t column = threadIdx.x; column < width; column += blockDim.x) {
    to[row * width + column] = floating_at<T>(from, row, column);
  }
}

void embed_prompt_backward(
    Tensor grad,         // [1, T, H], any strides
    Tensor d_prompts) {  // [ΣP, H]
  const auto guard = on_device_of(grad);
  const View from = view_of(grad, 0);
  const int64_t num_rows = d_prompts.size(0), width = d_prompts.size(1);
  if (num_rows == 0 || width == 0) return;
  with_floating(d_prompts.scalar_type(), [&](auto type) {
    using T = typename decltype(type)::type;
    const dim3 block = block_of_rows(width);
    T* to = output_of<T>(d_prompts);
    launch(&copy_rows<T>, grid_of_rows(num_rows, block), block, grad, from, to, num_rows, width);
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(softprompt, CUDA, library) {
  library.impl("native_embed_prompt", TORCH_BOX(&embed_prompt));
  library.impl("native_embed_prompt_backward", TORCH_BOX(&embed_prompt_backward));
}

}  // namespace softprompt
