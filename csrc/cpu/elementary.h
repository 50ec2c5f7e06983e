// exp and tanh that compilers turn into vector code. Included once for each instruction set, inside a namespace and a
// target of its own: therefore no include guard, no includes, and no function that is shared.

// exp, with an error of about one unit in the last place; 0 below the smallest normal number (Cephes, Moshier).
inline float exp_of(float x) {
  constexpr float kLowest = -87.3365448f, kHighest = 88.3762589f;
  const float bounded = x > kHighest ? kHighest : (x < kLowest ? kLowest : x);
  // Adding 1.5 * 2^23 rounds to a whole number and leaves it in the lowest bits.
  const float shifted = bounded * 1.44269504088896341f + 12582912.0f;
  const float whole = shifted - 12582912.0f;
  const float rest = (bounded - whole * 0.693359375f) + whole * 2.12194440e-4f;
  float value = 1.9875691500e-4f;
  value = value * rest + 1.3981999507e-3f;
  value = value * rest + 8.3334519073e-3f;
  value = value * rest + 4.1665795894e-2f;
  value = value * rest + 1.6666665459e-1f;
  value = value * rest + 5.0000001201e-1f;
  value = value * rest * rest + rest + 1.0f;
  uint32_t bits;
  std::memcpy(&bits, &shifted, 4);
  bits = (bits << 23) + 0x3f800000u;
  float power;
  std::memcpy(&power, &bits, 4);
  return x < kLowest ? 0.0f : value * power;
}

inline double exp_of(double x) {
  return std::exp(x);
}

// tanh, by a polynomial near 0 where the quotient would lose its digits (Cephes, Moshier).
inline float tanh_of(float x) {
  const float size = x < 0 ? -x : x;
  const float square = x * x;
  float near = -5.70498872745e-3f;
  near = near * square + 2.06390887954e-2f;
  near = near * square - 5.37397155531e-2f;
  near = near * square + 1.33314422036e-1f;
  near = near * square - 3.33332819422e-1f;
  near = near * square * x + x;
  const float far = 1.0f - 2.0f / (exp_of(2.0f * size) + 1.0f);
  return size < 0.625f ? near : (x < 0 ? -far : far);
}

inline double tanh_of(double x) {
  return std::tanh(x);
}
