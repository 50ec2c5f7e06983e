// One row of each elementwise op. Included once for each instruction set, inside a namespace and a target of its
// own: therefore no include guard, no includes, and no function that is shared.

// A sum of many numbers is made of sums of this many: in fp32 a long one would lose digits.
constexpr int64_t kSummed = 512;

// out = x * scale / sqrt(mean(x^2) + eps); returns the factor of x.
template <class Value, class Sum>
Sum normalise(const Value* x, const Sum* scale, int64_t width, double eps, Value* out) {
  double total = 0;
  for (int64_t begin = 0; begin < width; begin += kSummed) {
    const int64_t end = std::min(width, begin + kSummed);
    Sum squares = 0;
#pragma omp simd reduction(+ : squares)
    for (int64_t i = begin; i < end; ++i) {
      const Sum value = widen<Sum>(x[i]);
      squares += value * value;
    }
    total += squares;
  }
  const Sum inverse = static_cast<Sum>(1 / std::sqrt(total / static_cast<double>(width) + eps));
#pragma omp simd
  for (int64_t i = 0; i < width; ++i) out[i] = narrow<Value, Sum>(widen<Sum>(x[i]) * inverse * scale[i]);
  return inverse;
}

template <class Value, class Sum>
void normalise_backward(
    const Value* grad, const Value* x, const Sum* scale, int64_t width, Sum inverse, Value* d_x) {
  double total = 0;
  for (int64_t begin = 0; begin < width; begin += kSummed) {
    const int64_t end = std::min(width, begin + kSummed);
    Sum products = 0;
#pragma omp simd reduction(+ : products)
    for (int64_t i = begin; i < end; ++i) {
      products += widen<Sum>(grad[i]) * scale[i] * (widen<Sum>(x[i]) * inverse);
    }
    total += products;
  }
  const Sum mean = static_cast<Sum>(total / static_cast<double>(width));
#pragma omp simd
  for (int64_t i = 0; i < width; ++i) {
    d_x[i] = narrow<Value, Sum>((widen<Sum>(grad[i]) * scale[i] - widen<Sum>(x[i]) * inverse * mean) * inverse);
  }
}

// 1 / (1 + exp(-x)) and its derivative, by the exponential that does not overflow; nothing cancels.
template <class Sum>
inline Sum sigmoid_of(Sum x, Sum& derivative) {
  const Sum small = exp_of(x < 0 ? x : -x), factor = 1 / (1 + small);
  derivative = small * factor * factor;
  return (x < 0 ? small : 1) * factor;
}

// Activations x * sigmoid(f(x)): f and its derivative.
struct Silu {
  template <class Sum>
  static inline Sum inner(Sum x) {
    return x;
  }

  template <class Sum>
  static inline Sum slope(Sum) {
    return 1;
  }
};

// x (1 + tanh(g(x))) / 2 = x * sigmoid(2 g(x)), in which nothing cancels.
struct TanhGelu {
  static constexpr double kLinear = 1.5957691216057308, kCubic = 0.044715 * kLinear;  // 2 sqrt(2 / pi)

  template <class Sum>
  static inline Sum inner(Sum x) {
    return x * (static_cast<Sum>(kLinear) + static_cast<Sum>(kCubic) * x * x);
  }

  template <class Sum>
  static inline Sum slope(Sum x) {
    return static_cast<Sum>(kLinear) + static_cast<Sum>(3 * kCubic) * x * x;
  }
};

template <class Activation, class Value, class Sum>
inline void gate_with(const Value* gate, const Value* up, int64_t width, Value* out) {
#pragma omp simd
  for (int64_t i = 0; i < width; ++i) {
    const Sum x = widen<Sum>(gate[i]);
    Sum derivative;
    out[i] = narrow<Value, Sum>(x * sigmoid_of(Activation::inner(x), derivative) * widen<Sum>(up[i]));
  }
}

template <class Activation, class Value, class Sum>
inline void gate_with_backward(
    const Value* grad, const Value* gate, const Value* up, int64_t width, Value* d_gate, Value* d_up) {
#pragma omp simd
  for (int64_t i = 0; i < width; ++i) {
    const Sum x = widen<Sum>(gate[i]), of_out = widen<Sum>(grad[i]);
    Sum derivative;
    const Sum sigmoid = sigmoid_of(Activation::inner(x), derivative);
    d_gate[i] = narrow<Value, Sum>(of_out * widen<Sum>(up[i]) * (sigmoid + x * derivative * Activation::slope(x)));
    d_up[i] = narrow<Value, Sum>(of_out * (x * sigmoid));
  }
}

// Numbers of ACTIVATIONS in softprompt/ops/glu.py: 0 is SiLU, 1 GELU by tanh.
template <class Value, class Sum>
void gate_row(int64_t activation, const Value* gate, const Value* up, int64_t width, Value* out) {
  activation == 0 ? gate_with<Silu, Value, Sum>(gate, up, width, out)
                  : gate_with<TanhGelu, Value, Sum>(gate, up, width, out);
}

template <class Value, class Sum>
void gate_row_backward(
    int64_t activation,
    const Value* grad,
    const Value* gate,
    const Value* up,
    int64_t width,
    Value* d_gate,
    Value* d_up) {
  activation == 0 ? gate_with_backward<Silu, Value, Sum>(grad, gate, up, width, d_gate, d_up)
                  : gate_with_backward<TanhGelu, Value, Sum>(grad, gate, up, width, d_gate, d_up);
}

// The first and the second number of each pair, `step` apart, turned by the angle of the pair.
template <class Value, class Sum>
void rotate_pairs(
    const Value* x, int64_t step, int64_t second, const Sum* cos, const Sum* sin, int64_t pairs, Value* out) {
#pragma omp simd
  for (int64_t i = 0; i < pairs; ++i) {
    const int64_t a = i * step, b = a + second;
    const Sum first = widen<Sum>(x[a]), other = widen<Sum>(x[b]);
    out[a] = narrow<Value, Sum>(first * cos[a] - other * sin[a]);
    out[b] = narrow<Value, Sum>(other * cos[b] + first * sin[b]);
  }
}

template <class Value, class Sum>
void rotate_row(
    const Value* x, const Sum* cos, const Sum* sin, int64_t rotated, int64_t width, bool interleaved, Value* out) {
  const int64_t pairs = rotated / 2;
  if (interleaved) {
    rotate_pairs<Value, Sum>(x, 2, 1, cos, sin, pairs, out);
  } else {
    rotate_pairs<Value, Sum>(x, 1, pairs, cos, sin, pairs, out);
  }
  for (int64_t i = rotated; i < width; ++i) out[i] = x[i];
}
