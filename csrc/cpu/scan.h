// What the forward and the backward scan share: who owns which rows and blocks, and how the vectors of a
// row are walked.
#pragma once
#include "cells/cell.h"
#include "cpu/gemm.h"
#include "cpu/plan.h"
#include "cpu/scratch.h"
#include "cpu/team.h"

namespace fastrnn::FASTRNN_ISA {
namespace {

/// A whole register of units, or the ragged rest of a row.
struct Full {
  template <class S>
  FASTRNN_INLINE V<S> load(const S* p) const {
    return FASTRNN_ISA::load(p);
  }
  template <class S>
  FASTRNN_INLINE void store(S* p, V<S> v) const {
    FASTRNN_ISA::store(p, v);
  }
  FASTRNN_INLINE void store(Bfloat16* p, V<float> v) const { FASTRNN_ISA::store(p, v); }
  template <class V>
  FASTRNN_INLINE V only(V v) const {
    return v;
  }
  template <class S>
  FASTRNN_INLINE Integers<S> flags(const bool* p) const {
    return FASTRNN_ISA::flags<S>(p, kLanes<S>);
  }
};
struct Part {
  int count;
  template <class S>
  FASTRNN_INLINE V<S> load(const S* p) const {
    return FASTRNN_ISA::load(p, count);
  }
  template <class S>
  FASTRNN_INLINE void store(S* p, V<S> v) const {
    FASTRNN_ISA::store(p, v, count);
  }
  FASTRNN_INLINE void store(Bfloat16* p, V<float> v) const { FASTRNN_ISA::store(p, v, count); }
  /// Zero in the lanes beyond the row.
  template <class V>
  FASTRNN_INLINE V only(V v) const {
    for (int lane = count; lane < static_cast<int>(sizeof v / sizeof v[0]); ++lane) v[lane] = 0;
    return v;
  }
  template <class S>
  FASTRNN_INLINE Integers<S> flags(const bool* p) const {
    return FASTRNN_ISA::flags<S>(p, count);
  }
};

template <class S>
FASTRNN_INLINE S sum_of_lanes(V<S> v) {
  S sum = 0;
  for (int lane = 0; lane < kLanes<S>; ++lane) sum += v[lane];
  return sum;
}

/// f(io, unit, offset) for each register of `units` units that begin at `first`.
template <class S, class F>
FASTRNN_INLINE void each_vector(int64_t first, int64_t units, F&& f) {
  int64_t offset = 0;
  for (; offset + kLanes<S> <= units; offset += kLanes<S>) f(Full{}, first + offset, offset);
  if (offset < units) f(Part{static_cast<int>(units - offset)}, first + offset, offset);
}

/// What options do with the states of one row at one step, b its place in the batch.
template <class S>
struct RowOptions {
  const StepOptions<S>& options;
  int64_t row, b;

  /// The state after the step, of a unit that was `old` before it and is now `fresh`.
  template <class IO>
  FASTRNN_INLINE V<S> zoned(IO io, int k, int64_t u, V<S> old, V<S> fresh) const {
    if (!options.zones(k)) return fresh;
    if (options.keep[k]) return io.template flags<S>(options.keep[k][row] + u) ? old : fresh;
    const S share = static_cast<S>(options.share[k]);
    return share * old + (1 - share) * fresh;
  }
  /// The part of the gradient of a state after zoneout that goes to the state before the step.
  template <class IO>
  FASTRNN_INLINE V<S> kept(IO io, int k, int64_t u, V<S> d) const {
    return zoned(io, k, u, d, V<S>{});
  }
  /// And the part that goes to the fresh state.
  template <class IO>
  FASTRNN_INLINE V<S> passed(IO io, int k, int64_t u, V<S> d) const {
    return zoned(io, k, u, V<S>{}, d);
  }
  FASTRNN_INLINE V<S> gradient_clipped(V<S> d) const {
    return options.gradient_clip > 0 ? clipped(d, broadcast(static_cast<S>(options.gradient_clip))) : d;
  }
  /// What acts inside the step of a unit.
  template <class Cell, class IO>
  FASTRNN_INLINE OptionsInside<Cell, V<S>> inside(IO io, int64_t u) const {
    OptionsInside<Cell, V<S>> touched;
    if constexpr (!std::is_same_v<decltype(touched), Untouched>) {
      touched.mask = options.candidate ? io.load(options.candidate[row] + u) : broadcast(S{1});
      touched.clip = bound(options.cell_clip);
      // Where zoneout acts on c, the clip acts on the gradient after it.
      touched.gradient_clip = bound(options.zones(kC) ? 0 : options.gradient_clip);
    }
    return touched;
  }

 private:
  static FASTRNN_INLINE V<S> bound(double v) {
    return broadcast(v > 0 ? static_cast<S>(v) : static_cast<S>(__builtin_inf()));
  }
};

/// The rows of one team: positions first, first + stride, ... among the rows in the order of their length.
struct TeamRows {
  int64_t first, stride;
  FASTRNN_INLINE int64_t position(int64_t i) const { return first + i * stride; }
  /// How many of the first n rows are the team's.
  FASTRNN_INLINE int64_t count(int64_t n) const { return n > first ? (n - first + stride - 1) / stride : 0; }
};

struct Range {
  int64_t begin, end;
};
FASTRNN_INLINE Range share(int64_t count, int part, int parts) {
  return {count * part / parts, count * (part + 1) / parts};
}

/// f(phase, part) for all phases, as a member of a team of `parts`; who is alone needs no team.
template <class F>
FASTRNN_INLINE void together(Team* team, int parts, bool alone, int64_t self, int64_t phases, const F& f) {
  if (alone) {
    for (int64_t phase = 0; phase < phases; ++phase)
      for (int part = 0; part < parts; ++part) f(phase, part);
    return;
  }
  team->work(
      static_cast<int>(self), phases,
      [](void* context, int64_t phase, int part) { (*static_cast<const F*>(context))(phase, part); },
      const_cast<F*>(&f));
}

/// The parts of a scan that do not depend on the cell. Problem is a forward or backward problem.
template <class S, class Problem>
struct Scan {
  const Problem& problem;
  const Sequence& sequence;
  const Blocks<S> units, outputs;  // of H and of P
  const Plan plan;

  FASTRNN_INLINE Scan(const Problem& given, Plan chosen)
      : problem(given), sequence(given.sequence), units{given.H}, outputs{given.P}, plan(chosen) {}

  FASTRNN_INLINE int teams() const { return problem.directions * plan.teams; }
  FASTRNN_INLINE int workers() const { return teams() * plan.parts; }
  FASTRNN_INLINE int direction_of(int team) const { return team / plan.teams; }
  FASTRNN_INLINE TeamRows rows_of(int team) const { return {team % plan.teams, plan.teams}; }
  FASTRNN_INLINE int64_t most_rows() const { return (sequence.B + plan.teams - 1) / plan.teams; }
  /// The time of step s: direction 1 starts at the end.
  FASTRNN_INLINE int64_t time(int direction, int64_t s) const {
    return direction == 0 ? s : sequence.T - 1 - s;
  }

  /// Rows of step s that are the team's.
  FASTRNN_INLINE int64_t rows_at(int team, int64_t s) const {
    return rows_of(team).count(sequence.rows(time(direction_of(team), s)));
  }

  FASTRNN_INLINE void take_teams(Memory& memory) {
    everyone_ = memory.take<Team>(1);
    teams_ = memory.take<Team>(teams());
  }

  /// In one parallel region: the preparation by everyone, and when all of it is done the phases of each team.
  /// Self is the scan with `prepare(part, parts)` and `phase(team, phase, part)`.
  template <class Self>
  FASTRNN_INLINE void run(Self& self, int64_t phases) {
    // Beside busy processes a team starts with fewer members, who do the same parts: the same bits.
    const int members = plan.parts > 1 ? contention().members(plan.parts) : 1;
    const int started = teams() * members, preparers = min(started, kMaxParts);
    if (preparers > 1) ::new (everyone_) Team(preparers);
    for (int team = 0; team < teams() && members > 1; ++team) ::new (teams_ + team) Team(plan.parts);
    problem.parallel(started, [&](int64_t worker) {
      together(everyone_, preparers, preparers == 1, worker % preparers, 1,
               [&](int64_t, int part) { self.prepare(part, preparers); });
      const auto team = static_cast<int>(worker / members);
      together(teams_ + team, plan.parts, members == 1, worker % members, phases,
               [&](int64_t phase, int part) { self.phase(team, phase, part); });
    });
    int late = 0;
    for (int team = 0; team < teams() && members > 1; ++team) late = max(late, teams_[team].late());
    if (members > 1) contention().report(plan.parts, members, late);
  }

 private:
  Team *everyone_ = nullptr, *teams_ = nullptr;
};

template <class S>
FASTRNN_INLINE void copy_row(S* to, const S* from, int64_t count) {
  __builtin_memcpy(to, from, static_cast<size_t>(count) * sizeof(S));
}

/// to = from * mask.
template <class S>
inline void scale_row(S* to, const S* from, const S* mask, int64_t count) {
  each_vector<S>(0, count, [&](auto io, int64_t u, int64_t) {
    io.store(to + u, io.load(from + u) * io.load(mask + u));
  });
}

}  // namespace
}  // namespace fastrnn::FASTRNN_ISA
