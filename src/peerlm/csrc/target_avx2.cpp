// All kernels of target.inc for AVX2 and FMA.
#define PEERLM_TARGET avx2
#define PEERLM_TARGET_NAME "avx2"
#include "target.inc"
