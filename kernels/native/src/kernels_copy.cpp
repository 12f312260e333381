// Maps moved: concatenated, added, split into phases, and to and from plain [images][channels][height][width].
#include "kernels_copy.h"

#include "kernels_common.h"

namespace unetrt::UNETRT_ISA {

namespace {

// A block of dst whose channels come from blocks of the sources one by one, because the first ends within one.
void gather_row(const CopyArgs& args, int block, int y) {
    const Map& dst = args.dst;
    const int first = args.src.part[0].channels;
    for (int c = 0; c < kBlock; ++c) {
        const int channel = block * kBlock + c;
        const bool is_second = channel >= first;
        const Map& map = args.src.part[is_second ? 1 : 0];
        const int own = channel - (is_second ? first : 0);
        Element* out = at(dst, block, y, 0) + c;
        const Element* in = channel < dst.channels ? at(map, own / kBlock, y, 0) + own % kBlock : nullptr;
        for (int64_t i = 0; i < static_cast<int64_t>(dst.width) * dst.images; ++i) {
            out[i * kBlock] = in == nullptr ? Element{} : in[i * kBlock];
        }
    }
}

void copy_row(const CopyArgs& args, int block, int y) {
    const Map& first = args.src.part[0];
    const bool is_second = block >= first.blocks();
    const Map& map = args.src.part[is_second ? 1 : 0];
    const Element* in = at(map, block - (is_second ? first.blocks() : 0), y, 0);
    copy_lines(in, static_cast<int64_t>(args.dst.width) * args.dst.images, at(args.dst, block, y, 0));
}

void add_row(const CopyArgs& args, int block, int y) {
    const Element* add = at(args.add, block, y, 0);
    Element* out = at(args.dst, block, y, 0);
    const int64_t count = static_cast<int64_t>(args.dst.width) * args.dst.images * kBlock;
    for (int64_t i = 0; i < count; i += kLanes) store(out + i, (load(out + i) + load(add + i)) * args.scale);
}

// Rows that an item does.
constexpr int kRows = 8;

}  // namespace

int copy_items(const CopyArgs& args) { return args.dst.blocks() * divide_up(args.dst.height, kRows); }

void copy(const CopyArgs& args, int item) {
    const int pieces = divide_up(args.dst.height, kRows), block = item / pieces;
    const int from = item % pieces * kRows, to = least(from + kRows, args.dst.height);
    const bool gathers = args.src.count == 2 && args.src.part[0].channels % kBlock != 0;
    for (int y = from; y < to; ++y) {
        if (gathers) {
            gather_row(args, block, y);
        } else {
            copy_row(args, block, y);
        }
        if (args.add.data != nullptr) add_row(args, block, y);
    }
    clear_border(args.dst, block, from, to);
}

int split_items(const CopyArgs& args) { return args.dst.blocks(); }

void split(const CopyArgs& args, int item) {
    const Map &src = args.src.part[0], &dst = args.dst;
    const int blocks = src.blocks(), phase = item / blocks, block = item % blocks;
    for (int y = 0; y < dst.height; ++y)
        for (int x = 0; x < dst.width; ++x) {
            const int in_y = 2 * y + phase / 2, in_x = 2 * x + phase % 2;
            Element* out = at(dst, item, y, x);
            if (in_y >= src.height || in_x >= src.width) {
                clear_lines(out, dst.images);
            } else {
                copy_lines(at(src, block, in_y, in_x), dst.images, out);
            }
        }
    clear_border(dst, item, 0, dst.height);
}

int planar_items(const PlanarArgs& args) { return args.map.blocks(); }

void from_planar(const PlanarArgs& args, int item) {
    const Map& map = args.map;
    const int64_t pixels = static_cast<int64_t>(map.height) * map.width;
    const int first = item * kBlock, channels = least(map.channels - first, kBlock);
    for (int y = 0; y < map.height; ++y) {
        if (channels < kBlock) clear_lines(at(map, item, y, 0), static_cast<int64_t>(map.width) * map.images);
        for (int n = 0; n < map.images; ++n)
            for (int c = 0; c < channels; ++c) {
                const float* in =
                    args.planar + (static_cast<int64_t>(n) * map.channels + first + c) * pixels + y * map.width;
                Element* out = at(map, item, y, 0) + n * kBlock + c;
                for (int x = 0; x < map.width; ++x)
                    out[static_cast<int64_t>(x) * map.images * kBlock] = to_element(in[x]);
            }
    }
    clear_border(map, item, 0, map.height);
}

void to_planar(const PlanarArgs& args, int item) {
    const Map& map = args.map;
    const int64_t pixels = static_cast<int64_t>(map.height) * map.width;
    const int channels = least(map.channels - item * kBlock, kBlock);
    for (int n = 0; n < map.images; ++n)
        for (int c = 0; c < channels; ++c) {
            float* out = args.planar + (static_cast<int64_t>(n) * map.channels + item * kBlock + c) * pixels;
            for (int y = 0; y < map.height; ++y) {
                const Element* in = at(map, item, y, 0) + n * kBlock + c;
                for (int x = 0; x < map.width; ++x) {
                    const Element value = in[static_cast<int64_t>(x) * map.images * kBlock];
                    out[static_cast<int64_t>(y) * map.width + x] = to_float(value);
                }
            }
        }
}

}  // namespace unetrt::UNETRT_ISA
