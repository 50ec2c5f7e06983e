// The two passes over a row of logits. Included once for each instruction set, inside a namespace and a target
// of its own: therefore no include guard, no includes, and no function that is shared.

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

template <class Sum>
inline Sum widen(Sum value) {
  return value;
}

template <class Sum>
inline Sum widen(c10::BFloat16 value) {
  const uint32_t bits = static_cast<uint32_t>(value.x) << 16;
  float wide;
  std::memcpy(&wide, &bits, 4);
  return wide;
}

template <class Sum>
inline Sum widen(c10::Half value) {
  return static_cast<float>(value);
}

template <class Logit, class Sum>
inline Logit narrow(Sum value) {
  if constexpr (std::is_same_v<Logit, c10::BFloat16>) {
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
    const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    const uint32_t result = (bits & 0x7fffffffu) > 0x7f800000u ? 0x7fc0u : rounded;
    return c10::BFloat16(static_cast<unsigned short>(result), c10::BFloat16::from_bits());
  } else {
    return static_cast<Logit>(value);
  }
}

// Bias, scale and softcap of some neighbouring logits.
template <class Logit, class Sum>
void load(const Logit* logits, const Sum* bias, int64_t count, const Options<Sum>& options, Sum* to) {
  for (int64_t i = 0; i < count; ++i) to[i] = widen<Sum>(logits[i]);
  if (bias != nullptr) {
    for (int64_t i = 0; i < count; ++i) to[i] += bias[i];
  }
  const Sum scale = options.logit_scale, softcap = options.softcap;
  if (scale != 1) {
    for (int64_t i = 0; i < count; ++i) to[i] *= scale;
  }
  if (softcap != 0) {
    const Sum inverse = 1 / softcap;
#pragma omp simd
    for (int64_t i = 0; i < count; ++i) to[i] = softcap * tanh_of(to[i] * inverse);
  }
}

// Maximum, sum of exponentials below it, and plain sum of a share of a row.
template <class Logit, class Sum>
Sums<Sum> sums_of(const Logit* logits, const Sum* bias, int64_t count, const Options<Sum>& options) {
  alignas(64) Sum values[kBlock];
  Sums<Sum> sums;
  for (int64_t start = 0; start < count; start += kBlock) {
    const int64_t size = std::min(kBlock, count - start);
    load(logits + start, bias == nullptr ? nullptr : bias + start, size, options, values);
    Sum largest = sums.maximum;
#pragma omp simd reduction(max : largest)
    for (int64_t i = 0; i < size; ++i) largest = values[i] > largest ? values[i] : largest;
    if (largest > sums.maximum) {
      sums.total *= std::exp(static_cast<double>(sums.maximum) - static_cast<double>(largest));
      sums.maximum = largest;
    }
    for (int64_t part = 0; part < size; part += kPart) {
      const int64_t end = std::min(part + kPart, size);
      Sum total = 0, plain = 0;
#pragma omp simd reduction(+ : total)
      for (int64_t i = part; i < end; ++i) total += exp_of(values[i] - largest);
      sums.total += total;
      if (options.label_smoothing > 0) {
#pragma omp simd reduction(+ : plain)
        for (int64_t i = part; i < end; ++i) plain += values[i];
        sums.plain += plain;
      }
    }
  }
  return sums;
}

// Overwrites a share of a row of logits with its gradient.
template <class Logit, class Sum>
void write_gradient(
    Logit* logits,
    const Sum* bias,
    int64_t count,
    int64_t target,  // in this share; anything else: the target is in another one
    Sum maximum,
    Sum inverse_total,
    Sum factor,
    const Options<Sum>& options) {
  alignas(64) Sum values[kBlock];
  alignas(64) Sum gradient[kBlock];
  for (int64_t start = 0; start < count; start += kBlock) {
    const int64_t size = std::min(kBlock, count - start);
    load(logits + start, bias == nullptr ? nullptr : bias + start, size, options, values);
    const Sum uniform = options.uniform;
    for (int64_t i = 0; i < size; ++i) gradient[i] = exp_of(values[i] - maximum) * inverse_total - uniform;
    if (target >= start && target < start + size) gradient[target - start] -= 1 - options.label_smoothing;
    if (options.softcap != 0) {
      const Sum inverse = 1 / options.softcap;
      for (int64_t i = 0; i < size; ++i) {
        const Sum capped = values[i] * inverse;
        gradient[i] *= 1 - capped * capped;
      }
    }
    for (int64_t i = 0; i < size; ++i) logits[start + i] = narrow<Logit, Sum>(gradient[i] * factor);
  }
}
