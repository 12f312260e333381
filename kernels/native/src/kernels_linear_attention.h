#pragma once

#include "kernels.h"

namespace unetrt::UNETRT_ISA {

int64_t linear_workspace(const AttentionArgs& args);
int64_t linear_scratch(const AttentionArgs& args);
int linear_items(const AttentionArgs& args, int phase);
void linear(const AttentionArgs& args, int phase, int item, float* scratch);

}  // namespace unetrt::UNETRT_ISA
