#include <algorithm>

#include "layout.h"

namespace unetrt {

namespace {

bool live_together(const PlacedMap& a, const PlacedMap& b) { return a.first <= b.last && b.first <= a.last; }

// The lowest place where a map of `size` fits between maps placed already.
int64_t find_gap(std::vector<const PlacedMap*>& taken, int64_t size) {
    std::sort(taken.begin(), taken.end(), [](const PlacedMap* a, const PlacedMap* b) { return a->offset < b->offset; });
    int64_t place = 0;
    for (const PlacedMap* other : taken) {
        if (other->offset - place >= size) break;
        place = std::max(place, other->offset + other->size);
    }
    return place;
}

}  // namespace

int64_t place_maps(std::vector<PlacedMap>& maps) {
    std::vector<PlacedMap*> order;
    for (PlacedMap& map : maps)
        if (map.first != -1) order.push_back(&map);
    std::stable_sort(order.begin(), order.end(),
                     [](const PlacedMap* a, const PlacedMap* b) { return a->size > b->size; });
    int64_t total = 0;
    for (size_t i = 0; i < order.size(); ++i) {
        std::vector<const PlacedMap*> taken;
        for (size_t j = 0; j < i; ++j)
            if (live_together(*order[i], *order[j])) taken.push_back(order[j]);
        order[i]->offset = find_gap(taken, order[i]->size);
        total = std::max(total, order[i]->offset + order[i]->size);
    }
    return total;
}

}  // namespace unetrt
