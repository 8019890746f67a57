// The products that follow the backward scan, over all steps at once: dx = dgates W_ih, dW_ih = dgates^T x,
// dW_hh = dgates^T h_{t-1}, and the sums of dgates. The rows of h_{t-1} are read where they lie, in y and h0.
#pragma once
#include "cpu/columns.h"
#include "cpu/scan.h"

namespace fastrnn::FASTRNN_ISA {
namespace {

template <class Cell, class S>
class Products {
  static constexpr CellInfo kInfo = Cell::kInfo;
  static constexpr int G = kInfo.gates;
  static constexpr bool kTakesX = !kInfo.takes_gates;
  static constexpr int64_t kChunk = 48;  // rows of dx at a time
  static constexpr int64_t kRowsDeep = 256;  // rows that one pass over dW adds
  static constexpr int kTall = kTileRows;  // units of a tile of dW
  static constexpr int kStrip = 8 * kTall;  // units packed at once: several adjacent cache lines of each row

 public:
  FASTRNN_INLINE explicit Products(const ProductsProblem<S>& given)
      : problem(given), sequence(given.sequence), inputs{given.I}, outputs{given.P} {}

  /// False when there is no memory for the working arrays.
  bool run() {
    workers_ = workers();
    deep_ = min(kRowsDeep, max<int64_t>(all_rows(), 1));
    const Scratch scratch([this](Memory& memory) { lay_out(memory); });
    if (scratch.failed()) return false;
    if (few()) {
      problem.parallel(workers_, [&](int64_t worker) {
        if (problem.dx) few_input_gradients(static_cast<int>(worker));
        if (problem.weights) few_weight_gradients(static_cast<int>(worker));
      });
      return true;
    }
    const int packers = min(workers_, kMaxParts);
    if (packers > 1) ::new (everyone_) Team(packers);
    problem.parallel(workers_, [&](int64_t worker) {
      if (problem.dx) {
        together(everyone_, packers, packers == 1, worker % packers, 1, [&](int64_t, int part) {
          for (int d = 0; d < problem.directions; ++d) w_ih_[d].pack(part, packers);
        });
        input_gradient(worker);
      }
      if (problem.weights) weight_gradients(worker);
    });
    return true;
  }

 private:
  /// Below 1 Mflop, waking the other threads costs more than the work.
  int workers() const {
    const double flops = 2.0 * static_cast<double>(all_rows()) * G * static_cast<double>(problem.H) *
                         static_cast<double>(problem.I + problem.P) * problem.directions;
    return flops < 1e6 ? 1 : problem.parallel.threads;
  }

  int64_t all_rows() const {
    return sequence.offsets ? sequence.offsets[sequence.T] : sequence.T * sequence.B;
  }
  bool few() const { return all_rows() <= kFewRows; }

  /// Where a row of dgates has the gradient of a gate of unit u: that of x, and that of the recurrent
  /// product.
  int64_t of_input(int gate, int64_t u) const { return kInfo.gradient_of_input(gate) * problem.H + u; }
  int64_t of_recurrent(int gate, int64_t u) const {
    return kInfo.gradient_of_recurrent(gate) * problem.H + u;
  }

  void lay_out(Memory& s) {
    everyone_ = s.take<Team>(1);
    const int64_t K = G * problem.H;
    row_stride_ = padded<S>(K, kBlock<S>);
    if (problem.dx && !few()) {
      const bool packs = packing_columns_pays<S>(all_rows(), all_rows() / kChunk, K, problem.I);
      for (int d = 0; d < problem.directions; ++d)
        w_ih_[d].lay_out(s, problem.direction[d].weights.w_ih, K, problem.I, packs);
      chunks_ = s.take<S>(workers_ * kChunk * row_stride_);
    }
    if (!problem.weights) return;
    columns_ = s.take<S>(workers_ * (inputs.count() + outputs.count()) * kBlock<S> * deep_);
    units_ = s.take<S>(workers_ * kStrip * deep_);
    sources_ = s.take<Source>(workers_ * deep_);
    if (problem.direction[0].options.recurrent) masked_ = s.take<S>(workers_ * deep_ * problem.P);
  }

  // ---- dx ----------------------------------------------------------------------------------------------

  /// dx of few rows, which read W_ih in place; a worker owns some columns.
  void few_input_gradients(int worker) {
    const Range mine = share(inputs.count(), worker, workers_);
    const int64_t first = mine.begin * kBlock<S>, columns = min(mine.end * kBlock<S>, problem.I) - first;
    if (columns <= 0) return;
    for (int64_t row = 0; row < all_rows(); ++row)
      __builtin_memset(problem.dx[row] + first, 0, columns * sizeof(S));
    for (int d = 0; d < problem.directions; ++d) {
      const ProductsDirection<S>& dir = problem.direction[d];
      multiply_in_place<S, S>({dir.dgates.data + of_input(0, 0), dir.dgates.stride}, all_rows(),
                              G * problem.H, {dir.weights.w_ih.data + first, dir.weights.w_ih.stride},
                              columns, {problem.dx.data + first, problem.dx.stride});
    }
  }

  void input_gradient(int64_t worker) {
    const int64_t N = all_rows();
    const int64_t K = G * problem.H;
    const Rows<S> a{chunks_ + worker * kChunk * row_stride_, row_stride_};
    alignas(64) S product[kChunk * kBlock<S>];
    for (int64_t first = worker * kChunk; first < N; first += workers_ * kChunk) {
      const int64_t n = min(kChunk, N - first);
      for (int d = 0; d < problem.directions; ++d) {
        for (int64_t i = 0; i < n; ++i)
          copy_row(a[i], problem.direction[d].dgates[first + i] + of_input(0, 0), K);
        for (int64_t block = 0; block < inputs.count(); ++block) {
          w_ih_[d].multiply({a.data, a.stride}, n, block, product, kBlock<S>, false);
          for (int64_t i = 0; i < n; ++i) {
            S* const dx = problem.dx[first + i];
            each_vector<S>(block * kBlock<S>, inputs.in_block(block),
                           [&](auto io, int64_t u, int64_t offset) {
                             const V<S> v = load(product + i * kBlock<S> + offset);
                             io.store(dx + u, d == 0 ? v : v + io.load(dx + u));
                           });
          }
        }
      }
    }
  }

  // ---- dW and db ---------------------------------------------------------------------------------------

  /// What one row of the sequence contributes; h is null where the state was reset to zero.
  struct Source {
    const S *dgates, *x, *h;
  };

  /// Walks over the rows that take part, deep_ at a time.
  struct Walk {
    int64_t t = 0, position = 0;
  };

  int64_t next_rows(int64_t worker, int d, Walk& walk) const {
    Source* const sources = sources_ + worker * deep_;
    const ProductsDirection<S>& dir = problem.direction[d];
    int64_t n = 0;
    for (; walk.t < sequence.T; ++walk.t, walk.position = 0) {
      const int64_t t = walk.t, t_prev = d == 0 ? t - 1 : t + 1;
      const int64_t alive = sequence.rows(t);
      const int64_t alive_prev = t_prev < 0 || t_prev >= sequence.T ? 0 : sequence.rows(t_prev);
      for (; walk.position < alive; ++walk.position) {
        if (n == deep_) return n;
        const int64_t position = walk.position, row = sequence.row(t, position);
        const int64_t b = sequence.batch(position);
        const S* h = nullptr;
        if (sequence.resets(t, position))
          h = dir.options.reset_state(kH, t, b);
        else
          h = position < alive_prev ? dir.y[sequence.row(t_prev, position)] : dir.h0[b];
        if (dir.options.recurrent && h) {
          S* const masked = masked_ + (worker * deep_ + n) * problem.P;
          scale_row(masked, h, dir.options.recurrent[b], problem.P);
          h = masked;
        }
        sources[n++] = {dir.dgates[row], problem.x[row], h};
      }
    }
    return n;
  }

  /// Few rows: each row of dW is written once, from end to end; a worker owns some of them.
  void few_weight_gradients(int worker) {
    const Range mine = share(G * problem.H, worker, workers_);
    Source* const sources = sources_ + worker * deep_;
    for (int d = 0; d < problem.directions; ++d) {
      const ProductsDirection<S>& dir = problem.direction[d];
      Walk walk;
      const int64_t n = next_rows(worker, d, walk);
      for (int64_t row = mine.begin; row < mine.end; ++row) {
        const auto gate = static_cast<int>(row / problem.H);
        const int64_t of_x = of_input(gate, row % problem.H), of_h = of_recurrent(gate, row % problem.H);
        if constexpr (kTakesX)
          dir.db_ih[row] =
              outer_row(sources, n, of_x, problem.I, dir.dw_ih[row], [](const Source& s) { return s.x; });
        if constexpr (kInfo.dense) {
          const S sum =
              outer_row(sources, n, of_h, problem.P, dir.dw_hh[row], [](const Source& s) { return s.h; });
          if constexpr (kTakesX) dir.db_hh[row] = sum;
        }
      }
    }
  }

  /// to[columns] = sum of dgates[of] times the row's numbers, over the n rows; returns the sum of dgates[of].
  template <class F>
  FASTRNN_INLINE S outer_row(const Source* sources, int64_t n, int64_t of, int64_t columns, S* to,
                             F row_of) const {
    S total = 0;
    for (int64_t k = 0; k < n; ++k) total += sources[k].dgates[of];
    each_vector<S>(0, columns, [&](auto io, int64_t u, int64_t) {
      V<S> sum{};
      for (int64_t k = 0; k < n; ++k)
        if (const S* const row = row_of(sources[k])) sum += sources[k].dgates[of] * io.load(row + u);
      io.store(to + u, sum);
    });
    return total;
  }

  /// A worker owns some of the tiles of kTall units of a gate, over all columns of dW_ih and dW_hh.
  void weight_gradients(int64_t worker) {
    const int64_t tall = (problem.H + kTall - 1) / kTall;
    const Range mine = share(G * tall, static_cast<int>(worker), static_cast<int>(workers_));
    Source* const sources = sources_ + worker * deep_;
    S* const columns = columns_ + worker * (inputs.count() + outputs.count()) * kBlock<S> * deep_;
    S* const h_columns = columns + inputs.count() * kBlock<S> * deep_;
    for (int d = 0; d < problem.directions; ++d) {
      Walk walk;
      for (bool first = true;; first = false) {
        const int64_t n = next_rows(worker, d, walk);
        if (n == 0 && !first) break;
        if constexpr (kTakesX)
          pack_columns(sources, n, inputs, columns, [](const Source& source) { return source.x; });
        if constexpr (kInfo.dense)
          pack_columns(sources, n, outputs, h_columns, [](const Source& source) { return source.h; });
        for (int64_t tile = mine.begin; tile < mine.end;) {
          const int64_t gate = tile / tall, u = tile % tall * kTall;
          const int64_t end = min(mine.end, (gate + 1) * tall);  // of the gate
          const int64_t count = min<int64_t>(min((end - tile) * kTall, problem.H - u), kStrip);
          gradient_strip(d, static_cast<int>(gate), u, static_cast<int>(count), n, sources,
                         units_ + worker * kStrip * deep_, columns, h_columns, !first);
          tile += (count + kTall - 1) / kTall;
        }
      }
    }
  }

  template <class F>
  void pack_columns(const Source* sources, int64_t n, const Blocks<S>& blocks, S* panels, F row_of) const {
    for (int64_t block = 0; block < blocks.count(); ++block) {
      const int width = blocks.vectors(block) * kLanes<S>, count = blocks.in_block(block);
      S* const panel = panels + block * kBlock<S> * deep_;
      for (int64_t k = 0; k < n; ++k) {
        const S* const row = row_of(sources[k]);
        if (row == nullptr || count < width) __builtin_memset(panel + k * width, 0, width * sizeof(S));
        if (row != nullptr)
          each_vector<S>(block * kBlock<S>, count, [&](auto io, int64_t u, int64_t offset) {
            io.store(panel + k * width + offset, io.load(row + u));
          });
      }
    }
  }

  /// Units u .. u + count of one gate, count <= kStrip.
  void gradient_strip(int d, int gate, int64_t u, int count, int64_t n, const Source* sources, S* packed,
                      const S* x_columns, const S* h_columns, bool accumulate) {
    const ProductsDirection<S>& dir = problem.direction[d];
    const int64_t of_x = of_input(gate, u), of_h = of_recurrent(gate, u);
    const int64_t row = gate * problem.H + u;
    if constexpr (kTakesX) {
      pack_units(sources, n, of_x, count, packed, dir.db_ih + row, accumulate);
      add_columns(packed, n, count, inputs, x_columns, {dir.dw_ih[row], dir.dw_ih.stride}, accumulate);
    }
    if constexpr (!kInfo.dense) return;
    if (of_h != of_x || !kTakesX)
      pack_units(sources, n, of_h, count, packed, kTakesX ? dir.db_hh + row : nullptr, accumulate);
    else
      copy_row(dir.db_hh + row, dir.db_ih + row, count);
    add_columns(packed, n, count, outputs, h_columns, {dir.dw_hh[row], dir.dw_hh.stride}, accumulate);
  }

  /// packed[tile][k][unit] = dgates of the n rows, and their sum into db, if there is one.
  void pack_units(const Source* sources, int64_t n, int64_t first, int count, S* packed, S* db,
                  bool accumulate) const {
    S total[kStrip] = {};
    for (int64_t k = 0; k < n; ++k) {
      const S* const from = sources[k].dgates + first;
      for (int i = 0; i < count; ++i) total[i] += from[i];
      int i = 0;
      for (; i + kTall <= count; i += kTall)
        __builtin_memcpy(packed + i * deep_ + k * kTall, from + i, kTall * sizeof(S));
      if (i < count) copy_row(packed + i * deep_ + k * (count - i), from + i, count - i);
    }
    for (int i = 0; i < count && db; ++i) db[i] = total[i] + (accumulate ? db[i] : S{0});
  }

  void add_columns(const S* packed, int64_t n, int count, const Blocks<S>& blocks, const S* panels,
                   Rows<S> dw, bool accumulate) const {
    for (int i = 0; i < count; i += kTall)
      for (int64_t block = 0; block < blocks.count(); ++block)
        add_tile(packed + i * deep_, n, min(kTall, count - i), blocks.vectors(block), blocks.in_block(block),
                 panels + block * kBlock<S> * deep_, {dw[i] + block * kBlock<S>, dw.stride}, accumulate);
  }

  /// dw[count, columns] (+)= units [n, count]^T columns [n, vectors].
  void add_tile(const S* units, int64_t n, int count, int vectors, int columns, const S* panel, Rows<S> dw,
                bool accumulate) const {
    const int width = vectors * kLanes<S>;
    const auto tile = tile_for<S, S, true>(count, vectors);
    if (columns == width) return tile(units, 1, panel, width, n, dw.data, dw.stride, accumulate, panel);
    alignas(64) S product[kTall * kBlock<S>];
    tile(units, 1, panel, width, n, product, width, false, panel);
    for (int i = 0; i < count; ++i)
      each_vector<S>(0, columns, [&](auto io, int64_t u, int64_t offset) {
        const V<S> v = load(product + i * width + offset);
        io.store(dw[i] + u, accumulate ? v + io.load(dw[i] + u) : v);
      });
  }

  const ProductsProblem<S>& problem;
  const Sequence& sequence;
  const Blocks<S> inputs, outputs;  // columns of W_ih and of W_hh
  int workers_ = 1;
  int64_t row_stride_ = 0, deep_ = 1;
  Team* everyone_ = nullptr;
  Columns<S> w_ih_[kMaxDirections];
  S *masked_ = nullptr, *chunks_ = nullptr, *columns_ = nullptr, *units_ = nullptr;
  Source* sources_ = nullptr;
};

}  // namespace
}  // namespace fastrnn::FASTRNN_ISA
