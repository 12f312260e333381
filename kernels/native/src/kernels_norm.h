#pragma once

#include "kernels.h"

namespace unetrt::UNETRT_ISA {

int64_t norm_statistics(const NormArgs& args);
int norm_items(const NormArgs& args, int phase);
void norm(const NormArgs& args, int phase, int item);

}  // namespace unetrt::UNETRT_ISA
