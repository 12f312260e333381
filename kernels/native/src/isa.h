#pragma once

#include "kernels.h"

namespace unetrt {

// Of unetrt_isa: the fastest that was compiled and that the CPU and its operating system support.
int best_isa(int precision);

// Raises Error for an instruction set that this library or CPU lacks.
const Kernels& kernels_for(int isa);

}  // namespace unetrt
