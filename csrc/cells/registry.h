// The cells that exist. Every table, operator and kernel follows from this list.
#pragma once
#include <type_traits>

#include "cells/gru.h"
#include "cells/gru_layer_norm.h"
#include "cells/indrnn.h"
#include "cells/lstm.h"
#include "cells/lstm_coupled.h"
#include "cells/lstm_layer_norm.h"
#include "cells/rnn.h"
#include "cells/slstm.h"

namespace fastrnn {

template <class... Cells>
struct CellList {
  static_assert((is_valid(Cells::kInfo) && ...));
  static constexpr int kCount = sizeof...(Cells);
  template <class F>
  static void each(F f) {
    (f.template operator()<Cells>(), ...);
  }
  template <class Cell>
  static constexpr int index() {
    int index = 0;
    (void)((std::is_same_v<Cell, Cells> || (++index, false)) || ...);
    return index;
  }
};

/// f.operator()<Cell>() for the cell with these numbers.
template <class Cells, class F>
FASTRNN_INLINE void with_cell(const CellInfo& cell, F f) {
  Cells::each([&]<class Cell>() {
    if (&Cell::kInfo == &cell) f.template operator()<Cell>();
  });
}

using AllCells = CellList<Lstm, LstmPeephole, LstmCoupled, LstmLayerNorm, Gru, RnnTanh, RnnRelu, IndRnnTanh,
                          IndRnnRelu, Slstm, GruLayerNorm, LayerNormGru, RmsNormGru>;

}  // namespace fastrnn
