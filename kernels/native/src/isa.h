#pragma once

#include "kernels.h"

namespace unetrt {

// Of an instruction set; null where it is not in this library or CPU.
const Kernels* find_kernels(int isa);

// Of unetrt_isa: the fastest for a precision that was compiled and that the CPU and its operating system support, or -1.
int best_isa(int precision);

// Raises Error for an instruction set that this library or CPU lacks.
const Kernels& kernels_for(int isa);

}  // namespace unetrt
