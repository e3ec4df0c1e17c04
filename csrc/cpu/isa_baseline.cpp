#include "tile_kernels.h"

namespace align {
const Isa baseline_isa{"baseline", forward_block, peak_block, exponentials_block, backward_block, peaks_block};
}
