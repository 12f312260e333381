#pragma once

#include "kernels.h"

namespace unetrt::UNETRT_ISA {

// Output channels that are computed together.
constexpr int kPanel = UNETRT_LANES == 16 ? 32 : 16;

// Rows [from, to) of `blocks` blocks of dst from `block` on, which are all of a panel or its last ones.
void conv_piece(const ConvArgs& args, int block, int blocks, const void* weights, int from, int to);
#ifdef UNETRT_ELEMENT_BF16
// The same where the sources hold bytes.
void conv_piece_of_bytes(const ConvArgs& args, int block, const void* weights, int from, int to);
#endif

int conv_items(const ConvArgs& args);
void conv(const ConvArgs& args, int item);

}  // namespace unetrt::UNETRT_ISA
