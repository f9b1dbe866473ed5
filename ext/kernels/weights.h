// What attention gives the cells of a block.

#pragma once

namespace ai4all::kernels {

constexpr int block_cells = 32;  // as many keys and values as the first cache holds

// What the values are weighted with: each cell's weight, and what the sum is scaled with before it.
struct weights {
    int   cell[block_cells];
    float scale[block_cells];
    float weight[block_cells];
    int   count = 0;
};

}  // namespace ai4all::kernels
