// The two passes over a row of logits. Included once for each instruction set, inside a namespace and a target
// of its own: therefore no include guard, no includes, and no function that is shared.

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
