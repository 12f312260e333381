#pragma once

#include "kernels.h"

namespace unetrt::UNETRT_ISA {

int resample_items(const ResampleArgs& args);
void resample(const ResampleArgs& args, int item);

}  // namespace unetrt::UNETRT_ISA
