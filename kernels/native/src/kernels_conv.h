#pragma once

#include "kernels.h"

namespace unetrt::UNETRT_ISA {

// Output channels that are computed together.
constexpr int kPanel = UNETRT_LANES == 16 ? 32 : 16;

int conv_items(const ConvArgs& args);
void conv(const ConvArgs& args, int item);

}  // namespace unetrt::UNETRT_ISA
