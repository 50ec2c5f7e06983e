// Products of a few rows with a large fp32 matrix. Included once for each instruction set, behind products.h.
//
// A block of weights stays in the second-level cache while all tiles of rows are multiplied with it, and each tile
// asks for its share of the next block: memory and arithmetic then go on side by side, where a product that reads
// first and computes then takes the sum of both.

// The rows of each tile side by side, a vector of each in turn, so that a tile reads one stream instead of several.
inline void pack_rows(const Rows& rows, int64_t width, float* to) {
  for_tiles(rows.count, [&](int64_t first, Turn, auto height) {
    float* out = to + first * width;
    for (int64_t h = 0; h + kLanes<float> <= width; h += kLanes<float>) {
      for (int64_t row = first; row < first + height; ++row, out += kLanes<float>) {
        std::memcpy(out, rows.at(row) + h, kVectorBytes);
      }
    }
  });
}

// Dot products of a tile of rows with `Columns` neighbouring weights.
template <int Height, int Columns>
inline void dot_tile(
    const float* packed, const Rows& rows, int64_t first, const Rows& weights, int64_t column, int64_t width,
    const float* next, Turn turn, float* out, int64_t out_stride) {
  Vector<float> sums[Height][Columns] = {};
  int64_t h = 0;
  for (; h + kLanes<float> <= width; h += kLanes<float>, packed += Height * kLanes<float>) {
    for (int64_t c = turn.mine; c < Columns; c += turn.all) foresee(next + c * weights.stride + h);
    Vector<float> weight[Columns];
    SOFTPROMPT_UNROLL for (int c = 0; c < Columns; ++c) weight[c] = load<Vector<float>>(weights.at(column + c) + h);
    SOFTPROMPT_UNROLL for (int r = 0; r < Height; ++r) {
      const Vector<float> row = load<Vector<float>>(packed + r * kLanes<float>);
      SOFTPROMPT_UNROLL for (int c = 0; c < Columns; ++c) sums[r][c] += row * weight[c];
    }
  }
  SOFTPROMPT_UNROLL for (int r = 0; r < Height; ++r) {
    float totals[Columns][4];
    SOFTPROMPT_UNROLL for (int c = 0; c < Columns; ++c) {
      float lanes[kLanes<float> / 4][4];
      std::memcpy(lanes, &sums[r][c], sizeof(lanes));
      for (int i = 0; i < 4; ++i) totals[c][i] = lanes[0][i];
      for (int part = 1; part < kLanes<float> / 4; ++part) {
        for (int i = 0; i < 4; ++i) totals[c][i] += lanes[part][i];
      }
    }
    float* to = out + r * out_stride;
    for (int c = 0; c < Columns; ++c) to[c] = (totals[c][0] + totals[c][1]) + (totals[c][2] + totals[c][3]);
    for (int64_t rest = h; rest < width; ++rest) {
      for (int c = 0; c < Columns; ++c) to[c] += rows.at(first + r)[rest] * weights.at(column + c)[rest];
    }
  }
}

// `out[r, v] = sum over h of rows[r, h] * weights[v, h]`, for some neighbouring weights.
void dot_rows(const Rows& rows, const Rows& weights, int64_t width, float* out, int64_t out_stride) {
  std::vector<float> packed(rows.count * width);
  pack_rows(rows, width, packed.data());
  const int64_t block = weights_of_a_block(width, kTileColumns);
  for (int64_t first = 0; first < weights.count; first += block) {
    const int64_t end = std::min(first + block, weights.count);
    for_tiles(rows.count, [&](int64_t row, Turn turn, auto height) {
      const float* tile = packed.data() + row * width;
      float* to = out + row * out_stride;
      int64_t column = first;
      for (; column + kTileColumns <= end; column += kTileColumns) {
        const float* next = weights.at(column + block);
        dot_tile<height, kTileColumns>(tile, rows, row, weights, column, width, next, turn, to + column, out_stride);
      }
      for (; column < end; ++column) {
        const float* next = weights.at(column + block);
        dot_tile<height, 1>(tile, rows, row, weights, column, width, next, turn, to + column, out_stride);
      }
    });
  }
}

// `out[r, h] += sum over v of factors[r, v] * weights[v, h]`, for the weights `begin .. end - 1`; `out` is dense.
void add_weighted(const Rows& factors, const Rows& weights, int64_t begin, int64_t end, int64_t width, float* out) {
  constexpr int64_t kStep = kTileColumns * kLanes<float>;
  for (int64_t first = begin; first < end; first += kSummedWeights) {
    const int64_t last = std::min(first + kSummedWeights, end);
    // After the last panel of these weights comes the first one of the next.
    const auto next = [&](int64_t column) {
      return column + kStep <= width ? weights.at(first) + column : weights.at(last);
    };
    const Factors<float> share{factors.at(0) + first, factors.stride, 1};
    multiply(share, weights.at(first), weights.stride, factors.count, width, last - first, out, width, true, next);
  }
}
