// All kernels of target.inc for any machine: no instructions beyond the compiler's default.
#define PEERLM_TARGET portable
#define PEERLM_TARGET_NAME "portable"
#include "target.inc"
