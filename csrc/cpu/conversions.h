// 16-bit numbers to wider ones and back, as compilers turn it into vector code. Included once for each instruction
// set, inside a namespace and a target of its own: therefore no include guard, no includes, and no function that is
// shared.

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
