#include "tile_kernels.h"

namespace align {
const Isa baseline_isa{"baseline", forward_block, backward_block, peaks_block};
}
