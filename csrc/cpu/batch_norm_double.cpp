// The passes of batch normalisation over tiles of float64.
#include "batch_norm_passes.h"

namespace fused_ops {

template Passes<double> passes_with(const std::optional<Name>&);

}  // namespace fused_ops
