// All kernels of target.inc for AVX-512 with products of 8 bits.
#define PEERLM_TARGET avx512vnni
#define PEERLM_TARGET_NAME "avx512vnni"
#include "target.inc"
