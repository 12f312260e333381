// Gradient of group norm with what is fused with it: y = activation((x - mean) * factor + shift), n = (x - mean) * inverse.
//
// With g = dy * activation'(...) * factor, dx = g - mean(g) - n mean(g n), the means over a group's channels and pixels
// (Ioffe & Szegedy, Batch Normalization, 2015, section 3, for groups). Phase 0 sums g and g n of each row and channel,
// phase 1 adds the rows up in their order.
#include "kernels_norm.h"

#include "kernels_activation.h"
#include "kernels_common.h"
#include "kernels_gradient.h"

namespace unetrt::UNETRT_ISA {

namespace {

constexpr int kEach = kBlock / kLanes;

// Of row y of an image and a block: sums of g and of g n.
float* find_sums(const NormGradientArgs& args, int block, int y, int image) {
    const Map& map = args.gradient;
    const int64_t row = (static_cast<int64_t>(block) * map.height + y) * map.images + image;
    return args.norm.workspace + row * 2 * kBlock;
}

// Vector v of a block's channels, for one image.
struct Lane {
    Vec mean, inverse, factor, shift;

    Lane() = default;
    Lane(const Affine& affine, int v)
        : mean(load(affine.mean + v * kLanes)),
          inverse(load(affine.inverse + v * kLanes)),
          factor(load(affine.factor + v * kLanes)),
          shift(load(affine.shift + v * kLanes)) {}

    template <Activation kActivation>
    Vec derive_at(Vec x, Vec dy) const {
        return dy * derive<kActivation>((x - mean) * factor + shift) * factor;
    }
    Vec normalise(Vec x) const { return (x - mean) * inverse; }
};

template <Activation kActivation>
void sum_rows(const NormGradientArgs& args, int block, int from, int to) {
    const Map& src = args.norm.src.part[0];
    const int64_t step = static_cast<int64_t>(src.images) * kBlock;
    for (int n = 0; n < src.images; ++n) {
        Affine affine;
        make_affine(args.norm, block, n, affine);
        for (int y = from; y < to; ++y)
            for (int v = 0; v < kEach; ++v) {
                const Lane lane(affine, v);
                const Element* x = at(src, block, y, 0) + n * kBlock + v * kLanes;
                const Element* dy = at(args.gradient, block, y, 0) + n * kBlock + v * kLanes;
                Vec total{}, products{};
                for (int i = 0; i < src.width; ++i, x += step, dy += step) {
                    const Vec value = load(x), g = lane.derive_at<kActivation>(value, load(dy));
                    total += g;
                    products += g * lane.normalise(value);
                }
                float* sums = find_sums(args, block, y, n) + v * kLanes;
                store(sums, total);
                store(sums + kBlock, products);
            }
    }
}

// Over all rows, of the channels of the block that was asked for last.
struct BlockSums {
    int index = -1;
    alignas(64) float total[kBlock], products[kBlock];
};

void find_block_sums(const NormGradientArgs& args, int block, int image, BlockSums& sums) {
    if (sums.index == block) return;
    for (int v = 0; v < kEach; ++v) {
        Vec total{}, products{};
        for (int y = 0; y < args.gradient.height; ++y) {
            const float* row = find_sums(args, block, y, image) + v * kLanes;
            total += load(row);
            products += load(row + kBlock);
        }
        store(sums.total + v * kLanes, total);
        store(sums.products + v * kLanes, products);
    }
    sums.index = block;
}

// The means over the groups of a block's channels; 0 for channels that the map lacks.
struct Means {
    alignas(64) float total[kBlock]{}, products[kBlock]{};
};

void find_means(const NormGradientArgs& args, int block, int image, Means& means) {
    const Map& map = args.gradient;
    const int size = map.channels / args.norm.groups;
    const double count = static_cast<double>(size) * map.height * map.width;
    int known = -1;
    double total = 0, products = 0;
    BlockSums sums;
    for (int i = 0; i < kBlock; ++i) {
        const int channel = block * kBlock + i;
        if (channel >= map.channels) return;
        if (channel / size != known) {
            known = channel / size;
            total = products = 0;
            for (int c = known * size; c < (known + 1) * size; ++c) {
                find_block_sums(args, c / kBlock, image, sums);
                total += static_cast<double>(sums.total[c % kBlock]);
                products += static_cast<double>(sums.products[c % kBlock]);
            }
        }
        means.total[i] = static_cast<float>(total / count);
        means.products[i] = static_cast<float>(products / count);
    }
}

template <Activation kActivation>
void write_rows(const NormGradientArgs& args, int block, int from, int to) {
    const Map &src = args.norm.src.part[0], &dst = args.norm.dst;
    const int64_t step = static_cast<int64_t>(src.images) * kBlock;
    for (int n = 0; n < src.images; ++n) {
        Affine affine;
        Means means;
        make_affine(args.norm, block, n, affine);
        find_means(args, block, n, means);
        for (int y = from; y < to; ++y)
            for (int v = 0; v < kEach; ++v) {
                const Lane lane(affine, v);
                const Vec mean = load(means.total + v * kLanes), of_products = load(means.products + v * kLanes);
                const int64_t first = n * kBlock + v * kLanes;
                const Element* x = at(src, block, y, 0) + first;
                const Element* dy = at(args.gradient, block, y, 0) + first;
                const Element* add = args.norm.add.data == nullptr ? nullptr : at(args.norm.add, block, y, 0) + first;
                Element* out = at(dst, block, y, 0) + first;
                for (int64_t i = 0; i < src.width * step; i += step) {
                    const Vec value = load(x + i), g = lane.derive_at<kActivation>(value, load(dy + i));
                    Vec dx = g - mean - lane.normalise(value) * of_products;
                    if (add != nullptr) dx += load(add + i);
                    store(out + i, dx * args.norm.scale);
                }
            }
    }
    clear_border(dst, block, from, to);
}

template <Activation kActivation>
void do_item(const NormGradientArgs& args, int phase, int item) {
    const int rows = rows_a_piece(args.norm.dst), pieces = divide_up(args.norm.dst.height, rows);
    const int from = item % pieces * rows, to = least(from + rows, args.norm.dst.height);
    if (phase == 0) {
        sum_rows<kActivation>(args, item / pieces, from, to);
    } else {
        write_rows<kActivation>(args, item / pieces, from, to);
    }
}

}  // namespace

int64_t norm_gradient_workspace(const NormGradientArgs& args) {
    const Map& map = args.gradient;
    return static_cast<int64_t>(map.blocks()) * map.height * map.images * 2 * kBlock;
}

int norm_gradient_items(const NormGradientArgs& args) {
    return args.gradient.blocks() * divide_up(args.norm.dst.height, rows_a_piece(args.norm.dst));
}

void norm_gradient(const NormGradientArgs& args, int phase, int item) {
    switch (args.norm.activation) {
        case Activation::kSilu: return do_item<Activation::kSilu>(args, phase, item);
        case Activation::kRelu: return do_item<Activation::kRelu>(args, phase, item);
        default: return do_item<Activation::kIdentity>(args, phase, item);
    }
}

}  // namespace unetrt::UNETRT_ISA
