// All kernels of target.inc for AVX2 with products of 8 bits (AVX-VNNI).
#define PEERLM_TARGET avxvnni
#define PEERLM_TARGET_NAME "avxvnni"
#include "target.inc"
