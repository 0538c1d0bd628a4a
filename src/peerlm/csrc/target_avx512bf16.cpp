// All kernels of target.inc for AVX-512 with bfloat16 products.
#define PEERLM_TARGET avx512bf16
#define PEERLM_TARGET_NAME "avx512bf16"
#include "target.inc"
