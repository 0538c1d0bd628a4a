// Which rows of a table are stale: the optimizer has made steps since they were last right.

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <memory>
#include <vector>

#include "kernels.h"

namespace peerlm {

namespace {

constexpr int64_t WORD_BITS = 64;
constexpr int64_t FEW = 256;  // rows for each id, from which on sorting ids is quicker than a bit for every row

int64_t sorted_rows(const int32_t* weights_step, const int64_t* ids, int64_t count, int32_t now, int64_t* found) {
  int64_t stale = 0;
  for (int64_t i = 0; i < count; ++i)
    if (ids[i] != HOLE && weights_step[ids[i]] < now) found[stale++] = ids[i];
  std::sort(found, found + stale);
  return std::unique(found, found + stale) - found;
}

// Bit r % 64 of word r / 64 is set where row r is stale and, if there are ids, among them.
void mark(const int32_t* weights_step, int64_t num_rows, const int64_t* ids, int64_t count, int32_t now, int threads,
          std::atomic<uint64_t>* words, int64_t num_words) {
  if (ids) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t i = 0; i < count; ++i)
      if (ids[i] != HOLE && weights_step[ids[i]] < now)
        words[ids[i] / WORD_BITS].fetch_or((uint64_t)1 << ids[i] % WORD_BITS, std::memory_order_relaxed);
    return;
  }
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t word = 0; word < num_words; ++word) {
    uint64_t bits = 0;
    const int64_t begin = word * WORD_BITS, end = std::min(begin + WORD_BITS, num_rows);
    for (int64_t row = begin; row < end; ++row) bits |= (uint64_t)(weights_step[row] < now) << (row - begin);
    words[word].store(bits, std::memory_order_relaxed);
  }
}

}  // namespace

int64_t stale_rows(const int32_t* weights_step, int64_t num_rows, const int64_t* ids, int64_t count, int32_t now, int threads,
                    int64_t* found) {
  if (ids && count <= num_rows / FEW) return sorted_rows(weights_step, ids, count, now, found);
  const int64_t num_words = (num_rows + WORD_BITS - 1) / WORD_BITS;
  const std::unique_ptr<std::atomic<uint64_t>[]> words(new std::atomic<uint64_t>[num_words]());
  mark(weights_step, num_rows, ids, count, now, threads, words.get(), num_words);
  const int64_t part = (num_words + threads - 1) / threads;
  std::vector<int64_t> place(threads + 1, 0);  // where each part's rows go
  for (int pass = 0; pass < 2; ++pass) {
#pragma omp parallel for num_threads(threads) schedule(static, 1)
    for (int each = 0; each < threads; ++each) {
      int64_t at = pass == 0 ? 0 : place[each];
      for (int64_t word = each * part; word < std::min((each + 1) * part, num_words); ++word) {
        uint64_t bits = words[word].load(std::memory_order_relaxed);
        if (pass == 0) at += __builtin_popcountll(bits);
        else
          for (; bits; bits &= bits - 1) found[at++] = word * WORD_BITS + __builtin_ctzll(bits);
      }
      if (pass == 0) place[each + 1] = at;
    }
    if (pass == 0)
      for (int each = 0; each < threads; ++each) place[each + 1] += place[each];
  }
  return place[threads];
}

}  // namespace peerlm
