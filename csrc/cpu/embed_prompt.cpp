// embed_prompt on a CPU: the rows of the packed row, and the gradient of the prompts.

#include <vector>

#include "rows.h"

namespace softprompt {
namespace {

void embed_prompt(
    Tensor table,        // [V, H]
    Tensor input_ids,    // [B, L]
    Tensor token_index,  // [T]
    Tensor prompts,      // [ΣP, H]
    Tensor out) {        // [1, T, H]
  const View ids = view_of(input_ids), index = view_of(token_index);
  const int64_t num_rows = index.columns, num_prompt_rows = prompts.size(0);
  const int64_t num_ids = ids.rows * ids.columns;
  const RowWriter rows(view_of(table), view_of(prompts), output_of<char>(out), num_rows);

  std::vector<int64_t> indices(num_rows), flat_ids(num_ids);
  read_integers(index, 0, indices.data());
  for (int64_t row = 0; row < ids.rows; ++row) read_integers(ids, row, flat_ids.data() + row * ids.columns);

  const auto id_of = [&](int64_t row) {
    const int64_t place = indices[row];
    return place >= 0 && place < num_ids ? flat_ids[place] : -1;
  };
  torch::stable::parallel_for(0, num_rows, grain_of_rows(rows.row_bytes() / 4), [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      if (row < num_prompt_rows) {
        rows.prompt(row, row);
      } else {
        if (row + 1 < end) rows.expect(id_of(row + 1));
        rows.token(row, id_of(row));
      }
    }
    rows.finish();
  });
}

void embed_prompt_backward(
    Tensor grad,         // [1, T, H], any strides
    Tensor d_prompts) {  // [ΣP, H]
  const View from = view_of(grad, 0);
  const int64_t num_rows = d_prompts.size(0), width = d_prompts.size(1);
  with_floating(d_prompts.scalar_type(), [&](auto target) {
    using Target = typename decltype(target)::type;
    Target* to = output_of<Target>(d_prompts);
    with_floating(from.dtype, [&](auto source) {
      using Source = typename decltype(source)::type;
      torch::stable::parallel_for(0, num_rows, grain_of_rows(width), [&](int64_t begin, int64_t end) {
        for (int64_t row = begin; row < end; ++row) {
          convert_entries<Source>(
              from, row, to + row * width, [](Source value) { return cast<Target>(value); });
        }
      });
    });
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(softprompt, CPU, library) {
  library.impl("native_embed_prompt", TORCH_BOX(&embed_prompt));
  library.impl("native_embed_prompt_backward", TORCH_BOX(&embed_prompt_backward));
}

}  // namespace softprompt
