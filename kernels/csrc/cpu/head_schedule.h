// Owns: the building of a HeadPlan, and the memory of its arrays.
#pragma once

#include <cstddef>
#include <vector>

#include "../sett.h"
#include "head_plan.h"

namespace sett {
namespace cpu {

template <typename Piece> struct PieceList {
  std::vector<Piece> piece;
  std::vector<int64_t> start{0};

  void add(const Piece& p, int64_t cost) {
    piece.push_back(p);
    start.push_back(start.back() + (cost > 0 ? cost : 1));
  }
  Pieces<Piece> view() const { return {piece.data(), start.data(), static_cast<int64_t>(piece.size())}; }
  int64_t total() const { return start.back(); }
};

class HeadSchedule {
 public:
  HeadSchedule(const HeadArgs& args, std::vector<HeadItem> items);
  HeadPlan plan() const;

  PieceList<HeadTile> tiles;
  PieceList<HeadBlock> feature_blocks, row_blocks;

 private:
  void group_items(int64_t row_count);
  void tile_groups();
  void block_features(int64_t feature_count);
  void block_rows(int64_t row_count);

  int64_t strips_;  // of a whole row
  std::vector<HeadItem> items_;
  std::vector<int64_t> order_, feature_list_, row_list_;
  std::vector<HeadGroup> groups_;
};

}  // namespace cpu
}  // namespace sett
