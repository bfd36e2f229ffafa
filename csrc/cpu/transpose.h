// Matrices transposed, several at a time.
#pragma once

#include <algorithm>

#include "tile.h"

namespace dat::cpu::DAT_SIMD {

template <class T>
void transpose(const Transpose& p, const Threads& threads) {
  constexpr int64_t kColumns = 4 * kLanes<T>;  // a task's: whole lines are read
  const int64_t parts = ceil_div(p.columns, kColumns);
  parallel(threads, int(p.batch * parts), [&](int task) {
    const int64_t matrix = task / parts, first = task % parts * kColumns;
    const T* from = static_cast<const T*>(p.from) + matrix * p.from_matrix + first;
    T* to = static_cast<T*>(p.to) + (matrix * p.columns + first) * p.rows;
    read_transposed([=, &p](int row) { return from + row * p.from_row; }, int(p.rows),
                    int(std::min(kColumns, p.columns - first)), T(1), to, p.rows);
  });
}

}  // namespace dat::cpu::DAT_SIMD
