#define PEERLM_TARGET portable
#define PEERLM_TARGET_NAME "portable"
#include "target.inc"
