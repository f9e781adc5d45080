// Runs the blocks of a launch one after the other, the threads of a block as fibers of the calling thread: a thread of
// CUDA's runs until it has to wait for others, and one that never waits runs to its end without a switch.
//
// What a device leaves open differs from launch to launch, by a seed (FASTVAE_CUDA_SEED): the order of the blocks and
// that in which the threads of a block begin. Shared memory begins as NaN in every block, and each variable in it is an
// allocation, so that AddressSanitizer sees an index off its end. To ThreadSanitizer each thread of each block is one
// that begins with the launch, and nothing but barriers orders them: it sees blocks that write to one place, too.
#pragma once

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <memory>
#include <numeric>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#include "host_fibers.h"

namespace host_cuda {

// A built-in index. To ThreadSanitizer atomic: it is written between the turns of the fibers that read it.
#if defined(__SANITIZE_THREAD__)
class Index {
 public:
  Index(unsigned value) : value_(value) {}  // NOLINT(google-explicit-constructor)
  Index& operator=(unsigned value) {
    __atomic_store_n(&value_, value, __ATOMIC_RELAXED);
    return *this;
  }
  operator unsigned() const { return __atomic_load_n(&value_, __ATOMIC_RELAXED); }  // NOLINT

 private:
  unsigned value_;
};
#else
using Index = unsigned;
#endif

}  // namespace host_cuda

struct dim3 {
  host_cuda::Index x = 1;
  host_cuda::Index y = 1;
  host_cuda::Index z = 1;
};
inline dim3 threadIdx;
inline dim3 blockIdx;
inline dim3 blockDim;
inline dim3 gridDim;

namespace host_cuda {

constexpr unsigned kWarp = 32;

class Blocks {
 public:
  Blocks() {
    const char* const seed = std::getenv("FASTVAE_CUDA_SEED");
    random_.seed(seed == nullptr ? 7 : static_cast<unsigned>(std::strtoul(seed, nullptr, 10)));
  }

  // Calls call(what) in every thread of every block. most_shared: bytes of shared memory that a block can have in all.
  void run(unsigned grid, unsigned threads, size_t dynamic_bytes, size_t most_shared, void (*call)(const void*),
           const void* what) {
    call_ = call;
    what_ = what;
    threads_ = threads;
    most_shared_ = most_shared;
    here_.identity = identity();
    release(&begun_);
    gridDim.x = grid;
    blockDim.x = threads;
    std::vector<unsigned> order(grid);
    std::iota(order.begin(), order.end(), 0U);
    std::shuffle(order.begin(), order.end(), random_);
    for (const unsigned block : order) {
      blockIdx.x = block;
      run_block(dynamic_bytes);
    }
    acquire(&ended_);
    memory_.clear();
    if (kUnderThreadSanitizer) {
      idle_.clear();
      for (Worker& worker : workers_.back()) {
        idle_.push_back(&worker);
      }
    }
  }

  // What follows is called by the threads of a block. The line: where, since all must wait at one place.

  void meet_block(unsigned line) { ask({kBlock, line}); }
  void meet_warp(unsigned line) { ask({kWarpOf, line}); }

  // What another lane of the warp gives; all of them call.
  uint64_t exchange(unsigned line, uint64_t value, unsigned lane) { return ask({kWarpOf, line, value, lane}); }

  // The variable of this key in shared memory; null: the dynamic memory.
  void* shared(const void* key, size_t bytes) {
    const uint64_t address = ask({kShared, 0, bytes, 0, key});
    return reinterpret_cast<void*>(address);  // NOLINT(performance-no-int-to-ptr)
  }

 private:
  enum Kind { kBlock, kWarpOf, kShared, kReturned };

  struct Request {
    Kind kind;
    unsigned line = 0;
    uint64_t value = 0;
    unsigned lane = 0;
    const void* key = nullptr;
  };

  // A fiber that runs threads of a block, one after the other.
  struct Worker {
    Worker(void (*main)(), size_t number) : fiber(main, number) {}
    Fiber fiber;
    unsigned thread = 0;
    Request asked{};
    uint64_t answer = 0;
  };

  struct Barrier {
    std::vector<Worker*> waiting;
    unsigned threads = 0;  // that have not returned
    std::unique_ptr<char> order;
  };

  struct Shared {
    const void* key;
    void* memory;
  };

  // All that the engine does is done on the stack of run's caller, and as that one: to ThreadSanitizer, what a function
  // keeps on a fiber's stack is that fiber's.

  void run_block(size_t dynamic_bytes) {
    const auto gather = [](Barrier& barrier, unsigned threads) {
      barrier.waiting.clear();
      barrier.threads = threads;
      barrier.order = std::make_unique<char>();
    };
    warps_.resize((threads_ + kWarp - 1) / kWarp);
    for (unsigned w = 0; w < warps_.size(); ++w) {
      gather(warps_[w], std::min(kWarp, threads_ - w * kWarp));
    }
    gather(all_, threads_);
    ready_.clear();
    shared_.clear();
    shared_bytes_ = 0;
    if (dynamic_bytes > 0) {
      add_shared(nullptr, dynamic_bytes);
    }
    const unsigned shift = static_cast<unsigned>(random_()) % threads_;
    unsigned begun = 0;
    for (unsigned unfinished = threads_; unfinished > 0;) {
      if (!ready_.empty()) {
        running_ = ready_.front();
        ready_.pop_front();
      } else if (begun < threads_) {
        running_ = idle_worker();
        running_->thread = (threads_ & (threads_ - 1)) == 0 ? begun ^ shift : (begun + shift) % threads_;
        ++begun;
      } else {
        fail("threads of a block wait for others that never come");
      }
      unfinished -= let_run(*running_) ? 1 : 0;
    }
  }

  // Until the thread has to wait or returns, which gives true.
  bool let_run(Worker& worker) {
    Barrier& warp = warps_[worker.thread / kWarp];
    do {
      threadIdx.x = worker.thread;
      go(here_, worker.fiber.context);
      switch (worker.asked.kind) {
        case kShared:
          worker.answer = reinterpret_cast<uint64_t>(find_shared(worker.asked.key, worker.asked.value));
          break;
        case kBlock:
          meet(worker, all_);
          break;
        case kWarpOf:
          meet(worker, warp);
          break;
        case kReturned:
          if (!kUnderThreadSanitizer) {
            idle_.push_back(&worker);
          }
          // It is not waited for any longer.
          for (Barrier* barrier : {&warp, &all_}) {
            --barrier->threads;
            open_if_complete(*barrier);
          }
          return true;
      }
    } while (worker.asked.kind == kShared);
    return false;
  }

  void meet(Worker& worker, Barrier& barrier) {
    if (!barrier.waiting.empty() && barrier.waiting.front()->asked.line != worker.asked.line) {
      fail("threads of a block wait at different places");
    }
    as(worker.fiber.context, here_, release, barrier.order.get());
    barrier.waiting.push_back(&worker);
    open_if_complete(barrier);
  }

  void open_if_complete(Barrier& barrier) {
    if (barrier.waiting.empty() || barrier.waiting.size() < barrier.threads) {
      return;
    }
    uint64_t of_lane[kWarp];
    std::memset(of_lane, 0xff, sizeof(of_lane));
    for (const Worker* worker : barrier.waiting) {
      of_lane[worker->thread % kWarp] = worker->asked.value;
    }
    for (Worker* worker : barrier.waiting) {
      worker->answer = of_lane[worker->asked.lane];
      as(worker->fiber.context, here_, acquire, barrier.order.get());
    }
    ready_.insert(ready_.end(), barrier.waiting.begin(), barrier.waiting.end());
    barrier.waiting.clear();
  }

  void* find_shared(const void* key, size_t bytes) {
    const auto found = std::find_if(shared_.begin(), shared_.end(), [&](const Shared& one) { return one.key == key; });
    void* const memory = found == shared_.end() ? add_shared(key, bytes) : found->memory;
    as(running_->fiber.context, here_, acquire, memory);
    return memory;
  }

  void* add_shared(const void* key, size_t bytes) {
    shared_bytes_ += bytes;
    if (shared_bytes_ > most_shared_) {
      fail("a block has more shared memory than a device gives it");
    }
    void* const memory = memory_.emplace_back(std::make_unique_for_overwrite<unsigned char[]>(bytes)).get();
    std::memset(memory, 0xff, bytes);  // NaN
    release(memory);
    shared_.push_back({key, memory});
    return memory;
  }

  Worker* idle_worker() {
    if (idle_.empty()) {
      std::deque<Worker>& workers = workers_.back();
      return &workers.emplace_back(&Blocks::main, workers.size());
    }
    Worker* const worker = idle_.back();
    idle_.pop_back();
    return worker;
  }

  // What waits will never go on.
  [[noreturn]] void fail(const char* fault) {
    for (const Worker& worker : workers_.back()) {
      as(worker.fiber.context, here_, release, &ended_);
    }
    acquire(&ended_);
    idle_.clear();
    workers_.emplace_back();
    memory_.clear();
    throw std::runtime_error(std::string("host_cuda: ") + fault);
  }

  // On a fiber's stack: from its thread to the engine and back, with the answer.
  uint64_t ask(const Request& request);
  static void main();
  void run_thread() {
    acquire(&begun_);
    call_(what_);
    release(&ended_);
  }

  std::mt19937 random_;
  std::deque<std::deque<Worker>> workers_ = std::deque<std::deque<Worker>>(1);  // those given up, and the last ones
  std::vector<Worker*> idle_;
  std::deque<Worker*> ready_;
  Worker* running_ = nullptr;
  Context here_;  // of the caller of run
  void (*call_)(const void*) = nullptr;
  const void* what_ = nullptr;
  unsigned threads_ = 0;
  size_t shared_bytes_ = 0, most_shared_ = 0;
  Barrier all_;
  std::vector<Barrier> warps_;
  std::vector<Shared> shared_;
  std::vector<std::unique_ptr<unsigned char[]>> memory_;  // of all blocks: to a sanitizer they run at one time
  char begun_ = 0, ended_ = 0;
};

inline Blocks blocks;

__attribute__((noinline, no_sanitize("thread"))) inline uint64_t Blocks::ask(const Request& request) {
  Worker& self = *running_;
  self.asked = request;
  as(here_);
  go(self.fiber.context, here_);
  as(self.fiber.context);
  return self.answer;
}

__attribute__((noinline, no_sanitize("thread"))) inline void Blocks::main() {
  Worker& self = *blocks.running_;
  arrive(self.fiber.context);
  as(self.fiber.context);
  for (;;) {
    blocks.run_thread();
    blocks.ask({kReturned});
  }
}

}  // namespace host_cuda
