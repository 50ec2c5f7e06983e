// Stands in for csrc/cuda/launch.cuh where there is no GPU: kernels run on the CPU, with real warps and barriers.
//
// Every thread of a block is a fiber of one thread of the CPU, which runs it until it waits for others; blocks that
// wait for each other run on threads of their own. A kernel whose threads do not all arrive at a barrier, or whose
// warp votes without some of its lanes, stops with a message. Reads and writes of memory are plain ones, so a
// sanitizer sees those outside of a tensor.

#pragma once

#include <ucontext.h>

#include <barrier>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <memory>
#include <thread>
#include <vector>

#include "../tensors.h"

#define __global__
#define __device__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __shared__ static thread_local  // a block is on one thread of the CPU

struct alignas(16) int4 {
  int x, y, z, w;
};

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};

inline thread_local dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace softprompt {

using std::max;
using std::min;

namespace emulated {

constexpr int kMultiprocessors = 4;
constexpr int kBlocksAtOnce = 2;
constexpr size_t kStackBytes = 128 << 10;

[[noreturn]] inline void stop(const char* reason) {
  std::fprintf(stderr, "emulated kernel: %s (block %u, thread %u)\n", reason, blockIdx.x, threadIdx.x);
  std::abort();
}

// Lets those that arrive wait for each other, again and again.
struct Rendezvous {
  unsigned arrived = 0;
  unsigned long generation = 0;
};

class Block {
 public:
  Block(dim3 grid, dim3 size, dim3 index, const std::function<void()>& kernel, std::barrier<>* grid_barrier)
      : grid_(grid), size_(size), index_(index), kernel_(kernel), grid_barrier_(grid_barrier) {
    fibers_.resize(size.x * size.y * size.z);
    warps_.resize((fibers_.size() + 31) / 32);
    slots_.resize(fibers_.size());
  }

  void run() {
    current_block() = this;
    live_ = static_cast<unsigned>(fibers_.size());
    for (Fiber& fiber : fibers_) {
      fiber.stack.reset(new char[kStackBytes]);
      getcontext(&fiber.context);
      fiber.context.uc_stack.ss_sp = fiber.stack.get();
      fiber.context.uc_stack.ss_size = kStackBytes;
      fiber.context.uc_link = &scheduler_;
      makecontext(&fiber.context, reinterpret_cast<void (*)()>(&Block::start), 0);
    }
    while (live_ > 0) {
      const unsigned long before = progress_;
      for (current_ = 0; current_ < fibers_.size(); ++current_) {
        if (fibers_[current_].done) continue;
        place();
        swapcontext(&scheduler_, &fibers_[current_].context);
      }
      if (progress_ == before) stop("some threads wait for others that never come");
    }
    current_block() = nullptr;
  }

  void sync() {
    wait(all_, [this] { return live_; });
  }

  void sync_grid() {
    if (grid_barrier_ == nullptr) stop("sync_grid() in a kernel that was not launched together");
    if (live_ != fibers_.size()) stop("a thread has ended before sync_grid()");
    sync();
    if (current_ == 0) grid_barrier_->arrive_and_wait();
    sync();
  }

  // The value of every lane of the own warp, which all of its lanes give.
  template <class T, class Use>
  auto exchange(unsigned mask, T value, Use use) {
    if (mask != 0xffffffffu) stop("votes are for whole warps here");
    static_assert(sizeof(T) <= 8);
    std::memcpy(&slots_[current_], &value, sizeof(T));
    const size_t first = current_ / 32 * 32;
    Rendezvous& warp = warps_[current_ / 32];
    const auto lanes = [this, first] {
      if (first + 32 > fibers_.size()) stop("a vote in a warp of fewer than 32 threads");
      for (size_t lane = first; lane < first + 32; ++lane) {
        if (fibers_[lane].done) stop("a vote in a warp that has lost a lane");
      }
      return 32u;
    };
    wait(warp, lanes);
    const auto result = use([this, first](int lane) {
      T other;
      std::memcpy(&other, &slots_[first + lane], sizeof(T));
      return other;
    });
    wait(warp, lanes);
    return result;
  }

  int lane() const {
    return static_cast<int>(current_ % 32);
  }

  static Block*& current_block() {
    static thread_local Block* block = nullptr;
    return block;
  }

 private:
  struct Fiber {
    ucontext_t context;
    std::unique_ptr<char[]> stack;
    bool done = false;
  };

  static void start() {
    Block& block = *current_block();
    block.kernel_();
    block.fibers_[block.current_].done = true;
    --block.live_;
    ++block.progress_;
  }

  void place() {
    const unsigned number = static_cast<unsigned>(current_);
    threadIdx = dim3(number % size_.x, number / size_.x % size_.y, number / size_.x / size_.y);
    blockIdx = index_;
    blockDim = size_;
    gridDim = grid_;
  }

  template <class Expected>
  void wait(Rendezvous& place_of, Expected expected) {
    const unsigned long generation = place_of.generation;
    ++place_of.arrived;
    ++progress_;
    while (place_of.generation == generation) {
      if (place_of.arrived >= expected()) {
        place_of.arrived = 0;
        ++place_of.generation;
        ++progress_;
      } else {
        const size_t own = current_;
        swapcontext(&fibers_[own].context, &scheduler_);
      }
    }
  }

  dim3 grid_, size_, index_;
  std::function<void()> kernel_;
  std::barrier<>* grid_barrier_;
  std::vector<Fiber> fibers_;
  std::vector<Rendezvous> warps_;
  std::vector<uint64_t> slots_;
  Rendezvous all_;
  ucontext_t scheduler_;
  size_t current_ = 0;
  unsigned live_ = 0;
  unsigned long progress_ = 0;
};

struct NoGuard {
  ~NoGuard() {}
};

}  // namespace emulated

inline void __syncthreads() {
  emulated::Block::current_block()->sync();
}

inline void sync_grid() {
  emulated::Block::current_block()->sync_grid();
}

template <class T>
T __shfl_xor_sync(unsigned mask, T value, int other) {
  auto& block = *emulated::Block::current_block();
  return block.exchange(mask, value, [&](auto of_lane) { return of_lane(block.lane() ^ other); });
}

inline unsigned __ballot_sync(unsigned mask, bool vote) {
  auto& block = *emulated::Block::current_block();
  return block.exchange(mask, vote, [](auto of_lane) {
    unsigned votes = 0;
    for (int lane = 0; lane < 32; ++lane) votes |= static_cast<unsigned>(of_lane(lane)) << lane;
    return votes;
  });
}

inline int __popc(unsigned bits) {
  return __builtin_popcount(bits);
}

inline emulated::NoGuard on_device_of(const Tensor&) {
  return {};
}

inline int64_t multiprocessors_of(const Tensor&) {
  return emulated::kMultiprocessors;
}

template <class... Parameters>
int64_t blocks_at_once(void (*)(Parameters...), int) {
  return emulated::kBlocksAtOnce;
}

template <class... Parameters>
void launch(
    void (*kernel)(Parameters...), dim3 grid, dim3 block, const Tensor&, typename Type<Parameters>::type... arguments) {
  const std::function<void()> call = [&] { kernel(arguments...); };
  for (unsigned y = 0; y < grid.y; ++y) {
    for (unsigned x = 0; x < grid.x; ++x) emulated::Block(grid, block, dim3(x, y), call, nullptr).run();
  }
}

template <class Parameter>
void launch_together(void (*kernel)(Parameter), dim3 grid, dim3 block, const Tensor&, Parameter argument) {
  const std::function<void()> call = [&] { kernel(argument); };
  const unsigned count = grid.x * grid.y;
  if (count > emulated::kMultiprocessors * emulated::kBlocksAtOnce) emulated::stop("more blocks than fit at once");
  std::barrier<> barrier(count);
  std::vector<std::thread> threads;
  for (unsigned number = 0; number < count; ++number) {
    threads.emplace_back([&, number] {
      emulated::Block(grid, block, dim3(number % grid.x, number / grid.x), call, &barrier).run();
    });
  }
  for (std::thread& thread : threads) thread.join();
}

}  // namespace softprompt
