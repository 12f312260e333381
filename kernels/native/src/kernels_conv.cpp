// Convolution as a matrix product that reads the map in place, cut into pieces of rows and panels of output channels.
#include "kernels_conv.h"

#include "kernels_common.h"
#include "kernels_norm.h"

namespace unetrt::UNETRT_ISA {

int conv_items(const ConvArgs& args) { return divide_up(args.height, args.piece_rows) * args.panels; }

void conv(const ConvArgs& args, int item) {
    constexpr int kPanelBlocks = kPanel / kBlock;
    const int panel = item % args.panels;
    const int from = item / args.panels * args.piece_rows, to = least(from + args.piece_rows, args.height);
    const int block = panel * kPanelBlocks, blocks = least(kPanelBlocks, args.dst.blocks() - block);
    const float* weights = args.weights + panel * args.panel_floats;
#ifdef UNETRT_ELEMENT_BF16
    if (args.factors != nullptr) {
        conv_piece_of_bytes(args, block, weights, from, to);
    } else {
        conv_piece(args, block, blocks, weights, from, to);
    }
#else
    conv_piece(args, block, blocks, weights, from, to);
#endif
    for (int b = block; args.statistics != nullptr && b < block + blocks; ++b) {
        measure_rows({args.dst, args.statistics}, b, from, to);
    }
    if (!args.clears_border) return;
    for (int b = block; b < block + blocks; ++b) clear_border(args.dst, b, from * args.step, to * args.step);
}

}  // namespace unetrt::UNETRT_ISA
