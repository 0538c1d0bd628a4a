// The store of freed large blocks: by size, up to a limit, for the next step to take.

#include "recycle.h"

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <mutex>
#include <new>
#include <vector>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace peerlm {
namespace {

constexpr size_t PAGE = 2 << 20;
constexpr uint64_t PATIENCE = 64;  // calls

struct Kept {
  Block block;
  uint64_t since;
};

struct Store {
  std::mutex mutex;
  std::vector<Kept> kept;
  uint64_t calls = 0;
};

// Never destroyed: a tensor may outlive static objects.
Store& store() {
  static Store* const all = new Store;
  return *all;
}

}  // namespace

Block take_block(size_t bytes) {
  Store& all = store();
  const std::lock_guard<std::mutex> lock(all.mutex);
  all.calls += 1;
  const auto stale = std::remove_if(all.kept.begin(), all.kept.end(), [&](const Kept& each) {
    const bool unwanted = all.calls - each.since > PATIENCE;
    if (unwanted) std::free(each.block.data);
    return unwanted;
  });
  all.kept.erase(stale, all.kept.end());
  const auto fits = [&](const Kept& each) { return each.block.bytes >= bytes && each.block.bytes / 2 <= bytes; };
  const auto found = std::find_if(all.kept.begin(), all.kept.end(), fits);
  if (found != all.kept.end()) {
    const Block block = found->block;
    all.kept.erase(found);
    return block;
  }
  const size_t roomy = (bytes + bytes / 16 + PAGE - 1) / PAGE * PAGE;  // the next step's rows may be a few more
  void* const data = std::aligned_alloc(PAGE, roomy);
  if (!data) throw std::bad_alloc();
#if defined(__linux__)
  madvise(data, roomy, MADV_HUGEPAGE);
#endif
  return {data, roomy};
}

void give_back(Block block) noexcept {
  Store& all = store();
  const std::lock_guard<std::mutex> lock(all.mutex);
  all.kept.push_back({block, all.calls});
}

}  // namespace peerlm
