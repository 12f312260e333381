// Normalisation with what is fused with it: scale and shift of an image, activation, residual.
//
// The statistics of a group are never E[x^2] - E[x]^2, which cancels where the mean is large. Each row of pixels gives a
// mean and a sum of squared deviations a channel, relative to its first pixel; rows and then channels are merged by
// M2 = sum(M2_i) + n sum((mean_i - mean)^2), in the order of their indices (Chan et al., 1979, for parts of one size).
#include "kernels_norm.h"

#include "kernels_activation.h"
#include "kernels_common.h"

namespace unetrt::UNETRT_ISA {

namespace {

constexpr int kEach = kBlock / kLanes;
constexpr int kGroup = 0, kRms = 1, kLayer = 2;  // As in the C interface.

// Of the sources' lines.
int count_blocks(const NormArgs& args) { return divide_up(args.dst.channels, kBlock); }

int channels_of(const Maps& maps) { return maps.part[0].channels + (maps.count == 2 ? maps.part[1].channels : 0); }

// The map and its block that are block `block` of both.
const Map& find_block(const Maps& maps, int& block) {
    const int first = maps.part[0].blocks();
    if (block < first) return maps.part[0];
    block -= first;
    return maps.part[1];
}

int64_t row_index(const Map& map, int block, int y, int image) {
    return ((static_cast<int64_t>(block) * map.height + y) * map.images + image) * 2 * kBlock;
}

// Of image `image`'s row y of block `block` of both sources.
const float* row_statistics(const NormArgs& args, int block, int y, int image) {
    int own = block;
    const Map& map = find_block(args.src, own);
    return args.statistics[own == block ? 0 : 1] + row_index(map, own, y, image);
}

void measure_row(const Map& map, const Element* pixels, int images, float* statistics) {
#pragma GCC unroll 4
    for (int v = 0; v < kEach; ++v) {
        const Element* p = pixels + v * kLanes;
        const Vec first = load(p);
        Vec total{}, squares{};
        for (int x = 0; x < map.width; ++x) {
            const Vec d = load(p + static_cast<int64_t>(x) * images * kBlock) - first;
            total += d;
            squares += d * d;
        }
        const Vec mean = total * (1.0f / static_cast<float>(map.width));
        store(statistics + v * kLanes, first + mean);
        store(statistics + kBlock + v * kLanes, squares - total * mean);
    }
}

// Mean and sum of squared deviations of each channel of a block, over all rows.
void merge_rows(const NormArgs& args, int block, int image, float* mean, float* deviations) {
    const int height = args.dst.height;
    for (int v = 0; v < kEach; ++v) {
        Vec total{};
        for (int y = 0; y < height; ++y) total += load(row_statistics(args, block, y, image) + v * kLanes);
        const Vec centre = total * (1.0f / static_cast<float>(height));
        Vec within{}, between{};
        for (int y = 0; y < height; ++y) {
            const float* row = row_statistics(args, block, y, image) + v * kLanes;
            const Vec d = load(row) - centre;
            within += load(row + kBlock);
            between += d * d;
        }
        store(mean + v * kLanes, centre);
        store(deviations + v * kLanes, within + between * static_cast<float>(args.dst.width));
    }
}

// The merged rows of the block that was asked for last.
struct Block {
    int index = -1;
    alignas(64) float mean[kBlock], deviations[kBlock];
};

void find_merged(const NormArgs& args, int block, int image, Block& merged) {
    if (merged.index == block) return;
    merge_rows(args, block, image, merged.mean, merged.deviations);
    merged.index = block;
}

void normalise_group(const NormArgs& args, int group, int size, int image, Block& merged, float& mean, float& inverse) {
    const int first = group * size, end = first + size;
    const double pixels = static_cast<double>(args.dst.height) * args.dst.width;
    double total = 0, within = 0, between = 0;
    for (int c = first; c < end; ++c) {
        find_merged(args, c / kBlock, image, merged);
        total += static_cast<double>(merged.mean[c % kBlock]);
        within += static_cast<double>(merged.deviations[c % kBlock]);
    }
    const double centre = total / size;
    for (int c = first; c < end; ++c) {
        find_merged(args, c / kBlock, image, merged);
        const double d = static_cast<double>(merged.mean[c % kBlock]) - centre;
        between += d * d;
    }
    mean = static_cast<float>(centre);
    inverse = static_cast<float>(1.0 / sqrt((within / pixels + between) / size + static_cast<double>(args.eps)));
}

void group_affine(const NormArgs& args, int block, int image, Affine& affine) {
    const int channels = channels_of(args.src), size = channels / args.groups;
    int known = -1;
    float mean = 0, inverse = 0;
    Block merged;
    for (int i = 0; i < kBlock; ++i) {
        const int channel = block * kBlock + i;
        if (channel < channels && channel / size != known) {
            known = channel / size;
            normalise_group(args, known, size, image, merged, mean, inverse);
        }
        affine.mean[i] = mean;
        affine.inverse[i] = inverse;
    }
}

}  // namespace

void make_affine(const NormArgs& args, int block, int image, Affine& affine) {
    for (int i = 0; i < kBlock; ++i) affine.mean[i] = 0, affine.inverse[i] = 1;
    if (args.kind == kGroup) group_affine(args, block, image, affine);
    for (int i = 0; i < kBlock; ++i) affine.factor[i] = affine.inverse[i];
    const int64_t padded = static_cast<int64_t>(count_blocks(args)) * kBlock;
    const float* rows = args.rows == nullptr ? nullptr : args.rows + image * args.row_stride + block * kBlock;
    for (int i = 0; i < kBlock; ++i) {
        const int channel = block * kBlock + i;
        float shift = args.bias == nullptr ? 0.0f : args.bias[channel];
        if (args.weight != nullptr) affine.factor[i] *= args.weight[channel];
        if (rows != nullptr) {
            affine.factor[i] *= 1.0f + rows[i];
            shift = shift * (1.0f + rows[i]) + rows[padded + i];
        }
        affine.shift[i] = shift;
    }
}

// Enough pieces for a few threads, and no more: each has fixed costs.
int rows_a_piece(const Map& map) {
    const int64_t pixels = static_cast<int64_t>(map.width) * map.images;
    const int rows = static_cast<int>((1024 + pixels - 1) / pixels);
    return rows < map.height ? rows : map.height;
}

namespace {

// dst as numbers: where image 0 of a pixel of a block of the sources goes, and vector v of it.
struct ToElements {
    explicit ToElements(const NormArgs&) {}
    char* at(const Map& map, int block, int y, int x) const { return static_cast<char*>(map.at(block, y, x)); }
    void put(char* line, int v, Vec value) const { store(reinterpret_cast<Element*>(line) + v * kLanes, value); }
    void finish_border(const Map& map, int block, int from, int to) const { clear_border(map, block, from, to); }
};

#ifdef UNETRT_ELEMENT_BF16
// dst as bytes, whose lines hold two blocks of the sources.
struct ToBytes {
    explicit ToBytes(const NormArgs& args) : steps(args.steps), zero(args.zero) {}
    char* at(const Map& map, int block, int y, int x) const {
        return static_cast<char*>(map.at(block / 2, y, x)) + block % 2 * kBlock;
    }
    void put(char* line, int v, Vec value) const {
        store_bytes(reinterpret_cast<uint8_t*>(line) + v * kLanes, value * steps, Ints{} + zero);
    }
    void finish_border(const Map& map, int block, int from, int to) const {
        const auto four = static_cast<int32_t>(static_cast<uint32_t>(zero) * 0x01010101u);
        if (block % 2 == 0) fill_border(map, block / 2, from, to, reinterpret_cast<Vec>(Ints{} + four));
    }
    float steps;
    int32_t zero;
};
#endif

// A line; add may be null.
template <Activation kActivation, typename To>
UNETRT_INLINE void apply_to_pixel(const Element* x, const Element* add, float scale, const Vec* mean, const Vec* factor,
                                  const Vec* shift, const To& to, char* y) {
#pragma GCC unroll 4
    for (int v = 0; v < kEach; ++v) {
        Vec value = activate<kActivation>((load(x + v * kLanes) - mean[v]) * factor[v] + shift[v]);
        if (add != nullptr) value += load(add + v * kLanes);
        to.put(y, v, value * scale);
    }
}

// Group norm, affine and none: channel by channel the same factor for all pixels of an image.
template <Activation kActivation, typename To>
void apply_by_channel(const NormArgs& args, int block, int from, int to) {
    const To stored(args);
    int own = block;
    const Map& map = find_block(args.src, own);
    const int64_t step = static_cast<int64_t>(map.images) * kBlock;
    for (int n = 0; n < map.images; ++n) {
        Affine affine;
        make_affine(args, block, n, affine);
        Vec mean[kEach], factor[kEach], shift[kEach];
        for (int v = 0; v < kEach; ++v) {
            mean[v] = load(affine.mean + v * kLanes);
            factor[v] = load(affine.factor + v * kLanes);
            shift[v] = load(affine.shift + v * kLanes);
        }
        for (int y = from; y < to; ++y) {
            const Element* in = at(map, own, y, 0) + n * kBlock;
            const Element* add = args.add.data == nullptr ? nullptr : at(args.add, block, y, 0) + n * kBlock;
            char* out = stored.at(args.dst, block, y, 0) + n * kLineBytes;
            for (int x = 0; x < map.width; ++x, in += step, out += map.images * kLineBytes) {
                apply_to_pixel<kActivation>(in, add, args.scale, mean, factor, shift, stored, out);
                add += add == nullptr ? 0 : step;
            }
        }
    }
}

// Mean (layer norm) and factor of one pixel.
void normalise_pixel(const NormArgs& args, int y, int x, int image, float& mean, float& factor) {
    const int channels = channels_of(args.src), blocks = count_blocks(args);
    float total = 0;
    for (int b = 0; args.kind == kLayer && b < blocks; ++b) {
        int own = b;
        const Map& map = find_block(args.src, own);
        const Element* p = at(map, own, y, x) + image * kBlock;
        for (int v = 0; v < kEach; ++v) total += sum(load(p + v * kLanes));
    }
    mean = total / static_cast<float>(channels);
    float squares = 0;
    for (int b = 0; b < blocks; ++b) {
        int own = b;
        const Map& map = find_block(args.src, own);
        const Element* p = at(map, own, y, x) + image * kBlock;
        const int used = least(channels - b * kBlock, kBlock);
        for (int i = 0; i < used; ++i) squares += (to_float(p[i]) - mean) * (to_float(p[i]) - mean);
    }
    if (args.kind == kRms) {
        const float length = sqrtf(squares);
        factor = sqrtf(static_cast<float>(channels)) / (length > 1e-12f ? length : 1e-12f);
    } else {
        factor = 1.0f / sqrtf(squares / static_cast<float>(channels) + args.eps);
    }
}

template <Activation kActivation, typename To>
void apply_by_pixel(const NormArgs& args, int from, int to) {
    const To stored(args);
    const int width = args.dst.width;
    for (int n = 0; n < args.dst.images; ++n)
        for (int y = from; y < to; ++y) {
            float* kept = args.workspace + (static_cast<int64_t>(y) * args.dst.images + n) * width * 2;
            for (int x = 0; x < width; ++x) normalise_pixel(args, y, x, n, kept[2 * x], kept[2 * x + 1]);
        }
    for (int n = 0; n < args.dst.images; ++n)
        for (int b = 0; b < count_blocks(args); ++b) {
            Affine affine;
            make_affine(args, b, n, affine);
            int own = b;
            const Map& map = find_block(args.src, own);
            for (int y = from; y < to; ++y) {
                const float* kept = args.workspace + (static_cast<int64_t>(y) * args.dst.images + n) * width * 2;
                for (int x = 0; x < width; ++x) {
                    Vec mean[kEach], factor[kEach], shift[kEach];
                    for (int v = 0; v < kEach; ++v) {
                        mean[v] = splat(kept[2 * x]);
                        factor[v] = load(affine.factor + v * kLanes) * kept[2 * x + 1];
                        shift[v] = load(affine.shift + v * kLanes);
                    }
                    const Element* add = args.add.data == nullptr ? nullptr : at(args.add, b, y, x) + n * kBlock;
                    apply_to_pixel<kActivation>(at(map, own, y, x) + n * kBlock, add, args.scale, mean, factor, shift,
                                                stored, stored.at(args.dst, b, y, x) + n * kLineBytes);
                }
            }
        }
}

bool is_by_pixel(const NormArgs& args) { return args.kind == kRms || args.kind == kLayer; }

template <Activation kActivation, typename To>
void apply_to(const NormArgs& args, int item) {
    const int pieces = divide_up(args.dst.height, rows_a_piece(args.dst));
    const int from = item % pieces * rows_a_piece(args.dst);
    const int to = least(from + rows_a_piece(args.dst), args.dst.height);
    if (is_by_pixel(args)) {
        apply_by_pixel<kActivation, To>(args, from, to);
        for (int b = 0; b < count_blocks(args); ++b) To(args).finish_border(args.dst, b, from, to);
    } else {
        apply_by_channel<kActivation, To>(args, item / pieces, from, to);
        To(args).finish_border(args.dst, item / pieces, from, to);
    }
}

template <Activation kActivation>
void apply(const NormArgs& args, int item) {
#ifdef UNETRT_ELEMENT_BF16
    if (args.steps > 0) return apply_to<kActivation, ToBytes>(args, item);
#endif
    apply_to<kActivation, ToElements>(args, item);
}

}  // namespace

void measure_rows(const MeasureArgs& args, int block, int from, int to) {
    const Map& map = args.src;
    for (int y = from; y < to; ++y)
        for (int n = 0; n < map.images; ++n) {
            measure_row(map, at(map, block, y, 0) + n * kBlock, map.images,
                        args.statistics + row_index(map, block, y, n));
        }
}

int measure_items(const MeasureArgs& args) {
    return args.src.blocks() * divide_up(args.src.height, rows_a_piece(args.src));
}

void measure(const MeasureArgs& args, int item) {
    const int pieces = divide_up(args.src.height, rows_a_piece(args.src)),
              from = item % pieces * rows_a_piece(args.src);
    measure_rows(args, item / pieces, from, least(from + rows_a_piece(args.src), args.src.height));
}

int64_t norm_workspace(const NormArgs& args) {
    return is_by_pixel(args) ? static_cast<int64_t>(args.dst.height) * args.dst.images * args.dst.width * 2 : 0;
}

int norm_items(const NormArgs& args) {
    const int pieces = divide_up(args.dst.height, rows_a_piece(args.dst));
    return is_by_pixel(args) ? pieces : count_blocks(args) * pieces;
}

void norm(const NormArgs& args, int item) {
    switch (args.activation) {
        case Activation::kIdentity: return apply<Activation::kIdentity>(args, item);
        case Activation::kSilu: return apply<Activation::kSilu>(args, item);
        case Activation::kRelu: return apply<Activation::kRelu>(args, item);
        case Activation::kMish: return apply<Activation::kMish>(args, item);
        case Activation::kGelu: return apply<Activation::kGelu>(args, item);
    }
}

}  // namespace unetrt::UNETRT_ISA
