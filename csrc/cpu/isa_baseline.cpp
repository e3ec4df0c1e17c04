#include "lists_kernels.h"
#include "tile_kernels.h"

namespace align {
const Isa baseline_isa{"baseline", forward_block, peak_block, exponentials_block, backward_block,
                       survey_row, keep_block, combine};
}
