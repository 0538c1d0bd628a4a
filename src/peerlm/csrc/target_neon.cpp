// All kernels of target.inc for Arm's NEON.
#define PEERLM_TARGET neon
#define PEERLM_TARGET_NAME "neon"
#include "target.inc"
