#include "tile_kernels.h"

namespace align {
const Isa avx512_isa{"avx512", forward_block, peak_block, exponentials_block, backward_block, peaks_block};
}
