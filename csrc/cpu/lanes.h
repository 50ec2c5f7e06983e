// Vectors of numbers, and which instructions of this processor are used for them.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <vector>

#include "../tensors.h"

#if defined(__GNUC__)
#define SOFTPROMPT_UNROLL _Pragma("GCC unroll 8")
#else
#define SOFTPROMPT_UNROLL
#endif

// Code that is compiled for several instruction sets is included once for each, inside a namespace and a target.
#if defined(__GNUC__) && !defined(__clang__) && defined(__x86_64__)
#define SOFTPROMPT_TARGETS 1
#endif

namespace softprompt {

#if defined(__GNUC__)
template <class Scalar, int Bytes>
struct Lanes {
  typedef Scalar type __attribute__((vector_size(Bytes)));
};
#else
template <class Scalar, int Bytes>
struct Lanes {
  struct type {
    static constexpr int kSize = Bytes / sizeof(Scalar);
    Scalar lanes[kSize] = {};
    friend type operator*(const type& a, const type& b) {
      type product;
      for (int i = 0; i < kSize; ++i) product.lanes[i] = a.lanes[i] * b.lanes[i];
      return product;
    }
    friend type operator*(Scalar a, const type& b) {
      type product;
      for (int i = 0; i < kSize; ++i) product.lanes[i] = a * b.lanes[i];
      return product;
    }
    type& operator+=(const type& other) {
      for (int i = 0; i < kSize; ++i) lanes[i] += other.lanes[i];
      return *this;
    }
  };
};
#endif

// Best: the widest that this processor has. The others are there to be tested. Their numbers are INSTRUCTIONS in
// softprompt/ops/registry.py.
enum class Instructions : int64_t { kBest, kBaseline, kAvx2, kAvx512 };

inline Instructions instructions_of(int64_t number) {
  const Instructions wanted{number};
  const bool best = wanted == Instructions::kBest;
#if defined(SOFTPROMPT_TARGETS)
  const bool has_avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  const bool has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  if (has_avx512 && (best || wanted == Instructions::kAvx512)) return Instructions::kAvx512;
  if (has_avx2 && (best || wanted == Instructions::kAvx2)) return Instructions::kAvx2;
#endif
  STD_TORCH_CHECK(
      best || wanted == Instructions::kBaseline, "this processor or build has no instructions of number ", number);
  return Instructions::kBaseline;
}

// Which tile of rows this is: each asks for its own share of what is read next.
struct Turn {
  int64_t mine;
  int64_t all;
};

inline void foresee(const void* address) {
#if defined(__GNUC__)
  __builtin_prefetch(address, 0, 2);
#else
  (void)address;
#endif
}

}  // namespace softprompt
