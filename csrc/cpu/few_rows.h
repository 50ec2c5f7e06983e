// Products of a few rows with a large fp32 matrix. Included once for each instruction set, inside a namespace and a
// target of its own: therefore no include guard, no includes, and no function that is shared.
//
// A block of weights stays in the second-level cache while all tiles of rows are multiplied with it, and each tile
// asks for its share of the next block: memory and arithmetic then go on side by side, where a product that reads
// first and computes then takes the sum of both.

constexpr int64_t kLanes = sizeof(Vector) / sizeof(float);

inline Vector load(const float* from) {
  Vector value;
  std::memcpy(&value, from, sizeof(value));
  return value;
}

inline void store(const Vector& value, float* to) {
  std::memcpy(to, &value, sizeof(value));
}

// Calls `visit` with the first row of each tile and, as a constant, its height: heights differ by one at most.
template <class Visit>
void for_tiles(int64_t num_rows, Visit visit) {
  const int64_t tiles = (num_rows + kTileRows - 1) / kTileRows;
  for (int64_t tile = 0; tile < tiles; ++tile) {
    const int64_t row = num_rows * tile / tiles, height = num_rows * (tile + 1) / tiles - row;
    const Turn turn{tile, tiles};
    if (height == 1) visit(row, turn, std::integral_constant<int, 1>{});
    if (height == 2) visit(row, turn, std::integral_constant<int, 2>{});
    if (height == 3) visit(row, turn, std::integral_constant<int, 3>{});
    if constexpr (kTileRows > 3) {
      if (height == 4) visit(row, turn, std::integral_constant<int, 4>{});
      if (height == 5) visit(row, turn, std::integral_constant<int, 5>{});
      if (height == 6) visit(row, turn, std::integral_constant<int, 6>{});
    }
  }
}

// The rows of each tile side by side, a vector of each in turn, so that a tile reads one stream instead of several.
inline void pack_rows(const Rows& rows, int64_t width, float* to) {
  for_tiles(rows.count, [&](int64_t first, Turn, auto height) {
    float* out = to + first * width;
    for (int64_t h = 0; h + kLanes <= width; h += kLanes) {
      for (int64_t row = first; row < first + height; ++row, out += kLanes) store(load(rows.at(row) + h), out);
    }
  });
}

// Dot products of a tile of rows with `Columns` neighbouring weights.
template <int Height, int Columns>
inline void dot_tile(
    const float* packed, const Rows& rows, int64_t first, const Rows& weights, int64_t column, int64_t width,
    const float* next, Turn turn, float* out, int64_t out_stride) {
  Vector sums[Height][Columns] = {};
  int64_t h = 0;
  for (; h + kLanes <= width; h += kLanes, packed += Height * kLanes) {
    for (int64_t c = turn.mine; c < Columns; c += turn.all) foresee(next + c * weights.stride + h);
    Vector weight[Columns];
    SOFTPROMPT_UNROLL for (int c = 0; c < Columns; ++c) weight[c] = load(weights.at(column + c) + h);
    SOFTPROMPT_UNROLL for (int r = 0; r < Height; ++r) {
      const Vector row = load(packed + r * kLanes);
      SOFTPROMPT_UNROLL for (int c = 0; c < Columns; ++c) sums[r][c] += row * weight[c];
    }
  }
  SOFTPROMPT_UNROLL for (int r = 0; r < Height; ++r) {
    float totals[Columns][4];
    SOFTPROMPT_UNROLL for (int c = 0; c < Columns; ++c) {
      float lanes[kLanes / 4][4];
      std::memcpy(lanes, &sums[r][c], sizeof(lanes));
      for (int i = 0; i < 4; ++i) totals[c][i] = lanes[0][i];
      for (int part = 1; part < kLanes / 4; ++part) {
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

// A tile of `out += factors @ weights`, over the weights `first .. end - 1` and `Columns` vectors from `h` on.
template <int Height, int Columns, class Lanes>
inline void outer_tile(
    const Rows& factors, int64_t row, const Rows& weights, int64_t first, int64_t end, int64_t h, const float* next,
    Turn turn, float* out, int64_t width) {
  constexpr int64_t kSize = sizeof(Lanes) / sizeof(float);
  Lanes sums[Height][Columns] = {};
  for (int64_t v = first; v < end; ++v, next += weights.stride) {
    for (int64_t c = turn.mine; c < Columns; c += turn.all) foresee(next + c * kSize);
    Lanes weight[Columns];
    SOFTPROMPT_UNROLL for (int c = 0; c < Columns; ++c) {
      std::memcpy(&weight[c], weights.at(v) + h + c * kSize, sizeof(Lanes));
    }
    SOFTPROMPT_UNROLL for (int r = 0; r < Height; ++r) {
      const float factor = factors.at(row + r)[v];
      SOFTPROMPT_UNROLL for (int c = 0; c < Columns; ++c) sums[r][c] += factor * weight[c];
    }
  }
  for (int r = 0; r < Height; ++r) {
    for (int c = 0; c < Columns; ++c) {
      float* to = out + (row + r) * width + h + c * kSize;
      Lanes total;
      std::memcpy(&total, to, sizeof(total));
      total += sums[r][c];
      std::memcpy(to, &total, sizeof(total));
    }
  }
}

// `out[r, h] += sum over v of factors[r, v] * weights[v, h]`, for the weights `begin .. end - 1`; `out` is dense.
void add_weighted(
    const Rows& factors, const Rows& weights, int64_t begin, int64_t end, int64_t width, float* out) {
  constexpr int64_t kStep = kTileColumns * kLanes;
  for (int64_t first = begin; first < end; first += kSummedWeights) {
    const int64_t last = std::min(first + kSummedWeights, end);
    int64_t h = 0;
    for (; h + kStep <= width; h += kStep) {
      const float* next = h + 2 * kStep <= width ? weights.at(first) + h + kStep : weights.at(last);
      for_tiles(factors.count, [&](int64_t row, Turn turn, auto height) {
        outer_tile<height, kTileColumns, Vector>(factors, row, weights, first, last, h, next, turn, out, width);
      });
    }
    for (; h + kLanes <= width; h += kLanes) {
      for_tiles(factors.count, [&](int64_t row, Turn turn, auto height) {
        outer_tile<height, 1, Vector>(factors, row, weights, first, last, h, weights.at(last), turn, out, width);
      });
    }
    for (; h < width; ++h) {
      for_tiles(factors.count, [&](int64_t row, Turn turn, auto height) {
        outer_tile<height, 1, float>(factors, row, weights, first, last, h, weights.at(last), turn, out, width);
      });
    }
  }
}
