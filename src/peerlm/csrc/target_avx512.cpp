// All kernels of target.inc for AVX-512.
#define PEERLM_TARGET avx512
#define PEERLM_TARGET_NAME "avx512"
#include "target.inc"
