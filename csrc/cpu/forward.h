// The forward scan on the CPU. A step multiplies x_t and h_{t-1} with one block of W_ih and W_hh after the
// other and runs the cell on the block while its products are in the L1 cache; a projection is a second phase
// of the step. With few rows a step, the products with x are made for several steps at once.
#pragma once

#include "cpu/math.h"
#include "cpu/panels.h"
#include "cpu/scan.h"

namespace fastrnn::FASTRNN_ISA {
namespace {

/// W is what a packed weight is stored as.
template <class Cell, class S, class W>
class Forward : public Scan<S, ForwardProblem<S>> {
  using Base = Scan<S, ForwardProblem<S>>;
  using Base::outputs, Base::plan, Base::problem, Base::sequence, Base::units;
  using Panels = FASTRNN_ISA::Panels<Cell, S, W>;
  static constexpr CellInfo kInfo = Cell::kInfo;
  static constexpr int G = kInfo.gates, kProducts = Panels::kProducts;
  using Factor = FASTRNN_ISA::Factor<S, W>;  // what h is kept as for its products
  using Left = FASTRNN_ISA::Left<S, W>;  // and what these multiply
  static constexpr int kShared = G - kInfo.split;  // gates whose products with x and h are one sum
  static constexpr bool kRounds = !std::is_same_v<Factor, S>, kQuantises = std::is_same_v<W, Int8>;
  static constexpr bool kNarrow = kRounds || kQuantises;  // products of 16 or 8 bits, of several panels
  static constexpr int64_t kWidth = G * kBlock<S>, kProductWidth = kProducts * kBlock<S>;
  // Rows whose products for one block are kept at a time: about 24 KB.
  static constexpr int64_t kChunk = 48;
  // Weights up to this size stay in a cache between two steps.
  static constexpr int64_t kNear = 16 << 20;
  // Batch at least this many rows into one input projection, taking rows from several time steps if needed;
  // more when W_ih streams from DRAM.
  static constexpr int64_t kInputRows = kNarrow ? 32 : 2 * kTileRows, kFarInputRows = 96;

 public:
  FASTRNN_INLINE explicit Forward(const ForwardProblem<S>& given)
      : Base(given, choose_plan({.T = given.sequence.T,
                                 .B = given.sequence.B,
                                 .blocks = Blocks<S>{given.H}.count(),
                                 .block_weights = (kInfo.dense ? given.P : given.I) * kWidth,
                                 .element_bytes = sizeof(W),
                                 .directions = given.directions,
                                 .threads = given.parallel.threads})) {}

  /// False when there is no memory for the working arrays.
  bool run() {
    if (sequence.T == 0 || sequence.B == 0) return true;
    const int64_t most = this->most_rows();
    turns_ = !kInfo.staged() && !kQuantises && turning_pays();
    far_ = (problem.I + problem.P) * kWidth * units.count() * int64_t(sizeof(S)) > kNear;
    const int64_t wanted = far_ ? kFarInputRows : kInputRows;
    steps_at_once_ = turns_ || kInfo.staged() ? 1 : min(sequence.T, (wanted + most - 1) / most);
    const Scratch scratch([this](Memory& memory) { lay_out(memory); });
    if (scratch.failed()) return false;
    this->Base::run(*this, problem.projected || kInfo.staged() ? 2 * sequence.T : sequence.T);
    for (int d = 0; d < problem.directions; ++d) final_states(d);
    return true;
  }

  /// Worker `part` of `parts` in what comes before the first phase: packing, and copying the states.
  void prepare(int64_t part, int64_t parts) {
    for (int d = 0; d < problem.directions && !problem.packed; ++d)
      panels_[d].pack(problem.direction[d].weights, part, parts);
    for (auto team = static_cast<int>(part); team < this->teams(); team += static_cast<int>(parts))
      initial_states(team);
  }

  void phase(int team, int64_t phase, int part) {
    if constexpr (kInfo.staged())
      phase % 2 == 0 ? row_products(team, phase / 2, part) : row_cells(team, phase / 2, part);
    else if (!problem.projected)
      step(team, phase, part);
    else if (phase % 2 == 0)
      step(team, phase / 2, part);
    else
      project(team, phase / 2, part);
  }

 private:
  /// Rows of x or of h, [n, K], and their transposed panels where the products take those.
  struct Operand {
    Rows<const Left> rows;
    int64_t K;
    const Factor* turned;

    FASTRNN_INLINE Operand from(int64_t i) const {
      return {{rows[i], rows.stride}, K, turned ? turned + i * K : nullptr};
    }
  };

  /// Whether transposing x and h (at every step) and reading W in place moves fewer numbers than packing W
  /// (once a call). Transposed, rows fill registers: an empty lane costs as much as a row, and tiles of one
  /// register keep the multipliers busy only with many rows of W.
  bool turning_pays() const {
    constexpr int64_t L = kLanes<S>;
    const int64_t rows = this->most_rows(), GH = G * problem.H;
    const int64_t P = kInfo.dense ? problem.P : 0, K = problem.I + P;
    // Whole tiles of W alone can be read in place; few rows take as long as many, because W's bytes bind
    // them.
    const bool fills = kRounds ? problem.I % kBfloat16Depth == 0 && P % kBfloat16Depth == 0
                               : (rows > L || kTileRows >= 8) && 4 * rows >= 3 * ((rows + L - 1) / L * L);
    constexpr int64_t kCost =
        kRounds ? 24 : 3;  // of a number of x or of a product, beside one of W; measured
    return !problem.packed && fills && kCost * sequence.T * rows * (K + 2 * GH) <= 2 * K * GH;
  }

  void lay_out(Memory& s) {
    this->take_teams(s);
    const int64_t most = this->most_rows(), input_rows = most * steps_at_once_;
    h_stride_ = padded<S>(problem.P, kBlock<S>);
    m_stride_ = problem.projected ? padded<Factor>(problem.H, kBlock<Factor>) : 0;
    x_stride_ = left_stride(problem.I), left_stride_ = left_stride(max(problem.H, problem.P));
    factor_stride_ = padded<Factor>(problem.P, kBlock<Factor>);
    h_ = s.take<S>(this->teams() * 2 * most * h_stride_);
    m_ = s.take<Factor>(this->teams() * most * m_stride_);
    factors_ = s.take<Factor>(has_factors() ? this->teams() * 2 * most * factor_stride_ : 0);
    if constexpr (kInfo.staged()) {
      gate_stride_ = units.count() * kBlock<S>;
      row_stride_ = padded<S>(G * gate_stride_, kBlock<S>);
      rows_ = s.take<S>(this->teams() * most * row_stride_);
      after_ = s.take<S>(this->workers() * kInfo.states * problem.H);
    }
    left_ = s.take<Left>(kQuantises && kInfo.dense ? this->workers() * most * left_stride_ : 0);
    x_ = s.take<Left>(kInfo.staged() ? 0 : this->workers() * input_rows * x_stride_);
    part_blocks_ = (units.count() + plan.parts - 1) / plan.parts;
    if (steps_at_once_ > 1)
      products_ = s.take<S>(this->workers() * part_blocks_ * input_rows * kProductWidth);
    if (turns_) turned_ = s.take<Factor>(this->workers() * turned_size());
    const bool packs_ih = problem.packed || (!turns_ && packing_pays(most * sequence.T, problem.I));
    const bool packs_hh = problem.packed || (!turns_ && packing_pays(most * sequence.T, problem.P));
    Memory kept(const_cast<char*>(problem.packed));
    for (int d = 0; d < problem.directions; ++d)
      panels_[d].lay_out(problem.packed ? kept : s, problem.I, problem.P, problem.H, packs_ih, packs_hh,
                         problem.projected);
  }

  /// h of the team's rows: step s reads buffer s % 2 and writes the other one.
  FASTRNN_INLINE Rows<S> h_buffer(int team, int64_t s) const {
    const int64_t most = this->most_rows();
    return {h_ + (team * 2 + s % 2) * most * h_stride_, h_stride_};
  }
  /// What W_hh multiplies: h, or with a mask its product with that; rounded where the products take that.
  FASTRNN_INLINE Rows<Factor> factor_buffer(int team, int64_t s) const {
    if constexpr (!kRounds)
      if (!has_factors()) return h_buffer(team, s);
    return {factors_ + (team * 2 + s % 2) * this->most_rows() * factor_stride_, factor_stride_};
  }
  FASTRNN_INLINE bool has_factors() const { return kRounds || problem.direction[0].options.recurrent; }
  /// m_t: h_t before its projection.
  FASTRNN_INLINE Rows<Factor> m_buffer(int team) const {
    return {m_ + team * this->most_rows() * m_stride_, m_stride_};
  }
  /// Of Int8 the cache line that padded() adds has the row's scale.
  static int64_t left_stride(int64_t K) {
    return padded<Left>(kQuantises ? int8_depth(K) : K, kQuantises ? 64 : kBlock<Left>);
  }
  /// Rows of h or of m as one part multiplies them.
  FASTRNN_INLINE Rows<Left> left_rows(int team, int part, Rows<Factor> rows, int64_t n, int64_t K) const {
    if constexpr (!kQuantises) {
      return rows;
    } else {
      const Rows<Left> to{left_ + (team * plan.parts + part) * this->most_rows() * left_stride_,
                          left_stride_};
      for (int64_t i = 0; kInfo.dense && i < n; ++i) quantise(rows[i], K, zero_, to[i]);
      return to;
    }
  }
  /// x of the team's rows without gaps, for one part: of one step, or of steps_at_once_.
  FASTRNN_INLINE Rows<Left> x_buffer(int team, int part) const {
    return {x_ + (team * plan.parts + part) * steps_at_once_ * this->most_rows() * x_stride_, x_stride_};
  }
  /// Products of several steps: [block of the part][step][row][kProducts][width].
  FASTRNN_INLINE S* products(int team, int part, int64_t block) const {
    const int64_t rows = steps_at_once_ * this->most_rows();
    const int64_t index = (team * plan.parts + part) * part_blocks_ + block - blocks_of(part).begin;
    return products_ + index * rows * kProductWidth;
  }
  FASTRNN_INLINE Range blocks_of(int part) const { return share(units.count(), part, plan.parts); }
  FASTRNN_INLINE int width_of(int64_t block) const { return units.vectors(block) * kLanes<S>; }

  /// Both buffers hold h0, so that a row of a reversed sequence finds it at whichever step it begins.
  void initial_states(int team) {
    const int d = this->direction_of(team);
    const ForwardDirection<S>& dir = problem.direction[d];
    const TeamRows rows = this->rows_of(team);
    for (int64_t i = 0; i < rows.count(sequence.B); ++i) {
      const int64_t position = rows.position(i), b = sequence.batch(position);
      const int64_t last = sequence.last_step(position);
      const int64_t first = d == 0 ? 0 : last;
      const bool resets = last >= 0 && sequence.resets(first, position);
      for (int buffer = 0; buffer < 2; ++buffer) {
        S* const h = h_buffer(team, buffer)[i];
        if (resets)
          reset_row(dir, kH, first, b, h, problem.P);
        else
          copy_row(h, dir.h0[b], problem.P);
        if (!has_factors()) continue;
        Factor* const factors = factor_buffer(team, buffer)[i];
        fill_up(factors, problem.P);
        each_vector<S>(0, problem.P, [&](auto io, int64_t u, int64_t) {
          const V<S> v = io.load(h + u);
          io.store(factors + u, dir.options.recurrent ? v * io.load(dir.options.recurrent[b] + u) : v);
        });
      }
      if (problem.projected) fill_up(m_buffer(team)[i], problem.H);
      for (int k = 1; k < kInfo.states && resets; ++k) reset_row(dir, k, first, b, dir.last[k][b], problem.H);
    }
  }

  /// Zeros after the K numbers of a row, as far as the products read it.
  static void fill_up(Factor* row, int64_t K) {
    if (kRounds) __builtin_memset(row + K, 0, size_t(panel_depth<W>(K) - K) * sizeof *row);
  }

  /// The state of row b before step t, which resets it.
  static void reset_row(const ForwardDirection<S>& dir, int state, int64_t t, int64_t b, S* to,
                        int64_t units) {
    if (const S* const from = dir.options.reset_state(state, t, b))
      copy_row(to, from, units);
    else
      __builtin_memset(to, 0, units * sizeof(S));
  }

  void gather_x(int team, int64_t s, Rows<Left> x) {
    const TeamRows rows = this->rows_of(team);
    const int64_t t = this->time(this->direction_of(team), s), n = this->rows_at(team, s);
    const Rows<const Factor> given = problem.x.template of<Factor>();
    for (int64_t i = 0; i < n; ++i) {
      const Factor* const row = given[sequence.row(t, rows.position(i))];
      if constexpr (kQuantises) {
        quantise(row, problem.I, zero_, x[i]);
      } else {
        copy_row(x[i], row, problem.I);
        fill_up(x[i], problem.I);
      }
    }
  }

  void step(int team, int64_t s, int part) {
    const Range blocks = blocks_of(part);
    const int64_t n = this->rows_at(team, s), offset = s % steps_at_once_ * this->most_rows();
    const int d = this->direction_of(team);
    const Rows<Left> h_rows = left_rows(team, part, factor_buffer(team, s), n, problem.P);
    if (steps_at_once_ > 1) {
      const Operand h{{h_rows.data, h_rows.stride}, problem.P, nullptr};
      if (offset == 0) input_products(team, s, part);
      for (int64_t block = blocks.begin; block < blocks.end; ++block) {
        S* const product = products(team, part, block) + offset * kProducts * width_of(block);
        if constexpr (kInfo.dense) recurrent_product(d, block, h, n, product);
        finish(team, s, block, 0, n, product);
      }
      return;
    }
    const Rows<Left> x_rows = x_buffer(team, part);
    gather_x(team, s, x_rows);
    Factor* const turned = turns_ ? turned_ + (team * plan.parts + part) * turned_size() : nullptr;
    const Operand x = operand(x_rows, n, problem.I, turned);
    const Operand h = operand(h_rows, n, problem.P, turned + turned_rows() * problem.I);
    const int64_t chunk = turns_ ? kBlock<S> : kChunk;
    alignas(64) S product[kChunk * kProductWidth];
    for (int64_t block = blocks.begin; block < blocks.end; ++block)
      for (int64_t i = 0, left = (n + chunk - 1) / chunk; left > 0; --left) {
        const int64_t rows = turns_ ? min(chunk, n - i) : (n - i + left - 1) / left;
        input_product(d, block, x.from(i), rows, product);
        if constexpr (kInfo.dense) recurrent_product(d, block, h.from(i), rows, product);
        finish(team, s, block, i, rows, product);
        i += rows;
      }
  }

  /// The products with x of the part's blocks, for the steps_at_once_ steps from s on.
  void input_products(int team, int64_t s, int part) {
    const int d = this->direction_of(team);
    const int64_t most = this->most_rows(), steps = min(steps_at_once_, sequence.T - s);
    const Rows<Left> rows = x_buffer(team, part);
    const Operand x{{rows.data, rows.stride}, problem.I, nullptr};
    bool even = true;  // all steps have the same rows
    for (int64_t k = 0; k < steps; ++k) {
      gather_x(team, s + k, {rows[k * most], rows.stride});
      even &= this->rows_at(team, s + k) == most;
    }
    const Range blocks = blocks_of(part);
    for (int64_t block = blocks.begin; block < blocks.end; ++block) {
      S* const product = products(team, part, block);
      if (even) {
        input_product(d, block, x, steps * most, product);
        continue;
      }
      for (int64_t k = 0; k < steps; ++k)
        input_product(d, block, x.from(k * most), this->rows_at(team, s + k),
                      product + k * most * kProducts * width_of(block));
    }
  }

  int64_t turned_rows() const { return (this->most_rows() + kBlock<S> - 1) / kBlock<S> * kBlock<S>; }
  int64_t turned_size() const { return turned_rows() * (problem.I + problem.P); }

  Operand operand(Rows<Left> rows, int64_t n, int64_t K, Factor* turned) const {
    if constexpr (!kQuantises)
      for (int64_t i = 0; turns_ && i < n; i += kBlock<S>) {
        const Blocks<S> of{n};
        pack_transposed<S>(Rows<const Factor>{rows[i], rows.stride}, K, of.in_block(i / kBlock<S>),
                           of.vectors(i / kBlock<S>), turned + i * K);
      }
    return {{rows.data, rows.stride}, K, turns_ ? turned : nullptr};
  }

  /// W_ih x of n rows, as the first of a block's products.
  void input_product(int d, int64_t block, const Operand& x, int64_t n, S* product) {
    const W* const panel = panels_[d].w_ih ? panels_[d].input_panel(block, 0) : nullptr;
    const int64_t width = width_of(block);
    gate_products(x, n, panel, problem.direction[d].weights.w_ih, block, 0, kShared, product, width,
                  kProducts * width, false);
    gate_products(x, n, panel, problem.direction[d].weights.w_ih, block, kShared, G,
                  product + kInfo.split * width, width, kProducts * width, false);
  }

  /// Adds W_hh h of n rows to the products of a block.
  void recurrent_product(int d, int64_t block, const Operand& h, int64_t n, S* product) {
    const W* const panel = panels_[d].w_hh ? panels_[d].recurrent_panel(block, 0) : nullptr;
    const int64_t width = width_of(block);
    gate_products(h, n, panel, problem.direction[d].weights.w_hh, block, 0, kShared, product, width,
                  kProducts * width, true);
    gate_products(h, n, panel, problem.direction[d].weights.w_hh, block, kShared, G, product, width,
                  kProducts * width, false);
  }

  /// The products of the gates first to end - 1 with a block, [n, units] at c + gate * c_step in rows ldc
  /// apart, from their panels (that of gate 0 is given) or from W as it lies.
  void gate_products(const Operand& a, int64_t n, const W* panel, const Rows<const S>& w, int64_t block,
                     int first, int end, S* c, int64_t c_step, int64_t ldc, bool accumulate) {
    const int vectors = units.vectors(block);
    const int64_t size = panel_depth<W>(a.K) * panel_width<S, W>(vectors);
    if constexpr (kNarrow)
      if (panel && first < end)
        return multiply(a.rows, n, a.K, panel + first * size, end - first, vectors, c + first * c_step,
                        c_step, ldc, accumulate);
    for (int gate = first; !kQuantises && gate < end; ++gate)
      gate_product(a, n, panel ? panel + gate * size : nullptr, w, block, gate, c + gate * c_step, ldc,
                   accumulate);
  }

  /// One gate's product c [n, units] of a block, in rows ldc apart, from its panel or from W as it lies.
  void gate_product(const Operand& a, int64_t n, const W* panel, const Rows<const S>& w, int64_t block,
                    int gate, S* c, int64_t ldc, bool accumulate) {
    if constexpr (!kNarrow)
      if (panel) return multiply<S>(a.rows, n, a.K, panel, units.vectors(block), c, ldc, accumulate, far_);
    const Rows<const Factor> all = w.template of<Factor>(),
                             rows{all[gate * problem.H + block * kBlock<S>], w.stride};
    const int count = units.in_block(block);
    if constexpr (!kQuantises) {
      if (a.turned)
        return multiply_turned<S>(a.turned, static_cast<int>(n), a.K, rows, count, c, ldc, accumulate);
      multiply_transposed<S>(a.rows, n, a.K, rows, count, c, ldc, accumulate);
    }
  }

  void finish(int team, int64_t s, int64_t block, int64_t i, int64_t n, const S* product) {
    const ForwardDirection<S>& dir = problem.direction[this->direction_of(team)];
    constexpr bool kMore = kInfo.states > 1;
    if (dir.options.on) return cells<true, kMore, true>(team, s, block, i, n, product);
    if (dir.saved)
      cells<true, kMore>(team, s, block, i, n, product);
    else if (kMore && dir.history[kInfo.states - 1])
      cells<false, kMore>(team, s, block, i, n, product);
    else
      cells<false, false>(team, s, block, i, n, product);
  }

  /// With options, gates and states are kept where there is room for them.
  template <bool kSaveGates, bool kKeepStates, bool kOptions = false>
  void cells(int team, int64_t s, int64_t block, int64_t i_begin, int64_t n, const S* product) {
    const int d = this->direction_of(team);
    const ForwardDirection<S>& dir = problem.direction[d];
    const TeamRows rows = this->rows_of(team);
    const int64_t t = this->time(d, s), H = problem.H, t_next = this->time(d, s + 1), s_next = s + 1;
    const int64_t rows_after = s + 1 < sequence.T ? sequence.rows(this->time(d, s + 1)) : 0;
    const int width = width_of(block);
    const S *const bias = panels_[d].bias, *const vectors = panels_[d].u;
    const Rows<S> h_now = h_buffer(team, s), h_next = h_buffer(team, s + 1);
    const Rows<Factor> next = problem.projected ? m_buffer(team) : factor_buffer(team, s + 1);
    const bool projected = problem.projected;
    for (int64_t k = 0; k < n; ++k) {
      const int64_t i = i_begin + k, position = rows.position(i), b = sequence.batch(position);
      const int64_t row = sequence.row(t, position);
      const S* const sums = product + k * kProducts * width;
      // The state after this step is forgotten before the next one begins.
      const bool forget = position < rows_after && sequence.resets(this->time(d, s + 1), position);
      S* const y_row = projected ? nullptr : dir.history[kH][row];
      Factor* const next_row = next[i];
      S* const saved_row = kSaveGates && (!kOptions || dir.saved) ? dir.saved[row] : nullptr;
      S *state_row[kInfo.states], *history_row[kInfo.states];
      for (int k = 1; k < kInfo.states; ++k) {
        state_row[k] = dir.last[k][b];
        if constexpr (kKeepStates)
          history_row[k] = kOptions && !dir.history[k] ? nullptr : dir.history[k][row];
      }
      const RowOptions<S> options{dir.options, row, b};
      const auto cell = [&](auto io, int64_t u, int64_t offset) FASTRNN_LAMBDA_INLINE {
        const auto gate = [&](int product) FASTRNN_LAMBDA_INLINE {
          return io.load(bias + product * H + u) + load(sums + product * width + offset);
        };
        ForwardUnit<Cell, V<S>, std::conditional_t<kOptions, OptionsInside<Cell, V<S>>, Untouched>> s;
        if constexpr (kOptions) {
          s.before[kH] = V<S>{};  // unless it is read below
          s.options = options.template inside<Cell>(io, u);
        }
        for (int g = 0; g < G; ++g) s.a[g] = gate(g);
        for (int g = 0; g < kInfo.split; ++g) s.x[g] = gate(G + g);
        for (int k = 0; k < kInfo.vectors; ++k) s.u[k] = io.load(vectors + k * H + u);
        if (kInfo.before(kH) || (kOptions && !projected)) s.before[kH] = io.load(h_now[i] + u);
        for (int k = 1; k < kInfo.states; ++k) s.before[k] = io.load(state_row[k] + u);
        Cell::template forward<Math<S>>(s);
        for (int j = 0; kSaveGates && (!kOptions || saved_row) && j < kInfo.saved; ++j)
          io.store(saved_row + j * H + u, s.saved[j]);
        if constexpr (kOptions) {
          for (int k = 1; k < kInfo.states; ++k) {
            const V<S> after = keep_state(io, options, dir, k, u, s.before[k], s.after[k]);
            if (history_row[k]) io.store(history_row[k] + u, after);
            io.store(state_row[k] + u, forget ? reset_state(io, dir, k, t_next, b, u) : after);
          }
          if (projected) return io.store(next_row + u, s.after[kH]);
          const V<S> after = keep_state(io, options, dir, kH, u, s.before[kH], s.after[kH]);
          io.store(y_row + u, after);
          return publish(io, team, s_next, i, u, forget ? reset_state(io, dir, kH, t_next, b, u) : after, dir,
                         b);
        }
        for (int k = 1; k < kInfo.states; ++k) {
          if constexpr (kKeepStates) io.store(history_row[k] + u, s.after[k]);
          io.store(state_row[k] + u, forget ? V<S>{} : s.after[k]);
        }
        if (!projected) io.store(y_row + u, s.after[kH]);
        const V<S> next = forget && !projected ? V<S>{} : s.after[kH];
        io.store(next_row + u, next);
        if (kRounds && kInfo.before(kH) && !projected) io.store(h_next[i] + u, next);
      };
      each_vector<S>(block * kBlock<S>, units.in_block(block), cell);
    }
  }

  /// The state k of a unit after its step, with zoneout.
  template <class IO>
  FASTRNN_INLINE V<S> keep_state(IO io, const RowOptions<S>& options, const ForwardDirection<S>& dir, int k,
                                 int64_t u, V<S> before, V<S> after) const {
    if (k < kZoned && dir.fresh[k]) io.store(dir.fresh[k][options.row] + u, after);
    return options.zoned(io, k, u, before, after);
  }
  /// The state that row b is reset to before step t.
  template <class IO>
  FASTRNN_INLINE V<S> reset_state(IO io, const ForwardDirection<S>& dir, int k, int64_t t, int64_t b,
                                  int64_t u) const {
    const S* const to = dir.options.reset_state(k, t, b);
    return to ? io.load(to + u) : V<S>{};
  }
  /// h as step s finds it, and as W_hh multiplies it.
  template <class IO>
  FASTRNN_INLINE void publish(IO io, int team, int64_t s, int64_t i, int64_t u, V<S> h,
                              const ForwardDirection<S>& dir, int64_t b) const {
    io.store(h_buffer(team, s)[i] + u, h);
    if (dir.options.recurrent)
      io.store(factor_buffer(team, s)[i] + u, h * io.load(dir.options.recurrent[b] + u));
    else if (kRounds)
      io.store(factor_buffer(team, s)[i] + u, h);
  }

  // ---- A cell in stages: first the products of all units, then whole rows -----------------------------

  /// W_hh h of the team's rows without gaps, [row][gate][units of whole blocks].
  FASTRNN_INLINE Rows<S> products_buffer(int team) const {
    return {rows_ + team * this->most_rows() * row_stride_, row_stride_};
  }

  void row_products(int team, int64_t s, int part) {
    const int d = this->direction_of(team);
    const int64_t n = this->rows_at(team, s);
    const Rows<Left> h_rows = left_rows(team, part, factor_buffer(team, s), n, problem.P);
    const Rows<S> to = products_buffer(team);
    const Operand h{{h_rows.data, h_rows.stride}, problem.P, nullptr};
    const Range blocks = blocks_of(part);
    for (int64_t block = blocks.begin; block < blocks.end; ++block)
      gate_products(h, n, panels_[d].w_hh ? panels_[d].recurrent_panel(block, 0) : nullptr,
                    problem.direction[d].weights.w_hh, block, 0, G, to.data + block * kBlock<S>, gate_stride_,
                    to.stride, false);
  }

  /// The step of a part's rows.
  void row_cells(int team, int64_t s, int part) {
    const Range mine = share(this->rows_at(team, s), part, plan.parts);
    S* const after = after_ + (team * plan.parts + part) * kInfo.states * problem.H;
    const bool options = problem.direction[this->direction_of(team)].options.on;
    for (int64_t i = mine.begin; i < mine.end; ++i)
      options ? row_cell<true>(team, s, i, after) : row_cell<false>(team, s, i, after);
  }

  /// after [states][H]: what the stages hand on.
  template <bool kOptions>
  void row_cell(int team, int64_t s, int64_t i, S* after) {
    const int d = this->direction_of(team);
    const ForwardDirection<S>& dir = problem.direction[d];
    const int64_t t = this->time(d, s), H = problem.H, position = this->rows_of(team).position(i);
    const int64_t row = sequence.row(t, position), b = sequence.batch(position);
    const bool forget = sequence.resets_if_any(this->time(d, s + 1), position);
    const S *const products = products_buffer(team)[i], *const x_row = problem.x[row] + d * G * H;
    const S *const vectors = panels_[d].u, *const h_row = h_buffer(team, s)[i];
    S* const h_next = h_buffer(team, s + 1)[i];
    S* const saved_row = dir.saved ? dir.saved[row] : nullptr;
    const RowOptions<S> options{dir.options, row, b};
    S numbers[array_length(kInfo.row_numbers)] = {};
    each_stage<kInfo.stages>([&]<int kStage>() {
      constexpr bool kLast = kStage == kInfo.stages - 1;
      V<S> sums[kMaxSums] = {};
      each_vector<S>(0, H, [&](auto io, int64_t u, int64_t) FASTRNN_LAMBDA_INLINE {
        ForwardUnit<Cell, V<S>> unit;
        for (int g = 0; g < G; ++g) unit.a[g] = load(products + g * gate_stride_ + u);
        for (int g = 0; g < kInfo.split; ++g) unit.x[g] = io.load(x_row + g * H + u);
        for (int k = 0; k < kInfo.vectors; ++k) unit.u[k] = io.load(vectors + k * H + u);
        for (int r = 0; r < kInfo.row_numbers; ++r) unit.row[r] = broadcast(numbers[r]);
        if (kInfo.before(kH) || kOptions) unit.before[kH] = io.load(h_row + u);
        for (int k = 1; k < kInfo.states; ++k) {
          unit.before[k] = io.load(dir.last[k][b] + u);
          unit.after[k] = kStage > 0 ? io.load(after + k * H + u) : V<S>{};
        }
        Cell::template forward<Math<S>, kStage>(unit);
        if (kStage == kInfo.saves_in && saved_row)
          for (int j = 0; j < kInfo.saved; ++j) io.store(saved_row + j * H + u, unit.saved[j]);
        if constexpr (kLast && kOptions) {
          for (int k = 0; k < kInfo.states; ++k)
            unit.after[k] = keep_state(io, options, dir, k, u, unit.before[k], unit.after[k]);
        }
        if constexpr (kLast) {
          const auto next = [&](int k) FASTRNN_LAMBDA_INLINE {
            if (!forget) return unit.after[k];
            return kOptions ? reset_state(io, dir, k, this->time(d, s + 1), b, u) : V<S>{};
          };
          for (int k = 1; k < kInfo.states; ++k) {
            if (dir.history[k]) io.store(dir.history[k][row] + u, unit.after[k]);
            io.store(dir.last[k][b] + u, next(k));
          }
          io.store(dir.history[kH][row] + u, unit.after[kH]);
          if constexpr (kOptions || kRounds)
            publish(io, team, s + 1, i, u, next(kH), dir, b);
          else
            io.store(h_next + u, next(kH));
        } else {
          for (int k = 1; k < kInfo.states; ++k) io.store(after + k * H + u, unit.after[k]);
          for (int k = 0; k < kMaxSums; ++k) sums[k] += io.only(unit.sums[k]);
        }
      });
      if constexpr (!kLast) {
        const S totals[kMaxSums] = {sum_of_lanes<S>(sums[0]), sum_of_lanes<S>(sums[1])};
        Cell::template row<kStage>(totals, static_cast<S>(H), numbers);
      }
    });
    for (int r = 0; r < kInfo.row_numbers && saved_row; ++r) saved_row[kInfo.saved * H + r] = numbers[r];
  }

  /// h_t = W_hr m_t for the part's blocks of outputs.
  void project(int team, int64_t s, int part) {
    const int d = this->direction_of(team);
    const ForwardDirection<S>& dir = problem.direction[d];
    const TeamRows rows = this->rows_of(team);
    const int64_t t = this->time(d, s), n = this->rows_at(team, s);
    const int64_t rows_after = s + 1 < sequence.T ? sequence.rows(this->time(d, s + 1)) : 0;
    const Rows<S> h_next = h_buffer(team, s + 1);
    const Rows<Left> m = left_rows(team, part, m_buffer(team), n, problem.H);
    const Range blocks = share(outputs.count(), part, plan.parts);
    for (int64_t block = blocks.begin; block < blocks.end; ++block) {
      const int64_t first = block * kBlock<S>;
      const int count = outputs.in_block(block);
      S* const c = h_next.data + first;
      const Rows<const Left> m_rows{m.data, m.stride};
      if (!panels_[d].w_hr) {
        const Rows<const Factor> w = dir.weights.w_hr.template of<Factor>();
        if constexpr (!kQuantises)
          multiply_transposed<S>(m_rows, n, problem.H, Rows<const Factor>{w[first], w.stride}, count, c,
                                 h_next.stride, false);
      } else if constexpr (kNarrow) {
        multiply(m_rows, n, problem.H, panels_[d].projection_panel(block), 1, outputs.vectors(block), c, 0,
                 h_next.stride, false);
      } else {
        multiply<S>(m_rows, n, problem.H, panels_[d].projection_panel(block), outputs.vectors(block), c,
                    h_next.stride, false);
      }
      for (int64_t i = 0; i < n; ++i) {
        const int64_t position = rows.position(i);
        if (dir.options.on) {
          finish_projection(team, s, i, first, count, position < rows_after);
          continue;
        }
        copy_row(dir.history[kH][sequence.row(t, position)] + first, h_next[i] + first, count);
        if (position < rows_after && sequence.resets(this->time(d, s + 1), position))
          __builtin_memset(h_next[i] + first, 0, count * sizeof(S));
        if constexpr (kRounds)
          each_vector<S>(first, count, [&](auto io, int64_t u, int64_t) {
            io.store(factor_buffer(team, s + 1)[i] + u, io.load(h_next[i] + u));
          });
      }
    }
  }

  /// project() for some outputs of row i, which are in the next h: with options.
  void finish_projection(int team, int64_t s, int64_t i, int64_t first, int64_t count, bool goes_on) {
    const int d = this->direction_of(team);
    const ForwardDirection<S>& dir = problem.direction[d];
    const int64_t position = this->rows_of(team).position(i), b = sequence.batch(position);
    const int64_t row = sequence.row(this->time(d, s), position), t_next = this->time(d, s + 1);
    const bool forget = goes_on && sequence.resets(t_next, position);
    const RowOptions<S> options{dir.options, row, b};
    const S *const before = h_buffer(team, s)[i], *const h = h_buffer(team, s + 1)[i];
    each_vector<S>(first, count, [&](auto io, int64_t u, int64_t) FASTRNN_LAMBDA_INLINE {
      const V<S> after = keep_state(io, options, dir, kH, u, io.load(before + u), io.load(h + u));
      io.store(dir.history[kH][row] + u, after);
      publish(io, team, s + 1, i, u, forget ? reset_state(io, dir, kH, t_next, b, u) : after, dir, b);
    });
  }

  /// h_n of a row is its y at its last step; y is zero beyond the lengths.
  void final_states(int d) const {
    const ForwardDirection<S>& dir = problem.direction[d];
    for (int64_t position = 0; position < sequence.B; ++position) {
      const int64_t b = sequence.batch(position), last = sequence.last_step(position);
      const S* const h = last < 0 ? dir.h0[b] : dir.history[kH][sequence.row(d == 0 ? last : 0, position)];
      copy_row(dir.last[kH][b], h, problem.P);
      for (int64_t t = last + 1; sequence.counts && t < sequence.T; ++t)
        clear_row(dir, sequence.row(t, position));
    }
  }

  void clear_row(const ForwardDirection<S>& dir, int64_t row) const {
    __builtin_memset(dir.history[kH][row], 0, problem.P * sizeof(S));
    for (int k = 1; k < kInfo.states; ++k)
      if (dir.history[k]) __builtin_memset(dir.history[k][row], 0, problem.H * sizeof(S));
    if (dir.saved) __builtin_memset(dir.saved[row], 0, kInfo.saved_width(problem.H) * sizeof(S));
    for (int k = 0; k < kZoned; ++k)
      if (dir.fresh[k]) __builtin_memset(dir.fresh[k][row], 0, dir.fresh[k].stride * sizeof(S));
  }

  bool turns_ = false, far_ = false;
  Factor *factors_ = nullptr, *m_ = nullptr, *turned_ = nullptr;
  Left *left_ = nullptr, *x_ = nullptr;
  const int zero_ = kQuantises ? int8_products().zero : 0;
  S *h_ = nullptr, *products_ = nullptr, *rows_ = nullptr, *after_ = nullptr;
  int64_t gate_stride_ = 0, row_stride_ = 0;
  int64_t h_stride_ = 0, factor_stride_ = 0, m_stride_ = 0, x_stride_ = 0, left_stride_ = 0, part_blocks_ = 0,
          steps_at_once_ = 1;
  Panels panels_[kMaxDirections];
};

}  // namespace
}  // namespace fastrnn::FASTRNN_ISA
