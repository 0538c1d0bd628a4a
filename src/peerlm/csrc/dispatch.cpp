// Which SIMD target runs: the best that this machine has, or a lower one that the environment names.

#include <cstdlib>
#include <stdexcept>
#include <string>

#include "kernels.h"

#if defined(PEERLM_AVXVNNI)
#include <cpuid.h>
#endif

namespace peerlm {

#if defined(__x86_64__)
extern const Kernels avx512bf16, avx512vnni, avx512, avx2;
#if defined(PEERLM_AVXVNNI)
extern const Kernels avxvnni;
#endif
#elif defined(__aarch64__)
extern const Kernels neon;
#endif
extern const Kernels portable;

namespace {

struct Target {
  const Kernels* kernels;
  bool runs;
};

#if defined(PEERLM_AVXVNNI)
// Not every compiler that has the instructions knows the feature by name.
bool has_avx_vnni() {
  unsigned eax, ebx, ecx, edx;
  return __get_cpuid_count(7, 1, &eax, &ebx, &ecx, &edx) && eax >> 4 & 1;
}
#endif

const Target* targets(int& count) {
#if defined(__x86_64__)
  static const bool has_avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                                 __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  static const bool has_vnni = has_avx512 && __builtin_cpu_supports("avx512vnni");
  static const bool has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  static const Target all[] = {{&avx512bf16, has_vnni && has_avx2 && __builtin_cpu_supports("avx512bf16")},
                               {&avx512vnni, has_vnni && has_avx2},
                               {&avx512, has_avx512 && has_avx2},
#if defined(PEERLM_AVXVNNI)
                               {&avxvnni, has_avx2 && has_avx_vnni()},
#endif
                               {&avx2, has_avx2},
                               {&portable, true}};
#elif defined(__aarch64__)
  static const Target all[] = {{&neon, true}, {&portable, true}};
#else
  static const Target all[] = {{&portable, true}};
#endif
  count = sizeof all / sizeof all[0];
  return all;
}

const Kernels& choose() {
  int count;
  const Target* all = targets(count);
  const char* wanted = std::getenv("PEERLM_SIMD");
  for (int i = 0; i < count; ++i)
    if (all[i].runs && (!wanted || !*wanted || std::string(wanted) == all[i].kernels->name)) return *all[i].kernels;
  throw std::runtime_error("PEERLM_SIMD is '" + std::string(wanted) + "'; this machine runs " + runnable_targets());
}

}  // namespace

const Kernels& kernels() {
  static const Kernels& chosen = choose();
  return chosen;
}

const char* runnable_targets() {
  static const std::string names = [] {
    int count;
    const Target* all = targets(count);
    std::string joined;
    for (int i = 0; i < count; ++i)
      if (all[i].runs) joined += (joined.empty() ? "" : ", ") + std::string(all[i].kernels->name);
    return joined;
  }();
  return names.c_str();
}

}  // namespace peerlm
