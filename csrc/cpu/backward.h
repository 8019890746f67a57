// Back-propagation through time on the CPU. A step takes the complete dL/dh_t through the cell, which gives
// the gate gradients, and multiplies these with W_hh, which gives the recurrent part of dL/dh_{t-1}. The
// gradients of weights and input are products over all steps at once, and are made by the caller from dgates.
#pragma once
#include "cpu/columns.h"
#include "cpu/math.h"
#include "cpu/scan.h"

namespace fastrnn::FASTRNN_ISA {
namespace {

/// W is what the packed weights are stored as.
template <class Cell, class S, class W>
class Backward : public Scan<S, BackwardProblem<S>> {
  using Base = Scan<S, BackwardProblem<S>>;
  using Base::outputs, Base::plan, Base::problem, Base::sequence, Base::units;
  static constexpr CellInfo kInfo = Cell::kInfo;
  static constexpr int G = kInfo.gates;
  static constexpr int64_t kChunk = 48;  // rows whose dL/dm of one block is kept at a time
  using Factor = FASTRNN_ISA::Factor<S, W>;  // what the gradients are rounded to before their products
  static constexpr bool kRounds = !std::is_same_v<Factor, S>;

 public:
  FASTRNN_INLINE explicit Backward(const BackwardProblem<S>& given)
      : Base(given, choose_plan({.T = given.sequence.T,
                                 .B = given.sequence.B,
                                 .blocks = Blocks<S>{given.P}.count(),
                                 .block_weights = given.H * G * kBlock<S>,
                                 .element_bytes = sizeof(W),
                                 .directions = given.directions,
                                 .threads = given.parallel.threads})) {}

  /// False when there is no memory for the working arrays.
  bool run() {
    if (sequence.T == 0 || sequence.B == 0) return true;
    const Scratch scratch([this](Memory& memory) { lay_out(memory); }, kKeptInTraining);
    if (scratch.failed()) return false;
    this->Base::run(*this, kInfo.staged() ? 2 * sequence.T
                           : projected()  ? 2 * sequence.T + 1
                                          : sequence.T + 1);
    for (int team = 0; team < this->teams(); ++team) {
      initial_gradient(team);
      add_vectors_gradient(team);
    }
    return true;
  }

  /// Worker `part` of `parts` in what comes before the first phase.
  void prepare(int64_t part, int64_t parts) {
    for (int d = 0; d < problem.directions && kInfo.dense && !few(); ++d) {
      w_hh_[d].pack(part, parts);
      if (projected()) w_hr_[d].pack(part, parts);
    }
    for (auto team = static_cast<int>(part); team < this->teams(); team += static_cast<int>(parts)) {
      const TeamRows rows = this->rows_of(team);
      for (int64_t i = 0; i < rows.count(sequence.B); ++i)
        copy_row(dh_buffer(team)[i],
                 problem.direction[this->direction_of(team)].dstate[kH][sequence.batch(rows.position(i))],
                 problem.P);
      // The products read whole tiles of these rows.
      const int64_t most = this->most_rows();
      if (kRounds)
        __builtin_memset(dgates_buffer(team, 0).data, 0, size_t(2 * most * dgates_stride_) * sizeof(Factor));
      if (kRounds && projected())
        __builtin_memset(complete_buffer(team).data, 0, size_t(most * complete_stride_) * sizeof(Factor));
      for (int buffer = 0; kInfo.vectors > 0 && buffer < shares(); ++buffer)
        __builtin_memset(du_buffer(team, buffer), 0, kInfo.vectors * problem.H * sizeof(S));
    }
  }

  /// The product that closes step s+1 and the cell of step s need no meeting between them, because a part
  /// owns the same units in both.
  void phase(int team, int64_t phase, int part) {
    const Range mine = share(outputs.count(), part, plan.parts);
    if constexpr (kInfo.staged()) {
      const int64_t s = sequence.T - 1 - phase / 2;
      phase % 2 == 0 ? row_gradients(team, s, part) : state_gradient(team, s, mine);
    } else {
      const int64_t back = projected() ? phase / 2 : phase, s = sequence.T - 1 - back;
      if (projected() && phase % 2 == 1)
        return cell_gradient(team, s, share(units.count(), part, plan.parts));
      if (back > 0) state_gradient(team, s + 1, mine);
      if (s < 0) return;
      if (projected())
        output_gradient(team, s, mine);
      else
        cell_gradient(team, s, mine);
    }
  }

 private:
  bool projected() const { return static_cast<bool>(problem.direction[0].weights.w_hr); }
  bool options_on() const { return problem.direction[0].options.on; }
  bool few() const { return this->most_rows() <= kFewRows && sequence.T < kStepsWorthPacking; }

  void lay_out(Memory& s) {
    this->take_teams(s);
    const int64_t most = this->most_rows();
    dh_stride_ = padded<S>(problem.P, kBlock<S>);
    dgates_stride_ = padded<Factor>(G * problem.H, kBlock<Factor>);
    complete_stride_ = padded<Factor>(problem.P, kBlock<Factor>);
    dh_ = s.take<S>(this->teams() * most * dh_stride_);
    dh_complete_ = s.take<Factor>(projected() ? this->teams() * most * complete_stride_ : 0);
    carry_ = s.take<S>(options_on() ? this->teams() * most * dh_stride_ : 0);
    dgates_ = s.take<Factor>(this->teams() * 2 * most * dgates_stride_);
    du_ = s.take<S>(this->teams() * shares() * kInfo.vectors * problem.H);
    for (int d = 0; d < problem.directions; ++d) {
      if (few() || !kInfo.dense) continue;
      const Weights<S>& w = problem.direction[d].weights;
      const bool packs = most <= kFewRows ||
                         packing_columns_pays<S>(most * sequence.T, sequence.T, G * problem.H, problem.P);
      w_hh_[d].lay_out(s, w.w_hh.template of<Factor>(), G * problem.H, problem.P, packs);
      if (projected()) w_hr_[d].lay_out(s, w.w_hr.template of<Factor>(), problem.P, problem.H, packs);
    }
  }

  /// The recurrent part of dL/dh of the team's rows, updated in place from step to step.
  FASTRNN_INLINE Rows<S> dh_buffer(int team) const {
    return {dh_ + team * this->most_rows() * dh_stride_, dh_stride_};
  }
  /// With options: the part of dL/dh_{t-1} that does not come through W_hh.
  FASTRNN_INLINE Rows<S> carry_buffer(int team) const {
    return {carry_ + team * this->most_rows() * dh_stride_, dh_stride_};
  }
  /// With projection: the complete dL/dh_t, from which dL/dm_t = dL/dh_t W_hr.
  FASTRNN_INLINE Rows<Factor> complete_buffer(int team) const {
    return {dh_complete_ + team * this->most_rows() * complete_stride_, complete_stride_};
  }
  /// Gate gradients of the recurrent product, in the gate order of W_hh. Two, because a part writes step s
  /// while another one still reads step s + 1.
  FASTRNN_INLINE Rows<Factor> dgates_buffer(int team, int64_t s) const {
    return {dgates_ + (team * 2 + s % 2) * this->most_rows() * dgates_stride_, dgates_stride_};
  }

  /// Rows' share of the gradient of the vectors of parameters, [U, H]: those of a team, or in stages, where
  /// the parts of a team share its rows, those of a part.
  FASTRNN_INLINE S* du_buffer(int team, int part) const {
    return du_ + (team * shares() + part) * kInfo.vectors * problem.H;
  }
  FASTRNN_INLINE int shares() const { return kInfo.staged() ? plan.parts : 1; }

  /// dL/dh_t = its recurrent part + dL/dy_t, for some outputs.
  void output_gradient(int team, int64_t s, Range blocks) {
    const int d = this->direction_of(team);
    const BackwardDirection<S>& dir = problem.direction[d];
    const TeamRows rows = this->rows_of(team);
    const int64_t t = this->time(d, s), n = this->rows_at(team, s);
    const Rows<S> dh = dh_buffer(team);
    const Rows<Factor> complete = complete_buffer(team);
    const int64_t first = blocks.begin * kBlock<S>, end = min(blocks.end * kBlock<S>, problem.P);
    const Rows<S> carry = carry_buffer(team);
    for (int64_t i = 0; i < n; ++i) {
      const int64_t row = sequence.row(t, rows.position(i)), b = sequence.batch(rows.position(i));
      const RowOptions<S> options{dir.options, row, b};
      each_vector<S>(first, end - first, [&](auto io, int64_t u, int64_t) {
        V<S> v = io.load(dh[i] + u);
        if (dir.doutput[kH]) v += io.load(dir.doutput[kH][row] + u);
        if (dir.options.on) {
          v = options.gradient_clipped(v);
          io.store(carry[i] + u, options.kept(io, kH, u, v));
          io.store(complete[i] + u, options.passed(io, kH, u, v));
        } else {
          io.store(complete[i] + u, v);
        }
        io.store(dir.complete[kH][row] + u, v);
      });
    }
  }

  /// The gate gradients of a part's units. Without projection their dL/dh is complete, and the cell walks
  /// along whole rows, which the hardware prefetchers follow; with one it goes block by block.
  void cell_gradient(int team, int64_t s, Range blocks) {
    const int64_t n = this->rows_at(team, s), first = blocks.begin * kBlock<S>;
    if (!projected()) {
      const Rows<S> dh = dh_buffer(team), dh_rows{dh.data + first, dh.stride};
      const int64_t count = min(blocks.end * kBlock<S>, problem.H) - first;
      return options_on() ? cells<true>(team, s, first, count, 0, n, dh_rows)
                          : cells<false>(team, s, first, count, 0, n, dh_rows);
    }
    for (int64_t block = blocks.begin; block < blocks.end; ++block)
      for (int64_t i = 0; i < n; i += kChunk) projected_cells(team, s, block, i, min(kChunk, n - i));
  }

  /// One block of units for the team's rows i .. i + n.
  void projected_cells(int team, int64_t s, int64_t block, int64_t i, int64_t n) {
    const int64_t first = block * kBlock<S>;
    alignas(64) S dm[kChunk * kBlock<S>];
    const int d = this->direction_of(team);
    const Rows<Factor> complete = complete_buffer(team);
    const Rows<const Factor> a{complete[i], complete.stride};
    if (!few()) {
      w_hr_[d].multiply(a, n, block, dm, kBlock<S>, false);
    } else {
      const Rows<const Factor> w = problem.direction[d].weights.w_hr.template of<Factor>();
      __builtin_memset(dm, 0, sizeof dm);
      multiply_in_place<S, Factor>(a, n, problem.P, {w.data + first, w.stride}, units.in_block(block),
                                   {dm, kBlock<S>});
    }
    const Rows<S> dm_rows{dm, kBlock<S>};
    options_on() ? cells<true>(team, s, first, units.in_block(block), i, n, dm_rows)
                 : cells<false>(team, s, first, units.in_block(block), i, n, dm_rows);
  }

  /// The backward step of the units first .. first + count. dh_rows hold dL/dh_t by way of step t+1, to which
  /// dL/dy_t is added here; with a projection they hold the complete dL/dm_t.
  template <bool kOptions>
  void cells(int team, int64_t s, int64_t first, int64_t count, int64_t i_begin, int64_t n, Rows<S> dh_rows) {
    const int d = this->direction_of(team);
    const BackwardDirection<S>& dir = problem.direction[d];
    const TeamRows rows = this->rows_of(team);
    const int64_t t = this->time(d, s), H = problem.H;
    const int64_t t_prev = this->time(d, s - 1), rows_prev = s > 0 ? sequence.rows(t_prev) : 0;
    const Rows<Factor> dgates_now = dgates_buffer(team, s);
    S* const du = du_buffer(team, 0);
    const bool add_dy = dir.doutput[kH] && !projected(), keep_dh = dir.complete[kH] && !projected();
    for (int64_t k = 0; k < n; ++k) {
      const int64_t i = i_begin + k, position = rows.position(i), b = sequence.batch(position);
      const int64_t row = sequence.row(t, position);
      const bool begins = position >= rows_prev;  // its previous state is the initial one
      const bool forgets = sequence.resets(t, position);  // its previous state counts as zero
      const int64_t row_prev = begins ? 0 : sequence.row(t_prev, position);
      const S* const saved_row = dir.saved[row];
      S* const dgates_row = dir.dgates[row];
      const RowOptions<S> options{dir.options, row, b};
      S* const carry = kOptions ? carry_buffer(team)[i] : nullptr;
      const auto cell = [&](auto io, int64_t u, int64_t offset) FASTRNN_LAMBDA_INLINE {
        const auto previous = [&](int k) FASTRNN_LAMBDA_INLINE {
          if (forgets) return kOptions ? reset_state(io, dir, k, t, b, u) : V<S>{};
          return io.load((begins ? dir.initial[k][b] : dir.history[k][row_prev]) + u);
        };
        BackwardUnit<Cell, V<S>, std::conditional_t<kOptions, OptionsInside<Cell, V<S>>, Untouched>> s;
        if constexpr (kOptions) s.options = options.template inside<Cell>(io, u);
        for (int j = 0; j < kInfo.saved; ++j) s.saved[j] = io.load(saved_row + j * H + u);
        for (int k = 0; k < kInfo.vectors; ++k) s.u[k] = io.load(dir.weights.u[k] + u);
        for (int k = 0; k < kInfo.states; ++k) {
          if (kInfo.after(k)) s.after[k] = io.load(after_row<kOptions>(dir, k, row) + u);
          if (kInfo.before(k)) s.before[k] = previous(k);
        }
        s.dafter[kH] = io.load(dh_rows[k] + offset);
        if (add_dy) s.dafter[kH] += io.load(dir.doutput[kH][row] + u);
        if (kOptions && !projected()) s.dafter[kH] = options.gradient_clipped(s.dafter[kH]);
        if (keep_dh) io.store(dir.complete[kH][row] + u, s.dafter[kH]);
        V<S> kept[kInfo.states] = {};  // goes past the step, to the state before it
        if (kOptions && !projected()) s.dafter[kH] = split(io, options, kH, u, s.dafter[kH], kept);
        for (int k = 1; k < kInfo.states; ++k) {
          s.dafter[k] = io.load(dir.dstate[k][b] + u);
          if (dir.doutput[k]) s.dafter[k] += io.load(dir.doutput[k][row] + u);
          if (kOptions) s.dafter[k] = zone_gradient(io, options, dir, k, u, s.dafter[k], kept);
        }
        Cell::template backward<Math<S>>(s);
        for (int e = 0; e < kInfo.gradients(); ++e) io.store(dgates_row + e * H + u, s.dgates[e]);
        for (int g = 0; g < G; ++g)
          io.store(dgates_now[i] + g * H + u, s.dgates[kInfo.gradient_of_recurrent(g)]);
        for (int k = 1; k < kInfo.states; ++k) {
          if (dir.complete[k] && !(kOptions && dir.options.zones(k)))
            io.store(dir.complete[k][row] + u, s.dafter[k]);
          if constexpr (kOptions) {
            s.dbefore[k] += kept[k];
            if (forgets) add_reset_gradient(io, dir, k, t, b, u, s.dbefore[k]);
          }
          io.store(dir.dstate[k][b] + u, forgets ? V<S>{} : s.dbefore[k]);
        }
        if (kOptions && !projected())
          io.store(carry + u, kInfo.before(kH) ? s.dbefore[kH] + kept[kH] : kept[kH]);
        if constexpr (kInfo.before(kH) && !kOptions) io.store(dh_rows[k] + offset, s.dbefore[kH]);
        for (int v = 0; v < kInfo.vectors; ++v) {
          S* const sum = du + v * H + u;
          io.store(sum, io.load(sum) + s.du[v]);
        }
      };
      each_vector<S>(first, count, cell);
    }
  }

  // ---- Options ------------------------------------------------------------------------------------------

  /// Where the state k after the step lies, before zoneout.
  template <bool kOptions>
  FASTRNN_INLINE static const S* after_row(const BackwardDirection<S>& dir, int k, int64_t row) {
    return kOptions && k < kZoned && dir.fresh[k] ? dir.fresh[k][row] : dir.history[k][row];
  }
  template <class IO>
  FASTRNN_INLINE static V<S> reset_state(IO io, const BackwardDirection<S>& dir, int k, int64_t t, int64_t b,
                                         int64_t u) {
    const S* const to = dir.options.reset_state(k, t, b);
    return to ? io.load(to + u) : V<S>{};
  }
  template <class IO>
  FASTRNN_INLINE static void add_reset_gradient(IO io, const BackwardDirection<S>& dir, int k, int64_t t,
                                                int64_t b, int64_t u, V<S> d) {
    if (S* const to = dir.reset_gradient(k, t, b)) io.store(to + u, io.load(to + u) + d);
  }
  /// The part of dL/d(state after zoneout) that goes to the fresh state; the other one is kept.
  template <class IO>
  FASTRNN_INLINE static V<S> split(IO io, const RowOptions<S>& options, int k, int64_t u, V<S> d,
                                   V<S>* kept) {
    kept[k] = options.options.zones(k) ? options.kept(io, k, u, d) : V<S>{};
    return options.passed(io, k, u, d);
  }
  /// The same of a state beside h, whose gradient is complete here only where it has zoneout.
  template <class IO>
  FASTRNN_INLINE static V<S> zone_gradient(IO io, const RowOptions<S>& options,
                                           const BackwardDirection<S>& dir, int k, int64_t u, V<S> d,
                                           V<S>* kept) {
    if (dir.options.zones(k)) {
      d = options.gradient_clipped(d);
      if (dir.complete[k]) io.store(dir.complete[k][options.row] + u, d);
    }
    return split(io, options, k, u, d, kept);
  }

  /// The backward step of a part's rows, of a cell in stages.
  void row_gradients(int team, int64_t s, int part) {
    const Range mine = share(this->rows_at(team, s), part, plan.parts);
    S* const du = du_buffer(team, part);
    for (int64_t i = mine.begin; i < mine.end; ++i)
      options_on() ? row_gradient<true>(team, s, i, du) : row_gradient<false>(team, s, i, du);
  }

  template <bool kOptions>
  void row_gradient(int team, int64_t s, int64_t i, S* du) {
    const int d = this->direction_of(team);
    const BackwardDirection<S>& dir = problem.direction[d];
    const int64_t t = this->time(d, s), H = problem.H, position = this->rows_of(team).position(i);
    const int64_t t_prev = this->time(d, s - 1), rows_prev = s > 0 ? sequence.rows(t_prev) : 0;
    const int64_t row = sequence.row(t, position), b = sequence.batch(position);
    const bool begins = position >= rows_prev, forgets = sequence.resets(t, position);
    const int64_t row_prev = begins ? 0 : sequence.row(t_prev, position);
    const S* const saved_row = dir.saved[row];
    S *const dh = dh_buffer(team)[i], *const dgates_row = dir.dgates[row];
    Factor* const now = dgates_buffer(team, s)[i];
    const RowOptions<S> options{dir.options, row, b};
    S* const carry = kOptions ? carry_buffer(team)[i] : nullptr;
    S totals[kInfo.backward_stages][kMaxSums] = {};
    each_stage<kInfo.backward_stages>([&]<int kStage>() {
      constexpr bool kLast = kStage == kInfo.backward_stages - 1;
      V<S> sums[kMaxSums] = {};
      each_vector<S>(0, H, [&](auto io, int64_t u, int64_t) FASTRNN_LAMBDA_INLINE {
        BackwardUnit<Cell, V<S>> unit;
        for (int j = 0; j < kInfo.saved; ++j) unit.saved[j] = io.load(saved_row + j * H + u);
        for (int r = 0; r < kInfo.row_numbers; ++r) unit.row[r] = broadcast(saved_row[kInfo.saved * H + r]);
        for (int k = 0; k < kInfo.vectors; ++k)
          unit.u[k] = io.load(dir.weights.u[k] + u), unit.du[k] = V<S>{};
        for (int stage = 0; stage < kStage; ++stage)
          for (int k = 0; k < kMaxSums; ++k) unit.total[stage][k] = broadcast(totals[stage][k]);
        unit.units = broadcast(static_cast<S>(H));
        for (int k = 0; k < kInfo.states; ++k) {
          if (kInfo.after(k)) unit.after[k] = io.load(after_row<kOptions>(dir, k, row) + u);
          if (!kInfo.before(k)) continue;
          if (forgets)
            unit.before[k] = kOptions ? reset_state(io, dir, k, t, b, u) : V<S>{};
          else
            unit.before[k] = io.load((begins ? dir.initial[k][b] : dir.history[k][row_prev]) + u);
        }
        V<S> kept[kInfo.states] = {};
        if constexpr (kStage <= kInfo.complete_in)
          for (int k = 0; k < kInfo.states; ++k) {
            unit.dafter[k] = io.load((k == kH ? dh : dir.dstate[k][b]) + u);
            if (dir.doutput[k]) unit.dafter[k] += io.load(dir.doutput[k][row] + u);
            if (kOptions && k == kH) {
              unit.dafter[k] = options.gradient_clipped(unit.dafter[k]);
              if (dir.complete[k]) io.store(dir.complete[k][row] + u, unit.dafter[k]);
              unit.dafter[k] = split(io, options, k, u, unit.dafter[k], kept);
            } else if (kOptions) {
              unit.dafter[k] = zone_gradient(io, options, dir, k, u, unit.dafter[k], kept);
            }
          }
        if constexpr (kStage > 0)
          for (int e = 0; e < kInfo.gradients(); ++e) unit.dgates[e] = io.load(dgates_row + e * H + u);
        Cell::template backward<Math<S>, kStage>(unit);
        for (int e = 0; e < kInfo.gradients(); ++e) io.store(dgates_row + e * H + u, unit.dgates[e]);
        if constexpr (kStage == kInfo.complete_in)
          for (int k = 0; k < kInfo.states; ++k) {
            if (dir.complete[k] && !(kOptions && (k == kH || dir.options.zones(k))))
              io.store(dir.complete[k][row] + u, unit.dafter[k]);
            if constexpr (kOptions) unit.dbefore[k] = kInfo.before(k) ? unit.dbefore[k] + kept[k] : kept[k];
            if (kOptions && k == kH) {
              io.store(carry + u, unit.dbefore[kH]);
              continue;
            }
            if (kOptions && forgets) add_reset_gradient(io, dir, k, t, b, u, unit.dbefore[k]);
            if (kInfo.before(k))
              io.store((k == kH ? dh : dir.dstate[k][b]) + u, forgets ? V<S>{} : unit.dbefore[k]);
          }
        if constexpr (kLast)
          for (int g = 0; g < G; ++g) io.store(now + g * H + u, unit.dgates[kInfo.gradient_of_recurrent(g)]);
        else
          for (int k = 0; k < kMaxSums; ++k) sums[k] += io.only(unit.sums[k]);
        for (int v = 0; v < kInfo.vectors; ++v)
          io.store(du + v * H + u, io.load(du + v * H + u) + unit.du[v]);
      });
      for (int k = 0; k < kMaxSums && !kLast; ++k) totals[kStage][k] = sum_of_lanes<S>(sums[k]);
    });
  }

  /// The recurrent part of dL/dh_{t-1} = dgates W_hh (+ the direct part), for some outputs.
  void state_gradient(int team, int64_t s, Range blocks) {
    const int64_t first = blocks.begin * kBlock<S>, end = min(blocks.end * kBlock<S>, problem.P);
    const int64_t n = this->rows_at(team, s), t = this->time(this->direction_of(team), s);
    const TeamRows rows = this->rows_of(team);
    const Rows<S> dh = dh_buffer(team);
    if constexpr (kInfo.dense) state_product(team, s, blocks, n, {dh.data + first, dh.stride}, end - first);
    if (options_on()) return carried_gradient(team, s, first, end - first);
    for (int64_t i = 0; sequence.reset && i < n; ++i)
      if (sequence.resets(t, rows.position(i))) __builtin_memset(dh[i] + first, 0, (end - first) * sizeof(S));
  }

  /// The same with options, from the product (before its mask) and what was carried past it.
  void carried_gradient(int team, int64_t s, int64_t first, int64_t count) {
    const int d = this->direction_of(team);
    const BackwardDirection<S>& dir = problem.direction[d];
    const int64_t n = this->rows_at(team, s), t = this->time(d, s);
    for (int64_t i = 0; i < n; ++i) {
      const int64_t position = this->rows_of(team).position(i), b = sequence.batch(position);
      const bool forgets = sequence.resets(t, position);
      const S* const mask = dir.options.recurrent ? dir.options.recurrent[b] : nullptr;
      S *const dh = dh_buffer(team)[i], *const carry = carry_buffer(team)[i];
      each_vector<S>(first, count, [&](auto io, int64_t u, int64_t) FASTRNN_LAMBDA_INLINE {
        V<S> v = io.load(carry + u);
        if (kInfo.dense) v += mask ? io.load(dh + u) * io.load(mask + u) : io.load(dh + u);
        if (forgets) add_reset_gradient(io, dir, kH, t, b, u, v);
        io.store(dh + u, forgets ? V<S>{} : v);
      });
    }
  }

  void state_product(int team, int64_t s, Range blocks, int64_t n, Rows<S> dh, int64_t columns) {
    const int d = this->direction_of(team);
    const Rows<Factor> dgates = dgates_buffer(team, s);
    const bool adds = kInfo.before(kH) && !options_on();
    if (!few()) {
      for (int64_t block = blocks.begin; block < blocks.end; ++block)
        w_hh_[d].multiply({dgates.data, dgates.stride}, n, block,
                          dh.data + (block - blocks.begin) * kBlock<S>, dh.stride, adds);
      return;
    }
    const Rows<const Factor> w = problem.direction[d].weights.w_hh.template of<Factor>();
    for (int64_t i = 0; i < n && !adds; ++i) __builtin_memset(dh[i], 0, columns * sizeof(S));
    multiply_in_place<S, Factor>({dgates.data, dgates.stride}, n, G * problem.H,
                                 {w.data + blocks.begin * kBlock<S>, w.stride}, columns, dh);
  }

  /// dL/dh_0, and zeros in the rows beyond the lengths.
  void initial_gradient(int team) const {
    const BackwardDirection<S>& dir = problem.direction[this->direction_of(team)];
    const TeamRows rows = this->rows_of(team);
    for (int64_t i = 0; i < rows.count(sequence.B); ++i) {
      const int64_t position = rows.position(i);
      copy_row(dir.dstate[kH][sequence.batch(position)], dh_buffer(team)[i], problem.P);
      for (int64_t t = sequence.last_step(position) + 1; sequence.counts && t < sequence.T; ++t) {
        const int64_t row = sequence.row(t, position);
        __builtin_memset(dir.dgates[row], 0, kInfo.gradients() * problem.H * sizeof(S));
        for (int k = 0; k < kInfo.states; ++k)
          if (dir.complete[k])
            __builtin_memset(dir.complete[k][row], 0, (k == kH ? problem.P : problem.H) * sizeof(S));
      }
    }
  }

  /// Adds the team's share to dL/du, one team after the other: always in the same order.
  void add_vectors_gradient(int team) const {
    const Rows<S>& du = problem.direction[this->direction_of(team)].du;
    for (int part = 0; part < shares(); ++part)
      for (int v = 0; v < kInfo.vectors; ++v)
        for (int64_t u = 0; u < problem.H; ++u) du[v][u] += du_buffer(team, part)[v * problem.H + u];
  }

  S *dh_ = nullptr, *carry_ = nullptr, *du_ = nullptr;
  Factor *dh_complete_ = nullptr, *dgates_ = nullptr;
  int64_t dh_stride_ = 0, dgates_stride_ = 0, complete_stride_ = 0;
  Columns<S, Factor> w_hh_[kMaxDirections], w_hr_[kMaxDirections];
};

}  // namespace
}  // namespace fastrnn::FASTRNN_ISA
