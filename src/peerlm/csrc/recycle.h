// Large blocks of memory that every step needs: freed ones are kept, pages and all, for the next step.
#pragma once

#include <cstddef>

namespace peerlm {

struct Block {
  void* data;
  size_t bytes;
};

// At least `bytes` uninitialised bytes at a multiple of 2 MiB: a block that was given back, or a new one in huge pages
// where the system grants them. Throws std::bad_alloc.
Block take_block(size_t bytes);

// Keep a block of take_block's for later calls. One that the next 64 calls do not want goes back to the system.
void give_back(Block block) noexcept;

}  // namespace peerlm
