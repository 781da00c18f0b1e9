// Owns: the three phases of the small heads over the pieces of a HeadPlan.
#pragma once

#include "head_plan.h"
#include "products_impl.h"
#include "softmax_impl.h"

namespace sett {
namespace SETT_CPU_ISA {

using cpu::HeadBlock;
using cpu::HeadGroup;
using cpu::HeadItem;
using cpu::HeadPlan;
using cpu::HeadTile;
using cpu::Pieces;

template <typename M, typename S> struct HeadView {
  using R = typename M::Scalar;
  using V = typename M::Vector;

  const HeadArgs& args;
  const HeadPlan& plan;
  int64_t hidden = args.hidden;
  const S* features = static_cast<const S*>(args.features);
  const S* weight = static_cast<const S*>(args.weight);
  R* scores = static_cast<R*>(args.scores);
  R* grad_scores = static_cast<R*>(args.grad_scores);

  const S* feature(int64_t f) const { return features + f * hidden; }
  const S* row(int64_t r) const { return weight + r * hidden; }
  const HeadItem& ordered(int64_t k) const { return plan.item[plan.order[k]]; }
};

// ---------------------------------------------------------------------------------------------------------------------
// Sources of sum_rows, see products_impl.h.

// The gradients of I features, each of one item of the same group: sums over the group's rows.
template <typename M, typename S> struct TileFeatures {
  const HeadView<M, S>& head;
  const HeadGroup& group;
  const typename M::Scalar* gradient[M::kRows];  // of each item's scores

  template <int I, int C, bool kPart>
  SETT_INLINE void add(typename M::Vector (&sum)[I][C], int64_t column, int64_t part) const {
    const S* row = head.row(group.row_first) + column;
    for (int64_t k = 0; k < group.row_count; ++k, row += head.hidden) {
      typename M::Scalar coefficient[I];
      for (int i = 0; i < I; ++i) coefficient[i] = gradient[i][k];
      add_row<M, I, C, kPart>(sum, coefficient, row, part);
    }
  }
};

// The gradients of neighbouring features from `first` on: sums over the items of the block.
template <typename M, typename S> struct BlockFeatures {
  static constexpr bool kBias = false;
  const HeadView<M, S>& head;
  const HeadBlock& block;
  int64_t first;

  template <int I, int C, bool kPart>
  SETT_INLINE void add(typename M::Vector (&sum)[I][C], int64_t column, int64_t part) const {
    for (int64_t k = block.begin; k < block.end; ++k) {
      const HeadItem& item = head.plan.item[head.plan.feature_list[k]];
      // More than one row means that the item has one feature, and so has the block.
      const typename M::Scalar* gradient = head.grad_scores + item.score + (first - item.feature_first);
      const S* row = head.row(item.row_first) + column;
      for (int64_t r = 0; r < item.row_count; ++r, ++gradient, row += head.hidden) {
        typename M::Scalar coefficient[I];
        for (int i = 0; i < I; ++i) coefficient[i] = I > 1 ? gradient[i] : *gradient;
        add_row<M, I, C, kPart>(sum, coefficient, row, part);
      }
    }
  }
};

// The gradients of neighbouring rows from `first` on: sums over the live items of the groups of the block.
template <typename M, typename S> struct BlockRows {
  static constexpr bool kBias = true;
  const HeadView<M, S>& head;
  const HeadBlock& block;
  int64_t first;

  template <int I, int C, bool kPart>
  SETT_INLINE void add(typename M::Vector (&sum)[I][C], int64_t column, int64_t part) const {
    for (int64_t g = block.begin; g < block.end; ++g) {
      const HeadGroup& group = head.plan.group[head.plan.row_list[g]];
      for (int64_t k = group.begin; k < group.end; ++k) {
        const HeadItem& item = head.ordered(k);
        if (!item.live) continue;
        // More than one feature means that the item has one row, and so has the block.
        const typename M::Scalar* gradient = head.grad_scores + item.score + (first - group.row_first);
        const S* feature = head.feature(item.feature_first) + column;
        for (int64_t f = 0; f < item.feature_count; ++f, ++gradient, feature += head.hidden) {
          typename M::Scalar coefficient[I];
          for (int i = 0; i < I; ++i) coefficient[i] = gradient[i];
          add_row<M, I, C, kPart>(sum, coefficient, feature, part);
        }
      }
    }
  }

  // The gradient of the bias of row first + i.
  typename M::Scalar bias(int64_t i) const {
    typename M::Scalar sum(0);
    for (int64_t g = block.begin; g < block.end; ++g) {
      const HeadGroup& group = head.plan.group[head.plan.row_list[g]];
      for (int64_t k = group.begin; k < group.end; ++k) {
        const HeadItem& item = head.ordered(k);
        if (!item.live) continue;
        const typename M::Scalar* gradient = head.grad_scores + item.score + (first + i - group.row_first);
        for (int64_t f = 0; f < item.feature_count; ++f) sum += gradient[f];
      }
    }
    return sum;
  }
};

// ---------------------------------------------------------------------------------------------------------------------
// First phase.

template <typename M, typename S> class TileWork {
 public:
  using R = typename M::Scalar;

  TileWork(const HeadArgs& args, const HeadPlan& plan) : head_{args, plan} {}

  void run(const HeadTile& tile) {
    const HeadGroup& group = head_.plan.group[tile.group];
    group.row_count > 1 ? score_rows(tile, group) : score_features(tile, group);
    for (int64_t k = tile.begin; k < tile.end; ++k) finish(head_.plan.order[k]);
    if (group.row_count > 1 && head_.grad_scores) write_features(tile, group);
  }

 private:
  R bias(int64_t row) const {
    return head_.args.bias ? widen(static_cast<const S*>(head_.args.bias)[row]) : R(0);
  }

  // One feature of each item by the rows of the group.
  void score_rows(const HeadTile& tile, const HeadGroup& group) {
    R out[M::kRows * kDotColumns];
    const S* a[M::kRows];
    const S* b[kDotColumns];
    for (int64_t r = 0; r < group.row_count; r += kDotColumns) {
      const int64_t columns = smaller(kDotColumns, group.row_count - r);
      for (int64_t j = 0; j < columns; ++j) b[j] = head_.row(group.row_first + r + j);
      for (int64_t k = tile.begin; k < tile.end; k += M::kRows) {
        const int64_t rows = smaller(M::kRows, tile.end - k);
        for (int64_t i = 0; i < rows; ++i) a[i] = head_.feature(head_.ordered(k + i).feature_first);
        dot_products<M, M::kRows, kDotColumns>(rows, columns, a, b, head_.hidden, out);
        for (int64_t i = 0; i < rows; ++i) {
          R* scores = head_.scores + head_.ordered(k + i).score + r;
          for (int64_t j = 0; j < columns; ++j) scores[j] = out[i * kDotColumns + j] + bias(group.row_first + r + j);
        }
      }
    }
  }

  // All features of all items by the one row of the group.
  void score_features(const HeadTile& tile, const HeadGroup& group) {
    const S* row = head_.row(group.row_first);
    const R bias_here = bias(group.row_first);
    const S* b[kDotColumns];
    R* to[kDotColumns];
    R out[kDotColumns];
    int64_t columns = 0;
    for (int64_t k = tile.begin; k < tile.end; ++k) {
      const HeadItem& item = head_.ordered(k);
      for (int64_t f = 0; f < item.feature_count; ++f) {
        b[columns] = head_.feature(item.feature_first + f);
        to[columns++] = head_.scores + item.score + f;
        if (columns < kDotColumns && (k + 1 < tile.end || f + 1 < item.feature_count)) continue;
        dot_products<M, 1, kDotColumns>(1, columns, &row, b, head_.hidden, out);
        for (int64_t j = 0; j < columns; ++j) *to[j] = out[j] + bias_here;
        columns = 0;
      }
    }
  }

  // The loss of an item whose scores are there, and their gradients.
  void finish(int64_t i) {
    const HeadArgs& args = head_.args;
    const HeadItem& item = head_.plan.item[i];
    R* loss = static_cast<R*>(args.loss) + i;
    const R weight = static_cast<R>(args.loss_weight[i]);
    if (i >= args.segments) {
      const R prediction = head_.scores[item.score], value = static_cast<R>(args.value[i - args.segments]);
      *loss = algebra::squared_error(prediction, value);
      if (head_.grad_scores) {
        head_.grad_scores[item.score] = item.live ? algebra::squared_error_gradient(prediction, value, weight) : R(0);
      }
      return;
    }
    Segment<R> segment = {};
    segment.x = head_.scores + item.score;
    segment.grad_x = head_.grad_scores ? head_.grad_scores + item.score : nullptr;
    segment.length = item.feature_count * item.row_count;
    segment.target = args.target[i] == kIgnore ? -1 : args.target[i];
    segment.weight = weight;
    segment.smoothing = args.smoothing ? static_cast<R>(args.smoothing[i]) : R(0);
    segment.z_loss = static_cast<R>(args.z_loss);
    *loss = segment_losses<M>(segment).cross_entropy;
  }

  // The gradients of the features that nothing but this tile uses, while the rows are in a cache.
  void write_features(const HeadTile& tile, const HeadGroup& group) {
    TileFeatures<M, S> source = {head_, group, {}};
    S* out[M::kRows];
    int64_t rows = 0;
    for (int64_t k = tile.begin; k < tile.end; ++k) {
      const HeadItem& item = head_.ordered(k);
      if (item.single) {
        source.gradient[rows] = head_.grad_scores + item.score;
        out[rows++] = static_cast<S*>(head_.args.grad_features) + item.feature_first * head_.hidden;
      }
      if (rows == 0 || (rows < M::kRows && k + 1 < tile.end)) continue;
      sum_rows<M, M::kRows>(rows, source, 0, head_.hidden, out);
      rows = 0;
    }
  }

  HeadView<M, S> head_;
};

// ---------------------------------------------------------------------------------------------------------------------
// Ranges of time to pieces.

// The first piece that starts at `time` or later.
template <typename Piece> inline int64_t first_piece(const Pieces<Piece>& pieces, int64_t time) {
  int64_t low = 0, high = pieces.count;
  while (low < high) {
    const int64_t middle = low + (high - low) / 2;
    if (pieces.start[middle] < time) low = middle + 1;
    else high = middle;
  }
  return low;
}

// The gradients of the blocks, or parts of blocks, in a range of time; `out` is the whole gradient. The gradient of the
// bias, when there is one, comes with a block's first strip.
template <template <typename, typename> class Source, typename M, typename S>
inline void write_blocks(const HeadView<M, S>& head, const Pieces<HeadBlock>& blocks, int64_t begin, int64_t end,
                         S* out, S* bias) {
  // The last block that starts before `begin` may have strips that do not.
  for (int64_t b = larger(0, first_piece(blocks, begin) - 1); b < blocks.count && blocks.start[b] < end; ++b) {
    const HeadBlock& block = blocks.piece[b];
    const int64_t start = blocks.start[b];
    const int64_t from = larger(0, begin - start + block.cost - 1) / block.cost;
    const int64_t to = smaller(block.strips, (end - start + block.cost - 1) / block.cost);
    if (from >= to) continue;
    if (block.begin == block.end) {
      clear<M>(out + block.first * head.hidden, block.count * head.hidden);
      if (bias) clear<M>(bias + block.first, block.count);
      continue;
    }
    for (int64_t i = 0; i < block.count; i += M::kRows) {
      const Source<M, S> source = {head, block, block.first + i};
      const int64_t rows = smaller(M::kRows, block.count - i);
      S* each[M::kRows];
      for (int64_t j = 0; j < rows; ++j) each[j] = out + (source.first + j) * head.hidden;
      sum_rows<M, M::kRows>(rows, source, from * cpu::kStripColumns, smaller(head.hidden, to * cpu::kStripColumns),
                            each);
      if constexpr (Source<M, S>::kBias) {
        for (int64_t j = 0; bias && from == 0 && j < rows; ++j) bias[source.first + j] = narrow<S>(source.bias(j));
      }
    }
  }
}

template <typename M, typename S>
inline void head_scores(const HeadArgs& args, const HeadPlan& plan, int64_t begin, int64_t end) {
  TileWork<M, S> work(args, plan);
  for (int64_t t = first_piece(plan.tiles, begin); t < plan.tiles.count && plan.tiles.start[t] < end; ++t) {
    work.run(plan.tiles.piece[t]);
  }
}

template <typename M, typename S>
inline void head_feature_gradients(const HeadArgs& args, const HeadPlan& plan, int64_t begin, int64_t end) {
  const HeadView<M, S> head = {args, plan};
  write_blocks<BlockFeatures>(head, plan.feature_blocks, begin, end, static_cast<S*>(args.grad_features),
                              static_cast<S*>(nullptr));
}

template <typename M, typename S>
inline void head_row_gradients(const HeadArgs& args, const HeadPlan& plan, int64_t begin, int64_t end) {
  const HeadView<M, S> head = {args, plan};
  write_blocks<BlockRows>(head, plan.row_blocks, begin, end, static_cast<S*>(args.grad_weight),
                          static_cast<S*>(args.grad_bias));
}

}  // namespace SETT_CPU_ISA
}  // namespace sett
