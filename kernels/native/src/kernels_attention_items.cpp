// Attention cut into items, whatever multiplies the matrices.
#include "kernels_attention.h"

#include "kernels_keys.h"

namespace unetrt::UNETRT_ISA {

int attention_items(const AttentionArgs& args, int phase) {
    const int heads = args.qkv.images * args.heads;
    if (phase == 0) return heads * blocks_of(args) + args.dst.blocks();
    return heads * divide_up(pixels_of(args.qkv), kMostQueries);
}

void attention(const AttentionArgs& args, int phase, int item, float* scratch) {
    if (phase == 0) {
        pack_tokens(args, item, scratch);
    } else {
        attend_chunk(args, item, scratch);
    }
}

}  // namespace unetrt::UNETRT_ISA
