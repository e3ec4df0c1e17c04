#include "lists_kernels.h"
#include "tile_kernels.h"

namespace align {
const Isa avx2_isa{"avx2", forward_block, peak_block, exponentials_block, backward_block,
                   survey_row, keep_block, combine};
}
