// Flags: none beyond those of the library (see cpu/README.md).
#define ATTNSIEVE_ISA baseline
#include "kernels_body.h"
