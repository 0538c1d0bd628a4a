// Bytes that move to a larger place, and leave their old one to the system as they go.
#pragma once

#include <cstddef>

namespace peerlm {

// Copy `bytes` bytes. Whole pages of `from` go back to the system as soon as they are copied and read as zeros from then
// on, so that at no time much more than one copy is in memory; other systems than Linux keep them.
void move_bytes(void* from, void* to, size_t bytes, int threads);

}  // namespace peerlm
