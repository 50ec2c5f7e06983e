// Products of small and of narrow matrices. Included once for each instruction set, inside a namespace and a target
// of its own: therefore no include guard, no includes, and no function that is shared.

template <class Scalar>
using Vector = typename Lanes<Scalar, kVectorBytes>::type;

template <class Scalar>
constexpr int64_t kLanes = kVectorBytes / static_cast<int64_t>(sizeof(Scalar));

template <class Value, class Scalar>
inline Value load(const Scalar* from) {
  Value value;
  std::memcpy(&value, from, sizeof(value));
  return value;
}

// Calls `visit` with the first row of each tile, its turn and, as a constant, its height: heights differ by one at
// most.
template <class Visit>
inline void for_tiles(int64_t num_rows, Visit visit) {
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

// A matrix of any strides, whose entries are read one by one.
template <class Scalar>
struct Factors {
  const Scalar* data;
  int64_t row;     // strides
  int64_t column;

  Factors at(int64_t first_row, int64_t first_column) const {
    return {data + first_row * row + first_column * column, row, column};
  }
};

// `c (+)= a @ b` for a tile of c: `Height` rows of `Columns` vectors, b and c with dense rows. While it computes it
// asks for its share of the `depth` rows at `next`, if any.
template <int Height, int Columns, class Value, class Scalar>
inline void product_tile(
    const Factors<Scalar>& a, const Scalar* b, int64_t b_row, int64_t depth, const Scalar* next, Turn turn, Scalar* c,
    int64_t c_row, bool add) {
  constexpr int64_t kSize = sizeof(Value) / sizeof(Scalar);
  Value sums[Height][Columns] = {};
  for (int64_t k = 0; k < depth; ++k) {
    if (next != nullptr) {
      for (int64_t column = turn.mine; column < Columns; column += turn.all) {
        foresee(next + k * b_row + column * kSize);
      }
    }
    Value values[Columns];
    SOFTPROMPT_UNROLL for (int column = 0; column < Columns; ++column) {
      values[column] = load<Value>(b + k * b_row + column * kSize);
    }
    SOFTPROMPT_UNROLL for (int row = 0; row < Height; ++row) {
      const Scalar factor = a.data[row * a.row + k * a.column];
      SOFTPROMPT_UNROLL for (int column = 0; column < Columns; ++column) sums[row][column] += factor * values[column];
    }
  }
  SOFTPROMPT_UNROLL for (int row = 0; row < Height; ++row) {
    SOFTPROMPT_UNROLL for (int column = 0; column < Columns; ++column) {
      Scalar* to = c + row * c_row + column * kSize;
      if (add) sums[row][column] += load<Value>(to);
      std::memcpy(to, &sums[row][column], sizeof(Value));
    }
  }
}

// `c (+)= a @ b`: [m, k] and [k, n] to [m, n]. `next_panel(column)` is what is read after the panel of columns that
// begins there, or nullptr.
template <class Scalar, class Next>
inline void multiply(
    const Factors<Scalar>& a, const Scalar* b, int64_t b_row, int64_t m, int64_t n, int64_t k, Scalar* c, int64_t c_row,
    bool add, Next next_panel) {
  constexpr int64_t kStep = kTileColumns * kLanes<Scalar>;
  int64_t column = 0;
  for (; column + kStep <= n; column += kStep) {
    const Scalar* next = next_panel(column + kStep);
    for_tiles(m, [&](int64_t row, Turn turn, auto height) {
      product_tile<height, kTileColumns, Vector<Scalar>>(
          a.at(row, 0), b + column, b_row, k, next, turn, c + row * c_row + column, c_row, add);
    });
  }
  for (; column + kLanes<Scalar> <= n; column += kLanes<Scalar>) {
    for_tiles(m, [&](int64_t row, Turn turn, auto height) {
      product_tile<height, 1, Vector<Scalar>>(
          a.at(row, 0), b + column, b_row, k, static_cast<const Scalar*>(nullptr), turn, c + row * c_row + column, c_row,
          add);
    });
  }
  for (; column < n; ++column) {
    for_tiles(m, [&](int64_t row, Turn turn, auto height) {
      product_tile<height, 1, Scalar>(
          a.at(row, 0), b + column, b_row, k, static_cast<const Scalar*>(nullptr), turn, c + row * c_row + column, c_row,
          add);
    });
  }
}

template <class Scalar>
inline void multiply(
    const Factors<Scalar>& a, const Scalar* b, int64_t b_row, int64_t m, int64_t n, int64_t k, Scalar* c, int64_t c_row,
    bool add) {
  multiply(a, b, b_row, m, n, k, c, c_row, add, [](int64_t) -> const Scalar* { return nullptr; });
}
