// Moves bytes to a larger place and gives their old pages back on the way.

#include "move_bytes.h"

#include <algorithm>
#include <cstdint>
#include <cstring>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace peerlm {
namespace {

constexpr uintptr_t PAGE = 2 << 20;
constexpr uintptr_t CHUNK = 8 * PAGE;

}  // namespace

void move_bytes(void* from, void* to, size_t bytes, int threads) {
  const uintptr_t begin = (uintptr_t)from, end = begin + bytes;
  const uintptr_t first = begin / CHUNK, last = (end + CHUNK - 1) / CHUNK;
#pragma omp parallel for num_threads(threads) schedule(dynamic, 1)
  for (uintptr_t chunk = first; chunk < last; ++chunk) {
    const uintptr_t low = std::max(begin, chunk * CHUNK), high = std::min(end, (chunk + 1) * CHUNK);
    std::memcpy((char*)to + (low - begin), (const void*)low, high - low);
#if defined(__linux__)
    const uintptr_t whole = (low + PAGE - 1) / PAGE * PAGE, behind = high / PAGE * PAGE;
    if (whole < behind) madvise((void*)whole, behind - whole, MADV_DONTNEED);
#endif
  }
}

}  // namespace peerlm
