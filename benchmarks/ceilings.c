// What this machine's memory gives: the limits beside which benchmarks/peer_layer.py sets its figures.

#include <omp.h>
#include <stdint.h>

typedef float lanes __attribute__((vector_size(64), aligned(4)));

// Sum of all floats, so that nothing is left out.
double read_all(const float* from, int64_t count, int threads) {
  double total = 0;
#pragma omp parallel for num_threads(threads) schedule(static) reduction(+ : total)
  for (int64_t block = 0; block < count / 4096; ++block) {
    lanes a = {0}, b = {0};
    const lanes* piece = (const lanes*)(from + block * 4096);
    for (int64_t i = 0; i < 256; i += 2) {
      a += piece[i];
      b += piece[i + 1];
    }
    a += b;
    total += a[0] + a[7];
  }
  return total;
}

void copy_all(float* to, const float* from, int64_t count, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t block = 0; block < count / 4096; ++block) __builtin_memcpy(to + block * 4096, from + block * 4096, 16384);
}

// Sum of the rows of `width` floats that `ids` name, the one 16 ids ahead asked for meanwhile.
double gather(const float* rows, const int64_t* ids, int64_t count, int64_t width, int threads) {
  double total = 0;
#pragma omp parallel for num_threads(threads) schedule(static) reduction(+ : total)
  for (int64_t i = 0; i < count; ++i) {
    const lanes* row = (const lanes*)(rows + ids[i] * width);
    const char* ahead = (const char*)(rows + ids[i + 16 < count ? i + 16 : i] * width);
    lanes a = {0}, b = {0};
    for (int64_t d = 0; d < width / 16; d += 2) {
      __builtin_prefetch(ahead + d * 64, 0, 2);
      __builtin_prefetch(ahead + d * 64 + 64, 0, 2);
      a += row[d];
      b += row[d + 1];
    }
    a += b;
    total += a[0] + a[7];
  }
  return total;
}
