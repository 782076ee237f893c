// The passes of batch normalisation over tiles of the 16-bit types.
#include "batch_norm_passes.h"

namespace fused_ops {

template Passes<c10::Half> passes_with(const std::optional<std::string>&);
template Passes<c10::BFloat16> passes_with(const std::optional<std::string>&);

}  // namespace fused_ops
