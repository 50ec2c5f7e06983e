// One row of each elementwise op. Included once for each instruction set, inside a namespace and a target of its
// own: therefore no include guard, no includes, and no function that is shared.

// out = x * scale / sqrt(mean(x^2) + eps); returns the factor of x.
template <class Value, class Sum>
Sum normalise(const Value* x, const Sum* scale, int64_t width, double eps, Value* out) {
  Sum squares = 0;
#pragma omp simd reduction(+ : squares)
  for (int64_t i = 0; i < width; ++i) {
    const Sum value = widen<Sum>(x[i]);
    squares += value * value;
  }
  const Sum inverse =
      static_cast<Sum>(1 / std::sqrt(static_cast<double>(squares) / static_cast<double>(width) + eps));
#pragma omp simd
  for (int64_t i = 0; i < width; ++i) out[i] = narrow<Value, Sum>(widen<Sum>(x[i]) * inverse * scale[i]);
  return inverse;
}

template <class Value, class Sum>
void normalise_backward(
    const Value* grad, const Value* x, const Sum* scale, int64_t width, Sum inverse, Value* d_x) {
  Sum product = 0;
#pragma omp simd reduction(+ : product)
  for (int64_t i = 0; i < width; ++i) product += widen<Sum>(grad[i]) * scale[i] * widen<Sum>(x[i]);
  const Sum shared = product * inverse * inverse * inverse / static_cast<Sum>(width);
#pragma omp simd
  for (int64_t i = 0; i < width; ++i) {
    d_x[i] = narrow<Value, Sum>(widen<Sum>(grad[i]) * scale[i] * inverse - widen<Sum>(x[i]) * shared);
  }
}

// An activation and its derivative.
struct Silu {
  template <class Sum>
  static inline Sum value(Sum x) {
    return x / (1 + exp_of(-x));
  }

  template <class Sum>
  static inline void value_and_derivative(Sum x, Sum& value, Sum& derivative) {
    const Sum sigmoid = 1 / (1 + exp_of(-x));
    value = x * sigmoid;
    derivative = sigmoid + value * (1 - sigmoid);
  }
};

struct TanhGelu {
  static constexpr double kFactor = 0.79788456080286535588, kCubic = 0.044715;  // sqrt(2 / pi)

  template <class Sum>
  static inline Sum tanh_at(Sum x) {
    return tanh_of(static_cast<Sum>(kFactor) * (x + static_cast<Sum>(kCubic) * x * x * x));
  }

  template <class Sum>
  static inline Sum value(Sum x) {
    return x / 2 * (1 + tanh_at(x));
  }

  template <class Sum>
  static inline void value_and_derivative(Sum x, Sum& value, Sum& derivative) {
    const Sum tanh = tanh_at(x), slope = static_cast<Sum>(kFactor) * (1 + static_cast<Sum>(3 * kCubic) * x * x);
    value = x / 2 * (1 + tanh);
    derivative = (1 + tanh) / 2 + x / 2 * (1 - tanh * tanh) * slope;
  }
};

template <class Activation, class Value, class Sum>
inline void gate_with(const Value* gate, const Value* up, int64_t width, Value* out) {
#pragma omp simd
  for (int64_t i = 0; i < width; ++i) {
    out[i] = narrow<Value, Sum>(Activation::value(widen<Sum>(gate[i])) * widen<Sum>(up[i]));
  }
}

template <class Activation, class Value, class Sum>
inline void gate_with_backward(
    const Value* grad, const Value* gate, const Value* up, int64_t width, Value* d_gate, Value* d_up) {
#pragma omp simd
  for (int64_t i = 0; i < width; ++i) {
    Sum value, derivative;
    Activation::value_and_derivative(widen<Sum>(gate[i]), value, derivative);
    const Sum of_out = widen<Sum>(grad[i]);
    d_gate[i] = narrow<Value, Sum>(of_out * widen<Sum>(up[i]) * derivative);
    d_up[i] = narrow<Value, Sum>(of_out * value);
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
