// Owns: the building of a HeadPlan. Counting sorts throughout: this runs on one thread while the others wait.
#include "head_schedule.h"

#include <algorithm>
#include <utility>

namespace sett {
namespace cpu {
namespace {

// Costs in units of HeadPlan, measured: memory costs more than arithmetic in heads of few examples each.
constexpr int64_t kReadRow = 10, kWriteRow = 24;  // of a strip
constexpr int64_t kLoss = 64;                     // of an item
constexpr int64_t kTileItems = 12;
constexpr int64_t kTileScores = 64;               // of one row
constexpr int64_t kZeroRows = 16;                 // of a block with nothing to sum

std::size_t at(int64_t i) { return static_cast<size_t>(i); }

struct Range { int64_t first, count, id; };

// Cuts [0, count) where a range begins or ends, and lists the ranges that cover each interval, in the order given.
struct Cover {
  std::vector<int64_t> bounds;  // interval i is [bounds[i], bounds[i + 1])
  std::vector<int64_t> begin;   // its list is list[begin[i]] to list[begin[i + 1] - 1]
  std::vector<int64_t> list;
};

Cover cover(int64_t count, const std::vector<Range>& ranges) {
  Cover c;
  std::vector<int64_t> interval(at(count + 1), 0);
  for (const Range& r : ranges) interval[at(r.first)] = interval[at(r.first + r.count)] = 1;
  interval[0] = interval[at(count)] = 1;
  for (int64_t i = 0; i <= count; ++i) {
    if (interval[at(i)] == 0) continue;
    interval[at(i)] = static_cast<int64_t>(c.bounds.size());
    c.bounds.push_back(i);
  }
  c.begin.assign(c.bounds.size() + 1, 0);
  for (const Range& r : ranges) {
    for (int64_t i = interval[at(r.first)]; i < interval[at(r.first + r.count)]; ++i) ++c.begin[at(i + 2)];
  }
  // One step behind: begin[i + 1] moves from the start to the end of interval i's list as the list fills.
  for (size_t i = 1; i < c.begin.size(); ++i) c.begin[i] += c.begin[i - 1];
  c.list.resize(at(c.begin.back()));
  for (const Range& r : ranges) {
    for (int64_t i = interval[at(r.first)]; i < interval[at(r.first + r.count)]; ++i) {
      c.list[at(c.begin[at(i + 1)]++)] = r.id;
    }
  }
  return c;
}

int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// The blocks of one interval; `terms` is how many rows are summed into each of its rows.
void add_blocks(PieceList<HeadBlock>& blocks, int64_t first, int64_t last, int64_t begin, int64_t end, int64_t terms,
                int64_t strips) {
  const bool nothing = begin == end;
  const int64_t step = nothing ? kZeroRows : kBlockRows;
  for (int64_t i = first; i < last; i += step) {
    const int64_t count = std::min(step, last - i);
    const int64_t cost = nothing ? count * kWriteRow * strips : count * (kWriteRow + terms) + terms;
    const HeadBlock block = {i, count, begin, end, nothing ? 1 : strips, cost};
    blocks.add(block, block.strips * cost);
  }
}

}  // namespace

HeadSchedule::HeadSchedule(const HeadArgs& args, std::vector<HeadItem> items)
    : strips_(std::max<int64_t>(1, divide_up(args.hidden, kStripColumns))), items_(std::move(items)) {
  group_items(args.row_count);
  // Without any scores `grad_scores` may be null though gradients, all zero, are wanted.
  if (args.grad_scores || args.grad_features || args.grad_weight) {
    block_features(args.feature_count);
    block_rows(args.row_count);
  }
  tile_groups();
}

void HeadSchedule::group_items(int64_t row_count) {
  std::vector<int64_t> place(at(row_count + 1), 0);
  for (const HeadItem& item : items_) {
    if (item.row_count > 0) ++place[at(item.row_first + 1)];
  }
  for (size_t r = 1; r < place.size(); ++r) place[r] += place[r - 1];
  order_.resize(at(place.back()));
  for (size_t i = 0; i < items_.size(); ++i) {
    if (items_[i].row_count > 0) order_[at(place[at(items_[i].row_first)]++)] = static_cast<int64_t>(i);
  }
  const auto fewer_rows = [this](int64_t a, int64_t b) { return items_[at(a)].row_count < items_[at(b)].row_count; };
  for (size_t begin = 0; begin < order_.size();) {
    const int64_t row_first = items_[at(order_[begin])].row_first;
    const size_t end = at(place[at(row_first)]);
    const auto from = order_.begin() + static_cast<int64_t>(begin), to = order_.begin() + static_cast<int64_t>(end);
    if (!std::is_sorted(from, to, fewer_rows)) std::stable_sort(from, to, fewer_rows);
    for (size_t i = begin; i < end; ++i) {
      const int64_t rows = items_[at(order_[i])].row_count, position = static_cast<int64_t>(i);
      if (i == begin || rows != groups_.back().row_count) groups_.push_back({row_first, rows, position, position});
      groups_.back().end = position + 1;
    }
    begin = end;
  }
}

void HeadSchedule::tile_groups() {
  for (size_t g = 0; g < groups_.size(); ++g) {
    const HeadGroup& group = groups_[g];
    const int64_t id = static_cast<int64_t>(g);
    if (group.row_count > 1) {
      // Tiles of about equal size, in whole register blocks.
      const int64_t items = group.end - group.begin;
      const int64_t step = divide_up(divide_up(items, divide_up(items, kTileItems)), kBlockRows) * kBlockRows;
      for (int64_t begin = group.begin; begin < group.end; begin += step) {
        const int64_t end = std::min(begin + step, group.end), count = end - begin;
        const int64_t cost = strips_ * group.row_count * (kReadRow + 2 * count) + count * (kLoss + group.row_count / 8);
        tiles.add({id, begin, end}, cost);
      }
      continue;
    }
    for (int64_t begin = group.begin; begin < group.end;) {
      int64_t end = begin, scores = 0;
      while (end < group.end && scores < kTileScores) scores += items_[at(order_[at(end++)])].feature_count;
      tiles.add({id, begin, end}, scores * strips_ * 4 + (end - begin) * kLoss);
      begin = end;
    }
  }
}

void HeadSchedule::block_features(int64_t feature_count) {
  std::vector<Range> ranges;
  for (size_t i = 0; i < items_.size(); ++i) {
    const HeadItem& item = items_[i];
    if (item.live) ranges.push_back({item.feature_first, item.feature_count, static_cast<int64_t>(i)});
  }
  Cover c = cover(feature_count, ranges);
  for (size_t i = 0; i + 1 < c.bounds.size(); ++i) {
    const int64_t begin = c.begin[i], end = c.begin[i + 1];
    int64_t terms = 0;
    for (int64_t k = begin; k < end; ++k) terms += items_[at(c.list[at(k)])].row_count;
    if (end - begin == 1 && terms > 1) {
      items_[at(c.list[at(begin)])].single = true;
    } else {
      add_blocks(feature_blocks, c.bounds[i], c.bounds[i + 1], begin, end, terms, strips_);
    }
  }
  feature_list_ = std::move(c.list);
}

void HeadSchedule::block_rows(int64_t row_count) {
  std::vector<Range> ranges;
  std::vector<int64_t> terms(groups_.size(), 0);
  for (size_t g = 0; g < groups_.size(); ++g) {
    for (int64_t k = groups_[g].begin; k < groups_[g].end; ++k) {
      const HeadItem& item = items_[at(order_[at(k)])];
      if (item.live) terms[g] += item.feature_count;
    }
    if (terms[g] > 0) ranges.push_back({groups_[g].row_first, groups_[g].row_count, static_cast<int64_t>(g)});
  }
  Cover c = cover(row_count, ranges);
  for (size_t i = 0; i + 1 < c.bounds.size(); ++i) {
    const int64_t begin = c.begin[i], end = c.begin[i + 1];
    int64_t sum = 0;
    for (int64_t k = begin; k < end; ++k) sum += terms[at(c.list[at(k)])];
    add_blocks(row_blocks, c.bounds[i], c.bounds[i + 1], begin, end, sum, strips_);
  }
  row_list_ = std::move(c.list);
}

HeadPlan HeadSchedule::plan() const {
  return {items_.data(),     order_.data(), groups_.data(),        feature_list_.data(),
          row_list_.data(), tiles.view(),  feature_blocks.view(), row_blocks.view()};
}

}  // namespace cpu
}  // namespace sett
