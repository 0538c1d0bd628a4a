// Stable radix sort of entries by the row they name.

#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>

#include "kernels.h"

namespace peerlm {

namespace {

constexpr int DIGIT_BITS = 11;
constexpr int64_t DIGITS = 1 << DIGIT_BITS;

struct Entry {
  uint32_t row, entry;
};

}  // namespace

int64_t group_by_row(const int64_t* ids, int64_t count, int64_t num_rows, uint32_t* order, int64_t* starts, int64_t* rows) {
  std::unique_ptr<Entry[]> from(new Entry[count]), to(new Entry[count]);
  for (int64_t i = 0; i < count; ++i) from[i] = {(uint32_t)ids[i], (uint32_t)i};
  for (int shift = 0; shift < 32 && (num_rows - 1) >> shift; shift += DIGIT_BITS) {
    int64_t place[DIGITS] = {};
    for (int64_t i = 0; i < count; ++i) ++place[(from[i].row >> shift) & (DIGITS - 1)];
    int64_t before = 0;
    for (int64_t& each : place) {
      const int64_t here = each;
      each = before;
      before += here;
    }
    for (int64_t i = 0; i < count; ++i) to[place[(from[i].row >> shift) & (DIGITS - 1)]++] = from[i];
    from.swap(to);
  }
  int64_t found = 0;
  for (int64_t i = 0; i < count; ++i) {
    order[i] = from[i].entry;
    if (i == 0 || from[i].row != from[i - 1].row) {
      rows[found] = from[i].row;
      starts[found++] = i;
    }
  }
  starts[found] = count;
  return found;
}

}  // namespace peerlm
