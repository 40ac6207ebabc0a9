// A counter around torch's CPU allocator: bytes live now, and the highest since the last reset.
//
// The wrapper hands every request to the allocator that was there before and returns that allocator's own pointers, as
// both data and context: oneDNN and others call raw_allocate, which asserts that the two are equal. It keeps the size of
// each block in a table of its own, so blocks that were allocated before it was installed are never counted: neither
// when they are freed through their old deleter nor when they come through raw_deallocate.
//
// Blind spots: what does not come from this allocator (oneDNN's and MKL's own buffers, memory maps, numpy), and the
// growth by resize_ of a tensor older than the wrapper, whose storage remembers the old allocator.
//
// Plain C functions for ctypes; needs c10's headers only, so that it compiles in seconds.

#include <c10/core/Allocator.h>
#include <c10/core/CPUAllocator.h>
#include <pthread.h>

#include <atomic>
#include <cstdint>
#include <mutex>
#include <unordered_map>

namespace {

constexpr size_t kShards = 64;

struct alignas(64) Shard {
  std::mutex mutex;
  std::unordered_map<void*, size_t> sizes;
};

c10::Allocator* base = nullptr;
c10::DeleterFnPtr base_deleter = nullptr;
Shard* shards = nullptr;
std::atomic<int64_t> live{0};
std::atomic<int64_t> peak{0};

Shard& shard_of(void* pointer) {
  // Blocks are aligned to 64 bytes: the low bits say nothing. Mix the high ones down, large blocks sit at page starts.
  auto bits = reinterpret_cast<uintptr_t>(pointer) >> 6;
  return shards[(bits ^ (bits >> 6) ^ (bits >> 12)) % kShards];
}

void forget(void* pointer) {
  auto& shard = shard_of(pointer);
  std::lock_guard<std::mutex> guard(shard.mutex);
  auto found = shard.sizes.find(pointer);
  if (found == shard.sizes.end()) return;
  live.fetch_sub(static_cast<int64_t>(found->second), std::memory_order_relaxed);
  shard.sizes.erase(found);
}

void counted_delete(void* pointer) {
  // Forget first: once freed, another thread may get the same address and enter it.
  if (pointer != nullptr) forget(pointer);
  base_deleter(pointer);
}

struct CountingAllocator final : c10::Allocator {
  c10::DataPtr allocate(size_t size) override {
    c10::DataPtr block = base->allocate(size);
    void* pointer = block.get();
    if (pointer == nullptr || pointer != block.get_context() || block.get_deleter() != base_deleter) return block;
    {
      auto& shard = shard_of(pointer);
      std::lock_guard<std::mutex> guard(shard.mutex);
      shard.sizes[pointer] = size;
    }
    (void)block.compare_exchange_deleter(base_deleter, &counted_delete);
    const auto now = live.fetch_add(static_cast<int64_t>(size), std::memory_order_relaxed) + static_cast<int64_t>(size);
    auto highest = peak.load(std::memory_order_relaxed);
    while (now > highest && !peak.compare_exchange_weak(highest, now, std::memory_order_relaxed)) {
    }
    return block;
  }

  c10::DeleterFnPtr raw_deleter() const override { return &counted_delete; }

  void copy_data(void* to, const void* from, size_t count) const override { base->copy_data(to, from, count); }
};

// A forked child (a data loader's worker) must not inherit a lock that a thread of the parent held.
void lock_all() {
  for (size_t i = 0; i < kShards; ++i) shards[i].mutex.lock();
}
void unlock_all() {
  for (size_t i = kShards; i-- > 0;) shards[i].mutex.unlock();
}

}  // namespace

extern "C" {

// 0: installed, or was already. 1: the allocator at work cannot be wrapped. 2: another one insists on its place.
int clbench_install() {
  static int outcome = -1;  // called under Python's lock, by ctypes.PyDLL
  if (outcome >= 0) return outcome;
  base = c10::GetAllocator(c10::DeviceType::CPU);
  base_deleter = base == nullptr ? nullptr : base->raw_deleter();
  if (base_deleter == nullptr) return outcome = 1;
  // Never freed: blocks outlive every scope, up to the end of the process.
  shards = new Shard[kShards];
  pthread_atfork(&lock_all, &unlock_all, &unlock_all);
  auto* counting = new CountingAllocator();
  c10::SetAllocator(c10::DeviceType::CPU, counting);
  return outcome = c10::GetAllocator(c10::DeviceType::CPU) == counting ? 0 : 2;
}

int64_t clbench_live() { return live.load(); }
int64_t clbench_peak() { return peak.load(); }
void clbench_reset_peak() { peak.store(live.load()); }
}
