// How the work of one scan is shared out. Each direction has `teams` that own batch rows (row b belongs to
// team b % teams, so that packed sequences, whose first rows are the longest, are shared evenly) and never
// meet; inside a team each of the `parts` owns blocks of hidden units and meets the others once a phase.
#pragma once
#include <cstdint>

namespace fastrnn {

struct Plan {
  int teams;  // per direction
  int parts;  // per team
};

struct ScanShape {
  int64_t T, B;            // steps, rows
  int64_t blocks;          // blocks of units
  int64_t block_weights;   // weights that one block reads in a step
  int64_t element_bytes;
  int directions, threads;
};

Plan choose_plan(const ScanShape& shape);

}  // namespace fastrnn
