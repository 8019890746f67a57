// The forward scan on the CPU. A step multiplies h_{t-1} with one block of W_hh after the other and runs the
// cell on the block while its products are in the L1 cache; a projection is a second phase of the step.
#pragma once
#include "cpu/math.h"
#include "cpu/scan.h"

namespace fastrnn::FASTRNN_ISA {
namespace {

template <class Cell, class S>
class Forward : public Scan<S, ForwardProblem<S>> {
  using Base = Scan<S, ForwardProblem<S>>;
  using Base::outputs, Base::plan, Base::problem, Base::sequence, Base::units;
  static constexpr int G = Cell::kGates;
  static constexpr int kWidth = G * kBlock<S>;
  // Rows whose products for one block are kept at a time: about 24 KB.
  static constexpr int64_t kChunk = 48;

 public:
  FASTRNN_INLINE explicit Forward(const ForwardProblem<S>& given)
      : Base(given, choose_plan({.T = given.sequence.T,
                                         .B = given.sequence.B,
                                         .blocks = Blocks<S>{given.H}.count(),
                                         .block_weights = given.P * kWidth,
                                         .element_bytes = sizeof(S),
                                         .directions = given.directions,
                                         .threads = given.parallel.threads})) {}

  /// False when there is no memory for the working arrays.
  bool run() {
    if (sequence.T == 0 || sequence.B == 0) return true;
    const Scratch scratch([this](Scratch& s) { lay_out(s); });
    if (scratch.failed()) return false;
    for (int team = 0; team < this->teams(); ++team) ::new (&members_[team]) Team(plan.parts);
    problem.parallel(this->workers(), [this](int64_t worker) { prepare(worker); });
    this->Base::run(*this, members_, projected() ? 2 * sequence.T : sequence.T);
    for (int d = 0; d < problem.directions; ++d) final_states(d);
    return true;
  }

  void phase(int team, int64_t phase, int part) {
    if (!projected())
      step(team, phase, part);
    else if (phase % 2 == 0)
      step(team, phase / 2, part);
    else
      project(team, phase / 2, part);
  }

 private:
  bool projected() const { return static_cast<bool>(problem.direction[0].weights.w_hr); }
  bool packed() const { return this->most_rows() > kFewRows; }

  void lay_out(Scratch& s) {
    members_ = s.take<Team>(this->teams());
    const int64_t most = this->most_rows();
    h_stride_ = padded<S>(problem.P, kBlock<S>);
    m_stride_ = projected() ? padded<S>(problem.H, kBlock<S>) : 0;
    h_ = s.take<S>(this->teams() * 2 * most * h_stride_);
    m_ = s.take<S>(this->teams() * most * m_stride_);
    for (int d = 0; d < problem.directions; ++d) {
      bias_[d] = s.take<S>(G * problem.H);
      if (!packed()) continue;
      panels_[d] = s.take<S>(units.count() * problem.P * kWidth);
      projection_[d] = projected() ? s.take<S>(outputs.count() * problem.H * kBlock<S>) : nullptr;
    }
  }

  /// h of the team's rows: step s reads buffer s % 2 and writes the other one.
  FASTRNN_INLINE Rows<S> h_buffer(int team, int64_t s) const {
    const int64_t most = this->most_rows();
    return {h_ + (team * 2 + s % 2) * most * h_stride_, h_stride_};
  }
  /// Before its projection, h is m.
  FASTRNN_INLINE Rows<S> m_buffer(int team) const {
    return {m_ + team * this->most_rows() * m_stride_, m_stride_};
  }
  FASTRNN_INLINE S* panel(int direction, int64_t block, int gate) const {
    const int width = units.vectors(block) * kLanes<S>;
    return panels_[direction] + problem.P * (block * kWidth + gate * width);
  }

  void prepare(int64_t worker) {
    const int64_t workers = this->workers();
    for (int d = 0; d < problem.directions; ++d) {
      const Weights<S>& w = problem.direction[d].weights;
      if (worker == 0) {
        if (w.b_hh)
          copy_row(bias_[d], w.b_hh, G * problem.H);
        else
          __builtin_memset(bias_[d], 0, G * problem.H * sizeof(S));
      }
      if (!packed()) continue;
      for (int64_t block = worker; block < units.count(); block += workers)
        for (int gate = 0; gate < G; ++gate) {
          const Rows<const S> rows{w.w_hh[gate * problem.H + block * kBlock<S>], w.w_hh.stride};
          pack_transposed(rows, problem.P, units.in_block(block), units.vectors(block),
                          panel(d, block, gate));
        }
      if (!projected()) continue;
      for (int64_t block = worker; block < outputs.count(); block += workers)
        pack_transposed({w.w_hr[block * kBlock<S>], w.w_hr.stride}, problem.H, outputs.in_block(block),
                        outputs.vectors(block), projection_[d] + block * problem.H * kBlock<S>);
    }
    // Both buffers hold h0, so that a row of a reversed packed sequence finds it at whichever step it begins.
    for (int team = static_cast<int>(worker); team < this->teams(); team += static_cast<int>(workers)) {
      const TeamRows rows = this->rows_of(team);
      for (int64_t i = 0; i < rows.count(sequence.B); ++i)
        for (int buffer = 0; buffer < 2; ++buffer)
          copy_row(h_buffer(team, buffer)[i],
                   problem.direction[this->direction_of(team)].h0[rows.batch(i)], problem.P);
    }
  }

  void step(int team, int64_t s, int part) {
    const int64_t n = this->rows_of(team).count(sequence.rows(this->time(this->direction_of(team), s)));
    const Range blocks = share(units.count(), part, plan.parts);
    for (int64_t block = blocks.begin; block < blocks.end; ++block)
      for (int64_t i = 0, left = (n + kChunk - 1) / kChunk; left > 0; --left) {
        const int64_t rows = (n - i + left - 1) / left;
        step_block(team, s, block, i, rows);
        i += rows;
      }
  }

  /// One block of units for the team's rows i .. i + n.
  void step_block(int team, int64_t s, int64_t block, int64_t i, int64_t n) {
    alignas(64) S product[kChunk * kWidth];  // [n][G][width]
    const int d = this->direction_of(team);
    const int vectors = units.vectors(block), width = vectors * kLanes<S>;
    const int64_t first = block * kBlock<S>;
    const Rows<S> h = h_buffer(team, s);
    const Rows<const S> a{h[i], h.stride};
    for (int gate = 0; gate < G; ++gate) {
      S* const c = product + gate * width;
      if (packed()) {
        multiply<S>(a, n, problem.P, panel(d, block, gate), vectors, c, G * width, false);
      } else {
        const Rows<const S>& w = problem.direction[d].weights.w_hh;
        multiply_transposed<S>(a, n, problem.P, {w[gate * problem.H + first], w.stride},
                               units.in_block(block), c, G * width);
      }
    }
    if (problem.direction[d].saved)
      cells<true>(team, s, block, i, n, product);
    else
      cells<false>(team, s, block, i, n, product);
  }

  template <bool kSave>
  void cells(int team, int64_t s, int64_t block, int64_t i_begin, int64_t n, const S* product) {
    const int d = this->direction_of(team);
    const ForwardDirection<S>& dir = problem.direction[d];
    const TeamRows rows = this->rows_of(team);
    const int64_t t = this->time(d, s), H = problem.H;
    const int width = units.vectors(block) * kLanes<S>;
    const Rows<S> h_now = h_buffer(team, s), h_next = h_buffer(team, s + 1), m = m_buffer(team);
    for (int64_t k = 0; k < n; ++k) {
      const int64_t i = i_begin + k, b = rows.batch(i), row = sequence.row(t, b);
      const S* const gx = dir.gx[row];
      const S* const gh = product + k * G * width;
      each_vector<S>(block * kBlock<S>, units.in_block(block), [&](auto io, int64_t u, int offset) {
        V<S> x[G], a[G], saved[Cell::kSaved + 1], h_prev{}, c{};
        for (int g = 0; g < G; ++g) {
          x[g] = io.load(gx + g * H + u);
          a[g] = load(gh + g * width + offset) + io.load(bias_[d] + g * H + u);
        }
        if constexpr (Cell::kDirect) h_prev = io.load(h_now[i] + u);
        if constexpr (Cell::kCellState) c = io.load(dir.c[b] + u);
        const V<S> h = Cell::template forward<Math<S>, V<S>>(x, a, h_prev, c, saved);
        if constexpr (Cell::kCellState) io.store(dir.c[b] + u, c);
        if constexpr (kSave) {
          for (int j = 0; j < Cell::kSaved; ++j) io.store(dir.saved[row] + j * H + u, saved[j]);
          if constexpr (Cell::kCellState) io.store(dir.saved_c[row] + u, c);
        }
        if (projected()) {
          io.store(m[i] + u, h);
        } else {
          io.store(h_next[i] + u, h);
          io.store(dir.y[row] + u, h);
        }
      });
    }
  }

  /// h_t = W_hr m_t for the part's blocks of outputs.
  void project(int team, int64_t s, int part) {
    const int d = this->direction_of(team);
    const ForwardDirection<S>& dir = problem.direction[d];
    const TeamRows rows = this->rows_of(team);
    const int64_t t = this->time(d, s), n = rows.count(sequence.rows(t));
    const Rows<S> h_next = h_buffer(team, s + 1), m = m_buffer(team);
    const Range blocks = share(outputs.count(), part, plan.parts);
    for (int64_t block = blocks.begin; block < blocks.end; ++block) {
      const int64_t first = block * kBlock<S>;
      const int count = outputs.in_block(block);
      S* const c = h_next.data + first;
      if (packed())
        multiply<S>({m.data, m.stride}, n, problem.H, projection_[d] + first * problem.H,
                    outputs.vectors(block), c, h_next.stride, false);
      else
        multiply_transposed<S>({m.data, m.stride}, n, problem.H,
                               {dir.weights.w_hr[first], dir.weights.w_hr.stride}, count, c,
                               h_next.stride);
      for (int64_t i = 0; i < n; ++i)
        copy_row(dir.y[sequence.row(t, rows.batch(i))] + first, h_next[i] + first, count);
    }
  }

  /// h_n of a row is its y at the last step that it takes part in.
  void final_states(int d) const {
    const ForwardDirection<S>& dir = problem.direction[d];
    for (int64_t b = 0, t = sequence.T - 1; b < sequence.B; ++b) {
      while (sequence.rows(t) <= b) --t;
      copy_row(dir.h_n[b], dir.y[sequence.row(d == 0 ? t : 0, b)], problem.P);
    }
  }

  Team* members_ = nullptr;
  S *h_ = nullptr, *m_ = nullptr;
  int64_t h_stride_ = 0, m_stride_ = 0;
  S* bias_[kMaxDirections] = {};
  S* panels_[kMaxDirections] = {};
  S* projection_[kMaxDirections] = {};
};

}  // namespace
}  // namespace fastrnn::FASTRNN_ISA
