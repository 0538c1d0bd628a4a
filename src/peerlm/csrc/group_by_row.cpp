// Stable radix sort of entries by the row they name.

#include <algorithm>
#include <cstdint>
#include <memory>
#include <utility>
#include <vector>

#include "kernels.h"

namespace peerlm {

namespace {

constexpr int DIGIT_BITS = 11, WIDE_DIGIT_BITS = 13;  // the wide one where it saves a pass
constexpr int64_t WORTH_A_THREAD = 1 << 14;           // entries

struct Entry {
  uint32_t row, entry;
};

// One thread's part of a pass: visit its entries, each with what is kept for its digit.
template <class Visit>
void each_of_part(const Entry* entry, const Entry* end, int shift, uint32_t mask, int64_t* of_digit, Visit visit) {
  for (; entry < end; ++entry) visit(*entry, of_digit[entry->row >> shift & mask]);
}

// One stable pass over the digit at `shift`. Each thread counts and moves the entries of its own part.
void sort_by_digit(const Entry* from, Entry* to, int64_t count, int shift, int64_t digits, int threads) {
  const int64_t part = (count + threads - 1) / threads;
  const uint32_t mask = (uint32_t)digits - 1;
  std::vector<int64_t> places(threads * digits, 0);
  const auto visit_part = [=, &places](int thread, auto visit) {
    const Entry *begin = from + std::min(thread * part, count), *end = from + std::min((thread + 1) * part, count);
    each_of_part(begin, end, shift, mask, places.data() + thread * digits, visit);
  };
#pragma omp parallel for num_threads(threads) schedule(static, 1)
  for (int thread = 0; thread < threads; ++thread) visit_part(thread, [](const Entry&, int64_t& here) { ++here; });
  int64_t before = 0;
  for (int64_t digit = 0; digit < digits; ++digit)
    for (int thread = 0; thread < threads; ++thread) before += std::exchange(places[thread * digits + digit], before);
#pragma omp parallel for num_threads(threads) schedule(static, 1)
  for (int thread = 0; thread < threads; ++thread)
    visit_part(thread, [to](const Entry& entry, int64_t& here) { to[here++] = entry; });
}

}  // namespace

int64_t group_by_row(const int64_t* ids, int64_t count, int64_t num_rows, uint32_t* order, int64_t* starts, int64_t* rows,
                     int threads) {
  threads = (int)std::max<int64_t>(1, std::min<int64_t>(threads, count / WORTH_A_THREAD));
  std::unique_ptr<Entry[]> from(new Entry[count]), to(new Entry[count]);
  if (std::find(ids, ids + count, HOLE) == ids + count) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t i = 0; i < count; ++i) from[i] = {(uint32_t)ids[i], (uint32_t)i};
  } else {
    int64_t kept = 0;
    for (int64_t i = 0; i < count; ++i)
      if (ids[i] != HOLE) from[kept++] = {(uint32_t)ids[i], (uint32_t)i};
    count = kept;
  }
  const int bits = num_rows - 1 < (int64_t)1 << WIDE_DIGIT_BITS ? WIDE_DIGIT_BITS : DIGIT_BITS;
  for (int shift = 0; shift < 32 && (num_rows - 1) >> shift; shift += bits) {
    sort_by_digit(from.get(), to.get(), count, shift, (int64_t)1 << bits, threads);
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
