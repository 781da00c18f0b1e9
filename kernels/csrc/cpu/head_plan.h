// The order of work of the small heads, found once per call from the indices alone.
//
// Owns: which segments and points share rows of the packed weight, which features and rows each gradient is a sum over,
// and how long each piece of work takes. Plain arrays and no functions: the vector files include this (see isa.h).
#pragma once

#include <stdint.h>

namespace sett {
namespace cpu {

// A segment or a point: features [feature_first, + feature_count) by rows [row_first, + row_count), one count being 1.
// Its scores begin at `score`; a point's stand after those of all segments.
struct HeadItem {
  int64_t feature_first, feature_count;
  int64_t row_first, row_count;
  int64_t score;
  bool live;    // takes part in gradients: sound, not ignored, of a weight other than 0
  bool single;  // its only feature is no other live item's, so its gradient can be written with the scores
};

// The items that have one range of rows, in ascending order: [begin, end) of HeadPlan::order.
struct HeadGroup {
  int64_t row_first, row_count;
  int64_t begin, end;
};

// Some items of one group: [begin, end) of HeadPlan::order.
struct HeadTile {
  int64_t group;
  int64_t begin, end;
};

// Neighbouring features, or rows, whose gradients are sums over the same items, or groups: [begin, end) of a list.
struct HeadBlock {
  int64_t first, count;
  int64_t begin, end;
  int64_t strips;  // its columns in strips of kStripColumns; 1 when there is nothing to sum
  int64_t cost;    // of one strip
};

constexpr int64_t kBlockRows = 4;  // of a block with something to sum
constexpr int64_t kStripColumns = 128;

// Piece i takes the time from start[i] to start[i + 1]. Threads get ranges of time, so as to finish together, and work
// on the pieces, or strips of pieces, that start in theirs. The unit is about kStripColumns multiplications.
template <typename Piece> struct Pieces {
  const Piece* piece;
  const int64_t* start;
  int64_t count;
};

struct HeadPlan {
  const HeadItem* item;         // [G + N]; what is not in `order` has no scores, or unsound indices
  const int64_t* order;
  const HeadGroup* group;
  const int64_t* feature_list;  // items
  const int64_t* row_list;      // groups
  Pieces<HeadTile> tiles;
  Pieces<HeadBlock> feature_blocks;
  Pieces<HeadBlock> row_blocks;
};

}  // namespace cpu
}  // namespace sett
